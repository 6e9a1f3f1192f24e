"""Similarities on the device are those of the data pipeline, for pictures and for poses."""

import jax
import numpy as np

from data_pipelines import transforms
from data_pipelines.augment import default_augment
from dexportrait_jax import geometry
from dexportrait_jax.tasks.equivariance import draw_similarities, move_pictures
from tests.fixtures import head_pose


def test_pictures_and_poses_move_as_in_the_data_pipeline():
    similarity = {"roll": 17.0, "scale": 1.2, "shift": (0.3, -0.15)}
    matrix = transforms.similarity_matrix(**similarity)
    ours = head_pose(**similarity)  # P of a frontal head, moved
    size = 32
    waves = (
        np.sin(np.linspace(0, 5, size))[:, None, None] * np.cos(np.linspace(0, 3, size))[:, None]
    )
    picture = np.uint8(127 + 120 * waves * np.array([1.0, -0.5, 0.2]))
    moved = jax.jit(move_pictures)(np.float32(picture)[None], ours[None])[0]
    # OpenCV's weights are in steps of 1/32.
    np.testing.assert_allclose(moved, transforms.sample_picture(picture, matrix, size), atol=1.5)

    pose = head_pose(yaw=30, pitch=-10, roll=5, scale=0.9, shift=(0.1, 0.2))
    expected = transforms.transform_head_pose(matrix, pose)
    np.testing.assert_allclose(geometry.compose(ours, pose), expected, atol=1e-6)


def test_drawn_similarities_lie_in_the_ranges_of_the_config():
    ranges = default_augment()["similarity"]
    drawn = jax.jit(lambda key: draw_similarities(key, 500, ranges))(jax.random.key(0))
    rotation, shift, scale = geometry.decompose(drawn)
    pitch, yaw, roll = geometry.rotation_to_euler(rotation)
    np.testing.assert_allclose([pitch, yaw], 0, atol=1e-4)
    for values, low, high in (
        (roll, -20, 20),
        (np.log(scale), np.log(0.8), np.log(1.25)),
        (shift[:, 0], -0.2, 0.2),
        (shift[:, 1], -0.2, 0.2),
    ):
        assert low <= values.min() < 0.95 * low and 0.95 * high < values.max() <= high
    np.testing.assert_array_equal(shift[:, 2], 0)
    # Each is drawn for itself: of 500 draws, correlations spread by 0.045.
    together = np.corrcoef([roll, np.log(scale), shift[:, 0], shift[:, 1]])
    assert np.abs(together - np.eye(4)).max() < 0.18
