"""Head poses P = [sR | t] of rendered heads (method.md 2): ranges, draws, and paths through them."""

from __future__ import annotations

import numpy as np

from data_pipelines.prepare import crop

# Degrees, factors and crop coordinates; every pose drawn here keeps within them. Scales are of the standard crop.
PITCH, YAW, ROLL = 35.0, 60.0, 35.0
SCALE = (0.72, 1.25)
SHIFT = 0.22


def rotation(pitch: float, yaw: float, roll: float) -> np.ndarray:
    """R = R_z(roll) R_y(yaw) R_x(pitch), degrees -> (3, 3) float64."""
    (cx, cy, cz), (sx, sy, sz) = (
        function(np.deg2rad([pitch, yaw, roll])) for function in (np.cos, np.sin)
    )
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def pose_matrix(
    pitch: float = 0.0,
    yaw: float = 0.0,
    roll: float = 0.0,
    scale: float = 1.0,
    shift: tuple[float, float] = (0.0, 0.0),
) -> np.ndarray:
    """(3, 4) float64 P = [sR | t], t_z = 0. Identity: frontal, centred, a face of 1 / 2.15 crops."""
    return np.concatenate(
        [scale * rotation(pitch, yaw, roll), [[shift[0]], [shift[1]], [0.0]]], axis=1
    )


def scale_in_crop(face_scale: float) -> float:
    """The scale s of a face that is 1 / ``face_scale`` of its crop high; 1 in the standard crop."""
    return crop.Settings.face_scale / face_scale


def sample_pose(rng: np.random.Generator) -> np.ndarray:
    """A pose from the whole range, (3, 4) float64; more often near the front than far from it."""
    pitch, yaw, roll = (limit * np.clip(rng.normal(0, 0.45), -1, 1) for limit in (PITCH, YAW, ROLL))
    scale = float(np.exp(rng.uniform(*np.log(SCALE))))
    shift = tuple(rng.uniform(-SHIFT, SHIFT, 2))
    return pose_matrix(pitch, yaw, roll, scale, shift)


def nearest_rotation(matrix: np.ndarray) -> np.ndarray:
    """The rotation closest to a (3, 3) matrix."""
    left, _, right = np.linalg.svd(matrix)
    return left @ np.diag([1.0, 1.0, np.sign(np.linalg.det(left @ right))]) @ right


def part_of_rotation(matrix: np.ndarray, part: float) -> np.ndarray:
    """The rotation by `part` of the angle of a (3, 3) rotation, about the same axis."""
    cosine = np.clip((np.trace(matrix) - 1) / 2, -1, 1)
    angle = np.arccos(cosine)
    axis = np.array(
        [matrix[2, 1] - matrix[1, 2], matrix[0, 2] - matrix[2, 0], matrix[1, 0] - matrix[0, 1]]
    )
    length = np.linalg.norm(axis)
    if length < 1e-9:
        return np.eye(3)
    x, y, z = axis / length
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    turned = part * angle
    return np.eye(3) + np.sin(turned) * cross + (1 - np.cos(turned)) * cross @ cross
