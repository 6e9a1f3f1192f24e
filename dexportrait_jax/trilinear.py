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
# One array for each of depth, height, width.
Cells = tuple[Int[Array, "sources n"], Int[Array, "sources n"], Int[Array, "sources n"]]
Fractions = tuple[Float[Array, "sources n"], Float[Array, "sources n"], Float[Array, "sources n"]]

_CORNERS = tuple(itertools.product((0, 1), repeat=3))
# More outputs than this on one cell, and the scatter is quicker (measured on a CPU: some 400).
_MOST_ROUNDS = 256


def _read(
    volume: Volume, cells: Cells, fractions: Fractions
) -> Float[Array, "sources n channels"]:
    """Values of float32 volumes between cells; a cell outside of the volume is zero.

    Args:
        volume: what is read; every source by itself.
        cells: the lower neighbours along depth, height and width, from -1 to size - 1.
        fractions: how far from there to the next cell, in [0, 1].
    """
    shape, flat = volume.shape[1:4], _rows(volume)
    weights = _inside(shape, cells, _corner_weights(fractions))
    # Made once, not again for every channel.
    places, weights = lax.optimization_barrier((_corner_places(shape, cells), weights))
    return _mixed(flat, places, weights)


def _forward(volume, cells, fractions):
    return _read(volume, cells, fractions), (volume, cells, fractions)


def _backward(kept, gradient):
    volume, cells, fractions = kept
    shape, flat = volume.shape[1:4], _rows(volume)
    places = lax.optimization_barrier(_corner_places(shape, cells))
    to_fractions = []
    for axis in range(3):
        slopes = _inside(shape, cells, _corner_weights(fractions, slope_of=axis))
        slope = _mixed(flat, places, lax.optimization_barrier(slopes))
        # A product of vectors: XLA's sum over channels takes ten times as long on a CPU.
        to_fractions.append(
            jnp.einsum("snc,snc->sn", gradient, slope, precision=lax.Precision.HIGHEST)
        )
    return _volume_gradient(volume, cells, fractions, gradient), None, tuple(to_fractions)


read_between = jax.custom_vjp(_read)
read_between.defvjp(_forward, _backward)


def _volume_gradient(volume: Volume, cells: Cells, fractions: Fractions, gradient: Array) -> Array:
    """The sum over outputs of weight times gradient, in every cell of the volume."""
    sources, *shape, _ = volume.shape
    counts = tuple(size + 1 for size in shape)  # lower neighbours are -1 ... size - 1
    total = math.prod(counts)

    key = jnp.zeros((), jnp.int32)
    outside = jnp.zeros((), bool)
    for size, cell, fraction in zip(shape, cells, fractions, strict=True):
        key = key * (size + 1) + cell + 1
        # Neither neighbour counts; there may be any number of such outputs.
        outside |= ((cell < 0) & (fraction == 0)) | ((cell == size - 1) & (fraction == 1))
    key = jnp.where(outside, total, key)
    numbers = jnp.broadcast_to(jnp.arange(key.shape[1], dtype=jnp.int32), key.shape)
    key, order = lax.sort_key_val(key, numbers, dimension=1)
    edges = jnp.arange(total + 1, dtype=jnp.int32)
    bounds = jax.vmap(lambda keys: jnp.searchsorted(keys, edges))(key).astype(jnp.int32)
    first, count = bounds[:, :-1], jnp.diff(bounds)
    most = jnp.max(count)

    def in_round(number, so_far):
        reader = _take(order, jnp.minimum(first + number, key.shape[1] - 1))
        weights = _corner_weights(tuple(_take(fraction, reader) for fraction in fractions))
        there = number < count
        parts = []
        for corner, weight in zip(_CORNERS, weights, strict=True):
            # The cell at p is corner c of the lower neighbour p - c.
            window = (slice(None), *(slice(1 - c, 1 - c + n) for c, n in zip(corner, shape)))
            grids = (reader, jnp.where(there, weight, 0))
            parts.append([grid.reshape(sources, *counts)[window] for grid in grids])
        readers, weights = lax.optimization_barrier(tuple(zip(*parts, strict=True)))
        flat = [grid.reshape(sources, -1) for grid in (*readers, *weights)]
        return so_far + _mixed(gradient, flat[:8], flat[8:]).reshape(volume.shape)

    def by_rounds():
        return lax.fori_loop(0, most, in_round, jnp.zeros(volume.shape, jnp.float32))

    def by_scatter():
        transposed = jax.linear_transpose(lambda volume: _read(volume, cells, fractions), volume)
        return transposed(gradient)[0]

    return lax.cond(most <= _MOST_ROUNDS, by_rounds, by_scatter)


def _rows(volume: Volume) -> Float[Array, "sources cells channels"]:
    return volume.reshape(volume.shape[0], -1, volume.shape[-1])


def _take(table: Array, index: Int[Array, "sources n"]) -> Array:
    """Each source's own rows, so that a batch split over devices reads nothing from the others."""
    return jax.vmap(lambda rows, at: rows.at[at].get(mode="promise_in_bounds"))(table, index)


def _mixed(table: Array, places: list, weights: list) -> Float[Array, "sources n channels"]:
    """The weighted sum of eight rows of the table for each output."""
    return sum(w[..., None] * _take(table, at) for at, w in zip(places, weights, strict=True))


def _corner_weights(
    fractions: Fractions, slope_of: int | None = None
) -> list[Float[Array, "sources n"]]:
    """The share of each of the eight neighbours, or its slope along an axis."""
    weights = []
    for corner in _CORNERS:
        factors = [
            (2 * upper - 1) if axis == slope_of else (fraction if upper else 1 - fraction)
            for axis, (upper, fraction) in enumerate(zip(corner, fractions, strict=True))
        ]
        weights.append(math.prod(factors))
    return weights


def _inside(shape: tuple[int, ...], cells: Cells, weights: list) -> list[Array]:
    """The weights, zero for neighbours that are not in the volume."""
    kept = []
    for corner, weight in zip(_CORNERS, weights, strict=True):
        for upper, cell, size in zip(corner, cells, shape, strict=True):
            there = cell < size - 1 if upper else cell >= 0
            weight = jnp.where(there, weight, 0)
        kept.append(weight)
    return kept


def _corner_places(shape: tuple[int, ...], cells: Cells) -> list[Int[Array, "sources n"]]:
    """The rows of the eight neighbours; any row inside for one that is not in the volume."""
    places = []
    for corner in _CORNERS:
        place = jnp.zeros((), jnp.int32)
        for upper, cell, size in zip(corner, cells, shape, strict=True):
            place = place * size + jnp.clip(cell + upper, 0, size - 1)
        places.append(place)
    return places
