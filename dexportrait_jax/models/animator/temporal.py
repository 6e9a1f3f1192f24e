"""Temporal modules after every unit of the UNet, equal to AnimateDiff's, but for a choice of the first norm.

diffusers' ``AnimateDiffTransformer3D`` (in its ``MotionAdapter``) normalises groups over all frames of a clip;
AnimateDiff's own motion_module.py, with which its weights were trained, normalises every frame alone. Weights are the
same for both. They are a module of their own, with a tree like the UNet's, so that they are trained, saved and left
out alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dexportrait_jax.models.animator.blocks import (
    FeedForward,
    position_features,
)
from dexportrait_jax.models.animator.norms import GroupNorm, LayerNorm
from dexportrait_jax.models.attention import Attention, Backend
from dexportrait_jax.models.partitioning import FRAMES, SAMPLES, spread

Norm = Literal["clip", "frame"]


class TemporalBlock(nnx.Module):
    """Two self-attentions over the frames of a pixel, and a feed-forward, each with LayerNorm."""

    def __init__(
        self,
        features: int,
        heads: int,
        max_frames: int,
        *,
        backend: Backend,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        build = {"dtype": dtype, "rngs": rngs}
        self.features, self.max_frames, self.dtype = features, max_frames, dtype
        self.norm1 = LayerNorm(features, **build)
        self.attn1 = Attention(features, heads, backend=backend, **build)
        self.norm2 = LayerNorm(features, **build)
        self.attn2 = Attention(features, heads, backend=backend, **build)
        self.norm3 = LayerNorm(features, **build)
        self.ff = FeedForward(features, **build)

    def __call__(self, hidden: Float[Array, "pixels frames c"]) -> Float[Array, "pixels frames c"]:
        positions = position_features(self.max_frames, self.features)[: hidden.shape[1]]
        positions = positions.astype(self.dtype)
        hidden = hidden + self.attn1(self.norm1(hidden) + positions)
        hidden = hidden + self.attn2(self.norm2(hidden) + positions)
        return hidden + self.ff(self.norm3(hidden))


class TemporalModule(nnx.Module):
    """GroupNorm over the clip or each frame, linear in, one block, linear out starting at zero, residual."""

    def __init__(
        self,
        features: int,
        heads: int,
        max_frames: int,
        *,
        norm: Norm,
        groups: int,
        backend: Backend,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        build = {"dtype": dtype, "rngs": rngs}
        self.max_frames, self.norm_over = max_frames, norm
        self.norm = GroupNorm(features, groups, epsilon=1e-6, **build)
        self.proj_in = nnx.Linear(features, features, **build)
        block = TemporalBlock(features, heads, max_frames, backend=backend, **build)
        self.transformer_blocks = nnx.List([block])
        self.proj_out = nnx.Linear(features, features, kernel_init=nnx.initializers.zeros, **build)

    def __call__(
        self, hidden: Float[Array, "batch h w c"], frames: int
    ) -> Float[Array, "batch h w c"]:
        """``batch`` is clips of ``frames`` successive frames.

        Raises:
            ValueError: more frames than ``max_frames``, or a batch they do not divide.
        """
        batch, height, width, channels = hidden.shape
        if frames > self.max_frames or batch % frames:
            raise ValueError(
                f"{batch} frames in clips of {frames}: clips must divide the batch and have at most "
                f"{self.max_frames} frames"
            )
        clips = (batch // frames, frames, height * width, channels)
        whole = clips if self.norm_over == "clip" else (batch, height * width, channels)
        inner = self.proj_in(self.norm(hidden.reshape(whole))).reshape(clips)
        # Where a mesh shares a clip's frames, every device gets all frames of its part of the pixels, and back: one
        # all-to-all each way. Left to itself, the compiler gathers all frames of all pixels everywhere.
        pixels = spread(spread(inner, SAMPLES, FRAMES).swapaxes(1, 2), SAMPLES, FRAMES)
        pixels = self.proj_out(self.transformer_blocks[0](pixels.reshape(-1, frames, channels)))
        pixels = spread(pixels.reshape(-1, height * width, frames, channels), SAMPLES, FRAMES)
        return hidden + spread(pixels.swapaxes(1, 2), SAMPLES, FRAMES).reshape(hidden.shape)


class TemporalLevel(nnx.Module):
    """The modules of one level."""

    def __init__(self, count: int, *args, **settings):
        self.motion_modules = nnx.List([TemporalModule(*args, **settings) for _ in range(count)])


class TemporalModules(nnx.Module):
    """One temporal module for every (ResNet, attention) unit of a UNet of the same sizes (method.md 4.5).

    Args:
        block_channels, layers_per_block, groups: sizes of the UNet; the defaults are SD1.5's.
        heads: attention heads.
        max_frames: longest clip (32; AnimateDiff v1: 24).
        middle: also after the middle unit (AnimateDiff v2; v1 and v3: no).
        norm: what the first GroupNorm takes its statistics over, "clip" (diffusers) or "frame" (AnimateDiff's own).
        backend, dtype: attention backend, compute type.
    """

    def __init__(
        self,
        *,
        block_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        heads: int = 8,
        max_frames: int = 32,
        middle: bool = True,
        norm: Norm = "clip",
        groups: int = 32,
        backend: Backend = "auto",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        settings = {
            "norm": norm,
            "groups": groups,
            "backend": backend,
            "dtype": dtype,
            "rngs": rngs,
        }
        widths = tuple(block_channels)

        def level(count: int, width: int) -> TemporalLevel:
            return TemporalLevel(count, width, heads, max_frames, **settings)

        self.down_blocks = nnx.List([level(layers_per_block, width) for width in widths])
        self.mid_block = level(1 if middle else 0, widths[-1])
        self.up_blocks = nnx.List([level(layers_per_block + 1, width) for width in widths[::-1]])

    def apply(
        self, path: str, hidden: Float[Array, "batch h w c"], frames: int
    ) -> Float[Array, "batch h w c"]:
        """The module at a path such as "down_blocks.0.motion_modules.1"; the middle may have none."""
        level, rest = path.split(".motion_modules.")
        if level == "mid_block":
            modules = self.mid_block.motion_modules
            return modules[0](hidden, frames) if modules else hidden
        side, index = level.split(".")
        return getattr(self, side)[int(index)].motion_modules[int(rest)](hidden, frames)
