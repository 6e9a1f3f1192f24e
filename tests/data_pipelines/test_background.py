"""How much a background moves: of pictures that move by a known amount, at every stored size."""

import dataclasses

import cv2
import numpy as np
import pytest

from data_pipelines import background, dataset_files, records, transforms
from data_pipelines.measure import run_measure
from dexportrait_jax import cli
from tests import fixtures


def _clip(pictures, box=(-0.3, -0.3, 0.3, 0.4)):
    frames = [cv2.imencode(".jpg", picture)[1].tobytes() for picture in pictures]
    clip = fixtures.make_clip(0, len(frames), pictures[0].shape[0])
    boxes = np.tile(np.float32(box), (len(frames), 1))
    return dataclasses.replace(clip, frames=frames, face_boxes=boxes, background_motion=None)


@pytest.mark.parametrize("size", [48, 64, 200, 512])
def test_a_flicker_is_measured_in_brightness(size):
    grays = [100, 151, 151, 49]
    clip = _clip([np.full((size, size, 3), gray, np.uint8) for gray in grays])
    np.testing.assert_allclose(background.motion(clip, 0, 4), [0, 0.2, 0, 0.4], atol=0.005)
    part = background.motion(clip, 1, 4)
    np.testing.assert_array_equal(part, [0, *background.motion(clip, 0, 4)[2:]])


def test_the_head_does_not_count():
    """A head of 0.6 that flickers in the middle: neither it nor what is beneath it, but what is beside it."""
    pictures = [np.full((64, 64, 3), 100, np.uint8) for _ in range(3)]
    pictures[1][22:46, 22:42] = 250  # inside [-0.3, 0.3] x [-0.3, 0.4]
    pictures[1][46:, :] = 250
    pictures[2][:, :8] = 202
    quiet, loud = background.motion(_clip(pictures[:2]), 0, 2)[1], _clip(pictures)
    assert quiet < 0.002
    # The strip is all columns up to -0.75 of those up to -0.48 and from 0.48, and as wide above the head.
    assert 0.05 < background.motion(dataclasses.replace(loud), 0, 3)[2] < 0.4
    fills = _clip(pictures, box=(-0.9, -0.9, 0.9, 0.9))
    np.testing.assert_array_equal(background.motion(fills, 0, 3), 0)


def test_a_head_that_moves_is_no_background_where_it_was():
    """From the left to the right: nothing else changes, and above both there is background to judge."""
    pictures = [np.full((64, 64, 3), 100, np.uint8) for _ in range(2)]
    pictures[0][24:40, 4:16] = pictures[1][24:40, 48:60] = 250
    boxes = np.float32([[-0.9, -0.3, -0.5, 0.3], [0.5, -0.3, 0.9, 0.3]])
    clip = dataclasses.replace(_clip(pictures), face_boxes=boxes)
    assert background._outside(boxes).mean() > 0.1
    assert background.motion(clip, 0, 2)[1] < 0.002


def test_what_is_background_by_hand():
    """Beside two frames' boxes by 0.3 of their width of 0.6, above them by half of their height of 0.7, not beneath."""
    boxes = np.array([[-0.3, -0.2, 0.2, 0.4], [-0.2, -0.3, 0.3, 0.3]])
    grid = (np.arange(48) + 0.5) / 24 - 1
    expected = (np.abs(grid) > 0.48)[None] | (grid < -0.65)[:, None]
    expected &= (grid <= 0.4)[:, None]
    found = background._outside(boxes)
    assert found.sum() == 34 * 24 + 8 * 24
    np.testing.assert_array_equal(found, expected)


def test_what_lies_beyond_the_original_does_not_count():
    """Black bars on the left and beneath never move; the rest flickers by a fifth."""
    pictures = []
    for gray in (100, 151):
        picture = np.full((96, 96, 3), gray, np.uint8)
        picture[:, :32] = picture[64:] = 0
        pictures.append(picture)
    clip = _clip(pictures)
    with_bars = dataclasses.replace(
        clip, crop_box=np.float32([-100, 300, 200, 600]), original_size=np.float32([640, 500])
    )
    assert background.motion(with_bars, 0, 2)[1] == pytest.approx(0.2, abs=0.005)
    whole = dataclasses.replace(
        clip, crop_box=np.float32([0, 0, 300, 300]), original_size=np.float32([640, 500])
    )
    assert background.motion(whole, 0, 2)[1] < 0.16


def test_windows_are_means_over_their_own_pairs():
    of_frames = np.float32([0.5, 0.1, 0.2, 0.6, 0.0])
    windows = background.all_windows(of_frames, [5], 3)
    np.testing.assert_allclose(windows, [0.15, 0.4, 0.3], atol=1e-7)
    for start in range(3):
        assert background.window_motion(of_frames[start : start + 3]) == pytest.approx(
            windows[start]
        )
    assert background.window_motion(of_frames[:1]) == 0
    np.testing.assert_array_equal(background.all_windows(of_frames, [5], 1), np.zeros(5))
    assert len(background.all_windows(of_frames, [5], 6)) == 0


def test_windows_lie_within_one_clip():
    of_frames = np.float32([0.0, 0.1, 0.3, 0.0, 0.0, 0.4, 0.2, 0.6])
    np.testing.assert_allclose(
        background.all_windows(of_frames, [3, 1, 4], 3), [0.2, 0.3, 0.4], atol=1e-7
    )
    np.testing.assert_allclose(
        background.all_windows(of_frames, [3, 1, 4], 2), [0.1, 0.3, 0.4, 0.2, 0.6], atol=1e-7
    )


def test_a_frame_that_is_no_picture_is_a_record_error():
    clip = _clip([np.zeros((64, 64, 3), np.uint8)] * 2)
    broken = dataclasses.replace(clip, frames=[clip.frames[0], clip.frames[1][:50]])
    with pytest.raises(records.RecordError, match="frame 1 is not a whole picture"):
        background.motion(broken, 0, 2)
    with pytest.raises(records.RecordError, match="frame 0"):
        transforms.decode_brightness(dataclasses.replace(clip, size=100), 0, 48)


def test_the_job_leaves_what_is_there_and_refuses_what_is_no_dataset(tmp_path, capfd):
    directory = fixtures.make_dataset(tmp_path / "data", 2, 4, 48)
    fixtures.make_older(directory)
    run_measure(directory)
    said = capfd.readouterr().out
    assert "2 clips, 8 frames" in said and said.count("is there already") == 1  # validation
    assert (directory / dataset_files.background_name("train")).stat().st_size < 1000
    assert cli.run(["measure", f"--data={tmp_path}"]) == 1
    assert "is no dataset; give the --out of `dexportrait prepare`" in capfd.readouterr().err
