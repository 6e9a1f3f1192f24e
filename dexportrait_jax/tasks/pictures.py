"""Batches as the networks see them, and the sample pictures that a run writes while it trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, UInt8

from data_pipelines import loading
from dexportrait_jax import distributed
from dexportrait_jax.evaluation.report import write_png
from dexportrait_jax.platforms import target_platform

# Pictures of an evaluation while training runs. Every device makes all of them, beside the State: as many as the batch
# has would be more than a chip holds.
SHOWN = 16


def to_float(image: UInt8[Array, ...]) -> Float[Array, ...]:
    """uint8 0..255 -> float32 -1..1."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(image: Float[Array, ...]) -> UInt8[np.ndarray, ...]:
    """float -1..1 -> uint8, rounded and clipped, on the host."""
    return np.clip(np.rint((np.asarray(image, np.float32) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def flatten_targets(array: Array) -> Array:
    """(S, N, ...) -> (S*N, ...), source-major."""
    return array.reshape(-1, *array.shape[2:])


def encode_poses(
    encoder: Any, batch: dict[str, Array]
) -> tuple[Float[Array, "s 3 4"], Float[Array, "s*n 3 4"]]:
    """Poses of a batch's sources, and of their targets, by a bound pose encoder.

    One after the other: side by side in one batch, they would have to change places between the devices of a mesh.
    """
    sources, _ = encoder(to_float(batch["source_pose_image"]))
    targets, _ = encoder(to_float(flatten_targets(batch["target_pose_image"])))
    return sources.astype(jnp.float32), targets.astype(jnp.float32)


def shown_data(data: ml_collections.ConfigDict) -> dict[str, Any]:
    """`config.data` of an evaluation: pictures, of as many sources as give SHOWN targets; of one if each has more.

    They do not outnumber those of a training batch.
    """
    sources = max(1, SHOWN // loading.targets_of_a_source(data))
    return {**data, "batch_size": min(sources, data.batch_size), "latents": ""}


def write_samples(
    preview: Callable[[dict[str, Any], dict[str, np.ndarray]], Array],
    state: dict[str, Any],
    config: ml_collections.ConfigDict,
    path: Path,
) -> None:
    """A picture of held-out frames, the same every time, beside what a task's compiled `preview` makes of them."""
    (batch,) = loading.evaluation_batches(shown_data(config.data), config.evaluate.split, 1)
    result = preview(state["params"] | state["ema"], batch)
    save_comparison(path, batch["source_image"], batch["target_image"], result)


def in_turn(function: Callable[[Array], Array], images: Array) -> Array:
    """`function` of pictures that do not know of each other, in the memory of one of them.

    But on CPUs, where convolutions inside loops run many times slower, of all at once.
    """
    if target_platform() == "cpu":
        return function(images)
    return jax.lax.map(lambda image: function(image[None])[0], images)


def save_comparison(
    path: Path,
    source: UInt8[np.ndarray, "s h w 3"],
    target: UInt8[np.ndarray, "s n h w 3"],
    result: Float[Array, "b h w 3"],
    smallest: int = 128,
) -> None:
    """A PNG with one row a source: the source, then driving frame and result side by side for each target.

    Of several processes all must call this, because each may hold a part of `result`; the main one writes.
    """
    if jax.process_count() > 1:
        result = multihost_utils.process_allgather(result, tiled=True)
    if not distributed.is_main():
        return
    sources, targets = target.shape[:2]
    made = to_uint8(result).reshape(target.shape)
    rows = []
    for s in range(sources):
        cells = [source[s]]
        for n in range(targets):
            cells += [target[s, n], made[s, n]]
        rows.append(np.concatenate(cells, 1))
    grid = np.concatenate(rows, 0)
    factor = max(1, smallest // target.shape[2])
    grid = cv2.resize(grid, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
    write_png(path, grid)
