"""Bytes of records by number, from ArrayRecord shards on disks that may be away for a moment.

A batch is a function of (seed, n) only if every record is read: a shared disk that does not answer once must not look
like a damaged record, in whose place another clip would be taken, on this host and perhaps on no other.

Every shard has a reader of its own, so that one that stays unreadable takes no other with it.
"""

from __future__ import annotations

import bisect
import collections
import concurrent.futures
import itertools
import resource
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from array_record.python import array_record_data_source, array_record_module

from data_pipelines import records

# What array_record raises where a file cannot be read and where it holds no record alike.
ERRORS = (OSError, ValueError, RuntimeError, IndexError)
PAUSES = (0.2, 1.0, 4.0)  # seconds before a record is asked for again
AT_ONCE = 64  # shards that are looked at together, where all are: a shared disk answers slowly, and many at a time
AGAIN = 300.0  # seconds before a shard that could not be opened is waited for again


class ShardError(records.RecordError):
    """The whole shard of a record cannot be read.

    Attributes:
        path: of the shard.
        known: it was known before, so that nothing was read for this record.
        away: not even its first byte could be read: it is the disk's fault, not the shard's.
    """

    def __init__(self, text: str, path: Path, known: bool, away: bool = False):
        super().__init__(text)
        self.path, self.known, self.away = path, known, away


def record_counts(paths: Sequence[Path]) -> list[int]:
    """How many records each shard has, of which all are opened; one of ERRORS where one cannot be."""
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(_record_count, paths))


def _record_count(path: Path) -> int:
    if not path.stat().st_size:  # what a writer leaves that was given nothing
        return 0
    reader = array_record_module.ArrayRecordReader(str(path))
    count = reader.num_records()
    reader.close()  # says whether it could be opened at all
    return count


class ShardReader:
    """The records of several shards, one shard after the other.

    Cheap to pickle and to send to worker processes: a shard is opened when a record of it is first read. Threads read
    at the same time, also from one shard: its reader may be shared. What one of them waits for holds up no other.

    Args:
        paths: of the shards.
        counts: how many records each has.
    """

    def __init__(self, paths: Sequence[Path], counts: Sequence[int]):
        self.paths, self._edges = list(paths), [0, *itertools.accumulate(counts)]
        self._filled = sum(count > 0 for count in counts)
        self._forget()

    def _forget(self) -> None:
        # Those that are open, the one read last at the end; one that is closed for another's sake is opened again.
        self._open: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._most_open = _most_open()
        self._away: dict[
            int, tuple[float, str]
        ] = {}  # shard -> when it was waited for, and what was said
        self._unreadable: dict[int, str] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "_edges": self._edges, "_filled": self._filled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        return self._edges[-1]

    def __getitem__(self, number: int) -> bytes:
        """Reads one record.

        Raises:
            IndexError: there is no such record.
            records.RecordError: it cannot be read, and could not be after the last of PAUSES.
            ShardError: its shard cannot be opened. It is waited for every AGAIN seconds; where no shard can be opened,
                for every record, because there is none to go on with.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"there is no record {number} of {len(self)}")
        shard = bisect.bisect_right(self._edges, number) - 1
        with self._lock:
            if number in self._unreadable:  # and is not waited for a second time
                raise records.RecordError(self._unreadable[number])
            if shard in self._away:
                waited, text = self._away[shard]
                if len(self._away) < self._filled and time.monotonic() < waited + AGAIN:
                    raise ShardError(text, self.paths[shard], known=True)
        return self._read(number, shard)

    def _read(self, number: int, shard: int) -> bytes:
        path, place = self.paths[shard], number - self._edges[shard]
        for pause in (*PAUSES, None):
            source = None
            try:
                source = self._opened(shard)
                return source[place]
            except ERRORS as error:
                # Files that were open before the disk went away stay unreadable when it comes back.
                self._close(shard, source)
                failure = error
            if pause is not None:
                time.sleep(pause)
        said = " ".join(str(failure).split())
        if source is not None:
            text = f"record {place} of {path} cannot be read: {said}"
            with self._lock:
                self._unreadable[number] = text
            raise records.RecordError(text) from failure
        text = f"{path} cannot be read: {said}"
        with self._lock:
            self._away[shard] = time.monotonic(), text
        raise ShardError(text, path, known=False, away=not _answers(path)) from failure

    def _opened(self, shard: int) -> Any:
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        source = array_record_data_source.ArrayRecordDataSource([self.paths[shard]])
        expected = self._edges[shard + 1] - self._edges[shard]
        if len(source) != expected:
            raise ValueError(f"it holds {len(source)} records and not {expected}")
        with self._lock:
            self._away.pop(shard, None)
            source = self._open.setdefault(shard, source)  # another thread's, if it was quicker
            self._open.move_to_end(shard)
            if len(self._open) > self._most_open:
                self._open.popitem(last=False)
        return source

    def _close(self, shard: int, source: Any) -> None:
        """Closes a shard unless it has been opened anew by another thread; who still reads of it is not disturbed."""
        with self._lock:
            if source is not None and self._open.get(shard) is source:
                del self._open[shard]


def _answers(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            stream.read(1)
    except OSError:
        return False
    return True


def _most_open() -> int:
    """Shards that a reader has open at most: of the files that a process may open a quarter, as it has several readers.

    An open shard is a file and some ten kilobytes.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4096 if files == resource.RLIM_INFINITY else max(1, min(4096, files // 4))
