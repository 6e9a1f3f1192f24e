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


def test_zero_output_and_indivisible_heads():
    network = Network(lambda rngs: Attention(8, 2, zero_output=True, rngs=rngs))
    layer = network.bind(network.init(jax.random.key(0)))
    np.testing.assert_array_equal(layer(jnp.ones((1, 3, 8))), 0.0)
    with pytest.raises(ValueError, match="do not divide"):
        Network(lambda rngs: Attention(8, 3, rngs=rngs))


def test_repeat_rows():
    assert repeat_rows(jnp.arange(3), 2).tolist() == [0, 0, 1, 1, 2, 2]
