"""The generated crop back in the full-size picture, without a seam (method.md 7.3).

The mask is the convex hull of the face in the source and in the result, dilated and feathered, so
hair, neck and background stay the source's own pixels, bit for bit. Or it is the whole crop, which falls off
towards its edges.
"""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Float, UInt8

DILATION = 0.05  # of the crop's side (method.md 7.3)
FEATHER = 0.03  # sigma of the Gaussian, of the crop's side
BORDER = 0.04  # over this part of the crop's side the mask falls to zero at the crop's edge
CROP_BORDER = 0.1  # the same of a mask that is the whole crop: HunyuanPortrait's


def face_mask(
    landmarks: list[Float[np.ndarray, "points 2+"]],
    side: int,
    *,
    dilation: float = DILATION,
    feather: float = FEATHER,
    border: float = BORDER,
) -> Float[np.ndarray, "side side"]:
    """Opacity in [0, 1] of the result over the source, on a crop of ``side`` pixels.

    ``landmarks``: face points in crop coordinates [-1, 1] (x right, y down), one array for each
    face that must be covered (source, result). One well inside the hull; zero on the crop's border unless ``border``
    is 0.
    ``dilation``, ``feather`` (sigma) and ``border`` are parts of the side, in [0, 0.5); 0 leaves that step out.
    """
    # x = 2 (column + 0.5) / side - 1, the crop convention
    points = np.concatenate([(np.asarray(face)[:, :2] + 1) * side / 2 - 0.5 for face in landmarks])
    mask = np.zeros((side, side), np.float32)
    hull = cv2.convexHull(np.round(points).astype(np.int32))
    cv2.fillConvexPoly(mask, hull, 1.0)
    radius = round(dilation * side)
    mask = cv2.dilate(mask, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1,) * 2))
    if feather > 0:
        mask = cv2.GaussianBlur(mask, (0, 0), max(0.5, feather * side))
    return np.clip(mask * crop_mask(side, border=border), 0, 1)


def crop_mask(side: int, *, border: float = CROP_BORDER) -> Float[np.ndarray, "side side"]:
    """Opacity of a whole crop of ``side`` pixels: the distance to its outermost pixels over ``border`` of the side,
    at most 1 (method.md 7.3, HunyuanPortrait's); one everywhere where ``border`` is 0.
    """
    if border == 0:
        return np.ones((side, side), np.float32)
    distance = np.minimum(np.arange(side), np.arange(side)[::-1]) / max(1.0, border * side)
    ramp = np.clip(distance, 0, 1).astype(np.float32)
    return np.minimum(ramp[:, None], ramp[None])


def paste(
    frame: UInt8[np.ndarray, "height width 3"],
    result: UInt8[np.ndarray, "size size 3"],
    crop_box: Float[np.ndarray, " 4"],
    mask: Float[np.ndarray, "side side"],
) -> UInt8[np.ndarray, "height width 3"]:
    """``frame`` with ``result`` blended over its ``crop_box``.

    ``crop_box`` = x0 y0 x1 y1 in pixels of ``frame``, square, edges not centres; it may reach
    beyond the frame, what falls outside is lost. ``result`` and ``mask`` are resized to it. Pixels
    where the mask is 0 are unchanged.
    """
    x0, y0, x1, y1 = (float(value) for value in crop_box)
    height, width = frame.shape[:2]
    left, right = max(0, int(np.floor(x0))), min(width, int(np.ceil(x1)))
    top, bottom = max(0, int(np.floor(y0))), min(height, int(np.ceil(y1)))
    if left >= right or top >= bottom:
        return frame.copy()

    def placed(image: np.ndarray) -> np.ndarray:
        """``image`` sampled at the pixel centres of the visible part of the box."""
        scale_x, scale_y = image.shape[1] / (x1 - x0), image.shape[0] / (y1 - y0)
        # shrink with area averaging first: bilinear sampling alone would alias
        if scale_x > 1:
            side = max(1, round(x1 - x0))
            image = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
            scale_x, scale_y = image.shape[1] / (x1 - x0), image.shape[0] / (y1 - y0)
        columns = (np.arange(left, right) + 0.5 - x0) * scale_x - 0.5
        rows = (np.arange(top, bottom) + 0.5 - y0) * scale_y - 0.5
        grid_x, grid_y = np.meshgrid(columns.astype(np.float32), rows.astype(np.float32))
        return cv2.remap(image, grid_x, grid_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)

    opacity = placed(np.asarray(mask, np.float32))[..., None]
    opacity[opacity < 1 / 512] = 0.0  # below half a grey level: keep the source's own pixel
    pasted = frame.copy()
    region = pasted[top:bottom, left:right]
    blended = opacity * placed(result).astype(np.float32) + (1 - opacity) * region
    region[...] = np.clip(np.round(blended), 0, 255).astype(np.uint8)
    return pasted
