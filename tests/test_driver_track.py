"""driver_track.py by values: what stands in for a face that is away."""

import numpy as np

from data_pipelines.prepare.driver import Driver
from dexportrait_jax import driver_track
from tests import fixtures
from tests.test_animate import StubModel
from tests.test_driving import pose

SEEN = np.array([True, False, False, True, True])
TIMES = np.array([0.0, 0.1, 0.4, 0.5, 0.6])


def test_a_gap_in_the_pose_is_bridged_at_even_speed():
    first, second = pose(yaw=-40, x=0.1, scale=1.0), pose(yaw=60, x=0.6, y=1.0, scale=2.0)
    bridged = driver_track.bridge_poses(np.stack([first, second, second]), SEEN, TIMES)
    # a fifth and four fifths of the way, by time and not by number
    wanted = [pose(yaw=-20, x=0.2, y=0.2, scale=2**0.2), pose(yaw=40, x=0.5, y=0.8, scale=2**0.8)]
    np.testing.assert_allclose(bridged[1:3], wanted, atol=1e-6)
    np.testing.assert_array_equal(bridged[SEEN], [first, second, second])


def test_a_gap_in_the_expression_is_bridged():
    codes = np.array([[0.0, 10.0], [5.0, 0.0], [7.0, 7.0]], np.float32)
    bridged = driver_track.bridge_codes(codes, SEEN, TIMES)
    np.testing.assert_allclose(bridged, [[0, 10], [1, 8], [4, 2], [5, 0], [7, 7]], atol=1e-6)


def test_a_long_gap_in_the_expression_is_bridged():
    """Of more frames than are reckoned together."""
    seen, times = np.zeros(31, bool), np.arange(31) / 25
    seen[[0, 30]] = True
    bridged = driver_track.bridge_codes(np.array([[0.0], [60.0]], np.float32), seen, times)
    np.testing.assert_allclose(bridged[:, 0], 2 * np.arange(31), atol=1e-5)


def test_a_clip_that_ends_in_a_gap_is_bridged_to_the_face_behind_it():
    model, clip = StubModel(), fixtures.make_clip(1, 3)
    driver = Driver(clip, TIMES, SEEN)
    whole = driver_track.encode_driver(model, driver, 5)
    short = driver_track.encode_driver(model, driver, 2)
    assert len(whole.poses) == len(whole.expressions) == 5
    np.testing.assert_array_equal(short.poses, whole.poses[:2])
    np.testing.assert_array_equal(short.expressions, whole.expressions[:2])
    assert (whole.expressions[1] != whole.expressions[0]).any()


def test_nothing_is_touched_without_a_gap():
    poses = np.stack([pose(yaw=3.0 * number) for number in range(5)])
    assert driver_track.bridge_poses(poses, np.ones(5, bool), TIMES) is poses
