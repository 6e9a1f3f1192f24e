"""Everything the project makes can be named; everything else is one line."""

import dataclasses
import json
import re

import cv2
import numpy as np
import pytest

from data_pipelines.prepare import builder
from dexportrait_jax.errors import UserError
from dexportrait_jax.inspection import run_inspect
from dexportrait_jax.weights.exporting import export_groups
from tests import fixtures


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return fixtures.make_dataset(tmp_path_factory.mktemp("data") / "heads", clips=2, frames=9)


@pytest.fixture
def export(tmp_path):
    model = {"stage": "motion", "config": {}, "step": 30, "ema": True, "crop": {"face_scale": 2.15}}
    return export_groups(tmp_path / "export", model, {"pose": {"kernel": np.ones((500, 20))}})


def _fails(path, **keywords):
    with pytest.raises(UserError) as error:
        run_inspect(str(path), **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_dataset_in_words_and_pictures(drawn, tmp_path, capsys):
    sheet = tmp_path / "pictures" / "sheet.png"
    run_inspect(str(drawn), str(sheet))
    said = capsys.readouterr().out
    assert "train: 2 clips, 18 frames" in said and "2 people" in said
    assert "validation: 1 clips" in said and "yaw" in said and "64 px" in said
    picture = cv2.imread(str(sheet))
    assert picture.shape == (3 * (160 + 18), 6 * 160, 3) and picture.std() > 20
    assert "already" in _fails(drawn, out=str(sheet))
    assert ".png" in _fails(drawn, out=str(tmp_path / "sheet.txt"))


def test_a_frame_that_is_no_picture_is_blank_in_the_sheet(tmp_path):
    clip = fixtures.make_clip(0, 6, 64)
    frames = [*clip.frames[:2], b"no jpeg", clip.frames[3][:500], *clip.frames[4:]]
    clip = dataclasses.replace(clip, frames=frames)
    directory = builder.write_dataset({"train": lambda: [clip]}, tmp_path / "data")
    run_inspect(str(directory), str(tmp_path / "sheet.png"))
    row = cv2.imread(str(tmp_path / "sheet.png"))[18:]
    cells = [row[:, 160 * n : 160 * (n + 1)] for n in range(6)]
    assert [bool(cell.any()) for cell in cells] == [True, True, False, False, True, True]
    drawn = cv2.resize(cv2.imdecode(np.frombuffer(frames[0], np.uint8), 1), (160, 160))
    np.testing.assert_array_equal(cells[0][:20], drawn[:20])  # above the head: blue is blue


def test_export_is_checked(export, capsys):
    run_inspect(str(export))
    said = capsys.readouterr().out
    assert "stage motion, step 30, averaged weights" in said
    assert "pose: 0.01 M parameters" in said and "face_scale 2.15" in said
    assert "no contact sheet" in _fails(export, out="sheet.png")
    (export / "pose.safetensors").write_bytes(b"damaged")
    assert "corrupted" in _fails(export)


def test_tensor_file(export, capsys):
    run_inspect(str(export / "pose.safetensors"))
    assert "weight F64 (20, 500)" in capsys.readouterr().out


def test_config(capsys):
    run_inspect("configs/autoencoder.py:tiny")
    said = capsys.readouterr().out
    assert "stage autoencoder, variant tiny" in said and "together" in said
    assert re.search(
        r"one target, forward: 0\.\d+ GFLOP\n  autoencoder: 0.*\n  perceptual: 0", said
    )
    assert "variant" in _fails("configs/autoencoder.py:enormous")


def test_run_and_its_checkpoints(tmp_path, capsys):
    from dexportrait_jax.config import load_config, to_json

    run = tmp_path / "run"
    for step in (10, 20):
        (run / "checkpoints" / str(step)).mkdir(parents=True)
        (run / "checkpoints" / str(step) / "array").write_bytes(b"0" * 1_500_000)
    config = to_json(load_config("configs/autoencoder.py:tiny"))
    (run / "config.json").write_text(json.dumps(config))
    (run / "metrics.jsonl").write_text('{"step": 19, "loss": 0.5}\n{"step": 20, "loss": 0.25}\n')
    run_inspect(str(run))
    said = capsys.readouterr().out
    assert "run" in said and "checkpoint of step 20: 1.5 MB" in said
    assert "2 rows of metrics; the last: step 20, loss 0.25" in said and "autoencoder: " in said
    run_inspect(str(run / "checkpoints" / "10"))
    said = capsys.readouterr().out
    assert "checkpoint of step 10" in said and "checkpoint of step 20" not in said


def test_what_is_nothing_of_ours(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("[1]")
    for name in ("notes.txt", "text.mp4", "text.safetensors", "other", "nowhere", "."):
        _fails(tmp_path / name)
