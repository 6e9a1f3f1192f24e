"""LPIPS: how different two pictures look to an image classifier (Zhang et al. 2018, version 0.1).

VGG16 is the training loss of ``method.md`` 3.10 (L_lpips and, with a mask, L_clpips); AlexNet is
the usual metric. Names follow the published ``lpips`` module (torchvision's layer numbers inside
five slices). Weights: ``dexportrait_jax.weights.lpips.load_lpips``.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dexportrait_jax.models.layers import Conv

Reduction = Literal["all_positions", "mask_area"]
FeatureMaps = list[Float[Array, "batch _ _ channels"]]
DistanceMaps = list[Float[Array, "batch _ _"]]

# Per slice: (layer number in torchvision's ``features``, in, out, window, stride, padding). Every
# slice ends at the ReLU whose output is compared; POOLED slices begin with a max pooling of this
# (window, stride).
_SLICES = {
    "vgg16": (
        ((0, 3, 64, 3, 1, 1), (2, 64, 64, 3, 1, 1)),
        ((5, 64, 128, 3, 1, 1), (7, 128, 128, 3, 1, 1)),
        ((10, 128, 256, 3, 1, 1), (12, 256, 256, 3, 1, 1), (14, 256, 256, 3, 1, 1)),
        ((17, 256, 512, 3, 1, 1), (19, 512, 512, 3, 1, 1), (21, 512, 512, 3, 1, 1)),
        ((24, 512, 512, 3, 1, 1), (26, 512, 512, 3, 1, 1), (28, 512, 512, 3, 1, 1)),
    ),
    "alexnet": (
        ((0, 3, 64, 11, 4, 2),),
        ((3, 64, 192, 5, 1, 2),),
        ((6, 192, 384, 3, 1, 1),),
        ((8, 384, 256, 3, 1, 1),),
        ((10, 256, 256, 3, 1, 1),),
    ),
}
_POOLED = {"vgg16": {1: 2, 2: 2, 3: 2, 4: 2}, "alexnet": {1: 3, 2: 3}}  # slice: window; stride 2

# ImageNet's mean and deviation, for pictures in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)

SMALLEST_SIZE = {"vgg16": 16, "alexnet": 31}


class _Numbered(nnx.Module):
    """Layers under the numbers they have in the published module, which are not consecutive."""

    def __init__(self, layers: dict[int, nnx.Module]):
        self.numbers = tuple(layers)
        for number, layer in layers.items():
            setattr(self, str(number), layer)

    def __call__(self, x: Float[Array, "batch _ _ _"]) -> Float[Array, "batch _ _ _"]:
        for number in self.numbers:
            x = jax.nn.relu(getattr(self, str(number))(x))
        return x


class _Backbone(nnx.Module):
    """The five slices of the classifier's convolutions."""

    def __init__(self, network: str, *, dtype, rngs: nnx.Rngs):
        for index, layers in enumerate(_SLICES[network]):
            convolutions = {
                number: Conv(
                    features_in,
                    features_out,
                    (window, window),
                    strides=stride,
                    padding=padding,
                    dtype=dtype,
                    rngs=rngs,
                )
                for number, features_in, features_out, window, stride, padding in layers
            }
            setattr(self, f"slice{index + 1}", _Numbered(convolutions))


class _Head(nnx.Module):
    """The learned weight of every channel of one layer; a 1x1 convolution without bias."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.model = _Numbered({1: Conv(features, 1, (1, 1), use_bias=False, rngs=rngs)})

    def weights(self) -> Float[Array, " channels"]:
        return getattr(self.model, "1").kernel[...].reshape(-1)


class PerceptualNetwork(nnx.Module):
    """LPIPS on VGG16 or AlexNet features.

    Args:
        network: "vgg16" (14.7 M parameters, pictures of at least 16 px) or "alexnet" (2.5 M, at
            least 31 px).
        dtype: of the convolutions; features are normalised and compared in float32.
    """

    def __init__(
        self, network: Literal["vgg16", "alexnet"] = "vgg16", *, dtype=jnp.float32, rngs: nnx.Rngs
    ):
        if network not in _SLICES:
            raise ValueError(f"network must be one of {', '.join(_SLICES)}, not {network!r}")
        self.network = network
        self.dtype = dtype
        self.net = _Backbone(network, dtype=dtype, rngs=rngs)
        for index, layers in enumerate(_SLICES[network]):
            setattr(self, f"lin{index}", _Head(layers[-1][2], rngs=rngs))

    def features(
        self, x: Float[Array, "batch height width 3"], unit_length: bool = True
    ) -> FeatureMaps:
        """Feature maps of pictures in [-1, 1], each position of unit length over its channels if asked for.

        For VGG16 at 1, 1/2, 1/4, 1/8 and 1/16 of the size with 64, 128, 256, 512, 512 channels.
        Features of a fixed picture can be kept and compared with those of several others.
        """
        smallest = SMALLEST_SIZE[self.network]
        if min(x.shape[1:3]) < smallest:
            raise ValueError(
                f"LPIPS with {self.network} needs pictures of at least {smallest} px, got "
                f"{x.shape[1]}x{x.shape[2]}"
            )
        x = ((x - jnp.asarray(_SHIFT, x.dtype)) / jnp.asarray(_SCALE, x.dtype)).astype(self.dtype)
        maps = []
        for index in range(len(_SLICES[self.network])):
            if index in _POOLED[self.network]:
                x = _max_pool(x, _POOLED[self.network][index])
            x = getattr(self.net, f"slice{index + 1}")(x)
            wide = x.astype(jnp.float32)
            maps.append(_unit_length(wide) if unit_length else wide)
        return maps

    def distance_maps(self, fx: FeatureMaps, fy: FeatureMaps) -> DistanceMaps:
        """How different two pictures are at every position of every layer, from 0."""
        return [
            jnp.sum(jnp.square(a - b) * getattr(self, f"lin{index}").weights(), axis=-1)
            for index, (a, b) in enumerate(zip(fx, fy, strict=True))
        ]

    def distance(
        self,
        fx: FeatureMaps,
        fy: FeatureMaps,
        mask: Float[Array, "batch height width"] | None = None,
        reduction: Reduction = "all_positions",
    ) -> Float[Array, " batch"]:
        """LPIPS of pictures whose features are known; see ``reduce_maps`` for the mask."""
        return reduce_maps(self.distance_maps(fx, fy), mask, reduction)

    def lpips(
        self, x: Float[Array, "batch height width 3"], y: Float[Array, "batch height width 3"]
    ) -> Float[Array, " batch"]:
        """LPIPS between pictures in [-1, 1]; 0 for equal ones."""
        return self.distance(self.features(x), self.features(y))

    def masked_lpips(
        self,
        x: Float[Array, "batch height width 3"],
        y: Float[Array, "batch height width 3"],
        mask: Float[Array, "batch height width"],
        reduction: Reduction = "all_positions",
    ) -> Float[Array, " batch"]:
        """LPIPS where the mask (in [0, 1]) is: L_clpips of ``method.md`` 3.10."""
        return self.distance(self.features(x), self.features(y), mask, reduction)


def reduce_maps(
    maps: DistanceMaps,
    mask: Float[Array, "batch height width"] | None = None,
    reduction: Reduction = "all_positions",
) -> Float[Array, " batch"]:
    """Mean over positions, summed over layers.

    With a mask in [0, 1], resized to every layer by area, the maps are multiplied by it and
    summed, and divided by the number of all positions ("all_positions": small masks give small
    values) or by the mask's own area ("mask_area": 0 where the mask is empty).
    """
    _check_reduction(reduction)
    total = jnp.zeros(maps[0].shape[0], maps[0].dtype)
    for distances in maps:
        total += _mean_where(distances, mask, reduction)
    return total


def feature_norms(
    fx: FeatureMaps,
    fy: FeatureMaps,
    mask: Float[Array, "batch height width"] | None = None,
    reduction: Reduction = "all_positions",
) -> Float[Array, " batch"]:
    """sum_i ||M (.) (f_i(x) - f_i(y))||_2, as the supplement prints both losses (method.md 3.10).

    Features are neither of unit length nor weighted. Of every layer the root of the mean square over positions and
    channels stands for the root of the sum, as the mean does in L1: layers count alike, whatever their size. [ours]
    """
    _check_reduction(reduction)
    total = jnp.zeros(fx[0].shape[0], fx[0].dtype)
    for a, b in zip(fx, fy, strict=True):
        square = _mean_where(jnp.mean(jnp.square(a - b), axis=-1), mask, reduction, power=2)
        # The root has no gradient at 0, where both pictures are equal.
        positive = square > 0
        total += jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)
    return total


def _check_reduction(reduction: str) -> None:
    if reduction not in ("all_positions", "mask_area"):
        raise ValueError(f"reduction must be all_positions or mask_area, not {reduction!r}")


def _mean_where(
    values: Float[Array, "batch h w"],
    mask: Float[Array, "batch height width"] | None,
    reduction: Reduction,
    power: int = 1,
) -> Float[Array, " batch"]:
    """Mean of one layer's values times the mask, at this layer's size, to this power."""
    if mask is None:
        return jnp.mean(values, axis=(1, 2))
    weight = _resize_by_area(mask.astype(values.dtype), values.shape[1:])
    weight = weight if power == 1 else weight**power
    masked = jnp.mean(values * weight, axis=(1, 2))
    if reduction == "mask_area":
        area = jnp.mean(weight, axis=(1, 2))
        masked = jnp.where(area > 0, masked / jnp.where(area > 0, area, 1), 0)
    return masked


def _unit_length(x: Float[Array, "batch h w channels"]) -> Float[Array, "batch h w channels"]:
    # The square root has no gradient at 0, and after a ReLU whole positions can be 0.
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    positive = square > 0
    length = jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)
    return x / (length + 1e-10)


def _max_pool(x: Float[Array, "batch h w channels"], window: int) -> Float[Array, "batch _ _ _"]:
    """Max pooling with stride 2 and no padding (an incomplete last window is dropped).

    As maxima of slices, whose gradient is cheaper on CPUs than that of XLA's own pooling (with
    VGG16 at 64 px a tenth of forward and backward together). Values are the same.
    """
    height, width = ((size - window) // 2 + 1 for size in x.shape[1:3])
    rows = [x[:, i : i + 2 * height - 1 : 2] for i in range(window)]
    x = _maximum(rows)
    return _maximum([x[:, :, i : i + 2 * width - 1 : 2] for i in range(window)])


def _maximum(arrays: list[Array]) -> Array:
    result = arrays[0]
    for array in arrays[1:]:
        result = jnp.maximum(result, array)
    return result


def _resize_by_area(
    mask: Float[Array, "batch height width"], size: tuple[int, int]
) -> Float[Array, "batch h w"]:
    batch, height, width = mask.shape
    h, w = size
    if height % h == 0 and width % w == 0:
        return jnp.mean(mask.reshape(batch, h, height // h, w, width // w), axis=(2, 4))
    return jax.image.resize(mask, (batch, h, w), "linear", antialias=True)
