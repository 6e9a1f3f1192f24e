"""The denoising UNet with every branch of the animator: ray maps, reference, warp, expression, time.

At initialisation, with the reference dropped, it is the plain SD1.5 UNet: all that is added starts at zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dexportrait_jax.geometry import RayMapPoints
from dexportrait_jax.models.animator.conditioning import (
    RAY_CHANNELS,
    Bank,
    Conditions,
    ExpressionNull,
    ExpressionPositions,
    ExpressionTokens,
    RayMapKind,
    VolumeOrder,
    ray_maps,
    warp_bank,
)
from dexportrait_jax.models.animator.reference import Attn2, attn2_context, null_text_parameter
from dexportrait_jax.models.animator.transformer import (
    BlockInputs,
    BlockReference,
    ExpressionInjector,
    ExpressionPlace,
    TransformerOptions,
)
from dexportrait_jax.models.animator.unet import Temporal, UNet
from dexportrait_jax.models.attention import Backend
from dexportrait_jax.models.rematerialisation import Remat

DropAttn2 = Literal["image", "always", "never"]


class Denoiser(UNet):
    """Noisy latents, timesteps and conditions -> prediction (method.md 4).

    Args:
        in_channels: latent channels, also of the prediction.
        block_channels, layers_per_block, heads, groups: sizes; the defaults are SD1.5's.
        attn2: what SD1.5's text attention reads: "none" (layer left out), "null_text" (a constant, learned
            from zero), "clip_image" (``Conditions.context``).
        drop_attn2: whether that becomes zeros where the reference is dropped: "image" says so of ``Conditions.context``
            and keeps the constant, "always" of both, "never" of neither.
        cross_attention_features, null_text_tokens: channels and length of that context.
        raymap: "displacement" (3 channels a pose), "plucker6" (6), or "none".
        raymap_w: the fourth coordinate of the ray map's points, 1 or 0 (0 drops the translation).
        raymap_points: where these points lie, "centres" or "corners" (see ``geometry.ray_map``).
        warp_kernel: convolution on the warped reference, 3 or 1; 0 leaves the branch out.
        warp_padding: "zeros" or "border", what is read outside the volume.
        volume_order: how features are split into volumes, "channel_depth" or "depth_channel" (see ``warp_bank``).
        expression_injector: "in_block" or "xnemo"; "none" leaves the branch out.
        expression_heads: heads of the expression attention; None means ``heads``.
        expression_place: of "in_block", "before_feed_forward", "after_feed_forward" or "before_text" (attn2).
        expression_latent, expression_tokens: size of the latent and its shape as tokens.
        expression_linear: a trained linear layer before the latent is cut into tokens.
        expression_positions: "sinusoidal" adds a position embedding to the tokens, "none" does not.
        expression_null: tokens of a dropped expression, "learned" or "zero".
        backend, remat, dtype: attention backend, rematerialisation, compute type.
    """

    def __init__(
        self,
        *,
        in_channels: int = 4,
        block_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        heads: int = 8,
        groups: int = 32,
        attn2: Attn2 = "none",
        cross_attention_features: int = 768,
        null_text_tokens: int = 77,
        drop_attn2: DropAttn2 = "image",
        raymap: RayMapKind = "displacement",
        raymap_w: int = 1,
        raymap_points: RayMapPoints = "centres",
        warp_kernel: int = 3,
        warp_padding: Literal["zeros", "border"] = "zeros",
        volume_order: VolumeOrder = "channel_depth",
        expression_injector: ExpressionInjector | Literal["none"] = "in_block",
        expression_heads: int | None = None,
        expression_place: ExpressionPlace = "before_feed_forward",
        expression_latent: int = 512,
        expression_tokens: tuple[int, int] = (32, 16),
        expression_linear: bool = True,
        expression_positions: ExpressionPositions = "sinusoidal",
        expression_null: ExpressionNull = "learned",
        backend: Backend = "auto",
        remat: Remat = "none",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        has_expression = expression_injector != "none"
        self.options = TransformerOptions(
            heads=heads,
            cross_attention_features=None if attn2 == "none" else cross_attention_features,
            expression_features=expression_tokens[1] if has_expression else None,
            expression_injector=expression_injector,
            expression_heads=expression_heads,
            expression_place=expression_place,
            warp_kernel=warp_kernel,
            backend=backend,
        )
        super().__init__(
            in_channels=in_channels,
            out_channels=in_channels,
            block_channels=block_channels,
            layers_per_block=layers_per_block,
            options=self.options,
            extra_channels=2 * RAY_CHANNELS[raymap],
            groups=groups,
            remat=remat,
            dtype=dtype,
            rngs=rngs,
        )
        self.raymap, self.raymap_w, self.raymap_points = raymap, raymap_w, raymap_points
        self.warp_padding, self.volume_order = warp_padding, volume_order
        self.drop_attn2 = drop_attn2
        self.null_text = null_text_parameter(attn2, null_text_tokens, cross_attention_features)
        if has_expression:
            self.expression_tokens = ExpressionTokens(
                expression_latent,
                expression_tokens,
                linear=expression_linear,
                positions=expression_positions,
                null=expression_null,
                dtype=dtype,
                rngs=rngs,
            )
        else:
            self.expression_tokens = None

    def __call__(
        self,
        latents: Float[Array, "batch h w c"],
        timesteps: Float[Array, " batch"],
        conditions: Conditions,
        *,
        temporal: Temporal | None = None,
        frames: int = 1,
    ) -> Float[Array, "batch h w c"]:
        """The network's prediction (noise, v or clean latents, as trained), float32.

        ``temporal`` is a ``TemporalModules``; the batch is then clips of ``frames`` successive frames.
        """
        batch = latents.shape[0]
        expression = None
        if self.expression_tokens is not None:
            expression = self.expression_tokens(
                conditions.expression, conditions.keep_expression, batch
            )
        inputs = BlockInputs(
            context=self._context(conditions, batch),
            expression=expression,
            reference_keep=conditions.keep_reference,
            residual_keep=_product(conditions.keep_reference, conditions.keep_pose),
        )
        return self.forward(
            self._with_rays(latents, conditions),
            timesteps,
            inputs,
            self._references(conditions),
            temporal,
            frames,
        )[0]

    def keys_values(self, bank: Bank) -> dict[str, tuple[Array, Array]]:
        """Keys and values of the reference's tokens, (S, h*w, c) each: once a source is enough.

        For ``Conditions.keys_values``, in place of the bank.
        """
        return {
            path: self.transformer_block(path).reference_keys_values(bank[path])
            for path in self.transformer_paths()
        }

    def residuals(self, conditions: Conditions) -> Bank | None:
        """The warped and convolved reference of every target, (B, h, w, c); None without that branch.

        For ``Conditions.residuals``. No denoising step changes it, but it takes as much memory as the
        bank for every frame. It needs the bank and both poses.
        """
        if not self.options.warp_kernel:
            return None
        return {
            path: self.transformer_block(path).warped_residual(reference)
            for path, reference in self._references(conditions).items()
        }

    def _context(self, conditions: Conditions, batch: int) -> Array | None:
        """What attn2 reads, zero where it is dropped with the reference."""
        context = attn2_context(self.null_text, conditions.context, batch, self.options, self.dtype)
        constant, keep = self.null_text is not None, conditions.keep_reference
        if context is None or self.drop_attn2 == "never":
            return context
        if constant and self.drop_attn2 == "image":
            return context
        if constant and conditions.reference is None and conditions.keys_values is None:
            return jnp.zeros_like(context)
        return context if keep is None else context * keep[:, None, None].astype(context.dtype)

    def _with_rays(self, latents: Array, conditions: Conditions) -> Array:
        channels = 2 * RAY_CHANNELS[self.raymap]
        if channels == 0:
            return latents
        if conditions.source_pose is None or conditions.driving_pose is None:
            rays = jnp.zeros((*latents.shape[:3], channels), latents.dtype)
        else:
            rays = ray_maps(
                conditions.source_pose,
                conditions.driving_pose,
                latents.shape[1:3],
                conditions.keep_pose,
                kind=self.raymap,
                homogeneous=bool(self.raymap_w),
                points=self.raymap_points,
            )
        return jnp.concatenate([latents, rays.astype(latents.dtype)], axis=-1)

    def _references(self, conditions: Conditions) -> dict[str, BlockReference]:
        bank, keys_values = conditions.reference, conditions.keys_values
        if bank is None and keys_values is None:
            return {}
        warped, residuals = {}, conditions.residuals or {}
        has_poses = conditions.source_pose is not None and conditions.driving_pose is not None
        if self.options.warp_kernel and has_poses and bank is not None and not residuals:
            warped = warp_bank(
                bank,
                self.transformer_paths(),
                conditions.source_pose,
                conditions.driving_pose,
                padding=self.warp_padding,
                order=self.volume_order,
            )
        hidden = conditions.reference_token_keep or {}
        return {
            path: BlockReference(
                tokens=None if bank is None else bank[path],
                keys_values=None if keys_values is None else keys_values[path],
                warped=warped.get(path),
                residual=residuals.get(path),
                token_keep=hidden.get(path),
            )
            for path in self.transformer_paths()
        }


def _product(first: Array | None, second: Array | None) -> Array | None:
    if first is None or second is None:
        return second if first is None else first
    return first * second
