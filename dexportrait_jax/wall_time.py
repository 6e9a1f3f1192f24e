"""Where a run's time goes, and a word when it goes nowhere.

The loop says what it is doing; what is left is steps. `goodput` is the share of the steps that the run still has in the
time since it was first started: compiling, waiting for data, saving, evaluating, steps that a kill took back and the
time between two starts are what a pod is paid for without learning anything.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

STEPS = "steps"
GOOD_SECONDS = "time/good_seconds"


class WallTime:
    """The time of one process, by what it was spent on, and of the run over all its starts.

    Everything until the first `spent` or `ready` is "start". On an accelerator the host runs ahead of the device, so
    that some of its waiting for data costs nothing; all of it is counted, and the goodput is a lower bound. Where
    another process waits for data, this one waits for it in a step: see `slowest_waited`.
    """

    def __init__(self, started: float | None = None):
        self._last = time.monotonic() if started is None else started
        self._began = self._last
        self._all: collections.Counter[str] = collections.Counter()
        self._window: collections.Counter[str] = collections.Counter()
        self.doing = "start"
        self.since = self._last
        self._good_before = self._seconds_before = 0.0
        self._untimed = 0
        self._data_told = 0.0

    def goes_on(self, good_seconds: float, seconds_before: float) -> None:
        """Other processes trained the run before.

        Args:
          good_seconds: what the record says at the step that is gone on from. Steps after it are done again; those that
            took their time first do not count.
          seconds_before: from the run's first start to this one, whether a process ran or not; where that is not known,
            less than it was.
        """
        # Its steps took that long at least, whatever became of the record of its starts, or of a host's clock.
        self._good_before, self._seconds_before = good_seconds, max(seconds_before, good_seconds)

    def ready(self) -> None:
        """The first step is done: from now on what is nothing else is steps. Its own time was that of the start."""
        self._untimed = 1
        self._turn_to(STEPS)
        self._data_told = self._all["data"]

    @contextlib.contextmanager
    def spent(self, on: str) -> Iterator[None]:
        """What happens inside is charged to `on`; the time before to what was done before."""
        before = self.doing
        self._turn_to(on)
        try:
            yield
        finally:
            self._turn_to(before)

    def row(self, steps: int, pictures: int) -> dict[str, float]:
        """Figures since the last row, and the goodput since the run's first start, for the record of metrics.

        Args:
          steps: steps finished since the last row.
          pictures: target pictures in each of them, over all processes.
        """
        self._turn_to(self.doing)
        window, self._window = self._window, collections.Counter()
        seconds = sum(window.values())
        timed, self._untimed = steps - self._untimed, 0
        row = {f"time/{name}_seconds": value for name, value in window.items() if name != STEPS}
        row[GOOD_SECONDS], row["time/goodput"] = self._good()
        if timed > 0 and window[STEPS]:
            row["time/step_seconds"] = window[STEPS] / timed
            row["time/pictures_per_second"] = steps * pictures / seconds
        return row

    def summary(self) -> str:
        """This process in a line, and the goodput of the run where there were others."""
        self._turn_to(self.doing)
        total = max(sum(self._all.values()), 1e-9)
        parts = [f"{name} {value / total:.0%}" for name, value in self._all.most_common()]
        line = f"{total:.0f} s: {', '.join(parts)}"
        if self._seconds_before:
            line += f"; of {self._seconds_before + total:.0f} s since its first start, steps {self._good()[1]:.0%}"
        return line

    def waited_for_data(self) -> float:
        """Seconds that this process has waited since `slowest_waited` was last told, or since it was ready."""
        return self._all["data"] - self._data_told

    def slowest_waited(self, seconds: float) -> None:
        """Of all processes, one has waited so long, and the others for it: what those took for steps is no step."""
        self._turn_to(self.doing)
        longer = max(seconds - self.waited_for_data(), 0.0)
        for spent in (self._all, self._window):
            moved = min(longer, spent[STEPS])
            spent[STEPS] -= moved
            spent["data"] += moved
        self._data_told = self._all["data"]

    def _good(self) -> tuple[float, float]:
        """Seconds of the steps that the run has, and their share of the time since its first start."""
        seconds = self._good_before + self._all[STEPS]
        return seconds, seconds / max(self._seconds_before + sum(self._all.values()), 1e-9)

    def _turn_to(self, doing: str) -> None:
        now = time.monotonic()
        self._all[self.doing] += now - self._last
        self._window[self.doing] += now - self._last
        if doing != self.doing:
            self.since = now
        self._last, self.doing = now, doing


class Watch:
    """Reports when the loop has stayed in one place for too long: what it was doing, and every thread's stack.

    A hung collective, a disk that does not answer or a loader without data look alike from outside; the stacks tell
    them apart. The run is not ended: the launcher, or whoever reads the report, decides.

    Args:
      wall: what the loop is doing.
      seconds: how long one thing may take; what is in LONG may take PATIENCE times as long. 0: there is no watch.
      file: what stacks are appended to.
      every: how often is looked.
    """

    LONG = ("start", "compile", "evaluate")
    PATIENCE = 4

    def __init__(self, wall: WallTime, seconds: float, file: Path, every: float = 5.0):
        self.wall, self.seconds, self.file = wall, seconds, Path(file)
        self._every = min(every, seconds / 4) if seconds else every
        self._steps = 0
        self._moved = time.monotonic()
        self._told: tuple[int, float] | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True, name="watch")
        if seconds:
            self._thread.start()

    def moved(self) -> None:
        """A step was finished."""
        self._steps += 1
        self._moved = time.monotonic()

    def close(self) -> None:
        """Ends the watch."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(self._every):
            doing, place = self.wall.doing, (self._steps, self.wall.since)
            waited = time.monotonic() - max(self._moved, self.wall.since)
            limit = self.seconds * (self.PATIENCE if doing in self.LONG else 1)
            if waited > limit and self._told != place:
                self._told = place
                self._report(doing, waited)

    def _report(self, doing: str, waited: float) -> None:
        line = (
            f"warning: no progress for {waited:.0f} s, after {self._steps} steps of this process; it is at: "
            f"{'a step' if doing == STEPS else doing}; the stacks of all threads are in {self.file}"
        )
        print(line, file=sys.stderr, flush=True)
        with contextlib.suppress(OSError), self.file.open("a") as file:
            print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {line}", file=file, flush=True)
            faulthandler.dump_traceback(file=file, all_threads=True)


def stacks_file(workdir: Path, process: int, processes: int) -> Path:
    """Where a process puts its stacks: each its own, so that one sees which of them hangs."""
    return Path(workdir) / ("stacks.txt" if processes == 1 else f"stacks_{process}.txt")
