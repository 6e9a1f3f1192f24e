"""animate.py: every mode from flags to a playing, labelled video; and everything that must be
refused.
"""

import errno
import json
import os
import weakref
from pathlib import Path

import av
import numpy as np
import pytest

from data_pipelines import video
from data_pipelines.augment import default_augment
from data_pipelines.prepare.driver import Driver
from data_pipelines.video_writing import VideoWriter
from dexportrait_jax import animate, animate_jobs, cli, driving, pose_transfer, provenance
from dexportrait_jax.errors import UserError
from dexportrait_jax.inference import PortraitModel
from tests import fixtures
from tests.data_pipelines.prepare import scripted

PEOPLE = {"a": 0, "b": 1, "c": 2}
FRAMES = 6
TYPED = '{"yaw": 10}'
TURNED = {"source": "a.png", "pose": '[{"frame": 0, "yaw": 0}, {"frame": 9, "yaw": 10}]'}
SMOOTHED = {"source": "a.png", "driving": "b.mp4", "smooth": "kalman"}
BOTH = {"source": "a.png", "pose": "b.mp4", "expression": "c.mp4"}
PASTED = {"source": "a.png", "expression": "b.mp4", "paste_back": True}


class StubModel:
    """Encoders that know the drawn clips' codes; pictures that show which code they were made from."""

    stage = "motion"
    clip_length = 1
    image_size = pose_size = expression_size = 64
    augment = default_augment()
    description = {"stage": "motion", "step": 7, "groups": {"generator": {"sha256": "ab"}}}

    def __init__(self):
        self.drives = []

    settings = PortraitModel.settings
    idle_flags = PortraitModel.idle_flags

    def encode(self, pose_images, expression_images):
        """The mean colour tells the frames apart well enough."""
        poses = [
            pose_transfer.join_pose(
                pose_transfer.euler_rotation(0, float(image.mean()) / 4, 0),
                np.zeros(3),
                np.array(1.0),
            )
            for image in pose_images
        ]
        return np.stack(poses), expression_images.mean((1, 2)).astype(np.float32)

    def animate(self, source, drive, sampling, report=lambda part, note: None):
        self.drives.append(drive)
        random = np.random.default_rng(sampling.seed)
        for first in range(0, len(drive), 4):
            count = len(drive.poses[first : first + 4])
            noise = random.integers(0, 30, (count, *source.shape))
            yield np.clip(source + noise - 15, 0, 255).astype(np.uint8)
            report((first + count) / len(drive), "")


class DrawnFaces(animate.Faces):
    """Clips of drawn people in place of detected ones: the drawing's file name says who."""

    def _picture(self, path):
        return fixtures.make_clip(PEOPLE[Path(path).stem], 1)

    def _video(self, path, *wanted):
        key = (path, *wanted)
        if key not in self._videos:
            self._videos[key] = Driver.steady(fixtures.make_clip(PEOPLE[Path(path).stem], FRAMES))
        return self._videos[key]

    def landmarks(self, image):
        return None


class ScriptedFaces(animate.Faces):
    """Real clips of real files, with a landmarker that is told by the picture what to find."""

    landmarker = scripted.ScriptedLandmarker()


@pytest.fixture
def model(monkeypatch):
    made = StubModel()
    monkeypatch.setattr(animate, "load_model", lambda weights: made)
    monkeypatch.setattr(animate, "Faces", DrawnFaces)
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Videos and pictures of the drawn people."""
    folder = tmp_path_factory.mktemp("people")
    for name in PEOPLE:
        with VideoWriter(folder / f"{name}.mp4", 25) as writer:
            for _ in range(3):
                writer.write(np.full((64, 64, 3), 128, np.uint8))
        (folder / f"{name}.png").write_bytes(b"")
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    from dexportrait_jax.evaluation.report import write_png

    for name in PEOPLE:
        write_png(folder / f"{name}.png", picture)
    return folder


def run(files, tmp_path, **flags):
    flags = {
        name: str(files / v) if str(v)[1:] in (".mp4", ".png") else v for name, v in flags.items()
    }
    out = tmp_path / "result.mp4"
    animate.run_animate("weights", out=str(out), **flags)
    return out


def decoded(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])


@pytest.mark.parametrize(
    ("mode", "flags"),
    [
        ("self", {"source": "a.mp4", "driving": "a.mp4"}),
        ("cross", {"source": "a.png", "driving": "b.mp4"}),
        ("disentangled", {"source": "a.png", "pose": "b.mp4", "expression": "c.mp4"}),
        ("expression_only", {"source": "a.png", "expression": "c.mp4"}),
        ("pose_only", {"source": "a.png", "pose": "b.mp4"}),
    ],
)
def test_modes(mode, flags, model, files, tmp_path):
    beside = tmp_path / "beside.mp4"
    out = run(files, tmp_path, side_by_side=str(beside), **flags)
    found = provenance.read(out)
    assert (found["mode"], found["frames"], found["steps"]) == (mode, FRAMES, None)
    assert provenance.read(beside) == found == json.loads(provenance.sidecar_path(out).read_text())
    assert decoded(out).shape == (FRAMES, 64, 64, 3)
    panels = len(driving.PANELS[mode])
    assert decoded(beside).shape == (FRAMES, 256, panels * 256, 3)

    (drive,) = model.drives
    drawn = {
        name: animate.encode_clip(model, fixtures.make_clip(PEOPLE[name], FRAMES))
        for name in PEOPLE
    }
    pose_of = {"self": "a", "cross": "b", "disentangled": "b", "pose_only": "b"}.get(mode)
    expression_of = {"self": "a", "cross": "b", "disentangled": "c", "expression_only": "c"}.get(
        mode
    )
    own_pose, own_expression = drawn["a"][0][:1], drawn["a"][1][:1]
    wanted = drawn[pose_of][0] if pose_of else np.repeat(own_pose, FRAMES, 0)
    np.testing.assert_allclose(drive.poses, wanted, atol=1e-5)
    wanted = drawn[expression_of][1] if expression_of else np.repeat(own_expression, FRAMES, 0)
    np.testing.assert_allclose(drive.expressions, wanted, atol=1e-4)


def test_relative_pose_starts_at_the_source(model, files, tmp_path):
    run(files, tmp_path, source="a.png", driving="b.mp4", relative_pose="all")
    np.testing.assert_allclose(model.drives[0].poses[0], model.drives[0].source_pose, atol=1e-5)


def test_typed_pose_and_its_length(model, files, tmp_path):
    run(files, tmp_path, source="a.png", pose='[{"frame": 0, "yaw": -20}, {"frame": 8, "yaw": 20}]')
    (drive,) = model.drives
    yaw = [pose_transfer.euler_degrees(pose_transfer.split_pose(p)[0])[1] for p in drive.poses]
    np.testing.assert_allclose(yaw, np.linspace(-20, 20, 9), atol=1e-3)


def test_a_typed_pose_is_held_after_its_last_keyframe(model, files, tmp_path):
    keyframes = '[{"frame": 0, "yaw": -20}, {"frame": 8, "yaw": 20}]'
    for frames, wanted in ((12, [*np.linspace(-20, 20, 9), 20, 20, 20]), (3, [-20, -15, -10])):
        run(files, tmp_path, source="a.png", pose=keyframes, max_frames=frames, overwrite=True)
        poses = model.drives[-1].poses
        yaw = [pose_transfer.euler_degrees(pose_transfer.split_pose(p)[0])[1] for p in poses]
        np.testing.assert_allclose(yaw, wanted, atol=1e-3)


def test_keyframes_beyond_the_driver(model, files, tmp_path, capsys):
    """They end with it, and a line says so, or its last frame is held; --max_frames knows what it cuts off."""
    flags = {"source": "a.png", "expression": "c.mp4", "overwrite": True}
    flags["pose"] = '[{"frame": 0, "yaw": -20}, {"frame": 8, "yaw": 20}, {"frame": 10, "yaw": 0}]'
    wanted = [*np.linspace(-20, 20, 9), 10, 0]

    def made(**more):
        run(files, tmp_path, **flags, **more)
        drive = model.drives[-1]
        yaw = [pose_transfer.euler_degrees(pose_transfer.split_pose(p)[0])[1] for p in drive.poses]
        np.testing.assert_allclose(yaw, wanted[: len(yaw)], atol=1e-3)
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
        return drive, said

    told = f"note: {tmp_path / 'result.mp4'}: keyframes from frame 8 on are not reached: the video has {FRAMES} frames"
    for more in ({}, {"max_frames": FRAMES + 1}):
        drive, (line,) = made(**more)
        assert len(drive) == FRAMES and line.startswith(told) and "--length=hold" in line
    assert [len(part) for part in made(max_frames=3)] == [3, 0]
    assert [len(part) for part in made(length="hold", max_frames=8)] == [8, 0]
    drive, said = made(length="hold")
    assert len(drive) == 11 and said == []
    codes = animate.encode_clip(model, fixtures.make_clip(PEOPLE["c"], FRAMES))[1]
    held = np.concatenate([codes, np.repeat(codes[-1:], 5, 0)])
    np.testing.assert_allclose(drive.expressions, held, atol=1e-4)
    shown = [frame.time for frame in video.read_frames(tmp_path / "result.mp4")]
    np.testing.assert_allclose(shown, np.arange(11) / 25, atol=1e-4)


def test_files_that_are_called_as_json_begins(model, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PEOPLE, "[clip] b", PEOPLE["b"])
    monkeypatch.setitem(PEOPLE, "{c}", PEOPLE["c"])
    Path("[clip] b.mp4").write_bytes((files / "b.mp4").read_bytes())
    Path("{c}.mp4").write_bytes((files / "c.mp4").read_bytes())
    out = run(files, tmp_path, source="a.png", pose="[clip] b.mp4", expression="{c}.mp4")
    assert provenance.read(out)["mode"] == "disentangled"
    poses, _ = animate.encode_clip(model, fixtures.make_clip(PEOPLE["b"], FRAMES))
    np.testing.assert_allclose(model.drives[0].poses, poses, atol=1e-5)
    with pytest.raises(UserError, match="^--pose is neither a file nor JSON"):
        run(files, tmp_path, source="a.png", pose="[clip] a.mp4")


def test_same_seed_same_video_and_max_frames(model, files, tmp_path):
    flags = {"source": "a.png", "driving": "b.mp4", "overwrite": True}
    first = decoded(run(files, tmp_path, seed=3, **flags))
    again = decoded(run(files, tmp_path, seed=3, **flags))
    other = decoded(run(files, tmp_path, seed=4, **flags))
    assert (first == again).all() and (first != other).any()
    assert len(decoded(run(files, tmp_path, max_frames=2, **flags))) == 2


def test_paste_back_keeps_the_rest_of_the_picture(model, files, tmp_path):
    out = run(files, tmp_path, source="a.png", expression="c.mp4", paste_back=True)
    assert decoded(out).shape == (FRAMES, 64, 64, 3)
    source = fixtures.make_clip(0, 1)
    plan = animate.Plan("expression_only", 25.0, source, video.read_image(files / "a.png"), None)
    pasted = animate._paste(np.zeros((64, 64, 3), np.uint8), plan, DrawnFaces(model))
    assert pasted[32, 32].max() == 0 and (pasted[:3] == plan.full_picture[:3]).all()
    whole = animate._paste(np.zeros((64, 64, 3), np.uint8), plan, DrawnFaces(model), "crop")
    assert whole[8:-8, 8:-8].max() == 0 < pasted[8:-8, 8:-8].max()  # beside the face, too
    # The outermost pixel is four of the mask's, whose ramp of a tenth of its side begins 0, 1, 2, 3.
    opacity = (0 + 1 + 2 + 3) / 4 / (0.1 * animate.PANEL)
    beside_corners = plan.full_picture[0, 1:-1]
    np.testing.assert_allclose(whole[0, 1:-1], (1 - opacity) * beside_corners, atol=1)


def test_mask_of_the_paste_back_is_that_of_the_flags(model, files, tmp_path, monkeypatch):
    """The whole crop looks for no face; a wider border shows less of the result."""

    def pasted(**flags):
        job = animate_jobs.Job(source="a", out="o", paste_back=True, **flags)
        return animate._paste(picture, plan, faces, **job.paste_settings)

    source = fixtures.make_clip(0, 1)
    plan = animate.Plan("expression_only", 25.0, source, np.full((64, 64, 3), 10, np.uint8), None)
    picture, faces = np.full((64, 64, 3), 210, np.uint8), DrawnFaces(model)
    shown = [
        pasted(**flags).mean()
        for flags in ({"paste_dilation": 0.0}, {}, {"paste_dilation": 0.2}, {"paste_border": 0.4})
    ]
    assert shown[0] < shown[1] < shown[2] and shown[3] < shown[1]
    assert pasted(paste_feather=0.2).std() < pasted().std()
    monkeypatch.setattr(DrawnFaces, "landmarks", None)
    whole = [pasted(paste_mask="crop", paste_border=part)[..., 0] for part in (0.0, 0.1, 0.4)]
    x0, y0, x1, y1 = np.round(source.crop_box).astype(int)
    assert (whole[0][max(0, y0) : y1, max(0, x0) : x1] == 210).all()
    assert whole[0].mean() > whole[1].mean() > whole[2].mean()
    np.testing.assert_array_equal(pasted(paste_mask="crop")[..., 0], whole[1])
    run(files, tmp_path, source="a.png", expression="c.mp4", paste_back=True, paste_mask="crop")
    assert provenance.read(tmp_path / "result.mp4")["paste"] == {"mask": "crop"}


def test_strength_of_smoothing_is_that_of_the_flag(model, files, tmp_path):
    flags = {"source": "a.png", "driving": "b.mp4", "smooth": "gaussian", "overwrite": True}
    run(files, tmp_path, **flags)
    found = provenance.read(run(files, tmp_path, smooth_strength=3.0, **flags))
    assert (found["smooth"], found["smooth_strength"]) == ("gaussian", 3.0)
    clip = fixtures.make_clip(PEOPLE["b"], FRAMES)
    poses = animate.encode_clip(model, clip)[0]
    for drive, strength in zip(model.drives, (1.0, 3.0), strict=True):
        wanted = pose_transfer.smooth_poses(poses, "gaussian", strength=strength)
        np.testing.assert_allclose(drive.poses, wanted, atol=1e-6)
    assert np.abs(model.drives[0].poses - model.drives[1].poses).max() > 5e-5


def test_a_face_that_appears_late_is_pasted_into_its_own_frame(model, tmp_path, monkeypatch):
    """A video that is its own driver: the crop is that of its first usable frame, and so is the rest."""
    monkeypatch.setattr(animate, "Faces", ScriptedFaces)
    path = tmp_path / "late.mp4"
    with VideoWriter(path, 25, quality=4) as writer:
        for faces, shade in [(0, 30)] * 2 + [(1, 140)] * 4:
            writer.write(scripted.picture(faces, shade))
    out = tmp_path / "result.mp4"
    job = {"source": str(path), "expression": str(path), "paste_back": True}
    animate.run_animate("weights", out=str(out), **job)
    shown = decoded(out)
    assert shown.shape == (4, scripted.SIDE, scripted.SIDE, 3)
    assert abs(int(np.median(shown[:, :20, 60:])) - 140) <= 3  # where nothing is pasted; 30 before


@pytest.mark.parametrize("length", ["shortest", "hold"])
def test_max_frames_of_drivers_at_other_rates(model, tmp_path, length):
    """A pose of 5 and an expression of 50 frames a second: the expression goes on to the last frame that is made."""
    for name, fps, count in (("slow", 5, 8), ("fast", 50, 80)):
        with VideoWriter(tmp_path / f"{name}.mp4", fps, quality=4) as writer:
            for _ in range(count):
                writer.write(scripted.picture())
    slow, fast = str(tmp_path / "slow.mp4"), str(tmp_path / "fast.mp4")
    given = {"source": slow, "out": "x.mp4", "length": length, "max_frames": 6}
    with ScriptedFaces(model) as faces:
        plan = animate.make_plan(
            model, animate_jobs.Job(**given, pose=slow, expression=fast), faces
        )
        assert plan.timeline.indices["expression"].tolist() == [0, 10, 20, 30, 40, 50]
        assert not np.any(np.diff(plan.timeline.times) - 0.2 > 1e-6)
        plan = animate.make_plan(
            model, animate_jobs.Job(**given, pose=fast, expression=slow), faces
        )
        assert plan.timeline.indices["expression"].tolist() == [0] * 6
        assert len(plan.drive) == 6


def test_a_portrait_is_the_first_usable_frame_of_a_video(model, tmp_path, capsys):
    path = tmp_path / "late.mp4"
    with VideoWriter(path, 25, quality=4) as writer:
        for faces, shade in [(0, 30)] * 2 + [(1, 140), (1, 200)]:
            writer.write(scripted.picture(faces, shade))
    with ScriptedFaces(model) as faces:
        clip, picture = faces.portrait(str(path))
    assert (picture == video.read_frame(path, 2)).all() and len(clip) == 1
    assert abs(int(np.median(picture)) - 140) < 5
    told = f"note: {path} begins with no face found; the portrait is its frame 2\n"
    assert capsys.readouterr().err == told


def test_help_of_what_is_taken(model, files, tmp_path, capsys):
    """Of a video as the source, its first usable frame; of a pose that stands still, 25 frames."""
    assert cli.run(["animate", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "of which the first usable frame is taken; of one that drives as well, the first of" in said
    )
    assert "where nothing moves, up to the last typed keyframe, or 25" in said
    for pose, frames in ((TYPED, 25), (TURNED["pose"], 10)):
        run(files, tmp_path, source="a.png", pose=pose, overwrite=True)
        assert len(model.drives[-1]) == frames


@pytest.mark.parametrize("counted", [0, 3, 8, 12])
def test_a_header_that_miscounts_its_frames(model, tmp_path, capsys, monkeypatch, counted):
    """It is not known then how many there are: no line for each of those that it does not count."""
    path = tmp_path / "eight.mp4"
    with VideoWriter(path, 25, quality=4) as writer:
        for _ in range(8):
            writer.write(scripted.picture())
    told = video.probe(path)._replace(frames=counted)
    monkeypatch.setattr(video, "probe", lambda path: told)
    with ScriptedFaces(model) as faces:
        assert len(faces.driver(str(path))) == 8
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in said] == [
        f"read eight.mp4: {frames}/{frames} frames" for frames in ([3, 8] if counted == 3 else [8])
    ]


def test_a_portrait_of_nobody(model, tmp_path):
    path = tmp_path / "empty.mp4"
    with VideoWriter(path, 25, quality=4) as writer:
        for _ in range(3):
            writer.write(scripted.picture(0))
    with ScriptedFaces(model) as faces, pytest.raises(UserError) as caught:
        faces.portrait(str(path))
    assert str(caught.value).startswith(f"{path} cannot be used: no face found in 3 of 3 frames")


def test_several_jobs_of_a_file(model, files, tmp_path):
    a, b = str(files / "a.png"), str(files / "b.mp4")
    jobs = [
        {"source": a, "driving": b, "out": str(tmp_path / "1.mp4"), "seed": 5},
        {"source": a, "pose": b, "out": str(tmp_path / "2.mp4")},
    ]
    path = tmp_path / "jobs.json"
    path.write_text(json.dumps(jobs))
    animate.run_animate("weights", jobs=str(path), max_frames=3)
    assert provenance.read(tmp_path / "1.mp4")["seed"] == 5
    assert provenance.read(tmp_path / "2.mp4")["mode"] == "pose_only"
    assert len(decoded(tmp_path / "2.mp4")) == 3
    wrong = json.dumps([{**jobs[0], "max_frames": "ten"}])
    for text, message in (
        (wrong, "max_frames"),
        ("[", "not JSON"),
        ("{}", "list"),
        ('[{"source": "x", "oot": 1}]', "oot"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            animate.run_animate("weights", jobs=str(path))


def test_entries_of_a_file_say_it_in_json(model, files, tmp_path):
    """A pose need not be quoted and a switch is true; what is of the whole file is told so."""
    source, driver, out = (str(path) for path in (files / "a.png", files / "b.mp4", "1.mp4"))
    entry = {"source": source, "driving": driver, "out": out}
    keyframes = [{"frame": 0, "yaw": -20}, {"frame": 8, "yaw": 20}]
    for pose in (keyframes, {"yaw": 10}):
        job = animate_jobs.checked_job({**entry, "pose": pose})
        assert driving.parse_typed_pose(job.pose) == (pose if pose is keyframes else [pose])
    for given, meant in ((True, "all"), (False, ""), ("rotation,scale", "rotation,scale")):
        assert animate_jobs.checked_job({**entry, "relative_pose": given}).relative_pose == meant
    for wrong, message in (
        ({"pose": []}, "^--pose wants an object or a list"),
        ({"pose": {"yow": 1}}, "^--pose: no key 'yow'"),
        ({"pose": True}, "^pose cannot be True$"),
        ({"expression": {"smile": 1}}, "^expression cannot be "),
        ({"weights": "exports/a"}, "^'weights' belongs on the command line: one model makes all"),
        ({"jobs": "more.json"}, "^'jobs' belongs on the command line: one model makes all"),
    ):
        with pytest.raises(UserError, match=message):
            animate_jobs.checked_job({**entry, **wrong})


def test_flags_that_change_nothing_are_told(model, files, tmp_path, capsys, monkeypatch):
    asked = []

    def idle_flags(sampling, frames):
        asked.append((sampling.overlap, frames))
        return "--overlap had no effect"

    monkeypatch.setattr(model, "idle_flags", idle_flags)
    out, job = tmp_path / "1.mp4", {"source": str(files / "a.png"), "overlap": 3, "max_frames": 2}
    animate.run_animate("weights", driving=str(files / "b.mp4"), out=str(out), **job)
    assert asked == [(3, 2)]
    assert f"note: {out}: --overlap had no effect\n" in capsys.readouterr().err


def test_a_bad_entry_of_a_file_does_not_stop_the_others(
    model, files, tmp_path, capsys, monkeypatch
):
    def settings(sampling):
        if sampling.steps is not None:
            raise UserError("--steps is for the animator")
        return {"steps": None, "seed": sampling.seed}

    monkeypatch.setattr(model, "settings", settings)
    a, b = str(files / "a.png"), str(files / "b.mp4")
    good = {"source": a, "driving": b, "max_frames": 2}
    jobs = [
        {**good, "out": str(tmp_path / "1.mp4"), "smooth": "median"},
        {**good, "out": str(tmp_path / "2.mp4")},
        {**good, "out": str(tmp_path / "3.mp4"), "driving": str(files / "gone.mp4")},
        {**good, "out": str(tmp_path / "4.mp4"), "steps": 3},  # that only the model refuses
        {**good, "out": str(tmp_path / "2.mp4")},  # which entry 2 makes
        {**good, "out": str(tmp_path / "6.mp4")},
    ]
    path = tmp_path / "jobs.json"
    path.write_text(json.dumps(jobs))
    assert cli.run(["animate", "--weights=weights", f"--jobs={path}"]) == 1
    assert sorted(file.name for file in tmp_path.glob("*.mp4")) == ["2.mp4", "6.mp4"]
    said = [line for line in capsys.readouterr().err.splitlines() if "entry" in line]
    for line, words in zip(
        said,
        (
            "entry 1: smooth cannot be 'median'; there are none, gaussian, one_euro, kalman",
            "entry 3: " + str(files / "gone.mp4"),
            "entry 5: " + str(tmp_path / "2.mp4") + " is what entry 2 writes",
            "entry 4: --steps is for the animator",
            "4 of 6 videos not made; entry 1: ",
        ),
        strict=True,
    ):
        assert words in line
    jobs = [jobs[1], jobs[5]]
    path.write_text(json.dumps(jobs))
    assert cli.run(["animate", "--weights=weights", f"--jobs={path}", "--overwrite"]) == 0


def test_a_fault_at_one_entry_does_not_stop_the_others(model, files, tmp_path, capsys, monkeypatch):
    """It is told as one, with where it was if asked, and the exit code is that of a fault whatever else failed."""
    a, b, c = (str(files / name) for name in ("a.png", "b.mp4", "c.mp4"))
    jobs = [
        {"source": a, "driving": b, "out": str(tmp_path / "1.mp4"), "smooth": "median"},
        {"source": a, "driving": c, "out": str(tmp_path / "2.mp4")},
        {"source": a, "driving": b, "out": str(tmp_path / "3.mp4")},
    ]
    read, held = DrawnFaces._video, []

    def without_c(self, path, *wanted):
        if path == c:
            picture = np.zeros((64, 64, 3), np.uint8)
            held.append(weakref.ref(picture))
            raise KeyError("no such blendshape")
        assert not any(one() is not None for one in held)  # what the entry before held is free
        return read(self, path, *wanted)

    monkeypatch.setattr(DrawnFaces, "_video", without_c)
    path = tmp_path / "jobs.json"
    path.write_text(json.dumps(jobs))
    assert cli.run(["animate", "--weights=weights", f"--jobs={path}"]) == cli.FAULT
    assert sorted(file.name for file in tmp_path.glob("*.mp4")) == ["3.mp4"]
    told = capsys.readouterr().err
    said = [line for line in told.splitlines() if "entry" in line]
    for line, words in zip(
        said,
        (
            "entry 1: smooth cannot be 'median'",
            "entry 2: fault in the program: KeyError: 'no such blendshape' (--debug shows where)",
            "dexportrait animate: --jobs=",
        ),
        strict=True,
    ):
        assert words in line
    assert "2 of 3 videos not made" in said[-1] and "Traceback" not in told
    flags = ["animate", "--weights=weights", f"--jobs={path}", "--overwrite", "--debug"]
    assert cli.run(flags) == cli.FAULT
    assert "in without_c\n" in capsys.readouterr().err
    path.write_text(json.dumps(jobs[1:2]))
    assert cli.run(flags[:-1]) == cli.FAULT
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 of 1 videos not made; entry 1: fault in the program: KeyError" in line


def test_a_disk_that_an_entry_cannot_read_is_no_fault(model, files, tmp_path, capsys, monkeypatch):
    def gone(self, path, *wanted):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(DrawnFaces, "_video", gone)
    job = {"source": str(files / "a.png"), "driving": str(files / "b.mp4")}
    jobs = [{**job, "out": str(tmp_path / f"{number}.mp4")} for number in (1, 2)]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    assert cli.run(["animate", "--weights=weights", f"--jobs={tmp_path / 'jobs.json'}"]) == 1
    assert "entry 2: [Errno 5] Input/output error" in capsys.readouterr().err


def test_entries_of_a_file_do_not_overwrite_each_other(model, files, tmp_path, capsys):
    """Neither results, nor what another is to read, by whatever name; the entry that would is not made."""
    mine = tmp_path / "b.mp4"
    mine.write_bytes((files / "b.mp4").read_bytes())
    (tmp_path / "link.mp4").symlink_to(mine)
    (tmp_path / "here").mkdir()
    good = {"source": str(files / "a.png"), "driving": str(mine)}
    jobs = [
        {**good, "out": str(tmp_path / "1.mp4"), "side_by_side": str(tmp_path / "s.mp4")},
        {**good, "driving": str(files / "c.mp4"), "out": str(mine)},
        {**good, "out": str(tmp_path / "here" / ".." / "s.mp4")},
        {**good, "out": str(tmp_path / "4.mp4"), "side_by_side": str(tmp_path / "1.mp4")},
        {**good, "driving": str(files / "c.mp4"), "out": str(tmp_path / "link.mp4")},
        {**good, "out": str(tmp_path / "6.mp4")},
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    flags = ["--weights=weights", f"--jobs={tmp_path / 'jobs.json'}", "--overwrite"]
    assert cli.run(["animate", *flags]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "entry" in line]
    for line, words in zip(
        said,
        (
            f"entry 2: {mine} is what entry 1 reads",
            f"entry 3: {tmp_path}/here/../s.mp4 is what entry 1 writes",
            f"entry 4: {tmp_path / '1.mp4'} is what entry 1 writes",
            f"entry 5: {tmp_path / 'link.mp4'} is what entry 1 reads",
            "4 of 6 videos not made; entry 2: ",
        ),
        strict=True,
    ):
        assert words in line
    assert mine.read_bytes() == (files / "b.mp4").read_bytes()
    made = sorted(file.name for file in tmp_path.glob("*.mp4*"))
    assert made == ["1.mp4", "1.mp4.json", "6.mp4", "6.mp4.json", "b.mp4", "link.mp4", "s.mp4"]


def test_files_are_kept_while_jobs_need_them(model, files, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(DrawnFaces, "keep", lambda self, paths: kept.append(set(paths)))
    a, b, c = (str(files / name) for name in ("a.png", "b.mp4", "c.mp4"))
    jobs = [
        {"source": a, "driving": b, "out": str(tmp_path / "1.mp4")},
        {"source": a, "expression": c, "pose": '{"yaw": 3}', "out": str(tmp_path / "2.mp4")},
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    animate.run_animate("weights", jobs=str(tmp_path / "jobs.json"), max_frames=2)
    assert kept == [{a, b, c}, {a, c}]


def test_a_face_that_is_away_is_bridged_and_told(model, files, tmp_path, monkeypatch):
    seen = np.array([True, True, False, False, False, True, True, True])
    clip = fixtures.make_clip(1, 5)
    away = Driver(clip, np.arange(8) / 25, seen)
    monkeypatch.setattr(DrawnFaces, "_video", lambda self, path, *wanted: away)
    beside = tmp_path / "beside.mp4"
    out = run(files, tmp_path, source="a.png", driving="b.mp4", side_by_side=str(beside))
    poses, codes = animate.encode_clip(model, clip)
    (drive,) = model.drives
    np.testing.assert_array_equal(drive.poses[seen], poses)
    np.testing.assert_array_equal(drive.expressions[seen], codes)
    np.testing.assert_allclose(drive.expressions[3], (codes[1] + codes[2]) / 2, rtol=1e-5)
    assert provenance.read(out)["bridged_frames"] == {"pose": 3, "expression": 3}
    assert len(decoded(out)) == len(decoded(beside)) == 8


def test_a_variable_rate_drives_at_its_own_times(model, files, tmp_path, monkeypatch):
    times = np.array([0, 40, 200, 240, 500, 540]) / 1000
    varying = Driver(fixtures.make_clip(1, 6), times, np.ones(6, bool))
    monkeypatch.setattr(DrawnFaces, "_video", lambda self, path, *wanted: varying)
    out = run(
        files, tmp_path, source="a.png", driving="b.mp4", side_by_side=str(tmp_path / "s.mp4")
    )
    for path in (out, tmp_path / "s.mp4"):
        shown = [frame.time for frame in video.read_frames(path)]
        np.testing.assert_allclose(shown, times, atol=1e-4)


def test_frames_in_bursts_are_driven_and_smoothed_at_their_own_times(
    model, files, tmp_path, monkeypatch
):
    """60 frames a second, then one picture for a minute: every frame has its own pose, and one_euro its own steps."""
    times = np.array([0, 1, 2, 3, 4, 3604]) / 60
    bursts = Driver(fixtures.make_clip(1, 6), times, np.ones(6, bool))
    monkeypatch.setattr(DrawnFaces, "_video", lambda self, path, *wanted: bursts)
    poses, codes = animate.encode_clip(model, bursts.clip)
    for smooth in ("none", "one_euro"):
        flags = {"source": "a.png", "driving": "b.mp4", "smooth": smooth, "overwrite": True}
        run(files, tmp_path, **flags)
        wanted = pose_transfer.smooth_poses(poses, smooth, times=times)
        np.testing.assert_allclose(model.drives[-1].poses, wanted, atol=1e-6)
        np.testing.assert_allclose(model.drives[-1].expressions, codes, atol=1e-4)


def test_relative_expression(model, files, tmp_path):
    run(files, tmp_path, source="a.png", driving="b.mp4", relative_expression=True)
    codes = animate.encode_clip(model, fixtures.make_clip(1, FRAMES))[1]
    (drive,) = model.drives
    wanted = drive.source_expression + codes - codes[0]
    np.testing.assert_allclose(drive.expressions, wanted, atol=1e-4)


def test_a_resting_frame(model, files, tmp_path):
    """In that frame the source is as it was; poses and codes are changes from it, whatever comes before."""
    flags = {"source": "a.png", "driving": "b.mp4", "relative_pose": "all", "overwrite": True}
    out = run(files, tmp_path, **flags, relative_expression=True, resting_frame=2)
    poses, codes = animate.encode_clip(model, fixtures.make_clip(1, FRAMES))
    (drive,) = model.drives
    wanted = drive.source_expression + codes - codes[2]
    np.testing.assert_allclose(drive.expressions, wanted, atol=1e-4)
    np.testing.assert_allclose(drive.poses[2], drive.source_pose, atol=1e-5)
    moved = [drive.source_pose[:, 3] + pose[:, 3] - poses[2, :, 3] for pose in poses]
    np.testing.assert_allclose(drive.poses[..., 3], moved, atol=1e-5)
    assert json.loads(out.with_suffix(".mp4.json").read_text())["resting_frame"] == 2
    # It may come after the frames that are made.
    run(files, tmp_path, **flags, resting_frame=FRAMES - 1, max_frames=2)
    shift = drive.source_pose[:, 3] - poses[-1, :, 3]
    np.testing.assert_allclose(model.drives[-1].poses[..., 3], poses[:2, :, 3] + shift, atol=1e-5)
    with pytest.raises(UserError, match="=6: the last frame of the pose's driver .* is 5"):
        run(files, tmp_path, **flags, resting_frame=FRAMES)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"source": "a.png"}, "nothing drives"),
        ({"driving": "b.mp4"}, "--source"),
        ({"source": "a.png", "driving": "b.png"}, "moves nothing"),
        ({"source": "a.png", "driving": "nowhere.mp4"}, "no such file"),
        ({"source": "a.png", "pose": '{"yow": 1}'}, "yow"),
        ({"source": "a.png", "expression": '{"smile": 1}'}, "^--expression='.*poses alone can be"),
        ({"source": "a.png", "driving": TYPED}, "^--driving='.* is no file, and poses alone"),
        (
            {"source": "a.png", "pose": "b.mp4", "driving": '[{"yaw":\n1}]'},
            "^--driving=.*is no file",
        ),
        ({"source": "[a] b.png", "driving": "b.mp4"}, "^--source='.* is no file"),
        ({**BOTH, "driving": "/nowhere.mp4"}, "^--driving=/nowhere.mp4: .* leave nothing to it"),
        ({**BOTH, "driving": "a.mp4"}, "leave nothing to it"),
        ({"source": "a.png", "driving": "b.mp4", "paste_back": True}, "--paste_back"),
        ({"source": "a.png", "driving": "b.mp4", "relative_pose": "zoom"}, "zoom"),
        ({"source": "a.png", "pose": "b.png", "relative_pose": "all"}, "does not move"),
        ({"source": "a.png", "expression": "b.mp4", "relative_pose": "scale"}, "drives the pose"),
        ({"source": "a.png", "expression": "b.mp4", "smooth": "gaussian"}, "nothing to smooth"),
        ({"source": "a.png", "pose": TYPED, "smooth": "one_euro"}, "nothing to smooth"),
        ({"source": "a.png", "pose": TYPED, "relative_expression": True}, "the expression"),
        ({"source": "a.png", "expression": "b.png", "relative_expression": True}, "the expression"),
        ({"source": "a.png", "expression": "b.mp4", "paste_mask": "crop"}, "add --paste_back"),
        ({"source": "a.png", "pose": TYPED, "length": "hold"}, "not two videos"),
        ({**TURNED, "expression": "b.png", "length": "hold"}, "not two videos"),
        (
            {"source": "a.png", "pose": TYPED, "driving": "b.mp4", "length": "hold"},
            "not two videos",
        ),
        ({"source": "a.png", "driving": "b.mp4", "length": "hold"}, "not two videos"),
        ({"source": "a.png", "driving": "b.mp4", "guidance": float("nan")}, "--guidance=nan"),
        ({"source": "a.png", "driving": "b.mp4", "guidance": float("inf")}, "--guidance=inf"),
        ({"source": "a.png", "driving": "b.mp4", "eta": float("nan")}, "--eta=nan"),
        ({"source": "a.png", "driving": "b.mp4", "eta": 1.5}, "^--eta=1.5: a number from 0 to 1"),
        ({"source": "a.png", "driving": "b.mp4", "eta": -0.1}, "^--eta=-0.1: a number from 0 to 1"),
        ({"source": "a.png", "driving": "b.mp4", "steps": 0}, "--steps"),
        ({**TURNED, "max_frames": 10**11}, "^--max_frames=100000000000: at most 1000001$"),
        ({"source": "a.png", "driving": "b.mp4", "overlap": -1}, "--overlap=-1: at least 0"),
        ({"source": "a.png", "driving": "b.mp4", "smooth_strength": 2.0}, "nothing is smoothed"),
        ({**SMOOTHED, "smooth_strength": 0.0}, "--smooth_strength=0: a number above 0"),
        ({**SMOOTHED, "smooth_strength": float("nan")}, "--smooth_strength=nan: a number above 0"),
        ({**SMOOTHED, "smooth_strength": float("inf")}, "--smooth_strength=inf: a number above 0"),
        ({"source": "a.png", "expression": "b.mp4", "paste_mask": "face"}, "add --paste_back"),
        ({"source": "a.png", "expression": "b.mp4", "paste_border": 0.1}, "add --paste_back"),
        ({**PASTED, "paste_border": 0.5}, "--paste_border=0.5: a part"),
        ({**PASTED, "paste_feather": -0.01}, "--paste_feather=-0.01: a part"),
        ({**PASTED, "paste_dilation": float("nan")}, "--paste_dilation=nan: a part"),
        ({**PASTED, "paste_mask": "crop", "paste_dilation": 0.1}, "no face's outline"),
        ({**PASTED, "paste_mask": "crop", "paste_feather": 0.1}, "no face's outline"),
        ({"source": "a.png", "driving": "b.mp4", "seed": -1}, "--seed"),
        ({"source": "a.png", "driving": "b.mp4", "resting_frame": 2}, "add --relative_pose"),
        ({**TURNED, "relative_pose": "all", "resting_frame": 2}, "add --relative_pose or"),
        ({**SMOOTHED, "relative_pose": "all", "resting_frame": -1}, "--resting_frame=-1: at least"),
        ({"source": "a.png", "driving": "b.mp4", "side_by_side": "x.avi"}, r"\.mp4"),
    ],
)
def test_refused_before_the_model_is_loaded(flags, message, files, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        run(files, tmp_path, **flags)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags",
    [
        {"pose": "b.png", "relative_pose": "rotation"},  # the rest is the picture's
        {"pose": TYPED, "relative_pose": "all", "eta": 1.0},
        {"pose": "b.mp4", "expression": "c.png", "smooth": "gaussian", "relative_pose": "all"},
        {"pose": "b.mp4", "expression": "c.mp4", "length": "hold"},
        {"pose": '[{"frame": 9, "yaw": 1}]', "expression": "c.mp4", "length": "hold"},
        {"pose": TYPED, "expression": "c.mp4", "relative_expression": True},
        {"driving": "b.mp4", "smooth": "kalman", "smooth_strength": 0.5, "overlap": 0},
        {"expression": "b.mp4", "paste_back": True, "paste_mask": "crop", "paste_border": 0.0},
        {"expression": "b.mp4", "paste_back": True, "paste_dilation": 0.49, "paste_feather": 0.0},
    ],
)
def test_flags_that_do_something_are_taken(flags, files, tmp_path):
    given = {
        name: str(files / v) if str(v)[1:] in (".mp4", ".png") else v for name, v in flags.items()
    }
    job = animate_jobs.Job(source=str(files / "a.png"), out=str(tmp_path / "x.mp4"), **given)
    animate_jobs.check(job)


def test_a_number_of_a_file_that_is_none(files, tmp_path):
    entry = {"source": str(files / "a.png"), "driving": str(files / "b.mp4")}
    entry |= json.loads('{"out": "x.mp4", "guidance": NaN}')
    with pytest.raises(UserError, match="^--guidance=nan: a finite number$"):
        animate_jobs.checked_job(entry)
    with pytest.raises(UserError, match="^--eta=2: a number from 0 to 1"):
        animate_jobs.checked_job({**entry, "guidance": None, "eta": 2})


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ('"source": "a\\u0000b"', "source cannot be 'a\\x00b': it holds what no name"),
        ('"out": "\\ud800.mp4"', "out cannot be '\\ud800.mp4': it holds what no name"),
        (
            '"guidance": 1' + 400 * "0",
            "guidance cannot be 10000000000000000000...: it is too large",
        ),
        ('"smooth": "gaussian", "smooth_strength": 1' + 400 * "0", "smooth_strength cannot be 1"),
    ],
)
def test_what_json_can_say_and_nobody_can_use(model, files, tmp_path, capsys, wrong, words):
    flags = {"source": str(files / "a.png"), "driving": str(files / "b.mp4")}
    flags |= {"out": str(tmp_path / "x.mp4")}
    (tmp_path / "jobs.json").write_text(f"[{json.dumps(flags)[:-1]}, {wrong}}}]")
    assert cli.run(["animate", "--weights=weights", f"--jobs={tmp_path / 'jobs.json'}"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said


@pytest.mark.parametrize("text", ["[" * 10**5 + "]" * 10**5, '[{"seed": 1' + 5000 * "0" + "}]"])
def test_json_that_python_does_not_read(tmp_path, capsys, text):
    (tmp_path / "jobs.json").write_text(text)
    assert cli.run(["animate", "--weights=weights", f"--jobs={tmp_path / 'jobs.json'}"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "more digits of a number, or brackets" in said


def test_outputs_are_protected(model, files, tmp_path):
    out = tmp_path / "result.mp4"
    out.write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        run(files, tmp_path, source="a.png", driving="b.mp4")
    assert out.read_text() == "mine"
    with pytest.raises(UserError, match=r"is a file"):
        animate_jobs.check_output(out / "below.mp4", False)
    with pytest.raises(UserError, match="differ"):
        run(files, tmp_path, source="a.png", driving="b.mp4", side_by_side=str(out), overwrite=True)


def test_the_record_beside_a_video_is_protected(model, files, tmp_path):
    beside = provenance.sidecar_path(tmp_path / "result.mp4")
    beside.write_text("mine")
    flags = {"source": "a.png", "driving": "b.mp4"}
    with pytest.raises(UserError, match=rf"^{beside} is there already; add --overwrite"):
        run(files, tmp_path, **flags)
    assert [file.name for file in tmp_path.iterdir()] == ["result.mp4.json"]
    assert beside.read_text() == "mine" and not model.drives
    out = run(files, tmp_path, overwrite=True, **flags)
    assert json.loads(beside.read_text()) == provenance.read(out)
    beside.unlink()
    beside.mkdir()
    with pytest.raises(UserError, match=rf"^{beside} is a directory"):
        run(files, tmp_path, overwrite=True, **flags)


@pytest.mark.parametrize("why", ["the model fell over", "the disk is full"])
def test_an_overwritten_pair_is_replaced_whole_or_not_at_all(
    why, model, files, tmp_path, monkeypatch
):
    flags = {"source": "a.png", "driving": "b.mp4", "overwrite": True}
    out = run(files, tmp_path, **flags)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fall_over(*_):
        raise OSError(errno.ENOSPC, "full") if why == "the disk is full" else UserError(why)

    # Of the files of this job the record alone is synced, by `staged`.
    place = (os, "fsync") if why == "the disk is full" else (model, "animate")
    monkeypatch.setattr(*place, fall_over)
    with pytest.raises(UserError, match=why):
        run(files, tmp_path, seed=3, **flags)
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert provenance.read(out)["seed"] == 0


def test_a_failure_leaves_nothing_behind(model, files, tmp_path, monkeypatch):
    def broken(*arguments):
        yield np.zeros((1, 64, 64, 3), np.uint8)
        raise UserError("the model fell over")

    monkeypatch.setattr(model, "animate", broken)
    with pytest.raises(UserError, match="fell over"):
        run(files, tmp_path, source="a.png", driving="b.mp4", side_by_side=str(tmp_path / "s.mp4"))
    assert not list(tmp_path.iterdir())


def test_a_driver_of_one_frame(model, files, tmp_path, monkeypatch):
    one = Driver.steady(fixtures.make_clip(1, 1))
    monkeypatch.setattr(DrawnFaces, "_video", lambda self, path, *wanted: one)
    with pytest.raises(UserError, match="one usable frame"):
        run(files, tmp_path, source="a.png", driving="b.mp4")


def test_no_weights(files, tmp_path):
    flags = {"source": str(files / "a.png"), "driving": str(files / "b.mp4")}
    with pytest.raises(UserError, match="no such directory"):
        animate.run_animate(str(tmp_path / "none"), out=str(tmp_path / "x.mp4"), **flags)
    with pytest.raises(UserError, match=r"model\.json"):
        animate.run_animate(str(files), out=str(tmp_path / "x.mp4"), **flags)
