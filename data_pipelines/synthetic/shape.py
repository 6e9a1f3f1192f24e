"""What makes one head another: smooth deformations of space, applied to everything a head consists of.

A shape is named strengths, each about normally distributed over people. Left and right stay mirror
images; landmarks keep their meaning, because they are vertices that move along.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from data_pipelines.synthetic.template import around, smooth

STRENGTHS = (
    *("face_width", "jaw_width", "chin_length", "chin_forward", "chin_width", "cheekbones"),
    *("cheeks", "forehead_height", "forehead_slope", "skull_depth", "skull_height", "temples"),
    *("nose_length", "nose_projection", "nose_width", "nose_bridge", "nose_tip", "nose_hump"),
    *("eye_size", "eye_spacing", "eye_tilt", "eye_height", "eye_opening", "brow_ridge"),
    *("brow_height", "mouth_width", "lip_fullness", "mouth_height", "mouth_forward"),
    *("age", "weight"),
)


def sample_shape(rng: np.random.Generator) -> dict[str, float]:
    """Strengths within +-2, mostly within +-1."""
    values = np.clip(rng.normal(0, 0.9, len(STRENGTHS)), -2, 2)
    shape = dict(zip(STRENGTHS, values.tolist(), strict=True))
    shape["age"] = float(rng.uniform(-1, 1))
    return shape


def displacement(points: np.ndarray, shape: Mapping[str, float]) -> np.ndarray:
    """(N, 3) canonical points -> (N, 3) how they move for a shape."""
    x, y, z = points.T
    side = np.sign(x)
    front = smooth(0.15, -0.2, z)
    moved = np.zeros_like(points)

    def bell(centre, spread):
        return around(points, centre, spread)

    def both(centre, spread):
        flipped = (-centre[0], *centre[1:])
        return bell(centre, spread) + bell(flipped, spread)

    moved[:, 0] += x * 0.045 * shape["face_width"]
    moved[:, 0] += x * 0.085 * shape["jaw_width"] * smooth(0.02, 0.35, y)
    moved[:, 0] += x * 0.05 * shape["temples"] * smooth(-0.02, -0.3, y) * front
    lower = smooth(0.28, 0.52, y) * front
    moved[:, 1] += 0.036 * shape["chin_length"] * lower
    moved[:, 2] -= 0.030 * shape["chin_forward"] * bell((0, 0.50, -0.38), (0.12, 0.09, 0.12))
    moved[:, 0] += x * 0.20 * shape["chin_width"] * bell((0, 0.48, -0.36), (0.14, 0.07, 0.12))
    moved[:, 0] += side * 0.018 * shape["cheekbones"] * both((0.29, 0.0, -0.25), (0.08, 0.07, 0.12))
    heavy = 0.5 * shape["cheeks"] + 0.7 * shape["weight"]
    cheek = both((0.24, 0.22, -0.25), (0.09, 0.11, 0.13))
    moved[:, 0] += side * 0.030 * heavy * cheek
    moved[:, 2] -= 0.020 * heavy * cheek
    moved[:, 1] += 0.012 * shape["weight"] * bell((0, 0.5, -0.25), (0.2, 0.08, 0.15))
    moved[:, 1] -= 0.035 * shape["forehead_height"] * smooth(-0.20, -0.42, y)
    moved[:, 2] += 0.030 * shape["forehead_slope"] * smooth(-0.22, -0.45, y) * front
    moved[:, 2] += 0.045 * shape["skull_depth"] * smooth(0.0, 0.45, z)
    moved[:, 1] -= 0.035 * shape["skull_height"] * smooth(-0.3, -0.65, y)

    tip = bell((0, 0.10, -0.54), (0.06, 0.06, 0.08))
    nose = bell((0, 0.05, -0.50), (0.055, 0.11, 0.09))
    moved[:, 1] += 0.022 * shape["nose_length"] * bell((0, 0.12, -0.50), (0.08, 0.06, 0.09))
    moved[:, 2] -= 0.030 * shape["nose_projection"] * nose
    moved[:, 0] += x * 0.20 * shape["nose_width"] * bell((0, 0.115, -0.47), (0.10, 0.06, 0.09))
    moved[:, 2] -= 0.020 * shape["nose_bridge"] * bell((0, -0.09, -0.44), (0.045, 0.08, 0.06))
    moved[:, 0] += x * 0.12 * shape["nose_bridge"] * bell((0, -0.04, -0.45), (0.05, 0.08, 0.06))
    moved[:, 1] -= 0.015 * shape["nose_tip"] * tip
    moved[:, 2] -= 0.014 * shape["nose_hump"] * bell((0, -0.01, -0.50), (0.04, 0.045, 0.06))

    for at in (-1, 1):
        near = bell((at * 0.175, -0.11, -0.34), (0.075, 0.055, 0.10))
        moved[:, 0] += near * 0.10 * shape["eye_size"] * (x - at * 0.175)
        opening = 0.13 * shape["eye_size"] + 0.20 * shape["eye_opening"]
        moved[:, 1] += near * opening * (y + 0.112)
        moved[:, 1] -= near * 0.09 * shape["eye_tilt"] * at * (x - at * 0.175)
        moved[:, 0] += near * at * 0.009 * shape["eye_spacing"]
        moved[:, 1] += near * 0.010 * shape["eye_height"]
    brow = both((0.15, -0.215, -0.38), (0.12, 0.05, 0.1))
    moved[:, 2] -= 0.020 * shape["brow_ridge"] * brow
    moved[:, 1] -= 0.013 * shape["brow_height"] * brow

    mouth = bell((0, 0.28, -0.43), (0.13, 0.06, 0.12))
    moved[:, 0] += x * 0.11 * shape["mouth_width"] * mouth
    full = shape["lip_fullness"] - 0.4 * max(shape["age"], 0)
    lips = bell((0, 0.28, -0.45), (0.11, 0.05, 0.1))
    moved[:, 1] += lips * 0.28 * full * np.clip(y - 0.281, -0.05, 0.06)
    moved[:, 2] -= lips * 0.012 * full
    moved[:, 1] += 0.012 * shape["mouth_height"] * mouth
    moved[:, 2] -= 0.014 * shape["mouth_forward"] * mouth
    old = max(shape["age"], 0.0)
    sagging = both((0.17, 0.37, -0.33), (0.06, 0.07, 0.1))
    moved[:, 1] += 0.014 * old * sagging
    return moved
