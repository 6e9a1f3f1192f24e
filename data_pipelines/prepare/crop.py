"""The one crop contract: a fixed square about the face of a whole clip (method.md 6.1).

Preparation, evaluation and animation all call these functions with the same `Settings`; the constants
go into every record and every exported model.
"""

from __future__ import annotations

import dataclasses
import math

import cv2
import numpy as np


@dataclasses.dataclass(frozen=True)
class Settings:
    """Constants of crop and filters; lengths are in pixels unless a unit is said.

    Attributes:
        size: side of the stored frames.
        face_scale: side of the crop in face boxes (longer side of the median box of the clip).
        minimum_scale: how small it may become so that it need not reach beyond the picture.
        union_margin: the crop holds the union of all boxes of the clip times this.
        vertical_shift: of the crop's centre, in sides; negative is up, towards the hair.
        jpeg_quality: of the stored frames (4:4:4, no chroma subsampling).
        min_face: longer side of a face box that is too small to be used.
        min_frames: shorter runs of good frames are dropped.
        clip_frames: longer runs become several records.
        second_face: a second face of at least this fraction of the first one's size counts as a person.
        max_several: a video with more than this fraction of frames with two people is refused.
        max_outside: fraction of the landmarks that may lie outside the picture.
        max_cut_difference: mean absolute difference of 32-pixel thumbnails, in [0, 1], that is a cut between two frames
            with a face, twice that where one shows none. From one frame to the next of 17 real clips it is at most
            0.038, from one person to another in the same crop at least 0.088.
        max_jump: movement of the face between two frames, in face boxes, that is a cut.
        max_pause: seconds between two frames that are a cut.
        mirror_error: how far landmarks of the mirrored picture may disagree, in face boxes.
        mirror_every: every how many frames of a shot that is asked, from its first face on.
    """

    size: int = 512
    face_scale: float = 2.15
    minimum_scale: float = 2.0
    union_margin: float = 1.15
    vertical_shift: float = -0.06
    jpeg_quality: int = 95
    min_face: float = 40.0
    min_frames: int = 16
    clip_frames: int = 300
    second_face: float = 0.3
    max_several: float = 0.1
    max_outside: float = 0.1
    max_cut_difference: float = 0.1
    max_jump: float = 0.5
    max_pause: float = 0.5
    mirror_error: float = 0.038
    mirror_every: int = 24

    def scaled(self, face_scale: float) -> Settings:
        """The same with another `face_scale`, which a crop that need not reach beyond the picture may have too."""
        minimum = min(face_scale, self.minimum_scale)
        return dataclasses.replace(self, face_scale=face_scale, minimum_scale=minimum)


def crop_box(boxes: np.ndarray, picture: tuple[int, int], settings: Settings) -> np.ndarray:
    """The square crop of a clip.

    Args:
        boxes: (T, 4) face boxes x0 y0 x1 y1 in pixels.
        picture: width and height of the frames.

    Returns:
        (4,) whole numbers x0 y0 x1 y1 in pixels. It lies inside the picture where it fits; along an axis
        where it is larger than the picture it shows all of it, unless the face is too near to the edge.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    face = float(np.median(sides.max(axis=1)))
    low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    needed = settings.union_margin * float((high - low).max())
    side = max(settings.face_scale * face, needed)
    fitting = max(settings.minimum_scale * face, needed, float(min(picture)))
    side = math.ceil(min(side, fitting))
    start = (low + high) / 2 + (0.0, settings.vertical_shift * side) - side / 2
    for axis in range(2):
        if (
            side > picture[axis]
        ):  # what is black is black; the shift must not cost real rows as well
            start[axis] = np.clip(start[axis], picture[axis] - side, 0)
    margin = (settings.union_margin - 1) / 2 * (high - low)
    start = np.clip(start, high + margin - side, low - margin)  # nor cut a face off
    for axis in range(2):
        if side <= picture[axis]:
            start[axis] = np.clip(start[axis], 0, picture[axis] - side)
    start = np.floor(start)
    return np.concatenate([start, start + side])


def extract(image: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    """Cuts the square `box` out of uint8 RGB (H, W, 3) and resizes it; black where no picture is."""
    height, width = image.shape[:2]
    x0, y0, x1, y1 = (int(value) for value in box)
    inside = image[max(y0, 0) : max(min(y1, height), 0), max(x0, 0) : max(min(x1, width), 0)]
    missing = (max(-y0, 0), max(y1 - height, 0), max(-x0, 0), max(x1 - width, 0))
    if any(missing):
        inside = cv2.copyMakeBorder(inside, *missing, cv2.BORDER_CONSTANT, value=(0, 0, 0))
    how = cv2.INTER_AREA if x1 - x0 > size else cv2.INTER_CUBIC
    return cv2.resize(inside, (size, size), interpolation=how)


def to_crop(points: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Pixels of the original (..., 2 or 3) -> crop coordinates in [-1, 1] (z in the same unit)."""
    half = (box[2] - box[0]) / 2
    points = np.array(points, np.float64)
    points[..., :2] -= box[:2] + half
    return (points / half).astype(np.float32)


def to_pixels(points: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Inverse of `to_crop`."""
    half = (box[2] - box[0]) / 2
    points = np.asarray(points, np.float64) * half
    points[..., :2] += box[:2] + half
    return points


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """uint8 RGB (H, W, 3) -> JPEG without chroma subsampling: at 64 pixels it would cost the eyes."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return cv2.imencode(".jpg", image[..., ::-1], options)[1].tobytes()
