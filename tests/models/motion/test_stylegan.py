"""StyleGAN2's layers against a PyTorch statement of their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from dexportrait_jax.models.layers import convolution_backend
from dexportrait_jax.models.motion import stylegan
from tests.compiling import products_on_tpus
from tests.models.motion.torch_statements import close, randomised, to_torch

BUILD = {"rngs": nnx.Rngs(0)}


def tensor(parameter):
    return torch.tensor(np.asarray(parameter[...]))


def filtered(x, up=1, down=1, pads=(0, 0), gain=1.0):
    """Zeros put in between, padding, the filter [1, 3, 3, 1] on both axes, every down-th value."""
    batch, channels, height, width = x.shape
    stuffed = torch.zeros(batch, channels, height * up, width * up)
    stuffed[:, :, ::up, ::up] = x
    stuffed = torch.nn.functional.pad(stuffed, (*pads, *pads))
    line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    kernel = (gain * line[:, None] * line[None]).expand(channels, 1, 4, 4)
    return torch.nn.functional.conv2d(stuffed, kernel, groups=channels)[:, :, ::down, ::down]


def torch_modulated(layer, x, style, change):
    """A kernel for each sample, as published."""
    kernel = tensor(layer.kernel).permute(3, 2, 0, 1)  # (out, in, k, k)
    outputs, inputs, size, _ = kernel.shape
    linear = tensor(layer.modulation.kernel)
    scales = style @ linear / linear.shape[0] ** 0.5 + tensor(layer.modulation.bias)
    weights = kernel[None] / (inputs * size**2) ** 0.5 * scales[:, None, :, None, None]
    if layer.demodulate:
        squares = weights.square().sum((2, 3, 4), keepdim=True)
        weights = weights * torch.rsqrt(squares + 1e-8)
    results = []
    for n in range(len(x)):
        if change == "up":
            wide = torch.nn.functional.conv_transpose2d(
                x[n : n + 1], weights[n].transpose(0, 1), stride=2
            )
            results.append(filtered(wide, pads=(1, 1), gain=4))
        elif change == "down":
            soft = filtered(x[n : n + 1], pads=(2, 2))
            results.append(torch.nn.functional.conv2d(soft, weights[n], stride=2))
        else:
            results.append(torch.nn.functional.conv2d(x[n : n + 1], weights[n], padding=size // 2))
    return torch.cat(results)


@pytest.mark.parametrize("backend", ["xla", "matmul"])
@pytest.mark.parametrize(
    ("size", "change", "demodulate"),
    [(3, "same", True), (3, "up", True), (3, "down", True), (1, "same", False), (3, "same", False)],
)
def test_modulated_convolution_equals_torch(size, change, demodulate, backend):
    layer = stylegan.ModulatedConv(6, 5, size, 7, demodulate=demodulate, change=change, **BUILD)
    layer = randomised(layer)
    random = np.random.default_rng(0)
    inputs = random.standard_normal((3, 8, 6, 6)).astype(np.float32)
    style = random.standard_normal((3, 7)).astype(np.float32)
    with convolution_backend(backend):
        output = jax.jit(layer)(inputs, style)
    close(output, torch_modulated(layer, to_torch(inputs), torch.tensor(style), change))


@pytest.mark.parametrize("size", [1, 3])
def test_halving_convolution_equals_torch(size):
    layer = stylegan.EqualConv(6, 5, size, halve=True, **BUILD)
    inputs = np.random.default_rng(0).standard_normal((2, 8, 6, 6)).astype(np.float32)
    kernel = tensor(layer.kernel).permute(3, 2, 0, 1) / (6 * size**2) ** 0.5
    margin = (size + 1) // 2
    soft = filtered(to_torch(inputs), pads=(margin, margin))
    close(jax.jit(layer)(inputs), torch.nn.functional.conv2d(soft, kernel, stride=2))


def test_upsample_equals_torch():
    inputs = np.random.default_rng(0).standard_normal((2, 5, 4, 3)).astype(np.float32)
    close(jax.jit(stylegan.upsample)(inputs), filtered(to_torch(inputs), up=2, pads=(2, 1), gain=4))


def test_blur_gradients_to_second_order():
    inputs = np.random.default_rng(0).standard_normal((1, 6, 5, 2)).astype(np.float32)

    def penalty(x, blurred):
        return (torch.sin(blurred) if isinstance(x, torch.Tensor) else jnp.sin(blurred)).sum()

    def norm(x):
        gradient = jax.grad(lambda x: penalty(x, stylegan.blur(x, 2, 1)))(x)
        return jnp.sum(gradient**2)

    image = to_torch(inputs).requires_grad_()
    loss = penalty(image, filtered(image, pads=(2, 1)))
    (gradient,) = torch.autograd.grad(loss, image, create_graph=True)
    (expected,) = torch.autograd.grad(gradient.square().sum(), image)
    close(jax.jit(jax.grad(norm))(inputs), expected)


def test_fused_leaky_relu_and_equal_linear():
    activation = stylegan.FusedLeakyReLU(4, **BUILD)
    activation.bias = nnx.Param(jnp.array([0.0, 1, -1, 0]))
    output = activation(jnp.array([[1.0, 1, 0.5, -2]]))
    np.testing.assert_allclose(output, np.array([[1, 2, -0.1, -0.4]]) * 2**0.5, rtol=1e-6)
    linear = stylegan.EqualLinear(9, 2, bias=1.0, **BUILD)
    inputs = np.arange(9.0, dtype=np.float32)[None]
    expected = inputs @ np.asarray(linear.kernel[...]) / 3 + 1
    np.testing.assert_allclose(linear(inputs), expected, rtol=1e-5)


def test_style_scales_and_demodulation_are_float32_on_tpus():
    layer = stylegan.ModulatedConv(6, 5, 3, 7, dtype=jnp.bfloat16, **BUILD)
    inputs, style = np.zeros((2, 4, 4, 6), jnp.bfloat16), np.zeros((2, 7), jnp.bfloat16)
    assert products_on_tpus(layer, inputs, style) == [("f32", True), ("f32", True)]
    narrow = stylegan.EqualLinear(7, 3, dtype=jnp.bfloat16, **BUILD)
    assert products_on_tpus(narrow, style) == [("bf16", False)]
