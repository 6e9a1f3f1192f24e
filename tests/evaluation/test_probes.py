"""Probes find what is there and nothing else; the gauge is recovered exactly."""

import numpy as np
import pytest

from dexportrait_jax import geometry
from dexportrait_jax.evaluation import probes


def _poses(generator, count, angles=30.0):
    pitch, yaw, roll = generator.uniform(-angles, angles, (3, count))
    rotation = geometry.euler_to_rotation(pitch, yaw, roll)
    scale = generator.uniform(0.7, 1.4, count)
    shift = np.concatenate([generator.uniform(-0.4, 0.4, (count, 2)), np.zeros((count, 1))], 1)
    return np.asarray(geometry.pose_matrix(rotation, shift, scale), np.float64)


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def test_a_linear_latent_is_read_and_noise_is_not(generator):
    people = np.repeat(np.arange(60), 10)
    truth = generator.normal(size=(600, 3))
    latent = truth @ generator.normal(size=(3, 16)) + 0.01 * generator.normal(size=(600, 16))
    other = generator.normal(size=(600, 2))
    fit, score = slice(0, 400), slice(400, 600)
    probe = probes.fit_probe(latent[fit], truth[fit], people[fit])
    assert (probes.r_squared(probe.predict(latent[score]), truth[score]) > 0.99).all()
    probe = probes.fit_probe(latent[fit], other[fit], people[fit])
    assert np.abs(probes.r_squared(probe.predict(latent[score]), other[score])).max() < 0.05


def test_ridge_by_hand():
    """One feature, -1 and 1: slope = sum(xy) / (sum(x^2) + strength * sum(x^2)) = 1 / (1 + strength)."""
    probe = probes._ridge(np.array([[2.0], [4.0]]), np.array([[10.0], [12.0]]), 1.0)
    np.testing.assert_allclose(probe.weights, [[0.5]])
    np.testing.assert_allclose(probe.predict(np.array([[3.0], [5.0]])), [[11.0], [12.0]])


def test_r_squared_by_hand():
    targets = np.array([[0.0, 3.0], [2.0, 3.0]])
    predicted = np.array([[0.0, 1.0], [1.0, 2.0]])
    np.testing.assert_allclose(probes.r_squared(predicted, targets), [0.5, 0.0])


def test_a_latent_that_never_moves_tells_nothing(generator):
    probe = probes.fit_probe(np.zeros((20, 4)), generator.normal(size=(20, 2)), np.arange(20))
    assert np.ptp(probe.predict(np.zeros((5, 4))), axis=0).max() == 0


def test_identity_leak_of_a_name_tag_and_of_noise(generator):
    people = np.repeat(np.arange(10), 20)
    tag = generator.normal(size=(10, 12))[people] + 0.05 * generator.normal(size=(200, 12))
    leak, chance = probes.identity_leak(tag, people)
    assert chance == 0.1 and leak == pytest.approx(0.9)
    leak, _ = probes.identity_leak(generator.normal(size=(200, 12)), people)
    assert abs(leak) < 0.12  # 100 guesses at 10 %: deviation 3 %


def test_gauge_is_recovered(generator):
    true = _poses(generator, 200)
    gauge = _poses(generator, 1)[0]
    lifted = np.vstack([gauge, [0, 0, 0, 1]])
    found = true @ lifted
    found[:, 2, 3] = 0  # as pose encoders do
    back = probes.fit_gauge(found, true).remove(found)
    errors = probes.pose_errors(back, true)
    assert errors["degrees"].max() < 1e-3 and errors["scale"].max() < 1e-6
    assert errors["shift"].max() < 1e-6
    assert probes.pose_errors(found, true)["degrees"].mean() > 5  # without the gauge: off


def test_pose_errors_by_hand():
    poses = geometry.pose_matrix(
        geometry.euler_to_rotation(*np.array([[0.0, 0], [0, 20], [0, 0]])),
        np.array([[0.0, 0, 0], [0.3, 0.4, 0]]),
        np.array([1.0, 1.5]),
    )
    identity = np.repeat(np.eye(3, 4)[None], 2, 0)
    errors = probes.pose_errors(np.asarray(poses), identity)
    np.testing.assert_allclose(errors["degrees"], [0, 20], atol=1e-4)
    np.testing.assert_allclose(errors["scale"], [0, 0.5], atol=1e-6)
    np.testing.assert_allclose(errors["shift"], [0, 0.5], atol=1e-6)
