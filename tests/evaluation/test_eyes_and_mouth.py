"""Openings, and how they are compared: answers worked out by hand, on drawn heads whose lids and lips are known."""

import numpy as np
import pytest

from data_pipelines.prepare.masks import LANDMARKS_OF
from dexportrait_jax.evaluation.estimators import OPENINGS, Estimate, openings, remembering
from dexportrait_jax.evaluation.eyes_and_mouth import Track, clip_masks, following, pooled
from tests import fixtures


def outline(points, width, gap):
    """A closed outline with only corners and middles in place."""
    polygon = np.zeros((1, points, 2))
    quarter = points // 4
    polygon[0, 0], polygon[0, 2 * quarter] = (-width / 2, 0), (width / 2, 0)
    polygon[0, quarter], polygon[0, 3 * quarter] = (0, gap), (0, 0)
    return polygon


def test_openings_by_hand():
    outlines = {
        "right_eye": outline(16, 2.0, 0.5),
        "left_eye": outline(16, 2.0, 0.0),
        "inner_lips": outline(20, 0.5, 0.4),
    }
    np.testing.assert_allclose(openings(outlines), [[0.25, 0.0, 0.8]])
    turned = {name: points @ [[0.0, -3.0], [3.0, 0.0]] for name, points in outlines.items()}
    np.testing.assert_allclose(openings(turned), [[0.25, 0.0, 0.8]])  # of any size and any way up


def test_the_middles_are_those_of_lids_and_lips():
    """MediaPipe's numbers of corner, lower middle, other corner, upper middle."""
    for name, numbers in (
        ("right_eye", (33, 145, 133, 159)),
        ("left_eye", (263, 374, 362, 386)),
        ("inner_lips", (78, 14, 308, 13)),
    ):
        points = LANDMARKS_OF[name]
        assert points[:: len(points) // 4] == numbers


def test_pooled_by_hand():
    """Deviations (-1, 0, 1), (-2, 0, 2) and (-1, 1), (.5, -.5): xx = 4, xy = 3, yy = 8.5."""
    pairs = [
        (np.array([10.0, 11, 12]), np.array([0.0, 2, 4])),
        (np.array([0.0, 2, 1]), np.array([1.0, 0, np.nan])),  # the third was not read
        (np.array([5.0, 6]), np.array([np.nan, 3])),  # one frame is no movement
    ]
    correlation, slope = pooled(pairs)
    assert slope == pytest.approx(0.75) and correlation == pytest.approx(3 / np.sqrt(34))
    still, moving = np.full(7, 0.1), np.arange(7.0)  # 0.1 seven times has a mean that is rounded
    assert pooled([(moving, still)]) == (0.0, 0.0)
    assert pooled([(still, moving)]) == pooled([]) == (None, None)


class Scripted:
    """Reads what is written in a picture: its first pixel is a number in `table`."""

    def __init__(self):
        self.table, self.calls = [None], 0

    def picture(self, opened):
        self.table.append(opened)
        return np.full((8, 8, 3), len(self.table) - 1, np.uint8)

    def __call__(self, picture):
        self.calls += 1
        opened = self.table[picture[0, 0, 0]]
        return None if opened is None else Estimate(np.zeros(3), np.zeros(2), opened)


def test_following_by_hand():
    """A mouth that opens half as far, eyes that close where the driver's open; a control that never moves."""
    clip, read = fixtures.make_clip(0, 10), Scripted()
    indices = np.arange(1, 10)
    driver = openings({name: clip.mask_polygons[name][indices] for name in OPENINGS})
    assert np.ptp(driver, axis=0).min() > 0.2  # the drawn head blinks and speaks
    made = [read.picture(opened * (-1, -1, 0.5) + (3, 2, 0.1)) for opened in driver]
    track = Track(read)
    track.add(
        clip,
        indices,
        made=np.stack(made),
        control=np.stack([read.picture(np.array([0.3, 0.3, 0.1]))] * len(indices)),
        ceiling=np.stack([read.picture(opened) for opened in driver]),
    )
    figures = following([track])
    expected = {
        "mouth_r": 1, "mouth_slope": 0.5, "eyes_r": -1, "eyes_slope": -1,
        "mouth_r_control": 0, "mouth_slope_control": 0, "eyes_r_control": 0, "eyes_slope_control": 0,
        "mouth_r_ceiling": 1, "mouth_slope_ceiling": 1, "eyes_r_ceiling": 1, "eyes_slope_ceiling": 1,
        "faces_found": 1, "faces_found_control": 1, "faces_found_ceiling": 1,
    }  # fmt: skip
    assert figures == pytest.approx(expected, abs=1e-9)


def test_each_clip_has_its_own_mean():
    """Two clips that agree with their drivers about means far apart: pooled without them, r would be lost."""
    read, tracks = Scripted(), []
    for number, offset in ((0, 5.0), (1, -5.0)):
        clip, indices = fixtures.make_clip(number, 8), np.arange(8)
        driver = openings({name: clip.mask_polygons[name] for name in OPENINGS})
        pictures = np.stack([read.picture(opened + offset) for opened in driver])
        track = Track(read)
        track.add(clip, indices[:3], made=pictures[:3], control=pictures[:3], ceiling=pictures[:3])
        track.add(clip, indices[3:], made=pictures[3:], control=pictures[3:], ceiling=pictures[3:])
        tracks.append(track)
    figures = following(tracks)
    assert figures["mouth_r"] == pytest.approx(1) and figures["eyes_slope"] == pytest.approx(1)


def test_faces_that_are_not_found_are_counted_not_measured():
    clip, read = fixtures.make_clip(0, 5), Scripted()
    driver = openings({name: clip.mask_polygons[name] for name in OPENINGS})
    blank = read.picture(None)
    pictures = np.stack([read.picture(opened) for opened in driver[:4]] + [blank])
    track = Track(read)
    track.add(clip, np.arange(5), made=pictures, control=np.stack([blank] * 5), ceiling=pictures)
    figures = following([track])
    assert figures["faces_found"] == 0.8 and figures["mouth_slope"] == pytest.approx(1)
    assert figures["faces_found_control"] == 0 and figures["mouth_r_control"] is None
    faceless = Track(lambda picture: Estimate(np.zeros(3), np.zeros(2)))  # reads no landmarks
    faceless.add(clip, np.arange(5), made=pictures, control=pictures, ceiling=pictures)
    assert following([faceless])["mouth_r"] is None and following([faceless])["faces_found"] == 1


def test_a_picture_is_read_once():
    read = Scripted()
    remembered, picture = remembering(read), read.picture(np.ones(3))
    assert remembered(picture).openings is remembered(picture.copy()).openings
    assert read.calls == 1


def test_masks_cover_eyes_and_mouth_alone():
    clip = fixtures.make_clip(0, 4)
    masks = clip_masks(clip, np.array([1, 3]), 64)
    assert masks.shape == (2, 64, 64) and set(np.unique(masks)) == {0, 255}

    def at(index, name):
        x, y = ((clip.mask_polygons[name][index].mean(0) + 1) * 32).astype(int)
        return masks[(1, 3).index(index), y, x]

    for index in (1, 3):
        assert [at(index, name) for name in ("right_eye", "left_eye", "outer_lips")] == [255] * 3
        assert at(index, "nose") == 0
    # Ellipses of half axes .09 x .06 (twice) and .16 x .1, in a square of side 2: some two hundredths.
    assert 0.015 < (masks > 0).mean() < 0.04
