"""Every attention backend against the plain sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from dexportrait_jax import sharding
from dexportrait_jax.models import attention as module
from dexportrait_jax.models.attention import (
    Attention,
    attention,
    attention_backend,
    choose_backend,
    repeat_rows,
)
from dexportrait_jax.platforms import planned_for
from dexportrait_jax.state import Network
from tests.published import random_like


def written_out(query, key, value, keep):
    """Attention in float64, sample by sample and head by head."""
    result = np.zeros(query.shape)
    for b in range(query.shape[0]):
        for h in range(query.shape[2]):
            q, k, v = (np.asarray(x, np.float64)[b, :, h] for x in (query, key, value))
            weights = np.exp(q @ k.T / np.sqrt(q.shape[-1]))
            weights = weights if keep is None else weights * np.asarray(keep)[b]
            result[b, :, h] = weights @ v / weights.sum(axis=-1, keepdims=True)
    return result


def inputs(batch, queries, keys, heads, features):
    generator = np.random.default_rng(0)
    shapes = [(batch, queries, heads, features)] + [(batch, keys, heads, features)] * 2
    arrays = [jnp.asarray(generator.normal(size=shape), jnp.float32) for shape in shapes]
    keep = jnp.ones((batch, keys), bool).at[-1, keys // 2 :].set(False)
    return arrays, keep


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("backend", ["plain", "chunked", "blocked"])
@pytest.mark.parametrize("queries", [6, 8])
def test_backends(backend, masked, queries, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_QUERIES", 4)
    monkeypatch.setattr(module, "BLOCK_LOGITS", 40)
    arrays, keep = inputs(2, queries, 10, 3, 4)
    keep = keep if masked else None

    def run(*arrays, backend):
        return attention(*arrays, keep, backend=backend)

    expected = written_out(*arrays, keep)
    np.testing.assert_allclose(run(*arrays, backend=backend), expected, rtol=1e-5, atol=1e-5)

    def gradients(backend):
        loss = lambda *arrays: jnp.sum(jnp.sin(run(*arrays, backend=backend)))  # noqa: E731
        return jax.grad(loss, argnums=(0, 1, 2))(*arrays)

    for ours, plain in zip(gradients(backend), gradients("plain"), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [True, False])
def test_splash_in_its_interpreter(masked):
    """Lengths and widths that are no whole blocks; the kernel itself, interpreted on the CPU."""
    arrays, keep = inputs(2, 130, 200, 2, 40)
    keep = keep if masked else None

    def run(backend, *arrays):
        return attention(*arrays, keep, backend=backend)

    expected = written_out(*arrays, keep)
    np.testing.assert_allclose(run("splash", *arrays), expected, rtol=2e-5, atol=2e-5)

    def gradients(backend):
        loss = lambda *arrays: jnp.sum(jnp.sin(run(backend, *arrays)))  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)

    for ours, plain in zip(gradients("splash"), gradients("plain"), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=2e-5)


def test_splash_on_a_mesh_is_splash_on_one_device():
    """Samples over data and context, heads over tensor; a batch that only data divides stays whole over context."""
    mesh = sharding.make_mesh(ConfigDict({"data": 2, "fsdp": 1, "context": 2, "tensor": 2}))
    for batch in (4, 2):
        arrays, keep = inputs(batch, 128, 128, 2, 8)
        alone = attention(*arrays, keep, backend="splash")
        with jax.set_mesh(mesh):
            spread = jax.jit(lambda *given: attention(*given, backend="splash"))(*arrays, keep)
        np.testing.assert_allclose(spread, alone, rtol=1e-6, atol=1e-6)


def halves(batch, queries, keys, heads=4, features=8):
    """Shapes of query, key and value in bfloat16."""
    return tuple(
        jax.ShapeDtypeStruct((batch, length, heads, features), jnp.bfloat16)
        for length in (queries, keys, keys)
    )


def gradients_of(keep=None):
    def loss(*arrays):
        return jnp.sum(attention(*arrays, keep).astype(jnp.float32))

    return jax.grad(loss, argnums=(0, 1, 2))


@pytest.mark.parametrize("backend", ["plain", "chunked", "blocked", "splash"])
def test_a_length_is_the_mask_of_so_many_keys(backend):
    arrays, keep = inputs(2, 6, 10, 3, 4)
    by_mask = attention(*arrays, keep, backend=backend)
    by_length = attention(*arrays, jnp.sum(keep, axis=1), backend=backend)
    np.testing.assert_array_equal(by_length, by_mask)


def test_what_cudnn_is_told_is_the_plain_sum():
    """By XLA, which takes the same arguments."""
    arrays, keep = inputs(2, 6, 10, 3, 4)

    def run(attend):
        loss = lambda *arrays: jnp.sum(jnp.sin(attend(*arrays)))  # noqa: E731
        return attend(*arrays), *jax.grad(loss, argnums=(0, 1, 2))(*arrays)

    for lengths, mask in ((jnp.sum(keep, axis=1), keep), (None, None)):
        ours = run(lambda *a, n=lengths: module.cudnn(*a, n, implementation="xla"))
        plain = run(lambda *a, m=mask: attention(*a, m, backend="plain"))
        for one, other in zip(ours, plain, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_choice_on_a_gpu(cudnn_stubbed):
    """cuDNN where it has a gradient and needs no mask: what would raise is another backend's."""
    samples = jnp.array([True, False])
    cases = [
        ((1024, 2048), None, "cudnn"),
        ((4096, 8192), jnp.where(samples, 8192, 4096), "cudnn"),
        ((1024, 2048), jnp.ones((2, 2048), bool), "plain"),  # single tokens left out
        ((4096, 8192), jnp.ones((2, 8192), bool), "chunked"),
        ((1024, 1), None, "plain"),  # attn2=clip_image
        ((4096, 77), None, "chunked"),  # attn2=null_text
        ((15, 15), None, "plain"),  # a clip of 15 frames
    ]
    with planned_for("gpu"):
        for lengths, keep, backend in cases:
            arrays = halves(2, *lengths)
            assert choose_backend(*arrays[:2], keep) == backend, lengths
            found = jax.eval_shape(gradients_of(keep), *arrays)
            assert [one.shape for one in found] == [one.shape for one in arrays]
            traced = str(jax.make_jaxpr(gradients_of(keep))(*arrays))
            assert ("dot_product_attention" in traced) == (backend == "cudnn"), lengths


@pytest.mark.parametrize(
    ("platform", "queries", "features", "backend"),
    [
        ("gpu", 1024, 128, "cudnn"),
        ("gpu", 1024, 136, "plain"),  # wider heads than it takes
        ("gpu", 1024, 20, "plain"),  # no whole eights
        ("gpu", 1025, 128, "plain"),
        ("tpu", 4095, 128, "plain"),
        ("tpu", 4096, 128, "splash"),
        ("tpu", 4096, 40, "splash"),
    ],
)
def test_limits_of_the_choice(platform, queries, features, backend):
    query, key, _ = halves(2, queries, 4096, features=features)
    with planned_for(platform):
        assert choose_backend(query, key) == backend


def test_cudnn_takes_no_mask_of_keys(cudnn_stubbed):
    with pytest.raises(ValueError, match="'cudnn' takes how many keys take part"):
        attention(*inputs(2, 4, 4, 1, 8)[0], jnp.ones((2, 4), bool), backend="cudnn")


def test_cudnn_on_a_mesh_works_on_every_devices_part(cudnn_stubbed):
    """Lowered for a GPU: its calls are of one device's samples and heads, and nothing is brought together for them."""
    mesh = sharding.make_mesh(ConfigDict({"data": 2, "fsdp": 1, "context": 2, "tensor": 2}))
    arrays = halves(8, 16, 32)
    for lengths in (None, jnp.full(8, 16)):
        with jax.set_mesh(mesh), planned_for("gpu"):
            lowered = jax.jit(gradients_of(lengths)).trace(*arrays)
            text = lowered.lower(lowering_platforms=("cuda",)).as_text()
        calls = [line for line in text.splitlines() if "__cudnn$fmhaSoftmax" in line]
        assert len(calls) == 2  # forward and backward
        for call in calls:
            assert "tensor<2x16x2x8xbf16>, tensor<2x32x2x8xbf16>" in call
            assert ("tensor<2xi32>" in call) == (lengths is not None)
            assert ("PADDING" in call) == (lengths is not None)


def test_half_precision_blocks():
    arrays, keep = inputs(2, 8, 8, 2, 4)
    arrays = [array.astype(jnp.bfloat16) for array in arrays]
    ours = attention(*arrays, keep, backend="blocked")
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        ours.astype(jnp.float32), written_out(*arrays, keep), rtol=0.05, atol=0.05
    )


def test_choice_is_overridden_inside_a_block():
    arrays, _ = inputs(1, 4, 4, 1, 4)
    with attention_backend("nonsense"), pytest.raises(ValueError, match="'nonsense' is none of"):
        attention(*arrays)
    with attention_backend("nonsense"):
        attention(*arrays, backend="plain")
    attention(*arrays)


def test_choice_on_a_cpu():
    small, large = jnp.zeros((1, 16, 4, 8)), jnp.zeros((16, 256, 4, 8))
    assert choose_backend(small, small) == "plain"
    assert choose_backend(large, large) == "blocked"


def test_unknown_backend():
    with pytest.raises(ValueError, match="'fast' is none of"):
        attention(*inputs(1, 2, 2, 1, 2)[0], backend="fast")


def test_extra_keys_serve_consecutive_rows():
    network = Network(lambda rngs: Attention(8, 2, rngs=rngs))
    layer = network.bind(random_like(network.abstract))
    (hidden,), _ = inputs(4, 5, 1, 2, 4)[0][:1], None
    hidden = hidden.reshape(4, 5, 8)
    sources = jnp.flip(hidden[:2, :3], axis=-1)
    ours = layer(hidden, extra=layer.keys_values(sources))
    for row in range(4):
        tokens = jnp.concatenate([hidden[row], sources[row // 2]])[None]
        alone = layer(hidden[row : row + 1], tokens)
        np.testing.assert_allclose(ours[row], alone[0], rtol=1e-5, atol=1e-5)
    nothing = layer(hidden, extra=layer.keys_values(sources), extra_keep=jnp.zeros((4, 3), bool))
    np.testing.assert_allclose(nothing, layer(hidden), rtol=1e-5, atol=1e-5)
    some = layer(hidden, extra=layer.keys_values(sources), extra_keep=jnp.arange(4) < 2)
    np.testing.assert_allclose(some[:2], ours[:2], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(some[2:], nothing[2:], rtol=1e-6, atol=1e-6)


def test_zero_output_and_indivisible_heads():
    network = Network(lambda rngs: Attention(8, 2, zero_output=True, rngs=rngs))
    layer = network.bind(network.init(jax.random.key(0)))
    np.testing.assert_array_equal(layer(jnp.ones((1, 3, 8))), 0.0)
    with pytest.raises(ValueError, match="do not divide"):
        Network(lambda rngs: Attention(8, 3, rngs=rngs))


def test_repeat_rows():
    assert repeat_rows(jnp.arange(3), 2).tolist() == [0, 0, 1, 1, 2, 2]
