"""The generator around the decoder: two volumes and a latent become a picture (method.md 3.6 - 3.8)."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dexportrait_jax.models.layers import Normalisation
from dexportrait_jax.models.motion.appearance import AppearanceLatent
from dexportrait_jax.models.motion.blocks import Halve, ResBlock3d, depth_to_features
from dexportrait_jax.models.motion.decoder import Decoder, Injection
from dexportrait_jax.models.rematerialisation import Remat, rematerialised


class Generator(nnx.Module):
    """Source volume, warped volume and expression latent -> picture (method.md 3.1).

    The two volumes together are halved and flattened into the decoder's entry; the style is the
    expression beside the appearance latent, which is read from the volume that was not moved. One source
    may serve several outputs: its volume (S, ...) then goes with S * outputs warped ones, source-major.

    Args:
        volume_shape, volume_channels: (D, h, w) and C of the volumes.
        expression_features: length of the expression latent.
        expression_gain: factor of the latent in the style. Published is 1; a short latent beside a long appearance
            has little say in a mix whose weights start alike.
        flatten_stride: "last" or "first": where the volumes are halved, see ``ResBlock3d``.
        appearance_widths, appearance_strides: of ``AppearanceLatent``.
        down_channels, up_channels, rgb_channels, injection, mapping_features, expression_mixing: of ``Decoder``,
            which enters at h/2 and ends at h/2 * 2^len(up_channels) pixels.
        remat: what the backward pass keeps of a block, a name of ``rematerialisation``.
    """

    def __init__(
        self,
        *,
        volume_shape: tuple[int, int, int] = (16, 64, 64),
        volume_channels: int = 32,
        expression_features: int = 512,
        expression_gain: float = 1.0,
        flatten_stride: Halve = "last",
        appearance_widths: Sequence[int] = (32, 64, 128, 256, 128),
        appearance_strides: Sequence[int] = (2, 2, 2, 2),
        down_channels: Sequence[int] = (512, 512, 512),
        up_channels: Sequence[int] = (512, 256, 128),
        rgb_channels: Sequence[int] | None = None,
        injection: Injection = "modulated",
        mapping_features: int | None = None,
        expression_mixing: float = 0.0,
        norm: Normalisation = "group",
        remat: Remat = "none",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = {"dtype": dtype, "rngs": rngs}
        self.expression_gain, self.remat = expression_gain, remat
        self.flatten = ResBlock3d(
            2 * volume_channels, volume_channels, halve=flatten_stride, norm=norm, **build
        )
        self.appearance_latent = AppearanceLatent(
            volume_shape=volume_shape,
            volume_channels=volume_channels,
            widths=appearance_widths,
            strides=appearance_strides,
            norm=norm,
            **build,
        )
        self.decoder = Decoder(
            in_features=volume_shape[0] * volume_channels,
            style_features=expression_features + self.appearance_latent.features,
            down_channels=down_channels,
            up_channels=up_channels,
            rgb_channels=rgb_channels,
            injection=injection,
            mapping_features=mapping_features,
            expression_features=expression_features,
            expression_mixing=expression_mixing,
            remat=remat,
            **build,
        )

    def __call__(
        self,
        volume: Float[Array, "sources d h w c"],
        warped_volume: Float[Array, "b d h w c"],
        expression: Float[Array, "b latent"],
    ) -> Float[Array, "b s s 3"]:
        sources, batch = volume.shape[0], warped_volume.shape[0]
        if batch % sources:
            raise ValueError(f"{batch} outputs cannot be shared out among {sources} volumes")
        latent = rematerialised(self.appearance_latent, self.remat)(volume)
        appearance = jnp.repeat(latent, batch // sources, axis=0)
        both = [jnp.repeat(volume, batch // sources, axis=0), warped_volume.astype(volume.dtype)]
        flatten = rematerialised(self.flatten, self.remat)
        features = depth_to_features(flatten(jnp.concatenate(both, axis=-1)))
        style = [self.expression_gain * expression, appearance.astype(expression.dtype)]
        return self.decoder(features, jnp.concatenate(style, axis=-1), expression)
