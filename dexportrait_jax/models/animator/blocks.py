"""Building blocks of the Stable Diffusion networks, with diffusers' attribute names.

Everything is channels-last.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dexportrait_jax.models.animator.norms import GroupNorm
from dexportrait_jax.models.layers import Conv


def timestep_features(
    timesteps: Float[Array, " batch"], channels: int
) -> Float[Array, "batch channels"]:
    """Sinusoidal features of the timesteps, cosines first (SD1.5)."""
    half = channels // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def position_features(length: int, channels: int) -> Float[Array, "length channels"]:
    """Sinusoidal position embedding, sines and cosines interleaved (AnimateDiff).

    Those of X-NeMo's expression tokens are all sines, then all cosines: the same to the trained layer before them.
    """
    frequencies = jnp.exp(-math.log(10000.0) / channels * jnp.arange(0, channels, 2))
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] * frequencies[None]
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(length, -1)[:, :channels]


class TimestepEmbedding(nnx.Module):
    """Two linear layers from sinusoidal features to the embedding every ResNet block reads."""

    def __init__(self, channels: int, features: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.linear_1 = nnx.Linear(channels, features, dtype=dtype, rngs=rngs)
        self.linear_2 = nnx.Linear(features, features, dtype=dtype, rngs=rngs)

    def __call__(self, features: Float[Array, "batch channels"]) -> Float[Array, "batch features"]:
        return self.linear_2(jax.nn.silu(self.linear_1(features)))


class ResnetBlock(nnx.Module):
    """norm-SiLU-conv3x3 (+ time) norm-SiLU-conv3x3 + shortcut (diffusers ``ResnetBlock2D``)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_features: int | None,
        groups: int = 32,
        epsilon: float = 1e-5,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        norm = {"epsilon": epsilon, "dtype": dtype, "rngs": rngs}
        conv = {"padding": 1, "dtype": dtype, "rngs": rngs}
        self.norm1 = GroupNorm(in_channels, groups, **norm)
        self.conv1 = Conv(in_channels, out_channels, (3, 3), **conv)
        self.norm2 = GroupNorm(out_channels, groups, **norm)
        self.conv2 = Conv(out_channels, out_channels, (3, 3), **conv)
        if time_features is None:
            self.time_emb_proj = None
        else:
            self.time_emb_proj = nnx.Linear(time_features, out_channels, dtype=dtype, rngs=rngs)
        if in_channels == out_channels:
            self.conv_shortcut = None
        else:
            self.conv_shortcut = Conv(in_channels, out_channels, (1, 1), dtype=dtype, rngs=rngs)

    def __call__(
        self, hidden: Float[Array, "batch h w cin"], time: Float[Array, "batch t"] | None = None
    ) -> Float[Array, "batch h w cout"]:
        residual = hidden
        hidden = self.conv1(jax.nn.silu(self.norm1(hidden)))
        if self.time_emb_proj is not None:
            hidden = hidden + self.time_emb_proj(jax.nn.silu(time))[:, None, None, :]
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden)))
        return hidden + (residual if self.conv_shortcut is None else self.conv_shortcut(residual))


class Downsample(nnx.Module):
    """3x3 convolution of stride 2. ``asymmetric`` pads right and bottom only, as the VAE does."""

    def __init__(
        self, channels: int, *, asymmetric: bool = False, dtype=jnp.float32, rngs: nnx.Rngs
    ):
        self.asymmetric = asymmetric
        padding = 0 if asymmetric else 1
        self.conv = Conv(
            channels, channels, (3, 3), strides=2, padding=padding, dtype=dtype, rngs=rngs
        )

    def __call__(self, hidden: Float[Array, "batch h w c"]) -> Float[Array, "batch h2 w2 c"]:
        if self.asymmetric:
            hidden = jnp.pad(hidden, ((0, 0), (0, 1), (0, 1), (0, 0)))
        return self.conv(hidden)


class Upsample(nnx.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, (3, 3), padding=1, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: Float[Array, "batch h w c"]) -> Float[Array, "batch 2h 2w c"]:
        batch, height, width, channels = hidden.shape
        wide = jnp.broadcast_to(
            hidden[:, :, None, :, None, :], (batch, height, 2, width, 2, channels)
        )
        return self.conv(wide.reshape(batch, 2 * height, 2 * width, channels))


class GatedLinear(nnx.Module):
    """GEGLU: one projection to value and gate, value times GELU(gate)."""

    def __init__(self, features: int, inner: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.proj = nnx.Linear(features, 2 * inner, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: Float[Array, "... features"]) -> Float[Array, "... inner"]:
        value, gate = jnp.split(self.proj(hidden), 2, axis=-1)
        return value * jax.nn.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    """GEGLU to four times the width and back (``net.0.proj``, ``net.2`` in diffusers)."""

    def __init__(self, features: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        # Position 1 of the published list is a dropout layer, which has no parameters.
        self.net = nnx.Dict(
            {
                "0": GatedLinear(features, 4 * features, dtype=dtype, rngs=rngs),
                "2": nnx.Linear(4 * features, features, dtype=dtype, rngs=rngs),
            }
        )

    def __call__(self, hidden: Float[Array, "... features"]) -> Float[Array, "... features"]:
        return self.net["2"](self.net["0"](hidden))
