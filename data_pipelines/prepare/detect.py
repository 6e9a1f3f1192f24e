"""Faces of a picture: MediaPipe Face Landmarker behind a small interface.

Another detector needs only `detect(image) -> list[Face]`. Frames are judged one by one (no tracking),
so a result never depends on the frames before it.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipelines import records
from dexportrait_jax.errors import UserError


class Face(NamedTuple):
    """One face of one picture.

    Attributes:
        landmarks: (478, 3) float32, pixels: x right, y down, z into the scene in the same unit;
            the centre of the top left pixel is at 0.5.
        blendshapes: (52,) float32, order of `records.BLENDSHAPES`.
        transform: (4, 4) float32, MediaPipe's head transform: x right, y up, z to the viewer.
    """

    landmarks: np.ndarray
    blendshapes: np.ndarray
    transform: np.ndarray

    @property
    def box(self) -> np.ndarray:
        """(4,) x0 y0 x1 y1 around the landmarks, pixels."""
        points = self.landmarks[:, :2]
        return np.concatenate([points.min(0), points.max(0)])

    @property
    def size(self) -> float:
        """Longer side of the box in pixels."""
        box = self.box
        return float(max(box[2] - box[0], box[3] - box[1]))


class Landmarker:
    """Finds up to `faces` faces with landmarks, blendshapes and head transform. Use as a context.

    Args:
        model: path of `face_landmarker.task`.
        faces: most faces looked for; two or more, or a second person goes unseen.

    Raises:
        UserError: MediaPipe or the model file is missing.
    """

    def __init__(self, model: str | os.PathLike, faces: int = 3):
        if not Path(model).is_file():
            raise UserError(f"no face landmarker at {model}; `dexportrait assets --fetch` gets it")
        try:
            import mediapipe
            from mediapipe.tasks import python as tasks
            from mediapipe.tasks.python import vision
        except ImportError as error:
            raise UserError(
                "preparing videos needs MediaPipe: pip install 'dexportrait-jax[prepare]'"
            ) from error
        self._mediapipe = mediapipe
        options = vision.FaceLandmarkerOptions(
            base_options=tasks.BaseOptions(model_asset_buffer=Path(model).read_bytes()),
            running_mode=vision.RunningMode.IMAGE,
            num_faces=faces,
            output_face_blendshapes=True,
            output_facial_transformation_matrixes=True,
        )
        with _quiet():
            try:
                self._task = vision.FaceLandmarker.create_from_options(options)
            except (RuntimeError, ValueError) as error:
                raise UserError(f"{model} is not a face landmarker that can be loaded") from error
            self.close = weakref.finalize(self, _close, self._task)
            self.detect(
                np.zeros((64, 64, 3), np.uint8)
            )  # its first run says more, on other threads

    def detect(self, image: np.ndarray) -> list[Face]:
        """Faces of a uint8 RGB picture (H, W, 3), largest first."""
        height, width = image.shape[:2]
        picture = self._mediapipe.Image(
            image_format=self._mediapipe.ImageFormat.SRGB, data=np.ascontiguousarray(image)
        )
        result = self._task.detect(picture)
        faces = []
        for points, scores, transform in zip(
            result.face_landmarks,
            result.face_blendshapes,
            result.facial_transformation_matrixes,
            strict=True,
        ):
            landmarks = np.array([(p.x, p.y, p.z) for p in points], np.float32)
            landmarks *= (width, height, width)
            named = {score.category_name: score.score for score in scores}
            blendshapes = np.array(
                [named.get(name, 0.0) for name in records.BLENDSHAPES], np.float32
            )
            faces.append(Face(landmarks, blendshapes, np.asarray(transform, np.float32)))
        return sorted(faces, key=lambda face: -face.size)

    def __enter__(self) -> Landmarker:
        return self

    def __exit__(self, *error) -> None:
        self.close()


def _close(task) -> None:
    try:
        task.close()
    except RuntimeError:  # Python is ending and MediaPipe's own threads are gone already
        task._handle = None  # or its destructor tries again, too late, and complains


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Native code writes its start-up notes straight to the standard error file descriptor."""
    kept = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)
