"""What goes wrong ends in one line that says what and what to do, a non-zero code, and nothing half-made."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_pipelines.prepare import builder
from data_pipelines.survey import survey
from data_pipelines.video_writing import VideoWriter
from dexportrait_jax import checkpoint_format, cli, demo
from dexportrait_jax import config as configs
from dexportrait_jax.errors import in_words
from dexportrait_jax.jobs import JOBS
from dexportrait_jax.metrics import read_rows
from dexportrait_jax.tasks import build_networks, make_task
from dexportrait_jax.weights.exporting import export_groups
from tests import fixtures
from tests.disks import fill, full_disk, read_only, small_disk
from tests.stages import handful_of_numbers, micro, random_weights
from tests.weights.test_lpips_names import one_file, random_params

# What a job tells on the way: "prepare: ...", or a stage or a video with how far it is.
PROGRESS = re.compile(r"prepare: |[\w .-]+: \d+/\d+ (step|frame|clip)s")


@pytest.fixture
def fails(capfd):
    """Runs a job that must fail; returns its one line."""

    def run(*arguments, code=1):
        capfd.readouterr()
        assert cli.run([str(argument) for argument in arguments]) == code
        told = capfd.readouterr()
        assert "Traceback" not in told.err + told.out
        said = [line for line in told.err.splitlines() if not PROGRESS.match(line)]
        assert len(said) == 1 and said[0].startswith("dexportrait"), told.err
        return said[0]

    return run


@pytest.fixture(scope="module")
def weights(places, tmp_path_factory):
    """An export of a motion trainer that has learnt nothing."""
    config = micro("motion", *places)
    groups = {
        name: random_weights(network, seed=0) for name, network in build_networks(config).items()
    }
    model = {
        "stage": "motion",
        "config": configs.to_json(config),
        "step": 0,
        "ema": False,
        "crop": {},
    }
    return export_groups(tmp_path_factory.mktemp("weights") / "motion", model, groups)


def video(path: Path, frames: int) -> Path:
    with VideoWriter(path, 25.0) as writer:
        for number in range(frames):
            writer.write(np.full((96, 96, 3), 10 * number, np.uint8))
    return path


# --- the command line -----------------------------------------------------------------


def test_a_job_that_does_not_exist(fails):
    line = fails("trian", code=2)
    assert "no job 'trian'; did you mean 'train'" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "--confg=x"), "--config"),
        (("prepare", "--videos=x"), "--out"),
        (("animate", "--wieghts=x", "--source=y"), "--weights"),
        (("evaluate", "--weights=x", "--data=y", "--out=z", "--protocol=selff"), "selff"),
        (("animate", "--weights=x", "--seed=-1"), "--seed: '-1' is no whole number from 0"),
        (("evaluate", "--weights=x", "--seed=1.5"), "--seed"),
    ],
)
def test_wrong_flags(fails, arguments, words):
    assert words in fails(*arguments, code=2)


def test_every_job_has_help_with_an_example(capfd):
    for job in JOBS:
        assert cli.run([job, "--help"]) == 0
        assert "example: dexportrait" in capfd.readouterr().out


def test_kinds_of_the_contract_can_be_imported(fails, tmp_path):
    """design.md 5: the names of `--kind` stay."""
    for kind in ("sd15", "vae", "motion_module", "image_encoder", "lpips", "convnextv2"):
        said = fails("import", f"--kind={kind}", "--source=nowhere", f"--out={tmp_path / 'out'}")
        assert "there is nothing at nowhere" in said


def test_misspelt_config_key(fails, tmp_path):
    line = fails(
        "train",
        "--config=configs/motion.py:tiny",
        f"--workdir={tmp_path / 'run'}",
        "--config.optim.generator.learning_rat=1",
    )
    assert "did you mean 'learning_rate'" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("job", "package", "command"),
    [
        ("demo", "psutil", "pip install -e '.[demo]'"),
        ("demo", "mediapipe.tasks", "pip install -e '.[demo]'"),
        ("animate", "mediapipe", "pip install -e '.[prepare]'"),
        ("prepare", "tensorflow_datasets", "pip install -e '.[prepare]'"),
        ("train", "orbax", "pip install -e ."),
    ],
)
def test_a_missing_package_names_the_command_that_brings_it(job, package, command):
    error = ModuleNotFoundError(f"No module named {package!r}", name=package)
    assert in_words(error, job) == f"package {package!r} is missing; install it with {command}"


@pytest.mark.parametrize("words", [["assets"], ["help"]])
@pytest.mark.parametrize("buffered", ["", "1"])
def test_output_that_nobody_reads(words, buffered):
    """`dexportrait assets | head` ends in silence."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dexportrait_jax", *words],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": buffered},
            timeout=60,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (cli.NO_READER, "")


# --- prepare --------------------------------------------------------------------------


def test_no_video_matches(fails, tmp_path):
    line = fails("prepare", f"--videos={tmp_path}/*.mp4", f"--out={tmp_path / 'data'}")
    assert "no" in line and "*.mp4" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["text", "one_frame"])
def test_videos_that_are_none(fails, tmp_path, kind, shared_data):
    folder = tmp_path / "videos"
    folder.mkdir()
    if kind == "text":
        (folder / "notes.mp4").write_text("this is no video\n")
    else:
        video(folder / "short.mp4", 1)
    line = fails("prepare", f"--videos={folder}/*.mp4", f"--out={tmp_path / 'data'}", "--size=64")
    assert "data" in line or "video" in line
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_every_hostile_clip_is_refused_or_cut(tmp_path, shared_data, capfd):
    import json

    code = cli.run(
        [
            "prepare",
            f"--videos={shared_data}/negative/clips/*.mp4",
            f"--out={tmp_path / 'data'}",
            "--size=64",
        ]
    )
    assert code == 0, capfd.readouterr().err
    report = json.loads((tmp_path / "data" / "drop_report.json").read_text())
    text = json.dumps(report)
    for name in ("neg_no_face", "neg_two_people", "neg_fullbody_no_usable_face"):
        assert name in text
    from data_pipelines.dataset import ClipDataset
    from data_pipelines.dataset_files import split_names

    kept = [
        clip_id
        for split in split_names(tmp_path / "data")
        for clip_id in ClipDataset(tmp_path / "data", split).index["clip_id"]
    ]
    assert kept and all(clip_id.startswith("neg_endcard_cut") for clip_id in kept)


# --- train ----------------------------------------------------------------------------


def train_motion(data: Path, run: Path) -> tuple[str, ...]:
    """A command that must fail before anything is compiled."""
    flags = (f"--workdir={run}", f"--config.data.path={data}", "--config.data.batch_size=8")
    return "train", "--config=configs/motion.py:tiny", *flags


def test_a_dataset_that_is_not_there(fails, tmp_path):
    line = fails(
        "train",
        "--config=configs/autoencoder.py:tiny",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.path={tmp_path / 'nothing'}",
        "--config.data.batch_size=8",
    )
    assert "nothing" in line


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_records_without_masks(fails, tmp_path, kind):
    data = fixtures.make_dataset(tmp_path / "data", clips=2, frames=4, size=64)
    fixtures.remove_masks(data, empty=kind == "empty")
    line = fails(*train_motion(data, tmp_path / "run"))
    assert str(data) in line and "no mask polygons of right_eye" in line and "prepare" in line


def test_a_file_of_the_dataset_is_missing(fails, tmp_path):
    data = fixtures.make_dataset(tmp_path / "data", clips=4, frames=2, size=64)
    fixtures.spread(data, 4)[1].unlink()
    line = fails(*train_motion(data, tmp_path / "run"))
    assert f"split 'train' of {data} lacks 1 of its 4 files" in line
    assert "train.array_record-00001-of-00004" in line and "copy it whole" in line


def test_clips_that_are_all_too_short(fails, tmp_path):
    data = fixtures.make_dataset(tmp_path / "data", clips=2, frames=1, size=64)
    line = fails(*train_motion(data, tmp_path / "run"))
    assert "at most 1 frames, but 2 are needed in a row; prepare longer videos" in line


def test_one_person_and_a_clip_too_short(tmp_path, monkeypatch, capfd):
    """A personalised model is trained, a line says what it cannot be measured by, and another what is left out.

    The loop is that of every stage.
    """
    handful_of_numbers(monkeypatch)
    clips = [fixtures.make_clip(0, frames, 64) for frames in (4, 1, 4)]
    data = builder.write_dataset({"train": lambda: clips}, tmp_path / "data")
    config = micro("motion", data, tmp_path, num_steps=1, evaluate__at_end="true")
    monkeypatch.setattr(configs, "load_config", lambda address, overrides: config)
    run = tmp_path / "run"
    assert cli.run(["train", "--config=the one above", f"--workdir={run}"]) == 0
    said = [line for line in capfd.readouterr().err.splitlines() if not PROGRESS.match(line)]
    assert len(said) == 2, said
    assert said[0].startswith("warning: ") and "1 of 3 clips are left out" in said[0]
    assert said[1].startswith("warning: ") and "shows one person" in said[1]
    assert "no split 'validation', so nothing is evaluated" in said[1]
    assert not (run / "samples").exists()


def test_a_loss_between_people_wants_several(tmp_path, monkeypatch, fails):
    """With one, it would punish expression; without it, one person is a warning alone."""
    data = "synthetic:identities=1,frames=4,size=64,holdout=0"
    config = micro("motion", data, tmp_path)
    task = make_task(config)
    task.check_data(survey(config.data))
    config.loss.person_leak = 0.5
    monkeypatch.setattr(configs, "load_config", lambda address, overrides: config)
    line = fails("train", "--config=the one above", f"--workdir={tmp_path / 'run'}")
    assert "config.loss.person_leak compares people, but synthetic:identities=1" in line
    make_task(config).check_data(
        survey(config.data.to_dict() | {"path": data.replace("identities=1", "identities=2")})
    )


@pytest.mark.parametrize(("protocol", "least"), [("cross", 2), ("disentangled", 3)])
@pytest.mark.parametrize("frames", [(4, 4), (4, 1, 1, 1)])
def test_protocols_that_need_other_people(fails, weights, tmp_path, protocol, least, frames):
    clips = [
        fixtures.make_clip(0 if count > 1 else person, count, 64)
        for person, count in enumerate(frames)
    ]
    splits = {"train": lambda: clips, "validation": lambda: clips}
    data = builder.write_dataset(splits, tmp_path / "data")
    line = fails(
        "evaluate",
        f"--weights={weights}",
        f"--data={data}",
        f"--protocol={protocol}",
        f"--out={tmp_path / 'out'}",
    )
    assert f"--protocol={protocol} needs {least} people with clips of two frames" in line
    assert ("has 1: prepare" if 1 not in frames else "has 1, 3 more in clips of one frame") in line
    assert not (tmp_path / "out").exists()


def test_weights_of_another_stage(fails, places, weights, tmp_path):
    line = fails(
        "train",
        "--config=configs/animator_video.py:tiny",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.path={places[0]}",
        f"--config.init.image={weights}",
        "--config.data.batch_size=8",
    )
    assert f"{weights} is an export of stage 'motion' with the groups " in line
    assert "; it has no autoencoder, reference, denoiser. Give an export that does" in line
    assert not (tmp_path / "run").exists()


def test_weights_of_another_width(fails, places, tmp_path, monkeypatch):
    """The option that fits is given, and not a list of tensors."""
    config = micro("animator_video", *places)
    image, width = config.init.image, config.model.unet.block_channels
    with config.unlocked():
        config.model.unet.block_channels = tuple(2 * channels for channels in width)
    monkeypatch.setattr(configs, "load_config", lambda address, overrides: config)
    line = fails("train", "--config=the one above", f"--workdir={tmp_path / 'run'}")
    assert f"{image} does not fit this config" in line
    assert line.endswith("give: '--config.model.unet.block_channels=(16,32)'")
    assert not (tmp_path / "run").exists()


def test_read_only_workdir(fails, tmp_path, places):
    with read_only(tmp_path / "locked") as folder:
        line = fails(
            "train",
            "--config=configs/autoencoder.py:tiny",
            f"--workdir={folder / 'run'}",
            f"--config.data.path={places[0]}",
        )
    assert "cannot write" in line


def test_full_disk_while_training_keeps_the_checkpoint_before(places, tmp_path, fails, monkeypatch):
    """The second save does not fit; the first stays readable and the run goes on from it elsewhere."""
    from dexportrait_jax import train as loop

    handful_of_numbers(monkeypatch)
    config = micro("motion", *places, checkpoint__every_steps=2, num_steps=4)
    monkeypatch.setattr(configs, "load_config", lambda address, overrides: config)
    with small_disk(tmp_path / "disk", "size=40m") as disk:
        job = ("train", "--config=the one above", f"--workdir={disk / 'run'}")
        save = loop.checkpoint.Checkpoints.save

        def crowded(self, step, state):
            if step == 4:
                self.wait()
                fill(disk)
            save(self, step, state)

        with monkeypatch.context() as patch:
            patch.setattr(loop.checkpoint.Checkpoints, "save", crowded)
            line = fails(*job)
        assert "full" in line
        (disk / "filler").unlink()
        assert cli.run([str(argument) for argument in job]) == 0
        assert checkpoint_format.newest_step(disk / "run") == 4
        assert [row["step"] for row in read_rows(disk / "run" / "metrics.jsonl")] == [1, 2, 3, 4]


# --- the demo -------------------------------------------------------------------------


def test_demo_in_a_read_only_folder(fails, tmp_path):
    with read_only(tmp_path / "locked") as folder:
        line = fails("demo", f"--workdir={folder / 'demo'}")
    assert "cannot write" in line and "locked" in line


def test_demo_on_a_full_disk(fails, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_gather_inputs", lambda folder: False)
    with full_disk(tmp_path / "disk") as folder:
        line = fails("demo", f"--workdir={folder / 'demo'}")
    assert "disk is full" in line


# --- animate, export ------------------------------------------------------------------


@pytest.mark.parametrize("still", ["neg_mountain.jpg", "neg_s40.jpg", "neg_dog.jpg"])
def test_portraits_without_a_person(fails, weights, shared_data, tmp_path, still):
    driver = shared_data / "clips" / "pyfeat_single.mp4"
    line = fails(
        "animate",
        f"--weights={weights}",
        f"--source={shared_data / 'negative' / 'stills' / still}",
        f"--driving={driver}",
        f"--out={tmp_path / 'out.mp4'}",
        "--max_frames=4",
    )
    assert still in line
    assert list(tmp_path.iterdir()) == []


def test_an_import_cannot_animate(fails, tmp_path):
    source, out = one_file(random_params("alexnet"), tmp_path), tmp_path / "import"
    assert cli.run(["import", "--kind=lpips", f"--source={source}", f"--out={out}"]) == 0
    picture = tmp_path / "face.png"
    cv2.imwrite(str(picture), np.zeros((64, 64, 3), np.uint8))
    made = tmp_path / "out.mp4"
    flags = (f"--weights={out}", f"--source={picture}", '--pose={"yaw":10}', f"--out={made}")
    line = fails("animate", *flags)
    assert f"--weights={out} is an export of stage 'import', which cannot animate" in line
    assert line.endswith("give an export of motion, animator_image, animator_video")
    assert not made.exists()


def test_results_are_not_overwritten(fails, weights, places, tmp_path):
    shutil.copytree(weights, tmp_path / "export")
    before = {path: path.read_bytes() for path in (tmp_path / "export").iterdir()}
    (tmp_path / "out.mp4").write_bytes(b"mine")
    picture = tmp_path / "face.png"
    cv2.imwrite(str(picture), np.zeros((64, 64, 3), np.uint8))
    line = fails(
        "animate",
        f"--weights={tmp_path / 'export'}",
        f"--source={picture}",
        '--pose={"yaw":10}',
        f"--out={tmp_path / 'out.mp4'}",
    )
    assert "--overwrite" in line
    assert (tmp_path / "out.mp4").read_bytes() == b"mine"
    assert {path: path.read_bytes() for path in (tmp_path / "export").iterdir()} == before


@pytest.mark.parametrize("place", [read_only, full_disk])
def test_export_where_nothing_can_be_written(places, tmp_path, monkeypatch, fails, place):
    """The run stays as it is; where the export was to be, nothing is."""
    handful_of_numbers(monkeypatch)
    config = micro("motion", *places, num_steps=1)
    monkeypatch.setattr(configs, "load_config", lambda address, overrides: config)
    run = tmp_path / "run"
    assert cli.run(["train", "--config=the one above", f"--workdir={run}"]) == 0
    before = sorted(run.rglob("*"))
    with place(tmp_path / "disk") as disk:
        line = fails("export", f"--workdir={run}", f"--out={disk / 'export'}")
        assert "cannot write" in line
        assert not (disk / "export").exists()
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("place", [read_only, full_disk])
def test_animate_where_nothing_can_be_written(weights, shared_data, tmp_path, fails, place):
    with place(tmp_path / "disk") as disk:
        line = fails(
            "animate",
            f"--weights={weights}",
            f"--source={shared_data / 'clips' / 'pyfeat_single.mp4'}",
            '--pose={"yaw":10}',
            f"--out={disk / 'out.mp4'}",
            "--max_frames=2",
        )
        assert "cannot write" in line
        assert not [path for path in disk.iterdir() if path.name != "filler"]


def test_export_of_no_run(fails, tmp_path):
    line = fails("export", f"--workdir={tmp_path}", f"--out={tmp_path / 'out'}")
    assert "not a training run" in line
    assert not (tmp_path / "out").exists()
