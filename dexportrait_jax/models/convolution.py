"""Convolution as a function, and what it takes to make it fast on a CPU.

XLA has one good convolution on every accelerator. On CPUs it is good at plain 2D convolutions of few
features but slow at 3D, depthwise and strided ones and at their gradients, so there the same sums are
written as matrix products. The rule is in ``convolve``; ``convolution_backend`` overrides it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from dexportrait_jax.models.winograd import suits, winograd
from dexportrait_jax.platforms import target_platform

Pads = tuple[tuple[int, int], ...]

_BACKENDS = ("auto", "xla", "matmul")
# Part of the key under which JAX keeps what it traced: another choice traces again.
_backend = jax.make_user_context("auto")

_TOEPLITZ_POSITIONS = 256  # depthwise as a dense matrix per channel up to 16 x 16 positions


@contextlib.contextmanager
def convolution_backend(backend: str) -> Iterator[None]:
    """Choose how convolutions traced inside the ``with`` block are written.

    "xla": one convolution instruction, always. "matmul": the CPU rule, on any platform. "auto" (the
    default outside any block): the CPU rule where the program is made for a CPU, else "xla".
    A jitted function called under another choice is traced and compiled again.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"convolution backend {backend!r} is none of {', '.join(_BACKENDS)}")
    with _backend(backend):
        yield


def convolve(
    inputs: Float[Array, "batch *space features_in"],
    kernel: Float[Array, "*window features_in_group features_out"],
    strides: Sequence[int],
    pads: Pads,
    groups: int = 1,
) -> Float[Array, "batch *space_out features_out"]:
    """Cross-correlation, channels last, zero padding ``pads`` = ((low, high), ...) per dimension.

    On a CPU the same numbers come from, in this order (measured at 4..64 px, 8..128 channels):

    - window of 1: one matrix product;
    - window equal to the stride: patches by reshape, one product;
    - 3D: the taps along depth stacked on channels, then 2D;
    - 3 x 3 in float32 with many features: Winograd's tiles;
    - 2D with an even window: XLA's, but the kernel's gradient tap by tap (XLA's own was measured
      thirty times slower);
    - depthwise: a banded matrix per channel up to 16 x 16 positions, else shifted multiply-adds;
    - anything else: XLA's.
    """
    strides, window = tuple(strides), kernel.shape[:-2]
    backend = _backend.value
    if backend == "xla" or (backend == "auto" and target_platform() != "cpu"):
        return _plain(inputs, kernel, strides, pads, groups)
    positions = _output_shape(inputs.shape[1:-1], window, strides, pads)
    if groups == 1:
        if window == (1,) * len(window) and not any(map(sum, pads)):
            starts = tuple(slice(None, None, stride) for stride in strides)
            return inputs[(slice(None), *starts)] @ kernel.reshape(kernel.shape[-2:])
        if window == strides and not any(map(sum, pads)):
            return _by_blocks(inputs, kernel, positions)
        if len(window) == 3:
            return _by_depth(inputs, kernel, strides, pads)
        if suits(inputs, kernel, strides, pads):
            return winograd(inputs, kernel, pads)
        if len(window) == 2 and max(strides) == 1 and any(n % 2 == 0 for n in window):
            return _with_tapwise_gradient(inputs, kernel, pads)
    elif groups == inputs.shape[-1] == kernel.shape[-1] and len(window) == 2 and max(strides) == 1:
        if np.prod(positions) <= _TOEPLITZ_POSITIONS:
            return _depthwise_dense(inputs, kernel, pads, positions)
        return _depthwise_shifted(inputs, kernel, pads)
    return _plain(inputs, kernel, strides, pads, groups)


def _plain(
    inputs: Array, kernel: Array, strides: tuple[int, ...], pads: Pads, groups: int = 1
) -> Array:
    space = "DHW"[3 - len(strides) :]
    layout = (f"N{space}C", f"{space}IO", f"N{space}C")
    return lax.conv_general_dilated(
        inputs, kernel, strides, pads, dimension_numbers=layout, feature_group_count=groups
    )


def _output_shape(
    space: Sequence[int], window: Sequence[int], strides: Sequence[int], pads: Pads
) -> tuple:
    sizes = zip(space, window, strides, pads, strict=True)
    return tuple((n + low + high - k) // stride + 1 for n, k, stride, (low, high) in sizes)


def _shifted(
    inputs: Array, window: tuple[int, ...], strides: tuple[int, ...], pads: Pads
) -> Iterator[tuple[tuple[int, ...], Array]]:
    """For each tap of the window, the values it meets: (tap, (B, *positions, C))."""
    positions = _output_shape(inputs.shape[1:-1], window, strides, pads)
    padded = jnp.pad(inputs, ((0, 0), *pads, (0, 0)))
    for tap in itertools.product(*map(range, window)):
        stop = (a + (n - 1) * s + 1 for a, n, s in zip(tap, positions, strides, strict=True))
        yield (
            tap,
            lax.slice(
                padded, (0, *tap, 0), (inputs.shape[0], *stop, inputs.shape[-1]), (1, *strides, 1)
            ),
        )


def _by_blocks(inputs: Array, kernel: Array, positions: tuple[int, ...]) -> Array:
    window, rank = kernel.shape[:-2], len(positions)
    whole = tuple(slice(n * k) for n, k in zip(positions, window, strict=True))
    split = itertools.chain.from_iterable(zip(positions, window, strict=True))
    blocks = inputs[(slice(None), *whole)].reshape(inputs.shape[0], *split, inputs.shape[-1])
    order = (0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1)
    blocks = blocks.transpose(order).reshape(inputs.shape[0], *positions, -1)
    return blocks @ kernel.reshape(-1, kernel.shape[-1])


def _by_depth(inputs: Array, kernel: Array, strides: tuple[int, ...], pads: Pads) -> Array:
    taps = kernel.shape[0]
    column = _shifted(inputs, (taps, 1, 1), (strides[0], 1, 1), (pads[0], (0, 0), (0, 0)))
    stacked = jnp.concatenate([values for _, values in column], axis=-1)
    batch, depth = stacked.shape[:2]
    flat_kernel = jnp.moveaxis(kernel, 0, 2).reshape(*kernel.shape[1:3], -1, kernel.shape[-1])
    output = convolve(stacked.reshape(-1, *stacked.shape[2:]), flat_kernel, strides[1:], pads[1:])
    return output.reshape(batch, depth, *output.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _with_tapwise_gradient(inputs: Array, kernel: Array, pads: Pads) -> Array:
    return _plain(inputs, kernel, (1, 1), pads)


def _tapwise_forward(inputs: Array, kernel: Array, pads: Pads) -> tuple[Array, tuple[Array, Array]]:
    return _plain(inputs, kernel, (1, 1), pads), (inputs, kernel)


def _tapwise_backward(
    pads: Pads, saved: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    inputs, kernel = saved
    window = kernel.shape[:-2]
    flat = gradient.reshape(-1, gradient.shape[-1])
    taps = [
        values.reshape(-1, inputs.shape[-1]).T @ flat
        for _, values in _shifted(inputs, window, (1, 1), pads)
    ]
    mirrored = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    back = _plain(gradient, mirrored, (1, 1), _mirrored_pads(window, pads))
    return back, jnp.stack(taps).reshape(kernel.shape)


_with_tapwise_gradient.defvjp(_tapwise_forward, _tapwise_backward)


def _mirrored_pads(window: tuple[int, ...], pads: Pads) -> Pads:
    return tuple((k - 1 - low, k - 1 - high) for k, (low, high) in zip(window, pads, strict=True))


def _depthwise_dense(inputs: Array, kernel: Array, pads: Pads, positions: tuple[int, ...]) -> Array:
    """A banded (positions in, positions out) matrix per channel: more sums, but one product."""
    bands = []
    for n, out, k, (low, _) in zip(
        inputs.shape[1:3], positions, kernel.shape[:2], pads, strict=True
    ):
        tap = np.arange(n)[:, None] - np.arange(out)[None] + low
        bands.append(np.where((tap >= 0) & (tap < k), tap, k))
    rows, columns = bands
    # One more row and column of zeros stand for every tap outside the window.
    taps = jnp.pad(kernel[:, :, 0], ((0, 1), (0, 1), (0, 0)))
    matrix = taps[rows[:, None, :, None], columns[None, :, None, :]]
    batch, channels = inputs.shape[0], inputs.shape[-1]
    matrix = matrix.reshape(np.prod(inputs.shape[1:3]), np.prod(positions), channels)
    output = jnp.einsum("bpc,pqc->bqc", inputs.reshape(batch, -1, channels), matrix)
    return output.reshape(batch, *positions, channels)


def _depthwise_sum(inputs: Array, kernel: Array, pads: Pads) -> Array:
    taps = _shifted(inputs, kernel.shape[:2], (1, 1), pads)
    return functools.reduce(jnp.add, (values * kernel[tap][0] for tap, values in taps))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise_shifted(inputs: Array, kernel: Array, pads: Pads) -> Array:
    return _depthwise_sum(inputs, kernel, pads)


def _depthwise_forward(
    inputs: Array, kernel: Array, pads: Pads
) -> tuple[Array, tuple[Array, Array]]:
    return _depthwise_sum(inputs, kernel, pads), (inputs, kernel)


def _depthwise_backward(
    pads: Pads, saved: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    inputs, kernel = saved
    window = kernel.shape[:2]
    back = _depthwise_sum(gradient, jnp.flip(kernel, (0, 1)), _mirrored_pads(window, pads))
    taps = [
        jnp.einsum("bhwc,bhwc->c", values, gradient)
        for _, values in _shifted(inputs, window, (1, 1), pads)
    ]
    return back, jnp.stack(taps).reshape(kernel.shape)


_depthwise_shifted.defvjp(_depthwise_forward, _depthwise_backward)
