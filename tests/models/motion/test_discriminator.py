"""The discriminator against a PyTorch statement, minibatch deviation included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from dexportrait_jax.models.motion.discriminator import Discriminator
from dexportrait_jax.state import Network
from tests.models.motion.test_stylegan import filtered, tensor
from tests.models.motion.torch_statements import close, randomised, to_torch

SIZES = {"image_size": 16, "widths": (6, 8, 10)}


def activated(x, layer):
    bias = tensor(layer.bias)
    shape = (1, -1, *(1 for _ in x.shape[2:]))
    return torch.nn.functional.leaky_relu(x + bias.reshape(shape), 0.2) * 2**0.5


def conv(x, layer, **options):
    kernel = tensor(layer.kernel).permute(3, 2, 0, 1)
    kernel = kernel / (kernel.shape[1] * kernel.shape[2] ** 2) ** 0.5
    return torch.nn.functional.conv2d(x, kernel, **options)


def torch_discriminator(model, x):
    first, *blocks = model.convs
    x = activated(conv(x, first["0"]), first["1"])
    for block in blocks:
        hidden = activated(conv(x, block.conv1["0"], padding=1), block.conv1["1"])
        hidden = conv(filtered(hidden, pads=(2, 2)), block.conv2["1"], stride=2)
        hidden = activated(hidden, block.conv2["2"])
        x = (hidden + conv(filtered(x, pads=(1, 1)), block.skip["1"], stride=2)) / 2**0.5
    batch, channels, height, width = x.shape
    groups = x.view(4, -1, 1, channels, height, width)
    deviation = torch.sqrt(groups.var(0, unbiased=False) + 1e-8).mean([2, 3, 4], keepdim=True)
    deviation = deviation.squeeze(2).repeat(4, 1, height, width)
    x = torch.cat([x, deviation], 1)
    x = activated(conv(x, model.final_conv["0"], padding=1), model.final_conv["1"]).flatten(1)
    for layer in model.final_linear:
        kernel = tensor(layer.kernel)
        x = x @ kernel / kernel.shape[0] ** 0.5 + tensor(layer.bias)
        if layer.activate:
            x = torch.nn.functional.leaky_relu(x, 0.2) * 2**0.5
    return x[:, 0]


def test_equals_torch():
    model = randomised(Discriminator(**SIZES, rngs=nnx.Rngs(0)))
    image = np.random.default_rng(0).uniform(-1, 1, (8, 16, 16, 3)).astype(np.float32)
    close(jax.jit(model)(image), torch_discriminator(model, to_torch(image)))


def test_r1_has_a_gradient_by_the_parameters():
    network = Network(lambda rngs: Discriminator(**SIZES, rngs=rngs))
    params = network.init(jax.random.key(0))
    image = np.random.default_rng(0).uniform(-1, 1, (4, 16, 16, 3)).astype(np.float32)

    def r1(params):
        gradient = jax.grad(lambda image: network.bind(params)(image).sum())(image)
        return jnp.sum(gradient**2, axis=(1, 2, 3)).mean()

    value, gradients = jax.jit(jax.value_and_grad(r1))(params)
    assert value > 0
    kernels = [g for g in jax.tree.leaves(gradients) if g.ndim > 1]
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in kernels)


def test_batches_of_any_size():
    model = Discriminator(**SIZES, rngs=nnx.Rngs(0))
    for batch in (1, 3, 6):
        assert jax.jit(model)(jnp.zeros((batch, 16, 16, 3))).shape == (batch,)


def test_widths_must_reach_four_pixels():
    with pytest.raises(ValueError, match="image_size 64"):
        Discriminator(image_size=64, widths=(8, 8, 8), rngs=nnx.Rngs(0))
