"""Augmentation: its knobs, and the random choices of one sample (method.md 3.12).

A `Draw` holds the choices, so that a clip can use one draw for all its frames; `neutral_draw` is
what validation and inference use: same masks, same crops, nothing random. What a draw does to
pictures and labels is in `network_inputs`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.transforms import colour_matrix, similarity_matrix


def default_augment() -> dict[str, Any]:
    """Every magnitude of method.md 3.12, a plain nested dict. Lengths are fractions of a side."""
    return {
        # S2 and S1: whole frames. The border is what shows where a frame is moved away.
        "flip": {"probability": 0.5},
        "similarity": {
            "probability": 0.5,
            "roll": 20.0,
            "scale": (0.8, 1.25),
            "shift": 0.1,
            "border": "reflect",
        },
        # The whole sample in other colours, source and targets alike: more people than there are. Off by default.
        "colour": {
            "probability": 0.0,
            "brightness": 0.3,
            "contrast": 0.3,
            "saturation": 0.5,
            "hue": 0.1,
            "gray": 0.05,
        },
        # P1: eyes and mouth hidden from the pose encoder, always. `minimum_height` (of the width)
        # keeps the shape of the mask from telling a closed eye from an open one. `applied` of this and of the
        # expression crop is there for ablations.
        "pose_mask": {
            "applied": True,
            "dilation": 0.2,
            "dilation_range": (0.1, 0.4),
            "minimum_height": 0.55,
            "fill": "mean",
            "fill_jitter": 0.15,
        },
        # P2.
        "pose_colour": {
            "probability": 0.5,
            "brightness": 0.3,
            "contrast": 0.3,
            "saturation": 0.3,
            "hue": 0.05,
            "gray": 0.0,
            "blur": 0.01,
        },
        # E1, E2, E3, E4: the expression encoder's picture.
        "expression_rotation": {"probability": 0.8, "degrees": 30.0},
        "view_change": {"probability": 0.5},
        "expression_crop": {
            "applied": True,  # False: the whole frame, with the head's place, size and roll
            "margin": 1.1,
            "margin_range": (1.0, 1.3),
            "centre_jitter": 0.05,
            "gray": False,
            # Turned until the eyes are level: takes the head's roll out as the crop takes place and size out.
            "upright": False,
            # Hair, ears and what is behind them tell who it is, and little of expression: only the face's oval is
            # shown, the rest is its mean; and `even_light` gives every picture the same mean and contrast.
            "face_alone": False,
            "even_light": False,
        },
        "expression_colour": {
            "probability": 0.5,
            "brightness": 0.4,
            "contrast": 0.4,
            "saturation": 0.4,
            "hue": 0.1,
            "gray": 0.1,
        },
        "expression_affine": {"probability": 0.5, "points": 6, "displacement": 0.025},
        # The component mask of the losses (method.md 6.3), not random.
        "component_mask": {
            "parts": ("right_eye", "left_eye", "right_brow", "left_brow", "nose", "outer_lips"),
            "dilation": 0.012,
            "blur": 0.008,
        },
    }


# What of it the encoders see where nothing is random: a network reads its pictures as it learned them.
_NEUTRAL = {
    "similarity": ("border",),
    "pose_mask": ("applied", "dilation", "minimum_height", "fill"),
    "expression_crop": ("applied", "margin", "gray", "upright", "face_alone", "even_light"),
}


def neutral_knobs(augment: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted name -> value of every knob that `neutral_draw` and the pictures made with it depend on.

    Knobs that `augment` lacks, being older, are at their defaults.
    """
    return {
        f"{group}.{name}": augment.get(group, {}).get(name, default_augment()[group][name])
        for group, names in _NEUTRAL.items()
        for name in names
    }


class SampleDraw(NamedTuple):
    """What is drawn once for source and targets: the flip S2, and the colours of the frames.

    Attributes:
        flip: left is right.
        colour: (3, 4) colour matrix of the stored frames, before everything else, or None.
    """

    flip: bool
    colour: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Draw:
    """The random choices of one sample.

    Attributes:
        sample: what it shares with the other pictures of its sample.
        frame: (2, 3) flip and similarity, stored-frame coordinates -> output coordinates.
        mask_dilation: of the eye and mouth masks, fraction of their size.
        mask_tint: (3,) added to the fill colour, 0..255.
        pose_colour, expression_colour: (3, 4) colour matrices, or None.
        pose_blur: sigma as a fraction of the side.
        rotation: degrees, of the expression crop, on top of the frame's.
        margin: side of the expression crop as a multiple of the face box.
        jitter: (2,) shift of its centre as a fraction of its side.
        cropped: the expression picture is a crop about the face, not the frame.
        upright: the eyes are level in the expression crop, before its rotation.
        displacement: (points, points, 2) of the piecewise affine map, fractions of the side.
        other_view: take the expression picture from another camera where there is one.
    """

    sample: SampleDraw
    frame: np.ndarray
    mask_dilation: float
    mask_tint: np.ndarray
    pose_colour: np.ndarray | None
    pose_blur: float
    rotation: float
    margin: float
    jitter: np.ndarray
    cropped: bool
    upright: bool
    expression_colour: np.ndarray | None
    displacement: np.ndarray | None
    other_view: bool


def neutral_draw(augment: Mapping[str, Any]) -> Draw:
    """No randomness: the frame as it is, the standard mask and the standard crop."""
    return Draw(
        sample=SampleDraw(flip=False, colour=None),
        frame=similarity_matrix(),
        mask_dilation=augment["pose_mask"]["dilation"],
        mask_tint=np.zeros(3),
        pose_colour=None,
        pose_blur=0.0,
        rotation=0.0,
        margin=augment["expression_crop"]["margin"],
        jitter=np.zeros(2),
        cropped=augment["expression_crop"]["applied"],
        upright=augment["expression_crop"]["upright"],
        expression_colour=None,
        displacement=None,
        other_view=False,
    )


def random_sample(rng: np.random.Generator, augment: Mapping[str, Any]) -> SampleDraw:
    """Draws what all pictures of a sample share."""
    flip = bool(rng.random() < augment["flip"]["probability"])
    return SampleDraw(flip, _draw_colour(rng, augment["colour"]))


def random_draw(rng: np.random.Generator, augment: Mapping[str, Any], sample: SampleDraw) -> Draw:
    """Draws S1, P1, P2, E1-E4 of one picture of a sample."""
    similarity, mask = augment["similarity"], augment["pose_mask"]
    crop, affine = augment["expression_crop"], augment["expression_affine"]
    moved = rng.random() < similarity["probability"]
    roll = rng.uniform(-1, 1) * similarity["roll"]
    low, high = similarity["scale"]
    scale = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    shift = rng.uniform(-1, 1, 2) * similarity["shift"] * 2  # a side is 2 long in crop coordinates
    if moved:
        frame = similarity_matrix(roll, scale, shift, sample.flip)
    else:
        frame = similarity_matrix(flip=sample.flip)
    tint = rng.uniform(-1, 1, 3) * mask["fill_jitter"] * 255
    dilation = rng.uniform(*mask["dilation_range"])
    pose_colour = _draw_colour(rng, augment["pose_colour"])
    pose_blur = rng.uniform(0, augment["pose_colour"]["blur"])
    turned = rng.random() < augment["expression_rotation"]["probability"]
    rotation = rng.uniform(-1, 1) * augment["expression_rotation"]["degrees"] * turned
    margin, jitter = rng.uniform(*crop["margin_range"]), rng.uniform(-1, 1, 2)
    expression_colour = _draw_colour(rng, augment["expression_colour"])
    bent = rng.random() < affine["probability"]
    bend = rng.normal(0, affine["displacement"], (affine["points"], affine["points"], 2))
    return Draw(
        sample=sample,
        frame=frame,
        mask_dilation=dilation,
        mask_tint=tint,
        pose_colour=pose_colour,
        pose_blur=0.0 if pose_colour is None else pose_blur,
        rotation=rotation,
        margin=margin,
        jitter=jitter * crop["centre_jitter"],
        cropped=crop["applied"],
        upright=crop["upright"],
        expression_colour=expression_colour,
        displacement=bend.astype(np.float32) if bent else None,
        other_view=bool(rng.random() < augment["view_change"]["probability"]),
    )


def _draw_colour(rng: np.random.Generator, knobs: Mapping[str, Any]) -> np.ndarray | None:
    applied = rng.random() < knobs["probability"]
    brightness, contrast, saturation, hue = (
        rng.uniform(-knobs[name], knobs[name])
        for name in ("brightness", "contrast", "saturation", "hue")
    )
    gray = rng.random() < knobs["gray"]
    if not applied:
        return None
    return colour_matrix(1 + brightness, 1 + contrast, 0.0 if gray else 1 + saturation, hue)
