"""Records of a run: one JSON line a step, and progress for people."""

from __future__ import annotations

import collections
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from data_pipelines.files import writing_to
from dexportrait_jax.errors import UserError
from dexportrait_jax.growing_file import GrowingFile
from dexportrait_jax.metric_sinks import Sink

FILE = "metrics.jsonl"
# So many seconds may rows not reach the disk, at one flush after the other: as long as a save and the next may fail.
PATIENCE = 900.0


class MetricWriter:
    """Appends to `WORKDIR/metrics.jsonl`.

    Rows stay on the device until `flush`, which waits for their steps: so that recording makes no step wait, the next
    one has to be under way by then. After a restart the rows past the restored step are taken away first: the record
    has no step twice and no gap. Lines that were damaged are taken away too, see `read_rows`. Rows that cannot be
    written are a warning and kept for the next flush, until none could be for `PATIENCE` seconds.

    Args:
      workdir: the run's directory.
      resume_step: steps already done; rows of later steps are dropped.
      write: False in all processes but one: they fetch the same rows and write nothing.
      sinks: what gets the same rows too.

    `dropped` says how many rows were taken away, `last_kept` is the last that was not.
    """

    def __init__(
        self, workdir: Path, resume_step: int, write: bool = True, sinks: Sequence[Sink] = ()
    ):
        self.path = Path(workdir) / FILE
        self._waiting: list[tuple[int, dict[str, Any]]] = []
        self._file: GrowingFile | None = None
        self._failing_since: float | None = None
        self._sinks = sinks
        self.dropped = 0
        self.last_kept: dict[str, Any] = {}
        if not write:
            return
        if self.path.exists():
            recorded = read_rows(self.path)
            kept = [row for row in recorded if row["step"] <= resume_step]
            self.dropped = len(recorded) - len(kept)
            self.last_kept = kept[-1] if kept else {}
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
            temporary.replace(self.path)
        self._file = GrowingFile(self.path)

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Keeps a row for the next flush. `step` counts finished steps, from 1."""
        self._waiting.append((step, metrics))

    def __len__(self) -> int:
        return len(self._waiting)

    def flush(self, more: Callable[[int], dict[str, float]] | None = None) -> list[dict[str, Any]]:
        """Fetches the waiting rows from the device, writes them to disk and returns them.

        `more(number of rows)` is asked once they are here, and what it gives is written in the last of them.

        Raises:
          UserError: what kept rows from the disk for too long.
        """
        waiting, self._waiting = self._waiting, []
        rows = []
        gotten = jax.device_get([metrics for _, metrics in waiting])  # all on their way at once
        fetched = [(step, metrics) for (step, _), metrics in zip(waiting, gotten, strict=True)]
        if fetched and more:
            fetched[-1][1].update(more(len(fetched)))
        for step, metrics in fetched:
            values = {name: _number(value) for name, value in metrics.items()}
            rows.append({"step": step, **values})
            # JSON has no NaN; a missing measurement is null.
            clean = {k: (v if math.isfinite(v) else None) for k, v in rows[-1].items()}
            if self._file:
                self._file.write((json.dumps(clean) + "\n").encode())
            for sink in self._sinks:
                sink.row(step, values)
        try:
            if self._file:
                with writing_to(self.path):
                    self._file.flush()
            for sink in self._sinks:
                sink.flush()
            self._failing_since = None
        except UserError as error:
            now = time.monotonic()
            if self._failing_since is None:
                self._failing_since = now
                print(
                    f"warning: the last rows are not on disk ({error}); trying again with the next",
                    file=sys.stderr,
                )
            elif now - self._failing_since > PATIENCE:
                raise
        return rows

    def close(self) -> None:
        """Writes what waits and closes the file."""
        self.flush()
        if self._file:
            with writing_to(self.path):
                self._file.close()
        for sink in self._sinks:
            sink.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; lines that hold none are left out.

    How many those are is a warning, but for a last line without its end: that one was torn by a crash.
    """
    lines = Path(path).read_bytes().split(b"\n")
    rows = [_row(line) for line in lines]
    damaged = sum(not row and bool(line) for line, row in zip(lines[:-1], rows, strict=False))
    if damaged:
        print(f"warning: {path}: {damaged} unreadable lines are left out", file=sys.stderr)
    return [row for row in rows if row]


def _row(line: bytes) -> dict[str, Any]:
    """The row that a line holds; empty where it holds none."""
    try:
        row = json.loads(line.decode())
    except ValueError:
        return {}
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else {}


def _number(value: Any) -> float | int:
    value = value.item() if hasattr(value, "item") else value
    # Seven digits are all a float32 holds; more would only make the file longer.
    return float(f"{value:.7g}") if isinstance(value, float) else value


class Progress:
    """One line that renews itself on a terminal; a plain line now and then elsewhere.

    Args:
      label: what is being done.
      total: number of units; less than what is done, it is not known.
      done: units done before this process started; they do not count for the rate.
      unit: name of a unit, for the rate.

    Rate and time left are of the last `RECENT` seconds: what a phase of cheap steps did says little about the next.
    The last line tells the mean rate and the whole time.
    """

    RECENT = 90.0

    def __init__(
        self, label: str, total: int, done: int = 0, unit: str = "step", every: float = 15.0
    ):
        self.label, self.total, self.unit = label, total, unit
        self._first = (time.monotonic(), done)
        self._recent = collections.deque([self._first])
        self._terminal = sys.stderr.isatty()
        self._every = 0.2 if self._terminal else every
        self._next = self._first[0] + (0 if self._terminal else every / 3)

    def update(self, done: int, note: str = "") -> None:
        """Tells that `done` units are finished; `note` is shown behind the rate."""
        now, known, last = time.monotonic(), done <= self.total, done == self.total
        if now < self._next and not last:
            return
        self._next = now + self._every
        self._recent.append((now, done))
        while len(self._recent) > 2 and self._recent[1][0] < now - self.RECENT:
            self._recent.popleft()
        since, before = self._first if last else self._recent[0]
        rate = (done - before) / max(now - since, 1e-6)
        text = f"{self.label}: {done}{f'/{self.total}' if known else ''} {self.unit}s"
        if rate > 0:
            speed = f"{rate:.2f} {self.unit}s/s" if rate >= 1 else f"{1 / rate:.2f} s/{self.unit}"
            text += f", {speed}"
            if last:
                text += f", {_duration(now - since)}"
            elif known:
                text += f", {_duration((self.total - done) / rate)} left"
        text += f", {note}" if note else ""
        if self._terminal:
            print(
                f"\r\x1b[K{text}",
                end="\n" if last else "",
                file=sys.stderr,
                flush=True,
            )
        else:
            print(text, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
    )
