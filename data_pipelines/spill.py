"""What must not take more memory the longer a video is: arrays and JPEG files of its frames, kept on disk.

They lie in the system's temporary directory (TMPDIR names another) in files that have no name any more
once they are open. So nothing of them is left behind after an error or a SIGKILL: the system takes the
space back when the last reader is gone. Where that directory is in memory (tmpfs), so are they.
"""

from __future__ import annotations

import array
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from data_pipelines import files
from dexportrait_jax.errors import UserError

CHUNK = 256  # rows of `Rows` that are mapped together, at least


class NoRoomError(UserError):
    """The temporary directory cannot be written: a fault of the machine, and not of what was to be read."""


@contextmanager
def _writing() -> Iterator[None]:
    try:
        with files.writing_to(tempfile.gettempdir()):
            yield
    except UserError as error:
        raise NoRoomError(f"{error} (TMPDIR)") from error


def zeros(shape: Sequence[int], dtype: np.dtype | type = np.float32) -> np.ndarray:
    """An array on disk, mapped into memory: pages come and go as the system needs.

    Raises:
        NoRoomError: there is no room for it.
    """
    dtype = np.dtype(dtype)
    with _writing(), tempfile.TemporaryFile() as stream:
        size = max(1, int(np.prod(shape, dtype=np.int64))) * dtype.itemsize
        # Reserved at once: to write into a hole of a full disk would end the process without a word.
        os.posix_fallocate(stream.fileno(), 0, size)
        return np.asarray(np.memmap(stream, dtype, "r+", shape=tuple(shape)))


class Rows:
    """Arrays of one shape and type that come one by one.

    Up to half as much again is reserved for those to come. Every chunk is a file that stays open, so chunks grow with
    what is there: a million rows take 21 of them.
    """

    def __init__(self) -> None:
        self._chunk = np.empty((0, 0))
        self._used = 0  # of this chunk
        self._before = 0  # in those before it

    def append(self, row: np.ndarray) -> np.ndarray:
        """A copy of ``row`` that lies on disk."""
        if self._used == len(self._chunk):
            self._before += self._used
            rows = max(CHUNK, self._before // 2)
            self._chunk, self._used = zeros((rows, *row.shape), row.dtype), 0
        self._used += 1
        self._chunk[self._used - 1] = row
        return self._chunk[self._used - 1]


class Frames(Sequence[bytes]):
    """A list of bytes on disk, as `records.Clip.frames`; a slice is a view of the same file.

    16 bytes a frame stay in memory.
    """

    def __init__(self) -> None:
        with _writing():
            self._stream = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - as long as a view lives
        self._ends = array.array("q", [0])
        self._shown: range | None = None  # None: all, also those still to come

    def append(self, data: bytes) -> None:
        with _writing():
            # One call may write a part: the disk was full, and says so at the next.
            rest, at = memoryview(data), self._ends[-1]
            while rest:
                written = os.pwrite(self._stream.fileno(), rest, at)
                rest, at = rest[written:], at + written
        self._ends.append(at)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index):
        chosen = self._numbers[index]
        if isinstance(index, slice):
            part = object.__new__(Frames)
            part._stream, part._ends, part._shown = self._stream, self._ends, chosen
            return part
        start = self._ends[chosen]
        return os.pread(self._stream.fileno(), self._ends[chosen + 1] - start, start)

    @property
    def _numbers(self) -> range:
        return range(len(self._ends) - 1) if self._shown is None else self._shown
