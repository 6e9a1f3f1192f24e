"""Encoders that are known by construction get the figures that they must get."""

import dataclasses

import numpy as np
import pytest

from dexportrait_jax.evaluation.disentanglement import (
    Encoded,
    encoder_figures,
    placement,
    pose_angles,
)
from dexportrait_jax.geometry import euler_to_rotation
from tests.evaluation.test_probes import _poses

NAMES = ("jaw", "smile", "gaze_x", "gaze_y")


def _encoded(
    seed,
    people,
    frames=8,
    *,
    tell_identity=0.0,
    tell_pose=0.0,
    tell_placement=0.0,
    turned_by=(),
    degrees=20.0,
    straight=True,
    say=1.0,
):
    """`turned_by`: indices of parameters that turn every found pose, by `degrees` of pitch, yaw, roll at 1.

    `straight`: heads look straight ahead then, so that what turns them is all that there is to see.
    """
    generator = np.random.default_rng(seed)
    count = people * frames
    person = np.repeat(np.arange(people), frames)
    true = _poses(generator, count)
    parameters = generator.uniform(-1, 1, (count, 4))
    mixing = np.random.default_rng(99).normal(size=(4, 24))
    latents = say * parameters @ mixing + 0.05 * generator.normal(size=(count, 24))
    latents += tell_identity * generator.normal(size=(people, 24))[person]
    latents += tell_pose * (pose_angles(true) / 20) @ np.random.default_rng(98).normal(size=(3, 24))
    told = placement(true) / placement(true).std(0)
    latents += tell_placement * told @ np.random.default_rng(97).normal(size=(3, 24))
    found = true
    if turned_by:
        if straight:
            true = np.repeat(np.eye(3, 4)[None], count, 0)
        angles = np.zeros((3, count))
        angles[: len(turned_by)] = degrees * parameters[:, turned_by].T
        turned = true[:, :, :3] @ np.asarray(euler_to_rotation(*angles))
        found = np.concatenate([turned, true[:, :, 3:]], -1)
    return Encoded(person, found, latents, true, parameters)


def _figures(**options):
    return encoder_figures(_encoded(0, 80, **options), _encoded(1, 20, **options), NAMES)


def test_perfect_encoders():
    figures, each = _figures()
    assert figures["pose_error_degrees"] < 1e-4 and figures["shift_error"] < 1e-6
    assert figures["expression_r2"] > 0.99 and figures["gaze_r2"] > 0.99
    assert set(each) == set(NAMES) and min(each.values()) > 0.99
    for name in ("pose_leak_r2", "placement_leak_r2", "expression_in_pose_r2"):
        assert abs(figures[name]) < 0.1, name
    assert abs(figures["identity_leak"]) < 0.1 and figures["identity_chance"] == pytest.approx(0.05)


def test_leaks_are_seen():
    figures, _ = _figures(tell_identity=2.0)
    assert figures["identity_leak"] > 0.8 and abs(figures["pose_leak_r2"]) < 0.1
    figures, _ = _figures(tell_pose=1.0)
    assert figures["pose_leak_r2"] > 0.9 and figures["identity_leak"] < 0.15


def test_a_latent_that_tells_placement():
    figures, _ = _figures(tell_placement=1.0)
    assert figures["placement_leak_r2"] > 0.9 and abs(figures["pose_leak_r2"]) < 0.1
    assert abs(_figures()[0]["placement_leak_r2"]) < 0.1


def test_a_placement_leak_is_the_mean_of_size_and_shift():
    """Told of the size alone, it is a third."""
    encoded = [_encoded(seed, people) for seed, people in ((0, 80), (1, 20))]
    told = [
        dataclasses.replace(
            one, latents=np.hstack([one.latents, 9 * placement(one.true_poses)[:, :1]])
        )
        for one in encoded
    ]
    figures, _ = encoder_figures(*told, NAMES)
    assert figures["placement_leak_r2"] == pytest.approx(1 / 3, abs=0.05)


def test_poses_that_expressions_turn():
    """Mean over all but gaze: both of jaw and smile turn the head, one of them, or gaze alone, which does not count."""
    both, _ = _figures(turned_by=[0, 1])
    assert both["expression_in_pose_r2"] > 0.9
    one, _ = _figures(turned_by=[1])
    assert one["expression_in_pose_r2"] == pytest.approx(0.5, abs=0.06)
    gaze, _ = _figures(turned_by=[2, 3])
    assert abs(gaze["expression_in_pose_r2"]) < 0.1
    assert abs(_figures()[0]["expression_in_pose_r2"]) < 0.1


@pytest.mark.parametrize("degrees", [1.0, 6.0])
def test_small_turns_by_expressions_are_seen_beside_the_true_pose(degrees):
    """Among poses of all kinds jaw and smile turn heads a little: the poses alone do not tell, their errors do."""
    both, _ = _figures(turned_by=[0, 1], degrees=degrees, straight=False)
    assert abs(both["expression_in_pose_r2"]) < 0.1
    assert both["expression_in_pose_error_r2"] > 0.95
    one, _ = _figures(turned_by=[1], degrees=degrees, straight=False)
    assert one["expression_in_pose_error_r2"] == pytest.approx(0.5, abs=0.06)
    gaze, _ = _figures(turned_by=[2, 3], degrees=degrees, straight=False)
    assert abs(gaze["expression_in_pose_error_r2"]) < 0.1


def test_a_latent_that_says_nothing():
    figures, _ = _figures(say=0.0)
    assert abs(figures["expression_r2"]) < 0.1


def test_a_gauge_that_differs_from_person_to_person_is_seen():
    """Every second held-out head is found 8 degrees further left, the others 8 further right than the one gauge."""
    held_out = _encoded(1, 20)
    own = np.asarray(euler_to_rotation(0.0, np.array([8.0, -8.0])[held_out.people % 2], 0.0))
    lifted = np.zeros((len(own), 4, 4))
    lifted[:, :3, :3], lifted[:, 3, 3] = own, 1
    turned = dataclasses.replace(held_out, poses=held_out.true_poses @ lifted)
    figures, _ = encoder_figures(_encoded(0, 80), turned, NAMES)
    assert figures["gauge_spread_degrees"] == pytest.approx(8, abs=1e-4)
    assert figures["pose_error_degrees"] == pytest.approx(8, abs=1e-4)
    assert _figures()[0]["gauge_spread_degrees"] < 1e-4
