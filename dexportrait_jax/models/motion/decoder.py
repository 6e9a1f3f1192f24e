"""The expression-conditioned decoder (method.md 3.8).

A StyleGAN2 variant that enters in the middle: from the flattened volume one branch goes down to gather
context, another up to the picture, and RGB skips of decreasing width run through both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from dexportrait_jax.models.motion.stylegan import (
    EqualConv,
    EqualLinear,
    FusedLeakyReLU,
    ModulatedConv,
    convolve_changing,
    upsample,
)
from dexportrait_jax.models.rematerialisation import Remat, rematerialised

Injection = Literal["modulated", "adain"]


class AdaptiveConv(nnx.Module):
    """3x3 convolution, instance norm, then scale and shift from the style (AdaIN)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        style_features: int,
        *,
        change: str,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.change = change
        self.conv = EqualConv(in_features, out_features, 3, dtype=dtype, rngs=rngs)
        self.modulation = EqualLinear(style_features, 2 * out_features, rngs=rngs)

    def __call__(
        self, inputs: Float[Array, "b h w in"], style: Float[Array, "b style"]
    ) -> Float[Array, "b h2 w2 out"]:
        hidden = convolve_changing(inputs, self.conv.scaled_kernel(), self.change)
        wide = hidden.astype(jnp.float32)
        centred = wide - wide.mean(axis=(1, 2), keepdims=True)
        deviation = lax.rsqrt(jnp.square(centred).mean(axis=(1, 2), keepdims=True) + 1e-5)
        scale, shift = jnp.split(self.modulation(style.astype(jnp.float32)), 2, axis=-1)
        output = centred * (deviation * (1 + scale)[:, None, None]) + shift[:, None, None]
        return output.astype(hidden.dtype)


class StyledConv(nnx.Module):
    """A 3x3 convolution under the style, then bias and leaky ReLU. No noise: this reconstructs."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        style_features: int,
        *,
        change: str = "same",
        injection: Injection = "modulated",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = {"change": change, "dtype": dtype, "rngs": rngs}
        if injection == "modulated":
            self.conv = ModulatedConv(in_features, out_features, 3, style_features, **build)
        elif injection == "adain":
            self.conv = AdaptiveConv(in_features, out_features, style_features, **build)
        else:
            raise ValueError(f"injection {injection!r} is neither 'modulated' nor 'adain'")
        self.activate = FusedLeakyReLU(out_features, rngs=rngs)

    def __call__(
        self, inputs: Float[Array, "b h w in"], style: Float[Array, "b style"]
    ) -> Float[Array, "b h2 w2 out"]:
        return self.activate(self.conv(inputs, style))


class ToRGB(nnx.Module):
    """Modulated 1x1 convolution, plus the coarser level's output brought to this width and size."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        style_features: int,
        coarser_features: int | None,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        build = {"dtype": dtype, "rngs": rngs}
        self.conv = ModulatedConv(
            in_features, out_features, 1, style_features, demodulate=False, **build
        )
        self.bias = nnx.Param(jnp.zeros(out_features))
        if coarser_features is None:
            self.skip = None
        else:
            self.skip = EqualConv(coarser_features, out_features, 1, **build)

    def __call__(
        self,
        inputs: Float[Array, "b h w in"],
        style: Float[Array, "b style"],
        coarser: Float[Array, "b h2 w2 c"] | None,
    ) -> Float[Array, "b h w out"]:
        output = self.conv(inputs, style) + self.bias[...].astype(inputs.dtype)
        if self.skip is None:
            return output
        # The 1x1 convolution has no bias, so it may come first, where the picture is smaller.
        return output + upsample(self.skip(coarser))


class ExpressionMixing(nnx.Module):
    """x + gain * sum_k z_k M_k x at every position: features mixed by matrices that are linear in the latent z.

    A style can only turn channels up and down, everywhere at once. At small budgets that is too little to move lips
    and lids, which are few pixels; a decoder soon learns to overlook the latent. Here the first gradient already is
    the correlation of latent, features and error. M is 0 at the start. [ours]
    """

    def __init__(self, expression_features: int, features: int, gain: float, *, dtype: jnp.dtype):
        self.gain, self.dtype = gain, dtype
        self.matrices = nnx.Param(jnp.zeros((expression_features, features, features)))

    def __call__(
        self, inputs: Float[Array, "b h w c"], expression: Float[Array, "b latent"]
    ) -> Float[Array, "b h w c"]:
        wide = expression.astype(jnp.float32)
        matrices = self.gain * jnp.einsum("bk,kio->bio", wide, self.matrices[...])
        inputs = inputs.astype(self.dtype)
        return inputs + jnp.einsum("bhwi,bio->bhwo", inputs, matrices.astype(self.dtype))


class Decoder(nnx.Module):
    """Features (B, h, w, C), style (B, n) and expression -> image (B, S, S, 3) float32, about [-1, 1], unclipped.

    Args:
        in_features: C.
        style_features: n.
        down_channels: features of the pairs of convolutions at h, h/2, h/4, ...
        up_channels: features of the pairs at 2h, 4h, ...
        rgb_channels: outputs of the RGB layers from the coarsest level to the finest, one for each of
            ``down_channels`` and ``up_channels``; None doubles from 3 towards the coarsest.
        injection: "modulated" (StyleGAN2) or "adain".
        mapping_features: None, or the width of a two-layer MLP in front of the style.
        expression_features: length of the expression latent.
        expression_mixing: 0, or the gain of an ``ExpressionMixing`` at the entry and at every level of the way up.
        remat: what the backward pass keeps of a level's two convolutions, a name of ``rematerialisation``.
    """

    def __init__(
        self,
        *,
        in_features: int = 512,
        style_features: int = 2560,
        expression_features: int = 512,
        down_channels: Sequence[int] = (512, 512, 512),
        up_channels: Sequence[int] = (512, 256, 128),
        rgb_channels: Sequence[int] | None = None,
        injection: Injection = "modulated",
        mapping_features: int | None = None,
        expression_mixing: float = 0.0,
        remat: Remat = "none",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        levels = len(down_channels) + len(up_channels)
        rgb = list(rgb_channels or (3 * 2**n for n in reversed(range(levels))))
        if len(rgb) != levels or rgb[-1] != 3:
            raise ValueError(
                f"rgb_channels {rgb}: {levels} levels need as many, the last of them 3"
            )
        build = {"dtype": dtype, "rngs": rngs}
        self.remat, self.dtype = remat, dtype
        if mapping_features is None:
            self.mapping = None
        else:
            wide = {"activate": True, "rngs": rngs}
            first = EqualLinear(style_features, mapping_features, **wide)
            second = EqualLinear(mapping_features, mapping_features, **wide)
            self.mapping = nnx.List([first, second])
            style_features = mapping_features

        def pair(before: int, after: int, change: str) -> list[StyledConv]:
            sizes = ((before, after, change), (after, after, "same"))
            return [
                StyledConv(a, b, style_features, change=c, injection=injection, **build)
                for a, b, c in sizes
            ]

        entry = down_channels[0]
        (self.conv1,) = pair(in_features, entry, "same")[:1]
        down, up, before = [], [], entry
        for level, features in enumerate(down_channels):
            down += pair(before, features, "down" if level else "same")
            before = features
        before = entry
        for features in up_channels:
            up += pair(before, features, "up")
            before = features
        self.down_convs, self.up_convs = nnx.List(down), nnx.List(up)
        self.mixings = nnx.List(
            ExpressionMixing(expression_features, width, expression_mixing, dtype=dtype)
            for width in ((entry, *up_channels) if expression_mixing else ())
        )
        widths = (*reversed(down_channels), *up_channels)
        self.to_rgbs = nnx.List(
            ToRGB(width, out, style_features, coarser, **build)
            for width, out, coarser in zip(widths, rgb, [None, *rgb[:-1]], strict=True)
        )

    def __call__(
        self,
        features: Float[Array, "b h w c"],
        style: Float[Array, "b n"],
        expression: Float[Array, "b latent"],
    ) -> Float[Array, "b s s 3"]:
        style = style.astype(jnp.float32)
        for layer in self.mapping or ():
            style = layer(style)

        def mix(level: int, hidden: Array) -> Array:
            return self.mixings[level](hidden, expression) if self.mixings else hidden

        def level(convs: nnx.List, number: int, up: bool):
            """The pair of convolutions of a level, which on the way up also mixes."""

            def run(hidden: Array, style: Array) -> Array:
                for conv in (convs[2 * number], convs[2 * number + 1]):
                    hidden = conv(hidden, style)
                return mix(number + 1, hidden) if up else hidden

            return rematerialised(run, self.remat)

        entry = mix(0, self.conv1(features.astype(self.dtype), style))
        going_down, going_up = [], []
        for convs, kept in ((self.down_convs, going_down), (self.up_convs, going_up)):
            hidden = entry
            for number in range(len(convs) // 2):
                hidden = level(convs, number, kept is going_up)(hidden, style)
                kept.append(hidden)
        output = None
        for hidden, to_rgb in zip([*reversed(going_down), *going_up], self.to_rgbs, strict=True):
            output = to_rgb(hidden, style, output)
        return output.astype(jnp.float32)
