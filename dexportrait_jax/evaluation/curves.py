"""Loss curves as inline SVG: small, sharp at any size, without a plotting library or a script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from dexportrait_jax.metrics import read_rows

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 12, 24
MOST_POINTS = 240
LOG_RANGE = 12.0  # values that span more than this factor are drawn on a logarithmic axis


@dataclass(frozen=True)
class Curve:
    """One quantity over the steps of a training stage."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


def read_curves(path: str | Path, names: Sequence[str] | None = None) -> list[Curve]:
    """Curves from a run's metrics.jsonl.

    ``names`` chooses and orders them (those that are absent are left out); None takes every number
    but times and rates. Missing measurements (null) are left out.
    """
    columns: dict[str, tuple[list[float], list[float]]] = {}
    for row in read_rows(Path(path)):
        for name, value in row.items():
            if name == "step" or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            steps, values = columns.setdefault(name, ([], []))
            steps.append(row["step"])
            values.append(value)
    if names is None:
        skipped = ("time", "second", "per_sec", "rate", "memory", "mfu")
        names = [name for name in columns if not any(word in name for word in skipped)]
    return [Curve(name, *columns[name]) for name in names if name in columns]


def smoothed(values: Sequence[float], window: float) -> np.ndarray:
    """Exponential mean over about ``window`` points, without the bias of its start."""
    decay = 1 - 1 / max(1.0, window)
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean = decay * mean + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        out.append(mean / weight)
    return np.array(out)


def curve_svg(curve: Curve, *, colour: str = "#2f6f6d") -> str:
    """One curve as an `<svg>`: points pale, running mean strong, logarithmic where it helps."""
    steps, values = np.asarray(curve.steps, float), np.asarray(curve.values, float)
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if len(values) == 0:
        return ""
    trend = smoothed(values, len(values) / 60)
    low, high = float(values.min()), float(values.max())
    logarithmic = low > 0 and high / low > LOG_RANGE
    to_axis = np.log10 if logarithmic else np.asarray
    # a few wild points at the start must not squash the rest of the curve
    bottom, top = np.percentile(to_axis(values), [0.5, 99.5])
    bottom, top = (
        min(bottom, to_axis(trend).min()),
        max(top, to_axis(trend[len(trend) // 50 :]).max()),
    )
    if top - bottom < 1e-12:
        bottom, top = bottom - 0.5, top + 0.5
    pad = 0.05 * (top - bottom)
    bottom, top = bottom - pad, top + pad
    first, last = float(steps[0]), float(steps[-1]) if steps[-1] > steps[0] else float(steps[0]) + 1

    def x(step):
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value):
        part = (np.clip(value, bottom, top) - bottom) / (top - bottom)
        return HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)

    keep = np.unique(np.linspace(0, len(steps) - 1, MOST_POINTS).astype(int))

    def line(series):
        return " ".join(f"{x(steps[i]):.1f},{y(series[i]):.1f}" for i in keep)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(curve.name)} over {len(values)} logged steps, last {trend[-1]:.4g}">'
    ]
    for tick in _log_ticks(bottom, top) if logarithmic else _ticks(bottom, top, 4):
        height = y(tick)
        label = _number(10**tick if logarithmic else tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" '
            f'y1="{height:.1f}" y2="{height:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{height + 3.5:.1f}" text-anchor="end">{label}</text>'
        )
    for tick in _ticks(first, last, 4):
        parts.append(
            f'<text x="{x(tick):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{_number(tick)}</text>'
        )
    parts.append(
        f'<polyline points="{line(to_axis(values))}" fill="none" stroke="{colour}" opacity=".25"/>'
        f'<polyline points="{line(to_axis(trend))}" fill="none" stroke="{colour}" stroke-width="2" '
        'stroke-linejoin="round"/></svg>'
    )
    return "".join(parts)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers in [low, high], about ``count`` of them."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    start = math.ceil(low / step)
    return [index * step for index in range(start, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Decades in [low, high] (exponents); with 2 and 5 between where there are few."""
    factors = (1, 2, 5) if high - low < 2 else (1,)
    decades = range(math.floor(low), math.ceil(high) + 1)
    ticks = [decade + math.log10(factor) for decade in decades for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]


def _number(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{round(value, 10):.3g}" if abs(value) < 1000 else f"{value:.0f}"
