"""A file that a run writes at its end, on a disk that may fail for a while: nothing is lost by it and nothing torn."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import BinaryIO


class GrowingFile:
    """Bytes at the end of a file, in memory until `flush` has put them on the disk.

    What a flush that failed has written of them is taken away by the next, which opens the file anew: one that was open
    when a disk went away may stay stale.

    Args:
      path: of the file; what it holds stays.
    """

    def __init__(self, path: Path):
        self.path = path
        self._waiting = b""
        self._file: BinaryIO | None = path.open("ab")
        self._whole = self._file.tell()

    def write(self, data: bytes) -> None:
        """Keeps the bytes for the next flush."""
        self._waiting += data

    def flush(self) -> None:
        """Returns once all that was given is on the disk; OSError where it is not."""
        if not self._waiting:
            return
        try:
            if self._file is None:
                self._file = self.path.open("ab")
                if self._file.tell() > self._whole:
                    self._file.truncate(self._whole)
            self._file.write(self._waiting)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError:
            self._let_go()
            raise
        self._whole += len(self._waiting)
        self._waiting = b""

    def close(self) -> None:
        """Flushes, and closes the file also where that fails."""
        try:
            self.flush()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        file, self._file = self._file, None
        with contextlib.suppress(OSError):  # what it still holds is in memory
            if file is not None:
                file.close()
