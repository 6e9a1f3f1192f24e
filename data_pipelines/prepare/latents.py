"""Writing latents: a dataset's pictures through an encoder, shard by shard.

Shards that are done are kept in a hidden folder beside the result until all are there, so that a job that was ended
goes on with the next one; the directory itself appears at once. What encodes is a function: nothing here knows of
accelerators.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from data_pipelines import dataset, files, latents, records, shard_reader, transforms
from dexportrait_jax.errors import UserError

# (n, size, size, 3) uint8 -> (n, 2, h, w, c): mean and log-variance, unscaled; what it returns may still be on its
# way and is waited for only when it is written.
Encode = Callable[[np.ndarray], "np.ndarray"]


def finished(out: Path, description: latents.Description, overwrite: bool) -> bool:
    """Whether these very latents are there already; UserError where anything else is that may not be replaced."""
    if not files.already_there(out, "latents", _are_latents):
        return False
    if not overwrite:
        before = latents.read_description(out).as_json()
        now = description.as_json()
        told = ("data", "weights")
        changed = [key for key in now if key not in told and before[key] != now[key]]
        if changed:
            raise UserError(
                f"{out} holds latents made with other {', '.join(changed)}; choose another --out or pass --overwrite"
            )
    return not overwrite


def _are_latents(directory: Path) -> bool:
    return (directory / latents.DESCRIPTION).is_file()


def write(
    clips: dataset.ClipDataset,
    out: Path,
    description: latents.Description,
    encode: Encode,
    *,
    batch: int,
    workers: int,
    tell: Callable[[int], None],
) -> None:
    """Makes the directory `out` of all clips' latents.

    Args:
        batch: pictures that `encode` takes; the last are padded to it.
        workers: threads that decode.
        tell: told how many frames are done.

    Raises:
        UserError: the dataset cannot be read, `out` cannot be written, or another process is at it.
    """
    clips_of_shards = _clips_of_shards(clips)
    with files.work_folder(out) as work, files.writing_to(out):
        path, text = work / latents.DESCRIPTION, description.as_json()
        if not path.exists() or json.loads(path.read_text()) != text:
            shutil.rmtree(work)
            work.mkdir()
            files.write_json(path, text)
        done = 0
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            for number, numbers in enumerate(clips_of_shards):
                shard = work / latents.shard_name(number, len(clips.paths))
                if not shard.exists():
                    pictures = _pictures(clips, numbers, description, pool)
                    told = _counted(pictures, description.sets, done, tell)
                    _write_shard(shard, told, description, encode, batch)
                done += int(clips.frames[numbers.start : numbers.stop].sum())
                tell(done)
        files.replace_directory(work, out)


def _clips_of_shards(clips: dataset.ClipDataset) -> list[range]:
    """The clips of every shard of a split; UserError where one cannot be read."""
    try:
        counts = shard_reader.record_counts(clips.paths)
    except shard_reader.ERRORS as error:
        raise UserError(
            f"the dataset {clips.directory} cannot be read ({' '.join(str(error).split())}); "
            "prepare it again with --overwrite"
        ) from error
    edges = [0, *itertools.accumulate(counts)]
    return [range(first, last) for first, last in itertools.pairwise(edges)]


def _pictures(clips, numbers: range, description, pool) -> Iterator[np.ndarray | None]:
    """The pictures to encode, in the order of the records; None where the dataset is damaged."""
    sets = [transforms.similarity_matrix(flip=flip) for flip in (False, True)[: description.sets]]

    def read(clip: records.Clip, index: int) -> list[np.ndarray | None]:
        try:
            picture = transforms.decode_frame(clip, index)
        except records.RecordError as error:
            _report(clips, error)
            return [None] * len(sets)
        return [
            transforms.sample_picture(picture, matrix, description.image_size, latents.BORDER)
            for matrix in sets
        ]

    for number in numbers:
        try:
            clip = clips[number]
        except records.RecordError as error:
            _report(clips, error)
            yield from [None] * (int(clips.frames[number]) * len(sets))
            continue
        for pictures in pool.map(lambda index, clip=clip: read(clip, index), range(len(clip))):
            yield from pictures


def _report(clips: dataset.ClipDataset, error: Exception) -> None:
    print(
        f"warning: {clips.directory}, split {clips.split}: {error}; its latents are left out",
        file=sys.stderr,
        flush=True,
    )


def _counted(pictures, sets: int, done: int, tell) -> Iterator[np.ndarray | None]:
    for number, picture in enumerate(pictures):
        if number % sets == 0:
            tell(done + number // sets)
        yield picture


def _write_shard(
    path: Path,
    pictures: Iterator[np.ndarray | None],
    description: latents.Description,
    encode: Encode,
    batch: int,
) -> None:
    temporary = path.with_name(f"{path.name}.incomplete")
    # Floats of a network hardly shrink, and reading them should cost nothing.
    writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
    kind = np.dtype(description.dtype).newbyteorder("<")
    waiting: tuple[list[bool], np.ndarray] | None = None

    def write_out() -> None:
        there, encoded = waiting
        rows = iter(np.asarray(encoded).astype(kind))
        for whole in there:
            row = next(rows) if whole else None
            writer.write(b"" if row is None else row.tobytes())

    while part := list(itertools.islice(pictures, batch)):
        there = [picture is not None for picture in part]
        stack = np.zeros((batch, description.image_size, description.image_size, 3), np.uint8)
        for place, picture in enumerate(picture for picture in part if picture is not None):
            stack[place] = picture
        encoded = encode(stack)  # goes on while the next pictures are decoded
        if waiting is not None:
            write_out()
        waiting = there, encoded
    if waiting is not None:
        write_out()
    writer.close()
    with temporary.open("rb") as written:
        os.fsync(written.fileno())
    temporary.replace(path)
