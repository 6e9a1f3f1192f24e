"""Triangles -> pixels: an exact z-buffer written with NumPy's array operations.

Pictures are orthographic, so everything given at vertices (depth, texture coordinates, light) is a
linear function of the pixel within a triangle. Rows of triangles become spans, spans become pixels,
and the nearest triangle of each pixel wins; the work grows with covered pixels, not with triangles.
"""

from __future__ import annotations

import numpy as np

_FAR = np.float32(1e9)
_SLACK = 2e-3  # pixels; spans of neighbours may overlap by this much, but leave no gap


def rasterize(
    points: np.ndarray, triangles: np.ndarray, attributes: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draws the triangles that face the viewer.

    Args:
        points: (N, 3) float32: column and row in pixels (pixel centres at whole numbers), depth.
        triangles: (T, 3), those wound clockwise in the picture (y down) are hidden back sides.
        attributes: (N, A) float32 at the vertices.
        size: side of the square picture.

    Returns:
        pixels (M,) flat indices of covered pixels, each once; depth (M,); the winning triangle's number
        (M,); attributes (M, A) there.
    """
    x, y = points[:, 0], points[:, 1]
    ia, ib, ic = triangles.T
    xa, ya, xb, yb, xc, yc = x[ia], y[ia], x[ib], y[ib], x[ic], y[ic]
    # z into the scene and y down: an outward normal facing the viewer has negative z.
    area = (xb - xa) * (yc - ya) - (yb - ya) * (xc - xa)
    first = np.ceil(np.minimum(np.minimum(ya, yb), yc) - _SLACK)
    last = np.floor(np.maximum(np.maximum(ya, yb), yc) + _SLACK)
    low = np.minimum(np.minimum(xa, xb), xc)
    high = np.maximum(np.maximum(xa, xb), xc)
    first, last = np.maximum(first, 0), np.minimum(last, size - 1)
    shown = (area < -1e-6) & (last >= first) & (high >= 0) & (low <= size - 1)
    chosen = np.flatnonzero(shown)
    if len(chosen) == 0:
        empty = np.zeros(0, np.int64)
        return empty, np.zeros(0, np.float32), empty, np.zeros((0, attributes.shape[1]), np.float32)
    first, last = first[chosen].astype(np.int64), last[chosen].astype(np.int64)
    low, high = low[chosen] - _SLACK, high[chosen] + _SLACK
    xa, ya, xb, yb, xc, yc = (value[chosen] for value in (xa, ya, xb, yb, xc, yc))

    heights = last - first + 1
    row_of = np.repeat(np.arange(len(chosen)), heights)
    row = np.arange(len(row_of)) - np.repeat(np.cumsum(heights) - heights, heights) + first[row_of]
    left, right = low[row_of], high[row_of]
    height = row.astype(np.float32)
    for px, py, qx, qy in ((xa, ya, xb, yb), (xb, yb, xc, yc), (xc, yc, xa, ya)):
        # The inside is on one side of each edge, which one is told by its direction.
        dy = qy - py
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = (qx - px) / dy
        level = np.abs(dy) < 1e-6
        slope[level] = 0.0
        crossing = px[row_of] + slope[row_of] * (height - py[row_of])
        downward = dy[row_of]
        left = np.where(downward > 1e-6, np.maximum(left, crossing - _SLACK), left)
        right = np.where(downward < -1e-6, np.minimum(right, crossing + _SLACK), right)
    start = np.maximum(np.ceil(left), 0).astype(np.int64)
    end = np.minimum(np.floor(right), size - 1).astype(np.int64)
    widths = np.maximum(end - start + 1, 0)
    span_of = np.repeat(np.arange(len(row_of)), widths)
    column = np.arange(len(span_of)) - np.repeat(np.cumsum(widths) - widths - start, widths)
    pixel = row[span_of] * size + column
    triangle = row_of[span_of]

    # Plane equations value = p x + q y + r of depth and attributes, per triangle.
    values = np.concatenate([points[:, 2:3], attributes], axis=1)
    va, vb, vc = (values[triangles[chosen, corner]] for corner in range(3))
    scale = (1.0 / area[chosen])[:, None]
    ab, ac = (vb - va) * scale, (vc - va) * scale
    p = ab * (yc - ya)[:, None] - ac * (yb - ya)[:, None]
    q = ac * (xb - xa)[:, None] - ab * (xc - xa)[:, None]
    r = va - p * xa[:, None] - q * ya[:, None]

    across, down = column.astype(np.float32), height[span_of]
    depth = p[:, 0][triangle] * across + q[:, 0][triangle] * down + r[:, 0][triangle]
    buffer = np.full(size * size, _FAR, np.float32)
    np.minimum.at(buffer, pixel, depth)
    winner = np.full(size * size, -1, np.int64)
    nearest = np.flatnonzero(depth <= buffer[pixel])
    winner[pixel[nearest]] = nearest  # of equal ones the last, always the same
    pixels = np.flatnonzero(winner >= 0)
    winning = winner[pixels]
    triangle, across, down = triangle[winning], across[winning, None], down[winning, None]
    planes = np.stack([p[:, 1:], q[:, 1:], r[:, 1:]], axis=1)
    mixed = planes[triangle]
    result = mixed[:, 0] * across + mixed[:, 1] * down + mixed[:, 2]
    return pixels, depth[winning], chosen[triangle], result
