"""Two processes equal one, and killed they equal the run left alone."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import psutil
import pytest

from dexportrait_jax import checkpoint_format, sharding
from dexportrait_jax import config as configs
from dexportrait_jax.metrics import read_rows
from dexportrait_jax.train import train
from tests import fixtures
from tests.benchmarks import soak
from tests.benchmarks.soak import Kill
from tests.disks import fill, small_disk

STEPS = 12


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_processes_killed_and_damaged_equal_one_left_alone(tmp_path, monkeypatch):
    """Two take over from one at step 3, are killed three times and stopped once, and end as two left alone, to the bit.

    One process ends there too, but for rounding: its program is compiled for two devices of its own. The comparison
    restores what two processes saved in one, on another mesh.
    """
    data = fixtures.make_dataset(tmp_path / "data", clips=5, frames=12, size=64)
    settings = (*soak.SETTINGS, f"data.path={data}", f"num_steps={STEPS}", "checkpoint.keep=9")
    make = sharding.make_mesh
    devices = jax.devices()[: soak.PROCESSES]
    monkeypatch.setattr(sharding, "make_mesh", lambda config, rows: make(config, devices))
    one, start, alone, two = (tmp_path / name for name in ("one", "start", "alone", "two"))
    train(configs.load_config("configs/autoencoder.py:tiny", list(settings)), one)
    monkeypatch.undo()
    for workdir in (start, alone, two):
        shutil.copytree(one, workdir)
        for step in (6, 9, 12):
            shutil.rmtree(workdir / "checkpoints" / str(step))
    soak.left_alone(soak.command(alone, data, STEPS), tmp_path)
    assert "going on from step 3" in (tmp_path / "left_alone.log").read_text()
    assert_same_but_for_rounding(start, one, alone)

    kills = [
        Kill("save", part=0.0),  # as soon as its first files are there
        # With those of steps 3, 6 and 9, so that there is one to go on from when two are spoilt.
        Kill("steps", "process 1", "torn", 0.0, whole=3),
        Kill("start", damage="deleted"),
        Kill("steps", part=0.1, sent=signal.SIGTERM),
    ]
    programs = steps_kept(tmp_path)
    job = soak.command(two, data, STEPS, "checkpoint.keep=9")
    lives = soak.killed(job, tmp_path, kills)
    assert soak.compare(alone, two) == []
    # What the kills are for did happen: one fell into a save, two checkpoints were spoilt.
    assert lives[0].in_save
    assert [life.damaged for life in lives] == [False, True, True, False, False]
    # Every life took the programs that the run left alone had put where the environment says.
    assert programs and steps_kept(tmp_path) == programs
    # The one process before them too, and perhaps not the life that was killed while it started.
    starts = json.loads((two / "environment.json").read_text())
    assert [start["processes"] for start in starts] in ([1, 2, 2, 2, 2], [1, 2, 2, 2, 2, 2])
    assert lives[0].went_on_from == 3 and lives[0].done_again == STEPS - 3
    codes = [life.code for life in lives]
    assert codes[0] == codes[2] == -signal.SIGKILL and codes[3:] == [75, 0]
    assert codes[1] not in (0, 75)  # 137, or what the other one ended with
    assert lives[-1].done_again == 0  # what was saved at SIGTERM is the last step
    assert (
        "no checkpoint holds what was done after step 3" in (tmp_path / "life_00.log").read_text()
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_process_stopped_and_ended(tmp_path):
    """One of two that stands still is reported by the other, with its stacks; going on, both go on.

    With 100000 steps between two records, SIGTERM to it ends both within seconds, saved.
    """
    data = fixtures.make_dataset(tmp_path / "data", clips=5, frames=12, size=64)
    more = ("log_every=100000", "checkpoint.every_steps=0", "report.stuck_minutes=0.15")
    log = tmp_path / "log.txt"
    with started(soak.command(tmp_path / "run", data, 100000, *more), log) as process:
        ready(process, log)
        one = psutil.Process(process.pid).children()[1]
        stacks = tmp_path / "run" / "stacks_0.txt"
        before = len(stacks.read_text()) if stacks.exists() else 0  # compiling may be slow
        one.suspend()
        stopped_at = time.monotonic()
        while not (stacks.exists() and "train.py" in stacks.read_text()[before:]):
            assert process.poll() is None and time.monotonic() < stopped_at + 60, log.read_text()
            time.sleep(0.5)
        assert "it is at: a step" in stacks.read_text()[before:]
        assert "warning: no progress for" in log.read_text()
        one.resume()
        time.sleep(2)
        one.terminate()
        # By the steps' pace so far they ask about every ten seconds; beside other tests it is another one.
        assert process.wait(300) == 75, log.read_text()
    stopped = int(re.search(r"stopped at step (\d+), saved", log.read_text())[1])
    assert (tmp_path / "run" / "checkpoints" / str(stopped)).is_dir() and stopped < 100000


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_two_processes_on_a_disk_that_fills_up(tmp_path):
    """They end with a line that says so, and with room again go on from what had been saved."""
    data = fixtures.make_dataset(tmp_path / "data", clips=5, frames=12, size=64)
    log = tmp_path / "log.txt"
    with small_disk(tmp_path / "disk", "size=64m") as disk:
        job = soak.command(disk / "run", data, 100000, "checkpoint.every_steps=20")
        with started(job, log) as process:
            ready(process, log)
            while not (newest := checkpoint_format.newest_step(disk / "run")):
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            filler = fill(disk)
            # By itself JAX would wait five minutes for the other process.
            assert process.wait(120) == 1, log.read_text()
        assert "the disk is full" in log.read_text() and "Traceback" not in log.read_text()
        saved = checkpoint_format.newest_step(disk / "run")
        assert saved >= newest
        filler.unlink()
        with started(job, log) as process:
            ready(process, log)
            process.terminate()
            assert process.wait(120) == 75, log.read_text()
        assert f"going on from step {saved}" in log.read_text()


@contextlib.contextmanager
def started(job, log):
    """A job in a session of its own, of which nothing is left afterwards; what it says is in `log`."""
    with log.open("w") as stream:
        process = subprocess.Popen(job, stdout=stream, stderr=stream, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def ready(process, log):
    """Returns once the job has made its first step."""
    while "ready to train" not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)


def test_damage_says_whether_it_was_done(tmp_path):
    """Nothing is damaged that a run could not do without."""
    for step in (3, 6, 9):
        for process in range(soak.PROCESSES):
            data = tmp_path / str(step) / "state" / f"ocdbt.process_{process}" / "d"
            data.mkdir(parents=True)
            (data / "arrays").write_bytes(bytes(2000))
    rng = np.random.default_rng(0)
    assert not soak._damage("none", tmp_path, rng)
    assert soak._damage("torn", tmp_path, rng)
    sizes = [path.stat().st_size for path in tmp_path.glob("9/**/arrays")]
    assert sorted(sizes) == [1000, 2000] and soak._whole(tmp_path) == [3, 6]
    assert soak._damage("deleted", tmp_path, rng) and soak._whole(tmp_path) == [3]
    assert not soak._damage("deleted", tmp_path, rng) and soak._whole(tmp_path) == [3]


def steps_kept(folder):
    """Names of the compiled steps below what soak gives its jobs as JAX_COMPILATION_CACHE_DIR."""
    return {path.name for path in (folder / "programs").glob("jit_step_function-*-cache")}


def assert_same_but_for_rounding(start, one, other):
    """The steps after the one that both start from have the same losses, and every weight goes the same way.

    Losses have kinks (an absolute value, ReLUs) where one rounding turns the sign of a gradient at a pixel: seen was a
    step whose losses agreed in seven digits and whose gradients were 0.0002 of their norm apart. So weights are
    compared by how far they have gone: seen were 1.1 % of it, and 3 % is what a rate 3 % too large does. A bias before
    a normalisation has no gradient, and Adam follows its rounding.
    """
    for step, tolerance in ((4, 1e-5), (5, 1e-4)):
        first, second = (read_rows(run / "metrics.jsonl")[step - 1] for run in (one, other))
        assert first["step"] == second["step"] == step
        for term in ("loss", "l1", "lpips", "kl", "moments"):
            name = f"autoencoder/{term}"
            np.testing.assert_allclose(second[name], first[name], rtol=tolerance, err_msg=name)
    first, second = soak.final_state(one), soak.final_state(other)
    before = soak.newest_state(start)[1]
    moments = {name.partition("/mu/")[2]: value for name, value in first.items() if "/mu/" in name}
    learned = 0
    for weight, moment in moments.items():
        if np.abs(moment).max() < 1e-8:
            continue
        learned += 1
        for name in (f"params/{weight}", f"ema/{weight}"):
            gone = np.linalg.norm(first[name] - before[name])
            assert np.linalg.norm(second[name] - first[name]) < 0.03 * gone, name
    assert learned > 0.9 * sum(name.startswith("params/") for name in first)
