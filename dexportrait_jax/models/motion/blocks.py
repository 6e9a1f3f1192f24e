"""Small parts that the motion networks share: residual 3D block, resizing, pooling."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dexportrait_jax.models.layers import Conv, Normalisation, normalisation

Halve = Literal["last", "first"]


class ResBlock3d(nnx.Module):
    """norm-ReLU-conv-norm-ReLU-conv with 3x3x3 windows, and a shortcut (method.md 3.2, 3.6).

    With ``halve`` height and width are halved by averaging: "last", after the convolutions, or "first", before all
    else, for a quarter of the work. Where the number of features changes the shortcut is a 1x1x1 convolution.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        halve: Halve | None = None,
        norm: Normalisation = "group",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if halve not in (None, "last", "first"):
            raise ValueError(f"a block is halved 'last' or 'first', not {halve!r}")
        build = {"dtype": dtype, "rngs": rngs}
        self.halve = halve
        self.norm1 = normalisation(norm, in_features, **build)
        self.conv1 = Conv(in_features, out_features, (3, 3, 3), padding=1, **build)
        self.norm2 = normalisation(norm, out_features, **build)
        self.conv2 = Conv(out_features, out_features, (3, 3, 3), padding=1, **build)
        changes = in_features != out_features
        self.shortcut = Conv(in_features, out_features, (1, 1, 1), **build) if changes else None

    def __call__(self, volume: Float[Array, "b d h w c"]) -> Float[Array, "b d h2 w2 c2"]:
        if self.halve == "first":
            volume = average_halves(volume)
        hidden = self.conv1(jax.nn.relu(self.norm1(volume)))
        hidden = self.conv2(jax.nn.relu(self.norm2(hidden)))
        if (
            self.halve == "last"
        ):  # averaging and a 1x1x1 convolution commute; the smaller volume is cheaper
            hidden, volume = average_halves(hidden), average_halves(volume)
        return hidden + (volume if self.shortcut is None else self.shortcut(volume))


def average_halves(inputs: Float[Array, "b *d h w c"]) -> Float[Array, "b *d h2 w2 c"]:
    """Means of 2 x 2 positions; an odd last row or column is left out, as PyTorch's pooling does."""
    a, b, c, d = _quarters(inputs)
    return (a + b + c + d) * 0.25


def max_halves(inputs: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Maxima of 2 x 2 positions; an odd last row or column is left out."""
    a, b, c, d = _quarters(inputs)
    return jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d))


def depth_to_features(volume: Float[Array, "b d h w c"]) -> Float[Array, "b h w c_d"]:
    """Depth moved into the features, index c * D + d as in LivePortrait."""
    batch, _, height, width, _ = volume.shape
    return volume.transpose(0, 2, 3, 4, 1).reshape(batch, height, width, -1)


def features_to_depth(features: Float[Array, "b h w c_d"], depth: int) -> Float[Array, "b d h w c"]:
    """The inverse of ``depth_to_features``."""
    batch, height, width, _ = features.shape
    return features.reshape(batch, height, width, -1, depth).transpose(0, 4, 1, 2, 3)


def _quarters(inputs: Array) -> list[Array]:
    height, width = inputs.shape[-3] // 2 * 2, inputs.shape[-2] // 2 * 2
    return [inputs[..., y:height:2, x:width:2, :] for y in (0, 1) for x in (0, 1)]
