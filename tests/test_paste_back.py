"""paste_back.py: where the mask is zero nothing changes, where it is one the result is shown, no
seam between.
"""

import numpy as np
import pytest

from dexportrait_jax import paste_back


def ellipse(x=0.0, y=0.0, radius=0.4, points=40):
    angle = np.linspace(0, 2 * np.pi, points)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle), 0 * angle], axis=1)


def test_mask_covers_every_face_and_vanishes_at_the_border():
    mask = paste_back.face_mask([ellipse(), ellipse(y=0.3)], 100)
    assert mask.min() == 0.0 and mask.max() == pytest.approx(1.0)
    assert (
        mask[50, 50] > 0.99 and mask[76, 50] > 0.99
    )  # centre and, at y = 0.53, the second face's chin
    for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1]):
        assert edge.max() == 0.0
    wide = paste_back.face_mask([ellipse(radius=2.0)], 64)  # a face larger than the crop
    assert wide[0].max() == 0.0 and wide[32, 32] > 0.99


def test_mask_edge_lies_dilated_by_five_percent():
    mask = paste_back.face_mask([ellipse(radius=0.4)], 200)
    # radius 40 px + dilation 10 px: half opacity at 50 px from the centre
    assert abs(int(np.sum(mask[100, 100:] > 0.5)) - 50) <= 2


def square(half=0.5):
    return np.array([[-half, -half], [half, -half], [half, half], [-half, half]])


def test_nothing_but_the_outline():
    """Without dilation, feather and border: on 64 pixels -0.5 .. 0.5 is 15.5 .. 47.5, rounded to even 16 .. 48."""
    mask = paste_back.face_mask([square()], 64, dilation=0, feather=0, border=0)
    expected = np.zeros((64, 64))
    expected[16:49, 16:49] = 1
    np.testing.assert_array_equal(mask, expected)


def test_dilation_reaches_farther():
    """By so many pixels on each side, of a square of 33."""
    areas = []
    for dilation, pixels in ((0, 0), (0.05, 3), (0.1, 6), (0.2, 13)):
        mask = paste_back.face_mask([square()], 64, dilation=dilation, feather=0, border=0)
        assert mask[32].sum() == mask[:, 32].sum() == 33 + 2 * pixels
        areas.append(mask.sum())
    assert areas == sorted(set(areas))
    wide = paste_back.face_mask([square(1.0)], 64, dilation=0.4, feather=0, border=0)
    assert (wide == 1).all()  # as nothing is left out at the border


def test_feather_is_the_sigma_of_an_edge():
    """Of a straight edge the blur is the normal distribution: 84 % opaque at one sigma inside, 16 % outside."""
    mask = paste_back.face_mask([square()], 400, dilation=0, feather=0.05, border=0)
    row = mask[200]  # the square's last column is 300, so the edge is at 300.5
    assert np.interp(300.5, np.arange(400), row) == pytest.approx(0.5, abs=0.005)
    assert np.interp(280.5, np.arange(400), row) == pytest.approx(0.8413, abs=0.005)
    assert np.interp(320.5, np.arange(400), row) == pytest.approx(0.1587, abs=0.005)


def test_mask_of_the_whole_crop_by_hand():
    mask = paste_back.crop_mask(100)  # a tenth at each border
    assert mask[50, [0, 1, 5, 9, 10, 50, 89, 90, 94, 99]] == pytest.approx(
        [0, 0.1, 0.5, 0.9, 1, 1, 1, 0.9, 0.5, 0]
    )
    assert mask[3, 7] == mask[7, 3] == pytest.approx(0.3)  # the nearest edge counts
    assert paste_back.crop_mask(100, border=0.25)[50, 5] == pytest.approx(0.2)
    assert (paste_back.crop_mask(10, border=0) == 1).all()
    np.testing.assert_array_equal(mask, mask[::-1, ::-1])


def test_whole_crop_pasted_by_hand():
    """A crop of 100 pixels where it came from: 200 over 40 is 40 + 160 times the opacity."""
    random = np.random.default_rng(0)
    frame = random.integers(0, 256, (140, 160, 3), dtype=np.uint8)
    frame[20:120, 30:130] = 40
    result = np.full((100, 100, 3), 200, np.uint8)
    box = np.array([30.0, 20.0, 130.0, 120.0])
    pasted = paste_back.paste(frame, result, box, paste_back.crop_mask(100))
    columns = 30 + np.array([0, 1, 5, 9, 10, 94])
    assert pasted[70, columns, 0].tolist() == [40, 56, 120, 184, 200, 120]
    outside = np.ones((140, 160), bool)
    outside[20:120, 30:130] = False
    assert (pasted[outside] == frame[outside]).all()


def test_paste_keeps_the_rest_bit_for_bit():
    random = np.random.default_rng(0)
    frame = random.integers(0, 256, (120, 160, 3), dtype=np.uint8)
    result = np.full((64, 64, 3), 200, np.uint8)
    mask = paste_back.face_mask([ellipse(radius=0.3)], 64)
    pasted = paste_back.paste(frame, result, np.array([40.0, 20.0, 120.0, 100.0]), mask)
    assert (pasted[60, 80] == 200).all()
    outside = np.ones((120, 160), bool)
    outside[20:100, 40:120] = False
    assert (pasted[outside] == frame[outside]).all()
    assert (pasted[22:26, 42:118] == frame[22:26, 42:118]).all()
    assert pasted.shape == frame.shape and pasted.dtype == np.uint8


def test_pasting_the_crop_itself_changes_nothing():
    """The grid of the box is the grid of the pixels: no half-pixel shift."""
    random = np.random.default_rng(1)
    frame = random.integers(0, 256, (90, 90, 3), dtype=np.uint8)
    crop = frame[10:74, 5:69].copy()
    mask = paste_back.face_mask([ellipse()], 64)
    pasted = paste_back.paste(frame, crop, np.array([5.0, 10.0, 69.0, 74.0]), mask)
    assert np.abs(pasted.astype(int) - frame).max() <= 1


@pytest.mark.parametrize("size", [32, 300])
def test_sizes_other_than_the_boxs_keep_a_smooth_picture(size):
    rows = np.linspace(0, 255, 200)
    frame = np.repeat(np.repeat(rows[:, None, None], 200, 1), 3, 2).astype(np.uint8)
    box = np.array([40.0, 40.0, 160.0, 160.0])
    inside = 40 + (np.arange(size) + 0.5) * 120 / size - 0.5
    values = np.interp(inside, np.arange(200), rows)
    result = np.repeat(np.repeat(values[:, None, None], size, 1), 3, 2).astype(np.uint8)
    pasted = paste_back.paste(frame, result, box, paste_back.face_mask([ellipse()], size))
    assert np.abs(pasted.astype(int) - frame).max() <= 3


def test_box_beyond_the_frame():
    frame = np.zeros((50, 50, 3), np.uint8)
    result = np.full((40, 40, 3), 255, np.uint8)
    mask = np.ones((40, 40), np.float32)
    pasted = paste_back.paste(frame, result, np.array([-20.0, -20.0, 20.0, 20.0]), mask)
    assert (pasted[:20, :20] == 255).all() and pasted[20:].max() == 0 and pasted[:, 20:].max() == 0
    gone = paste_back.paste(frame, result, np.array([80.0, 80.0, 120.0, 120.0]), mask)
    assert gone.max() == 0


def test_a_box_beyond_the_frame_keeps_its_places():
    """What was cut by it, black beyond the frame, lands where it came from: on every side that the box reaches over."""
    frame = np.random.default_rng(2).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    wide = np.pad(frame, ((20, 20), (20, 20), (0, 0)))
    for x0, y0 in ((-12, -7), (25, 17), (-2, 9)):
        crop = wide[y0 + 20 : y0 + 68, x0 + 20 : x0 + 68]
        box = np.array([x0, y0, x0 + 48, y0 + 48], float)
        pasted = paste_back.paste(np.zeros_like(frame), crop, box, np.ones((48, 48), np.float32))
        shown = np.s_[max(y0, 0) : y0 + 48, max(x0, 0) : x0 + 48]
        np.testing.assert_array_equal(pasted[shown], frame[shown])
        assert pasted.astype(int).sum() == frame[shown].astype(int).sum()


def test_a_result_larger_than_its_box_is_averaged():
    """Single pixels, black and white in turn, at a fifth of the size: 12 or 13 of 25 are white."""
    checks = (np.indices((200, 200)).sum(0) % 2 * 255).astype(np.uint8)
    frame, box = np.zeros((60, 60, 3), np.uint8), np.array([10.0, 10.0, 50.0, 50.0])
    pasted = paste_back.paste(frame, np.stack([checks] * 3, -1), box, np.ones((200, 200)))
    assert np.abs(pasted[10:50, 10:50].astype(float) - 255 / 2).max() < 255 / 2 / 25 + 1
