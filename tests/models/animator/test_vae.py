"""The autoencoder against diffusers, and its size."""

import functools

import diffusers
import jax
import numpy as np
import pytest
import torch

from dexportrait_jax.models.animator.vae import VAE
from dexportrait_jax.state import Network, parameter_count
from tests.published import parameters_from_torch, randomise, relative_error

SMALL = {"block_channels": (16, 32, 32), "layers_per_block": 1, "groups": 8}


def test_equals_diffusers():
    assert_equals_diffusers(SMALL, rows=2, size=32)


@pytest.mark.slow
@pytest.mark.xdist_group("memory")
def test_equals_diffusers_at_the_size_of_sd15():
    sizes = {"block_channels": (128, 256, 512, 512), "layers_per_block": 2, "groups": 32}
    assert_equals_diffusers(sizes, rows=1, size=512)


def assert_equals_diffusers(sizes, rows, size):
    levels = len(sizes["block_channels"])
    published = randomise(
        diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=sizes["block_channels"],
            layers_per_block=sizes["layers_per_block"],
            norm_num_groups=sizes["groups"],
        )
    )
    network = Network(lambda rngs: VAE(**sizes, rngs=rngs))
    params = parameters_from_torch(network.abstract, published.state_dict())
    images = np.random.default_rng(0).uniform(-1, 1, (rows, size, size, 3)).astype(np.float32)

    def run(params, images):
        vae = network.bind(params)
        mean, logvar = vae.encode(images)
        return mean, logvar, vae.decode(mean)

    mean, logvar, decoded = jax.jit(run)(params, images)
    # PyTorch's GroupNorm in single precision is itself off by 4 % on the decoder's 512 x 512 pixels.
    for module in published.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = functools.partial(group_norm_in_double, module)
    with torch.no_grad():
        expected = published.encode(torch.tensor(images).permute(0, 3, 1, 2)).latent_dist
        expected_images = published.decode(expected.mean).sample
    side = size // 2 ** (levels - 1)
    assert mean.shape == (rows, side, side, 4)
    assert relative_error(mean, expected.mean.permute(0, 2, 3, 1)) <= 1e-4
    assert relative_error(logvar, expected.logvar.permute(0, 2, 3, 1)) <= 1e-4
    assert relative_error(decoded, expected_images.permute(0, 2, 3, 1)) <= 1e-4


def group_norm_in_double(norm, x):
    groups = (norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps)
    return torch.nn.functional.group_norm(x.double(), *groups).float()


def test_sample_has_the_mean_and_variance():
    network = Network(lambda rngs: VAE(**SMALL, rngs=rngs))
    vae = network.bind(network.abstract)
    mean, logvar = np.full((4, 32, 32, 4), 2.0), np.full((4, 32, 32, 4), np.log(0.25))
    drawn = vae.sample(mean, logvar, jax.random.key(1))
    assert float(drawn.mean()) == pytest.approx(2.0, abs=0.02)
    assert float(drawn.std()) == pytest.approx(0.5, abs=0.02)


def test_size_that_does_not_divide():
    network = Network(lambda rngs: VAE(**SMALL, rngs=rngs))
    with pytest.raises(ValueError, match="30x32 do not divide by 4"):
        jax.eval_shape(lambda p: network.bind(p).encode(np.zeros((1, 30, 32, 3))), network.abstract)


def test_full_size():
    abstract = Network(lambda rngs: VAE(rngs=rngs)).abstract
    encoder = parameter_count(abstract["encoder"]) + parameter_count(abstract["quant_conv"])
    decoder = parameter_count(abstract["decoder"]) + parameter_count(abstract["post_quant_conv"])
    assert encoder == pytest.approx(34.2e6, rel=0.005)
    assert decoder == pytest.approx(49.5e6, rel=0.005)
