"""driver.py: a driver keeps time while the face is away, and says so."""

import dataclasses
from fractions import Fraction

import av
import numpy as np
import pytest

from data_pipelines.prepare import Settings, driver_from_video
from data_pipelines.video_writing import VideoWriter
from dexportrait_jax.errors import UserError
from tests.data_pipelines.prepare.scripted import ScriptedLandmarker, picture

SETTINGS = Settings(size=64)


def write(path, pictures, times=None):
    """Every picture at its time in milliseconds, nearly without loss."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "4"})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, image in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = times[number] if times else 40 * number
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def drive(path, **options):
    return driver_from_video(path, ScriptedLandmarker(), SETTINGS, **options)


def test_a_face_that_leaves_for_a_while_leaves_the_clock_alone(tmp_path):
    faces = [1] * 5 + [0] * 3 + [1] * 4 + [0] + [1] * 2
    driver = drive(write(tmp_path / "a.mp4", [picture(n) for n in faces]))
    np.testing.assert_array_equal(driver.seen, np.array(faces) == 1)
    np.testing.assert_allclose(driver.times, np.arange(15) * 0.04, atol=1e-3)
    assert len(driver.clip) == 11 == driver.seen.sum()
    assert driver.shown.tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 5, 6, 7, 8, 8, 9, 10]
    assert driver.left_out == (
        "4 of 15 frames show no usable face (no face found), in 2 gap(s), "
        "the longest of 0.16 s from 0.16 s: pose and expression are interpolated there"
    )


def test_a_face_that_is_not_human_leaves_a_gap_that_says_so(tmp_path):
    shown = [dict(), dict(faces=0), dict(dog=True), dict(faces=0), dict()]
    path = write(tmp_path / "a.mp4", [picture(**one) for one in shown for _ in range(3)])
    settings = dataclasses.replace(SETTINGS, mirror_every=1)
    driver = driver_from_video(path, ScriptedLandmarker(), settings)
    assert driver.seen.tolist() == [True] * 3 + [False] * 9 + [True] * 3
    assert "(no face found, not a human face, or too unclear)" in driver.left_out


def test_absence_at_the_ends_is_cut_off_and_told(tmp_path):
    faces = [0] * 2 + [1] * 6 + [0] * 3
    driver = drive(write(tmp_path / "a.mp4", [picture(n) for n in faces]))
    assert len(driver) == 6 and driver.seen.all() and driver.times[0] == 0
    assert driver.left_out == (
        "2 frame(s) before the shot are left out; 3 frame(s) behind the shot are left out"
    )


def test_a_file_that_is_cut_off_is_told(tmp_path):
    """As by a download that broke off: the header is whole, the end of the frames is not there."""
    random = np.random.default_rng(0)
    with VideoWriter(tmp_path / "whole.mp4", 25) as writer:
        for _ in range(30):
            image = picture()
            image[80:] += random.integers(0, 60, image[80:].shape, np.uint8)  # bytes to cut off
            writer.write(image)
    data = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: 2 * len(data) // 3])
    driver = drive(tmp_path / "cut.mp4")
    assert 10 < len(driver) < 25
    assert driver.left_out == (
        f"the file is cut off after frame {len(driver) - 1}: its header tells of 30 frames"
    )
    assert drive(tmp_path / "cut.mp4", max_frames=5).left_out == ""


def test_another_shot_is_no_gap(tmp_path):
    """A cut ends a shot: the one with the most usable frames drives, gaps and all."""
    shots = [picture(1, shade=30)] * 6 + [picture(n, shade=200) for n in (1, 1, 1, 1, 0, 1, 1, 1)]
    driver = drive(write(tmp_path / "a.mp4", shots))
    assert driver.seen.tolist() == [True] * 4 + [False] + [True] * 3
    assert "6 frame(s) before the shot" in driver.left_out


def test_a_variable_rate_keeps_its_times(tmp_path):
    times = [0, 40, 200, 240, 1500, 1540]  # a pause of more than a second is no cut
    driver = drive(write(tmp_path / "a.mp4", [picture()] * 6, times))
    np.testing.assert_allclose(driver.times, np.array(times) / 1000, atol=2e-3)
    assert driver.left_out == ""


def test_frames_are_counted_as_they_are_read(tmp_path):
    told = []
    path = write(tmp_path / "a.mp4", [picture()] * 6)
    assert len(drive(path, max_frames=4, on_frame=told.append)) == 4
    assert told == [1, 2, 3, 4]


@pytest.mark.parametrize("before", [0, 2])
def test_a_face_that_appears_late_drives_all_that_is_wanted(tmp_path, before):
    """Empty pictures, or another person beside, are told and count for nothing; behind the wanted nothing is missed."""
    told = []
    path = write(tmp_path / "a.mp4", [picture(n) for n in [before] * 20 + [1, 1, 0, 1] + [1] * 6])
    driver = drive(path, max_frames=4, on_frame=told.append)
    assert driver.seen.tolist() == [True, True, False, True, True]
    assert (driver.first, told[-1]) == (20, 25)
    assert driver.left_out.endswith("; 20 frame(s) before the shot are left out")
    assert "behind" not in driver.left_out


def test_where_there_is_less_than_wanted_all_is_told(tmp_path):
    path = write(tmp_path / "a.mp4", [picture(n) for n in [0] * 2 + [1] * 6 + [0] * 3])
    driver = drive(path, max_frames=7)
    assert len(driver) == 6 and "3 frame(s) behind the shot" in driver.left_out


def test_a_driver_is_read_for_as_long_as_it_has_to_last(tmp_path):
    path = write(tmp_path / "a.mp4", [picture()] * 20)
    driver = drive(path, max_frames=2, seconds=0.3)
    assert len(driver) == 9 and driver.times[-1] == pytest.approx(0.32, abs=1e-3)
    # A shot that ends before starts anew.
    shots = [picture(shade=30)] * 6 + [picture(shade=200)] * 12
    driver = drive(write(tmp_path / "b.mp4", shots), max_frames=2, seconds=0.3)
    assert (driver.first, len(driver)) == (6, 9)


def test_a_shot_that_is_not_human_is_never_enough(tmp_path):
    """A doll's or a dog's before a person's, with a cut between them; what is asked for does not choose the shot."""
    shots = [picture(shade=30, dog=True)] * 12 + [picture(shade=200)] * 20
    path, told = write(tmp_path / "a.mp4", shots), []
    driver = drive(path, max_frames=4, on_frame=told.append)
    assert (driver.first, len(driver), told[-1]) == (12, 4, 16)
    assert drive(path).first == 12
    with pytest.raises(UserError, match="not a human face.* in 12 of 12 frames"):
        drive(write(tmp_path / "b.mp4", shots[:12]), max_frames=4)


def test_a_run_that_is_not_human_counts_for_nothing(tmp_path):
    """Within one shot, where the whole video shows it as a gap."""
    settings = dataclasses.replace(SETTINGS, mirror_every=1)
    shown = [dict(dog=True)] * 5 + [dict(faces=0)] + [dict()] * 8
    path = write(tmp_path / "a.mp4", [picture(**one) for one in shown])
    driver = driver_from_video(path, ScriptedLandmarker(), settings, max_frames=4)
    assert (driver.first, len(driver)) == (6, 4)


def test_a_second_person_in_few_frames_is_no_reason_against_the_first_ones(tmp_path):
    """One frame of eleven is more than a tenth; with those that follow it is not, as of the whole video."""
    faces = [1, 2] + [1] * 38
    path, told = write(tmp_path / "a.mp4", [picture(n) for n in faces]), []
    driver = drive(path, max_frames=4, on_frame=told.append)
    assert told[-1] == 10 and driver.seen.tolist() == [True, False] + [True] * 8
    assert len(drive(path)) == 40
    path = write(tmp_path / "b.mp4", [picture(n) for n in [1, 2] * 10])
    with pytest.raises(UserError, match="several people in 10 of 20 frames"):
        drive(path, max_frames=4)


def test_no_face_at_all_is_refused(tmp_path):
    path = write(tmp_path / "a.mp4", [picture(0)] * 4)
    with pytest.raises(UserError, match="no face found in 4 of 4 frames"):
        drive(path)
