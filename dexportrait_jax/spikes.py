"""Losses that jump: found beside their own recent past, and written down with the step."""

from __future__ import annotations

import collections
import contextlib
import math
import statistics
import sys
from pathlib import Path


class Spikes:
    """Finds losses far above what they were.

    A loss is a spike when it is more than `times` typical deviations above the median of the last `window` steps. The
    deviation is the median distance from the median, which earlier spikes do not widen.

    Args:
      times: how far is far; 0: nothing is a spike.
      file: where the lines go, beside standard error.
      window: steps of the past that count; half as many have to be there.
    """

    def __init__(self, times: float, file: Path, window: int = 200):
        self.times, self.file, self.window = times, Path(file), window
        self._past: dict[str, collections.deque[float]] = {}

    def note(self, rows: list[dict[str, float]]) -> None:
        """Tells and writes down the spikes of these steps."""
        lines = [line for row in rows for line in self.find(row)]
        if lines:
            with contextlib.suppress(OSError), self.file.open("a") as file:
                file.writelines(f"{line}\n" for line in lines)
        for line in lines:
            print(f"warning: {line}", file=sys.stderr, flush=True)

    def find(self, row: dict[str, float]) -> list[str]:
        """Of one step's metrics, a line for every `.../loss` that is a spike."""
        said = []
        for name, value in row.items():
            if not name.endswith("/loss") or not math.isfinite(value):
                continue
            past = self._past.setdefault(name, collections.deque(maxlen=self.window))
            if self.times and len(past) >= self.window // 2:
                middle = statistics.median(past)
                spread = statistics.median(abs(one - middle) for one in past)
                if value > middle + self.times * max(spread, 1e-3 * abs(middle)):
                    said.append(
                        f"step {row['step']}: {name} {value:.4g}, where {middle:.4g} is usual"
                    )
            past.append(value)
        return said
