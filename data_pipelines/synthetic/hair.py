"""Hair: a shell that grows out of the head, a curtain for long hair, a bun.

Where the shell lies below the skin there is no hair: the hairline is where the two surfaces meet. The
same hairline tints the skin's texture.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from data_pipelines.synthetic import parts, template
from data_pipelines.synthetic.template import smooth

CENTRE = np.array([0.0, -0.16, 0.04])


class Style(NamedTuple):
    """How somebody wears the hair. Lengths are canonical units.

    Attributes:
        top, sides: thickness above and at the sides.
        recede: how far the hairline in front lies back; negative for a fringe.
        bald: a bald crown above a ring of hair.
        length: y down to which it hangs; 0 for hair that does not hang.
        curl: size of irregular bumps. `strands`: of bumps that run down the hair.
        parting: where it is parted, in -1 .. 1; volume goes to the other side.
        bun: radius of a bun at the back of the crown, or 0.
        seed: of the bumps.
    """

    top: float
    sides: float
    recede: float
    bald: bool
    length: float
    curl: float
    strands: float
    parting: float
    bun: float
    seed: int


def sample_style(rng: np.random.Generator) -> Style:
    """One of several kinds of hair, each with variations."""
    kind = rng.choice(
        ["bald", "ring", "buzz", "short", "quiff", "bob", "long", "fringe", "afro", "bun"],
        p=[0.05, 0.06, 0.09, 0.20, 0.11, 0.12, 0.16, 0.09, 0.06, 0.06],
    )
    u = rng.uniform
    top, sides, recede, length, curl, strands, bun = 0.07, 0.035, 0.0, 0.0, 0.004, 0.006, 0.0
    parting = float(u(-0.8, 0.8))
    recede = u(-0.01, 0.05)
    if kind == "bald":
        top, sides = -1.0, -1.0
    elif kind == "ring":
        top, sides, recede = 0.02, 0.03, 0.0
    elif kind == "buzz":
        top, sides, strands, curl, recede = 0.018, 0.014, 0.0, 0.002, u(-0.01, 0.08)
    elif kind == "short":
        top, sides = u(0.045, 0.09), u(0.02, 0.045)
    elif kind == "quiff":
        top, sides, strands = u(0.10, 0.15), u(0.015, 0.03), 0.009
    elif kind == "bob":
        top, sides, length, strands = u(0.06, 0.10), u(0.06, 0.09), u(0.36, 0.55), 0.008
    elif kind == "long":
        top, sides, length, strands = u(0.05, 0.09), u(0.05, 0.08), u(0.7, 1.2), 0.010
        curl = u(0.004, 0.015)
    elif kind == "fringe":
        top, sides, recede, strands = u(0.05, 0.08), u(0.04, 0.07), u(-0.16, -0.10), 0.008
        length = u(0.4, 1.0) if rng.random() < 0.6 else 0.0
    elif kind == "afro":
        top, sides, curl, strands = u(0.13, 0.24), u(0.10, 0.20), u(0.014, 0.022), 0.0
    else:
        top, sides, bun = u(0.03, 0.05), u(0.02, 0.03), u(0.10, 0.14)
    seed = int(rng.integers(1 << 31))
    return Style(top, sides, recede, kind == "ring", length, curl, strands, parting, bun, seed)


def hairline(angle: np.ndarray, style: Style) -> np.ndarray:
    """Canonical y of the lower edge of the hair at `angle` (radians from the front, either sign)."""
    at = [0, 0.45, 0.8, 1.0, 1.12, 1.22, 1.34, 1.46, 1.6, 1.85, 2.05, 2.3, np.pi]
    line = [-0.405, -0.40, -0.36, -0.27, -0.15, -0.02, 0.02, -0.10, -0.15, -0.12, 0.02, 0.16, 0.24]
    edge = np.interp(np.abs(angle), at, line)
    front = smooth(1.05, 0.6, np.abs(angle))
    temple = np.exp(-0.5 * np.square((np.abs(angle) - 0.7) / 0.25))
    wave = np.random.default_rng((style.seed, 4)).uniform(0, 2 * np.pi, 4)
    edge = edge + 0.010 * np.sin(9 * angle + wave[0]) + 0.008 * np.sin(23 * angle + wave[1])
    if style.length > 0:  # long hair covers the ears
        edge = edge + 0.30 * smooth(1.12, 1.35, np.abs(angle)) * smooth(2.3, 2.0, np.abs(angle))
    if style.recede >= 0:
        return edge - style.recede * (0.5 * front + 1.3 * temple)
    return edge - style.recede * (front + 0.3 * temple)


def coverage(points: np.ndarray, style: Style) -> np.ndarray:
    """(..., 3) canonical points of the head's surface -> how deep they lie in the hair, canonical units."""
    if style.top < 0:
        return np.full(points.shape[:-1], -1.0)
    angle = np.arctan2(points[..., 0], -(points[..., 2] - template.AXIS_Z))
    inside = hairline(angle, style) - points[..., 1]
    if style.bald:
        ring = points[..., 1] + 0.26 - 0.6 * smooth(1.6, 1.0, np.abs(angle))
        inside = np.minimum(inside, ring)
    return inside


@functools.cache
def _scalp(level: int) -> tuple[np.ndarray, np.ndarray]:
    """Directions (rows, columns, 3) from `CENTRE` and the head's surface there, crown first."""
    columns, rows = (36, 18) if level == 0 else (34 + 30 * level, 14 + 14 * level)
    azimuth = parts.turns(columns)[None] + np.pi  # the seam is at the back
    elevation = np.deg2rad(np.linspace(89.5, -55, rows))[:, None]
    directions = np.stack(
        np.broadcast_arrays(
            np.cos(elevation) * np.sin(azimuth),
            -np.sin(elevation),
            -np.cos(elevation) * np.cos(azimuth),
        ),
        -1,
    )
    head = template.head()
    surface = head.refine(head.points, 1) - CENTRE
    distance = np.linalg.norm(surface, axis=1)
    alike = directions.reshape(-1, 3) @ (surface / distance[:, None]).T
    nearest = np.argpartition(-alike, 5, axis=1)[:, :5]
    weight = 1 / (1 - np.take_along_axis(alike, nearest, 1) + 2e-4)
    radius = (weight * distance[nearest]).sum(1) / weight.sum(1)
    return directions, CENTRE + directions * radius.reshape(rows, columns, 1)


def _bumps(shape: tuple[int, int], style: Style) -> np.ndarray:
    """Irregularities of a (rows, columns) grid that goes round: the same ones at every resolution."""
    rng = np.random.default_rng((style.seed, 5))
    v, u = np.linspace(0, 1, shape[0])[:, None], parts.turns(shape[1])[None]
    result = np.zeros(shape)
    for _ in range(10):
        across, down = rng.integers(3, 11), rng.uniform(2, 9)
        phase = rng.uniform(0, 2 * np.pi, 2)
        result += style.curl * np.sin(across * u + phase[0]) * np.sin(down * np.pi * v + phase[1])
    for _ in range(6):
        across, phase, bend = rng.integers(5, 16), rng.uniform(0, 2 * np.pi), rng.uniform(-1.5, 1.5)
        result += 0.5 * style.strands * np.sin(across * u + phase + bend * v) * smooth(0, 0.3, v)
    return result


def _uv(rows: int, columns: int, first: float, last: float) -> np.ndarray:
    u = parts.turns(columns)[None] / np.pi
    u = np.where(u > 1, 2 - u, u)  # to and fro: no seam
    return np.stack(np.broadcast_arrays(u, np.linspace(first, last, rows)[:, None]), -1)


def shell(style: Style, level: int) -> parts.Piece | None:
    """The hair on the head, or None for nobody's."""
    if style.top < 0:
        return None
    directions, scalp = _scalp(level)
    inside = coverage(scalp, style)
    angle = np.arctan2(scalp[..., 0], -(scalp[..., 2] - template.AXIS_Z))
    up = smooth(-0.15, -0.55, scalp[..., 1])
    thick = style.sides + (style.top - style.sides) * up
    lean = np.tanh(6 * (scalp[..., 0] - 0.25 * style.parting)) * -np.sign(style.parting)
    thick = thick * (1 + 0.25 * lean * up * (style.curl < 0.01))
    forward = 1 - 0.45 * smooth(1.0, 0.2, np.abs(angle)) * (style.curl < 0.01) * (style.top < 0.10)
    soft = 0.06 + 1.0 * thick
    grown = thick * forward * smooth(0, 1, np.clip(inside / soft, 0, 1) ** 0.7)
    under = 0.05 * smooth(0.0, -0.05, inside)
    bumps = _bumps(inside.shape, style) * smooth(0.0, 0.06, inside)
    lift = np.where(inside > 0, 0.004 + grown, 0.004 - under) + bumps
    grid = scalp + directions * lift[..., None]
    if style.length > 0:
        hanging = smooth(1.05, 1.4, np.abs(angle)) * smooth(-0.30, -0.05, scalp[..., 1])
        beyond = (0.055 * hanging * smooth(-0.02, 0.05, inside))[..., None]
        grid += beyond * np.sign(grid) * np.array([1.0, 0.0, 0.0])
    rows, columns = inside.shape
    shade = np.clip(0.55 + 5 * lift + 12 * bumps, 0.45, 1.0)
    made = parts.piece(grid, _uv(rows, columns, 0.0, 0.6), shade, "hair", CENTRE)
    # Without hair there must be no surface either: it would show in the open mouth.
    face = (inside < -0.06) & (scalp[..., 2] < -0.10) & (scalp[..., 1] > 0.08)
    face &= np.abs(scalp[..., 0]) < 0.22
    grown = ~face.reshape(-1)[made.triangles].any(axis=1)
    return made._replace(triangles=made.triangles[grown])


def curtain(style: Style, level: int) -> parts.Piece | None:
    """Hair that hangs down beside and behind the neck, with an outside and an inside."""
    if style.length <= 0:
        return None
    columns, rows = 22 + 14 * level, 8 + 5 * level
    rng = np.random.default_rng((style.seed, 6))
    open_angle = 1.18
    angle = np.linspace(open_angle, 2 * np.pi - open_angle, columns)[None]
    v = parts.steps(rows)[:, None]
    ends = style.length - 0.10 * smooth(1.9, 1.2, np.minimum(angle, 2 * np.pi - angle))
    wave, phase = rng.uniform(1.5, 4.0), rng.uniform(0, 2 * np.pi, 8)
    for number in range(4):
        ends = ends + 0.010 * np.sin((7 + 5 * number) * angle + phase[number])
    start = -0.20
    y = start + (ends - start) * v
    falls = smooth(0.15, 0.9, y)
    thick = style.sides
    half = 0.385 + thick - 0.05 * falls + 0.02 * np.sin(np.pi * v)
    deep = 0.43 + thick - 0.16 * falls
    ripple = 0.6 * style.strands * np.sin(9 * angle + phase[5] + 2 * v)
    ripple = ripple + 0.5 * style.strands * np.sin(17 * angle + phase[6])
    ripple = ripple + style.curl * np.sin(wave * np.pi * v * 2 + 3 * angle + phase[4])
    # Its free edges in front lie on the head at the top and turn inwards below.
    edge = smooth(0.35, 0.0, np.minimum(angle - open_angle, 2 * np.pi - open_angle - angle))
    turned = 1 - 0.10 * edge * (1 - 0.7 * v)
    taper = smooth(0.0, 0.12, v)
    radius = turned * (0.97 + 0.03 * taper)
    x = (half + ripple) * radius * np.sin(angle)
    z = template.AXIS_Z - (deep + ripple) * radius * np.cos(angle) + 0.02 * v
    outside = np.stack(np.broadcast_arrays(x, y, z), -1)
    inner = (1 - 0.03 * smooth(0, 0.1, v)) * np.array(0.95)
    inside = np.stack(
        np.broadcast_arrays(x * inner, y, template.AXIS_Z + (z - template.AXIS_Z) * inner), -1
    )
    u = parts.steps(columns)[None]
    uv = np.stack(np.broadcast_arrays(u, 0.3 + 0.7 * v), -1)
    shade = np.clip(0.85 + 10 * ripple, 0.55, 1.0) * (1 - 0.35 * edge)
    middle = (0, float(y.mean()), 0.0)
    outer = parts.piece(outside, uv, shade, "hair", middle, closed=False)
    lining = parts.piece(inside, uv, 0.32 * shade, "hair", middle, closed=False)
    return join([outer, lining._replace(triangles=lining.triangles[:, [0, 2, 1]])])


def bun(style: Style, level: int) -> parts.Piece | None:
    """A ball of hair on the back of the crown."""
    if style.bun <= 0:
        return None
    around, along = parts.turns(12 + 8 * level)[None], np.linspace(0, np.pi, 8 + 4 * level)[:, None]
    radius = style.bun * (1 + 0.07 * np.sin(3 * around + 4 * along))
    grid = np.stack(
        np.broadcast_arrays(
            radius * np.sin(along) * np.cos(around),
            radius * 0.85 * -np.cos(along),
            radius * np.sin(along) * np.sin(around),
        ),
        -1,
    )
    grid = grid + np.array([0.0, -0.70 - 0.35 * style.bun, 0.16])
    uv = _uv(*grid.shape[:2], 0.0, 1.0)
    return parts.piece(grid, uv, 0.9, "hair", grid.mean(axis=(0, 1)))


def join(pieces: list[parts.Piece]) -> parts.Piece:
    """Several pieces as one."""
    starts = np.cumsum([0] + [len(one.vertices) for one in pieces[:-1]])
    triangles = [one.triangles + start for one, start in zip(pieces, starts, strict=True)]
    return parts.Piece(
        np.concatenate([one.vertices for one in pieces]),
        np.concatenate(triangles),
        np.concatenate([one.uv for one in pieces]),
        np.concatenate([one.occlusion for one in pieces]),
    )


def hair(style: Style, level: int) -> parts.Piece | None:
    """All of somebody's hair, or None."""
    pieces = [make(style, level) for make in (shell, curtain, bun)]
    pieces = [one for one in pieces if one is not None]
    return join(pieces) if pieces else None
