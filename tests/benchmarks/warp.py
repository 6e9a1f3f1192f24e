"""The rigid warp of a volume beside `jax.scipy.ndimage.map_coordinates`, in one run.

    python -m tests.benchmarks warp [--shapes=small,paper] [--batches=1,2] [--seconds=2]

Both read the same volume at the same coordinates, with zero outside. Three programs each: forward;
forward and backward to the volume and the coordinates; and, from the poses to the warped volume and
back, what training does. Values and gradients are compared before anything is timed. Programs take
turns, so that whatever else the machine does falls on both alike; the figure is the median of the
turns. A ratio below 1 says that ours is faster.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float

from dexportrait_jax import geometry

# (depth, height, width, channels); "paper" is method.md 3.1, "small" the tiny config.
SHAPES = {"small": (4, 32, 32, 8), "paper": (16, 64, 64, 32)}
TOLERANCE = 1e-4  # of the largest value


def warp_by_map_coordinates(
    volume: Float[Array, "batch depth height width channels"],
    coordinates: Float[Array, "batch out_depth out_height out_width 3"],
) -> Float[Array, "batch out_depth out_height out_width channels"]:
    """`geometry.warp_volume` with padding "zeros", by the function that comes with JAX.

    Mapped over channels and batch; a position outside of the volume mixes with zero cell by cell,
    as ours does.
    """
    sizes = jnp.array(volume.shape[1:4])
    cells = (jnp.flip(coordinates, -1) + 1) * (sizes - 1) / 2

    def channel(volume, cells):
        return map_coordinates(volume, list(cells), order=1, mode="constant", cval=0.0)

    channels = jax.vmap(channel, in_axes=(-1, None), out_axes=-1)
    return jax.vmap(channels)(volume, jnp.moveaxis(cells, -1, 1))


def random_case(
    shape: tuple[int, int, int, int], batch: int, seed: int = 0
) -> tuple[Array, Array, Array, Array]:
    """A volume (batch, *shape), two poses (batch, 3, 4) some 20 degrees apart, and weights like the volume.

    The weights, with which the warped volume is summed to a loss, are zero for the few outputs that read
    within 1e-3 of a cell: the slope jumps there, and rounding decides which side is taken.
    """
    keys = jax.random.split(jax.random.key(seed), 5)
    volume = jax.random.normal(keys[0], (batch, *shape))
    weights = jax.random.normal(keys[1], (batch, *shape))

    def pose(key: Array, angle: float) -> Array:
        angles = jax.random.uniform(key, (3, batch), minval=-angle, maxval=angle)
        shift = jax.random.uniform(key, (batch, 3), minval=-0.1, maxval=0.1).at[:, 2].set(0)
        scale = jax.random.uniform(key, (batch,), minval=0.9, maxval=1.1)
        return geometry.pose_matrix(geometry.euler_to_rotation(*angles), shift, scale)

    source, driving = pose(keys[2], 15.0), pose(keys[3], 15.0)
    coordinates = geometry.source_coordinates(source, driving, shape[:3])
    cells = (jnp.flip(coordinates, -1) + 1) * (jnp.array(shape[:3]) - 1) / 2
    between = jnp.all(jnp.abs(cells - jnp.round(cells)) > 1e-3, axis=-1, keepdims=True)
    return volume, source, driving, weights * between


def programs(warp_volume: Callable) -> dict[str, Callable]:
    """The timed programs of one implementation, each a function of (volume, source, driving, weights)."""

    def coordinates_of(source, driving, shape):
        return geometry.source_coordinates(source, driving, shape[1:4])

    def forward(volume, source, driving, weights):
        del weights
        return warp_volume(volume, coordinates_of(source, driving, volume.shape))

    def to_coordinates(volume, source, driving, weights):
        warped, back = jax.vjp(warp_volume, volume, coordinates_of(source, driving, volume.shape))
        return warped, back(weights)

    def to_poses(volume, source, driving, weights):
        def moved(volume, source, driving):
            return warp_volume(volume, coordinates_of(source, driving, volume.shape))

        warped, back = jax.vjp(moved, volume, source, driving)
        return warped, back(weights)

    return {
        "forward": forward,
        "forward + backward to coordinates": to_coordinates,
        "forward + backward to poses": to_poses,
    }


def largest_difference(ours, theirs) -> float:
    """Of all arrays of two results, the largest difference over the largest value of the array."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)


def measure(
    functions: dict[str, Callable], arguments: Sequence, seconds: float
) -> dict[str, float]:
    """Median seconds of a call of each function; they take turns for about `seconds` each."""
    taken = {name: [] for name in functions}
    end = time.perf_counter() + seconds * len(functions)
    while time.perf_counter() < end or min(map(len, taken.values())) < 3:
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def main(arguments: Sequence[str]) -> None:
    """Prints a line for each shape, batch and program; ends with an error where results differ."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks warp", description=__doc__)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--batches", default="1,2")
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args(arguments)
    ours, theirs = programs(geometry.warp_volume), programs(warp_by_map_coordinates)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {len(jax.devices())} device(s)")
    print(
        f"{'shape':>22}  {'program':<34} {'ours':>9} {'map_coord.':>10} {'ratio':>6} {'differ by':>9}"
    )
    for name in options.shapes.split(","):
        for batch in map(int, options.batches.split(",")):
            case = random_case(SHAPES[name], batch)
            for program in ours:
                pair = {"ours": jax.jit(ours[program]), "theirs": jax.jit(theirs[program])}
                results = {who: function(*case) for who, function in pair.items()}
                difference = largest_difference(results["ours"], results["theirs"])
                del results
                if not np.isfinite(difference) or difference > TOLERANCE:
                    raise SystemExit(f"{name}, {program}: results differ by {difference:.1e}")
                taken = measure(pair, case, options.seconds)
                ratio = taken["ours"] / taken["theirs"]
                shape = "x".join(map(str, (batch, *SHAPES[name])))
                print(
                    f"{shape:>22}  {program:<34} {1e3 * taken['ours']:>6.1f} ms {1e3 * taken['theirs']:>7.1f} ms "
                    f"{ratio:>6.2f} {difference:>9.0e}",
                    flush=True,
                )
