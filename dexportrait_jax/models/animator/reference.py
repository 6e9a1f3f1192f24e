"""The reference UNet: an SD1.5 UNet that reads the clean source latent once and is asked for its features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dexportrait_jax import geometry
from dexportrait_jax.models.animator.conditioning import RAY_CHANNELS, Bank, RayMapKind
from dexportrait_jax.models.animator.transformer import BlockInputs, TransformerOptions
from dexportrait_jax.models.animator.unet import UNet
from dexportrait_jax.models.attention import Backend
from dexportrait_jax.models.rematerialisation import Remat

Attn2 = Literal["none", "null_text", "clip_image"]


def null_text_parameter(attn2: Attn2, tokens: int, features: int) -> nnx.Param | None:
    """The constant context of the mode "null_text", learned from zero.

    Whoever has the empty prompt's embedding may put it here; no import does.
    """
    return nnx.Param(jnp.zeros((tokens, features))) if attn2 == "null_text" else None


def attn2_context(
    null_text: nnx.Param | None,
    context: Float[Array, "batch n features"] | None,
    batch: int,
    options: TransformerOptions,
    dtype: jnp.dtype,
) -> Float[Array, "batch n features"] | None:
    """What attn2 reads: the constant text, the given context, or one zero token in its absence."""
    if options.cross_attention_features is None:
        return None
    if null_text is not None:
        text = null_text[...].astype(dtype)
        return jnp.broadcast_to(text, (batch, *text.shape))
    if context is None:
        return jnp.zeros((batch, 1, options.cross_attention_features), dtype)
    return context.astype(dtype)


class ReferenceUNet(UNet):
    """Source latents -> bank of norm1 features of every transformer block (method.md 4.3).

    The whole UNet of SD1.5 is there, so its weights load unchanged; what lies behind the last bank
    entry does not influence the bank and receives no gradient.

    Args:
        in_channels: latent channels.
        block_channels, layers_per_block, heads, groups: sizes; the defaults are SD1.5's.
        attn2: "none" leaves SD1.5's text attention out, "null_text" feeds it a constant, "clip_image"
            an image embedding.
        cross_attention_features: channels of that context.
        null_text_tokens: length of the constant.
        raymap_reference: give it the ray map of the source pose too.
        raymap, raymap_w, raymap_points: as in ``Denoiser``.
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
        raymap_reference: bool = False,
        raymap: RayMapKind = "displacement",
        raymap_w: int = 1,
        raymap_points: geometry.RayMapPoints = "centres",
        backend: Backend = "auto",
        remat: Remat = "none",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.options = TransformerOptions(
            heads=heads,
            cross_attention_features=None if attn2 == "none" else cross_attention_features,
            backend=backend,
        )
        self.raymap_reference, self.raymap, self.raymap_w = raymap_reference, raymap, raymap_w
        self.raymap_points = raymap_points
        super().__init__(
            in_channels=in_channels,
            out_channels=in_channels,
            block_channels=block_channels,
            layers_per_block=layers_per_block,
            options=self.options,
            extra_channels=RAY_CHANNELS[raymap] if raymap_reference else 0,
            groups=groups,
            remat=remat,
            dtype=dtype,
            rngs=rngs,
        )
        self.null_text = null_text_parameter(attn2, null_text_tokens, cross_attention_features)

    def __call__(
        self,
        latents: Float[Array, "sources h w c"],
        context: Float[Array, "sources n features"] | None = None,
        source_pose: Float[Array, "sources 3 4"] | None = None,
    ) -> Bank:
        """The bank: path of a transformer block -> (S, h, w, c). Runs at timestep 0.

        ``source_pose`` is read only with ``raymap_reference`` and is then needed.
        """
        sources = latents.shape[0]
        if self.raymap_reference and self.raymap != "none":
            rays = geometry.ray_map(
                source_pose,
                *latents.shape[1:3],
                homogeneous=bool(self.raymap_w),
                kind=self.raymap,
                points=self.raymap_points,
            )
            latents = jnp.concatenate([latents, rays], axis=-1)
        context = attn2_context(self.null_text, context, sources, self.options, self.dtype)
        return self.forward(latents, jnp.zeros((sources,)), BlockInputs(context=context))[1]
