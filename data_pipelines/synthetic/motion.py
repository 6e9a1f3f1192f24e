"""How a rendered person moves: smooth paths of expression and pose, known at any time.

A path goes through random key moments. What happens at a time is a function of (seed, time) alone, so
any frame can be asked for by itself and all cameras see the same instant.
"""

from __future__ import annotations

import numpy as np

from data_pipelines.prepare import crop
from data_pipelines.synthetic import poses
from data_pipelines.synthetic.expression import sample_expression

_EXPRESSION_EVERY, _POSE_EVERY = 0.6, 0.9  # seconds between key moments
_CAMERA_YAW, _CAMERA_PITCH = 28.0, 9.0  # degrees, how far a further camera stands aside at most
_CALMER = 0.5  # with several cameras the head turns less, so that all see it within the range


class Motion:
    """One session of one person.

    Args:
        seed: whole numbers that decide everything.
        cameras: how many cameras watch.
        face_scale: side of the crop in faces, as of `prepare`: of the faces' middle size.
    """

    def __init__(
        self,
        seed: tuple[int, ...],
        cameras: int = 1,
        face_scale: float = crop.Settings.face_scale,
    ):
        self.seed = tuple(seed)
        self.cameras = cameras
        self.face_scale = face_scale

    def expression(self, time: float) -> np.ndarray:
        """(K,) expression at `time` seconds."""
        first, second, part = self._keys(time, _EXPRESSION_EVERY, 1, sample_expression)
        return first + part * (second - first)

    def pose(self, time: float) -> np.ndarray:
        """(3, 4) P = [sR | t] in the room, which is what camera 0 sees."""
        first, second, part = self._keys(time, _POSE_EVERY, 2, self._pose_values)
        pitch, yaw, roll, size, x, y = first + part * (second - first)
        scale = np.exp(size) * poses.scale_in_crop(self.face_scale)
        return poses.pose_matrix(pitch, yaw, roll, scale, (x, y))

    def camera(self, number: int) -> np.ndarray:
        """(3, 3) rotation from the room to a camera; camera 0 stands straight in front."""
        if number == 0:
            return np.eye(3)
        rng = np.random.default_rng((*self.seed, 3, number))
        side = 1 if number % 2 else -1
        yaw = side * rng.uniform(0.45, 1.0) * _CAMERA_YAW
        return poses.rotation(rng.uniform(-1, 1) * _CAMERA_PITCH, yaw, 0.0)

    def seen_pose(self, time: float, number: int) -> np.ndarray:
        """(3, 4) P in a camera's picture; t_z = 0, for depth does not change an orthographic picture."""
        seen = self.camera(number) @ self.pose(time)
        seen[2, 3] = 0.0
        return seen

    def _pose_values(self, rng: np.random.Generator) -> np.ndarray:
        calm = _CALMER if self.cameras > 1 else 1.0
        limits = (0.72 * poses.PITCH, poses.YAW, poses.ROLL) if self.cameras > 1 else None
        limits = limits or (poses.PITCH, poses.YAW, poses.ROLL)
        angles = np.array(limits) * np.clip(rng.normal(0, 0.45, 3), -1, 1) * (1, calm, 1)
        size = rng.uniform(*np.log(poses.SCALE))
        return np.concatenate([angles, [size], rng.uniform(-poses.SHIFT, poses.SHIFT, 2)])

    def _keys(self, time: float, every: float, kind: int, draw):
        number = int(np.floor(time / every))
        part = time / every - number
        first, second = (
            draw(np.random.default_rng((*self.seed, kind, at))) for at in (number, number + 1)
        )
        return first, second, 0.5 - 0.5 * np.cos(np.pi * part)
