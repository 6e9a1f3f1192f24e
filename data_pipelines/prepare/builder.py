"""Clips -> a dataset directory: ArrayRecord shards written by a TFDS builder, without TensorFlow.

The directory is made beside its final place and renamed when whole. It holds what TFDS expects
(`dataset_info.json`,
`features.json`, the shards) and per split one small `clip_index-SPLIT.json` and
`background_motion-SPLIT.npy`, read back from the shards, so that a training run knows every clip's
length, keys and calm windows without opening all records.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from data_pipelines import background, dataset, files, records
from dexportrait_jax.errors import UserError

VERSION = "1.0.0"


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


def example(clip: records.Clip) -> dict[str, Any]:
    """A clip as the nested dict that `features` encodes."""
    flat = records.to_features(background.measured(clip))
    nested = {name: value for name, value in flat.items() if "/" not in name}
    nested["mask_polygons"] = {name: flat[f"mask_polygons/{name}"] for name in records.POLYGONS}
    return nested


class _Info(tfds.core.DatasetInfo):
    """TFDS looks for a new dataset in Google's bucket, where ours is not, and leaves an empty folder in /tmp."""

    def initialize_from_bucket(self) -> None:
        pass


class PortraitClips(tfds.core.GeneratorBasedBuilder):
    """Cropped clips of talking faces. Constructed with the generators of its splits."""

    VERSION = tfds.core.Version(VERSION)
    # Where TFDS would look for checksums of downloads; we have none, and its search needs a package
    # it does not require.
    code_path = None

    def __init__(self, *, clips: Mapping[str, Callable[[], Iterable[records.Clip]]], **kwargs):
        self._clips = clips
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return _Info(
            builder=self,
            features=features(),
            description="One face in one fixed square crop per clip, with pseudo labels.",
            disable_shuffling=True,  # the loader shuffles; order here is the order of the input
        )

    def _split_generators(self, download_manager):
        return {split: self._generate_examples(clips) for split, clips in self._clips.items()}

    def _generate_examples(self, clips):
        for number, clip in enumerate(clips()):
            yield number, example(clip)


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
        UserError: `out` is there already, is no dataset, or cannot be written.
    """
    out = Path(out).absolute()
    if files.already_there(out, "a dataset", dataset.is_dataset) and not overwrite:
        raise UserError(f"{out} exists already; choose another --out or pass --overwrite")
    temporary = files.hidden_name(out, "incomplete")
    try:
        with files.writing_to(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            directory = _prepare(splits, temporary)
            for name, content in (reports or {}).items():
                text = content if isinstance(content, str) else content()
                files.write_bytes(directory / name, text.encode())
            for split in dataset.split_names(directory):
                index, motion = dataset.build_index(directory, split)
                text = json.dumps(index)
                files.write_bytes(directory / dataset.index_name(split), text.encode())
                dataset.write_background_motion(directory, split, motion)
            files.replace_directory(directory, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _prepare(splits, temporary: Path) -> Path:
    tfds.disable_progress_bar()
    builder = PortraitClips(
        clips=dict(_filled(splits)), data_dir=temporary, file_format="array_record"
    )
    with contextlib.redirect_stdout(
        sys.stderr if os.environ.get("DEXPORTRAIT_DEBUG") else _Silence()
    ):
        builder.download_and_prepare()
    return Path(builder.data_path)


def _filled(splits) -> Iterator[tuple[str, Callable[[], Iterable[records.Clip]]]]:
    """The splits that have a clip, each to be asked once: TFDS fails at one that turns out to be empty."""
    for name, clips in splits.items():
        following = iter(clips())
        for first in following:
            whole = itertools.chain([first], following)
            yield name, lambda whole=whole: whole
            break


class _Silence:
    """TFDS prints what it does; our job prints its own progress."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass
