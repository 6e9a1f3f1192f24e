"""Every face by every driver: portraits down the side, driving frames along the top, the results between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, Int, UInt8

from data_pipelines.prepare.head_pose import euler_degrees
from data_pipelines.records import Clip
from dexportrait_jax.evaluation.estimators import MOVING
from dexportrait_jax.evaluation.runner import Picture, Runner
from dexportrait_jax.metrics import Progress

ROWS, COLUMNS = 6, 8
_DEGREES = 15.0  # of head turn that count as much as one whole blendshape
_CELL, _GAP, _APART, _FRAME = 128, 4, 14, 3  # pixels
_INK, _OWN = (102, 112, 117), (47, 111, 109)


@dataclass(frozen=True)
class Grid:
    """Portraits, driving frames and ``cells[row][column]``, with the clips and frames that they are of."""

    sources: list[Picture]
    drivers: list[Picture]
    cells: list[list[Picture]]
    source_clips: list[str]
    driver_frames: list[tuple[str, int]]
    own: list[list[bool]]  # the row's person drives himself

    def described(self) -> dict[str, Any]:
        """What is in it, for metrics.json."""
        frames = [{"clip": clip, "frame": frame} for clip, frame in self.driver_frames]
        return {"sources": self.source_clips, "drivers": frames}


def make_grid(
    runner: Runner,
    people: Sequence[Clip],
    *,
    pose: bool = True,
    expression: bool = True,
    name: str = "grid",
) -> Grid:
    """First frames of the first ROWS clips, driven by COLUMNS frames of all of them (see `telling_frames`).

    ``pose``, ``expression``: which of them the driver gives; what it does not give stays the source's own. A model of
    clips makes a run of frames for every cell, of which one is shown.
    """
    drivers = people[:COLUMNS]
    each = COLUMNS // len(drivers)
    chosen = [telling_frames(clip, each) for clip in drivers]
    columns = [
        (clip, int(frame)) for clip, frames in zip(drivers, chosen, strict=True) for frame in frames
    ]
    rows = people[:ROWS]
    cells = []
    progress = Progress(name, len(rows), unit="row")
    for number, source in enumerate(rows):
        made: list[Picture] = []
        for clip, frames in zip(drivers, chosen, strict=True):
            for run, places in runner.runs_through(len(clip), frames):
                drive = clip, run
                pictures = runner.make(
                    source, drive if pose else None, drive if expression else None
                )
                made += list(pictures[places])
        cells.append(made)
        progress.update(number + 1)
    return Grid(
        sources=[runner.pictures(clip, [0])[0] for clip in rows],
        drivers=[runner.pictures(clip, [frame])[0] for clip, frame in columns],
        cells=cells,
        source_clips=[clip.clip_id for clip in rows],
        driver_frames=[(clip.clip_id, frame) for clip, frame in columns],
        own=[[clip.identity == source.identity for clip, _ in columns] for source in rows],
    )


def telling_frames(clip: Clip, count: int) -> Int[np.ndarray, " n"]:
    """At most ``count`` frames of a clip that differ most in pose and expression, in order of time; never frame 0.

    The first is farthest from the clip's mean, each further one farthest from those that are chosen: Euclidean, of
    angles and moving blendshapes of the record, 15 degrees being as far as one whole blendshape.
    """
    features = _features(clip)
    distance = np.linalg.norm(features - features.mean(0), axis=1)
    chosen: list[int] = []
    for _ in range(min(count, len(clip) - 1)):
        distance[[0, *chosen]] = -1  # frame 0 is the portrait
        chosen.append(int(distance.argmax()))
        to_new = np.linalg.norm(features - features[chosen[-1]], axis=1)
        distance = to_new if len(chosen) == 1 else np.minimum(distance, to_new)
    return np.sort(chosen)


def _features(clip: Clip) -> Float[np.ndarray, "t features"]:
    angles = euler_degrees(clip.head_pose) / _DEGREES
    return np.concatenate([angles, clip.blendshapes[:, MOVING]], axis=1)


def draw_grid(grid: Grid) -> UInt8[np.ndarray, "height width 3"]:
    """The picture: portraits in the left column, drivers in the top row, set apart from the results.

    Cells whose portrait and driver are the same person have a frame.
    """
    rows, columns = len(grid.sources), len(grid.drivers)
    pitch, start = _CELL + _GAP, _CELL + _APART
    canvas = np.full(
        (start + rows * pitch - _GAP, start + columns * pitch - _GAP, 3), 255, np.uint8
    )

    def put(picture: Picture, top: int, left: int) -> None:
        method = cv2.INTER_AREA if picture.shape[0] > _CELL else cv2.INTER_CUBIC
        cell = cv2.resize(picture, (_CELL, _CELL), interpolation=method)
        canvas[top : top + _CELL, left : left + _CELL] = cell

    for column, picture in enumerate(grid.drivers):
        put(picture, 0, start + column * pitch)
    for row, source in enumerate(grid.sources):
        put(source, start + row * pitch, 0)
        for column, picture in enumerate(grid.cells[row]):
            top, left = start + row * pitch, start + column * pitch
            put(picture, top, left)
            if grid.own[row][column]:
                corners = (left + 1, top + 1), (left + _CELL - 2, top + _CELL - 2)
                cv2.rectangle(canvas, *corners, _OWN, _FRAME)
    for text, place in (("drivers", (56, 22)), ("portraits", (4, _CELL - 8))):
        cv2.putText(canvas, text, place, cv2.FONT_HERSHEY_DUPLEX, 0.5, _INK, 1, cv2.LINE_AA)
    return canvas
