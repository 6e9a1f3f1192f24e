"""Writes rendered_heads.json: `python -m tests.golden.make_rendered_heads`, after a wanted change of the renderer.

Datasets that were rendered before it are another renderer's then, and their figures are not to be compared.
"""

import json
from pathlib import Path

import cv2
import numpy as np

from data_pipelines.synthetic.expression import from_dict
from data_pipelines.synthetic.identity import make_identity
from data_pipelines.synthetic.motion import Motion
from data_pipelines.synthetic.poses import pose_matrix
from data_pipelines.synthetic.render import render

FILE = Path(__file__).with_name("rendered_heads.json")
SIDE = 8  # of the coarse picture
POINTS = (1, 33, 263, 61, 291, 152, 468)


def measure() -> dict[str, dict[str, list]]:
    """Of three heads: the coarse picture, some landmarks, and what their seed draws as expression and pose."""
    found = {}
    for seed, yaw, size, values in (
        (5, -25, 64, {"jaw_open": 0.8, "lid_left": 0.9}),
        (8, 40, 64, {"smile": 0.9, "brow_left": 0.7, "gaze_x": 0.8}),
        (11, 0, 128, {"lips_part": 0.8, "nose_sneer": 0.6, "cheek_puff": 0.4}),
    ):
        seen = render(make_identity(seed), from_dict(values), pose_matrix(8, yaw, 5), size)
        coarse = cv2.resize(
            seen.image.astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_AREA
        )
        motion = Motion((seed, 0), 2)
        found[str(seed)] = {
            "picture": coarse.round(1).tolist(),
            "landmarks": seen.landmarks[list(POINTS)].astype(float).round(4).tolist(),
            "expression": motion.expression(1.3).round(4).tolist(),
            "pose": motion.seen_pose(1.3, 1).round(4).tolist(),
        }
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps(measure()) + "\n")
