"""Progressive hybrid guidance (method.md 7.2) as a static plan: for every step which branches run and their weights.

The first S steps follow pose and identity only, the next S hand over to all conditions, the rest follow everything.
Every reading is a linear combination of a few branches, so a plan is a table of coefficients.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal

Branch = Literal["null", "expression", "reduced", "full"]
Reading = Literal["hybrid", "expression_in_both", "three_scale"]

# null: nothing; expression: the expression alone; reduced: all but the expression; full: all.
BRANCHES: tuple[Branch, ...] = ("null", "expression", "reduced", "full")


@dataclasses.dataclass(frozen=True)
class GuidanceStep:
    """The branches of one denoising step and the coefficient of each; the coefficients sum to 1."""

    branches: tuple[Branch, ...]
    coefficients: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class GuidancePlan:
    """The steps in the order they run."""

    steps: tuple[GuidanceStep, ...]

    @property
    def passes(self) -> int:
        """Denoiser passes per frame."""
        return sum(len(step.branches) for step in self.steps)

    @property
    def segments(self) -> list[tuple[int, int, tuple[Branch, ...]]]:
        """Runs of steps with the same branches: (first, behind the last, branches)."""
        found, start = [], 0
        for branches, group in itertools.groupby(self.steps, key=lambda step: step.branches):
            stop = start + len(list(group))
            found.append((start, stop, branches))
            start = stop
        return found


def alpha(k: int, steps: int, hold: int) -> float:
    """Share of the expression-free term at the step that counts down from ``steps`` to 1."""
    if hold == 0:
        return 0.0
    return min(max((k - (steps - 2 * hold)) / hold, 0.0), 1.0)


def guidance_plan(
    steps: int = 35,
    *,
    scale: float = 2.5,
    hold: int = 5,
    reading: Reading = "hybrid",
    expression_scale: float | None = None,
) -> GuidancePlan:
    """The plan of a whole sampling run.

    Args:
        steps: N, number of DDIM steps.
        scale: w of classifier-free guidance; 1 runs no unconditional branch.
        hold: S; 0 is ordinary guidance.
        reading: "hybrid", (1-w) null + w (alpha reduced + (1-alpha) full);
            "expression_in_both", the first steps keep the expression in both terms without
            amplifying it: (1-w) (alpha expression + (1-alpha) null) + w full;
            "three_scale", null + w (reduced - null) + g (full - reduced), g = (1-alpha) expression_scale.
        expression_scale: for "three_scale"; None means ``scale``, which equals "hybrid".

    Raises:
        ValueError: 2S above N, or an unknown reading.
    """
    if hold < 0 or 2 * hold > steps:
        raise ValueError(f"hold {hold} must lie between 0 and half of the {steps} steps")
    plan = []
    for k in range(steps, 0, -1):
        share = alpha(k, steps, hold)
        if reading == "hybrid":
            weights = {
                "null": 1 - scale,
                "reduced": scale * share,
                "full": scale * (1 - share),
            }
        elif reading == "expression_in_both":
            weights = {
                "null": (1 - scale) * (1 - share),
                "expression": (1 - scale) * share,
                "full": scale,
            }
        elif reading == "three_scale":
            top = (1 - share) * (scale if expression_scale is None else expression_scale)
            weights = {"null": 1 - scale, "reduced": scale - top, "full": top}
        else:
            raise ValueError(
                f"guidance reading {reading!r} is none of hybrid, expression_in_both, three_scale"
            )
        used = {branch: weight for branch, weight in weights.items() if weight != 0.0}
        plan.append(GuidanceStep(tuple(used), tuple(used.values())))
    return GuidancePlan(tuple(plan))
