"""How close two pictures are: PSNR, SSIM, LPIPS; one number per picture.

Pictures are (batch, height, width, channels), uint8 or float; ``data_range`` is the distance
between the smallest and the largest possible value (255 for uint8, 2 for [-1, 1], 1 for [0, 1]) and
is always stated.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, UInt8

from dexportrait_jax.errors import UserError
from dexportrait_jax.models.perceptual import SMALLEST_SIZE, PerceptualNetwork
from dexportrait_jax.state import Network
from dexportrait_jax.weights.lpips import load_lpips

LARGEST_PSNR = 100.0  # dB; equal pictures get this instead of infinity

_WINDOW, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03

Pictures = Num[Array, "batch height width channels"]


@functools.partial(jax.jit, static_argnames="data_range")
def psnr(x: Pictures, y: Pictures, *, data_range: float) -> Float[Array, " batch"]:
    """Peak signal-to-noise ratio in dB over all positions and channels, at most 100.

    The limit keeps means and JSON finite where pictures are equal.
    """
    _check_shapes(x, y)
    difference = (x.astype(jnp.float32) - y.astype(jnp.float32)) / data_range
    error = jnp.mean(jnp.square(difference), axis=(1, 2, 3))
    return -10 * jnp.log10(jnp.maximum(error, 10 ** (-LARGEST_PSNR / 10)))


def masked_psnr(
    x: Num[np.ndarray, "batch height width channels"],
    y: Num[np.ndarray, "batch height width channels"],
    masks: UInt8[np.ndarray, "batch height width"],
) -> Float[np.ndarray, " batch"]:
    """PSNR of pictures in [0, 255], in dB over the positions where the mask is not 0, at most 100."""
    inside = (masks > 0)[..., None]
    error = np.square((x.astype(np.float64) - y) / 255) * inside
    count = np.maximum(inside.sum((1, 2, 3)) * x.shape[-1], 1)
    return -10 * np.log10(np.maximum(error.sum((1, 2, 3)) / count, 10 ** (-LARGEST_PSNR / 10)))


@functools.partial(jax.jit, static_argnames="data_range")
def ssim(x: Pictures, y: Pictures, *, data_range: float) -> Float[Array, " batch"]:
    """Structural similarity (Wang et al. 2004), at most 1, for pictures of at least 11 px.

    11x11 gaussian window of deviation 1.5, K1 = 0.01, K2 = 0.03, population variances, windows that
    lie wholly inside the picture, mean over windows and channels (scikit-image's
    ``structural_similarity`` with ``gaussian_weights=True, use_sample_covariance=False``).
    """
    _check_shapes(x, y)
    if min(x.shape[1:3]) < _WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {_WINDOW} px, got {x.shape[1:3]}")
    x, y = (value.astype(jnp.float32) / data_range for value in (x, y))
    # Variances do not change with an offset, and lose fewer digits near 0: each picture's own mean
    # is taken away and put back where the means themselves count.
    centre = jnp.mean((x + y) / 2, axis=(1, 2), keepdims=True)
    x, y = x - centre, y - centre
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x**2
    variance_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    mean_x, mean_y = mean_x + centre, mean_y + centre
    c1, c2 = _K1**2, _K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))


class LearnedDistance:
    """LPIPS 0.1 as a metric; the weights are loaded once, when it is made.

    Args:
        network: "alexnet", the usual metric, or "vgg16", what the training loss uses.
    """

    def __init__(self, network: Literal["alexnet", "vgg16"] = "alexnet"):
        self.network = network
        self._params = load_lpips(network)
        perceptual = Network(lambda rngs: PerceptualNetwork(network, rngs=rngs))
        self._lpips = jax.jit(lambda params, x, y: perceptual.bind(params).lpips(x, y))

    def __call__(self, x: Pictures, y: Pictures, *, data_range: float) -> np.ndarray:
        """LPIPS per picture, (batch,) float32; 0 for equal ones.

        Floats of range 2 are taken as [-1, 1], everything else as starting at 0. Raises UserError
        for pictures the network is too deep for.
        """
        _check_shapes(x, y)
        smallest = SMALLEST_SIZE[self.network]
        if min(x.shape[1:3]) < smallest:
            raise UserError(
                f"LPIPS with {self.network} needs pictures of at least {smallest} px, got "
                f"{x.shape[1]}x{x.shape[2]}; evaluate at a larger image size"
            )
        x, y = (_signed(np.asarray(value), data_range) for value in (x, y))
        return np.asarray(self._lpips(self._params, x, y))


def _signed(x: np.ndarray, data_range: float) -> np.ndarray:
    x = x.astype(np.float32)
    return x if data_range == 2 else x * np.float32(2 / data_range) - 1


def _blur(x: Float[Array, "b h w c"]) -> Float[Array, "b _ _ c"]:
    """Gaussian means over the windows that lie inside the picture, one axis after the other."""
    offsets = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights = (weights / weights.sum()).astype(np.float32)
    height, width = (size - _WINDOW + 1 for size in x.shape[1:3])
    x = sum(weight * x[:, i : i + height] for i, weight in enumerate(weights))
    return sum(weight * x[:, :, i : i + width] for i, weight in enumerate(weights))


def _check_shapes(x: Pictures, y: Pictures) -> None:
    if x.shape != y.shape or x.ndim != 4:
        raise ValueError(
            f"pictures must be (batch, height, width, channels) of one shape, got {x.shape} and "
            f"{y.shape}"
        )
