"""Convolution written for a CPU equals XLA's, values and gradients to second order."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dexportrait_jax.models import layers

CASES = {
    "one_by_one": ((2, 6, 5, 8), (1, 1, 8, 4), (1, 1), ((0, 0), (0, 0)), 1),
    "one_by_one_strided": ((2, 6, 5, 8), (1, 1, 8, 4), (2, 2), ((0, 0), (0, 0)), 1),
    "blocks": ((2, 9, 8, 3), (4, 4, 3, 8), (4, 4), ((0, 0), (0, 0)), 1),
    "blocks_3d": ((2, 2, 4, 6, 3), (1, 2, 2, 3, 8), (1, 2, 2), ((0, 0),) * 3, 1),
    "three_by_three": ((2, 8, 7, 8), (3, 3, 8, 6), (1, 1), ((1, 1), (1, 1)), 1),
    "tiles": ((2, 8, 9, 64), (3, 3, 64, 70), (1, 1), ((1, 1), (1, 1)), 1),
    "tiles_uneven": ((1, 9, 9, 65), (3, 3, 65, 64), (1, 1), ((2, 0), (0, 1)), 1),
    "tiles_inside": ((1, 11, 10, 64), (3, 3, 64, 64), (1, 1), ((0, 0), (0, 0)), 1),
    "even_window": ((2, 8, 7, 8), (2, 2, 8, 6), (1, 1), ((1, 1), (1, 1)), 1),
    "even_window_uneven": ((1, 9, 8, 8), (4, 2, 8, 4), (1, 1), ((1, 2), (0, 1)), 1),
    "strided": ((2, 8, 9, 8), (3, 3, 8, 6), (2, 2), ((1, 1), (1, 1)), 1),
    "strided_7": ((2, 16, 16, 3), (7, 7, 3, 6), (2, 2), ((3, 3), (3, 3)), 1),
    "volume": ((2, 4, 6, 5, 4), (3, 3, 3, 4, 6), (1, 1, 1), ((1, 1),) * 3, 1),
    "volume_strided": ((2, 4, 6, 8, 4), (3, 3, 3, 4, 6), (2, 2, 2), ((1, 1),) * 3, 1),
    "volume_flat": ((2, 1, 4, 4, 4), (1, 3, 3, 4, 6), (1, 1, 1), ((0, 0), (1, 1), (1, 1)), 1),
    "depthwise_small": ((2, 6, 5, 4), (7, 7, 1, 4), (1, 1), ((3, 3), (3, 3)), 4),
    "depthwise_large": ((1, 20, 18, 4), (7, 7, 1, 4), (1, 1), ((3, 3), (3, 3)), 4),
    "depthwise_uneven": ((1, 6, 6, 4), (4, 4, 1, 4), (1, 1), ((2, 1), (2, 1)), 4),
    "grouped": ((2, 6, 5, 8), (3, 3, 4, 6), (1, 1), ((1, 1), (1, 1)), 2),
}
# Those whose gradient is written by hand, and one of the others.
SECOND_ORDER = ("strided", "tiles_uneven", "even_window_uneven", "depthwise_large")


def close(actual, expected, tolerance=1e-5):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_matmul_convolution_equals_xla(name):
    shape, window, strides, pads, groups = CASES[name]
    random = np.random.default_rng(0)
    inputs = random.standard_normal(shape, np.float32)
    kernel = random.standard_normal(window, np.float32)

    def run(backend):
        def penalised(inputs, kernel):
            output = layers.convolve(inputs, kernel, strides, pads, groups)
            weights = jnp.cos(jnp.arange(output.size)).reshape(output.shape)
            return jnp.sum(weights * jnp.sin(output / 4)), output

        def gradient_norm(inputs, kernel):  # as R1 needs it: a gradient of a gradient
            return jnp.sum(jax.grad(penalised, has_aux=True)(inputs, kernel)[0] ** 2)

        def everything(inputs, kernel):
            gradients, output = jax.grad(penalised, (0, 1), has_aux=True)(inputs, kernel)
            if name not in SECOND_ORDER:
                return output, gradients
            return output, gradients, jax.grad(gradient_norm, (0, 1))(inputs, kernel)

        with layers.convolution_backend(backend):
            return jax.jit(everything)(inputs, kernel)

    jax.tree.map(close, run("matmul"), run("xla"))


def test_backend_is_what_the_block_says():
    inputs, kernel = jnp.ones((1, 2, 4, 4, 2)), jnp.ones((3, 3, 3, 2, 2))

    def convolve(inputs, kernel):
        return layers.convolve(inputs, kernel, (1,) * 3, ((1, 1),) * 3)

    def program(backend):
        with layers.convolution_backend(backend):
            return str(jax.make_jaxpr(convolve)(inputs, kernel))

    assert "NDHWC" not in program("matmul") and "concatenate" in program("matmul")
    assert "concatenate" not in program("xla")
    assert program("auto") == program("matmul")  # the tests run on a CPU
    with pytest.raises(ValueError, match="fast"), layers.convolution_backend("fast"):
        pass


@pytest.mark.parametrize(
    ("shape", "features_out", "dtype", "strides", "by_tiles"),
    [
        ((1, 8, 8, 64), 64, jnp.float32, 1, True),
        ((1, 8, 8, 63), 64, jnp.float32, 1, False),  # XLA is as fast on few features
        ((1, 8, 8, 64), 4, jnp.float32, 1, False),
        ((1, 8, 7, 64), 64, jnp.float32, 1, False),  # and where the kernels are most of the work
        ((1, 8, 8, 64), 64, jnp.bfloat16, 1, False),  # sums of inputs lose digits it has not
        ((1, 16, 16, 64), 64, jnp.float32, 2, False),
        ((1, 512, 512, 256), 64, jnp.float32, 1, False),  # a gigabyte in between
    ],
)
def test_winograd_is_for_many_features_in_float32(shape, features_out, dtype, strides, by_tiles):
    inputs = jax.ShapeDtypeStruct(shape, dtype)
    kernel = jax.ShapeDtypeStruct((3, 3, shape[-1], features_out), dtype)

    def convolve(inputs, kernel):
        return layers.convolve(inputs, kernel, (strides,) * 2, ((1, 1),) * 2)

    program = str(jax.make_jaxpr(convolve)(inputs, kernel))
    assert ("conv_general_dilated" not in program) == by_tiles


@pytest.mark.parametrize("padding", ["SAME", "VALID", 2])
@pytest.mark.parametrize("strides", [1, 2])
def test_conv_equals_flax(padding, strides):
    ours = layers.Conv(4, 6, (3, 3), strides=strides, padding=padding, rngs=nnx.Rngs(0))
    theirs = nnx.Conv(4, 6, (3, 3), strides=strides, padding=padding, rngs=nnx.Rngs(1))
    ours.bias[...] = jnp.arange(6.0)
    theirs.kernel[...], theirs.bias[...] = ours.kernel[...], ours.bias[...]
    inputs = jax.random.normal(jax.random.key(0), (2, 9, 8, 4))
    close(ours(inputs), theirs(inputs))


def test_conv_computes_in_its_dtype():
    conv = layers.Conv(4, 6, (3, 3), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert conv.kernel[...].dtype == jnp.float32
    assert conv(jnp.ones((1, 4, 4, 4))).dtype == jnp.bfloat16


@pytest.mark.parametrize("shape", [(2, 5, 4, 8), (3, 2, 3, 4, 8)])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_group_norm_equals_torch(shape, groups):
    """Also where the mean is a thousand times the deviation."""
    random = np.random.default_rng(0)
    inputs = (1000 + random.standard_normal(shape)).astype(np.float32)
    scale, bias = random.standard_normal((2, 8)).astype(np.float32)
    norm = layers.GroupNorm(8, groups, epsilon=1e-3, rngs=nnx.Rngs(0))
    norm.scale, norm.bias = nnx.Param(jnp.asarray(scale)), nnx.Param(jnp.asarray(bias))
    image, *parameters = (torch.tensor(a) for a in (np.moveaxis(inputs, -1, 1), scale, bias))
    expected = torch.nn.functional.group_norm(
        image.double(), groups, *(p.double() for p in parameters), 1e-3
    )
    close(jax.jit(norm)(inputs), np.moveaxis(expected.numpy(), 1, -1), 1e-4)


def test_group_norm_keeps_statistics_in_float32():
    norm = layers.GroupNorm(4, 1, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    inputs = 100 + jax.random.normal(jax.random.key(0), (1, 64, 64, 4))
    output = norm(inputs)
    assert output.dtype == jnp.bfloat16
    np.testing.assert_allclose(output.astype(jnp.float32).std(), 1, rtol=0.01)


def test_normalisation_groups():
    groups = {
        n: layers.normalisation("group", n, dtype=jnp.float32, rngs=nnx.Rngs(0)).groups
        for n in (6, 8, 24, 64, 68, 512)
    }
    assert groups == {6: 1, 8: 2, 24: 6, 64: 16, 68: 17, 512: 32}
    assert layers.normalisation("instance", 8, dtype=jnp.float32, rngs=nnx.Rngs(0)).groups == 8
    assert layers.normalisation("layer", 8, dtype=jnp.float32, rngs=nnx.Rngs(0)).groups == 1
    with pytest.raises(ValueError, match="batch"):
        layers.normalisation("batch", 8, dtype=jnp.float32, rngs=nnx.Rngs(0))
