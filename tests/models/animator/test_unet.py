"""The UNet against diffusers, and its size."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dexportrait_jax import flops
from dexportrait_jax.models.animator.transformer import TransformerOptions
from dexportrait_jax.models.animator.unet import UNet
from dexportrait_jax.models.rematerialisation import Remat
from dexportrait_jax.state import Network, parameter_count
from tests.published import (
    parameters_from_torch,
    published_unet,
    random_like,
    randomise,
    relative_error,
)


def unet_pair(block_channels, layers, heads=4, context=24, groups=8):
    published = randomise(
        published_unet(block_channels, layers, heads=heads, context=context, groups=groups)
    )
    network = Network(
        lambda rngs: UNet(
            block_channels=block_channels,
            layers_per_block=layers,
            options=TransformerOptions(heads=heads, cross_attention_features=context),
            groups=groups,
            rngs=rngs,
        )
    )
    params = parameters_from_torch(network.abstract, published.state_dict())
    return published, network, params


@pytest.mark.parametrize(("channels", "layers"), [((32, 64, 64), 1), ((16, 32, 48, 48), 2)])
def test_equals_diffusers(channels, layers):
    assert_equals_diffusers(*unet_pair(channels, layers), rows=2, size=16, context=24)


@pytest.mark.slow
@pytest.mark.xdist_group("memory")
def test_equals_diffusers_at_the_size_of_sd15():
    published, network, params = unet_pair(
        (320, 640, 1280, 1280), 2, heads=8, context=768, groups=32
    )
    assert parameter_count(network.abstract) == 859_520_964
    assert_equals_diffusers(published, network, params, rows=1, size=64, context=768)


def assert_equals_diffusers(published, network, params, *, rows, size, context):
    generator = np.random.default_rng(0)
    latents = generator.normal(size=(rows, size, size, 4)).astype(np.float32)
    context = generator.normal(size=(rows, 5, context)).astype(np.float32)
    timesteps = np.array([3, 953])[:rows]
    with torch.no_grad():
        expected = published(
            torch.tensor(latents).permute(0, 3, 1, 2),
            torch.tensor(timesteps),
            torch.tensor(context),
        ).sample.permute(0, 2, 3, 1)
    ours = jax.jit(lambda p, *a: network.bind(p)(*a))(params, latents, timesteps, context)
    assert np.std(expected.numpy()) > 0.01
    assert relative_error(ours, expected) <= 1e-4


def test_full_size():
    full = Network(lambda rngs: UNet(rngs=rngs))
    assert parameter_count(full.abstract) == 859_520_964


@pytest.mark.slow
def test_rematerialised_gradients_are_the_same():
    sizes = {"block_channels": (8, 8), "layers_per_block": 1, "groups": 4}
    options = TransformerOptions(heads=2, cross_attention_features=None)
    networks = [
        Network(lambda rngs, remat=remat: UNet(**sizes, options=options, remat=remat, rngs=rngs))
        for remat in get_args(Remat)
    ]
    params = random_like(networks[0].abstract)
    latents = jax.random.normal(jax.random.key(1), (2, 4, 4, 4))
    timesteps = jnp.array([10, 500])
    losses = [
        lambda p, n=network: jnp.mean(n.bind(p)(latents, timesteps) ** 2) for network in networks
    ]
    plain, *others = (jax.tree.leaves(jax.jit(jax.grad(loss))(params)) for loss in losses)
    for gradients in others:
        for ours, expected in zip(gradients, plain, strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)

    # What is computed twice: nothing; attention's logits; everything but the last products, which nothing asks for.
    work = [flops.count(jax.grad(loss), params) for loss in losses]
    shares = [each.recomputed / (each.macs - each.recomputed) for each in work]
    assert shares[0] == 0.0
    assert 0.0 < shares[1] < 0.05
    assert 0.2 < shares[2] < 1 / 3
