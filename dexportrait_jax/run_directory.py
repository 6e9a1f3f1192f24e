"""The directory of a run: held by one process, and by one run, with a description of what runs in it.

`config.json` says what the run is. It is written when training begins and not before, so that a start that fails
(a wrong path, say) leaves nothing that would refuse the corrected command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import io
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections

from data_pipelines.file_locks import try_lock
from data_pipelines.files import write_json, writing_to
from dexportrait_jax import checkpoint_format, distributed, environment, metrics
from dexportrait_jax import config as configs
from dexportrait_jax.checkpoint import SHOWN_WITHIN
from dexportrait_jax.diffusion.schedule import noise_schedule
from dexportrait_jax.errors import UserError

CONFIG_FILE = "config.json"
DATA_FILE = "data.json"
# Changing these goes on with the same run: how long and where it runs, how fast it learns (what helps after steps that
# are not finite), where the same data and weights lie now, and where it once started from (a running one does not read
# it again). What the backward pass keeps changes numbers by rounding alone. A batch in other parts is the same samples
# into the same State, but each part draws its own noise, and what compares samples (some losses, the discriminator's
# deviation) sees those of its part. How an export is sampled is no part of what is learned.
FREE_KEYS = (
    "num_steps",
    "log_every",
    "report.",
    "checkpoint.",
    "evaluate.",
    "data.workers",
    "data.cache_megabytes",
    "data.path",
    "loss.perceptual_weights",
    "mesh.",
    "remat",
    "accumulate",
    "optim.",
    "init.",
    "sampling.",
)
DISCRIMINATOR_DECAY = "optim.discriminator.decay_ends_with_run"
# Keys that came later than the first runs: what a run did before there was the key. Without an entry here, those who
# update the code cannot go on with the runs they have.
BEFORE_THE_KEY = {
    "component_weight": 0.0,
    "data.cross_view": 0.0,
    "loss.equivariance": 0.0,
    "loss.perceptual_form": "lpips",
    "loss.person_leak": 0.0,
    "loss.pose_leak": 0.0,
    "model.denoiser.drop_attn2": "image",
    "model.denoiser.expression_linear": True,
    "model.denoiser.expression_place": "before_feed_forward",
    "model.denoiser.expression_positions": "sinusoidal",
    "model.denoiser.raymap_points": "centres",
    "model.denoiser.volume_order": "channel_depth",
    "model.expression.dropout": 0.0,
    "model.expression.pooling": "average",
    "model.generator.flatten_stride": "last",
    "model.generator.rgb_channels": None,
    "model.image_encoder.feed_forward": None,
    "model.pose.scale_limit": 2.0,
    "model.reference.raymap_points": "centres",
    "model.temporal.norm": "clip",
    DISCRIMINATOR_DECAY: False,
}

# So long may a lock outlive its process: a lost host's on NFS ends with its lease (about 90 s), and the kernel takes
# its time with a killed process that has much memory. Launchers take a refusal as final.
LOCK_SECONDS = 120.0


@contextlib.contextmanager
def claimed(workdir: Path) -> Iterator[None]:
    """Holds the directory for this process alone; leaves no trace of a start that failed.

    A process that holds it is waited for, up to `LOCK_SECONDS`: it may be dying.

    Raises:
      UserError: another process holds it, or it cannot be written. Where files cannot be locked that is a warning.
    """
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    lock_file = workdir / f".lock{jax.process_index() or ''}"
    deadline, told = time.monotonic() + LOCK_SECONDS, False
    while (lock := _locked(workdir, lock_file)) is None:
        holder = _holder(lock_file)
        if time.monotonic() >= deadline:
            raise UserError(
                f"another process is training in {workdir}{holder}; wait for it or end it"
            )
        if not told:
            told = True
            print(
                f"another process holds {workdir}{holder}; waiting up to {LOCK_SECONDS:.0f} s for its end",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(0.5)
    with lock:
        with contextlib.suppress(OSError):  # on a full disk it is held all the same
            lock.truncate(0)
            started = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
            lock.write(
                f"process {os.getpid()} on {socket.gethostname()} since {started}\n".encode()
            )
            os.fsync(lock.fileno())  # for other hosts to read, and what goes wrong goes wrong here
        try:
            yield
        except BaseException:
            if not (workdir / CONFIG_FILE).exists():
                lock_file.unlink(missing_ok=True)
                for folder in (workdir / checkpoint_format.FOLDER, *made):
                    with contextlib.suppress(OSError):  # not empty, or not there
                        folder.rmdir()
            raise


def _locked(workdir: Path, lock_file: Path) -> io.FileIO | None:
    """The lock file, open and locked by this process; None: another one holds it."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # Of whoever holds it, what it says must stay. Unbuffered: closing must not write again what did not fit.
        lock = lock_file.open("ab", buffering=0)
    except OSError as error:
        raise UserError(f"cannot write to --workdir={workdir}: {error.strerror}") from error
    try:
        unlocked = try_lock(lock, lock_file)
    except BlockingIOError:
        lock.close()
        return None
    except OSError as error:
        lock.close()
        raise UserError(
            f"cannot lock {lock_file}: {error.strerror}; look after that disk, or give another --workdir"
        ) from error
    if unlocked and distributed.is_main():
        print(
            f"warning: {workdir} lies where files cannot be locked ({unlocked}); nothing keeps a second process from "
            "training there",
            file=sys.stderr,
        )
    return lock


def _holder(lock_file: Path) -> str:
    """Who wrote the lock file, in brackets; nothing where it does not say."""
    try:
        said = lock_file.read_text(errors="replace").strip()
    except OSError:
        return ""
    return f" ({said.splitlines()[0][:200]})" if said else ""


def check_shared(workdir: Path, seconds: float = SHOWN_WITHIN) -> None:
    """UserError where a process does not see in the directory what the main one writes there; all must ask.

    Args:
      workdir: the run's directory, which is there.
      seconds: that a shared file system may take to show it.
    """
    if jax.process_count() == 1:
        return
    # A name that nobody has asked for, and that is told once it is there: what was not there is remembered, too.
    number = secrets.randbelow(2**31)
    if distributed.is_main():
        with writing_to(workdir):
            (workdir / f".shared{number}").touch()
    (number,) = distributed.from_main([number])
    token = workdir / f".shared{number}"
    deadline = time.monotonic() + seconds
    while not (seen := token.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    shared = distributed.everywhere(seen)
    if distributed.is_main():
        token.unlink(missing_ok=True)
    if not shared:
        raise UserError(
            f"--workdir={workdir} is another directory on another host; give a path on a file system that all hosts "
            "share"
        )


def check_same_run(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """UserError if the directory holds steps of a run that this config does not go on with.

    Where nothing says what made them, that is a warning.
    """
    path = workdir / CONFIG_FILE
    if not _recorded(workdir) and checkpoint_format.newest_step(workdir) is None:
        return
    if not path.exists():
        if distributed.is_main():
            print(
                f"warning: {workdir} holds steps of a run, but no {CONFIG_FILE} that says how they were made; they are "
                "taken for steps of this config",
                file=sys.stderr,
            )
        return
    try:
        before = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); give another --workdir") from error
    values = configs.to_json(config)
    if before.get("stage") != values["stage"]:
        raise UserError(
            f"{workdir} holds a run of stage {before.get('stage')!r}, this config is of stage "
            f"{values['stage']!r}; give another --workdir"
        )
    changed = [
        difference
        for difference in configs.differences(compared(before), compared(values))
        if not _goes_on(*difference)
    ]
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(f"{workdir} was started {_what_changed(path, *changed[0], more)}")


def compared(values: dict[str, Any]) -> dict[str, Any]:
    """The config as runs are compared by: of a noise schedule what it is, not whether a preset's name says so.

    Runs from before there were presets gave every key of it. Where a discriminator's decay ends means nothing to one
    that has none, or that starts with the generator: then it is as in runs from before there was the key.
    """
    if "diffusion" in values:
        values = values | {"diffusion": dataclasses.asdict(noise_schedule(values["diffusion"]))}
    optimizers, start = values.get("optim", {}), values.get("loss", {}).get("adversarial_start", 0)
    discriminator = optimizers.get("discriminator", {})
    *_, key = DISCRIMINATOR_DECAY.split(".")
    if key in discriminator and (discriminator["decay"] == "constant" or not start):
        discriminator = discriminator | {key: BEFORE_THE_KEY[DISCRIMINATOR_DECAY]}
        values = values | {"optim": optimizers | {"discriminator": discriminator}}
    return values


def check_nothing_lost(workdir: Path) -> None:
    """UserError if steps are recorded and the checkpoints that held them are gone.

    A run that ended before its first checkpoint has their folder, and nothing in it: it begins again. All processes
    must ask, before any of them makes the folder.
    """
    folder, saved = workdir / checkpoint_format.FOLDER, workdir / checkpoint_format.LAST_SAVED
    lost = (
        _recorded(workdir)
        and checkpoint_format.newest_step(workdir) is None
        and (saved.exists() or not folder.is_dir())
    )
    if not distributed.everywhere(not lost):
        raise UserError(
            f"{workdir / metrics.FILE} records steps, but there is no checkpoint in {folder} any more; put back what "
            f"was there, give another --workdir, or remove {metrics.FILE} to train from the start"
        )


def write_description(
    workdir: Path,
    config: ml_collections.ConfigDict,
    data: dict[str, str],
    step: int = 0,
    began: float | None = None,
) -> float:
    """Writes config.json, environment.json and data.json, in the main process.

    Args:
      workdir: the run's directory.
      config: what it is from now on.
      data: the fingerprint of what is trained on; a run that goes on with other data says so.
      step: steps done before.
      began: when this process began, as time.time() has it; None: now.

    Returns:
      Seconds from the run's first start to this one.
    """
    if not distributed.is_main():
        return 0.0
    write_json(workdir / CONFIG_FILE, configs.to_json(config))
    _tell_other_data(workdir / DATA_FILE, data)
    write_json(workdir / DATA_FILE, data)
    anew = not step and not _recorded(workdir)
    if anew:
        # Of a run that was removed. It would have the steps of this one taken for lost, until its own first save.
        (workdir / checkpoint_format.LAST_SAVED).unlink(missing_ok=True)
    return environment.note_start(workdir, step, time.time() if began is None else began, anew)


def _recorded(workdir: Path) -> bool:
    """Whether a step was ever recorded."""
    records = workdir / metrics.FILE
    return records.exists() and records.stat().st_size > 0


def _goes_on(key: str, old: Any, new: Any) -> bool:
    """Whether a run whose config had `old` may go on with `new`."""
    if (
        key == "data.latents"
    ):  # they move with the dataset, whose latents they are is checked; others are other inputs
        return bool(old) and old is not configs.ABSENT and bool(new)
    if old is configs.ABSENT and key in BEFORE_THE_KEY:
        return BEFORE_THE_KEY[key] == new
    if key.startswith(FREE_KEYS):
        return old is configs.ABSENT or not _changes_optimizer_state(key, old, new)
    return False


def _what_changed(file: Path, key: str, old: Any, new: Any, more: str) -> str:
    """How the run of config `file` differs, and what to do about it."""
    if old is configs.ABSENT and key in BEFORE_THE_KEY:
        before = BEFORE_THE_KEY[key]
        return (
            f"before there was config.{key}, which is as {before!r}, now it is {new!r}{more}; give another --workdir, "
            f"or --config.{key}={before}"
        )
    if old is configs.ABSENT:
        return (
            f"before there was config.{key}, now {new!r}{more}; give another --workdir, or write into {file} what it "
            "did then"
        )
    if new is configs.ABSENT:
        return (
            f"with config.{key}={old!r}, which this version does not have{more}; give another --workdir, or go on "
            f"with the version that {environment.FILE} names"
        )
    return (
        f"with config.{key}={old!r}, now it is {new!r}{more}; give another --workdir, or the config it was started "
        "with"
    )


def _tell_other_data(file: Path, data: dict[str, str]) -> None:
    try:
        before = json.loads(file.read_text())
    except (OSError, ValueError):  # a run that has just begun, or of an older version
        return
    if before != data:
        changed = sorted(name for name in {*before, *data} if before.get(name) != data.get(name))
        print(
            f"warning: the data are not those that this run began with ({len(changed)} shards differ, {changed[0]} "
            "first); its batches will not be those of the uninterrupted run",
            file=sys.stderr,
        )


def _changes_optimizer_state(key: str, old: Any, new: Any) -> bool:
    """Whether a saved optimizer state would not fit: the chain has other links (optim.make_optimizer)."""
    if not key.startswith("optim."):
        return False
    switched = key.endswith((".clip_norm", ".multipliers")) and bool(old) != bool(new)
    return switched or key.endswith(".name")
