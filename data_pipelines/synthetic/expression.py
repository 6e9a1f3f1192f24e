"""Expressions: what the parameters mean, random ones, and how they move the face.

Each parameter moves a part of its own: 0 is the neutral face for all of them. Left and right are the
person's own. Muscles are smooth displacements of the mesh points (in canonical units, 1 is about 20 cm);
the jaw turns about its hinge, lids slide over the eyeball.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from data_pipelines import records
from data_pipelines.prepare.masks import LANDMARKS_OF
from data_pipelines.synthetic import template
from data_pipelines.synthetic.face_points import MEAN_FACE, MESH_POINTS


class Parameters(NamedTuple):
    """names (K,), low (K,) and high (K,) ends of the ranges."""

    names: tuple[str, ...]
    low: np.ndarray
    high: np.ndarray


# name: (low, high). Where low is negative the parameter has an opposite, given after the comma.
_RANGES = {
    "jaw_open": (0.0, 1.0),  # closed .. 24 degrees
    "smile": (-0.6, 1.0),  # corners up, corners down
    "pucker": (0.0, 1.0),  # lips pushed forward and together
    "lips_part": (0.0, 1.0),  # upper lip raised and lower lip lowered: teeth show
    "mouth_side": (-1.0, 1.0),  # the mouth to the person's left, right
    "brow_left": (-1.0, 1.0),  # raised, lowered
    "brow_right": (-1.0, 1.0),
    "brow_knit": (0.0, 1.0),  # inner brows together and down
    "lid_left": (-0.3, 1.0),  # closed at 1, wide open below 0
    "lid_right": (-0.3, 1.0),
    "gaze_x": (-1.0, 1.0),  # to the person's left, right: 28 degrees
    "gaze_y": (-1.0, 1.0),  # up, down: 20 degrees
    "cheek_puff": (0.0, 1.0),
    "nose_sneer": (0.0, 1.0),  # nostrils raised and widened
}
EXPRESSION_PARAMETERS = Parameters(
    tuple(_RANGES),
    np.array([low for low, _ in _RANGES.values()]),
    np.array([high for _, high in _RANGES.values()]),
)
COUNT = len(_RANGES)
JAW_DEGREES, GAZE_DEGREES = 24.0, (28.0, 20.0)
EYES = ("right_eye", "left_eye")

# The lid's skin beyond its edge, per edge point of the upper (lower) lid from the outer corner inwards;
# numbers are the right eye's.
_UPPER_LID = ((246, 247), (161, 30), (160, 29), (159, 27), (158, 28), (157, 56), (173, 190))
_LOWER_LID = ((7, 25), (163, 110), (144, 24), (145, 23), (153, 22), (154, 26), (155, 112))


def neutral() -> np.ndarray:
    """(K,) zeros."""
    return np.zeros(COUNT)


def from_dict(values: Mapping[str, float]) -> np.ndarray:
    """Named parameters (others 0), clipped to their ranges -> (K,)."""
    result = neutral()
    for name, value in values.items():
        result[EXPRESSION_PARAMETERS.names.index(name)] = value
    return np.clip(result, EXPRESSION_PARAMETERS.low, EXPRESSION_PARAMETERS.high)


def sample_expression(rng: np.random.Generator) -> np.ndarray:
    """(K,) parameters, drawn nearly independently over their ranges; many rest at 0.

    The two brows and the two lids often move together.
    """
    low, high = EXPRESSION_PARAMETERS.low, EXPRESSION_PARAMETERS.high
    values = np.clip(rng.uniform(low - 0.35 * (high - low), high), low, high)
    values = np.where((low < 0) & (rng.random(COUNT) < 0.75), rng.uniform(low, high), values)
    named = dict(zip(EXPRESSION_PARAMETERS.names, values, strict=True))
    shut = rng.uniform(-0.3, 0.45, 2) if rng.random() < 0.7 else rng.uniform(0.4, 1.0, 2)
    named["lid_left"], named["lid_right"] = shut
    if rng.random() < 0.65:
        named["lid_right"] = named["lid_left"]
    if rng.random() < 0.5:
        named["brow_right"] = named["brow_left"]
    # Muscles that pull the same skin opposite ways do not both work at full strength.
    named["pucker"] *= 1 - 0.8 * max(named["smile"], 0.0)
    named["cheek_puff"] *= 1 - 0.8 * named["jaw_open"]
    named["lips_part"] *= 1 - 0.7 * named["cheek_puff"]
    return from_dict(named)


def blendshapes(expression: np.ndarray) -> np.ndarray:
    """(..., K) -> (..., 52) float32: those of `records.BLENDSHAPES` that correspond, the others 0."""
    value = dict(zip(EXPRESSION_PARAMETERS.names, np.moveaxis(expression, -1, 0), strict=True))

    def positive(name):
        return np.clip(value[name], 0, None)

    def negative(name):
        return np.clip(-value[name], 0, None)

    named = {
        "jawOpen": value["jaw_open"],
        "mouthPucker": value["pucker"],
        "mouthLeft": positive("mouth_side"),
        "mouthRight": negative("mouth_side"),
        "browInnerUp": (positive("brow_left") + positive("brow_right")) / 2,
        "cheekPuff": value["cheek_puff"],
    }
    for side, other in (("Left", "Right"), ("Right", "Left")):
        low = side.lower()
        named[f"mouthSmile{side}"] = positive("smile")
        named[f"mouthFrown{side}"] = negative("smile")
        named[f"mouthUpperUp{side}"] = value["lips_part"]
        named[f"mouthLowerDown{side}"] = value["lips_part"]
        named[f"browOuterUp{side}"] = positive(f"brow_{low}")
        named[f"browDown{side}"] = np.maximum(negative(f"brow_{low}"), value["brow_knit"])
        named[f"eyeBlink{side}"] = positive(f"lid_{low}")
        named[f"eyeWide{side}"] = negative(f"lid_{low}")
        named[f"eyeLookUp{side}"] = positive("gaze_y")
        named[f"eyeLookDown{side}"] = negative("gaze_y")
        named[f"eyeLookOut{side}"] = positive("gaze_x") if side == "Left" else negative("gaze_x")
        named[f"eyeLookIn{other}"] = named[f"eyeLookOut{side}"]
        named[f"noseSneer{side}"] = value["nose_sneer"]
    result = np.zeros((*np.shape(expression)[:-1], len(records.BLENDSHAPES)), np.float32)
    for name, strength in named.items():
        result[..., records.BLENDSHAPES.index(name)] = np.clip(strength, 0, 1)
    return result


@functools.cache
def jaw_weights() -> np.ndarray:
    """(468,) how much of the jaw's turn each mesh point takes part in, in [0, 1]."""
    points = MEAN_FACE[:MESH_POINTS]
    below = template.lower_side(points)
    x, y = np.abs(points[:, 0]), points[:, 1] - template.MOUTH_LINE
    open_part = np.clip(1 - np.square(x / template.MOUTH_CORNER), 0, 1) ** 0.75
    beside = np.tanh(y / 0.10)
    side = np.where(below, 1.0, -1.0)
    # The upper lip stays; beside the mouth the cheek is stretched between both jaws.
    weights = 0.5 + 0.5 * (open_part * side + (1 - open_part) * beside)
    return np.clip(weights * template.smooth(-0.06, 0.06, points[:, 1]), 0, 1)


@functools.cache
def _about_mouth() -> np.ndarray:
    """(468,) a bell over the mouth."""
    points = MEAN_FACE[:MESH_POINTS]
    bell = template.around(points, (0, template.MOUTH_LINE, -0.44), (0.13, 0.07, 0.14))
    return bell * template.smooth(0.15, 0.21, points[:, 1])


def _mirrored(points: np.ndarray, centre, spread, shift) -> np.ndarray:
    """A displacement at both sides of the face, given for the person's left (x > 0)."""
    centre, shift = np.asarray(centre), np.asarray(shift)
    flip = np.array([-1.0, 1.0, 1.0])
    left = template.around(points, centre, spread)[:, None] * shift
    right = template.around(points, centre * flip, spread)[:, None] * (shift * flip)
    return left + right


@functools.cache
def displacements() -> np.ndarray:
    """(K, 468, 3): how a parameter at 1 moves the mesh points; jaw, lids and gaze are no such moves."""
    points = MEAN_FACE[:MESH_POINTS]
    below = template.lower_side(points)[:, None]
    middle = np.array([0, template.MOUTH_LINE, -0.44])
    near_mouth = template.around(points, middle, (0.13, 0.06, 0.14))[:, None]
    above_lips = template.smooth(0.155, 0.20, points[:, 1])[:, None]  # the nose stays
    not_eyes = template.smooth(-0.055, 0.02, points[:, 1])[:, None]
    sides = np.sign(points[:, :1])
    result = {name: np.zeros_like(points) for name in _RANGES}

    corner = (0.15, 0.275, -0.37)
    smile = _mirrored(points, corner, (0.07, 0.075, 0.12), (0.050, -0.050, 0.035))
    smile += _mirrored(points, (0.20, 0.12, -0.35), (0.06, 0.07, 0.1), (0.012, -0.028, -0.022))
    result["smile"] = smile * not_eyes
    towards = np.stack(
        [-0.55 * points[:, 0], -0.12 * (points[:, 1] - 0.28), np.zeros(len(points))], -1
    )
    pucker = near_mouth * (towards + np.array([0, 0, -0.055]))
    result["pucker"] = pucker * template.smooth(0.14, 0.21, points[:, 1])[:, None]
    upper = template.around(points, middle, (0.085, 0.045, 0.10))[:, None]
    raised = upper * np.where(below, 0.045, -0.035) * np.array([[0.0, 1.0, 0.0]])
    result["lips_part"] = raised * np.where(below, 1.0, above_lips)
    aside = template.around(points, middle, (0.17, 0.10, 0.16))[:, None] * np.array([[0.055, 0, 0]])
    result["mouth_side"] = aside * template.smooth(0.13, 0.22, points[:, 1])[:, None]
    not_lids = template.smooth(-0.135, -0.185, points[:, 1])[:, None]
    for name, side in (("brow_left", 1), ("brow_right", -1)):
        own = template.smooth(-0.03, 0.04, side * points[:, 0])[:, None]
        bell = template.around(points, (side * 0.16, -0.235, -0.37), (0.11, 0.055, 0.14))[:, None]
        result[name] = own * bell * not_lids * np.array([[0.0, -0.055, 0.008]])
    knit = _mirrored(points, (0.075, -0.21, -0.42), (0.055, 0.05, 0.08), (-0.036, 0.046, -0.012))
    result["brow_knit"] = knit * not_lids * np.minimum(np.abs(points[:, :1]) / 0.04, 1)
    puff = _mirrored(points, (0.20, 0.22, -0.32), (0.075, 0.085, 0.12), (0.060, 0.010, -0.055))
    lips = template.around(points, middle, (0.14, 0.06, 0.12))[:, None]
    result["cheek_puff"] = puff * not_eyes * (1 - lips)
    sneer = _mirrored(points, (0.065, 0.115, -0.46), (0.035, 0.04, 0.06), (0.014, -0.026, 0.004))
    sneer += _mirrored(points, (0.11, 0.10, -0.41), (0.03, 0.05, 0.05), (0.004, -0.018, -0.012))
    result["nose_sneer"] = (
        sneer * template.smooth(0.24, 0.19, points[:, 1])[:, None] * np.abs(sides)
    )
    return np.stack([result[name] for name in _RANGES])


class Eye(NamedTuple):
    """Where an eyeball sits in a person's head: centre (3,) and radius, canonical units."""

    centre: np.ndarray
    radius: float


@functools.cache
def _lid_points(eye: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mesh points of an eye: (7, 2) upper edge and skin, (7, 2) lower edge and skin, (2,) corners."""
    from data_pipelines.synthetic.face_points import MIRRORED

    upper, lower, corners = np.array(_UPPER_LID), np.array(_LOWER_LID), np.array([33, 133])
    if eye == "left_eye":
        upper, lower, corners = MIRRORED[upper], MIRRORED[lower], MIRRORED[corners]
    return upper, lower, corners


def eye_of(points: np.ndarray, eye: str) -> Eye:
    """The eyeball behind the lids of (468, 3) neutral mesh points."""
    outline = points[list(LANDMARKS_OF[eye])]
    corners = points[_lid_points(eye)[2]]
    radius = 0.60 * float(np.linalg.norm((corners[0] - corners[1])[:2]))
    middle = corners.mean(0)
    middle[1] = outline[:, 1].mean()
    # As deep as makes the lids' edges, on the whole, lie on the ball.
    across = np.square(outline[:, :2] - middle[:2]).sum(-1)
    depth = outline[:, 2] + np.sqrt(np.maximum(np.square(1.03 * radius) - across, 0.0))
    return Eye(np.array([middle[0], middle[1], depth.mean()]), radius)


def on_ball(eye: Eye, points: np.ndarray, gap: float) -> np.ndarray:
    """z of (..., 3) points moved along z to the front of the ball, made larger by the factor `gap`."""
    across = np.square(points[..., :2] - eye.centre[:2]).sum(-1)
    return eye.centre[2] - np.sqrt(np.maximum(np.square(gap * eye.radius) - across, 1e-6))


def fit_lids(points: np.ndarray, eye: str) -> np.ndarray:
    """Neutral mesh points (468, 3) with the lids' edges lying on the eyeball."""
    ball, (upper, lower, corners) = eye_of(points, eye), _lid_points(eye)
    edge = np.concatenate([upper[:, 0], lower[:, 0], corners])
    result = points.copy()
    result[edge, 2] = on_ball(ball, points[edge], 1.04)
    beyond = np.concatenate([upper[:, 1], lower[:, 1]])
    change = (result[edge, 2] - points[edge, 2])[: len(beyond)]
    result[beyond, 2] += 0.5 * change
    result[upper[:, 1], 2] = np.minimum(
        result[upper[:, 1], 2], on_ball(ball, result[upper[:, 1]], 1.08) + 0.012
    )
    return result


def _close(points: np.ndarray, eye: str, ball: Eye, amount: float) -> None:
    """Moves the lids of (468, 3) points in place; `amount` 1 closes them, below 0 opens them wide."""
    upper, lower, _ = _lid_points(eye)
    up, low = points[upper[:, 0]], points[lower[:, 0]]
    meeting = 0.80 * low[:, 1] + 0.20 * up[:, 1]
    if amount < 0:
        wide = np.array([0.4, 0.75, 1, 1, 1, 0.75, 0.4]) * 0.06 * amount
        points[upper[:, 0], 1] += wide
        points[upper[:, 1], 1] += 0.6 * wide
        points[lower[:, 0], 1] -= 0.3 * wide
    else:
        drop = amount * (meeting - up[:, 1])
        points[upper[:, 0], 1] += drop
        points[lower[:, 0], 1] += amount * (meeting - low[:, 1])
        points[upper[:, 1], 1] += 0.42 * drop
    edge = np.concatenate([upper[:, 0], lower[:, 0]])
    points[edge, 2] = on_ball(ball, points[edge], 1.04)
    skin = upper[:, 1]
    covering = np.minimum(points[skin, 2], on_ball(ball, points[skin], 1.07))
    points[skin, 2] += max(amount, 0.0) * (covering - points[skin, 2])


def turn_jaw(points: np.ndarray, weights: np.ndarray | float, amount: float) -> np.ndarray:
    """(N, 3) points turned about the hinge by `amount` of the jaw's range times `weights`."""
    angle = np.deg2rad(JAW_DEGREES) * amount * np.broadcast_to(weights, points.shape[:1])
    y, z = points[:, 1] - template.HINGE[1], points[:, 2] - template.HINGE[2]
    cosine, sine = np.cos(angle), np.sin(angle)
    turned = np.stack([points[:, 0], y * cosine - z * sine, y * sine + z * cosine], -1)
    # The joint slides forwards and down while the jaw opens.
    slide = amount * np.broadcast_to(weights, points.shape[:1])[:, None] * np.array([0.032, -0.022])
    turned[:, 1:] += template.HINGE[1:] + slide
    return turned


def deform(points: np.ndarray, expression: np.ndarray, eyes: Mapping[str, Eye]) -> np.ndarray:
    """Neutral mesh points (468, 3) of a person -> those of an expression (K,)."""
    value = dict(zip(EXPRESSION_PARAMETERS.names, expression.tolist(), strict=True))
    moved = turn_jaw(points, jaw_weights(), value["jaw_open"])
    # An open mouth is drawn in at its corners.
    moved[:, 0] *= 1 - 0.16 * value["jaw_open"] * _about_mouth()
    moved += np.tensordot(expression, displacements(), 1)
    for eye, name in (("right_eye", "lid_right"), ("left_eye", "lid_left")):
        if value[name]:
            _close(moved, eye, eyes[eye], value[name])
    return moved


def gaze_rotation(expression: np.ndarray) -> np.ndarray:
    """(3, 3) rotation of both eyeballs; without it they look along -z."""
    from data_pipelines.synthetic.poses import rotation

    value = dict(zip(EXPRESSION_PARAMETERS.names, expression.tolist(), strict=True))
    # Positive yaw turns towards the left of the picture, positive pitch downwards.
    return rotation(-GAZE_DEGREES[1] * value["gaze_y"], -GAZE_DEGREES[0] * value["gaze_x"], 0.0)
