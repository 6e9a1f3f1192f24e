"""How much the background of a clip moves, by which the video stage chooses calm windows (method.md 5).

It is measured once, where records are written, and stored with them; records made before are measured when they
are read, by the same function on the same stored frames: the same windows are chosen either way.
"""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np

from data_pipelines import records, transforms

_SIDE = 48  # of the thumbnails that are compared


def measured(clip: records.Clip) -> records.Clip:
    """The clip with its `background_motion`."""
    if clip.background_motion is not None:
        return clip
    return dataclasses.replace(clip, background_motion=motion(clip, 0, len(clip)))


def motion(clip: records.Clip, first: int, last: int) -> np.ndarray:
    """Mean absolute difference of brightness, in [0, 1], of each frame from the one before.

    It is that of thumbnails, outside head and shoulders of both frames: what is beside the face boxes by 0.3 of
    their width or above them by 0.5 of their height, and not beneath them. Where the crop reaches beyond the
    original it is black for ever, and does not count either. 0 where the head fills the picture and no background is
    left to judge.

    Returns:
        (last - first,) float32 of the frames first .. last - 1; 0 for the first of them.

    Raises:
        records.RecordError: a frame is not a whole picture.
    """
    result = np.zeros(last - first, np.float32)
    seen = _seen(clip.crop_box, clip.original_size)
    before = None
    for index in range(first, last):
        gray = transforms.decode_brightness(clip, index, _SIDE)
        small = cv2.resize(gray, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
        thumbnail = small.astype(np.float32) / 255
        if before is not None:
            outside = seen & _outside(clip.face_boxes[index - 1 : index + 1])
            if outside.mean() >= 0.03:
                result[index - first] = np.abs(thumbnail - before)[outside].mean()
        before = thumbnail
    return result


def _seen(crop_box: np.ndarray, original_size: np.ndarray) -> np.ndarray:
    """(side, side) bool: what of a crop lies within the original, by the middle of each pixel."""
    low, high = crop_box[:2], crop_box[2:]
    middle = low + (np.arange(_SIDE)[:, None] + 0.5) / _SIDE * (high - low)
    columns, rows = ((middle > 0) & (middle < original_size)).T
    return rows[:, None] & columns[None, :]


def _outside(boxes: np.ndarray) -> np.ndarray:
    """(side, side) bool: the background of frames with face boxes (n, 4)."""
    x0, y0 = boxes[:, :2].min(0)
    x1, y1 = boxes[:, 2:].max(0)
    grid = (np.arange(_SIDE) + 0.5) * 2 / _SIDE - 1
    width, height = x1 - x0, y1 - y0
    beside = (grid < x0 - 0.3 * width) | (grid > x1 + 0.3 * width)
    above, beneath = grid < y0 - 0.5 * height, grid > y1
    return (beside[None, :] | above[:, None]) & ~beneath[:, None]


def window_motion(of_frames: np.ndarray) -> float:
    """What a window is judged by: the mean over its pairs of consecutive frames.

    Args:
        of_frames: (n,) `motion` of the window's frames; the first one's, which is about the frame before the
            window, does not count.
    """
    return float(of_frames[1:].mean()) if len(of_frames) > 1 else 0.0


def all_windows(of_frames: np.ndarray, frames: np.ndarray, span: int) -> np.ndarray:
    """(windows,) `window_motion` of every window of `span` frames of some clips, by its first frame.

    Args:
        of_frames: (n,) `motion` of the clips, one after the other.
        frames: (clips,) of each; shorter ones have no window.
    """
    ends = np.repeat(np.cumsum(frames), frames)  # of the clip of every frame
    first = np.flatnonzero(np.arange(len(of_frames)) + span <= ends)
    if span < 2:
        return np.zeros(len(first))
    sums = np.concatenate([[0.0], np.cumsum(of_frames, dtype=np.float64)])
    return (sums[first + span] - sums[first + 1]) / (span - 1)
