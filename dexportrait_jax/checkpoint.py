"""Checkpoints of the whole State: saved while training goes on, restored onto any mesh.

`WORKDIR/checkpoints/STEP` is written by Orbax under a temporary name and renamed when it is whole. A newest
checkpoint that cannot be read, when it is tried again neither, is set aside (never deleted) and the one before it is
taken, with a word about it; when none can be read that is an error, because starting from scratch in silence would
bury a run. Arrays carry checksums: a damaged one cannot be read either. Each checkpoint says which version wrote it:
one that is whole but holds another State than this code is an error that names the version.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

import dexportrait_jax
from data_pipelines.files import write_bytes, writing_to
from dexportrait_jax import code_version, distributed, sharding
from dexportrait_jax.errors import UserError

FOLDER = "checkpoints"
# Behind the step, in the name of a checkpoint that Orbax has not finished.
UNFINISHED = ".orbax-checkpoint-tmp"
# Beside the folder: the last step whose checkpoint is known to be whole, so that one knows when the folder is lost.
LAST_SAVED = "last_saved.txt"
# Of the State: to be raised when its arrays come to mean something else. Checkpoints without a number are of schema 1.
SCHEMA = 1
# Seconds before a checkpoint that could not be read is tried again, and then once more. A bucket that is too busy, or a
# file handle that is stale on one of hundreds of hosts, must not cost all of them what the newest checkpoint holds.
READ_AGAIN_AFTER = (5.0, 30.0)
# Seconds that a shared file system may take to show all hosts what one has made: NFS keeps what it knows of a folder
# for up to 60.
SHOWN_WITHIN = 90.0
# In errors about bytes that were read and are not what was written. Those stay so, however long one waits.
_DAMAGE = ("DATA_LOSS", "OUT_OF_RANGE")


def orbax_lines_off() -> None:
    """Orbax logs every save through absl at INFO and WARNING; a run prints its own lines.

    Of a damaged checkpoint one error is raised, and a traceback for every other array is left to asyncio's log. Of a
    save that fails, too, one is raised, and every thread that had a part in it leaves its traceback at ERROR.
    """
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def arrays_with_checksums() -> None:
    """From now on Orbax writes a CRC-32C with every chunk of an array: a flipped bit is an error for who reads it.

    Without it, numbers that were damaged in place are read as if they were right: of Orbax's files only the indices
    have checksums, and Orbax (0.12.8) has no option for more. TensorStore has, as a codec that stands in an array's own
    description: any reader checks it, and arrays without it are read as before.
    """
    # Another Orbax may call it otherwise: its checkpoints are as sound as Orbax makes them, and a test says so.
    try:
        from orbax.checkpoint._src.serialization import tensorstore_utils as writes

        make = writes._build_zarr3_metadata
    except (ImportError, AttributeError):
        return
    if hasattr(make, "__wrapped__"):
        return

    @functools.wraps(make)
    def with_checksums(*arguments, **named):
        metadata = make(*arguments, **named)
        for codec in metadata["codecs"]:
            if codec["name"] == "sharding_indexed":
                # Last: of the bytes as they are stored.
                codec["configuration"]["codecs"].append({"name": "crc32c"})
        return metadata

    writes._build_zarr3_metadata = with_checksums


class Checkpoints:
    """The checkpoints of one run.

    Args:
      workdir: the run's directory.
      keep: how many of the newest to keep.
      timeout_seconds: that a save may take from its start until all processes have written their parts. Where one of
        them failed, the others wait for it so long, and a next save with them.
    """

    def __init__(self, workdir: Path, keep: int = 2, timeout_seconds: int = 600):
        orbax_lines_off()
        arrays_with_checksums()
        self.directory = Path(workdir).absolute() / FOLDER
        self.directory.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(self.directory)
        self._saving: int | None = None
        self._saved: int | None = None
        self._not_begun: Exception | None = None
        self._timeout_seconds = timeout_seconds
        self._checkpointer = ocp.training.Checkpointer(
            self.directory,
            context=ocp.Context(
                async_options=ocp.options.AsyncOptions(timeout_secs=timeout_seconds)
            ),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
        )

    def steps(self) -> list[int]:
        """Steps with a committed checkpoint, oldest first."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, step: int, state: Any) -> None:
        """Starts saving.

        Where the save before it failed (a disk that was full, a bucket that did not answer), that is a warning, and
        this one is waited for: what goes wrong twice in a row is raised, at once. All processes must ask.
        """
        before, failure = self._saving, ""
        try:
            self.wait()
        except Exception as error:  # Orbax raises many kinds; each of them may have passed by now.
            failure = _first_line(error)
            print(
                f"warning: checkpoint {before} was not saved ({failure}); trying again at step {step}",
                file=sys.stderr,
            )
        failed = not distributed.everywhere(not failure)
        if failed:
            # All have come here, and none writes there any more. It would take the room that this save needs.
            if distributed.is_main():
                shutil.rmtree(self.directory / f"{before}{UNFINISHED}", ignore_errors=True)
            # Orbax counts what it was to delete after that save as deleted, and would leave it there for ever.
            with writing_to(self.directory):
                self._checkpointer.reload()
        saved = distributed.from_main(self.steps())
        if step in saved:
            return
        self._saving = step
        try:
            self._begin(step, state)
        except (
            Exception
        ) as error:  # a save that cannot be begun has failed like one that cannot be ended
            self._not_begun = error
        if failed:
            self._wait_together()

    def _begin(self, step: int, state: Any) -> None:
        writer = {
            "schema": SCHEMA,
            "dexportrait_jax": dexportrait_jax.__version__,
            "code_sha256": code_version.code_sha256(),
        }
        saving = self._checkpointer.save_async(step, state, force=True, custom_metadata=writer)
        # In a thread of Orbax's, once it is committed: the next save, which asks for this one, may be far away.
        saving.on_complete(lambda _: self._note(step))

    def _note(self, step: int) -> None:
        """Says beside the folder that a step is saved; the checkpoint is there, whether that can be said or not."""
        if distributed.is_main():
            with contextlib.suppress(OSError):
                write_bytes(self.directory.parent / LAST_SAVED, f"{step}\n".encode())

    def finish(self, step: int, state: Any, older_will_do: bool = False) -> int:
        """Saves, waits and frees Orbax's threads. All processes must ask.

        What fails is tried once more, because no next save comes.

        Args:
          older_will_do: where that fails, too, and there is an older checkpoint, it is a warning.

        Returns:
          The step that the newest checkpoint is of.
        """
        try:
            self.save(step, state)
            self.save(step, state)  # which waits for the first, and does its work if that failed
        except Exception as error:  # in all processes, or in none
            older = distributed.from_main([] if self._saved is None else [self._saved])
            if not (older_will_do and older):
                raise
            print(f"warning: step {step} could not be saved: {_first_line(error)}", file=sys.stderr)
            return older[0]
        self._checkpointer.close()
        return step

    def _wait_together(self) -> None:
        """`wait`, which raises in all processes where it does in one."""
        step, failure = self._saving, None
        try:
            self.wait()
        except Exception as error:
            failure = error
        if not distributed.everywhere(failure is None):
            raise failure or UserError(
                f"checkpoint {step} was not saved: another process could not write its part, and says why"
            )

    def wait(self) -> None:
        """Blocks until the running save is on disk; raises if it failed.

        Raises:
          UserError: for what the user or the machine can put right.
        """
        if self._saving is None:
            return
        step, self._saving = self._saving, None
        not_begun, self._not_begun = self._not_begun, None
        # In this thread: what Orbax raises it raises once a thread, and the next save asks in this one.
        with writing_to(self.directory):
            try:
                if not_begun:
                    raise not_begun
                self._checkpointer.wait()
            except TimeoutError as error:
                why = "the disk is slow"
                if jax.process_count() > 1:
                    why = f"another process could not write its part, and says why, or {why}"
                raise UserError(
                    f"not all of {self.directory / str(step)} was written in {self._timeout_seconds} s: {why}; look "
                    "after that disk, or raise --config.checkpoint.timeout_seconds"
                ) from error
        self._note(step)
        self._saved = step

    def restore(self, abstract_state: Any) -> tuple[int, Any] | None:
        """The newest readable state as (step, state), or None in a run that has not saved yet.

        All processes must ask. They go through the steps that the main one sees, because on a shared file system each
        may see other ones for a while: a step that is missing somewhere cannot be read there.

        Args:
          abstract_state: a tree of `jax.ShapeDtypeStruct` with the shardings to restore onto.

        Raises:
          UserError: there are checkpoints and none can be read, or another version wrote what this one cannot read.
        """
        failures = []
        for step in reversed(distributed.from_main(self.steps())):
            state, failure = self._read(step, abstract_state)
            if not failure:
                self._saved = step
                return step, state
            failures.append(failure)
            print(f"checkpoint {step} cannot be read: {failure}", file=sys.stderr)
        if failures:
            raise UserError(
                f"none of the checkpoints in {self.directory} can be read (newest: {failures[0]}); "
                "restore them from a copy, or train in a new --workdir"
            )
        return None

    def _read(self, step: int, abstract_state: Any) -> tuple[Any, str]:
        """The state of a step and "", or None and why it cannot be read: in all processes the one, or the other.

        All must ask. They try together, up to three times; what is damaged twice in a row is not tried again.
        """
        damaged_before = False
        self._wait_until_shown(step)
        for pause in (*READ_AGAIN_AFTER, None):
            state, failure, damaged = None, "", False
            try:
                state = self._load(step, abstract_state)
            except UserError:
                raise
            except Exception as error:  # Orbax raises many kinds; none is passed over in silence.
                failure, damaged = _first_line(error), _is_damage(error)
            # Each process reads its own part, and one may fail alone: all take this step, or none.
            if distributed.everywhere(not failure):
                return state, ""
            del state
            if not distributed.everywhere(not (damaged and damaged_before)) or pause is None:
                break
            damaged_before = damaged
            if failure:
                print(
                    f"checkpoint {step} could not be read ({failure}); trying again in {pause:.0f} s",
                    file=sys.stderr,
                )
            time.sleep(pause)
        return None, failure or "another process cannot read its part"

    def _wait_until_shown(self, step: int) -> None:
        """Waits until this process sees the step, too, which the main one sees; it may have looked too early."""
        deadline = time.monotonic() + SHOWN_WITHIN
        while step not in self.steps():
            with contextlib.suppress(OSError):
                self._checkpointer.reload()
            if step in self.steps() or time.monotonic() >= deadline:
                return
            time.sleep(1.0)

    def _load(self, step: int, abstract_state: Any) -> Any:
        place = self.directory / str(step)
        if step not in self.steps():
            self._checkpointer.reload()
        metadata = self._checkpointer.metadata(step)
        _check_schema(place, metadata.custom_metadata)
        # Where Orbax cannot read the tree it gives None; loading will say why.
        differences = metadata.metadata and _differences(metadata.metadata, abstract_state)
        if differences:
            more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
            raise UserError(
                f"{place} was written by {_writer(metadata.custom_metadata)} and holds another State than this "
                f"version's: {differences[0]}{more}; go on with that version, or train in a new --workdir"
            )
        # By itself Orbax lets the processes wait for each other after a load, for ever if one of them failed.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(), active_processes={jax.process_index()}
        )
        with ocp.Context(multiprocessing_options=alone):
            return ocp.load(place, abstract_state, checkpointable_name="state")

    def set_aside_after(self, step: int) -> None:
        """Renames checkpoints newer than the one that was restored, so that they can be written anew.

        Several processes share the directory: the main one renames, the others wait for it.
        """
        if distributed.is_main():
            for newer in [saved for saved in self.steps() if saved > step]:
                target = _unused(self.directory.parent / f"unreadable_checkpoint_{newer}")
                (self.directory / str(newer)).rename(target)
                print(f"checkpoint {newer} was set aside as {target}", file=sys.stderr)
        distributed.wait_for_all("set aside")
        self._checkpointer.reload()

    def close(self) -> None:
        """Waits for the running save and frees Orbax's threads."""
        self.wait()
        self._checkpointer.close()


def newest_step(workdir: Path) -> int | None:
    """The newest committed step of a run, without opening it."""
    folder = Path(workdir) / FOLDER
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    return max(steps, default=None)


def load_groups(
    workdir: Path, groups: Sequence[str] | None = None, average: bool = True
) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """Config (JSON values), step and parameter groups of a run.

    Arrays come as numpy arrays in the host's memory; neither mesh nor task is needed, and no device is touched. Nothing
    else of the checkpoint is read.

    Args:
      workdir: the run's directory.
      groups: names of the groups; None: all.
      average: take the moving average (EMA) of groups that have one, rather than their weights.

    Raises:
      UserError: there is no such run or group, or no checkpoint can be read.
    """
    orbax_lines_off()
    workdir = Path(workdir)
    config_file = workdir / "config.json"
    if not config_file.is_file():
        raise UserError(f"{workdir} is not a training run: it has no config.json")
    if newest_step(workdir) is None:
        raise UserError(f"{workdir} has no checkpoint yet; train it first")
    with ocp.training.Checkpointer((workdir / FOLDER).absolute()) as checkpointer:
        for checkpoint in sorted(checkpointer.checkpoints, key=lambda item: -item.step):
            place = (workdir / FOLDER / str(checkpoint.step)).absolute()
            try:
                saved = checkpointer.metadata(checkpoint.step)
                _check_schema(place, saved.custom_metadata)
                if saved.metadata is None:
                    raise ValueError("its arrays are damaged")
                wanted = _on_the_host(saved.metadata, groups, average, place)
                context = ocp.Context()
                context.pytree_options.loading.partial_load = True
                with context:
                    tree = ocp.load(place, wanted, checkpointable_name="state")
                found = {name: tree[part][name] for part in wanted for name in wanted[part]}
                return json.loads(config_file.read_text()), checkpoint.step, found
            except UserError:
                raise
            except Exception as error:
                print(
                    f"checkpoint {checkpoint.step} cannot be read: {_first_line(error)}",
                    file=sys.stderr,
                )
    raise UserError(f"none of the checkpoints in {workdir / FOLDER} can be read")


def _remove_unfinished(directory: Path) -> None:
    """Removes, in the main process, what saves left that were cut short.

    Orbax would do so behind one's back, and raise what went wrong from the first save, in the main process alone.
    """
    if not distributed.is_main():
        return
    for path in directory.glob(f"*{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)
        if path.exists():  # on NFS, where another host still holds one of its files
            print(
                f"warning: {path} is left of a save that was cut short and cannot be removed; it takes room, and does "
                "no other harm",
                file=sys.stderr,
            )


def _check_schema(place: Path, writer: dict[str, Any] | None) -> None:
    """UserError where another version wrote what may mean something else than here."""
    schema = (writer or {}).get("schema", 1)
    if schema != SCHEMA:
        raise UserError(
            f"{place} was written by {_writer(writer)} under schema {schema}, this is {dexportrait_jax.__version__} "
            f"with schema {SCHEMA}; read it with that version"
        )


def _writer(writer: dict[str, Any] | None) -> str:
    if not writer or "dexportrait_jax" not in writer:
        return "a version before checkpoints said which"
    code = str(writer.get("code_sha256", ""))[:12]
    return f"dexportrait_jax {writer['dexportrait_jax']} (code {code})"


def _differences(saved: Any, wanted: Any) -> list[str]:
    """What two trees of shapes do not have in common, a line each."""
    shapes = [
        {
            sharding.path_name(path): tuple(leaf.shape)
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        }
        for tree in (saved, wanted)
    ]
    held, asked = shapes
    lines = [f"it has no {name}" for name in sorted(asked.keys() - held.keys())]
    lines += [f"it has {name}" for name in sorted(held.keys() - asked.keys())]
    return lines + [
        f"its {name} has shape {held[name]}, not {asked[name]}"
        for name in sorted(held.keys() & asked.keys())
        if held[name] != asked[name]
    ]


def _on_the_host(
    saved: Any, groups: Sequence[str] | None, average: bool, place: Path
) -> dict[str, dict[str, Any]]:
    """Shapes of the groups that are asked for, by the part of the State that they are taken from."""
    wanted: dict[str, dict[str, Any]] = {"params": {}, "ema": {}}
    for name in saved["params"] if groups is None else groups:
        if name not in saved["params"]:
            raise UserError(f"{place} has no group {name!r}; it has {', '.join(saved['params'])}")
        part = "ema" if average and name in saved["ema"] else "params"
        # A shape that is a numpy array's, without the array: Orbax then reads into the host's memory.
        wanted[part][name] = jax.tree.map(
            lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), saved[part][name]
        )
    return {part: found for part, found in wanted.items() if found}


def _unused(path: Path) -> Path:
    """`path`, or with the first number behind it that nothing has yet."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}_{number}")
    return free


def _is_damage(error: BaseException | None) -> bool:
    """Whether bytes were read, and are not what was written; of some damage Orbax tells in the error's cause alone."""
    while error is not None:
        if isinstance(error, json.JSONDecodeError) or any(word in str(error) for word in _DAMAGE):
            return True
        error = error.__cause__
    return False


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
