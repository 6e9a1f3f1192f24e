"""Stored frames as pictures, and the transforms that move pictures, points and head poses together.

A geometric transform is one (2, 3) matrix in crop coordinates (see `records.Clip`), a colour
transform one (3, 4) matrix on RGB.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import cv2
import numpy as np

from data_pipelines import records

_BORDERS = {
    "reflect": cv2.BORDER_REFLECT_101,
    "replicate": cv2.BORDER_REPLICATE,
    "black": cv2.BORDER_CONSTANT,
}
_LUMA = np.array([0.299, 0.587, 0.114])


def similarity_matrix(
    roll: float = 0.0, scale: float = 1.0, shift: Sequence[float] = (0.0, 0.0), flip: bool = False
) -> np.ndarray:
    """(2, 3) matrix: mirror x if asked, then scale, turn by `roll` degrees (clockwise), shift."""
    angle = np.deg2rad(roll)
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    if flip:
        turn = turn @ np.diag([-1.0, 1.0])
    return np.concatenate([turn, np.asarray(shift, float)[:, None]], axis=1)


def transform_points(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(2, 3) matrix on (..., 2) points."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def transform_head_pose(matrix: np.ndarray, head_pose: np.ndarray) -> np.ndarray:
    """P of the transformed picture: exact for P = [sR | t] and a 2D similarity, also a mirroring.

    A point R p + t of the head goes to A (s R p + t) + b. A flip F of the picture is the picture of
    the mirrored head, whose own coordinates are mirrored too: s' R' = A s R F, a rotation again.

    Args:
        matrix: (2, 3), in crop coordinates.
        head_pose: (..., 3, 4).
    """
    linear = matrix[:, :2]
    mirrored = np.linalg.det(linear) < 0
    scale = np.sqrt(abs(np.linalg.det(linear)))
    lifted = np.diag([0.0, 0.0, scale])
    lifted[:2, :2] = linear
    turned = lifted @ head_pose[..., :3]
    if mirrored:
        turned = turned @ np.diag([-1.0, 1.0, 1.0])
    shift = head_pose[..., 3] @ lifted.T + np.append(matrix[:, 2], 0.0)
    return np.concatenate([turned, shift[..., None]], axis=-1).astype(np.float32)


def decode_frame(clip: records.Clip, index: int) -> np.ndarray:
    """Frame `index` as (size, size, 3) uint8 RGB.

    Raises:
        records.RecordError: it is not a whole JPEG of the right size.
    """
    picture = _decode(clip, index, cv2.IMREAD_COLOR, clip.size)
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def decode_brightness(clip: records.Clip, index: int, side: int) -> np.ndarray:
    """Frame `index` as (n, n) uint8 in gray, at the stored size or a half, a quarter or an eighth of it.

    The smallest of these with n >= `side`: much quicker than the whole picture, because a JPEG holds them.

    Raises:
        records.RecordError: it is not a whole JPEG of the right size.
    """
    flag, factor = cv2.IMREAD_GRAYSCALE, 1
    for reduced, by in (
        (cv2.IMREAD_REDUCED_GRAYSCALE_2, 2),
        (cv2.IMREAD_REDUCED_GRAYSCALE_4, 4),
        (cv2.IMREAD_REDUCED_GRAYSCALE_8, 8),
    ):
        if clip.size >= side * by:
            flag, factor = reduced, by
    return _decode(clip, index, flag, -(-clip.size // factor))


def _decode(clip: records.Clip, index: int, flag: int, side: int) -> np.ndarray:
    """Frame `index` read with OpenCV's `flag`, `side` pixels wide and high then."""
    data = clip.frames[index]
    picture = None
    if data[:2] == b"\xff\xd8" and data[-2:] == b"\xff\xd9":
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    if picture is None or picture.shape[:2] != (side, side):
        raise records.RecordError(
            f"clip {clip.clip_id}: frame {index} is not a whole picture", clip.clip_id
        )
    return picture


def sample_picture(
    picture: np.ndarray,
    matrix: np.ndarray,
    size: int,
    border: str = "reflect",
    displacement: np.ndarray | None = None,
) -> np.ndarray:
    """Resamples a square picture once.

    Args:
        picture: (n, n, 3) uint8.
        matrix: (2, 3), crop coordinates of `picture` -> crop coordinates of the result.
        size: side of the result.
        border: what lies outside: "reflect", "replicate" or "black".
        displacement: (k, k, 2) coarse field of shifts, fractions of the result's side.
    """
    (a, b, shift_x), (c, d, shift_y) = matrix.tolist()
    determinant = a * d - b * c
    side = _side_when_sampled(picture.shape[0], matrix, size)
    if side != picture.shape[0]:
        picture = cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA)
    # Pixel of the result -> its coordinates -> coordinates in the picture -> its pixel there. Written
    # out: on small pictures four matrix products would cost as much as the resampling.
    inverse = np.array([[d, -b], [-c, a]]) * (side / size / determinant)
    middle = -np.array([d * shift_x - b * shift_y, a * shift_y - c * shift_x]) / determinant
    start = (middle + 1) * side / 2 - 0.5 + inverse @ ((1 - size) / 2, (1 - size) / 2)
    lookup = np.concatenate([inverse, start[:, None]], axis=1)
    mode = _BORDERS[border]
    if displacement is None:
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(picture, lookup, (size, size), flags=flags, borderMode=mode)
    field = cv2.resize(displacement * size, (size, size), interpolation=cv2.INTER_LINEAR)
    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    grid = np.stack([columns, rows], axis=-1) + field
    where = (grid @ lookup[:, :2].T + lookup[:, 2]).astype(np.float32)
    return cv2.remap(picture, where, None, cv2.INTER_LINEAR, borderMode=mode)


def _side_when_sampled(side: int, matrix: np.ndarray, size: int) -> int:
    """What a picture is reduced to where bilinear reading would skip pixels: those are averaged first."""
    zoom = abs(np.linalg.det(matrix[:, :2])) ** 0.5 * size / side
    return max(8, round(side * zoom)) if zoom < 0.75 else side


def shown_copies(
    matrix: np.ndarray, side: int, size: int, border: str = "reflect"
) -> list[np.ndarray]:
    """Where `sample_picture` shows a picture of so many pixels: a (2, 3) matrix of every copy that its border makes.

    The first is `matrix`.
    """
    if border != "reflect":
        return [matrix]
    corners = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]]) - matrix[:, 2]
    seen = corners @ np.linalg.inv(matrix[:, :2]).T
    # Picture 0 reaches from -1 to 1, number 1 from 1 to 3, mirrored.
    first = np.floor((seen.min(0) + 1) / 2 + 1e-6).astype(int)
    last = np.ceil((seen.max(0) + 1) / 2 - 1e-6).astype(int)
    apart = 2.0 - 2.0 / _side_when_sampled(side, matrix, size)  # mirrored at the outermost pixels
    copies = [matrix]
    for place in itertools.product(*map(range, first, last)):
        if any(place):
            mirrored = np.diag([-1.0 if number % 2 else 1.0 for number in place])
            shift = matrix[:, :2] @ (apart * np.array(place)) + matrix[:, 2]
            copies.append(np.concatenate([matrix[:, :2] @ mirrored, shift[:, None]], axis=1))
    return copies


def fill_polygons(polygons: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Union of closed polygons in crop coordinates as a (size, size) uint8 mask, 0 or 255."""
    mask = np.zeros((size, size), np.uint8)
    for points in polygons:
        pixels = ((points + 1) * size / 2 - 0.5) * 16
        cv2.fillPoly(mask, [np.round(pixels).astype(np.int32)], 255, shift=4)
    return mask


def colour_matrix(brightness: float, contrast: float, saturation: float, hue: float) -> np.ndarray:
    """(3, 4) matrix on RGB 0..255: factors around 1; hue in turns; contrast is about mid gray.

    Hue is a rotation about the gray axis, so the whole jitter is one matrix product per pixel.
    """
    angle = 2 * np.pi * hue
    axis = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    rotation = axis + np.cos(angle) * (np.eye(3) - axis) + np.sin(angle) * cross
    desaturate = saturation * np.eye(3) + (1 - saturation) * np.tile(_LUMA, (3, 1))
    linear = brightness * contrast * desaturate @ rotation
    offset = brightness * (1 - contrast) * 127.5
    return np.concatenate([linear, np.full((3, 1), offset)], axis=1)
