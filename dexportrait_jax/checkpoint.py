"""Checkpoints of the whole State: saved while training goes on, restored onto any mesh.

`WORKDIR/checkpoints/STEP` is written by Orbax under a temporary name and renamed when it is whole. A newest
checkpoint that cannot be read is set aside (never deleted) and the one before it is taken, with a word about
it; when none can be read that is an error, because starting from scratch in silence would bury a run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from data_pipelines.files import writing_to
from dexportrait_jax import distributed
from dexportrait_jax.errors import UserError

FOLDER = "checkpoints"


def orbax_lines_off() -> None:
    """Orbax logs every save through absl at INFO and WARNING; a run prints its own lines."""
    from absl import logging

    logging.set_verbosity(logging.ERROR)


class Checkpoints:
    """The checkpoints of one run.

    Args:
      workdir: the run's directory.
      keep: how many of the newest to keep.
    """

    def __init__(self, workdir: Path, keep: int = 2):
        orbax_lines_off()
        self.directory = Path(workdir).absolute() / FOLDER
        self.directory.mkdir(parents=True, exist_ok=True)
        self._pending: Any = None
        self._checkpointer = ocp.training.Checkpointer(
            self.directory,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def steps(self) -> list[int]:
        """Steps with a committed checkpoint, oldest first."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, step: int, state: Any) -> None:
        """Starts saving; raises what went wrong with the save before it."""
        self.wait()
        if step in self.steps():
            return
        with writing_to(self.directory):
            self._pending = self._checkpointer.save_async(step, state, force=True)

    def wait(self) -> None:
        """Blocks until the running save is on disk; raises if it failed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            with writing_to(self.directory):
                pending.result()

    def restore(self, abstract_state: Any) -> tuple[int, Any] | None:
        """The newest readable state as (step, state), or None in a run that has not saved yet.

        Args:
          abstract_state: a tree of `jax.ShapeDtypeStruct` with the shardings to restore onto.
        """
        steps = self.steps()
        failures = []
        for step in reversed(steps):
            try:
                return step, self._checkpointer.load(step, abstract_state)
            except Exception as error:  # Orbax raises many kinds; none is passed over in silence.
                failures.append((step, error))
                print(f"checkpoint {step} cannot be read: {_first_line(error)}", file=sys.stderr)
        if failures:
            raise UserError(
                f"none of the checkpoints in {self.directory} can be read (newest: "
                f"{_first_line(failures[0][1])}); restore them from a copy, or train in a new --workdir"
            )
        return None

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


def load_groups(workdir: Path) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """Config (JSON values), step and parameter groups of a run, averaged (EMA) where there is an average.

    Arrays come as numpy arrays on the host; neither mesh nor task is needed.
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
            try:
                metadata = checkpointer.metadata(checkpoint.step).metadata
                wanted = {name: _on_one_device(metadata[name]) for name in ("params", "ema")}
                context = ocp.Context()
                context.pytree_options.loading.partial_load = True
                with context:
                    tree = ocp.load(
                        (workdir / FOLDER / str(checkpoint.step)).absolute(),
                        wanted,
                        checkpointable_name="state",
                    )
                tree = jax.device_get(tree)
                groups = {**tree["params"], **tree["ema"]}
                return json.loads(config_file.read_text()), checkpoint.step, groups
            except Exception as error:
                print(
                    f"checkpoint {checkpoint.step} cannot be read: {_first_line(error)}",
                    file=sys.stderr,
                )
    raise UserError(f"none of the checkpoints in {workdir / FOLDER} can be read")


def _on_one_device(metadata: Any) -> Any:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), metadata
    )


def _unused(path: Path) -> Path:
    """`path`, or with the first number behind it that nothing has yet."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}_{number}")
    return free


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
