"""Rendered clips: splits, records on disk, and clips drawn while they are read."""

import dataclasses
import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_pipelines import background, dataset, loading, records, transforms
from data_pipelines.cross_view import OtherViews
from data_pipelines.examples import Examples
from data_pipelines.synthetic import poses, source
from data_pipelines.synthetic.dataset import run_render
from data_pipelines.synthetic.identity import make_identity
from data_pipelines.synthetic.motion import Motion
from data_pipelines.synthetic.render import render
from dexportrait_jax.cli import run
from dexportrait_jax.errors import UserError

PATH = "synthetic:identities=8,frames=5,cameras=2,size=32,holdout=0.3"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    out = tmp_path_factory.mktemp("rendered") / "data"
    run_render(
        out, identities=4, frames=6, cameras=2, size=48, holdout_fraction=0.3, fps=10, workers=1
    )
    return out


def _config(path, **changes):
    sizes = {"image_size": 32, "pose_size": 24, "expression_size": 16}
    return loading.default_data() | sizes | {"path": str(path), "batch_size": 4} | changes


def test_people_are_split_by_their_names():
    splits = source.parse("synthetic:identities=300").split()
    assert not set(splits["train"]) & set(splits["validation"])
    assert 15 <= len(splits["validation"]) <= 50
    more = source.parse("synthetic:identities=400").split()
    assert set(splits["validation"]) <= set(more["validation"])  # people keep their side
    assert list(source.parse("synthetic:identities=5,holdout=0").split()) == ["train"]
    other = source.parse("synthetic:identities=300,seed=1").split()
    assert not set(other["train"] + other["validation"]) & set(splits["train"])


def test_motion_is_smooth_and_random_access():
    motion = Motion((3, 0), 2)
    times = np.arange(200) / 25
    expression = np.stack([motion.expression(time) for time in times])
    pose = np.stack([motion.pose(time) for time in times])
    assert np.abs(np.diff(expression, axis=0)).max() < 0.25
    assert np.abs(np.diff(pose, axis=0)).max() < 0.12
    assert np.ptp(expression, axis=0).min() > 0.3
    np.testing.assert_array_equal(Motion((3, 0), 2).pose(times[77]), pose[77])
    for number in range(3):
        seen = motion.seen_pose(1.3, number)
        assert seen[2, 3] == 0
        np.testing.assert_allclose(seen[:2], (motion.camera(number) @ motion.pose(1.3))[:2])


def test_records_carry_the_truth(directory):
    clips = dataset.ClipDataset(directory, "train")
    clip = clips[0]
    truth = clip.settings["synthetic"]
    pose, expression = np.array(truth["pose"]), np.array(truth["expression"])
    np.testing.assert_array_equal(clip.head_pose, pose.astype(np.float32))
    drawn = render(
        make_identity(truth["identity_seed"]),
        expression[2],
        pose[2],
        48,
        camera=np.array(truth["camera_rotation"]),
    )
    np.testing.assert_array_equal(clip.landmarks[2], drawn.landmarks)
    stored = transforms.decode_frame(clip, 2)
    assert np.abs(stored.astype(int) - drawn.image).mean() < 3  # JPEG
    for name, points in drawn.polygons.items():
        np.testing.assert_array_equal(clip.mask_polygons[name][2], points)
    assert clip.blendshapes.shape == (6, 52) and clip.blendshapes.max() > 0.3


def test_cameras_share_session_and_time(directory):
    clips = dataset.ClipDataset(directory, "train")
    views = OtherViews(clips.index)
    for number in range(len(clips)):
        for other in views.get(number):
            one, two = clips[number], clips[other]
            assert one.session == two.session and one.camera != two.camera
            np.testing.assert_array_equal(one.timestamps, two.timestamps)
            first, second = one.settings["synthetic"], two.settings["synthetic"]
            assert first["expression"] == second["expression"]
            assert first["pose"] != second["pose"]
            # Both see one head: their rotations differ by the cameras' alone.
            turned = [
                np.array(truth["camera_rotation"]).T @ np.array(truth["pose"])[0][:, :3]
                for truth in (first, second)
            ]
            np.testing.assert_allclose(turned[0], turned[1], atol=1e-12)


_RENDER = """
import sys
from data_pipelines.synthetic.dataset import run_render
if __name__ == "__main__":
    run_render(sys.argv[1], identities=400, frames=1, size=16, workers=2)
"""


def test_a_killed_job_leaves_no_process_and_no_folder_for_ever(tmp_path):
    (tmp_path / "job.py").write_text(_RENDER)
    out = tmp_path / "made" / "out"
    job = subprocess.Popen(
        [sys.executable, tmp_path / "job.py", out],
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
    )
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children")
    _until(lambda: list(tmp_path.glob("made/.out.incomplete-*")) and len(_drawing(children)) == 2)
    drawing = _drawing(children)
    job.kill()
    job.wait()
    try:
        _until(lambda: not any(_alive(process) for process in drawing))
    finally:
        for process in filter(_alive, drawing):
            os.kill(process, signal.SIGKILL)
    run_render(out, identities=2, frames=1, size=16, workers=1)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def _drawing(children):
    return [n for n in map(int, children.read_text().split()) if b"spawn_main" in _command(n)]


def _command(process):
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def _alive(process):
    return bool(_command(process))  # a zombie has none


def _until(true, seconds=40.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_workers_and_reading_change_nothing(directory, tmp_path):
    run_render(
        tmp_path / "again",
        identities=4,
        frames=6,
        cameras=2,
        size=48,
        holdout_fraction=0.3,
        fps=10,
        workers=2,
    )
    path = "synthetic:identities=4,frames=6,cameras=2,size=48,fps=10,holdout=0.3"
    for split in ("train", "validation"):
        clips, again = (
            dataset.ClipDataset(where, split) for where in (directory, tmp_path / "again")
        )
        drawn = dataset.open_clips(path, split)
        assert len(clips) == len(again) == len(drawn)
        assert {key: value for key, value in drawn.index.items() if key != "start"} == {
            key: value for key, value in clips.index.items() if key != "start"
        }
        for number in range(len(clips)):
            assert records.encode(clips[number]) == records.encode(again[number])
            assert records.encode(clips[number]) == records.encode(
                background.measured(drawn[number])
            )


def test_frames_are_drawn_when_asked_for():
    drawn = []
    frames = source.Frames(lambda number: drawn.append(number) or bytes([number]), range(5))
    assert len(frames) == 5 and drawn == []
    part = frames[1:4]
    assert part[0] == b"\x01" and frames[1] == b"\x01" and drawn == [1]
    assert list(frames) == [bytes([number]) for number in range(5)]
    clip = source.RenderedClips(PATH, "train")[0]
    assert len(clip.part(1, 3)) == 2 and len(clip.part(1, 3).landmarks) == 2
    with pytest.raises(IndexError):
        source.RenderedClips(PATH, "train")[len(source.RenderedClips(PATH, "train"))]


def test_rendered_clips_can_be_sent_to_processes():
    clips = source.RenderedClips(PATH, "train")
    clips[0].frames[0]
    again = pickle.loads(pickle.dumps(clips))
    assert records.encode(again[1]) == records.encode(clips[1])


@pytest.mark.parametrize("mode", ["pairs", "video"])
def test_loaders_take_both(directory, mode):
    for path in (directory, PATH):
        config = _config(path, mode=mode, targets=2, frames=3)
        loader = loading.make_loader(config, seed=0)
        whole = list(itertools.islice(loader, 3))
        loader.close()
        loader = loading.make_loader(config, seed=0, step=2)
        later = next(loader)
        loader.close()
        for name, value in whole[2].items():
            np.testing.assert_array_equal(value, later[name], err_msg=name)
        assert whole[0]["source_image"].shape == (4, 32, 32, 3)
        assert len(list(loading.evaluation_batches(config, "validation", 2))) == 2


def test_users_get_one_line(directory, tmp_path, capsys):
    wrong = {
        "synthetic:people=3": "no key 'people'",
        "synthetic:identities=many": "identities is 'many'",
        "synthetic:identities=0": "identities is 0",
        "synthetic:size=8": "size is 8",
        "synthetic:holdout=1.5": "holdout is 1.5",
        "synthetic:fps=0": "fps is 0",
    }
    for path, message in wrong.items():
        with pytest.raises(UserError, match=message):
            dataset.open_clips(path, "train")
    with pytest.raises(UserError, match="no split 'test'"):
        dataset.open_clips(PATH, "test")
    with pytest.raises(UserError, match="but 30 are needed"):
        Examples(_config(PATH, mode="video", frames=30))
    with pytest.raises(UserError, match="another dataset than this"):
        run_render(directory, identities=5, workers=1)
    with pytest.raises(UserError, match="workers is 0"):
        run_render(tmp_path / "x", workers=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        run_render(tmp_path / "file", identities=2, frames=2, size=32, workers=1)
    assert run(["render", f"--out={tmp_path / 'y'}", "--size=9"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("dexportrait render: ") and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_says_how_far_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("data_pipelines.synthetic.dataset._Progress.EVERY", 0.0)
    run_render(tmp_path / "heads", identities=3, frames=2, size=32, workers=1, seed=4)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines[:3]] == [
        f"render: {n} of 3 clips" for n in (1, 2, 3)
    ]
    assert "3 clips, 6 frames" in lines[3] and len(lines) == 4


def test_the_same_dataset_is_not_made_twice(directory, capsys):
    before = (directory / "render.json").stat().st_mtime_ns
    run_render(
        directory,
        identities=4,
        frames=6,
        cameras=2,
        size=48,
        holdout_fraction=0.3,
        fps=10,
        workers=1,
    )
    assert "nothing to do" in capsys.readouterr().out
    assert (directory / "render.json").stat().st_mtime_ns == before


def test_poses_stay_within_their_range_for_every_camera():
    from data_pipelines.prepare.head_pose import euler_degrees

    limits = np.array([poses.PITCH, poses.YAW, poses.ROLL])
    for cameras in (1, 3):
        seen = [
            Motion((seed, 0), cameras).seen_pose(0.37 * seed, camera)
            for seed in range(40)
            for camera in range(cameras)
        ]
        angles = np.abs(euler_degrees(np.stack(seen)))
        assert (angles <= limits * (1.35 if cameras > 1 else 1.0) + 1e-6).all()
        assert angles[:, 1].max() <= 62


def test_plans_are_checked_and_described():
    assert source.parse(PATH) == source.Plan(8, 1, 5, 2, 32, 2.0, 0, 0.3)
    assert dataclasses.asdict(source.parse("synthetic:"))["frames"] == 8
    picture = cv2.imdecode(
        np.frombuffer(source.RenderedClips(PATH, "train")[0].frames[0], np.uint8), cv2.IMREAD_COLOR
    )
    assert picture.shape == (32, 32, 3)


def test_a_tight_crop_shows_the_same_moments_larger_and_keeps_the_faces_whole():
    usual = source.RenderedClips(PATH + ",size=64", "train")
    tight = source.RenderedClips(PATH + ",size=64,face_scale=1.6", "train")
    assert usual.fingerprint() != tight.fingerprint()
    for number in range(len(tight)):
        before, after = usual[number], tight[number]
        np.testing.assert_allclose(
            after.head_pose[..., :3], before.head_pose[..., :3] * 2.15 / 1.6, rtol=1e-6
        )
        np.testing.assert_array_equal(after.head_pose[..., 3], before.head_pose[..., 3])
        assert after.settings["face_scale"] == after.settings["minimum_scale"] == 1.6
        # Faces, without hair and shoulders, keep within the picture (-1 to 1).
        assert np.abs(after.face_boxes).max() < 1.1
    with pytest.raises(UserError, match="face_scale is 1.1; it must lie between 1.5 and 6.0 faces"):
        source.parse("synthetic:face_scale=1.1")


def test_a_dataset_from_before_the_key_is_the_usual_crop(directory):
    assert "face_scale" not in (directory / "render.json").read_text()
