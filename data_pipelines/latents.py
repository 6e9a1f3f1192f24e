"""Latents of a dataset's frames, made once by `dexportrait encode` and read in place of pictures (method.md 4.1).

A directory of latents belongs to one split of one dataset. For every frame it holds the posterior of an autoencoder,
mean and log-variance, of the picture that training sees where nothing is random about it, and where asked of the
mirrored one too. There is a record a set of a frame, so that a sample reads its own frames alone; shards hold the
clips of the dataset's shards.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import dataset, records, shard_reader
from data_pipelines.augment import default_augment
from dexportrait_jax.errors import UserError

DESCRIPTION, FORMAT = "latents.json", "dexportrait-latents-1"
BORDER = default_augment()["similarity"]["border"]  # of the pictures that are encoded


@dataclasses.dataclass(frozen=True)
class Description:
    """What a directory of latents is of, as in its `latents.json`.

    Attributes:
        data: path of the dataset when it was encoded; only told, because datasets move.
        split: the split of it.
        shards: its shards, `ClipDataset.fingerprint`: another or changed dataset has others.
        clips, frames: how many there are.
        crop: constants of the dataset's crop, to be read by people.
        image_size: side of the pictures in pixels.
        flips: whether mirrored pictures are there too.
        dtype: what latents are stored in, "float16" or "float32".
        compute: what the autoencoder computed in, "float32" or "bfloat16".
        shape: (h, w, c) of the latent of a picture.
        autoencoder: which one; see `tasks.autoencoder.identity`.
        weights: the export it came from; only told.
    """

    data: str
    split: str
    shards: dict[str, str]
    clips: int
    frames: int
    crop: dict[str, Any] | None
    image_size: int
    flips: bool
    dtype: str
    compute: str
    shape: tuple[int, int, int]
    autoencoder: dict[str, Any]
    weights: str

    @property
    def sets(self) -> int:
        """Records of a frame: its picture, and the mirrored one."""
        return 2 if self.flips else 1

    @property
    def record_shape(self) -> tuple[int, int, int, int]:
        """(2, h, w, c): mean and log-variance, unscaled."""
        return (2, *self.shape)

    @property
    def frame_bytes(self) -> int:
        """Of all records of a frame."""
        return int(self.sets * np.prod(self.record_shape) * np.dtype(self.dtype).itemsize)

    def as_json(self) -> dict[str, Any]:
        return json.loads(json.dumps({"format": FORMAT, **dataclasses.asdict(self)}))


def read_description(directory: str | Path) -> Description:
    """UserError where there are no latents of this format."""
    path = Path(directory) / DESCRIPTION
    if not path.is_file():
        raise UserError(
            f"{directory} holds no {DESCRIPTION}: no latents; make them with "
            "`dexportrait encode --weights=EXPORT --data=DATASET --out=DIR`"
        )
    try:
        values = json.loads(path.read_text())
        if values.pop("format") != FORMAT:
            raise ValueError("another format")
        return Description(**values | {"shape": tuple(values["shape"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); encode again with --overwrite"
        ) from error


def shard_name(number: int, count: int) -> str:
    """Unlike a dataset's, so that latents are not taken for one."""
    return f"latents-{number:05d}-of-{count:05d}"


class Latents:
    """The latents of a dataset's split by clip and frame; cheap to send to worker processes.

    Args:
        config: `config.data`, of which `latents` names the directory.
        clips: the split that is trained on.

    Raises:
        UserError: there are no latents, they are of something else, or `config` wants pictures changed in ways
            that latents of unchanged ones cannot follow.
    """

    def __init__(self, config: Mapping[str, Any], clips: Any):
        self.directory = Path(config["latents"]).absolute()
        self.description = read_description(self.directory)
        self._check_pictures(config)
        self._check_dataset(clips)
        self._starts = np.concatenate([[0], np.cumsum(clips.frames)])
        self._clip_ids = clips.index["clip_id"]
        count = len(self.description.shards)
        paths = [self.directory / shard_name(number, count) for number in range(count)]
        self._records = shard_reader.ShardReader(paths, self._counts_of_whole(paths))

    def __call__(self, clip: int, frame: int, flip: bool) -> np.ndarray:
        """(2, h, w, c) of float16 or float32: mean and log-variance, unscaled.

        Raises:
            records.RecordError: it is damaged, or its picture was when it was to be encoded.
        """
        number = int(self._starts[clip] + frame) * self.description.sets + int(flip)
        clip_id = self._clip_ids[clip]
        try:
            data = self._records[number]
        except records.RecordError as error:
            error.clip_id = clip_id
            raise
        if not data:
            raise records.RecordError(f"{self.directory} has no latent of frame {frame}", clip_id)
        values = np.frombuffer(data, f"<{np.dtype(self.description.dtype).str[1:]}")
        if values.size != np.prod(self.description.record_shape):
            raise records.RecordError(f"latent {number} of {self.directory} is cut short", clip_id)
        return values.reshape(self.description.record_shape)

    def _check_pictures(self, config: Mapping[str, Any]) -> None:
        """The pictures that were encoded are those that the step would encode."""
        augment, made = config["augment"], self.description
        if config["image_size"] != made.image_size:
            raise UserError(
                f"{self.directory} holds latents of pictures of {made.image_size} pixels, but data.image_size is "
                f"{config['image_size']}; give --config.data.image_size={made.image_size}, or encode again with "
                f"--size={config['image_size']}"
            )
        changing = [name for name in ("similarity", "colour") if augment[name]["probability"]]
        if augment["flip"]["probability"] and not made.flips:
            changing.append("flip")
        keys = [f"--config.data.augment.{name}.probability=0" for name in changing]
        if augment["similarity"]["border"] != BORDER:
            keys.append(f"--config.data.augment.similarity.border={BORDER}")
        if keys:
            flips = "; or encode again with --flips to go on flipping" if "flip" in changing else ""
            raise UserError(
                f"{self.directory} holds latents of pictures as they are, but this config changes pictures at "
                f"random: give {' '.join(keys)}, or leave config.data.latents out{flips}"
            )

    def _check_dataset(self, clips: Any) -> None:
        made = self.description
        refuse_rendered(clips)
        if clips.split != made.split:
            raise UserError(
                f"{self.directory} holds latents of split '{made.split}', but split '{clips.split}' is trained on; "
                f"encode it with --split={clips.split} to another --out"
            )
        if clips.fingerprint() != made.shards or int(clips.frames.sum()) != made.frames:
            raise UserError(
                f"{self.directory} holds latents of another dataset than {clips.directory}, or of it before it was "
                f"changed ({made.clips} clips, {made.frames} frames of {made.data}; here {len(clips)} clips, "
                f"{clips.frames.sum()} frames); encode again with --overwrite"
            )

    def _counts_of_whole(self, paths: Sequence[Path]) -> list[int]:
        """Latents of every shard; UserError where some are missing."""
        try:
            counts = shard_reader.record_counts(paths)
        except shard_reader.ERRORS as error:
            raise UserError(
                f"{self.directory} cannot be read ({' '.join(str(error).split())[:200]}); encode again with --overwrite"
            ) from error
        if sum(counts) != self.description.frames * self.description.sets:
            raise UserError(
                f"{self.directory} holds {sum(counts)} latents, its {DESCRIPTION} says "
                f"{self.description.frames * self.description.sets}; copy it whole, or encode again with --overwrite"
            )
        return counts


def refuse_rendered(clips: Any) -> None:
    """UserError for heads that are drawn while training: there are no files to keep latents beside."""
    if not isinstance(clips, dataset.ClipDataset):
        raise UserError(
            f"there are no cached latents of {clips.directory}, which is drawn while training; make a dataset of it "
            "with `dexportrait render`"
        )
