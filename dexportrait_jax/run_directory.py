"""The directory of a run: held by one process, and by one run, with a description of what runs in it.

`config.json` says what the run is. It is written when training begins and not before, so that a start that fails
(a wrong path, say) leaves nothing that would refuse the corrected command.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

import dexportrait_jax
from data_pipelines.files import write_json
from dexportrait_jax import checkpoint, code_version, distributed, metrics
from dexportrait_jax import config as configs
from dexportrait_jax.errors import UserError

CONFIG_FILE = "config.json"
DATA_FILE = "data.json"
# Changing these goes on with the same run: how long and where it runs, what it computes twice to save memory, how fast
# it learns (what helps after steps that are not finite), where the same data and weights lie now, and where it once
# started from (a running one does not read it again).
FREE_KEYS = (
    "num_steps",
    "log_every",
    "report.",
    "checkpoint.",
    "evaluate.",
    "data.workers",
    "data.path",
    "loss.perceptual_weights",
    "mesh.",
    "remat",
    "optim.",
    "init.",
)


@contextlib.contextmanager
def claimed(workdir: Path) -> Iterator[None]:
    """Holds the directory for this process alone; leaves no trace of a start that failed."""
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock_file = workdir / f".lock{jax.process_index() or ''}"
        lock = lock_file.open("w")
    except OSError as error:
        raise UserError(f"cannot write to --workdir={workdir}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another process is training in {workdir}; wait for it or end it"
            ) from error
        try:
            yield
        except BaseException:
            if not (workdir / CONFIG_FILE).exists():
                lock_file.unlink(missing_ok=True)
                for folder in (workdir / checkpoint.FOLDER, *made):
                    with contextlib.suppress(OSError):  # not empty, or not there
                        folder.rmdir()
            raise


def check_same_run(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """UserError if the directory holds steps of a run that this config does not go on with."""
    path, records = workdir / CONFIG_FILE, workdir / metrics.FILE
    recorded = records.exists() and records.stat().st_size > 0
    if not path.exists() or not (recorded or checkpoint.newest_step(workdir) is not None):
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
        for difference in configs.differences(before, values)
        if not difference[0].startswith(FREE_KEYS) or _changes_optimizer_state(*difference)
    ]
    if changed:
        key, old, new = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(
            f"{workdir} was started with config.{key}={old!r}, now it is {new!r}{more}; "
            "give another --workdir, or the config it was started with"
        )


def write_description(
    workdir: Path, config: ml_collections.ConfigDict, data: dict[str, str]
) -> None:
    """Writes config.json, environment.json and data.json, in the main process.

    `data` is the fingerprint of what is trained on; a run that goes on with other data says so.
    """
    if not distributed.is_main():
        return
    write_json(workdir / CONFIG_FILE, configs.to_json(config))
    _tell_other_data(workdir / DATA_FILE, data)
    write_json(workdir / DATA_FILE, data)
    write_json(
        workdir / "environment.json",
        {
            "dexportrait_jax": dexportrait_jax.__version__,
            "commit": code_version.commit(),
            "code_sha256": code_version.code_sha256(),
            "jax": jax.__version__,
            "numpy": np.__version__,
            "devices": len(jax.devices()),
            "platform": jax.default_backend(),
            "processes": jax.process_count(),
            "pid": os.getpid(),
        },
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
