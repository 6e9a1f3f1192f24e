"""Two processes train as one and are killed again and again; the weights must be those of the run left alone.

    python -m tests.benchmarks soak --out=/tmp/soak [--kills=20] [--steps=150] [--seed=0]

Each life of the run ends by SIGKILL at a random moment: while it starts, between steps, once the files of a save
appear, or in an evaluation. It takes both processes and their launcher, or one process alone. Afterwards the newest
checkpoint is sometimes damaged or deleted. Then the same command is started again, until the run is at its end.
Compared are the whole State (weights, averages, optimizer), the record of every step and the pictures of all
evaluations, bit for bit. Programs are compiled once and kept, so that a start takes seconds. Everything is written
below --out, the output of each life too.
"""

import argparse
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import psutil
from ml_collections import ConfigDict

from dexportrait_jax import checkpoint, checkpoint_format, programs, sharding
from dexportrait_jax import config as configs
from dexportrait_jax.metrics import read_rows
from dexportrait_jax.tasks import Task, make_task
from launch.local_processes import RESUME_ME
from tests import fixtures

PROCESSES = 2
TORN = "torn_here"  # a file in a checkpoint that was damaged, for this benchmark to know it by
# How long each lasts, as a share of the time that a start takes on a machine like this one.
MOMENTS = {"start": 1.0, "steps": 0.25, "save": 0.03, "evaluation": 0.02}
VICTIMS = ("all", "process 0", "process 1")
DAMAGES = ("none", "torn", "deleted")
SETTINGS = (
    "data.batch_size=4",
    "data.targets=1",
    "data.image_size=32",
    # Wide enough that a part of the weights is shared out over the processes.
    "model.autoencoder.block_channels=(8,16,48)",
    "mesh.data=1",
    f"mesh.fsdp={PROCESSES}",
    "log_every=1",
    "checkpoint.every_steps=3",
    "evaluate.at_end=False",
)
EVALUATED = ("evaluate.every_steps=15", "evaluate.split=train")


class Kill(NamedTuple):
    """How a life ends. `moment` is one of MOMENTS, `victim` of VICTIMS, `damage` of DAMAGES.

    `part` in [0, 1) says how far into the moment; `sent` is the signal; `whole` checkpoints are there before it.
    """

    moment: str
    victim: str = "all"
    damage: str = "none"
    part: float = 0.5
    sent: signal.Signals = signal.SIGKILL
    whole: int = 0


@dataclasses.dataclass
class Life:
    """What was seen of one start until its end."""

    kill: Kill | None
    code: int = 0  # of the launcher
    seconds_to_end: float = 0.0  # from the signal until nothing of it was left
    in_save: bool = False  # a save was under way when the signal came
    in_evaluation: bool = False  # or an evaluation
    damaged: bool = False  # the newest checkpoint was, afterwards
    went_on_from: int = 0
    done_again: int = 0  # recorded steps of the lives before that no checkpoint held


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="tests.benchmarks soak")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args(arguments)
    if (given.out / "killed").exists():
        parser.error(f"{given.out} holds such a run already; give another --out")
    data = fixtures.make_dataset(given.out / "data", clips=5, frames=12, size=64)
    reference = given.out / "reference"
    left_alone(command(reference, data, given.steps, *EVALUATED), given.out)
    kills = draw(given.kills, np.random.default_rng(given.seed))
    job = command(given.out / "killed", data, given.steps, *EVALUATED)
    lives = killed(job, given.out, kills)
    differences = compare(reference, given.out / "killed")
    print(json.dumps(summary(lives) | {"steps": given.steps, "different": differences}), flush=True)
    if differences or len(lives) <= given.kills:
        raise SystemExit(1)


def command(workdir: Path, data: Path, steps: int, *more: str) -> list[str]:
    """The command line of the run; `more` are further settings."""
    settings = (*SETTINGS, f"data.path={data}", f"num_steps={steps}", *more)
    job = ("train", "--config=configs/autoencoder.py:tiny", f"--workdir={workdir}")
    launcher = ("-m", "launch.local_processes", f"--processes={PROCESSES}", "--")
    return [sys.executable, *launcher, *job, *(f"--config.{setting}" for setting in settings)]


def draw(number: int, rng: np.random.Generator) -> list[Kill]:
    """Kills at random moments; of five, two wait for a save and one for an evaluation."""
    return [
        Kill(
            str(rng.choice(list(MOMENTS), p=(0.15, 0.25, 0.4, 0.2))),
            str(rng.choice(VICTIMS, p=(0.5, 0.25, 0.25))),
            str(rng.choice(DAMAGES, p=(0.7, 0.15, 0.15))),
            float(rng.random()),
        )
        for _ in range(number)
    ]


def left_alone(job: Sequence[str], out: Path) -> None:
    """Runs a job to its end; its failure is ours."""
    log = out / "left_alone.log"
    process = _start(job, log, out)
    if process.wait():
        raise RuntimeError(f"the run failed with code {process.returncode}:\n{log.read_text()}")


def killed(job: Sequence[str], out: Path, kills: Sequence[Kill]) -> list[Life]:
    """Starts the job again after each of its ends until it comes to its own; one Life a start."""
    workdir = Path(next(word for word in job if word.startswith("--workdir=")).split("=", 1)[1])
    checkpoints = workdir / checkpoint_format.FOLDER
    lives: list[Life] = []
    start_seconds = 20.0  # until it is measured; other times are taken as shares of it
    whole = _whole(checkpoints)
    while True:
        kill = kills[len(lives)] if len(lives) < len(kills) else None
        life = Life(kill)
        log = out / f"life_{len(lives):02}.log"
        began, started = time.time(), time.monotonic()
        process = _start(job, log, out)
        if kill:
            _wait_for(kill, process, workdir, log, began)
            if kill.moment != "start":
                start_seconds = time.monotonic() - started
            _wait(process, kill.part * MOMENTS[kill.moment] * start_seconds)
            life.in_save = bool(_unfinished(checkpoints, began))
            life.in_evaluation = _evaluates(workdir, log)
            by_itself, sent = process.poll(), time.monotonic()
            _send(kill, process)
        life.code = process.wait()
        if kill:
            life.seconds_to_end = time.monotonic() - sent
            _bury(process)
        said = log.read_text()
        life.went_on_from = _said(r"going on from step (\d+)", said)
        life.done_again = _said(r"; (\d+) recorded steps are done again", said)
        if "ready to train" in said and life.went_on_from not in (whole[-1:] or [0]):
            raise RuntimeError(f"{log} goes on from {life.went_on_from}, the newest whole: {whole}")
        lives.append(life)
        if life.code == 0 and f"trained to step {_steps(job)}" in said:
            _tell(life)
            return lives
        if not kill or by_itself:
            raise RuntimeError(f"life {len(lives)} ended by itself:\n{said[-3000:]}")
        if kill.sent == signal.SIGTERM and life.code != RESUME_ME:
            raise RuntimeError(f"asked to end, life {len(lives)} ended with code {life.code}")
        life.damaged = _damage(kill.damage, checkpoints, np.random.default_rng(len(lives)))
        _tell(life)
        whole = _whole(checkpoints)


def compare(one: Path, other: Path) -> list[str]:
    """Names of what is not bit-equal in two finished runs: leaves of the State, the steps' records, the pictures."""
    states = [final_state(workdir) for workdir in (one, other)]
    names = states[0].keys() | states[1].keys()
    different = [
        name
        for name in sorted(names)
        if not np.array_equal(*(state.get(name, np.nan) for state in states))
    ]
    records = [
        [
            {key: value for key, value in row.items() if not key.startswith(("time/", "memory/"))}
            for row in read_rows(workdir / "metrics.jsonl")
        ]
        for workdir in (one, other)
    ]
    made = [
        {path.name: path.read_bytes() for path in workdir.glob("samples/*")}
        for workdir in (one, other)
    ]
    return (
        different
        + (["metrics.jsonl"] if records[0] != records[1] else [])
        + (["samples"] if made[0] != made[1] else [])
    )


def summary(lives: Sequence[Life]) -> dict[str, object]:
    """What happened, in numbers."""
    ended = [life for life in lives if life.kill]
    return {
        "kills": len(ended),
        "during a save": sum(life.in_save for life in ended),
        "during an evaluation": sum(life.in_evaluation for life in ended),
        "before the first step": sum(life.kill.moment == "start" for life in ended),
        "of one process alone": sum(life.kill.victim != "all" for life in ended),
        "newest checkpoint damaged or deleted": sum(life.damaged for life in ended),
        "steps done again": sum(life.done_again for life in lives),
        "longest end, seconds": round(max(life.seconds_to_end for life in lives), 1),
    }


def _start(job: Sequence[str], log: Path, out: Path) -> subprocess.Popen:
    """The launcher as leader of a session of its own, so that what is killed is ours."""
    kept = {
        "JAX_COMPILATION_CACHE_DIR": str(out / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with log.open("w") as stream:
        return subprocess.Popen(
            job,
            env=os.environ | kept,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait_for(kill, process, workdir, log, began) -> None:
    """Returns when the moment has come, or the job has ended."""
    checkpoints = workdir / checkpoint_format.FOLDER
    while process.poll() is None:
        if len(_whole(checkpoints)) >= kill.whole and (
            kill.moment == "start"
            or (kill.moment == "steps" and "ready to train" in log.read_text())
            or (kill.moment == "save" and _unfinished(checkpoints, began))
            or (kill.moment == "evaluation" and _evaluates(workdir, log))
        ):
            return
        time.sleep(0.02)


def _wait(process: subprocess.Popen, seconds: float) -> None:
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)


def _send(kill: Kill, process: subprocess.Popen) -> None:
    if process.poll() is not None:
        return
    if kill.sent != signal.SIGKILL:
        process.send_signal(kill.sent)  # the launcher passes it on
    elif kill.victim == "all":
        os.killpg(process.pid, kill.sent)
    else:
        children = sorted(psutil.Process(process.pid).children(), key=lambda child: child.pid)
        for child in children[int(kill.victim[-1]) :][:1]:
            child.send_signal(kill.sent)


def _bury(process: subprocess.Popen) -> None:
    """Waits until nothing of the session is left; what the kernel has not ended yet still holds locks."""
    while any(
        other.status() != psutil.STATUS_ZOMBIE
        for other in _session(process.pid)
        if other.is_running()
    ):
        time.sleep(0.05)


def _session(leader: int) -> list[psutil.Process]:
    found = []
    for pid in psutil.pids():
        try:
            if os.getsid(pid) == leader:
                found.append(psutil.Process(pid))
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def _unfinished(checkpoints: Path, began: float) -> list[Path]:
    """Files of saves that this life has begun and not ended."""
    found = []
    for path in checkpoints.glob("*-tmp*"):
        try:
            if path.stat().st_ctime > began:
                found.append(path)
        except FileNotFoundError:  # it has just been renamed
            continue
    return found


def _evaluates(workdir: Path, log: Path) -> bool:
    """The last recorded step has an evaluation whose picture is not there yet."""
    said = log.read_text()
    # Before, the record may hold steps of the life before which no checkpoint holds.
    if "ready to train" not in said and "going on from step" not in said:
        return False
    every = json.loads((workdir / "config.json").read_text())["evaluate"]["every_steps"]
    record = workdir / "metrics.jsonl"
    rows = read_rows(record) if every and record.exists() else []
    if not rows:
        return False
    step = rows[-1]["step"]
    return step % every == 0 and not (workdir / "samples" / f"step_{step:07d}.png").exists()


def _whole(checkpoints: Path) -> list[int]:
    """Steps of the checkpoints that were not damaged, oldest first."""
    found = [path for path in checkpoints.glob("*") if path.name.isdigit()]
    return sorted(int(path.name) for path in found if not (path / TORN).exists())


def _damage(kind: str, checkpoints: Path, rng: np.random.Generator) -> bool:
    """Damages or deletes the newest whole checkpoint, where it is not the only one; says whether it did."""
    whole = _whole(checkpoints)
    if kind == "none" or len(whole) < 2:
        return False
    newest = checkpoints / str(whole[-1])
    if kind == "deleted":
        shutil.rmtree(newest)
        return True
    # What one process wrote: it may be that it alone reads it.
    for part in (newest / "state" / f"ocdbt.process_{rng.integers(PROCESSES)}").glob("d/*"):
        part.write_bytes(part.read_bytes()[:1000])
    (newest / TORN).touch()
    return True


def _said(pattern: str, log: str) -> int:
    found = re.search(pattern, log)
    return int(found[1]) if found else 0


def _steps(job: Sequence[str]) -> str:
    return next(word for word in job if word.startswith("--config.num_steps=")).split("=")[1]


def _tell(life: Life) -> None:
    kill = life.kill._asdict() if life.kill else {}
    row = kill | {key: value for key, value in vars(life).items() if key != "kill"}
    print(json.dumps(row), file=sys.stderr, flush=True)


def final_state(workdir: Path) -> dict[str, np.ndarray]:
    """The State that a finished run ended with, by the names of its leaves."""
    step, state = newest_state(workdir)
    if (last := json.loads((workdir / "config.json").read_text())["num_steps"]) != step:
        raise RuntimeError(f"{workdir} ended at step {step} of {last}")
    return state


def newest_state(workdir: Path) -> tuple[int, dict[str, np.ndarray]]:
    """Step and State of the newest checkpoint, on one device of this process."""
    _, _, abstract, _ = _on_one_device(workdir)
    checkpoints = checkpoint.Checkpoints(workdir)
    step, state = checkpoints.restore(abstract)
    checkpoints.close()
    return step, _by_name(state)


def state_before_the_first_step(workdir: Path) -> dict[str, np.ndarray]:
    """What a run started from, by the names of its leaves."""
    config, task, _, shardings = _on_one_device(workdir)
    return _by_name(programs.first_state(task, config, shardings))


def _on_one_device(workdir: Path) -> tuple[ConfigDict, Task, dict[str, Any], dict[str, Any]]:
    config = configs.from_json(json.loads((workdir / "config.json").read_text()))
    mesh = sharding.make_mesh(ConfigDict(dict.fromkeys(sharding.AXES, 1)), jax.devices()[:1])
    task = make_task(config)
    abstract, shardings, _ = programs.build(task, config, mesh)
    return config, task, abstract, shardings


def _by_name(state: dict[str, Any]) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(jax.device_get(state))[0]
    return {sharding.path_name(path): np.asarray(leaf) for path, leaf in leaves}
