"""Encoders that are known by construction get the figures that they must get."""

import numpy as np
import pytest

from dexportrait_jax.evaluation.disentanglement import Encoded, encoder_figures, pose_angles
from tests.evaluation.test_probes import _poses

NAMES = ("jaw", "smile", "gaze_x", "gaze_y")


def _encoded(seed, people, frames=8, *, tell_identity=0.0, tell_pose=0.0, say=1.0):
    generator = np.random.default_rng(seed)
    count = people * frames
    person = np.repeat(np.arange(people), frames)
    true = _poses(generator, count)
    parameters = generator.uniform(-1, 1, (count, 4))
    mixing = np.random.default_rng(99).normal(size=(4, 24))
    latents = say * parameters @ mixing + 0.05 * generator.normal(size=(count, 24))
    latents += tell_identity * generator.normal(size=(people, 24))[person]
    latents += tell_pose * (pose_angles(true) / 20) @ np.random.default_rng(98).normal(size=(3, 24))
    return Encoded(person, true, latents, true, parameters)


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


def test_a_latent_that_says_nothing():
    figures, _ = _figures(say=0.0)
    assert abs(figures["expression_r2"]) < 0.1
