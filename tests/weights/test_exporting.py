"""What an export directory holds, and that writing one is all or nothing."""

import errno
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch

from data_pipelines import files
from dexportrait_jax import checkpoint_groups
from dexportrait_jax.errors import UserError
from dexportrait_jax.weights import exporting
from dexportrait_jax.weights.exporting import export_groups, run_export
from dexportrait_jax.weights.importing import load_groups
from dexportrait_jax.weights.published import run_import
from tests import fixtures

MODEL = {
    "stage": "motion",
    "config": {"sizes": (1, 2), "rate": np.float32(0.5)},
    "step": 7,
    "ema": True,
    "crop": {"scale": 1.5},
}


def _groups(width=4):
    keys = iter(jax.random.split(jax.random.key(width), 9))
    return {
        "encoder": {
            "conv": {
                "kernel": jax.random.normal(next(keys), (3, 3, 2, width)),
                "bias": jnp.ones(width),
            },
            "norm": {"scale": jax.random.normal(next(keys), (width,)), "bias": jnp.zeros(width)},
            "token": {"embedding": jax.random.normal(next(keys), (5, width))},
        },
        "decoder": {
            "0": {"kernel": jax.random.normal(next(keys), (width, 2)).astype(jnp.bfloat16)}
        },
    }


def test_directory_says_what_it_holds_and_torch_reads_it(tmp_path):
    out = export_groups(tmp_path / "deep" / "export", MODEL, _groups())
    assert sorted(p.name for p in out.iterdir()) == [
        "decoder.safetensors",
        "encoder.safetensors",
        "model.json",
    ]
    model = json.loads((out / "model.json").read_text())
    assert model["format"] == exporting.FORMAT
    assert (model["stage"], model["step"], model["ema"], model["crop"]) == (
        "motion",
        7,
        True,
        {"scale": 1.5},
    )
    assert model["config"] == {"sizes": [1, 2], "rate": 0.5}
    assert model["groups"]["encoder"]["parameters"] == 3 * 3 * 2 * 4 + 4 + 4 + 4 + 20
    assert model["groups"]["encoder"]["sha256"] == exporting.file_sha256(
        out / "encoder.safetensors"
    )
    assert "jax" in model["versions"]
    tensors = safetensors.torch.load_file(out / "encoder.safetensors")
    assert tensors["conv.weight"].shape == (4, 2, 3, 3)
    assert (
        safetensors.torch.load_file(out / "decoder.safetensors")["0.weight"].dtype == torch.bfloat16
    )


def test_an_export_is_replaced_only_on_request(tmp_path):
    out = export_groups(tmp_path / "export", MODEL, _groups())
    before = (out / "model.json").read_bytes()
    with pytest.raises(UserError, match="--overwrite"):
        export_groups(out, {**MODEL, "step": 8}, _groups())
    assert (out / "model.json").read_bytes() == before
    export_groups(out, {**MODEL, "step": 8}, _groups(6), overwrite=True)
    assert json.loads((out / "model.json").read_text())["step"] == 8
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_other_peoples_directories_and_files_are_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "model.json").write_text('{"format": "layers-model"}')
    (tmp_path / "file").write_text("x")
    for name, words in (("photos", r"\(a\.jpg\)"), ("theirs", "model.json"), ("file", "a file")):
        with pytest.raises(UserError, match=words) as caught:
            export_groups(tmp_path / name, MODEL, _groups(), overwrite=True)
        assert "--overwrite" not in str(caught.value)
    assert (tmp_path / "photos" / "a.jpg").read_bytes() == b"x"
    assert (tmp_path / "theirs" / "model.json").exists()


def test_an_export_that_a_killed_job_had_moved_aside_is_put_back(tmp_path, capsys):
    """Killed between the two renames it is the only whole one, and nothing is at its place."""
    out = export_groups(tmp_path / "export", MODEL, _groups())
    whole = (out / "model.json").read_bytes()
    out.rename(tmp_path / ".export.replaced-7")
    (tmp_path / ".export.incomplete-7").mkdir()
    with pytest.raises(UserError, match="already holds an export; add --overwrite"):
        run_export(tmp_path / "no_such_run", out)
    said = capsys.readouterr().err
    assert f"put back {out}" in said and "removed .export.incomplete-7" in said
    assert (out / "model.json").read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    out.rename(tmp_path / ".export.replaced-7")
    export_groups(out, {**MODEL, "step": 8}, _groups(6), overwrite=True)
    assert json.loads((out / "model.json").read_text())["step"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_where_files_cannot_be_locked_an_export_is_written_and_nothing_cleared_up(
    tmp_path, monkeypatch, capsys
):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    (tmp_path / ".export.incomplete-7").mkdir()
    export_groups(tmp_path / "export", MODEL, _groups())
    assert "files cannot be locked" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"export", ".export.incomplete-7"}


def test_a_failure_leaves_nothing_behind_and_the_old_export_whole(tmp_path, monkeypatch):
    out = export_groups(tmp_path / "export", MODEL, _groups())
    before = (out / "model.json").read_bytes()

    def full_disk(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "write_tensors", full_disk)
    with pytest.raises(UserError, match="disk is full"):
        export_groups(out, MODEL, _groups(), overwrite=True)
    assert (out / "model.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_unwritable_place_is_one_line(tmp_path):
    blocker = tmp_path / "blocker"
    blocker.write_text("a file where a directory is needed")
    with pytest.raises(UserError) as error:
        export_groups(blocker / "export", MODEL, _groups())
    assert "\n" not in str(error.value)


def test_an_out_that_cannot_be_written_is_found_before_any_work(tmp_path, monkeypatch):
    """Also the folder one is in: replaced, it would be gone from under whoever stands there."""
    (tmp_path / "file").write_text("mine")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for out, message in (
        (tmp_path / "file" / "below", "file is a file; choose another folder"),
        (".", "--out=. is the folder you are in.* such as --out=export"),
        (here, "is the folder you are in"),
        ("new/..", "is the folder you are in"),
        ("..", "something else than an export"),
    ):
        for refused in (
            lambda out: run_export("no_such_run", out, overwrite=True),
            lambda out: run_import("vae", "no_such_file", out, overwrite=True),
        ):
            with pytest.raises(UserError, match=message) as error:
                refused(out)
            assert "\n" not in str(error.value)
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="no permission to write in"):
        run_export("no_such_run", tmp_path / "out")
    assert not any(here.iterdir())


def test_permissions_follow_the_umask(tmp_path):
    previous = os.umask(0o022)
    try:
        out = export_groups(tmp_path / "export", MODEL, _groups())
    finally:
        os.umask(previous)
    assert out.stat().st_mode & 0o777 == 0o755


def test_job_refuses_before_it_loads_anything(tmp_path):
    out = export_groups(tmp_path / "export", MODEL, _groups())
    with pytest.raises(UserError, match="--overwrite"):
        run_export(tmp_path / "no_such_run", out)


@pytest.mark.parametrize("data_is_there", [True, False])
def test_job_exports_a_run_with_the_crop_of_its_data(tmp_path, monkeypatch, capsys, data_is_there):
    config = {
        "stage": "motion",
        "ema_decay": 0.99,
        "data": {"path": str(tmp_path / "data"), "split": "train"},
    }
    if data_is_there:
        fixtures.make_dataset(tmp_path / "data", clips=1, frames=2)
    monkeypatch.setattr(checkpoint_groups, "load_groups", lambda workdir: (config, 12, _groups()))
    run_export(tmp_path / "run", tmp_path / "export")
    model, groups = load_groups(tmp_path / "export", stage="motion")
    assert (model["step"], model["ema"], set(groups)) == (12, True, {"encoder", "decoder"})
    crop = {"drawn": True, "size": 64} if data_is_there else None
    assert model["crop"] == crop and model["config"]["data"].get("crop") == crop
    assert ("no crop constants" in capsys.readouterr().out) != data_is_there
