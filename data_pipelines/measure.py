"""The job `measure`: what a dataset prepared by an older version lacks, without preparing it again."""

from __future__ import annotations

import os
import time
from pathlib import Path

from data_pipelines import dataset, dataset_files, files
from dexportrait_jax.errors import UserError


def run_measure(data: str | os.PathLike) -> None:
    """Stores how much the backgrounds of a dataset move beside its shards, which stay as they are.

    Reads every frame once, at a fraction of its size. What is there already is left alone, so that an
    interrupted job goes on with the next split.

    Args:
        data: directory of the dataset.

    Raises:
        UserError: it is no dataset, a record is damaged, or nothing can be written there.
    """
    directory = Path(data).absolute()
    splits = dataset_files.split_names(directory) if directory.is_dir() else []
    if not splits:
        raise UserError(f"--data={data} is no dataset; give the --out of `dexportrait prepare`")
    for split in splits:
        path = directory / dataset_files.background_name(split)
        if path.exists():
            print(f"measure: {path} is there already", flush=True)
            continue
        started = time.monotonic()
        try:
            index, motion = dataset.build_index(directory, split)
        except (ValueError, OSError, RuntimeError, IndexError) as error:
            raise UserError(
                f"split '{split}' of {directory} cannot be read ({error}); prepare it again with --overwrite"
            ) from error
        with files.writing_to(path):
            dataset.write_background_motion(directory, split, motion)
        seconds = time.monotonic() - started
        print(
            f"measure: {path}: {len(index['frames'])} clips, {len(motion)} frames in {seconds:.0f} s",
            flush=True,
        )
