"""Sources of a batch that several processes bring, as hosts do that share a clip's frames or a network's heads.

Each reads them itself. One that cannot read a record which the others can read shows another clip in its place
(`data_pipelines/examples.py`), and from then on weights that JAX takes for equal on all devices are not, for good and
without a word. So processes compare what they brought whenever they ask each other anyway, which is before every save.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from dexportrait_jax import distributed, sharding

_BYTES = 4096  # about so many of an array are looked at: other clips differ everywhere
_EXACT = (1 << 24) - 1  # the agreement's figures are float32


class SharedSources:
    """What this process brought of them, to be compared with what others did.

    Args:
      mesh: where batches go.
      sources: of the global batch.
      rows: of it, that this process brings; see `sharding.rows_of_process`.
    """

    def __init__(self, mesh: jax.sharding.Mesh, sources: int, rows: Sequence[int]):
        self._rows = sharding.rows_of_several_processes(mesh, sources)
        self._places = {row: place for place, row in enumerate(rows) if row in self._rows}
        # Over all batches: once apart, they stay so.
        self._sums = dict.fromkeys(self._places, 0)

    def add(self, batch: Mapping[str, np.ndarray]) -> None:
        """Takes note of a batch, of which this process has brought these rows."""
        for row, place in self._places.items():
            for name in sorted(batch):
                self._sums[row] = zlib.crc32(_sample(batch[name][place]), self._sums[row])

    def figures(self) -> dict[str, float]:
        """For `distributed.Agreement.greatest`: of every source its sum and the sum's negative."""
        found = dict.fromkeys((name for row in self._rows for name in _names(row)), -np.inf)
        for row, total in self._sums.items():
            most, least = _names(row)
            found |= {most: total & _EXACT, least: -(total & _EXACT)}
        return found

    def apart(
        self, greatest: dict[str, float], step: int, left_out: Callable[[], list[str]]
    ) -> str:
        """Takes `figures` out of what was agreed on after a step; where a source was not the same everywhere, says so.

        Args:
          greatest: what all processes know.
          step: the step.
          left_out: says what this process could not read, the newest last.

        Returns:
          one line in every process, for an error, or nothing in every process.
        """
        apart = []
        for row in self._rows:
            most, least = (greatest.pop(name) for name in _names(row))
            if most != -least:
                apart.append(row)
        if not apart:
            return ""
        texts = left_out()
        before = f", and {len(texts) - 1} before it" if len(texts) > 1 else ""
        here = f"left out: {texts[-1]}{before}" if texts else "left nothing out; another tells"
        return (
            f"source {apart[0]} of a batch up to step {step} was not the same in all processes that share it, as where "
            f"one of them cannot read a record. {distributed.here()} {here}. No checkpoint holds that step: see that "
            "every host can read the data, and start the same command to go on"
        )


def _names(row: int) -> tuple[str, str]:
    return f"shared/{row}/most", f"shared/{row}/least"


def _sample(value: np.ndarray) -> bytes:
    flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    return flat[:: flat.size // _BYTES | 1].tobytes()
