"""Real faces: verdicts on hostile input, signs of the pose, everything good accepted."""

import json
import shutil

import numpy as np
import pytest

from data_pipelines import dataset, video
from data_pipelines.prepare import (
    Landmarker,
    Settings,
    clip_from_image,
    clips_from_video,
    driver_from_video,
)
from data_pipelines.prepare.head_pose import euler_degrees
from data_pipelines.prepare.job import REPORT, run_prepare
from dexportrait_jax.errors import UserError
from tests.data_pipelines.real_data import DATA, MODEL, needs_real_data

pytestmark = needs_real_data
SETTINGS = Settings(size=96)


@pytest.fixture(scope="module")
def landmarker():
    with Landmarker(MODEL) as model:
        yield model


def _manifest(name):
    manifest = json.loads((DATA / "manifest.json").read_text())
    return next(entry for entry in manifest if entry["file"] == f"clips/{name}.mp4")


def _angles_agree(name, clip, slack=3.0):
    """The manifest gives MediaPipe's angles (y up): yaw and roll have the other sign there."""
    pitch, yaw, roll = euler_degrees(clip.head_pose).T
    expected = _manifest(name)
    for ours, (low, high) in (
        (pitch, expected["pitch"]),
        (-yaw, expected["yaw"]),
        (-roll, expected["roll"]),
    ):
        assert low - slack < ours.min() and ours.max() < high + slack


def test_pose_signs_of_a_turned_head(landmarker):
    """lp_s32 looks to the left of the picture: positive yaw, and the nose lies left of the cheeks."""
    path = DATA / "clips" / "lp_s32.mp4"
    driver = driver_from_video(path, landmarker, SETTINGS, max_frames=40)
    assert driver.seen.all() and driver.left_out == ""
    clip = driver.clip
    assert len(clip) == 40
    _angles_agree("lp_s32", clip)
    assert (euler_degrees(clip.head_pose)[:, 1] > 10).all()
    nose, cheeks = clip.landmarks[:, 1, 0], clip.landmarks[:, [234, 454], 0].mean(1)
    assert (nose < cheeks).all()
    scale = np.cbrt(np.linalg.det(clip.head_pose[:, :, :3].astype(float)))
    assert (np.abs(scale - 1) < 0.15).all()


def test_pose_is_the_same_wherever_the_face_is_in_the_picture(landmarker):
    """Beside a third of the picture on either side MediaPipe's own yaw moves by 4 degrees in the mean."""
    moved = []
    for name in ("0-f1-su-ph.jpg", "0-f15-hao-ph.jpg", "hallo_4.jpg"):
        image = video.read_image(DATA / "stills" / name)
        aside = image.shape[1] // 2
        for sides in ((aside, 0), (0, aside)):
            wide = np.pad(image, ((0, 0), sides, (0, 0)))
            poses = [clip_from_image(one, landmarker, SETTINGS).head_pose for one in (image, wide)]
            before, after = (euler_degrees(pose)[0] for pose in poses)
            moved.append((after - before) * np.sign(sides[0] - sides[1]))
    assert np.abs(np.mean(moved, axis=0)).max() < 1.0 and np.abs(moved).max() < 2.5


def test_mixed_folder(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in (
        "clips/pyfeat_single.mp4",
        "negative/clips/neg_no_face.mp4",
        "negative/stills/neg_dog.jpg",
    ):
        shutil.copy(DATA / name, folder)
    (folder / "text.mp4").write_text("hello")
    run_prepare(
        f"{folder}/*",
        tmp_path / "out",
        size=64,
        holdout="time",
        holdout_fraction=0.2,
        landmarker_path=MODEL,
    )
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    kept = {video["source"].rsplit("/")[-1]: video["kept"] for video in report["videos"]}
    assert kept == {
        "neg_dog.jpg": False,
        "neg_no_face.mp4": False,
        "pyfeat_single.mp4": True,
        "text.mp4": False,
    }
    assert dataset.ClipDataset(tmp_path / "out", "train").frames.tolist() == [53]
    assert dataset.ClipDataset(tmp_path / "out", "validation").frames.tolist() == [14]


def test_two_people_are_noticed(landmarker):
    clips, verdict = clips_from_video(
        DATA / "negative" / "clips" / "neg_two_people.mp4", landmarker, SETTINGS, max_frames=60
    )
    assert list(clips) == [] and verdict.reason == "several people"


@pytest.mark.parametrize("name", ["neg_dog.jpg", "neg_mountain.jpg", "neg_s40.jpg"])
def test_portraits_without_a_person_are_refused(landmarker, name):
    with pytest.raises(UserError, match="cannot be used"):
        clip_from_image(DATA / "negative" / "stills" / name, landmarker, SETTINGS)


@pytest.mark.parametrize("name", ["hallo_6.jpg", "lp_s22.jpg", "astronaut.png", "lp_s42.jpg"])
def test_portraits_of_people_are_taken(landmarker, name):
    clip = clip_from_image(DATA / "stills" / name, landmarker, SETTINGS)
    x0, y0, x1, y1 = clip.face_boxes[0]
    assert 2.0 <= 2 / max(x1 - x0, y1 - y0) <= 2.35
    assert np.abs([(x0 + x1) / 2, (y0 + y1) / 2]).max() < 0.35


@pytest.mark.slow
def test_all_good_portraits_are_taken(landmarker):
    for path in sorted((DATA / "stills").iterdir()):
        if path.name == "multi_face.jpg":
            with pytest.raises(UserError, match="several people"):
                clip_from_image(path, landmarker, SETTINGS)
        else:
            clip_from_image(path, landmarker, SETTINGS)


@pytest.mark.slow
def test_all_good_clips_are_taken_whole(landmarker):
    for path in sorted((DATA / "clips").glob("*.mp4")):
        clips, verdict = clips_from_video(path, landmarker, SETTINGS, max_frames=150)
        assert verdict.kept and verdict.cuts == 0 and verdict.kept_frames == verdict.frames, path
        _angles_agree(path.stem, next(clips), slack=8.0)


@pytest.mark.slow
def test_the_end_card_is_cut_off(landmarker):
    path = DATA / "negative" / "clips" / "neg_endcard_cut.mp4"
    (clip,), verdict = clips_from_video(path, landmarker, SETTINGS)
    assert len(clip) == 269 and verdict.dropped_frames == {"no face found": 30}
