"""How a person looks apart from the shape: colours, hair, beard, clothes, background and light."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from data_pipelines.synthetic import hair


class Clothes(NamedTuple):
    """Colours are RGB in [0, 1]; `frequency` is that of the pattern."""

    cut: str
    pattern: str
    frequency: float
    colour: np.ndarray
    second: np.ndarray
    third: np.ndarray
    tie: bool


class Light(NamedTuple):
    """A lamp, the surrounding light and a rim light; directions point to the light, unit length."""

    key: np.ndarray
    key_colour: np.ndarray
    sky: np.ndarray
    ground: np.ndarray
    rim: np.ndarray
    rim_colour: np.ndarray


class Looks(NamedTuple):
    """Everything that is painted. Colours are RGB in [0, 1], strengths in [0, 1] unless said.

    Attributes:
        seed: of all noise.
        age: -1 .. 1.
        roughness: standard deviation of the skin's finest noise.
        beard: "none", "stubble", "full", "goatee" or "moustache".
        brow_width: times the measured width of brows.
        streaks: lighter (or darker, below 0) ends of the hair.
        gloss: how much the skin shines.
        backdrop: (3, 3) the background's colours.
    """

    seed: int
    age: float
    skin: np.ndarray
    roughness: float
    blush: float
    tired: float
    freckles: float
    lips: np.ndarray
    iris: np.ndarray
    lashes: float
    shadow: float
    shadow_colour: np.ndarray
    teeth: float
    hair: hair.Style
    hair_colour: np.ndarray
    streaks: float
    beard: str
    beard_colour: np.ndarray
    brow_width: float
    brow_strength: float
    brow_colour: np.ndarray
    gloss: float
    clothes: Clothes
    backdrop: np.ndarray
    light: Light


# From light to dark.
_SKINS = np.array(
    [
        (0.96, 0.81, 0.73),
        (0.92, 0.74, 0.63),
        (0.86, 0.66, 0.52),
        (0.76, 0.55, 0.41),
        (0.62, 0.42, 0.30),
        (0.47, 0.31, 0.22),
        (0.34, 0.22, 0.16),
    ]
)
_HAIRS = np.array(
    [
        (0.07, 0.06, 0.06),
        (0.13, 0.09, 0.07),
        (0.24, 0.15, 0.09),
        (0.38, 0.25, 0.14),
        (0.56, 0.28, 0.13),
        (0.68, 0.50, 0.28),
        (0.85, 0.72, 0.48),
        (0.55, 0.54, 0.53),
        (0.86, 0.85, 0.84),
    ]
)
_IRISES = np.array(
    [
        (0.20, 0.11, 0.06),
        (0.33, 0.20, 0.10),
        (0.42, 0.36, 0.18),
        (0.30, 0.42, 0.28),
        (0.34, 0.50, 0.64),
        (0.46, 0.52, 0.56),
    ]
)


def colour(rng: np.random.Generator, saturation=(0.05, 0.75), value=(0.15, 0.95)) -> np.ndarray:
    """Any colour, RGB in [0, 1]."""
    hue = np.float32(rng.uniform(0, 360))
    pixel = np.array([[[hue, rng.uniform(*saturation), rng.uniform(*value)]]], np.float32)
    return cv2.cvtColor(pixel, cv2.COLOR_HSV2RGB)[0, 0].astype(np.float64)


def _unit(x: float, y: float, z: float) -> np.ndarray:
    vector = np.array([x, y, z])
    return vector / np.linalg.norm(vector)


def sample_light(rng: np.random.Generator) -> Light:
    """From in front and mostly from above, with a warm or cold tint."""
    side = rng.uniform(-1.1, 1.1)
    key = _unit(np.sin(side), -rng.uniform(0.1, 0.9), -np.cos(side) - 0.25)
    warm = rng.uniform(-0.10, 0.10)
    strength = rng.uniform(0.52, 0.80)
    surrounding = rng.uniform(0.32, 0.48)
    tint = np.array([1 + warm, 1.0, 1 - warm])
    return Light(
        key,
        strength * tint,
        surrounding * (2 - tint) * rng.uniform(0.95, 1.1),
        surrounding * tint * rng.uniform(0.55, 0.85),
        _unit(-np.sign(side) * rng.uniform(0.6, 1.0), -0.3, rng.uniform(0.15, 0.6)),
        rng.uniform(0.0, 0.45) * colour(rng, (0.0, 0.4), (0.8, 1.0)),
    )


def sample_clothes(rng: np.random.Generator) -> Clothes:
    cut = str(rng.choice(["crew", "wide", "v", "high", "shirt", "jacket"]))
    pattern = str(rng.choice(["plain", "stripes", "checks", "dots"], p=[0.6, 0.18, 0.12, 0.10]))
    if cut == "jacket":
        main = colour(rng, (0.05, 0.45), (0.08, 0.45))
        return Clothes(
            cut, "plain", 1.0, main, colour(rng, (0.0, 0.2), (0.75, 1.0)), colour(rng), True
        )
    return Clothes(cut, pattern, rng.uniform(5, 14), colour(rng), colour(rng), colour(rng), False)


def sample_looks(rng: np.random.Generator, shape: dict[str, float]) -> Looks:
    """Looks that go together: dark skin and dark eyes, old age and gray hair, long hair and no beard."""
    age, style = shape["age"], hair.sample_style(rng)
    tone = rng.uniform(0, len(_SKINS) - 1.001)
    low = int(tone)
    skin = _SKINS[low] + (tone - low) * (_SKINS[low + 1] - _SKINS[low])
    skin = np.clip(skin * (1 + rng.normal(0, 0.025, 3)), 0, 1)
    darkness = tone / (len(_SKINS) - 1)
    if age > 0.55 and rng.random() < 0.75:
        hair_colour = _HAIRS[rng.integers(7, 9)]
    elif darkness > 0.55:
        hair_colour = _HAIRS[rng.integers(0, 2)]
    else:
        hair_colour = _HAIRS[rng.integers(0, 7)]
    if rng.random() < 0.04:
        hair_colour = colour(rng, (0.5, 0.8), (0.4, 0.8))
    hair_colour = np.clip(hair_colour * rng.uniform(0.85, 1.15), 0, 1)
    iris = _IRISES[rng.integers(0, 2 if darkness > 0.5 else len(_IRISES))] * rng.uniform(0.85, 1.2)
    hanging = style.length > 0 or style.bun > 0
    beard = "none"
    if not hanging and rng.random() < 0.55:
        beard = str(
            rng.choice(["stubble", "full", "goatee", "moustache"], p=[0.4, 0.3, 0.18, 0.12])
        )
    painted = hanging and rng.random() < 0.6
    natural = skin * (0.90, 0.62, 0.62) * rng.uniform(0.9, 1.05)
    lips = colour(rng, (0.55, 0.8), (0.45, 0.8)) * (1.0, 0.55, 0.6) if painted else natural
    if painted:
        lips = np.array([max(lips.max(), 0.5), lips.min(), lips[2] * 0.8])
    dark_hair = hair_colour * (0.8 if hair_colour.mean() < 0.7 else 0.62)
    return Looks(
        seed=int(rng.integers(1 << 31)),
        age=age,
        skin=skin,
        roughness=rng.uniform(0.004, 0.018) + 0.008 * max(age, 0),
        blush=rng.uniform(0.05, 0.45),
        tired=rng.uniform(0.0, 0.30) + 0.2 * max(age, 0),
        freckles=rng.uniform(0.3, 0.7) if darkness < 0.35 and rng.random() < 0.2 else 0.0,
        lips=lips,
        iris=np.clip(iris, 0, 1),
        lashes=rng.uniform(0.4, 1.0) if hanging else rng.uniform(0.0, 0.3),
        shadow=rng.uniform(0.2, 0.6) if painted else 0.0,
        shadow_colour=colour(rng, (0.2, 0.6), (0.3, 0.7)),
        teeth=rng.uniform(0.85, 1.05),
        hair=style,
        hair_colour=hair_colour,
        streaks=rng.uniform(-1, 2),
        beard=beard,
        beard_colour=np.clip(dark_hair * rng.uniform(0.7, 1.1), 0, 1),
        brow_width=rng.uniform(0.65, 1.0) if hanging else rng.uniform(0.8, 1.35),
        brow_strength=rng.uniform(0.55, 0.95),
        brow_colour=dark_hair * 0.85,
        gloss=rng.uniform(0.05, 0.22),
        clothes=sample_clothes(rng),
        backdrop=np.stack([colour(rng, (0.0, 0.5), (0.25, 0.9)) for _ in range(3)]),
        light=sample_light(rng),
    )
