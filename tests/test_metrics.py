"""The record of a run: no step twice, no gap, whatever was torn."""

import errno
import json
import os

import jax.numpy as jnp
import pytest

from dexportrait_jax import config as configs
from dexportrait_jax import growing_file, metric_sinks, metrics
from dexportrait_jax.errors import UserError
from dexportrait_jax.metrics import MetricWriter, Progress, read_rows
from tests.test_metric_sinks import read as read_tensorboard


def test_rows_wait_until_flush(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    writer.add(1, {"loss": jnp.float32(0.5)})
    assert read_rows(tmp_path / "metrics.jsonl") == []
    assert writer.flush() == [{"step": 1, "loss": 0.5}]
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]


def test_resume_drops_rows_past_the_checkpoint_and_a_torn_line(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    for step in range(1, 8):
        writer.add(step, {"loss": jnp.float32(step)})
    writer.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 8, "lo')
    writer = MetricWriter(tmp_path, 4)
    writer.add(5, {"loss": jnp.float32(50)})
    writer.close()
    rows = read_rows(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[-1]["loss"] == 50


@pytest.mark.parametrize(
    "damage",
    [
        b'{"step": 3, "lo{"step": 3, "loss": 3.0}',
        b'{"step": 3, "loss\xff": 3.0}',
        bytes(24),
        b"3",
        b'{"stop": 3, "loss": 3.0}',
    ],
)
def test_a_damaged_line_costs_itself_alone(tmp_path, damage, capsys):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": step}).encode() for step in range(1, 7)]
    lines[2] = damage
    path.write_bytes(b"\n".join([*lines, b'{"step": 7, "lo']))
    kept = [1, 2, 4, 5, 6]
    assert [row["step"] for row in read_rows(path)] == kept
    assert capsys.readouterr().err == f"warning: {path}: 1 unreadable lines are left out\n"
    writer = MetricWriter(tmp_path, 5)
    writer.add(6, {"loss": jnp.float32(60)})
    writer.close()
    assert writer.dropped == 1 and writer.last_kept == {"step": 5, "loss": 5}
    assert capsys.readouterr().err.count("\n") == 1
    assert [row["step"] for row in read_rows(path)] == kept
    assert damage not in path.read_bytes() and capsys.readouterr().err == ""


@pytest.fixture
def failing(monkeypatch):
    """Whether what is written can be brought to the disk: a number of files for which it cannot, from now on."""
    left, sync = [0], os.fsync

    def fsync(file):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        sync(file)

    monkeypatch.setattr(growing_file.os, "fsync", fsync)
    return left


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_a_disk_that_fails_for_a_while_costs_no_row(tmp_path, failing, capsys, failures):
    config = configs.load_config("configs/autoencoder.py:tiny")
    writer = MetricWriter(tmp_path, 0, sinks=metric_sinks.make_sinks(config, tmp_path, 0))
    for step in range(1, 8):
        if step == 3:
            failing[0] = failures
        writer.add(step, {"loss": jnp.float32(step)})
        assert writer.flush() == [{"step": step, "loss": step}]
    writer.close()
    wanted = [(step, step) for step in range(1, 8)]
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == wanted
    assert read_tensorboard(tmp_path / "tensorboard")["loss"] == wanted
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("warning: the last rows are not on disk (cannot write ")
    assert "Stale file handle" in said


def test_rows_that_never_reach_the_disk_are_an_error(tmp_path, failing, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    writer = MetricWriter(tmp_path, 0)
    failing[0] = 100
    for step in (1, 2):
        writer.add(step, {"loss": 1.0})
        writer.flush()
        clock[0] += metrics.PATIENCE - 1
    with pytest.raises(UserError, match="Stale file handle"):
        writer.flush()
    with pytest.raises(UserError, match="cannot write .*metrics.jsonl: Stale file handle"):
        writer.close()


def test_non_finite_values_are_null_in_valid_json(tmp_path):
    writer = MetricWriter(tmp_path, 0)
    writer.add(1, {"loss": jnp.float32(jnp.nan)})
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None}


def test_a_total_that_is_wrong_is_unknown(monkeypatch, capsys):
    """What is done beyond it is told now and then, without a time left, until the total is known."""
    clock = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    for total, lines in ((0, 5), (4, 4)):
        progress = Progress("read", total, unit="frame")
        for done in range(1, 101):
            clock[0] += 0.5
            progress.update(done)
        progress.total = 100
        progress.update(100)
        said = capsys.readouterr().err.splitlines()
        if total:
            assert said.pop(0) == "read: 4/4 frames, 2.00 frames/s, 2s"
        assert said[0].startswith("read: ") and said[0].endswith(" frames, 2.00 frames/s")
        assert len(said) == lines and "/" not in "".join(said[:-1]).replace("frames/s", "")
        assert said[-1] == "read: 100/100 frames, 2.00 frames/s, 50s"


def test_time_left_is_told_from_the_recent_rate(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    progress = Progress("train", 1000, done=100)
    for _ in range(20):  # 400 s of 1 step/s, then of 0.25
        clock[0] += 20
        progress.update(100 + int(clock[0]))
    assert "500/1000 steps, 1.00 steps/s, 8m20s left" in capsys.readouterr().err
    for done in range(505, 550, 5):
        clock[0] += 20
        progress.update(done)
    assert "545/1000 steps, 4.00 s/step, 30m20s left" in capsys.readouterr().err
    clock[0] += 20
    progress.update(1000)
    assert capsys.readouterr().err.endswith("1000/1000 steps, 1.50 steps/s, 10m00s\n")
