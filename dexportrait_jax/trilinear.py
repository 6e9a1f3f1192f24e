"""Trilinear reading of volumes at any positions, and its gradient without a scatter.

The value mixes the eight cells round a position: eight gathers of whole rows of channels. The
gradient to the volume would add each output to eight cells, a scatter, which is a slow loop on a
CPU and adds in no fixed order on a GPU. Here it is gathered as well: outputs are sorted by the cell
they read from, and in round k every cell fetches the k-th of the outputs that read it. Under rigid
motion few outputs share a cell, so the rounds are few; where very many do (a border that fills half
a volume) the scatter is taken after all.

Written for ``geometry.warp_volume``; reverse-mode differentiable, once.
"""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

Volume = Float[Array, "sources depth height width channels"]
# One array along each of depth, height and width.
Cells = tuple[Int[Array, "sources *outputs"], ...]
Fractions = tuple[Float[Array, "sources *outputs"], ...]
Pair = tuple[Float[Array, "sources *outputs"], Float[Array, "sources *outputs"]]

_CORNERS = tuple(itertools.product((0, 1), repeat=3))
# More outputs than this on one cell, and the scatter is quicker (measured on a CPU: some 400).
_MOST_ROUNDS = 256


def _read(
    volume: Volume, cells: Cells, fractions: Fractions
) -> Float[Array, "sources *outputs channels"]:
    """Values of float32 volumes between cells; a cell outside of the volume is zero.

    Args:
        volume: what is read; every source by itself.
        cells: the lower neighbours along depth, height and width; any number.
        fractions: how far from there to the next cell, in [0, 1].
    """
    shape = volume.shape[1:4]
    weights = _products(_inside(shape, cells, [(1 - f, f) for f in fractions]))
    return _mixed(volume, _places(shape, cells), weights)


def _forward(volume, cells, fractions):
    return _read(volume, cells, fractions), (volume, cells, fractions)


def _backward(kept, gradient):
    volume, cells, fractions = kept
    whole = fractions[0].shape
    gradient = gradient.reshape(volume.shape[0], -1, volume.shape[-1])
    cells, fractions = ([x.reshape(len(x), -1) for x in three] for three in (cells, fractions))
    shape = volume.shape[1:4]
    shares = _inside(shape, cells, [(1 - f, f) for f in fractions])
    rises = _inside(shape, cells, [(-jnp.ones_like(f), jnp.ones_like(f)) for f in fractions])

    # The three axes as three times the outputs, and a product with ones for the sum over channels:
    # what XLA makes of three readings of the same rows, or of the sum, takes ten times as long on a CPU.
    sources, outputs, channels = gradient.shape
    axis = jnp.arange(3)[None, :, None]
    slopes = _products(
        [
            tuple(jnp.where(axis == n, r[:, None], s[:, None]) for s, r in zip(*pair, strict=True))
            for n, pair in enumerate(zip(shares, rises, strict=True))
        ]
    )
    thrice = [jnp.tile(cell, (1, 3)) for cell in cells]
    slopes = [weight.reshape(sources, -1) for weight in slopes]
    slope = _mixed(volume, _places(shape, thrice), slopes)
    slope = slope.reshape(sources, 3, outputs, channels)
    along = jnp.matmul(
        gradient[:, None] * slope, jnp.ones(channels), precision=lax.Precision.HIGHEST
    )
    to_volume = _volume_gradient(volume, cells, fractions, gradient)
    return to_volume, None, tuple(along[:, n].reshape(whole) for n in range(3))


read_between = jax.custom_vjp(_read)
read_between.defvjp(_forward, _backward)


def _volume_gradient(volume: Volume, cells: Cells, fractions: Fractions, gradient: Array) -> Array:
    """The sum over outputs of weight times gradient, in every cell of the volume."""
    sources, *shape, _ = volume.shape
    counts = tuple(size + 1 for size in shape)  # lower neighbours that count are -1 ... size - 1
    total = math.prod(counts)

    key = jnp.zeros((), jnp.int32)
    outside = jnp.zeros((), bool)
    for size, cell in zip(shape, cells, strict=True):
        key = key * (size + 1) + cell + 1
        # Neither neighbour counts; there may be any number of such outputs.
        outside |= (cell < -1) | (cell >= size)
    key = jnp.where(outside, total, key)
    numbers = jnp.broadcast_to(jnp.arange(key.shape[1], dtype=jnp.int32), key.shape)
    key, order = lax.sort_key_val(key, numbers, dimension=1)
    edges = jnp.arange(total + 1, dtype=jnp.int32)
    bounds = jax.vmap(lambda keys: jnp.searchsorted(keys, edges))(key).astype(jnp.int32)
    first, count = bounds[:, :-1], jnp.diff(bounds)
    most = jnp.max(count)

    def in_round(number, so_far):
        reader = _take(order, (jnp.minimum(first + number, key.shape[1] - 1),))
        near = [_take(fraction, (reader,)) for fraction in fractions]
        weights = _products([(1 - f, f) for f in near])
        there = number < count
        parts = []
        for corner, weight in zip(_CORNERS, weights, strict=True):
            # The cell at p is corner c of the lower neighbour p - c.
            window = tuple(slice(1 - c, 1 - c + n) for c, n in zip(corner, shape, strict=True))
            grids = (reader, jnp.where(there, weight, 0))
            parts.append([grid.reshape(sources, *counts)[:, *window] for grid in grids])
        readers, weights = lax.optimization_barrier(tuple(zip(*parts, strict=True)))
        readers = [(grid.reshape(sources, -1),) for grid in readers]
        weights = [grid.reshape(sources, -1) for grid in weights]
        return so_far + _mixed(gradient, readers, weights).reshape(volume.shape)

    def by_rounds():
        return lax.fori_loop(0, most, in_round, jnp.zeros(volume.shape, jnp.float32))

    def by_scatter():
        transposed = jax.linear_transpose(lambda volume: _read(volume, cells, fractions), volume)
        return transposed(gradient)[0]

    return lax.cond(most <= _MOST_ROUNDS, by_rounds, by_scatter)


def _take(table: Array, place: Cells) -> Array:
    """Each source's own rows, so that a batch split over devices reads nothing from the others."""
    return jax.vmap(lambda rows, at: rows.at[at].get(mode="promise_in_bounds"))(table, place)


def _mixed(table: Array, places: list, weights: list) -> Float[Array, "sources *outputs channels"]:
    """The weighted sum of eight rows of the table for each output."""
    return sum(w[..., None] * _take(table, at) for at, w in zip(places, weights, strict=True))


def _inside(shape: tuple[int, ...], cells: Cells, pairs: list[Pair]) -> list[Pair]:
    """What belongs to the lower and the upper neighbour along each axis, or zero where there is none."""
    return [
        (
            jnp.where((cell >= 0) & (cell < size), lower, 0),
            jnp.where((cell >= -1) & (cell < size - 1), upper, 0),
        )
        for size, cell, (lower, upper) in zip(shape, cells, pairs, strict=True)
    ]


def _products(pairs: list[Pair]) -> list[Array]:
    """For each of the eight neighbours the product of what belongs to it along the three axes."""
    return [a[i] * b[j] * c[k] for a, b, c in [pairs] for i, j, k in _CORNERS]


def _places(shape: tuple[int, ...], cells: Cells) -> list[Cells]:
    """The eight neighbours; any cell of the volume for one that is outside."""
    z, y, x = (
        (jnp.clip(cell, 0, size - 1), jnp.clip(cell + 1, 0, size - 1))
        for size, cell in zip(shape, cells, strict=True)
    )
    return [(z[i], y[j], x[k]) for i, j, k in _CORNERS]
