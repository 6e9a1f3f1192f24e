"""How well a run uses its devices: the share of their peak, their memory, and a profile of some steps.

The model's FLOPs are counted from the program by flops.py, without what is recomputed to save memory, and set against
the peak that chips.py or `config.report.peak_tflops` names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_collections

from dexportrait_jax import chips
from dexportrait_jax.workload import step_work

GIB = chips.GIB


class Efficiency:
    """Figures of a window of steps for the record of metrics.

    Args:
      config: the run's; its `report.peak_tflops` goes before what is known of the chip.
      devices: all devices of the mesh.
      count: FLOPs that the model asks for in a step with these events, all devices together.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        devices: int,
        count: Callable[[frozenset[str]], float] | None = None,
    ):
        peak = 1e12 * config.report.peak_tflops or chips.peak_flops(jax.devices()[0].device_kind)
        self._peak = peak and peak * devices
        self._count = count or (lambda events: _model_flops(config, events))
        self._flops: dict[frozenset[str], float] = {}
        self._window = 0.0
        self._steps = 0

    def add(self, events: frozenset[str]) -> None:
        """A step with these events has been sent to the devices; where the peak is not known nothing is counted.

        The first step of a process is not to be added: its time is that of the start.
        """
        if not self._peak:
            return
        if events not in self._flops:
            # A trace of the step, seconds at full size, while the devices are at work on their own.
            self._flops[events] = self._count(events)
        self._window += self._flops[events]
        self._steps += 1

    def row(self, times: dict[str, float]) -> dict[str, float]:
        """Figures since the last row.

        Args:
          times: what WallTime says of the same window.

        Returns:
          `time/model_tflops_per_second` of all devices and `time/mfu` in [0, 1], where the peak is known: over steps
          and waiting for data, but not over saving and evaluating.
        """
        row: dict[str, float] = {}
        window, steps, self._window, self._steps = self._window, self._steps, 0.0, 0
        seconds = times.get("time/step_seconds", 0.0) * steps + times.get("time/data_seconds", 0.0)
        if window and "time/step_seconds" in times:
            row["time/model_tflops_per_second"] = window / seconds / 1e12
            row["time/mfu"] = window / seconds / self._peak
        return row


def memory_in_use() -> dict[str, float]:
    """GiB in use: of the fullest of this process's devices where they say so, and of the host's most at one time."""
    row = {}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    for key, name in (("bytes_in_use", "hbm_gib"), ("peak_bytes_in_use", "hbm_peak_gib")):
        if all(key in each for each in stats):
            row[f"memory/{name}"] = max(each[key] for each in stats) / GIB
    # Not `ru_maxrss`: a child inherits that of whoever started it.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                row["memory/host_gib"] = int(line.split()[1]) * 1024 / GIB
    return row


class ProfileWindow:
    """Traces some steps with JAX's profiler, for TensorBoard with xprof or for Perfetto.

    Args:
      window: `after`, the steps of this process before those that are traced, and `steps`, their number; 0: none is.
      folder: where the trace goes, below `plugins/profile`.
    """

    def __init__(self, window: ml_collections.ConfigDict, folder: Path):
        self._first, self._steps = window.after + 1, window.steps
        self._folder = folder
        self._seen = 0
        self._tracing = False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[Callable[[Any], None]]:
        """Step `number` of the run happens inside; what it gives is told what to wait for."""
        self._seen += 1
        if self._steps and self._seen == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        results: list[Any] = []
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield results.append
        if self._tracing and self._seen >= self._first + self._steps - 1:
            # Devices work behind the host: what they have left belongs to these steps.
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()


def _model_flops(config: ml_collections.ConfigDict, events: frozenset[str]) -> float:
    work = step_work(config, events)
    return 2.0 * (work.macs - work.recomputed)
