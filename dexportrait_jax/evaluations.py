"""Pictures of held-out frames while a stage trains: of which steps, and what a run that was cut short owes.

A step's checkpoint is written before its picture. Where a run ends between the two, its next start makes the picture
before anything else. What fails there again and again is left out, or a run could not get past it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections

from dexportrait_jax import distributed
from dexportrait_jax.tasks.pictures import write_samples

FOLDER = "samples"
ATTEMPTS = 3  # at a picture that is owed


def is_asked(config: ml_collections.ConfigDict, step: int) -> bool:
    """Whether the config wants a picture of this step; there may be nothing held out to make it of."""
    every = config.evaluate.every_steps
    at_end = config.evaluate.at_end and step == config.num_steps
    return at_end or (every > 0 and step % every == 0)


def take_away_after(workdir: Path, step: int) -> None:
    """Pictures of later steps, whose checkpoints are lost: those steps are made again, and so are their pictures."""
    if distributed.is_main():
        for path in (workdir / FOLDER).glob("step_*.png"):
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()


def is_owed(config: ml_collections.ConfigDict, workdir: Path, step: int) -> bool:
    """Whether a run restored at `step` ended before that step's picture was made; all processes must ask."""
    if not is_asked(config, step):
        return False
    made, attempts = distributed.from_main(
        [_picture(workdir, step).exists(), _attempts(workdir, step)]
    )
    if not made and attempts >= ATTEMPTS and distributed.is_main():
        print(
            f"warning: {workdir}: the evaluation of step {step} was cut short {attempts + 1} times and is left out",
            file=sys.stderr,
        )
    return not made and attempts < ATTEMPTS


def write(
    preview: Callable,
    state: dict[str, Any],
    config: ml_collections.ConfigDict,
    workdir: Path,
    step: int,
    *,
    owed: bool = False,
) -> None:
    """Makes the picture of a step; all processes must take part, and the main one writes.

    For as long as one that is owed is being made, a file beside it counts the attempts.
    """
    counts = owed and distributed.is_main()
    mark = _mark(workdir, step)
    if counts:
        print(f"{workdir}: evaluating step {step}, which was cut short")
        mark.parent.mkdir(exist_ok=True)
        mark.write_text(str(_attempts(workdir, step) + 1))
    write_samples(preview, state, config, _picture(workdir, step))
    if counts:
        mark.unlink()


def _picture(workdir: Path, step: int) -> Path:
    return workdir / FOLDER / f"step_{step:07d}.png"


def _mark(workdir: Path, step: int) -> Path:
    return workdir / FOLDER / f".step_{step:07d}.attempts"


def _attempts(workdir: Path, step: int) -> int:
    """How often it was begun since it is owed; a file that was torn counts as one."""
    mark = _mark(workdir, step)
    text = mark.read_text() if mark.exists() else "0"
    return int(text) if text.isdigit() else 1
