"""LPIPS: shapes and invariants with random weights here; against the published package in
tests/weights/test_lpips.py, where its weights are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from dexportrait_jax.models import perceptual
from dexportrait_jax.models.perceptual import PerceptualNetwork, feature_norms, reduce_maps
from dexportrait_jax.state import Network, parameter_count
from dexportrait_jax.weights import names


def _network(network):
    return Network(lambda rngs: PerceptualNetwork(network, rngs=rngs))


@pytest.fixture(scope="module")
def alexnet():
    network = _network("alexnet")
    random = np.random.default_rng(3)
    params = jax.tree.map(
        lambda x: jnp.asarray(random.normal(0, 0.05, x.shape), jnp.float32), network.abstract
    )
    for index in range(5):  # the published heads are not negative
        kernel = params[f"lin{index}"]["model"]["1"]["kernel"]
        params[f"lin{index}"]["model"]["1"]["kernel"] = jnp.abs(kernel)
    return network.bind(params)


@pytest.fixture(scope="module")
def features(alexnet):
    """Features of two different batches of pictures; compiled once for all tests."""
    compiled = jax.jit(alexnet.features)
    return compiled(_pictures(seed=1)), compiled(_pictures(seed=2))


def _pictures(count=2, size=64, seed=0):
    random = np.random.default_rng(seed)
    return jnp.asarray(random.uniform(-1, 1, (count, size, size, 3)), jnp.float32)


@pytest.mark.parametrize(("network", "millions"), [("vgg16", 14.716), ("alexnet", 2.471)])
def test_parameters_and_published_names(network, millions):
    abstract = _network(network).abstract
    assert parameter_count(abstract) / 1e6 == pytest.approx(millions, abs=1e-3)
    keys = {names.torch_key(path) for path, _ in names.flatten(abstract)}
    first_of_last = {"vgg16": "net.slice5.24.weight", "alexnet": "net.slice5.10.weight"}
    assert {"net.slice1.0.bias", first_of_last[network], "lin4.model.1.weight"} <= keys


def test_equal_pictures_have_no_distance_and_order_does_not_matter(alexnet, features):
    fx, fy = features
    np.testing.assert_array_equal(alexnet.distance(fx, fx), 0)
    forward = alexnet.distance(fx, fy)
    assert forward.shape == (2,) and np.all(forward > 0)
    np.testing.assert_allclose(forward, alexnet.distance(fy, fx), rtol=1e-6)


def test_short_forms_are_the_distance_of_features(alexnet, features):
    x, y, mask = _pictures(seed=1), _pictures(seed=2), jnp.ones((2, 64, 64)).at[:, 20:].set(0)
    both = jax.jit(lambda x, y: (alexnet.lpips(x, y), alexnet.masked_lpips(x, y, mask)))(x, y)
    np.testing.assert_allclose(both[0], alexnet.distance(*features), rtol=1e-4)
    np.testing.assert_allclose(both[1], alexnet.distance(*features, mask), rtol=1e-4)


def test_masks(alexnet, features):
    whole, none = jnp.ones((2, 64, 64)), jnp.zeros((2, 64, 64))
    plain = alexnet.distance(*features)
    for reduction in ("all_positions", "mask_area"):
        np.testing.assert_allclose(alexnet.distance(*features, whole, reduction), plain, rtol=1e-5)
        np.testing.assert_array_equal(alexnet.distance(*features, none, reduction), 0)
    left = whole.at[:, :, 32:].set(0)
    halves = alexnet.distance(*features, left) + alexnet.distance(*features, 1 - left)
    np.testing.assert_allclose(halves, plain, rtol=1e-5)


def test_reductions_by_hand():
    maps = [jnp.asarray([[[1.0, 2.0], [3.0, 4.0]]]), jnp.asarray([[[10.0]]])]
    mask = (
        jnp.zeros((1, 4, 4)).at[:, :2, :2].set(1)
    )  # one cell of four; a quarter of the last layer
    np.testing.assert_allclose(reduce_maps(maps), [2.5 + 10])
    np.testing.assert_allclose(reduce_maps(maps, mask), [1 / 4 + 10 / 4])
    np.testing.assert_allclose(reduce_maps(maps, mask, "mask_area"), [1 + 10])
    with pytest.raises(ValueError, match="reduction"):
        reduce_maps(maps, mask, "mean")


def test_feature_norms_by_hand():
    """Of two layers: differences (3, 4) in one of two cells and (1, 1) in the other; 6 in a single cell."""
    fx = [jnp.asarray([[[[3.0, 4.0], [1.0, 1.0]]]]), jnp.asarray([[[[6.0]]]])]
    fy = [jnp.zeros_like(layer) for layer in fx]
    left = jnp.asarray([[[1.0, 0.0], [1.0, 0.0]]])  # the first cell, and half of the last layer's
    np.testing.assert_allclose(feature_norms(fx, fy), [np.sqrt(27 / 4) + 6], rtol=1e-6)
    np.testing.assert_allclose(feature_norms(fx, fy, left), [np.sqrt(25 / 4) + 3], rtol=1e-6)
    by_area = feature_norms(fx, fy, left, "mask_area")
    np.testing.assert_allclose(by_area, [np.sqrt(25 / 2) + 6], rtol=1e-6)
    gradient = jax.grad(lambda fx: feature_norms(fx, fy).sum())(fy)
    assert all(np.all(layer == 0) for layer in gradient)
    with pytest.raises(ValueError, match="reduction"):
        feature_norms(fx, fy, left, "mean")


def test_plain_features_are_those_before_they_get_unit_length(alexnet, features):
    plain = jax.jit(lambda x: alexnet.features(x, unit_length=False))(_pictures(seed=1))
    for before, after in zip(plain, features[0], strict=True):
        length = np.linalg.norm(before, axis=-1, keepdims=True)
        assert length.max() > 1.5 or length.max() < 0.5
        np.testing.assert_allclose(after * length, before, rtol=1e-4, atol=1e-6)


def test_gradient_is_finite_where_features_vanish(alexnet):
    state = nnx.state(alexnet, nnx.Param)
    dead = jax.tree.map(lambda value: value * 0 - 1, state)  # every ReLU shut
    module = nnx.merge(nnx.graphdef(alexnet), dead)
    x, y = jnp.ones((1, 64, 64, 3)), _pictures(1)
    gradient = jax.jit(jax.grad(lambda x: module.lpips(x, y).sum()))(x)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize(("window", "size"), [(2, 8), (2, 9), (3, 15), (3, 16), (3, 7)])
def test_max_pool_is_torch_s(window, size):
    x = _pictures(2, size)
    ours = perceptual._max_pool(x, window)
    theirs = torch.nn.functional.max_pool2d(
        torch.tensor(np.asarray(x).transpose(0, 3, 1, 2)), window, 2
    )
    np.testing.assert_array_equal(ours, theirs.numpy().transpose(0, 2, 3, 1))


@pytest.mark.parametrize("window", [2, 3])
def test_max_pool_gradient_is_xla_s(window):
    x = _pictures(1, 15)

    def xla(x):
        size = (1, window, window, 1)
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, size, (1, 2, 2, 1), "VALID")

    def squared(pool):
        return jax.grad(lambda x: jnp.sum(pool(x) ** 2))(x)

    ours = squared(lambda x: perceptual._max_pool(x, window))
    np.testing.assert_allclose(ours, squared(xla), rtol=1e-6)


def test_bad_arguments(alexnet):
    with pytest.raises(ValueError, match="vgg16, alexnet"):
        PerceptualNetwork("resnet", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="at least 31 px"):
        alexnet.lpips(_pictures(size=24), _pictures(size=24))
