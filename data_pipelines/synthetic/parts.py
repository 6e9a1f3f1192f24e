"""The parts of a head that are not its skin: eyeballs, teeth, tongue, mouth cavity, ears, neck and body.

Every function returns a `Piece`: a grid of vertices of its own in canonical coordinates. `level` doubles
the number of rows and columns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data_pipelines.synthetic import mesh
from data_pipelines.synthetic.template import smooth

# Patches of the texture below the head's skin: left, top, right, bottom in [0, 1].
PATCHES = {
    "ear": (0.02, 0.69, 0.18, 0.73),
    "eye": (0.02, 0.76, 0.18, 0.92),
    "teeth": (0.02, 0.945, 0.07, 0.985),
    "tongue": (0.09, 0.945, 0.115, 0.985),
    "cavity": (0.14, 0.945, 0.18, 0.985),
    "body": (0.21, 0.69, 0.60, 0.985),
    "hair": (0.63, 0.69, 0.98, 0.985),
}
BODY_TOP, BODY_BOTTOM = 0.12, 2.6  # canonical y of the body's first and last ring


class Piece(NamedTuple):
    """vertices (N, 3), triangles (T, 3), uv (N, 2) in [0, 1] of the whole texture, occlusion (N,)."""

    vertices: np.ndarray
    triangles: np.ndarray
    uv: np.ndarray
    occlusion: np.ndarray


def piece(grid: np.ndarray, uv: np.ndarray, occlusion, patch: str, centre, *, closed=True) -> Piece:
    """A (rows, columns, 3) grid of vertices, with (rows, columns, 2) coordinates within a patch."""
    rows, columns = grid.shape[:2]
    vertices = grid.reshape(-1, 3)
    triangles = mesh.grid_triangles(rows, columns, closed=closed)
    triangles = mesh.outward(vertices, triangles, np.asarray(centre, float))
    left, top, right, bottom = PATCHES[patch]
    placed = uv.reshape(-1, 2) * (right - left, bottom - top) + (left, top)
    shade = np.broadcast_to(occlusion, (rows, columns)).reshape(-1)
    return Piece(vertices, triangles, placed, shade)


def steps(count: int) -> np.ndarray:
    """0 .. 1 in `count` equal steps."""
    return np.linspace(0, 1, count)


def turns(count: int) -> np.ndarray:
    """0 .. 2 pi without the end."""
    return np.arange(count) * (2 * np.pi / count)


def eyeball(radius: float, level: int) -> Piece:
    """About the origin, looking along -z; the texture holds the iris in its middle."""
    polar = np.deg2rad([0, 8, 16, 22, 28, 42, 58, 78] if level else [0, 12, 22, 40, 75])[:, None]
    angle = turns(10 + 6 * level)[None]
    grid = np.stack(
        np.broadcast_arrays(
            np.sin(polar) * np.cos(angle), np.sin(polar) * np.sin(angle), -np.cos(polar)
        ),
        -1,
    )
    away = np.sqrt(polar / np.deg2rad(80)) * 0.48  # the iris takes half of the patch's width
    uv = 0.5 + np.stack(np.broadcast_arrays(away * np.cos(angle), away * np.sin(angle)), -1)
    return piece(grid * radius, uv, 0.85, "eye", (0, 0, 0))


def teeth(lip: np.ndarray, level: int, upper: bool) -> Piece:
    """A dental arch behind `lip`, the neutral point (3,) in the middle of that lip's inner edge."""
    across = np.linspace(-1, 1, 13 + 8 * level)[None]
    rows = 3 + level
    down = steps(rows)[:, None]
    x = 0.105 * across * (1.0 if upper else 0.9)
    z = lip[2] + (0.030 if upper else 0.042) + 5.0 * x**2
    edge, gum = (0.012, -0.060) if upper else (0.010, 0.062)
    y = lip[1] + gum + (edge - gum) * down + 0.012 * across**2 * (-1 if upper else 0.3)
    z = z + 0.010 * (1 - down) ** 2
    grid = np.stack(np.broadcast_arrays(x, y, z), -1)
    uv = np.stack(np.broadcast_arrays((across + 1) / 2, down), -1)
    shade = 1.0 - 0.5 * np.abs(across) ** 1.5 - 0.25 * (1 - down)
    return piece(grid, uv, shade, "teeth", (0, lip[1], 0.3), closed=False)


def tongue(lip: np.ndarray, level: int) -> Piece:
    """Behind the lower teeth."""
    around, along = turns(10 + 4 * level)[None], np.linspace(0, np.pi, 6 + 2 * level)[:, None]
    x = 0.075 * np.sin(along) ** 0.7 * np.cos(around)
    y = lip[1] + 0.045 + 0.030 * np.sin(along) ** 0.7 * np.sin(around)
    y = y + 0.008 * (1 - np.minimum(np.abs(x) / 0.02, 1))
    z = lip[2] + 0.175 - 0.105 * np.cos(along)
    grid = np.stack(np.broadcast_arrays(x, y, z), -1)
    uv = np.stack(np.broadcast_arrays(around / 7, along / np.pi), -1)
    shade = np.broadcast_to(0.95 - 0.55 * (along / np.pi), grid.shape[:2])
    return piece(grid, uv, shade, "tongue", (0, lip[1] + 0.045, lip[2] + 0.175))


# Rings of the cavity, from the lips inwards: scale about the middle of the mouth, depth behind it.
_CAVITY = np.array([(1.12, 0.012), (1.25, 0.06), (1.1, 0.14), (0.6, 0.20), (0.0, 0.22)])


def cavity(inner_lips: np.ndarray) -> np.ndarray:
    """(20, 3) points of the inner lips -> (5, 20, 3) rings of the mouth's wall."""
    middle = inner_lips.mean(0)
    scaled = middle + (inner_lips - middle) * _CAVITY[:, None, :1]
    scaled[..., 2] += _CAVITY[:, None, 1]
    return scaled


def cavity_piece(inner_lips: np.ndarray) -> Piece:
    """The wall of the mouth; it is seen from within."""
    grid = cavity(inner_lips)
    uv = np.stack(np.broadcast_arrays(turns(20)[None] / 7, steps(5)[:, None]), -1)
    made = piece(grid, uv, np.array([[0.8, 0.6, 0.35, 0.2, 0.15]]).T, "cavity", (0, 0, 0))
    opened = inner_lips.copy()
    opened[1:10, 1] += 0.2  # closed lips enclose nothing that could tell inside from outside
    tube = cavity(opened)
    triangles = mesh.outward(tube.reshape(-1, 3), made.triangles, tube.mean(axis=(0, 1)))
    return made._replace(triangles=triangles[:, [0, 2, 1]])


def ear(side: int, size: float, flare: float, level: int) -> Piece:
    """The ear at x = side * ..., with helix, bowl and lobe, and its back."""
    rim = np.array([0.0, 0.30, 0.52, 0.70, 0.84, 0.95, 1.0, 0.90, 0.60])
    relief = np.array([-0.020, -0.020, -0.010, 0.006, 0.002, 0.016, 0.006, -0.018, -0.050])
    shade = np.array([0.45, 0.55, 0.75, 0.95, 0.72, 1.0, 0.95, 0.6, 0.4])
    angle = turns(18 + 10 * level)[None]
    up, back = np.cos(angle), np.sin(angle)
    width = 0.078 * (1 + 0.16 * up) * np.where(back < 0, 0.62, 1.0)
    y = -0.145 * up * rim[:, None]
    behind = width * back * rim[:, None]
    out = relief[:, None] * (0.7 + 0.3 * back) + 0.62 * (0.6 + flare) * (behind + 0.03)
    tilt = 0.22
    z = 0.045 + size * (behind * np.cos(tilt) - y * np.sin(tilt))
    x = side * (0.375 + size * np.broadcast_to(out, behind.shape))
    grid = np.stack([x, 0.005 + size * (y * np.cos(tilt) + behind * np.sin(tilt)), z], -1)
    uv = np.stack(np.broadcast_arrays(angle / 7, (rim * 0.9)[:, None]), -1)
    centre = (side * 0.30, 0.0, 0.06)
    return piece(grid, uv, np.broadcast_to(shade[:, None], grid.shape[:2]), "ear", centre)


def body(width: float, neck: float, collar: float, level: int) -> Piece:
    """Neck, shoulders and chest; the texture's rows go from the neck down."""
    heights = [0.12, 0.26, 0.36, 0.46, 0.53, 0.59, 0.64, 0.69, 0.76, 0.86, 1.02, 1.3, 1.7, 2.6]
    half = [0.25, 0.25, 0.25, 0.25, 0.265, 0.29, 0.34, 0.43, 0.60, 0.78, 0.88, 0.90, 0.86, 0.86]
    deep = [0.23, 0.23, 0.23, 0.235, 0.24, 0.245, 0.25, 0.26, 0.28, 0.31, 0.34, 0.36, 0.36, 0.36]
    centre = [0.10, 0.11, 0.13, 0.15, 0.165, 0.175, 0.18, 0.185, 0.19, 0.19, 0.17, 0.15, 0.15, 0.15]
    if level == 0:
        y = np.array(heights)
    else:
        y = np.interp(np.linspace(0, 13, 14 * (1 + level)), np.arange(14), heights)
    half, deep, middle = (np.interp(y, heights, value) for value in (half, deep, centre))
    on_neck = smooth(0.66, 0.50, y)
    half = half * (on_neck * neck + (1 - on_neck) * width)
    deep = deep * (on_neck * neck + (1 - on_neck) * (0.5 + 0.5 * width))
    cloth = collar * smooth(0.56, 0.62, y)
    angle = turns(20 + 12 * level)[None]
    sine, cosine = np.sin(angle), np.cos(angle)
    rounded = (half + cloth)[:, None] * np.sign(sine) * np.abs(sine) ** 0.9
    z = middle[:, None] - (deep + cloth)[:, None] * np.sign(cosine) * np.abs(cosine) ** 0.85
    # Clavicles and the hollow of the throat lie lower in front than the nape behind.
    drop = (
        0.10 * smooth(0.45, 0.65, y)[:, None] * (0.5 + 0.5 * cosine) * smooth(1.2, 0.8, y)[:, None]
    )
    grid = np.stack(np.broadcast_arrays(rounded, y[:, None] + drop, z), -1)
    down = np.clip((y - BODY_TOP) / (1.5 - BODY_TOP), 0, 1)
    across = np.abs(np.where(angle > np.pi, 2 * np.pi - angle, angle)) / np.pi  # mirrored: no seam
    uv = np.stack(np.broadcast_arrays(across, down[:, None]), -1)
    shade = 1 - 0.62 * smooth(0.62, 0.30, y)[:, None] * np.ones_like(cosine)
    return piece(grid, uv, shade, "body", (0, 0.9, 0.17))


def body_follow(vertices: np.ndarray) -> np.ndarray:
    """(N,) how much a point of the neck moves with the body (1) and not with the head (0)."""
    return smooth(0.22, 0.66, vertices[:, 1])
