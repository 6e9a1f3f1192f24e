"""Augmentation: every random choice reaches the inputs it is meant for, and no others."""

import numpy as np

from data_pipelines import augment, network_inputs
from tests import fixtures


def test_draws_fill_their_ranges():
    """Of 500 draws none leaves its range, and the extremes come within 2 % of the limits."""
    rng, knobs = np.random.default_rng(0), augment.default_augment()
    knobs["similarity"]["probability"] = 1.0
    draws = [augment.random_draw(rng, knobs, False) for _ in range(500)]
    linear = np.array([draw.frame[:, :2] for draw in draws])
    scale = np.sqrt(np.linalg.det(linear))
    drawn = {
        "roll": (np.rad2deg(np.arctan2(linear[:, 1, 0], linear[:, 0, 0])), -20, 20),
        "log scale": (np.log(scale), np.log(0.8), np.log(1.25)),
        "shift": (np.array([draw.frame[:, 2] for draw in draws]), -0.2, 0.2),  # 0.1 of a side
        "mask dilation": (np.array([draw.mask_dilation for draw in draws]), 0.1, 0.4),
        "margin": (np.array([draw.margin for draw in draws]), 1.0, 1.3),
        "jitter": (np.array([draw.jitter for draw in draws]), -0.05, 0.05),
    }
    for name, (values, low, high) in drawn.items():
        assert low - 1e-9 <= values.min() < low + 0.02 * (high - low), name
        assert high - 0.02 * (high - low) < values.max() <= high + 1e-9, name


def test_every_random_operator_does_something_and_zero_probability_nothing():
    clip, knobs = fixtures.make_clip(1, frames=6, size=96), augment.default_augment()
    rng = np.random.default_rng(0)
    sizes = (48, 48, 48)
    plain = network_inputs.frame_inputs(clip, 1, augment.neutral_draw(knobs), knobs, sizes)
    for name in (
        "similarity",
        "pose_colour",
        "expression_rotation",
        "expression_colour",
        "expression_affine",
    ):
        only = augment.default_augment()
        for other in only.values():
            if "probability" in other:
                other["probability"] = 0.0
        only["pose_mask"].update(dilation_range=(0.2, 0.2), fill_jitter=0.0)
        only["expression_crop"].update(margin_range=(1.1, 1.1), centre_jitter=0.0)
        quiet = network_inputs.frame_inputs(
            clip, 1, augment.random_draw(rng, only, False), only, sizes
        )
        for key in plain:
            np.testing.assert_array_equal(quiet[key], plain[key])
        only[name]["probability"] = 1.0
        loud = network_inputs.frame_inputs(
            clip, 1, augment.random_draw(rng, only, False), only, sizes
        )
        changed = {key for key in plain if not np.array_equal(loud[key], plain[key])}
        expected = {
            "similarity": {
                "image",
                "pose_image",
                "component_mask",
                "head_pose",
                "expression_image",
                "expression_landmarks",
            },
            "pose_colour": {"pose_image"},
            "expression_colour": {"expression_image"},
        }.get(name, {"expression_image", "expression_landmarks"})
        assert changed == expected, name
