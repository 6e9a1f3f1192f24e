"""Transforms: pictures, polygons and head poses move together.

Clips hold float32: tolerances on crop coordinates are a few of its roundings,
where no other reason is given.
"""

import dataclasses

import cv2
import numpy as np
import pytest

from data_pipelines import records, transforms
from tests import fixtures

SIMILARITIES = [
    {},
    {"flip": True},
    {"roll": 20.0},
    {"scale": 0.8},
    {"shift": (0.15, -0.1)},
    {"roll": -17.0, "scale": 1.2, "shift": (-0.1, 0.05), "flip": True},
]


@pytest.fixture(scope="module")
def clip():
    return fixtures.make_clip(1, frames=6, size=96)


def _project(points, pose):
    return (points @ pose[:, :3].T + pose[:, 3])[:, :2]


@pytest.mark.parametrize("options", SIMILARITIES)
def test_head_pose_follows_the_picture(options):
    """Re-derived: the moved projection of a head is the projection of the head by the moved pose."""
    matrix = transforms.similarity_matrix(**options)
    head = np.random.default_rng(0).normal(size=(50, 3))
    pose = fixtures.head_pose(25, -12, 9, 1.1, (0.1, -0.2))
    moved = transforms.transform_head_pose(matrix, pose)
    mirrored = head * (-1, 1, 1) if options.get("flip") else head
    expected = transforms.transform_points(matrix, _project(head, pose))
    np.testing.assert_allclose(_project(mirrored, moved), expected, atol=1e-6)
    rotation = moved[:, :3] / np.cbrt(np.linalg.det(moved[:, :3]))
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-6)
    assert np.linalg.det(rotation) > 0 and moved[2, 3] == 0


def test_head_pose_by_angles():
    pose = fixtures.head_pose(yaw=20, pitch=10, roll=5, scale=1.0, shift=(0.2, 0.1))
    flipped = transforms.transform_head_pose(transforms.similarity_matrix(flip=True), pose)
    np.testing.assert_allclose(
        flipped, fixtures.head_pose(-20, 10, -5, 1.0, (-0.2, 0.1)), atol=1e-6
    )
    rolled = transforms.transform_head_pose(transforms.similarity_matrix(roll=12, scale=0.9), pose)
    np.testing.assert_allclose(rolled[:, :3], fixtures.head_pose(20, 10, 17, 0.9)[:, :3], atol=1e-6)


@pytest.mark.parametrize("options", SIMILARITIES)
def test_pictures_and_polygons_move_together(options):
    """A drawn blob ends where its polygon says."""
    size, matrix = 128, transforms.similarity_matrix(**options)
    square = np.array([(0.1, -0.3), (0.4, -0.3), (0.4, 0.1), (0.1, 0.1)])
    picture = np.repeat(transforms.fill_polygons([square], size)[..., None], 3, axis=-1)
    moved = transforms.sample_picture(picture, matrix, 96, "black")[..., 0] / 255
    expected = transforms.fill_polygons([transforms.transform_points(matrix, square)], 96) / 255
    assert np.minimum(moved, expected).sum() / np.maximum(moved, expected).sum() > 0.85


@pytest.mark.parametrize("size", [96, 40])
@pytest.mark.parametrize("options", SIMILARITIES)
def test_a_point_of_the_picture_goes_where_the_matrix_says(options, size):
    """To a twentieth of a pixel: a shift of half a pixel would be a different crop contract."""
    matrix, place = transforms.similarity_matrix(**options), np.array([0.15, -0.2])
    grid = (np.arange(128) + 0.5) / 64 - 1
    blob = np.exp(-((grid[None] - place[0]) ** 2 + (grid[:, None] - place[1]) ** 2) / 0.02)
    picture = np.repeat(np.round(255 * blob).astype(np.uint8)[..., None], 3, axis=-1)
    moved = transforms.sample_picture(picture, matrix, size, "black")[..., 0].astype(float)
    rows, columns = np.mgrid[:size, :size]
    found = np.array([(moved * axis).sum() / moved.sum() for axis in (columns, rows)])
    expected = (transforms.transform_points(matrix, place) + 1) * size / 2 - 0.5
    np.testing.assert_allclose(found, expected, atol=0.05)


@pytest.mark.parametrize("options", [*SIMILARITIES, {"roll": 30.0, "scale": 0.3}])
def test_copies_are_where_a_reflecting_border_shows_them(options):
    matrix = transforms.similarity_matrix(**options)
    copies = transforms.shown_copies(matrix, 256, 256)
    np.testing.assert_array_equal(copies[0], matrix)
    assert len(copies) == 1 or "scale" in options or "shift" in options or "roll" in options
    assert len(transforms.shown_copies(matrix, 256, 256, "replicate")) == 1
    spot = np.array([[-0.4, 0.2], [-0.2, 0.2], [-0.2, 0.5], [-0.4, 0.3]])
    shown = transforms.sample_picture(transforms.fill_polygons([spot], 256), matrix, 256) > 127
    drawn = transforms.fill_polygons([transforms.transform_points(c, spot) for c in copies], 256)
    ring = cv2.morphologyEx(drawn, cv2.MORPH_GRADIENT, np.ones((5, 5), np.uint8)) > 0
    assert shown.any() and not (shown != (drawn > 0))[~ring].any()


def test_no_transformation_is_the_picture_itself(clip):
    picture = transforms.decode_frame(clip, 0)
    same = transforms.sample_picture(picture, transforms.similarity_matrix(), clip.size)
    np.testing.assert_array_equal(same, picture)
    smaller = transforms.sample_picture(picture, transforms.similarity_matrix(), 32)
    expected = cv2.resize(picture, (32, 32), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(smaller, expected)


def test_reduction_averages_instead_of_skipping():
    checks = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    small = transforms.sample_picture(
        np.stack([checks] * 3, -1), transforms.similarity_matrix(roll=7), 32
    )
    assert np.abs(small[8:-8, 8:-8].astype(int) - 127).max() <= 20


def test_colour_matrix():
    picture = np.random.default_rng(0).integers(30, 220, (8, 8, 3), np.uint8)
    same = cv2.transform(picture, transforms.colour_matrix(1, 1, 1, 0))
    np.testing.assert_array_equal(same, picture)
    gray = cv2.transform(picture, transforms.colour_matrix(1, 1, 0, 0))
    assert np.ptp(gray, axis=-1).max() == 0
    thirds = cv2.transform(picture, transforms.colour_matrix(1, 1, 1, 1 / 3))
    assert np.abs(thirds.astype(int) - picture[..., [2, 0, 1]]).max() <= 1
    brighter = cv2.transform(picture, transforms.colour_matrix(1.1, 1, 1, 0))
    np.testing.assert_allclose(brighter, picture * 1.1, atol=0.51)


def test_broken_pictures_are_record_errors(clip):
    for data in (b"", b"\xff\xd8 no jpeg \xff\xd9", clip.frames[0][:200], clip.frames[0][:-300]):
        broken = dataclasses.replace(clip, frames=[data])
        with pytest.raises(records.RecordError, match="frame 0"):
            transforms.decode_frame(broken, 0)
