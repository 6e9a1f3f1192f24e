"""Checkpoints of the whole State: saved while training goes on, restored onto any mesh.

`WORKDIR/checkpoints/STEP` is written by Orbax under a temporary name and renamed when it is whole. A newest
checkpoint that cannot be read, when it is tried again neither, is set aside (never deleted) and the one before it is
taken, with a word about it; when none can be read that is an error, because starting from scratch in silence would
bury a run. Arrays carry checksums: a damaged one cannot be read either. Each checkpoint says which version wrote it:
one that is whole but holds another State than this code is an error that names the version.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from data_pipelines.files import write_bytes, writing_to
from dexportrait_jax import distributed
from dexportrait_jax.checkpoint_format import (
    FOLDER,
    LAST_SAVED,
    UNFINISHED,
    arrays_with_checksums,
    check_schema,
    differences,
    first_line,
    is_damage,
    orbax_lines_off,
    writer_in_words,
    written_by,
)
from dexportrait_jax.errors import UserError

# Seconds before a checkpoint that could not be read is tried again, and then once more. A bucket that is too busy, or a
# file handle that is stale on one of hundreds of hosts, must not cost all of them what the newest checkpoint holds.
READ_AGAIN_AFTER = (5.0, 30.0)
# Seconds that a shared file system may take to show all hosts what one has made: NFS keeps what it knows of a folder
# for up to 60.
SHOWN_WITHIN = 90.0


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
            failure = first_line(error)
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
        saving = self._checkpointer.save_async(
            step, state, force=True, custom_metadata=written_by()
        )
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
            print(f"warning: step {step} could not be saved: {first_line(error)}", file=sys.stderr)
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
                failure, damaged = first_line(error), is_damage(error)
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
        check_schema(place, metadata.custom_metadata)
        # Where Orbax cannot read the tree it gives None; loading will say why.
        apart = metadata.metadata and differences(metadata.metadata, abstract_state)
        if apart:
            more = f" (and {len(apart) - 1} more)" if len(apart) > 1 else ""
            raise UserError(
                f"{place} was written by {writer_in_words(metadata.custom_metadata)} and holds another State than this "
                f"version's: {apart[0]}{more}; go on with that version, or train in a new --workdir"
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


def _unused(path: Path) -> Path:
    """`path`, or with the first number behind it that nothing has yet."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}_{number}")
    return free
