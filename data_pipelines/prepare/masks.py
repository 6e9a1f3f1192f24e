"""Which landmarks outline which part of the face, and polygons -> masks.

Numbers are those of MediaPipe's 478-point face mesh; "left" and "right" are the person's own.
"""

from __future__ import annotations

import numpy as np

from data_pipelines import records

LANDMARKS_OF: dict[str, tuple[int, ...]] = {
    "right_eye": (33, 7, 163, 144, 145, 153, 154, 155, 133, 173, 157, 158, 159, 160, 161, 246),
    "left_eye": (263, 249, 390, 373, 374, 380, 381, 382, 362, 398, 384, 385, 386, 387, 388, 466),
    "right_brow": (46, 53, 52, 65, 55, 107, 66, 105, 63, 70),
    "left_brow": (276, 283, 282, 295, 285, 336, 296, 334, 293, 300),
    "nose": (168, 122, 174, 198, 49, 48, 64, 98, 97, 2, 326, 327, 294, 278, 279, 420, 399, 351),
    "outer_lips": (
        *(61, 146, 91, 181, 84, 17, 314, 405, 321, 375),
        *(291, 409, 270, 269, 267, 0, 37, 39, 40, 185),
    ),
    "inner_lips": (
        *(78, 95, 88, 178, 87, 14, 317, 402, 318, 324),
        *(308, 415, 310, 311, 312, 13, 82, 81, 80, 191),
    ),
    "face_oval": (
        *(10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288),
        *(397, 365, 379, 378, 400, 377, 152, 148, 176, 149, 150, 136),
        *(172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109),
    ),
}
assert {name: len(points) for name, points in LANDMARKS_OF.items()} == records.POLYGONS


def polygons(landmarks: np.ndarray) -> dict[str, np.ndarray]:
    """(T, 478, 3) landmarks -> name -> (T, points, 2) closed polygons in the same coordinates."""
    return {name: landmarks[:, list(points), :2] for name, points in LANDMARKS_OF.items()}
