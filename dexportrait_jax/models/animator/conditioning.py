"""The animator's conditions: what they are, how they are dropped, and how they become what the UNet reads.

Ray maps (method.md 4.2), the warped reference (4.3), expression tokens (4.4), and the branches of the guidance (7.2).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dexportrait_jax import geometry
from dexportrait_jax.models.animator.blocks import position_features

Bank = dict[str, Array]
RayMapKind = Literal["displacement", "plucker6", "none"]
ExpressionNull = Literal["learned", "zero"]
ExpressionPositions = Literal["sinusoidal", "none"]
VolumeOrder = Literal["channel_depth", "depth_channel"]

RAY_CHANNELS = {"displacement": 3, "plucker6": 6, "none": 0}


@flax.struct.dataclass
class Conditions:
    """Everything the denoiser is conditioned on. A field that is None is dropped for every sample.

    The batch is source-major: B = S * targets, and each source serves ``targets`` consecutive samples.
    The keep fields are 1 where a sample has its condition and 0 where it is dropped; None keeps all.

    Attributes:
        reference: bank of the reference UNet, path -> (S, h, w, c).
        source_pose: (S, 3, 4).
        driving_pose: (B, 3, 4).
        expression: (B, L) latents.
        context: (B, n, features) tokens for attn2 in the mode "clip_image".
        keep_reference: (B,). Dropped: self-attention to own tokens only, no warped residual, and of the context
            what the denoiser's ``drop_attn2`` says.
        keep_pose: (B,). Dropped: zero ray maps, no warped residual.
        keep_expression: (B,). Dropped: the null tokens.
        reference_token_keep: path -> (S, h*w), 0 where a token is hidden (random reference masking).
        keys_values: path -> two arrays (S, h*w, c), made by ``Denoiser.keys_values``.
        residuals: path -> (B, h, w, c), made by ``Denoiser.residuals``.
    """

    reference: Bank | None = None
    source_pose: Array | None = None
    driving_pose: Array | None = None
    expression: Array | None = None
    context: Array | None = None
    keep_reference: Array | None = None
    keep_pose: Array | None = None
    keep_expression: Array | None = None
    reference_token_keep: dict[str, Array] | None = None
    keys_values: dict[str, tuple[Array, Array]] | None = None
    residuals: Bank | None = None


PER_SAMPLE = (
    "driving_pose",
    "expression",
    "context",
    "keep_reference",
    "keep_pose",
    "keep_expression",
    "residuals",
)


def select_frames(conditions: Conditions, frames: Int[np.ndarray, " n"]) -> Conditions:
    """The conditions of some frames of a clip with one source (S = 1), for a window of it."""
    chosen = {
        name: jax.tree.map(lambda leaf: leaf[frames], getattr(conditions, name))
        for name in PER_SAMPLE
    }
    return conditions.replace(**chosen)


def random_token_keep(key: Array, bank: Bank, rate: float) -> dict[str, Array]:
    """Random reference masking: each token of each block hidden with probability ``rate``."""
    keys = jax.random.split(key, len(bank))
    return {
        path: jax.random.bernoulli(one, 1 - rate, (tokens.shape[0], tokens[0, :, :, 0].size))
        for one, (path, tokens) in zip(keys, sorted(bank.items()), strict=True)
    }


class ExpressionTokens(nnx.Module):
    """Latent -> tokens: a linear layer, a reshape, a fixed position embedding; and the null tokens (method.md 4.4).

    ``linear=False`` leaves the layer out: the latent is cut into tokens as it is. ``positions="none"`` leaves the
    embedding out. ``null="learned"`` trains the tokens of a dropped expression (they get the position embedding
    too); ``null="zero"`` gives tokens that are zero throughout.
    """

    def __init__(
        self,
        latent_features: int = 512,
        tokens: tuple[int, int] = (32, 16),
        *,
        linear: bool = True,
        positions: ExpressionPositions = "sinusoidal",
        null: ExpressionNull = "learned",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if tokens[0] * tokens[1] != latent_features:
            raise ValueError(f"a latent of {latent_features} does not reshape to tokens {tokens}")
        self.tokens, self.positions, self.dtype = tuple(tokens), positions, dtype
        if linear:
            self.linear = nnx.Linear(latent_features, latent_features, dtype=dtype, rngs=rngs)
        else:
            self.linear = None
        self.null_tokens = nnx.Param(jnp.zeros(tokens)) if null == "learned" else None

    def __call__(
        self,
        latent: Float[Array, "batch latent"] | None,
        keep: Float[Array, " batch"] | None,
        batch: int,
    ) -> Float[Array, "batch n features"]:
        """Tokens of each sample; the null tokens where ``keep`` is 0 or there is no latent."""
        if self.null_tokens is None:
            null = jnp.zeros(self.tokens, self.dtype)
        else:
            null = self._placed(self.null_tokens[...].astype(self.dtype))
        null = jnp.broadcast_to(null, (batch, *self.tokens))
        if latent is None:
            return null
        latent = latent.astype(self.dtype)
        if self.linear is not None:
            latent = self.linear(latent)
        tokens = self._placed(latent.reshape(batch, *self.tokens))
        if keep is None:
            return tokens
        return jnp.where(keep[:, None, None] > 0.5, tokens, null)

    def _placed(
        self, tokens: Float[Array, "*batch n features"]
    ) -> Float[Array, "*batch n features"]:
        """The tokens with their position embedding, where there is one."""
        if self.positions == "none":
            return tokens
        return tokens + position_features(*self.tokens).astype(self.dtype)


def ray_maps(
    source_pose: Float[Array, "sources 3 4"],
    driving_pose: Float[Array, "batch 3 4"],
    size: tuple[int, int],
    keep: Float[Array, " batch"] | None,
    *,
    kind: RayMapKind,
    homogeneous: bool,
    points: geometry.RayMapPoints = "centres",
) -> Float[Array, "batch h w rays"]:
    """Ray maps of source and driving pose, concatenated on channels; zero where ``keep`` is 0."""
    settings = {"homogeneous": homogeneous, "kind": kind, "points": points}
    source = geometry.ray_map(source_pose, *size, **settings)
    driving = geometry.ray_map(driving_pose, *size, **settings)
    source = jnp.repeat(source, driving.shape[0] // source.shape[0], axis=0)
    rays = jnp.concatenate([source, driving], axis=-1)
    return rays if keep is None else rays * keep[:, None, None, None]


def warp_bank(
    bank: Bank,
    paths: Iterable[str],
    source_pose: Float[Array, "sources 3 4"],
    driving_pose: Float[Array, "batch 3 4"],
    *,
    padding: Literal["zeros", "border"],
    order: VolumeOrder = "channel_depth",
) -> dict[str, Float[Array, "batch h w c"]]:
    """The bank's features moved rigidly from the source's pose to each target's.

    Features (h, w, c) are read as a volume of depth h/2 with 2c/h channels (method.md 4.3). ``order`` says where the
    channel ch of depth d stands among the features: "channel_depth" ch*(h/2) + d, "depth_channel" d*(2c/h) + ch.
    Sampling places depend on the poses and the resolution alone, so the blocks of one
    resolution are warped together, and a source's volume is not copied for its targets.
    """
    targets = driving_pose.shape[0] // source_pose.shape[0]
    groups: dict[tuple[int, int], list[str]] = {}
    for path in paths:
        groups.setdefault(bank[path].shape[1:3], []).append(path)
    warped = {}
    for (height, width), members in groups.items():
        depth = height // 2
        volumes = [_as_volume(bank[path], depth, order) for path in members]
        coordinates = geometry.source_coordinates(
            jnp.repeat(source_pose, targets, axis=0), driving_pose, (depth, height, width)
        )
        moved = geometry.warp_volume(jnp.concatenate(volumes, axis=-1), coordinates, padding)
        splits = np.cumsum([volume.shape[-1] for volume in volumes])[:-1]
        for path, part in zip(members, jnp.split(moved, splits, axis=-1), strict=True):
            warped[path] = _as_features(part, order).astype(bank[path].dtype)
    return warped


def _as_volume(features: Array, depth: int, order: VolumeOrder) -> Array:
    """(B, h, w, c) -> (B, depth, h, w, c/depth)."""
    batch, height, width, channels = features.shape
    if channels % depth:
        raise ValueError(
            f"{channels} channels on a grid of height {height} do not divide into depth {depth}"
        )
    if order == "channel_depth":
        split = features.reshape(batch, height, width, channels // depth, depth)
        return split.transpose(0, 4, 1, 2, 3)
    if order == "depth_channel":
        split = features.reshape(batch, height, width, depth, channels // depth)
        return split.transpose(0, 3, 1, 2, 4)
    raise ValueError(f"volume order {order!r} is neither 'channel_depth' nor 'depth_channel'")


def _as_features(volume: Array, order: VolumeOrder) -> Array:
    """The inverse of ``_as_volume``."""
    batch, depth, height, width, channels = volume.shape
    axes = (0, 2, 3, 4, 1) if order == "channel_depth" else (0, 2, 3, 1, 4)
    return volume.transpose(axes).reshape(batch, height, width, channels * depth)
