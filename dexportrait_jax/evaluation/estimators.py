"""Measuring instruments: pose and expression read off a picture by a model that is not ours.

`FaceEstimator` is all the protocols ask for, so another estimator (SMIRK, Deep3DFaceRecon) is a
function away. The default is MediaPipe's Face Landmarker: angles of its head transform and its 52
blendshapes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from data_pipelines.prepare.detect import Landmarker
from data_pipelines.prepare.head_pose import euler_degrees, rotation_from_transform
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


@dataclass(frozen=True)
class Estimate:
    """Pitch, yaw and roll in degrees, and expression coefficients in [0, 1]."""

    angles: Float[np.ndarray, " 3"]
    expression: Float[np.ndarray, " coefficients"]


FaceEstimator = Callable[[UInt8[np.ndarray, "h w 3"]], Estimate | None]


def pose_distance(first: Estimate, second: Estimate) -> float:
    """Mean absolute difference of the three angles, degrees (APD, method.md 8.1)."""
    difference = first.angles - second.angles
    return float(np.mean(np.abs((difference + 180) % 360 - 180)))


def expression_distance(first: Estimate, second: Estimate) -> float:
    """Mean absolute difference of the expression coefficients (AED, method.md 8.1)."""
    return float(np.mean(np.abs(first.expression - second.expression)))


@contextlib.contextmanager
def open_estimator(estimator: FaceEstimator | None = None) -> Iterator[FaceEstimator]:
    """``estimator``, or MediaPipe's, started here and ended with the block."""
    if estimator is not None:
        yield estimator
        return
    with Landmarker(assets.fetch("face_landmarker", say=lambda text: None)) as landmarker:
        yield lambda picture: read_face(landmarker, picture)


def read_face(landmarker: Landmarker, picture: UInt8[np.ndarray, "n n 3"]) -> Estimate | None:
    """The largest face of a square picture by MediaPipe; None where it finds none."""
    found = landmarker.detect(enlarge(picture))
    if not found:
        return None
    rotation = rotation_from_transform(found[0].transform)
    return Estimate(euler_degrees(rotation), found[0].blendshapes[MOVING])
