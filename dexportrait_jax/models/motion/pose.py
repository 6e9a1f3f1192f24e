"""Head pose from a picture of a head: ConvNeXtV2 with linear heads (method.md 3.3).

Parameter names are those of ConvNeXtV2's own code, which LivePortrait's motion extractor shares
(downsample_layers, stages, norm, fc_pitch, ...); timm names the same layers stem, stages.*.blocks,
head.norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from dexportrait_jax import geometry
from dexportrait_jax.models.layers import Conv

_BINS = 66
# "published" is made for wide networks that train for long: the blocks of a narrow one start as good as empty,
# and stay so for hundreds of steps. "fan_in" keeps the variance from layer to layer whatever the width.
Initialisation = Literal["published", "fan_in"]
_WEIGHTS: dict[str, nnx.Initializer] = {
    "published": nnx.initializers.truncated_normal(0.02),
    "fan_in": nnx.initializers.lecun_normal(),
}


class GlobalResponseNorm(nnx.Module):
    """Each feature scaled by its norm over space relative to the mean norm of all features."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.gamma = nnx.Param(jnp.zeros((1, 1, 1, features)))
        self.beta = nnx.Param(jnp.zeros((1, 1, 1, features)))

    def __call__(self, inputs: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        # The small number keeps the root's gradient finite where a feature is zero everywhere.
        squares = jnp.square(inputs.astype(jnp.float32)).sum(axis=(1, 2), keepdims=True)
        norms = jnp.sqrt(squares + 1e-12)
        relative = norms / (norms.mean(axis=-1, keepdims=True) + 1e-6)
        scale = (1 + self.gamma[...] * relative).astype(inputs.dtype)
        return inputs * scale + self.beta[...].astype(inputs.dtype)


class ConvNeXtBlock(nnx.Module):
    """Depthwise 7x7, LayerNorm, linear x4, GELU, global response norm, linear, residual."""

    def __init__(
        self,
        features: int,
        *,
        kernel_init: nnx.Initializer = _WEIGHTS["published"],
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        build = {"kernel_init": kernel_init, "dtype": dtype, "rngs": rngs}
        self.dwconv = Conv(features, features, (7, 7), padding=3, groups=features, **build)
        self.norm = nnx.LayerNorm(features, epsilon=1e-6, dtype=dtype, rngs=rngs)
        self.pwconv1 = nnx.Linear(features, 4 * features, **build)
        self.grn = GlobalResponseNorm(4 * features, rngs=rngs)
        self.pwconv2 = nnx.Linear(4 * features, features, **build)

    def __call__(self, inputs: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        hidden = self.pwconv1(self.norm(self.dwconv(inputs)))
        return inputs + self.pwconv2(self.grn(jax.nn.gelu(hidden, approximate=False)))


class ConvNeXtV2(nnx.Module):
    """Image (B, H, W, 3) -> features (B, dims[-1]), pooled and normalised."""

    def __init__(
        self,
        *,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        initialisation: Initialisation = "published",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = {"dtype": dtype, "rngs": rngs}
        weights = _WEIGHTS[initialisation]

        def conv(in_features: int, out_features: int, size: int) -> Conv:
            window = {"strides": size, "padding": 0, "kernel_init": weights}
            return Conv(in_features, out_features, (size, size), **window, **build)

        def norm(features: int) -> nnx.LayerNorm:
            return nnx.LayerNorm(features, epsilon=1e-6, **build)

        downsample = [nnx.List([conv(3, dims[0], 4), norm(dims[0])])]
        for before, after in zip(dims[:-1], dims[1:], strict=True):
            downsample.append(nnx.List([norm(before), conv(before, after, 2)]))
        self.downsample_layers = nnx.List(downsample)
        self.stages = nnx.List(
            nnx.List([ConvNeXtBlock(features, kernel_init=weights, **build) for _ in range(depth)])
            for features, depth in zip(dims, depths, strict=True)
        )
        self.norm = norm(dims[-1])

    def features(self, image: Float[Array, "b h w 3"]) -> Float[Array, "b features"]:
        """Features of an image in the range the weights were trained for."""
        hidden = image
        for downsample, blocks in zip(self.downsample_layers, self.stages, strict=True):
            for layer in downsample:
                hidden = layer(hidden)
            for block in blocks:
                hidden = block(hidden)
        return self.norm(hidden.mean(axis=(1, 2)))


class PoseEncoder(ConvNeXtV2):
    """Image (B, H, W, 3) in [-1, 1] -> head pose P (B, 3, 4) float32, and the raw outputs of the heads.

    ``rotation_head`` "euler_bins": 66 logits for each of pitch, yaw and roll, whose expectation is an
    angle in [-97.5, 97.5] degrees (method.md 2); "6d": six numbers, made orthonormal. The scale is
    exp(clip(raw, -limit, limit)) with ``scale_limit``; the translation is linear, or limit * tanh with
    ``translation_limit``; its third component is set to 0. At initialisation heads are close to frontal, of
    scale 1, centred.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        rotation_head: Literal["euler_bins", "6d"] = "euler_bins",
        translation_limit: float | None = None,
        scale_limit: float = 2.0,
        initialisation: Initialisation = "published",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            depths=depths, dims=dims, initialisation=initialisation, dtype=dtype, rngs=rngs
        )
        self.rotation_head = rotation_head
        self.translation_limit, self.scale_limit = translation_limit, scale_limit

        def head(outputs: int) -> nnx.Linear:
            small = nnx.initializers.normal(0.02 / dims[-1] ** 0.5)
            # Else TPUs multiply float32 in one pass of bfloat16: a shift of the head would be off by 0.004.
            return nnx.Linear(
                dims[-1], outputs, kernel_init=small, precision=lax.Precision.HIGHEST, rngs=rngs
            )

        if rotation_head == "euler_bins":
            self.fc_pitch, self.fc_yaw, self.fc_roll = head(_BINS), head(_BINS), head(_BINS)
        elif rotation_head == "6d":
            self.fc_rotation = head(6)
            self.fc_rotation.bias = nnx.Param(jnp.array([1.0, 0, 0, 0, 1, 0]))
        else:
            raise ValueError(f"rotation head {rotation_head!r} is neither 'euler_bins' nor '6d'")
        self.fc_t, self.fc_scale = head(3), head(1)

    def __call__(
        self, image: Float[Array, "b h w 3"]
    ) -> tuple[Float[Array, "b 3 4"], dict[str, Float[Array, "b _"]]]:
        # LivePortrait's weights take [0, 1].
        features = self.features((image + 1) / 2).astype(jnp.float32)
        raw = {"t": self.fc_t(features), "scale": self.fc_scale(features)}
        if self.rotation_head == "6d":
            raw["rotation"] = self.fc_rotation(features)
            rotation = geometry.rotation_6d(raw["rotation"])
        else:
            raw["pitch"], raw["yaw"] = self.fc_pitch(features), self.fc_yaw(features)
            raw["roll"] = self.fc_roll(features)
            angles = (_expected_degrees(raw[name]) for name in ("pitch", "yaw", "roll"))
            rotation = geometry.euler_to_rotation(*angles)
        translation = raw["t"]
        if self.translation_limit is not None:
            translation = self.translation_limit * jnp.tanh(translation)
        translation = translation * jnp.array([1.0, 1.0, 0.0])
        scale = jnp.exp(jnp.clip(raw["scale"][:, 0], -self.scale_limit, self.scale_limit))
        return geometry.pose_matrix(rotation, translation, scale), raw


def _expected_degrees(logits: Float[Array, "b bins"]) -> Float[Array, " b"]:
    return 3 * jnp.sum(jax.nn.softmax(logits) * jnp.arange(_BINS), axis=-1) - 97.5
