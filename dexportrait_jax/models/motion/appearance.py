"""The source portrait as a 3D volume of features, and as one vector.

``AppearanceEncoder`` has the layers of LivePortrait's appearance feature extractor and its parameter
names (first, down_blocks, second_conv, resblocks_3d); GroupNorm stands where it has BatchNorm.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dexportrait_jax.models.layers import Conv, Normalisation, normalisation
from dexportrait_jax.models.motion.blocks import ResBlock3d, average_halves, features_to_depth
from dexportrait_jax.models.rematerialisation import Remat, rematerialised


class ConvNormRelu(nnx.Module):
    """3x3 convolution, norm, ReLU."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        norm: Normalisation,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.conv = Conv(in_features, out_features, (3, 3), padding=1, dtype=dtype, rngs=rngs)
        self.norm = normalisation(norm, out_features, dtype=dtype, rngs=rngs)

    def __call__(self, inputs: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
        return jax.nn.relu(self.norm(self.conv(inputs)))


class AppearanceEncoder(nnx.Module):
    """Image (B, H, W, 3) in [-1, 1] -> volume (B, D, H/4, W/4, C) (method.md 3.2).

    ``widths`` are the features at H, H/2 and H/4; more of them halve further. ``remat``: what the backward pass
    keeps of a block, a name of ``rematerialisation``.
    """

    def __init__(
        self,
        *,
        widths: Sequence[int] = (64, 128, 256),
        volume_depth: int = 16,
        volume_channels: int = 32,
        blocks: int = 6,
        norm: Normalisation = "group",
        remat: Remat = "none",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = {"norm": norm, "dtype": dtype, "rngs": rngs}
        self.volume_depth, self.remat = volume_depth, remat
        self.first = ConvNormRelu(3, widths[0], **build)
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.down_blocks = nnx.List([ConvNormRelu(a, b, **build) for a, b in pairs])
        flat = volume_depth * volume_channels
        self.second_conv = Conv(widths[-1], flat, (1, 1), dtype=dtype, rngs=rngs)
        self.resblocks_3d = nnx.Dict(
            {
                f"3dr{index}": ResBlock3d(volume_channels, volume_channels, **build)
                for index in range(blocks)
            }
        )

    def __call__(self, image: Float[Array, "b h w 3"]) -> Float[Array, "b depth h4 w4 channels"]:
        hidden = rematerialised(self.first, self.remat)(image)
        for block in self.down_blocks:
            hidden = average_halves(rematerialised(block, self.remat)(hidden))
        volume = features_to_depth(self.second_conv(hidden), self.volume_depth)
        for index in range(len(self.resblocks_3d)):
            volume = rematerialised(self.resblocks_3d[f"3dr{index}"], self.remat)(volume)
        return volume


class AppearanceLatent(nnx.Module):
    """Volume (B, D, h, w, C) -> vector (B, n): five 3D convolutions, flattened (method.md 3.7).

    The first four halve every axis by ``strides``; each but the last is followed by norm and
    LeakyReLU(0.2). ``features`` is n: the cells left of ``volume_shape`` times the last width.
    """

    def __init__(
        self,
        *,
        volume_shape: tuple[int, int, int] = (16, 64, 64),
        volume_channels: int = 32,
        widths: Sequence[int] = (32, 64, 128, 256, 128),
        strides: Sequence[int] = (2, 2, 2, 2),
        norm: Normalisation = "group",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = {"dtype": dtype, "rngs": rngs}
        features, convs, norms, shape = volume_channels, [], [], volume_shape
        for width, stride in zip(widths[:-1], strides, strict=True):
            convs.append(Conv(features, width, (3, 3, 3), strides=stride, padding=1, **build))
            norms.append(normalisation(norm, width, **build))
            features, shape = width, tuple((n - 1) // stride + 1 for n in shape)
        # The published window is flat, 1x3x3: at the default sizes a single layer of cells is left.
        convs.append(Conv(features, widths[-1], (1, 3, 3), **build))
        self.convs, self.norms = nnx.List(convs), nnx.List(norms)
        self.features = shape[0] * shape[1] * shape[2] * widths[-1]

    def __call__(self, volume: Float[Array, "b d h w c"]) -> Float[Array, "b n"]:
        for conv, norm in zip(self.convs, self.norms, strict=False):
            volume = jax.nn.leaky_relu(norm(conv(volume)), 0.2)
        return self.convs[-1](volume).reshape(volume.shape[0], -1)
