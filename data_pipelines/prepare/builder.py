"""Clips -> a dataset directory: ArrayRecord shards with the metadata that TFDS reads, without TensorFlow.

The directory is made beside its final place and renamed when whole. It holds what TFDS expects
(`dataset_info.json`,
`features.json`, the shards) and per split one small `clip_index-SPLIT.json` and
`background_motion-SPLIT.npy`, collected as the records are written, so that a training run knows every clip's
length, keys and calm windows without opening all records.

TFDS writes the metadata alone: its own writer keeps a split of up to 1000 MiB in memory, to shuffle it, and needs
TensorFlow beyond that. Here a record is written as soon as it is made.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from data_pipelines import background, dataset, dataset_files, files, records
from dexportrait_jax.errors import UserError

VERSION = "1.0.0"
# Bytes of the records of a shard, unless a single one is larger. Every host opens shards as it reads, a quarter of the
# files that it may open at a time: a terabyte should be a few thousand of them, which small shards would not be. It is
# copied, and encoded to latents, shard by shard, for which large ones would not do.
SHARD_BYTES = 512 << 20


def features() -> tfds.features.FeaturesDict:
    """The schema of `records.Clip` in TFDS's words (only features that need no TensorFlow)."""
    tensor = tfds.features.Tensor
    text = tfds.features.Text
    return tfds.features.FeaturesDict(
        {
            "clip_id": text(),
            "identity": text(),
            "session": text(),
            "camera": text(),
            "source": text(),
            "settings": text(),
            "fps": tensor(shape=(), dtype=np.float32),
            "frames": tfds.features.Sequence(text()),
            "landmarks": tensor(shape=(None, records.LANDMARKS, 3), dtype=np.float32),
            "blendshapes": tensor(shape=(None, len(records.BLENDSHAPES)), dtype=np.float32),
            "head_pose": tensor(shape=(None, 3, 4), dtype=np.float32),
            "face_boxes": tensor(shape=(None, 4), dtype=np.float32),
            "mask_polygons": {
                name: tensor(shape=(None, points, 2), dtype=np.float32)
                for name, points in records.POLYGONS.items()
            },
            "timestamps": tensor(shape=(None,), dtype=np.float32),
            "background_motion": tensor(shape=(None,), dtype=np.float32),
            "crop_box": tensor(shape=(4,), dtype=np.float32),
            "original_size": tensor(shape=(2,), dtype=np.float32),
        }
    )


def write_dataset(
    splits: Mapping[str, Callable[[], Iterable[records.Clip]]],
    out: str | Path,
    *,
    reports: Mapping[str, str | Callable[[], str]] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a dataset directory that `dataset` and `tfds.builder_from_directory` read.

    Args:
        splits: split name -> function that yields its clips (only one clip is held at a time).
            Empty ones are left out.
        out: the directory to make.
        reports: further text files of the directory, name -> content, or what gives it once all clips are written.
        overwrite: replace a dataset that is there.

    Raises:
        UserError: `out` is there already, is no dataset, or cannot be written; or there is no clip at all.
    """
    out = Path(out).absolute()
    if files.already_there(out, "a dataset", dataset_files.is_dataset) and not overwrite:
        raise UserError(f"{out} exists already; choose another --out or pass --overwrite")
    temporary = files.hidden_name(out, "incomplete")
    try:
        with files.writing_to(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            written = [_write_split(name, clips(), temporary) for name, clips in splits.items()]
            filled = [split for split in written if split.shard_lengths]
            if not filled:
                raise UserError(f"there is no clip to write to {out}; give videos of faces")
            _write_metadata(temporary, filled)
            for name, content in (reports or {}).items():
                text = content if isinstance(content, str) else content()
                files.write_bytes(temporary / name, text.encode())
            files.replace_directory(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _write_split(name: str, clips: Iterable[records.Clip], directory: Path) -> tfds.core.SplitInfo:
    """Writes the shards and the index of a split, which has none where there is no clip; returns what the metadata
    tell of it."""
    lengths, size, index = [], 0, dataset.Index()

    def encode(clip: records.Clip) -> bytes:
        clip = background.measured(clip)
        index.add(clip)
        return records.encode(clip)

    encoded = map(encode, clips)
    record = next(encoded, None)
    while record is not None:
        length, room = 0, SHARD_BYTES
        with _shard(directory / _unfinished(name, len(lengths))) as write:
            while record is not None and (len(record) <= room or length == 0):
                write(record)
                length, room, size = length + 1, room - len(record), size + len(record)
                record = next(encoded, None)
        lengths.append(length)
    for number in range(len(lengths)):  # only now it is known of how many
        finished = directory / dataset_files.shard_name(name, number, len(lengths))
        (directory / _unfinished(name, number)).rename(finished)
    if lengths:
        index.write(directory, name)
    return tfds.core.SplitInfo(
        name=name, shard_lengths=lengths, num_bytes=size, filename_template=None
    )


def _unfinished(split: str, number: int) -> str:
    return f"{split}-{number}.incomplete"


@contextmanager
def _shard(path: Path) -> Iterator[Callable[[bytes], None]]:
    """What writes a record to a new shard, which is whole and on the disk once the block has ended without error."""
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    yield writer.write
    writer.close()
    with path.open("rb") as written:
        os.fsync(written.fileno())


def _write_metadata(directory: Path, splits: list[tfds.core.SplitInfo]) -> None:
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=features(),
        split_infos=splits,
        version=VERSION,
        check_data=False,  # it would need TensorFlow
        description="One face in one fixed square crop per clip, with pseudo labels.",
        disable_shuffling=True,  # the loader shuffles; order here is the order of the input
    )
