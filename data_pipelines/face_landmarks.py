"""The landmarks that a face alignment network learns, in the order of its heat maps.

Numbers are those of MediaPipe's 478-point face mesh. The first ones tell most of an expression, so a small network
with few heat maps takes the first of them; 68 is the size of the published network's head.
"""

from __future__ import annotations

import numpy as np

# (the person's right, left) or a single point of the middle line, the most telling first: corners and lips of
# the mouth, lids and corners of the eyes, brows; then the rest of these parts, nose, chin, jaw and temples.
_GROUPS: tuple[tuple[int, ...], ...] = (
    *((61, 291), (13,), (14,), (159, 386), (145, 374), (105, 334), (107, 336)),
    *((33, 263), (133, 362), (70, 300), (0,), (17,), (1,), (152,)),
    *((37, 267), (84, 314), (82, 312), (87, 317), (39, 269), (181, 405)),
    *((160, 387), (144, 373), (158, 385), (153, 380), (66, 296), (63, 293)),
    *((48, 278), (98, 327), (2,), (168,), (6,), (78, 308)),
    *((172, 397), (150, 379), (234, 454), (132, 361), (10,), (205, 425), (50, 280)),
)
FAN_LANDMARKS: tuple[int, ...] = tuple(number for group in _GROUPS for number in group)
# Which place of FAN_LANDMARKS a place becomes in the mirrored picture.
_MIRROR = {a: b for group in _GROUPS for a, b in zip(group, reversed(group), strict=True)}
MIRRORED_PLACES = np.array([FAN_LANDMARKS.index(_MIRROR[number]) for number in FAN_LANDMARKS])


def fan_landmarks(landmarks: np.ndarray, mirrored: bool = False) -> np.ndarray:
    """(..., 478, 3) -> (..., 68, 2) in the same coordinates; of the mirrored picture, the mirrored places.

    The points themselves are not moved: with ``mirrored``, point k is the one that will be seen where
    landmark k of an unmirrored face is.
    """
    numbers = np.array(FAN_LANDMARKS)
    return landmarks[..., numbers[MIRRORED_PLACES] if mirrored else numbers, :2]
