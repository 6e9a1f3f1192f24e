"""3 x 3 convolution by Winograd's minimal filtering, for CPUs.

Four outputs take 16 products instead of 36 (Lavin and Gray, arXiv 1509.09308, F(2 x 2, 3 x 3)), and all that is left
is products of matrices, which XLA does well on a CPU, also in the gradient. Beside XLA's own convolution, 320 features
on 64 x 64 took .6 of the time forward and .4 with gradients on two cores. In float32 it is as exact as that one: 2e-6
of the largest value. F(4 x 4, 3 x 3) would be ten times less exact and was no faster, as its products are small.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Pads = tuple[tuple[int, int], tuple[int, int]]

_SIDE = 2  # outputs of a tile, along each side
_PLACES = 16  # inputs that a tile's outputs come from, 4 along each side

# Along one side: outputs = _OUT @ ((_KERNEL @ kernel) * (_IN @ inputs)).
_IN = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], np.float32)
_KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)
_OUT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]], np.float32)

# The same along both sides at once is one matrix on all places of a tile.
_WEIGH, _WRITE = np.kron(_KERNEL, _KERNEL), np.kron(_OUT, _OUT)
# Its columns in the order of `_reads`: (block down, in it, block across, in it) -> (down, across, in it, in it).
_READ = np.kron(_IN, _IN).reshape(-1, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(_PLACES, -1)

# From which it is faster than XLA's: single convolutions with their gradients from 32 features on, but in the middle of
# a training step, where what lies between products must come from memory, only from twice as many.
FEATURES = 64  # of input and output
POSITIONS = 64  # of a picture's output; on smaller ones the kernels are most of the work
MOST_BYTES = 2**28  # of a tile's reads, kept for all tiles at once; four times the inputs


def suits(inputs: Array, kernel: Array, strides: tuple[int, ...], pads: Pads) -> bool:
    """Whether a convolution is one that ``winograd`` makes, and makes faster than XLA on a CPU."""
    sizes = _output_sizes(inputs, pads)
    return (
        kernel.shape[:-2] == (3, 3)
        and set(strides) == {1}
        and inputs.dtype == kernel.dtype == jnp.float32
        and min(kernel.shape[-2:]) >= FEATURES
        and min(sizes) >= 1
        and sizes[0] * sizes[1] >= POSITIONS
        and inputs.nbytes * _PLACES // _SIDE**2 <= MOST_BYTES
    )


def _output_sizes(inputs: Array, pads: Pads) -> list[int]:
    return [n + sum(pad) - 2 for n, pad in zip(inputs.shape[1:3], pads, strict=True)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def winograd(
    inputs: Float[Array, "batch height width features_in"],
    kernel: Float[Array, "3 3 features_in features_out"],
    pads: Pads,
) -> Float[Array, "batch height_out width_out features_out"]:
    """Cross-correlation with stride 1 and zeros beyond the edges, as ``lax.conv_general_dilated``.

    The backward pass makes the tiles again from the inputs: kept, they would be four times as large.
    """
    return _by_tiles(inputs, kernel, pads)


def _forward(inputs: Array, kernel: Array, pads: Pads) -> tuple[Array, tuple[Array, Array]]:
    return _by_tiles(inputs, kernel, pads), (inputs, kernel)


def _backward(pads: Pads, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    return jax.vjp(functools.partial(_by_tiles, pads=pads), *saved)[1](gradient)


winograd.defvjp(_forward, _backward)


def _by_tiles(inputs: Array, kernel: Array, pads: Pads) -> Array:
    sizes = _output_sizes(inputs, pads)
    rows, columns = tiles = [-(-size // _SIDE) for size in sizes]
    features_in, features_out = kernel.shape[2:]
    # Flat, as XLA would otherwise choose layouts for the products in between, and copy into them.
    reads = _READ @ _reads(inputs, tiles, pads).reshape(_PLACES, -1)
    weights = _WEIGH @ kernel.reshape(9, -1)
    products = reads.reshape(_PLACES, -1, features_in) @ weights.reshape(
        _PLACES, features_in, features_out
    )
    outputs = _WRITE @ products.reshape(_PLACES, -1)
    outputs = outputs.reshape(_SIDE, _SIDE, -1, rows, columns, features_out)
    outputs = outputs.transpose(2, 3, 0, 4, 1, 5)
    outputs = outputs.reshape(-1, rows * _SIDE, columns * _SIDE, features_out)
    return outputs[:, : sizes[0], : sizes[1]]


def _reads(inputs: Array, tiles: list[int], pads: Pads) -> Array:
    """What the tiles read: (4, 2, 2, batch, tiles down, tiles across, features).

    A tile reads a square of 2 x 2 blocks of 2 x 2 inputs: first which block, then where in it.
    """
    blocks = [count + 1 for count in tiles]
    reach = (
        (low, count * _SIDE - n - low)
        for n, (low, _), count in zip(inputs.shape[1:3], pads, blocks, strict=True)
    )
    padded = jnp.pad(inputs, ((0, 0), *reach, (0, 0)))
    padded = padded.reshape(-1, blocks[0], _SIDE, blocks[1], _SIDE, inputs.shape[-1])
    padded = padded.transpose(2, 4, 0, 1, 3, 5)
    rows, columns = tiles
    return jnp.stack(
        [padded[:, :, :, i : i + rows, j : j + columns] for i in range(2) for j in range(2)]
    )
