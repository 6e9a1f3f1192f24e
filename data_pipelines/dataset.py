"""A dataset directory as random-access clips, read without TFDS or TensorFlow.

Records are read by number from the ArrayRecord shards. What must be known about all clips at once
(length, identity, camera, session, time, how much the background moves) comes from two small index files, so
opening a dataset costs the same however big it is.
"""

from __future__ import annotations

import collections
import concurrent.futures
import hashlib
import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import background, dataset_files, files, records, shard_reader
from dexportrait_jax.errors import UserError

_ENDS = 1 << 16  # bytes of a shard that its fingerprint looks at, at both ends
_TOGETHER = 1 << 20  # frames whose motion of backgrounds is read at a time


def available_splits(path: str | Path) -> list[str]:
    """The splits of a dataset directory, or of rendered heads ("synthetic:...")."""
    from data_pipelines.synthetic import source

    if str(path).startswith(source.PREFIX):
        return list(source.parse(str(path)).split())
    return dataset_files.split_names(path)


def build_index(
    directory: str | Path, split: str, *, measure: bool = True
) -> tuple[dict[str, list], np.ndarray]:
    """Reads every record of a split and returns what is to be known of all clips at once.

    Args:
        measure: the motion of backgrounds too, of records that lack it.

    Returns:
        the index, one list per key in record order; and the clips' `background_motion` (frames,) float32, one
        clip after the other.
    """
    paths = dataset_files.shards(directory)[split]
    # Not all open at once: a large split has more of them than a process may have open.
    source = shard_reader.ShardReader(paths, shard_reader.record_counts(paths))
    index = Index()
    for number in range(len(source)):
        clip = records.decode(source[number])
        index.add(background.measured(clip) if measure else clip)
    return index.columns, index.motion


class Index:
    """What is to be known of all clips of a split at once, collected clip by clip.

    Attributes:
        columns: a list per key, in the order of the clips; numbers are those that a record holds, in float32.
    """

    def __init__(self) -> None:
        names = ("clip_id", "identity", "session", "camera", "frames", "fps", "start", "size")
        self.columns: dict[str, list] = {name: [] for name in names}
        self._motion = bytearray()  # of a million clips a gigabyte: kept once

    @property
    def motion(self) -> np.ndarray:
        """(frames of all clips,) float32: their `background_motion`, of those that have it."""
        return np.frombuffer(self._motion, np.float32)

    def add(self, clip: records.Clip) -> None:
        values = (clip.clip_id, clip.identity, clip.session, clip.camera, len(clip))
        values += (float(np.float32(clip.fps)), float(np.float32(clip.timestamps[0])), clip.size)
        for column, value in zip(self.columns.values(), values, strict=True):
            column.append(value)
        if clip.background_motion is not None:
            self._motion += np.asarray(clip.background_motion, np.float32).tobytes()

    def write(self, directory: Path, split: str) -> None:
        """Stores it beside the shards of a split."""
        text = json.dumps(self.columns)
        files.write_bytes(directory / dataset_files.index_name(split), text.encode())
        write_background_motion(directory, split, self.motion)


def _shared(index: dict[str, list]) -> dict[str, list]:
    """The same index, of whose equal values, such as people, one is kept: JSON makes another for every clip."""
    for name, values in index.items():
        known: dict[Any, Any] = {}
        index[name] = [known.setdefault(value, value) for value in values]
    return index


def write_background_motion(directory: str | Path, split: str, motion: np.ndarray) -> None:
    """Stores the motion of all backgrounds beside the shards of a split."""
    with files.staged_stream(Path(directory) / dataset_files.background_name(split)) as stream:
        np.save(stream, motion)


def open_clips(path: str | Path, split: str, *, cache_bytes: int = 256 << 20):
    """The clips of a split by number: of a dataset directory, or rendered ones ("synthetic:...").

    Raises:
        UserError: there are none.
    """
    from data_pipelines.synthetic import source  # draws only when asked for

    if str(path).startswith(source.PREFIX):
        return source.RenderedClips(str(path), split, cache_bytes=cache_bytes)
    return ClipDataset(path, split, cache_bytes=cache_bytes)


class ClipDataset:
    """The clips of one split by number.

    Cheap to pickle and to send to worker processes: files are opened at the first read.

    Raises:
        UserError: no such directory or split, or nothing in it.
    """

    def __init__(self, directory: str | Path, split: str, *, cache_bytes: int = 256 << 20):
        self.directory = Path(directory).absolute()
        self.split = split
        if not self.directory.is_dir():
            raise UserError(
                f"no dataset at {self.directory}: make one with "
                f"`dexportrait prepare --videos=... --out={directory}`"
            )
        found = dataset_files.shards(self.directory)
        if not found:
            raise UserError(
                f"{self.directory} holds no ArrayRecord files: "
                "it is not a dataset made by `dexportrait prepare`"
            )
        if split not in found:
            raise UserError(
                f"the dataset {self.directory} has no split '{split}' (only {', '.join(found)}); "
                "prepare it with another --holdout or --holdout_fraction, or choose another split"
            )
        self.paths = found[split]
        self.index = self._read_index()
        self.frames = np.asarray(self.index["frames"], np.int64)
        if len(self.frames) == 0:
            raise UserError(f"split '{split}' of {self.directory} is empty; prepare more videos")
        self._records = shard_reader.ShardReader(self.paths, self._shard_lengths())
        self._starts = np.concatenate([[0], np.cumsum(self.frames)])
        path = self.directory / dataset_files.background_name(split)
        self._motion_path = path if path.exists() else None
        self._cache_bytes = cache_bytes
        self._forget()
        self._background()

    def _read_index(self) -> dict[str, list]:
        path = self.directory / dataset_files.index_name(self.split)
        try:
            if path.exists():
                return _shared(json.loads(path.read_text()))
            return build_index(self.directory, self.split, measure=False)[0]
        except shard_reader.ERRORS as error:
            raise self._cannot_be_read(error) from error

    def _shard_lengths(self) -> list[int]:
        """Records of every shard, as the dataset says, so that one that cannot be opened has its numbers too.

        Where it does not say so, all shards are opened.
        """
        try:
            info = json.loads((self.directory / dataset_files.INFO).read_text())
            (split,) = [split for split in info["splits"] if split["name"] == self.split]
            lengths = [int(length) for length in split["shardLengths"]]
            if len(lengths) == len(self.paths) and sum(lengths) == len(self.frames):
                return lengths
        except (OSError, ValueError, KeyError, TypeError):
            pass
        try:
            lengths = shard_reader.record_counts(self.paths)
            if sum(lengths) != len(self.frames):
                raise ValueError(f"{sum(lengths)} records, the index has {len(self.frames)}")
        except shard_reader.ERRORS as error:
            raise self._cannot_be_read(error) from error
        return lengths

    def _cannot_be_read(self, error: Exception) -> UserError:
        return UserError(
            f"the dataset {self.directory} cannot be read ({' '.join(str(error).split())}); "
            "prepare it again with --overwrite"
        )

    def _forget(self) -> None:
        self._cache: collections.OrderedDict[int, tuple[records.Clip, int]] = (
            collections.OrderedDict()
        )
        self._cached = 0
        self._motion: np.ndarray | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        for name in ("_cache", "_cached", "_motion", "_lock"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, number: int) -> records.Clip:
        """Reads one clip.

        Raises:
            IndexError: there is no such record; ends a `for clip in clips`.
            records.RecordError: the record is damaged.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"there is no record {number} of {len(self)}")
        number = int(number)
        with self._lock:
            if number in self._cache:
                self._cache.move_to_end(number)
                return self._cache[number][0]
        try:  # without the lock: several threads read at the same time
            data = self._records[number]
            clip = records.decode(data)
            self._check(number, clip)
        except records.RecordError as error:
            error.clip_id = self.index["clip_id"][number]  # its bytes may not say it
            raise
        with self._lock:
            if number not in self._cache:
                self._cache[number] = clip, len(data)
                self._cached += len(data)
                while self._cached > self._cache_bytes and len(self._cache) > 1:
                    self._cached -= self._cache.popitem(last=False)[1][1]
        return clip

    def _check(self, number: int, clip: records.Clip) -> None:
        """RecordError where a record is another than the index says."""
        expected = self.index["clip_id"][number]
        if clip.clip_id != expected:  # identity, camera and time of the index are another clip's
            raise records.RecordError(
                f"record {number} is of clip {clip.clip_id}, the index says {expected}"
            )
        if len(clip) != self.frames[number]:
            raise records.RecordError(
                f"record {number}: {len(clip)} frames, the index says otherwise"
            )

    def background_motion(self, number: int) -> np.ndarray | None:
        """`records.Clip.background_motion` of a clip, without reading it; None where it is not stored."""
        motion = self._background()
        return None if motion is None else motion[self._starts[number] : self._starts[number + 1]]

    def background_motions(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """`background_motion` of all clips in their order, where it is stored: of some thousand one after the other,
        and the frames of each. Its file is read from beginning to end, a few megabytes at a time."""
        motion = self._background()
        places = np.arange(0, self._starts[-1] + _TOGETHER, _TOGETHER)
        edges = np.unique(np.minimum(np.searchsorted(self._starts, places), len(self)))
        for first, last in itertools.pairwise(edges):
            yield motion[self._starts[first] : self._starts[last]], self.frames[first:last]

    def _background(self) -> np.ndarray | None:
        if self._motion is None and self._motion_path is not None:
            try:
                self._motion = np.load(self._motion_path, mmap_mode="r")
            except (OSError, ValueError, EOFError):
                self._motion = np.zeros(0)
            if self._motion.shape != (self._starts[-1],):
                raise UserError(
                    f"{self._motion_path} is damaged or of another dataset; remove it, and make it anew with "
                    f"`dexportrait measure --data={self.directory}`"
                )
        return self._motion

    def fingerprint(self) -> dict[str, str]:
        """name -> sha256 of the size, the beginning and the end of the split's shards.

        Not of the whole, which would take as long as reading a terabyte. A shard that is written anew from other
        pictures begins with another record, and ends with other places of its records. Many are looked at together: a
        shared disk takes tens of milliseconds for each, and a large split has tens of thousands.
        """
        with concurrent.futures.ThreadPoolExecutor(shard_reader.AT_ONCE) as pool:
            digests = list(pool.map(_digest_of_ends, self.paths))
        return {path.name: digest for path, digest in zip(self.paths, digests, strict=True)}


def _digest_of_ends(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as stream:
        digest = hashlib.sha256(f"{size} ".encode() + stream.read(_ENDS))
        stream.seek(max(0, size - _ENDS))
        digest.update(stream.read(_ENDS))
    return digest.hexdigest()
