"""Shapes and layouts of the appearance networks, and ResBlock3d against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from dexportrait_jax.models.motion.appearance import AppearanceEncoder, AppearanceLatent
from dexportrait_jax.models.motion.blocks import (
    ResBlock3d,
    average_halves,
    depth_to_features,
    features_to_depth,
    max_halves,
)
from tests.models.motion.torch_statements import close, group_norm, randomised, to_torch


def test_volume_shape_follows_the_sizes():
    encoder = AppearanceEncoder(
        widths=(8, 8, 16), volume_depth=4, volume_channels=8, blocks=1, rngs=nnx.Rngs(0)
    )
    assert jax.jit(encoder)(jnp.zeros((2, 32, 48, 3))).shape == (2, 4, 8, 12, 8)


def test_feature_index_is_channel_times_depth_plus_depth():
    features = np.arange(12.0).reshape(1, 1, 1, 12)
    volume = features_to_depth(features, 4)
    assert volume.shape == (1, 4, 1, 1, 3)
    assert volume[0, 2, 0, 0, 1] == 1 * 4 + 2
    np.testing.assert_array_equal(depth_to_features(volume), features)


def test_pooling_leaves_out_an_odd_edge_as_pytorch_does():
    inputs = np.random.default_rng(0).standard_normal((2, 7, 6, 3)).astype(np.float32)
    image = to_torch(inputs)
    close(average_halves(inputs), torch.nn.functional.avg_pool2d(image, 2))
    close(max_halves(inputs), torch.nn.functional.max_pool2d(image, 2))


@pytest.mark.parametrize("halve", ["last", "first"])
def test_res_block_3d_equals_torch(halve):
    block = randomised(ResBlock3d(8, 4, halve=halve, rngs=nnx.Rngs(0)))
    volume = np.random.default_rng(0).standard_normal((2, 3, 6, 4, 8)).astype(np.float32)

    def conv(layer, x, padding):
        kernel = torch.tensor(np.asarray(layer.kernel[...])).permute(4, 3, 0, 1, 2)
        bias = torch.tensor(np.asarray(layer.bias[...]))
        return torch.nn.functional.conv3d(x, kernel, bias, padding=padding)

    def pool(x):
        return torch.nn.functional.avg_pool3d(x, (1, 2, 2))

    x = to_torch(volume)
    x = pool(x) if halve == "first" else x
    hidden = conv(block.conv1, group_norm(block.norm1, x).relu(), 1)
    hidden = conv(block.conv2, group_norm(block.norm2, hidden).relu(), 1)
    expected = hidden + conv(block.shortcut, x, 0)
    expected = pool(expected) if halve == "last" else expected
    close(jax.jit(block)(volume), expected)


def test_appearance_latent_length():
    build = {"volume_channels": 8, "widths": (8, 8, 8, 8, 4), "rngs": nnx.Rngs(0)}
    latent = AppearanceLatent(volume_shape=(4, 16, 16), strides=(2, 2, 2, 1), **build)
    assert latent.features == 1 * 2 * 2 * 4
    assert jax.jit(latent)(jnp.zeros((3, 4, 16, 16, 8))).shape == (3, 16)
