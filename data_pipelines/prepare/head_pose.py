"""Head pose labels P = [sR | t] from landmarks and the detector's head transform (method.md 2).

Axes: x right, y down, z into the scene; R = R_z(roll) R_y(yaw) R_x(pitch). So positive yaw turns the
nose to the left of the picture, positive pitch downwards, positive roll clockwise. The gauge: a frontal
face has R = I, and s = 1 is the size a face has in a crop of 2.15 face boxes. t is where the middle of
the head (between the ears) is seen, so a head that only turns keeps its t.
"""

from __future__ import annotations

import numpy as np

# Points of skull, nose bridge and eye corners: hardly moved by any expression; mirror symmetric.
STABLE = (
    *(10, 151, 9, 8, 168, 6, 197, 195),
    *(338, 297, 332, 284, 251, 389, 356, 454, 263, 362),
    *(109, 67, 103, 54, 21, 162, 127, 234, 33, 133),
)
# Means over 283 near-frontal faces of 17 clips and 30 portraits: the spread of the stable points is
# 0.309 +- 0.018 of the face box, which is 2 / 2.15 high at s = 1; the middle between the ears
# (landmarks 234 and 454) lies at (0, 0.70, 0.98) +- 0.05 spreads from their mean.
_SPREAD = 0.309 * 2 / 2.15
_TO_HEAD_CENTRE = np.array([0.0, 0.70, 0.98])
_TO_OUR_AXES = np.diag([1.0, -1.0, -1.0])
# The points that MediaPipe fits its transform to, and their weights: those of the
# `geometry_pipeline_metadata_landmarks.binarypb` in its model file. Pairs of the two sides weigh alike.
_FITTED = {
    (4,): 0.07091,
    (6,): 0.03210,
    (10,): 0.00845,
    (33, 263): 0.05872,
    (54, 284): 0.00767,
    (67, 297): 0.00908,
    (117, 346): 0.00979,
    (119, 348): 0.01457,
    (121, 350): 0.01859,
    (127, 356): 0.00520,
    (129, 358): 0.12063,
    (132, 361): 0.00556,
    (133, 362): 0.05329,
    (136, 365): 0.06689,
    (143, 372): 0.01482,
    (147, 376): 0.01426,
    (198, 420): 0.02546,
    (205, 425): 0.04725,
}
_FITTED_POINTS = [number for pair in _FITTED for number in pair]
_FITTED_WEIGHTS = np.array([weight for pair, weight in _FITTED.items() for _ in pair])


def rotation_from_transform(transform: np.ndarray) -> np.ndarray:
    """(..., 4, 4) head transform of MediaPipe (y up, z to the viewer) -> (..., 3, 3) rotation."""
    rotation = _TO_OUR_AXES @ np.asarray(transform, np.float64)[..., :3, :3] @ _TO_OUR_AXES
    left, _, right = np.linalg.svd(rotation)  # nearest rotation: the transform carries a scale
    return left @ right


def rotation_as_seen(landmarks: np.ndarray, transform: np.ndarray) -> np.ndarray:
    """The rotation of a face as a crop about it shows it, wherever in the picture it was found.

    MediaPipe fits its transform to points as a camera with a wide lens would have them: what is farther by dz is
    moved by t_xy / t_z dz. So the same face reads as turned by 4 degrees more a third of the way to the picture's
    side than in its middle, and a crop shows nothing of that. With A that shear and C the spread of the points as
    they are seen, what was fitted is the rotation nearest to A C R, which is that nearest to A C, times R.

    Args:
        landmarks: (T, 478, 3), pixels or crop coordinates.
        transform: (T, 4, 4) of MediaPipe; without a translation it is taken as it is.

    Returns:
        (T, 3, 3).
    """
    points = np.asarray(landmarks, np.float64)[:, _FITTED_POINTS]
    weights = _FITTED_WEIGHTS[:, None] / _FITTED_WEIGHTS.sum()
    points = points - (weights * points).sum(axis=1, keepdims=True)
    place = np.asarray(transform, np.float64)[:, :3, 3] @ _TO_OUR_AXES
    shear = np.tile(np.eye(3), (len(points), 1, 1))
    placed = place[:, 2] != 0
    shear[placed, :2, 2] = place[placed, :2] / place[placed, 2:]
    left, _, right = np.linalg.svd(shear @ (points.swapaxes(1, 2) @ (weights * points)))
    return (left @ right).swapaxes(1, 2) @ rotation_from_transform(transform)


def head_pose(landmarks: np.ndarray, transform: np.ndarray) -> np.ndarray:
    """P = [sR | t] of faces.

    Args:
        landmarks: (T, 478, 3) in crop coordinates.
        transform: (T, 4, 4) of MediaPipe.

    Returns:
        (T, 3, 4) float32, t_z = 0.
    """
    rotation = rotation_as_seen(landmarks, transform)
    points = np.asarray(landmarks, np.float64)[:, list(STABLE)]
    upright = points @ rotation  # rows times R: R^T p, the face turned back to the front
    mean = upright.mean(axis=1, keepdims=True)
    spread = np.sqrt(np.square(upright - mean)[..., :2].sum(-1).mean(-1))
    centre = mean[:, 0] + spread[:, None] * _TO_HEAD_CENTRE
    shift = np.einsum("tij,tj->ti", rotation, centre)
    shift[:, 2] = 0.0
    scale = spread / _SPREAD
    return np.concatenate([scale[:, None, None] * rotation, shift[..., None]], -1).astype(
        np.float32
    )


def euler_degrees(head_pose: np.ndarray) -> np.ndarray:
    """(..., 3, 4) -> (..., 3) pitch, yaw, roll in degrees."""
    rotation = np.asarray(head_pose, np.float64)[..., :3]
    rotation = rotation / np.linalg.norm(rotation[..., :1], axis=-2, keepdims=True)
    yaw = np.arcsin(np.clip(-rotation[..., 2, 0], -1, 1))
    pitch = np.arctan2(rotation[..., 2, 1], rotation[..., 2, 2])
    roll = np.arctan2(rotation[..., 1, 0], rotation[..., 0, 0])
    return np.rad2deg(np.stack([pitch, yaw, roll], -1))
