"""Augmentation: every random choice reaches the inputs it is meant for, and no others."""

import dataclasses

import numpy as np

from data_pipelines import augment, network_inputs, transforms
from tests import fixtures

PLAIN = augment.SampleDraw(flip=False, colour=None)


def test_draws_fill_their_ranges():
    """Of 500 draws none leaves its range, and the extremes come within 2 % of the limits."""
    rng, knobs = np.random.default_rng(0), augment.default_augment()
    knobs["similarity"]["probability"] = 1.0
    draws = [augment.random_draw(rng, knobs, PLAIN) for _ in range(500)]
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
            clip, 1, augment.random_draw(rng, only, PLAIN), only, sizes
        )
        for key in plain:
            np.testing.assert_array_equal(quiet[key], plain[key])
        only[name]["probability"] = 1.0
        loud = network_inputs.frame_inputs(
            clip, 1, augment.random_draw(rng, only, PLAIN), only, sizes
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


def test_a_sample_in_other_colours_is_another_person_in_all_its_pictures():
    """Source, targets and what the encoders see take one colour matrix; labels and masks do not change."""
    clip, knobs = fixtures.make_clip(1, frames=6, size=96), augment.default_augment()
    rng = np.random.default_rng(0)
    assert augment.random_sample(rng, knobs).colour is None
    knobs["colour"]["probability"] = 1.0
    assert augment.random_sample(rng, knobs).colour.shape == (3, 4)
    colour = transforms.colour_matrix(0.7, 0.8, 0.5, 0.1)  # dull enough that nothing is clipped
    neutral = augment.neutral_draw(knobs)
    other = dataclasses.replace(neutral, sample=augment.SampleDraw(flip=False, colour=colour))
    before, after = (
        network_inputs.frame_inputs(clip, 1, draw, knobs, (48, 48, 48)) for draw in (neutral, other)
    )
    changed = {key for key in before if not np.array_equal(before[key], after[key])}
    assert changed == {"image", "pose_image", "expression_image"}
    # A linear map commutes with the resampling, but for the roundings before and after it.
    wanted = before["image"] @ colour[:, :3].T + colour[:, 3]
    np.testing.assert_allclose(after["image"], wanted, atol=2)
    assert np.abs(before["image"] - wanted).mean() > 10
