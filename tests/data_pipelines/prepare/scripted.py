"""A landmarker without a model: it reads off the picture what to find.

The grey level of the top left corner block says how many faces there are (60 each); a mirrored
picture has the block at the right. The face is the drawn head of `tests.fixtures`.
"""

from __future__ import annotations

import numpy as np

from data_pipelines import records
from data_pipelines.prepare import detect, filters
from tests import fixtures

SIDE = 160
_TO_MEDIAPIPE = np.diag([1.0, -1.0, -1.0])


def picture(faces: int = 1, shade: int = 120, shift: float = 0.0, dog: bool = False) -> np.ndarray:
    """(SIDE, SIDE, 3) uint8 with its instruction: `faces`, where the face is (`shift`), and whether it is a dog's."""
    image = np.full((SIDE, SIDE, 3), shade, np.uint8)
    image[:16, :16] = 60 * faces
    image[:16, 16:32] = int(100 + 400 * shift)
    if dog:
        image[:16, 32:48] = 255
    return image


def pose(shift: float = 0.0) -> np.ndarray:
    return fixtures.head_pose(10, 5, -8, 0.8, (shift, 0.05))


class ScriptedLandmarker:
    """Finds what `picture` says."""

    def __init__(self, mirror_error: float = 0.0):
        self.mirror_error = mirror_error
        self.calls = 0

    def detect(self, image: np.ndarray) -> list[detect.Face]:
        self.calls += 1
        width = image.shape[1]
        mirrored = abs(int(image[8, -8, 0]) - int(image[8, width // 2, 0])) > 12
        corner = image[:, ::-1] if mirrored else image
        count = int(np.round(corner[4:12, 4:12].mean() / 60))
        shift = (float(corner[4:12, 20:28].mean()) - 100) / 400
        dog = corner[4:12, 36:44].mean() > 240
        error = 0.1 if dog else self.mirror_error
        faces = [self._face(pose(shift), width if mirrored else None, error)]
        if count == 2:
            second = fixtures.head_pose(scale=0.4, shift=(0.75, -0.6))
            faces.append(self._face(second, width if mirrored else None, self.mirror_error))
        return faces[:count]

    def _face(self, head: np.ndarray, mirrored: int | None, mirror_error: float) -> detect.Face:
        """``mirrored``: the width of a picture that is."""
        points = fixtures.drawn_points(0.2, 0.3, seed=0)[0] @ head[:, :3].T + head[:, 3]
        landmarks = points * (SIDE / 2)
        landmarks[:, :2] += SIDE / 2
        if mirrored:
            ours, theirs = filters._MIRROR_PAIRS.T
            landmarks[:, 0] = mirrored - landmarks[:, 0]
            swapped = landmarks.copy()
            swapped[ours], swapped[theirs] = landmarks[theirs], landmarks[ours]
            landmarks = swapped
            landmarks[:, 1] += mirror_error * np.ptp(landmarks[:, 1])
        transform = np.eye(4)
        transform[:3, :3] = _TO_MEDIAPIPE @ head[:, :3] @ _TO_MEDIAPIPE
        blendshapes = np.linspace(0, 1, len(records.BLENDSHAPES), dtype=np.float32)
        return detect.Face(landmarks.astype(np.float32), blendshapes, transform.astype(np.float32))

    def __enter__(self) -> ScriptedLandmarker:
        return self

    def __exit__(self, *error) -> None:
        pass
