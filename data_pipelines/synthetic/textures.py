"""Paint: the texture of one person's skin, eyes, teeth, hair and clothes, and the background.

The head's skin is unrolled into the upper two thirds of the texture (`template.skin_coordinates`), other
parts have patches below (`parts.PATCHES`). Texture coordinates belong to mesh points, so what is painted
by their numbers - lips, brows, lashes - stays on them whatever the shape and the expression.
"""

from __future__ import annotations

import cv2
import numpy as np

from data_pipelines.prepare.masks import LANDMARKS_OF
from data_pipelines.synthetic import hair, parts, template
from data_pipelines.synthetic.looks import Looks
from data_pipelines.synthetic.template import smooth

_UPPER_EDGE = {
    "right_eye": (33, 246, 161, 160, 159, 158, 157, 173, 133),
    "left_eye": (263, 466, 388, 387, 386, 385, 384, 398, 362),
}
_LOWER_EDGE = {
    "right_eye": (33, 7, 163, 144, 145, 153, 154, 155, 133),
    "left_eye": (263, 249, 390, 373, 374, 380, 381, 382, 362),
}
_NOSTRILS = ((238, 20, 60, 75), (458, 250, 290, 305))


def side_for(size: int) -> int:
    """Side of the texture for pictures of `size` pixels."""
    return 192 if size <= 96 else 512 if size <= 320 else 1024


def paint(looks: Looks, side: int) -> np.ndarray:
    """(side, side, 3) float32 RGB, 0..1 and a little more."""
    canvas = np.empty((side, side, 3), np.float32)
    canvas[:] = looks.skin
    rows = round(side * template.SKIN_HEIGHT)
    canvas[:rows] = _skin(looks, side)[:rows]
    _fill(canvas, "ear", lambda u, v: looks.skin * (1.02, 0.93, 0.92))
    _fill(canvas, "eye", lambda u, v: _eye(looks, u, v))
    _fill(canvas, "teeth", lambda u, v: _teeth(looks, u, v))
    _fill(canvas, "tongue", lambda u, v: np.array([0.70, 0.33, 0.33]))
    _fill(canvas, "cavity", lambda u, v: np.array([0.42, 0.13, 0.12]))
    _fill(canvas, "body", lambda u, v: _body(looks, u, v))
    _fill(canvas, "hair", lambda u, v: _hair(looks, u, v))
    return np.clip(canvas, 0, 1.2)


def _fill(canvas: np.ndarray, patch: str, colour) -> None:
    """Paints a patch and a margin about it with colour(u, v), u and v in [0, 1] within the patch."""
    side = canvas.shape[0]
    left, top, right, bottom = parts.PATCHES[patch]
    margin = 0.009
    x0, y0, x1, y1 = (
        round(value * side)
        for value in (left - margin, top - margin, right + margin, min(bottom + margin, 1))
    )
    u = (((np.arange(x0, x1) + 0.5) / side - left) / (right - left))[None, :]
    v = (((np.arange(y0, y1) + 0.5) / side - top) / (bottom - top))[:, None]
    canvas[y0:y1, x0:x1] = colour(u, v)


def _noise(rng: np.random.Generator, cells: int, side: int) -> np.ndarray:
    """(side, side) smooth noise of `cells` x `cells` knots, the same picture at every side."""
    knots = rng.normal(size=(cells, cells)).astype(np.float32)
    return cv2.resize(knots, (side, side), interpolation=cv2.INTER_CUBIC)


def _mask(side: int, points: np.ndarray, blur: float) -> np.ndarray:
    """A filled polygon of texture coordinates with a soft edge of `blur` texture sides."""
    mask = np.zeros((side, side), np.uint8)
    pixels = np.round((points * side - 0.5) * 16).astype(np.int32)
    cv2.fillPoly(mask, [pixels], 255, lineType=cv2.LINE_AA, shift=4)
    return _soft(mask, blur * side)


def _line(side: int, points: np.ndarray, width: float, blur: float) -> np.ndarray:
    mask = np.zeros((side, side), np.uint8)
    pixels = np.round((points * side - 0.5) * 16).astype(np.int32)
    cv2.polylines(
        mask, [pixels], False, 255, max(1, round(width * side)), lineType=cv2.LINE_AA, shift=4
    )
    strength = min(1.0, width * side)  # thinner than a pixel: fainter
    return strength * _soft(mask, blur * side)


def _soft(mask: np.ndarray, sigma: float) -> np.ndarray:
    if sigma > 0.3:
        mask = cv2.GaussianBlur(mask, (0, 0), sigma)
    return mask.astype(np.float32) / 255


def _blend(canvas: np.ndarray, mask: np.ndarray, colour) -> None:
    """Paints over `canvas` in place where `mask` (side, side) is 1."""
    rows, columns = np.flatnonzero(mask.max(1) > 0.004), np.flatnonzero(mask.max(0) > 0.004)
    if len(rows) == 0:
        return
    area = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    part = mask[area][..., None]
    canvas[area] += part * (np.asarray(colour, np.float32) - canvas[area])


def _skin(looks: Looks, side: int) -> np.ndarray:
    rng = np.random.default_rng((looks.seed, 11))
    uv = template.head().uv[0]
    canvas = np.empty((side, side, 3), np.float32)
    tone = 1 + 0.022 * _noise(rng, 9, side) + 0.016 * _noise(rng, 40, side)
    tone += looks.roughness * _noise(rng, 150, side)
    canvas[:] = tone[..., None] * looks.skin
    rows, columns = np.mgrid[:side, :side].astype(np.float32) / side

    def spot(number: int, width: float, height: float) -> np.ndarray:
        x, y = uv[number]
        return np.exp(-0.5 * (((columns - x) / width) ** 2 + ((rows - y) / height) ** 2))

    red = looks.skin * (1.03, 0.80, 0.78)
    for number in (50, 280):
        _blend(canvas, looks.blush * spot(number, 0.045, 0.035), red)
    _blend(canvas, 0.55 * looks.blush * spot(4, 0.02, 0.03), red)
    for number in (119, 348):
        _blend(canvas, looks.tired * spot(number, 0.032, 0.012), looks.skin * (0.72, 0.62, 0.66))
    if looks.freckles > 0:
        dots = (_noise(rng, 230, side) > 1.8).astype(np.float32)
        dots *= np.clip(spot(50, 0.07, 0.05) + spot(280, 0.07, 0.05) + spot(4, 0.05, 0.05), 0, 1)
        _blend(canvas, looks.freckles * dots, looks.skin * (0.68, 0.55, 0.48))
    _wrinkles(canvas, looks, uv)
    _beard(canvas, looks, uv, rng)
    _lips(canvas, looks, uv)
    for numbers in _NOSTRILS:
        centre = uv[list(numbers)].mean(0)
        angle = parts.turns(14)
        hole = centre + np.stack([0.0105 * np.cos(angle), 0.0055 * np.sin(angle)], -1)
        _blend(canvas, 0.85 * _mask(side, hole, 0.003), looks.skin * 0.16)
    _eyes(canvas, looks, uv)
    _brows(canvas, looks, uv, rng)
    _scalp(canvas, looks, rng)
    return canvas


def _wrinkles(canvas: np.ndarray, looks: Looks, uv: np.ndarray) -> None:
    side, dark = canvas.shape[0], looks.skin * (0.70, 0.60, 0.56)
    strength = np.clip(0.10 + 0.45 * looks.age, 0, 0.6)
    for numbers in ((129, 203, 206, 216), (358, 423, 426, 436)):
        _blend(canvas, strength * _line(side, uv[list(numbers)], 0.005, 0.004), dark)
    if looks.age > 0.25:
        for y in (0.0, 0.022, 0.044):
            line = uv[[104, 108, 151, 337, 333]] - (0, y - 0.012)
            _blend(canvas, 0.5 * (looks.age - 0.2) * _line(side, line, 0.003, 0.003), dark)


def _beard(canvas: np.ndarray, looks: Looks, uv: np.ndarray, rng: np.random.Generator) -> None:
    if looks.beard == "none":
        return
    side = canvas.shape[0]
    jaw = (132, 58, 172, 136, 150, 149, 176, 148, 152, 377, 400, 378, 379, 365, 397, 288, 361)
    inner = (401, 435, 432, 410, 391, 326, 2, 97, 165, 186, 212, 215, 177)
    if looks.beard in ("full", "stubble"):
        area = uv[list(jaw + inner)].copy()
        area[: len(jaw), 1] += 0.05
    else:
        area = uv[[216, 165, 97, 2, 326, 391, 436, 432, 364, 378, 152, 149, 135, 212]].copy()
        area[8:13, 1] += 0.03
        if looks.beard == "moustache":
            area = uv[[216, 206, 165, 97, 2, 326, 391, 426, 436, 410, 0, 186]]
    mask = _mask(side, area, 0.010)
    lips = _mask(side, uv[list(LANDMARKS_OF["outer_lips"])], 0.004)
    grain = 0.85 + 0.15 * _noise(rng, 120, side)
    mask = np.clip(mask * grain, 0, 1) * (1 - lips)
    amount = 0.33 if looks.beard == "stubble" else 0.90
    _blend(canvas, amount * mask, looks.beard_colour)


def _lips(canvas: np.ndarray, looks: Looks, uv: np.ndarray) -> None:
    side = canvas.shape[0]
    outer = uv[list(LANDMARKS_OF["outer_lips"])]
    _blend(canvas, _mask(side, outer, 0.003), looks.lips)
    upper = np.concatenate([outer[10:], outer[:1]])
    inner = uv[[78, *template.UPPER_INNER_LIP, 308]]
    _blend(canvas, 0.30 * _mask(side, np.concatenate([upper, inner]), 0.004), looks.lips * 0.7)
    for numbers in (template.UPPER_INNER_LIP, template.LOWER_INNER_LIP):
        line = uv[[78, *numbers, 308]]
        _blend(canvas, 0.75 * _line(side, line, 0.0045, 0.0015), looks.lips * (0.45, 0.32, 0.32))


def _eyes(canvas: np.ndarray, looks: Looks, uv: np.ndarray) -> None:
    side = canvas.shape[0]
    for eye in ("right_eye", "left_eye"):
        upper, lower = uv[list(_UPPER_EDGE[eye])], uv[list(_LOWER_EDGE[eye])]
        fold = upper + (0, -0.017)
        fold[[0, -1], 1] += 0.010
        dark = looks.skin * (0.62, 0.52, 0.50)
        lid = np.concatenate([upper, fold[::-1]])
        if looks.shadow > 0:
            _blend(canvas, looks.shadow * _mask(side, lid, 0.006), looks.shadow_colour)
        _blend(canvas, 0.55 * _line(side, fold, 0.003, 0.003), dark)
        _blend(canvas, 0.45 * _line(side, lower, 0.006, 0.002), looks.skin * (0.80, 0.55, 0.52))
        width = 0.0065 + 0.0045 * looks.lashes
        _blend(canvas, 0.9 * _line(side, upper, width, 0.0012), np.array([0.10, 0.07, 0.06]))
        _blend(
            canvas,
            0.35 * looks.lashes * _line(side, lower[:7], 0.004, 0.001),
            np.array([0.12, 0.08, 0.07]),
        )


def _brows(canvas: np.ndarray, looks: Looks, uv: np.ndarray, rng: np.random.Generator) -> None:
    side = canvas.shape[0]
    for name in ("right_brow", "left_brow"):
        outline = uv[list(LANDMARKS_OF[name])]
        middle = (outline[:5] + outline[:4:-1]) / 2  # lower and upper edge run opposite ways
        taper = np.array([0.35, 0.75, 1.0, 1.0, 0.8])[:, None]  # from the outer end inwards
        thick = (outline - np.concatenate([middle, middle[::-1]])) * looks.brow_width
        thick *= np.concatenate([taper, taper[::-1]])
        area = np.concatenate([middle, middle[::-1]]) + thick
        mask = _mask(side, area, 0.0035) * np.clip(0.95 + 0.25 * _noise(rng, 110, side), 0, 1)
        _blend(canvas, looks.brow_strength * mask, looks.brow_colour)


def _scalp(canvas: np.ndarray, looks: Looks, rng: np.random.Generator) -> None:
    """Tints the skin where hair grows, so that the hairline is soft."""
    side = canvas.shape[0]
    step = 48  # coverage on a coarse grid of the texture, from the unrolled points
    grid = (np.stack(np.meshgrid(np.arange(step), np.arange(step)), -1) + 0.5) / step
    angle_of = np.interp(grid[..., 0], *_unrolled_angles())
    y = template.height_of(grid[..., 1])
    inside = hair.coverage(
        np.stack([np.sin(angle_of), y, template.AXIS_Z - np.cos(angle_of)], -1), looks.hair
    )
    wide = cv2.resize(inside.astype(np.float32), (side, side), interpolation=cv2.INTER_LINEAR)
    ragged = wide + 0.012 * _noise(rng, 90, side)
    strength = smooth(-0.015, 0.03, ragged).astype(np.float32)
    strength[round(side * template.SKIN_HEIGHT) :] = 0
    dense = 0.9 if looks.hair.top > 0.03 or looks.hair.bald else 0.72
    _blend(canvas, dense * strength, looks.hair_colour * 0.75)


def _unrolled_angles() -> tuple[np.ndarray, np.ndarray]:
    angle = np.linspace(-np.pi, np.pi, 200)
    ring = np.stack([np.sin(angle), np.zeros(200), template.AXIS_Z - np.cos(angle)], -1)
    return template.skin_coordinates(ring)[:, 0], angle


def _eye(looks: Looks, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    away = np.sqrt(np.square(u - 0.5) + np.square(v - 0.5)) / 0.48
    # The eyeball stretches its texture: sqrt(polar / 80 degrees); the iris ends at 21 degrees.
    polar = 80 * np.square(away)[..., None]
    spokes = np.arctan2(v - 0.5, u - 0.5)[..., None]
    iris = looks.iris * (0.75 + 0.35 * smooth(6, 15, polar) + 0.10 * np.sin(17 * spokes))
    iris = iris * (1 - 0.65 * smooth(16.5, 21, polar))
    white = np.array([0.86, 0.83, 0.80]) * (1 - 0.25 * smooth(30, 65, polar) * (0.6, 1.2, 1.2))
    colour = iris + smooth(20.0, 22.5, polar) * (white - iris)
    return colour * (1 - 0.97 * smooth(9.2, 7.6, polar))


def _teeth(looks: Looks, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    enamel = np.array([0.93, 0.90, 0.83]) * looks.teeth
    gaps = np.abs((u * 12 + 0.5) % 1 - 0.5)[..., None] * np.ones_like(v)[..., None]
    colour = enamel * (1 - 0.30 * smooth(0.12, 0.0, gaps))
    gum = smooth(0.30, 0.20, v + 0.06 * np.abs(np.sin(12 * np.pi * u)))[..., None]
    return colour + gum * (np.array([0.72, 0.38, 0.38]) - colour)


def _hair(looks: Looks, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng((looks.seed, 13))
    shade = np.ones(np.broadcast_shapes(u.shape, v.shape))
    for _ in range(16):
        across, phase, bend = rng.uniform(12, 110), rng.uniform(0, 2 * np.pi), rng.uniform(-3, 3)
        shade = shade + 0.065 * np.sin(across * u + phase + bend * v)
    shade = shade * (1 - 0.10 * smooth(0.25, 0.0, v) + 0.12 * looks.streaks * smooth(0.3, 1.0, v))
    return looks.hair_colour * shade[..., None]


def _body(looks: Looks, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """u is 0 in front and 1 behind, v runs from the neck to the chest."""
    clothes = looks.clothes
    cloth = np.broadcast_to(clothes.colour, (*np.broadcast_shapes(u.shape, v.shape), 3)).copy()
    other = clothes.second
    if clothes.pattern == "stripes":
        cloth[(np.sin(v * clothes.frequency * 2 * np.pi) > 0.2)[:, 0]] = other
    elif clothes.pattern == "checks":
        lines = 0.5 * (np.sin(v * clothes.frequency * 6) > 0) + 0.5 * (np.sin(u * 40) > 0)
        cloth += lines[..., None] * 0.6 * (other - cloth)
    elif clothes.pattern == "dots":
        dots = np.sin(u * 60) * np.sin(v * clothes.frequency * 8) > 0.45
        cloth[dots] = other
    neckline = {"crew": 0.355, "wide": 0.43, "v": 0.40, "high": 0.26, "shirt": 0.36, "jacket": 0.36}
    edge = np.full(u.shape, neckline[clothes.cut])
    if clothes.cut in ("v", "shirt"):
        edge = edge + (0.16 if clothes.cut == "v" else 0.10) * np.clip(1 - u / 0.22, 0, 1)
    if clothes.cut == "jacket":  # a shirt that shows between lapels
        opened = smooth(0.012, -0.012, u - 0.22 * np.clip((0.78 - v) / 0.45, 0, 1))[..., None]
        cloth = cloth + opened * (other - cloth)
        tie = smooth(0.041, 0.029, u) * smooth(0.365, 0.375, v) * clothes.tie
        cloth = cloth + (tie[..., None] * opened) * (clothes.third - cloth)
    trim = np.abs(v - edge) < 0.012
    cloth[trim] *= 0.72
    if clothes.cut == "shirt":
        cloth[(u < 0.012) & (v > edge)] *= 0.7
        cloth[(v < edge + 0.055) & (v > edge) & (u > 0.04)] *= 1.12
    skin = looks.skin * np.array([0.99, 0.97, 0.96])
    bare = smooth(0.006, -0.006, v - edge)[..., None]
    return cloth + bare * (skin - cloth)


def background(looks: Looks, side: int) -> np.ndarray:
    """(side, side, 3) float32 RGB, 0..1: out of focus, different for everybody."""
    rng = np.random.default_rng((looks.seed, 17))
    first, second, third = looks.backdrop
    down = np.linspace(0, 1, 64, dtype=np.float32)[:, None, None]
    small = np.broadcast_to(first + down * (second - first), (64, 64, 3)).astype(np.float32).copy()
    for _ in range(int(rng.integers(0, 9))):
        colour = (third if rng.random() < 0.5 else first) * rng.uniform(0.5, 1.4)
        x, y, w, h = rng.integers(-10, 60), rng.integers(-10, 60), *rng.integers(3, 34, 2)
        if rng.random() < 0.6:
            cv2.rectangle(small, (int(x), int(y)), (int(x + w), int(y + h)), colour.tolist(), -1)
        else:
            cv2.circle(small, (int(x), int(y)), int(w // 2 + 2), colour.tolist(), -1)
    small = cv2.GaussianBlur(small, (0, 0), float(rng.uniform(0.8, 5.0)))
    big = cv2.resize(small, (side, side), interpolation=cv2.INTER_CUBIC)
    big += 0.008 * _noise(rng, 60, side)[..., None]
    return np.clip(big, 0, 1)
