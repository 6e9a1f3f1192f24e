"""The autoencoder of Stable Diffusion, equal to diffusers' ``AutoencoderKL``.

The same code with small sizes is the toy autoencoder of the tests and the demo.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dexportrait_jax.models.animator.blocks import Downsample, ResnetBlock, Upsample
from dexportrait_jax.models.animator.norms import GroupNorm
from dexportrait_jax.models.attention import Attention, Backend
from dexportrait_jax.models.layers import Conv

EPSILON = 1e-6  # of every GroupNorm here; the UNet's ResNet blocks have 1e-5


class PixelAttention(Attention):
    """Single-head self-attention over all pixels, with GroupNorm and residual."""

    def __init__(
        self,
        channels: int,
        *,
        groups: int,
        backend: Backend,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.group_norm = GroupNorm(channels, groups, epsilon=EPSILON, dtype=dtype, rngs=rngs)
        super().__init__(channels, 1, input_bias=True, backend=backend, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
        tokens = self.group_norm(hidden).reshape(hidden.shape[0], -1, hidden.shape[-1])
        return hidden + super().__call__(tokens).reshape(hidden.shape)


class Level(nnx.Module):
    """ResNet blocks of one resolution and the change to the next."""

    def __init__(
        self,
        before: int,
        width: int,
        layers: int,
        *,
        change: str | None,
        groups: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        build = {"dtype": dtype, "rngs": rngs}
        resnet = {"time_features": None, "groups": groups, "epsilon": EPSILON, **build}
        widths = [before] + [width] * layers
        self.resnets = nnx.List(
            [ResnetBlock(one, two, **resnet) for one, two in zip(widths, widths[1:], strict=False)]
        )
        down, up = change == "down", change == "up"
        self.downsamplers = nnx.List([Downsample(width, asymmetric=True, **build)] if down else [])
        self.upsamplers = nnx.List([Upsample(width, **build)] if up else [])

    def __call__(self, hidden: Float[Array, "batch h w c"]) -> Float[Array, "batch h2 w2 c2"]:
        for layer in [*self.resnets, *self.downsamplers, *self.upsamplers]:
            hidden = layer(hidden)
        return hidden


class Middle(nnx.Module):
    """ResNet block, attention (where wanted), ResNet block."""

    def __init__(
        self,
        width: int,
        *,
        attention: bool,
        groups: int,
        backend: Backend,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        build = {"groups": groups, "dtype": dtype, "rngs": rngs}
        resnet = {"time_features": None, "epsilon": EPSILON, **build}
        self.resnets = nnx.List([ResnetBlock(width, width, **resnet) for _ in range(2)])
        attentions = [PixelAttention(width, backend=backend, **build)] if attention else []
        self.attentions = nnx.List(attentions)

    def __call__(self, hidden: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
        for layer in [self.resnets[0], *self.attentions, self.resnets[1]]:
            hidden = layer(hidden)
        return hidden


class Encoder(nnx.Module):
    """Images -> moments before the quantisation convolution."""

    def __init__(
        self,
        image_channels: int,
        moments: int,
        widths: Sequence[int],
        layers: int,
        *,
        middle_attention: bool,
        groups: int,
        backend: Backend,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        build = {"dtype": dtype, "rngs": rngs}
        top = widths[-1]
        self.conv_in = Conv(image_channels, widths[0], (3, 3), padding=1, **build)
        self.down_blocks = nnx.List([])
        for index, width in enumerate(widths):
            change = None if index == len(widths) - 1 else "down"
            before = widths[max(index - 1, 0)]
            self.down_blocks.append(
                Level(before, width, layers, change=change, groups=groups, **build)
            )
        self.mid_block = Middle(
            top, attention=middle_attention, groups=groups, backend=backend, **build
        )
        self.conv_norm_out = GroupNorm(top, groups, epsilon=EPSILON, **build)
        self.conv_out = Conv(top, moments, (3, 3), padding=1, **build)

    def __call__(
        self, hidden: Float[Array, "batch H W image"]
    ) -> Float[Array, "batch h w moments"]:
        hidden = self.conv_in(hidden)
        for block in [*self.down_blocks, self.mid_block]:
            hidden = block(hidden)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(hidden)))


class Decoder(nnx.Module):
    """Latents behind the quantisation convolution -> images. One more ResNet block a level."""

    def __init__(
        self,
        latent_channels: int,
        image_channels: int,
        widths: Sequence[int],
        layers: int,
        *,
        middle_attention: bool,
        groups: int,
        backend: Backend,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        build = {"dtype": dtype, "rngs": rngs}
        before = widths[-1]
        self.conv_in = Conv(latent_channels, before, (3, 3), padding=1, **build)
        self.mid_block = Middle(
            before, attention=middle_attention, groups=groups, backend=backend, **build
        )
        self.up_blocks = nnx.List([])
        for index, width in reversed(list(enumerate(widths))):
            change = None if index == 0 else "up"
            self.up_blocks.append(
                Level(before, width, layers + 1, change=change, groups=groups, **build)
            )
            before = width
        self.conv_norm_out = GroupNorm(before, groups, epsilon=EPSILON, **build)
        self.conv_out = Conv(before, image_channels, (3, 3), padding=1, **build)

    def __call__(self, hidden: Float[Array, "batch h w latent"]) -> Float[Array, "batch H W image"]:
        hidden = self.conv_in(hidden)
        for block in [self.mid_block, *self.up_blocks]:
            hidden = block(hidden)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(hidden)))


class VAE(nnx.Module):
    """Images in [-1, 1] <-> latents (method.md 4.1); the defaults are Stable Diffusion's sizes.

    Args:
        image_channels, latent_channels: channels of either side.
        block_channels: widths of the levels; the factor of reduction is 2 ** (levels - 1).
        layers_per_block: ResNet blocks of an encoder level.
        groups: GroupNorm groups.
        scale: factor that brings latents to unit variance; kept here for the callers, not applied.
        middle_attention: attention in the middle of either half.
        backend, dtype: attention backend, compute type.
    """

    def __init__(
        self,
        *,
        image_channels: int = 3,
        latent_channels: int = 4,
        block_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        groups: int = 32,
        scale: float = 0.18215,
        middle_attention: bool = True,
        backend: Backend = "auto",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = {"dtype": dtype, "rngs": rngs}
        sizes = (tuple(block_channels), layers_per_block)
        settings = {"middle_attention": middle_attention, "groups": groups, "backend": backend}
        self.scale, self.latent_channels = scale, latent_channels
        self.factor, self.dtype = 2 ** (len(block_channels) - 1), dtype
        moments = 2 * latent_channels
        self.encoder = Encoder(image_channels, moments, *sizes, **settings, **build)
        self.decoder = Decoder(latent_channels, image_channels, *sizes, **settings, **build)
        self.quant_conv = Conv(moments, moments, (1, 1), **build)
        self.post_quant_conv = Conv(latent_channels, latent_channels, (1, 1), **build)

    def encode(
        self, images: Float[Array, "batch H W image"]
    ) -> tuple[Float[Array, "batch h w latent"], Float[Array, "batch h w latent"]]:
        """Mean and log-variance (kept within -30..20) of the unscaled latents, float32.

        Raises:
            ValueError: height or width that the factor does not divide.
        """
        height, width = images.shape[1:3]
        if height % self.factor or width % self.factor:
            raise ValueError(f"images of {height}x{width} do not divide by {self.factor}")
        moments = self.quant_conv(self.encoder(images.astype(self.dtype))).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, latents: Float[Array, "batch h w latent"]) -> Float[Array, "batch H W image"]:
        """Images of unscaled latents, float32, about [-1, 1]."""
        hidden = self.post_quant_conv(latents.astype(self.dtype))
        return self.decoder(hidden).astype(jnp.float32)

    def sample(
        self,
        mean: Float[Array, "batch h w latent"],
        logvar: Float[Array, "batch h w latent"],
        key: Array,
    ) -> Float[Array, "batch h w latent"]:
        """Latents drawn from the encoder's distribution, unscaled."""
        return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
