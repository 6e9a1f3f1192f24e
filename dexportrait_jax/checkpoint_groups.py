"""Parameter groups of a run's newest checkpoint, one alone or all, without its mesh, its task or a device."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from dexportrait_jax.checkpoint_format import (
    FOLDER,
    check_schema,
    first_line,
    newest_step,
    orbax_lines_off,
)
from dexportrait_jax.errors import UserError


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
                check_schema(place, saved.custom_metadata)
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
                    f"checkpoint {checkpoint.step} cannot be read: {first_line(error)}",
                    file=sys.stderr,
                )
    raise UserError(f"none of the checkpoints in {workdir / FOLDER} can be read")


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
