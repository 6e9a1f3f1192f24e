"""Each control alone, on rendered heads: what is driven should follow, what is not driven should stay.

For a control that decides between two pictures, such as a person in A's pose with their own expression or with A's,
the renderer draws both. How far a result lies from the one towards the other, in pixels, is the share of the driver
that it has taken on: 1 follows, 0 stays. A result that shows neither, a blur of both, lies near 0.5.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8

from dexportrait_jax.evaluation.runner import Frames


class Shares:
    """Shares by name, over any number of frames; frames where the two pictures differ more weigh more."""

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}  # (along . along, along . made)

    def add(
        self,
        name: str,
        made: Frames,
        stays: Frames,
        follows: Frames,
        masks: UInt8[np.ndarray, "frames h w"] | None = None,
    ) -> None:
        """Results, and the true pictures where the control is not and is followed.

        ``masks``: where it shows (not 0), such as eyes and mouth; None: everywhere.
        """
        start = stays.astype(np.float64)
        along, done = follows - start, made - start
        if masks is not None:
            along = along * (masks > 0)[..., None]
        sums = np.array([np.sum(along * along), np.sum(along * done)])
        self._sums[name] = self._sums.get(name, 0) + sums

    def values(self) -> dict[str, float | None]:
        """Name -> share; None where no frame shows a difference."""
        return {
            name: float(follows / whole) if whole > 0 else None
            for name, (whole, follows) in self._sums.items()
        }
