"""Measuring instruments: pose and expression read off a picture by a model that is not ours.

`FaceEstimator` is all the protocols ask for, so another estimator (SMIRK, Deep3DFaceRecon) is a
function away. The default is MediaPipe's Face Landmarker: angles of its head transform, its 52
blendshapes, and how far its landmarks say that eyes and mouth are open.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from data_pipelines.prepare import masks
from data_pipelines.prepare.detect import Landmarker
from data_pipelines.prepare.head_pose import euler_degrees, rotation_as_seen
from data_pipelines.records import BLENDSHAPES
from dexportrait_jax import assets
from dexportrait_jax.face_clips import enlarge

# Never moved on 395 varied frames of real faces, so they would only dilute a mean.
STILL = {
    "_neutral",
    "cheekPuff",
    "cheekSquintLeft",
    "cheekSquintRight",
    "jawForward",
    "noseSneerLeft",
    "noseSneerRight",
}
MOVING = np.array([name not in STILL for name in BLENDSHAPES])
# Outlines whose opening is measured.
OPENINGS = ("right_eye", "left_eye", "inner_lips")


@dataclass(frozen=True)
class Estimate:
    """Pitch, yaw and roll in degrees, and expression coefficients in [0, 1].

    ``openings``: of right eye, left eye and mouth, see `openings`; None of an instrument without
    landmarks.
    """

    angles: Float[np.ndarray, " 3"]
    expression: Float[np.ndarray, " coefficients"]
    openings: Float[np.ndarray, " 3"] | None = None


FaceEstimator = Callable[[UInt8[np.ndarray, "h w 3"]], Estimate | None]


def pose_distance(first: Estimate, second: Estimate) -> float:
    """Mean absolute difference of the three angles, degrees (APD, method.md 8.1)."""
    difference = first.angles - second.angles
    return float(np.mean(np.abs((difference + 180) % 360 - 180)))


def expression_distance(first: Estimate, second: Estimate) -> float:
    """Mean absolute difference of the expression coefficients (AED, method.md 8.1)."""
    return float(np.mean(np.abs(first.expression - second.expression)))


def openings(outlines: Mapping[str, Float[np.ndarray, "n points 2"]]) -> Float[np.ndarray, "n 3"]:
    """Gap over width of right eye, left eye and mouth (inner lips), 0 when closed.

    ``outlines``: name -> closed polygons in the order of `records.POLYGONS`, whose corners are the
    first point and the one opposite; the gap is between the middles of upper and lower side. Any
    unit, as long as x and y have the same.
    """
    measured = []
    for name in OPENINGS:
        points = np.asarray(outlines[name], np.float64)
        quarter = points.shape[-2] // 4
        gap, width = (
            np.linalg.norm(points[:, first] - points[:, first + 2 * quarter], axis=-1)
            for first in (quarter, 0)
        )
        measured.append(gap / np.maximum(width, 1e-9))
    return np.stack(measured, axis=-1)


def remembering(estimate: FaceEstimator) -> FaceEstimator:
    """The same instrument; a picture that comes again is not read again."""
    known: dict[bytes, Estimate | None] = {}

    def read(picture: UInt8[np.ndarray, "h w 3"]) -> Estimate | None:
        key = hashlib.sha256(np.ascontiguousarray(picture)).digest()
        if key not in known:
            known[key] = estimate(picture)
        return known[key]

    return read


@contextlib.contextmanager
def open_estimator(estimator: FaceEstimator | None = None) -> Iterator[FaceEstimator]:
    """``estimator``, or MediaPipe's, started here and ended with the block; it remembers what it has read."""
    if estimator is not None:
        yield remembering(estimator)
        return
    with Landmarker(assets.fetch("face_landmarker", say=lambda text: None)) as landmarker:
        yield remembering(lambda picture: read_face(landmarker, picture))


def read_face(landmarker: Landmarker, picture: UInt8[np.ndarray, "n n 3"]) -> Estimate | None:
    """The largest face of a square picture by MediaPipe; None where it finds none.

    Its angles are read as those of the dataset are, wherever in the picture the face is.
    """
    found = landmarker.detect(enlarge(picture))
    if not found:
        return None
    landmarks = found[0].landmarks[None]
    (rotation,) = rotation_as_seen(landmarks, found[0].transform[None])
    opened = openings(masks.polygons(landmarks))[0]
    return Estimate(euler_degrees(rotation), found[0].blendshapes[MOVING], opened)
