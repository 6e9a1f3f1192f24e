"""Expression latent from a face crop: a face alignment network up to its heat maps (method.md 3.4).

Parameter names are those of the PyTorch encoder that PD-FGC, X-NeMo and PersonaLive share (conv1, bn1,
conv2..4, m0, top_m_0, conv_last0, bn_end0, l0, bn5, conv6, fc). GroupNorm stands where it has
BatchNorm; the names bn* stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dexportrait_jax.models.layers import Conv, GroupNorm, Normalisation, normalisation
from dexportrait_jax.models.motion.blocks import average_halves, max_halves

Pooling = Literal["average", "max"]
_HALVES = {"average": average_halves, "max": max_halves}


class FanBlock(nnx.Module):
    """Three 3x3 convolutions whose outputs, 1/2, 1/4 and 1/4 of the features, stand side by side."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        norm: Normalisation,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        build = {"dtype": dtype, "rngs": rngs}
        half, quarter = out_features // 2, out_features // 4
        window = {"padding": 1, "use_bias": False}
        self.bn1 = normalisation(norm, in_features, **build)
        self.conv1 = Conv(in_features, half, (3, 3), **window, **build)
        self.bn2 = normalisation(norm, half, **build)
        self.conv2 = Conv(half, quarter, (3, 3), **window, **build)
        self.bn3 = normalisation(norm, quarter, **build)
        self.conv3 = Conv(quarter, quarter, (3, 3), **window, **build)
        if in_features == out_features:
            self.downsample = None
        else:  # numbered as in a torch Sequential whose place 1 is ReLU
            conv = Conv(in_features, out_features, (1, 1), use_bias=False, **build)
            self.downsample = nnx.Dict({"0": normalisation(norm, in_features, **build), "2": conv})

    def __call__(self, inputs: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
        first = self.conv1(jax.nn.relu(self.bn1(inputs)))
        second = self.conv2(jax.nn.relu(self.bn2(first)))
        third = self.conv3(jax.nn.relu(self.bn3(second)))
        if self.downsample is not None:
            inputs = self.downsample["2"](jax.nn.relu(self.downsample["0"](inputs)))
        return jnp.concatenate([first, second, third], axis=-1) + inputs


class Hourglass(nnx.Module):
    """Down ``depth`` halvings and back up, with a FAN block on a shortcut at every size.

    In training, dropout of the shortcuts keeps the latent from leaning on single pixels; it is on where
    a key is given.
    """

    def __init__(
        self,
        features: int,
        depth: int,
        *,
        dropout: float,
        pooling: Pooling,
        norm: Normalisation,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.depth, self.dropout, self.halves = depth, dropout, _HALVES[pooling]

        def block() -> FanBlock:
            return FanBlock(features, features, norm=norm, dtype=dtype, rngs=rngs)

        for level in range(depth, 0, -1):
            setattr(self, f"b1_{level}", block())
            setattr(self, f"b2_{level}", block())
            setattr(self, f"b3_{level}", block())
        self.b2_plus_1 = block()

    def __call__(
        self, inputs: Float[Array, "b h w c"], dropout_key: Array | None = None
    ) -> Float[Array, "b h w c"]:
        return self._level(self.depth, inputs, dropout_key)

    def _level(self, level: int, inputs: Array, dropout_key: Array | None) -> Array:
        upper = getattr(self, f"b1_{level}")(inputs)
        if dropout_key is not None and self.dropout > 0:
            key = jax.random.fold_in(dropout_key, level)
            keep = jax.random.bernoulli(key, 1 - self.dropout, upper.shape)
            upper = jnp.where(keep, upper / (1 - self.dropout), 0)
        lower = getattr(self, f"b2_{level}")(self.halves(inputs))
        if level > 1:
            lower = self._level(level - 1, lower, dropout_key)
        else:
            lower = self.b2_plus_1(lower)
        lower = getattr(self, f"b3_{level}")(lower)
        return upper + jax.image.resize(lower, upper.shape, "bilinear")


class PatchAttention(nnx.Module):
    """X-NeMo's transformer block over patches of a feature map, added to it; zero at initialisation.

    GroupNorm; patches of ``patch`` x ``patch`` positions become tokens of heads * head_features by a convolution; the
    position embedding is learned from a 2D sine-cosine start; then self-attention and a GEGLU feed-forward. A token is
    cut into its patch's positions, and a zero-initialised linear layer gives each its features.
    """

    def __init__(
        self,
        features: int,
        size: int,
        patch: int,
        *,
        heads: int = 8,
        head_features: int = 128,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        inner = heads * head_features
        if inner % patch**2 or size % patch:
            raise ValueError(
                f"patches of {patch} need a feature map and a token width that they divide "
                f"(given: {size} positions, {inner} features / {patch * patch})"
            )
        build = {"dtype": dtype, "rngs": rngs}
        self.patch, self.heads, self.dtype = patch, heads, dtype
        # At most X-NeMo's 32 groups. Without it the position embedding would be most of what the tokens hold.
        self.norm = GroupNorm(features, math.gcd(features, 32), epsilon=1e-6, **build)
        window = (patch, patch)
        self.proj_in = Conv(features, inner, window, strides=patch, padding="VALID", **build)
        self.pos_embed = nnx.Param(jnp.asarray(_sine_cosine(size // patch, inner)[None]))
        self.norm1 = nnx.LayerNorm(inner, epsilon=1e-5, **build)
        self.to_q = nnx.Linear(inner, inner, use_bias=False, **build)
        self.to_k = nnx.Linear(inner, inner, use_bias=False, **build)
        self.to_v = nnx.Linear(inner, inner, use_bias=False, **build)
        self.to_out = nnx.Linear(inner, inner, **build)
        self.norm2 = nnx.LayerNorm(inner, epsilon=1e-5, **build)
        self.ff_in = nnx.Linear(inner, 8 * inner, **build)
        self.ff_out = nnx.Linear(4 * inner, inner, **build)
        zeros = nnx.initializers.zeros
        self.proj_out = nnx.Linear(inner // patch**2, features, kernel_init=zeros, **build)

    def __call__(self, inputs: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        batch, height, width, _ = inputs.shape
        p = self.patch
        tokens = self.proj_in(self.norm(inputs)).reshape(batch, height * width // p**2, -1)
        tokens = tokens + self.pos_embed[...].astype(self.dtype)
        normed = self.norm1(tokens)
        query, key, value = (
            layer(normed).reshape(*tokens.shape[:2], self.heads, -1)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        attended = jax.nn.dot_product_attention(query, key, value)
        tokens = tokens + self.to_out(attended.reshape(tokens.shape))
        hidden, gate = jnp.split(self.ff_in(self.norm2(tokens)), 2, axis=-1)
        tokens = tokens + self.ff_out(hidden * jax.nn.gelu(gate, approximate=False))
        patches = self.proj_out(tokens.reshape(batch, height // p, width // p, p, p, -1))
        return inputs + patches.transpose(0, 1, 3, 2, 4, 5).reshape(inputs.shape)


class ExpressionEncoder(nnx.Module):
    """Face crop (B, E, E, 3) in [-1, 1] -> expression latent (B, ``latent``) (method.md 3.4).

    Args:
        kind: "fan", or "fan_sa" with three zero-initialised ``PatchAttention`` blocks, as in X-NeMo.
        image_size: E, a multiple of 8.
        stem: features after the first convolution, at E/2.
        widths: features of the blocks at E/2 (one) and E/4 (all others; the last is the hourglass').
        depth: halvings inside the hourglass, which starts at E/4.
        heat_maps: features of the heat-map head (68 landmarks in a face alignment network).
        pictures: features that the heat maps are gathered in before the last layer; 1 is published, where a
            picture of E/8 x E/8 positions has to hold all landmarks, which few positions cannot.
        pooling: how the hourglass halves: "max", as in PD-FGC and X-NeMo, or "average", as in the face alignment
            network that they took it from.
        leak: slope below zero of the last activation; 0 is the published ReLU. All of the latent passes one
            feature there, and a plain ReLU dies for good when early steps push that feature below zero.
        heads, head_features: of the attention in "fan_sa".
    """

    def __init__(
        self,
        *,
        kind: Literal["fan", "fan_sa"] = "fan",
        image_size: int = 224,
        stem: int = 64,
        widths: Sequence[int] = (128, 128, 256),
        depth: int = 4,
        heat_maps: int = 68,
        pictures: int = 1,
        latent: int = 512,
        dropout: float = 0.5,
        pooling: Pooling = "average",
        leak: float = 0.0,
        heads: int = 8,
        head_features: int = 128,
        norm: Normalisation = "group",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if kind not in ("fan", "fan_sa"):
            raise ValueError(f"expression encoder {kind!r} is neither 'fan' nor 'fan_sa'")
        if pooling not in _HALVES:
            raise ValueError(f"pooling {pooling!r} is neither 'average' nor 'max'")
        if image_size % 8 or image_size >> (2 + depth) == 0:
            raise ValueError(
                f"crops of {image_size} pixels do not suit: take a multiple of 8, at least "
                f"{4 << depth} for an hourglass of depth {depth}"
            )
        self.leak = leak
        build = {"dtype": dtype, "rngs": rngs}
        normed = {"norm": norm, **build}
        first, middle, last = widths
        self.conv1 = Conv(3, stem, (7, 7), strides=2, padding=3, **build)
        self.bn1 = normalisation(norm, stem, **build)
        self.conv2 = FanBlock(stem, first, **normed)
        self.conv3 = FanBlock(first, middle, **normed)
        self.conv4 = FanBlock(middle, last, **normed)
        self.m0 = Hourglass(last, depth, dropout=dropout, pooling=pooling, **normed)
        self.top_m_0 = FanBlock(last, last, **normed)
        self.conv_last0 = Conv(last, last, (1, 1), **build)
        self.bn_end0 = normalisation(norm, last, **build)
        self.l0 = Conv(last, heat_maps, (1, 1), **build)
        self.bn5 = normalisation(norm, heat_maps, **build)
        self.conv6 = Conv(heat_maps, pictures, (3, 3), strides=2, padding=1, **build)
        self.fc = nnx.Linear(pictures * (image_size // 8) ** 2, latent, **build)
        if kind == "fan":
            self.sa1 = self.sa2 = self.sa3 = None
        else:
            attention = {"heads": heads, "head_features": head_features, **build}
            self.sa1 = PatchAttention(first, image_size // 2, 4, **attention)
            self.sa2 = PatchAttention(last, image_size // 4, 2, **attention)
            self.sa3 = PatchAttention(last, image_size // 4, 2, **attention)

    def __call__(
        self, image: Float[Array, "b e e 3"], dropout_key: Array | None = None
    ) -> Float[Array, "b latent"]:
        """The latent; with ``dropout_key`` the hourglass drops parts of its shortcuts."""
        return self.latent(self.heat_maps(image, dropout_key))

    def latent(self, heat_maps: Float[Array, "b e4 e4 maps"]) -> Float[Array, "b latent"]:
        """The latent that ``heat_maps`` make."""
        hidden = heat_maps
        hidden = self.conv6(jax.nn.relu(self.bn5(hidden)))
        hidden = jax.nn.leaky_relu(hidden.reshape(hidden.shape[0], -1), self.leak)
        return self.fc(hidden).astype(jnp.float32)

    def heat_maps(
        self, image: Float[Array, "b e e 3"], dropout_key: Array | None = None
    ) -> Float[Array, "b e4 e4 maps"]:
        """What a face alignment network is trained on, at a quarter of the size."""
        hidden = self.conv2(jax.nn.relu(self.bn1(self.conv1(image))))
        if self.sa1 is not None:
            hidden = self.sa1(hidden)
        hidden = self.conv4(self.conv3(max_halves(hidden)))
        if self.sa2 is not None:
            hidden = self.sa2(hidden)
        hidden = self.m0(hidden, dropout_key)
        hidden = self.bn_end0(self.conv_last0(self.top_m_0(hidden)))
        if self.sa3 is not None:
            hidden = self.sa3(hidden)
        return self.l0(jax.nn.relu(hidden))


def _sine_cosine(size: int, features: int) -> np.ndarray:
    """(size^2, features): half for the column and half for the row, each half sines then cosines."""
    quarter = features // 4
    frequency = 1 / 10000 ** (np.arange(quarter) / quarter)
    angles = np.arange(size)[:, None] * frequency
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    rows = np.repeat(axis, size, axis=0)
    return np.concatenate([np.tile(axis, (size, 1)), rows], axis=-1).astype(np.float32)
