"""The tiny autoencoders TAESD, TAEF1, TAEF2: convolutions and ReLU, a hundredth of the work of a full one.

Equal to diffusers' ``AutoencoderTiny``, whose names the layers have; the middle blocks of TAEF2, which diffusers lacks,
are added. They give the latents of the autoencoder that they were distilled from, without a variance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dexportrait_jax.models.animator.norms import GroupNorm
from dexportrait_jax.models.layers import Conv

LOG_VARIANCE = -30.0  # of latents that have none: what `VAE.encode` takes for the smallest
_POOL_WIDENING = 4


class TinyBlock(nnx.Module):
    """Three 3x3 convolutions and a residual, ReLU behind.

    ``pooled``: first, two 1x1 convolutions about a GroupNorm add what the whole picture has in common.
    """

    def __init__(self, width: int, *, pooled: bool, groups: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        build = {"dtype": dtype, "rngs": rngs}
        # Numbered as in a torch Sequential with ReLU in between.
        self.conv = nnx.Dict(
            {name: Conv(width, width, (3, 3), padding=1, **build) for name in ("0", "2", "4")}
        )
        wide = _POOL_WIDENING * width
        pool = {
            "0": Conv(width, wide, (1, 1), use_bias=False, **build),
            "1": GroupNorm(wide, groups, epsilon=1e-5, **build),
            "3": Conv(wide, width, (1, 1), use_bias=False, **build),
        }
        self.pool = nnx.Dict(pool) if pooled else None

    def __call__(self, hidden: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
        if self.pool is not None:
            wide = jax.nn.relu(self.pool["1"](self.pool["0"](hidden)))
            hidden = hidden + self.pool["3"](wide)
        changed = jax.nn.relu(self.conv["0"](hidden))
        changed = self.conv["4"](jax.nn.relu(self.conv["2"](changed)))
        return jax.nn.relu(changed + hidden)


class _Layers(nnx.Module):
    """Modules under their place in a torch Sequential; functions take a place too and hold no parameters."""

    def __init__(self, steps: Sequence[Callable[[Array], Array]]):
        self.order = tuple(step if not isinstance(step, nnx.Module) else None for step in steps)
        self.layers = nnx.Dict(
            {str(n): step for n, step in enumerate(steps) if isinstance(step, nnx.Module)}
        )

    def __call__(self, hidden: Float[Array, "batch h w c"]) -> Float[Array, "batch h2 w2 c2"]:
        for number, function in enumerate(self.order):
            hidden = (function or self.layers[str(number)])(hidden)
        return hidden


def _double(hidden: Float[Array, "batch h w c"]) -> Float[Array, "batch 2h 2w c"]:
    return jnp.repeat(jnp.repeat(hidden, 2, axis=1), 2, axis=2)


class TinyAutoencoder(nnx.Module):
    """Images in [-1, 1] <-> latents; the defaults are TAEF2's sizes.

    Args:
        image_channels, latent_channels: channels of either side.
        block_channels: widths of the levels, all the same; the factor of reduction is 2 ** (levels - 1).
        layers_per_block: blocks of every level but that of the picture, which has one.
        groups, middle_attention: of the blocks at the lowest level: whether they have a GroupNorm over the picture
            (TAEF2), and in how many groups.
        scale: factor that brings latents to unit variance; kept here for the callers, not applied.
        dtype: compute type.

    Raises:
        ValueError: widths that are not all the same.
    """

    def __init__(
        self,
        *,
        image_channels: int = 3,
        latent_channels: int = 32,
        block_channels: Sequence[int] = (64, 64, 64, 64),
        layers_per_block: int = 3,
        groups: int = 4,
        scale: float = 1.0,
        middle_attention: bool = True,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if len(set(block_channels)) != 1:
            raise ValueError(f"a tiny autoencoder has levels of one width, not {block_channels}")
        width, levels = block_channels[0], len(block_channels)
        self.scale, self.latent_channels = scale, latent_channels
        self.factor, self.dtype = 2 ** (levels - 1), dtype
        build = {"dtype": dtype, "rngs": rngs}

        def conv(before: int, after: int, **settings) -> Conv:
            return Conv(before, after, (3, 3), padding=1, **settings, **build)

        def blocks(level: int) -> list[TinyBlock]:
            pooled = middle_attention and level == levels - 1
            count = layers_per_block if level else 1
            return [TinyBlock(width, pooled=pooled, groups=groups, **build) for _ in range(count)]

        encoder = [conv(image_channels, width), *blocks(0)]
        for level in range(1, levels):
            encoder += [conv(width, width, strides=2, use_bias=False), *blocks(level)]
        self.encoder = _Layers([*encoder, conv(width, latent_channels)])

        decoder = [conv(latent_channels, width), jax.nn.relu, *blocks(levels - 1)]
        for level in reversed(range(levels - 1)):
            decoder += [_double, conv(width, width, use_bias=False), *blocks(level)]
        self.decoder = _Layers([*decoder, conv(width, image_channels)])

    def encode(
        self, images: Float[Array, "batch H W image"]
    ) -> tuple[Float[Array, "batch h w latent"], Float[Array, "batch h w latent"]]:
        """The unscaled latents and their log-variance, which is as good as none, float32.

        Raises:
            ValueError: height or width that the factor does not divide.
        """
        height, width = images.shape[1:3]
        if height % self.factor or width % self.factor:
            raise ValueError(f"images of {height}x{width} do not divide by {self.factor}")
        latents = self.encoder((images.astype(self.dtype) + 1) / 2).astype(jnp.float32)
        return latents, jnp.full_like(latents, LOG_VARIANCE)

    def decode(self, latents: Float[Array, "batch h w latent"]) -> Float[Array, "batch H W image"]:
        """Images of unscaled latents, float32, about [-1, 1]. Latents beyond 3 are bent towards it."""
        bent = 3 * jnp.tanh(latents.astype(self.dtype) / 3)
        return 2 * self.decoder(bent).astype(jnp.float32) - 1

    def sample(
        self,
        mean: Float[Array, "batch h w latent"],
        logvar: Float[Array, "batch h w latent"],
        key: Array,
    ) -> Float[Array, "batch h w latent"]:
        """The latents: nothing is drawn."""
        del logvar, key
        return mean
