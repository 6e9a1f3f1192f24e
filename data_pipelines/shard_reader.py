"""Bytes of records by number, from ArrayRecord shards on disks that may be away for a moment.

A batch is a function of (seed, n) only if every record is read: a shared disk that does not answer once must not look
like a damaged record, in whose place another clip would be taken, on this host and perhaps on no other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from array_record.python import array_record_data_source

from data_pipelines import records

# What array_record raises where a file cannot be read and where it holds no record alike.
ERRORS = (OSError, ValueError, RuntimeError, IndexError)
PAUSES = (0.2, 1.0, 4.0)  # seconds before a record is asked for again


class ShardReader:
    """The records of several shards, one shard after the other.

    Cheap to pickle and to send to worker processes: files are opened at the first read.

    Args:
        paths: of the shards.
    """

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        self._forget()

    def _forget(self) -> None:
        self._source = None
        self._unreadable: dict[int, str] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        """How many records there are; one of ERRORS where the shards cannot be read."""
        with self._lock:
            return len(self._open())

    def __getitem__(self, number: int) -> bytes:
        """Reads one record.

        Raises:
            records.RecordError: it cannot be read, and could not be after the last of PAUSES.
        """
        with self._lock:  # Grain reads from several threads
            if number in self._unreadable:  # and is not waited for a second time
                raise records.RecordError(self._unreadable[number])
            for pause in (*PAUSES, None):
                try:
                    return self._open()[number]
                except ERRORS as error:
                    # Files that were open before the disk went away stay unreadable when it comes back.
                    self._source, failure = None, error
                if pause is not None:
                    time.sleep(pause)
            self._unreadable[number] = f"record {number} cannot be read: {failure}"
            raise records.RecordError(self._unreadable[number]) from failure

    def _open(self) -> array_record_data_source.ArrayRecordDataSource:
        if self._source is None:
            self._source = array_record_data_source.ArrayRecordDataSource(self.paths)
        return self._source
