"""Do eyes and mouth follow the driver? How far they are open in driver and result, and how well they are painted.

Openings of the driver come from the landmarks of its record, those of the result from the measuring instrument. Two
readings stand beside the result's: `control`, the same poses with the source's own expression, tells what the head's
turning alone does to an opening; `ceiling`, the driver's own pictures at the model's size, tells how well the
instrument reads openings at that size at all. Painting is PSNR within masks of eyes and mouth and needs no instrument.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8

from data_pipelines import network_inputs, transforms
from data_pipelines.records import Clip
from dexportrait_jax.evaluation.estimators import OPENINGS, FaceEstimator, openings

READINGS = {"made": "", "control": "_control", "ceiling": "_ceiling"}  # and what ends their keys
PARTS = {"mouth": [OPENINGS.index("inner_lips")], "eyes": [0, 1]}  # columns of the openings
_STILL = 1e-12  # variance that is rounding: the same number, read again and again
Frames = UInt8[np.ndarray, "n h w 3"]


class Track:
    """Openings of one driver and of what it drives, frame by frame; `read` is the measuring instrument."""

    def __init__(self, read: FaceEstimator):
        self._read = read
        self._driver: list[np.ndarray] = []
        self._readings: dict[str, list[np.ndarray]] = {name: [] for name in READINGS}
        self._found: dict[str, list[bool]] = {name: [] for name in READINGS}

    def add(self, driver: Clip, indices: Int[np.ndarray, " n"], **pictures: Frames) -> None:
        """Frames of the driver, and the pictures of each of READINGS that belong to them."""
        self._driver.append(
            openings({name: driver.mask_polygons[name][indices] for name in OPENINGS})
        )
        for name, frames in pictures.items():
            for picture in frames:
                face = self._read(picture)
                self._found[name].append(face is not None)
                known = face is not None and face.openings is not None
                self._readings[name].append(
                    face.openings if known else np.full(len(OPENINGS), np.nan)
                )

    def series(
        self, reading: str, columns: Sequence[int]
    ) -> Iterable[tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]]:
        """(driver, reading) of each of the openings, NaN where nothing could be read."""
        driver, read = np.concatenate(self._driver), np.stack(self._readings[reading])
        return [(driver[:, column], read[:, column]) for column in columns]

    def faces_found(self, reading: str) -> list[bool]:
        """Of every picture of a reading, whether a face was found in it."""
        return self._found[reading]


def following(tracks: Sequence[Track]) -> dict[str, float | None]:
    """Figures of one item or, pooled, of many.

    {mouth,eyes}_r: correlation of driver and result over all frames, each clip's (and eye's) own mean taken away
    first; None where the driver does not move or nothing was read. {mouth,eyes}_slope: how far the result opens where
    the driver opens by one, 1 being as far. faces_found: share of the pictures in which the instrument finds a face.
    All of them once more as *_control and *_ceiling, see above.
    """
    figures: dict[str, float | None] = {}
    for part, columns in PARTS.items():
        for reading, ending in READINGS.items():
            pairs = [pair for track in tracks for pair in track.series(reading, columns)]
            correlation, slope = pooled(pairs)
            figures[f"{part}_r{ending}"], figures[f"{part}_slope{ending}"] = correlation, slope
    for reading, ending in READINGS.items():
        found = [face for track in tracks for face in track.faces_found(reading)]
        figures[f"faces_found{ending}"] = float(np.mean(found))
    return figures


def pooled(
    pairs: Iterable[tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]],
) -> tuple[float | None, float | None]:
    """(correlation, slope) of the second of each pair on the first, every series about its own mean.

    Frames with a NaN are left out. None where the first does not move; 0 where the second does not.
    """
    count, xx, xy, yy = 0, 0.0, 0.0, 0.0
    for first, second in pairs:
        known = np.isfinite(first) & np.isfinite(second)
        if known.sum() < 2:
            continue
        x, y = (series[known] - series[known].mean() for series in (first, second))
        count, xx, xy, yy = count + len(x), xx + x @ x, xy + x @ y, yy + y @ y
    if xx <= _STILL * count:
        return None, None
    if yy <= _STILL * count:
        return 0.0, 0.0
    return float(xy / np.sqrt(xx * yy)), float(xy / xx)


def part_masks(
    frames: Iterable[dict[str, Float[np.ndarray, "points 2"]]], size: int
) -> UInt8[np.ndarray, "n size size"]:
    """Masks (0 or 255) of eyes and mouth with a margin, from the polygons of every frame."""
    regions = (
        network_inputs.hidden_regions(polygons, dilation=0.2, minimum_height=0.55)
        for polygons in frames
    )
    return np.stack([transforms.fill_polygons(region, size) for region in regions])


def clip_masks(
    clip: Clip, indices: Int[np.ndarray, " n"], size: int
) -> UInt8[np.ndarray, "n size size"]:
    """`part_masks` of frames of a clip."""
    return part_masks(
        ({name: points[index] for name, points in clip.mask_polygons.items()} for index in indices),
        size,
    )
