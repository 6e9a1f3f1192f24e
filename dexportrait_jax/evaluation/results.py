"""What an evaluation leaves behind: metrics.json for programs, pictures, and report.html for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipelines import files
from dexportrait_jax.errors import UserError
from dexportrait_jax.evaluation.grid import Grid, draw_grid
from dexportrait_jax.evaluation.report import (
    Quality,
    Report,
    Table,
    Video,
    sample_grid,
    write_png,
    write_report,
)
from dexportrait_jax.evaluation.runner import Picture

RESULT, REPORT, SAMPLES = "metrics.json", "report.html", "samples.png"
HEADLINES = {
    "self": "Self-reenactment: frames of a video from the first in their crop, with their own pose and expression.",
    "cross": "Cross-reenactment: the face of one person, pose and expression of another.",
    "disentangled": "Pose of A, expression of B, face of C; then each of them alone.",
    "synthetic": "Rendered heads: pose of A, expression of B, person C, beside the right answer.",
    "flicker": "Flicker: consecutive frames of a video from the first in their crop; what changes beyond what moves.",
}
ROWS = {
    "self": "Each row: the source, then driving frame and result in turn.",
    "cross": "Each row: the source, then driving frame and result in turn.",
    "disentangled": "Each row: the source, then driver of the pose, driver of the expression and result in turn.",
    "synthetic": "Each row: the source, then driver of the pose, driver of the expression, result and truth in turn.",
    "flicker": "Each row: the source, then true frame, result and, if given, the other model's in turn.",
}
MEANS = {
    "self": "Means over all frames; r and slope are over all frames too, about each clip's own mean.",
    "cross": "Means over all frames in which a face was found, faces_found over all; r and slope are over all "
    "frames too, about each clip's own mean.",
    "disentangled": "Means over all frames in which a face was found, faces_found over all.",
    "synthetic": "PSNR: means over all frames made; shares too, where frames that change more weigh more. Errors of "
    "encoders: means over all frames encoded; gauge_spread_degrees and frontal_spread_degrees: over people.",
    "flicker": "Means over all frames; a warping error is that of a frame and the one before it.",
}
GRIDS = {
    "grid": ("Every face by every driver", "pose and expression"),
    "grid_expression_only": ("Expression alone", "expression; the pose stays the portrait's"),
    "grid_pose_only": ("Pose alone", "pose; the expression stays the portrait's"),
}


@dataclass
class Findings:
    """What a protocol brings: figures over all items (MEANS says how), figures of each item, and pictures."""

    values: dict[str, float | None]
    items: list[dict[str, Any]]
    rows: list[list[Picture]] = field(default_factory=list)  # of the items that are shown
    grids: dict[str, Grid] = field(default_factory=dict)  # by a name of GRIDS


def check_replaceable(out: Path, overwrite: bool) -> None:
    """Raises UserError, before any work is done, unless an evaluation may and can be written at ``out``."""
    if files.already_there(out, "an evaluation", _is_evaluation) and not overwrite:
        raise UserError(f"--out={out} holds an evaluation already; add --overwrite to replace it")
    files.check_destination(out, "evaluation")


def _is_evaluation(directory: Path) -> bool:
    return all((directory / name).is_file() for name in (RESULT, REPORT))


def write_results(out: Path, about: Mapping[str, Any], found: Findings) -> dict[str, Any]:
    """Writes all files into the directory ``out``, whole or not at all; returns what metrics.json says.

    ``about``: what the figures are of: protocol, split, stage, weights_sha256, sampling, frames, seconds.
    """
    grids = {name: grid.described() for name, grid in found.grids.items()}
    result = {**about, **found.values, **({"grids": grids} if grids else {}), "items": found.items}
    with files.whole_directory(out) as directory:
        (directory / RESULT).write_text(json.dumps(result, indent=2) + "\n")
        write_png(directory / SAMPLES, sample_grid(found.rows))
        for name, grid in found.grids.items():
            write_png(directory / f"{name}.png", draw_grid(grid))
        write_report(directory / REPORT, _page(directory, result, found))
    return result


def grid_picture(path: Path, name: str, more: str) -> Video:
    """A grid's picture with the words that explain it, and ``more`` words."""
    title, driven = GRIDS[name]
    note = (
        f"Left column: the portraits. Top row: frames of the drivers, who give {driven}. Framed cells: the portrait's "
        f"own video drives it. {more}"
    )
    return Video(path, title, note)


def following_table(models: Mapping[str, Mapping[str, float | None]]) -> Table:
    """How far eyes and mouth follow the driver: two rows for each model, from the keys of metrics.json."""
    columns = ("r_control", "r", "r_ceiling", "slope", "slope_ceiling")
    rows = [
        (
            f"{model}: {part}" if model else part,
            *(_figure(values[f"{part}_{name}"]) for name in columns),
        )
        for model, values in models.items()
        for part in ("mouth", "eyes")
    ]
    return Table(
        "Eyes and mouth follow the driver",
        (
            "",
            "r, source's expression",
            "r, driver's expression ↑",
            "r, driver's own pictures",
            "slope, driver's expression",
            "slope, driver's own pictures",
        ),
        rows,
        "r: correlation of how far mouth and eyes are open in driver and result, over the frames of each clip. The "
        "source's expression in the driver's poses is what turning the head does alone; the driver's own pictures are "
        "the most that the measuring instrument sees at this size. Slope 1: the result opens as far as the driver.",
    )


def _page(directory: Path, result: Mapping[str, Any], found: Findings) -> Report:
    protocol, values = result["protocol"], found.values
    facts = []
    if protocol == "self":
        gain = values["psnr"] - values["psnr_copy"]
        facts.append((f"{gain:+.1f} dB", "PSNR over repeating the source"))
    if values.get("expression_use_db") is not None:
        facts.append(
            (
                f"{values['expression_use_db']:+.1f} dB",
                "round eyes and mouth, from the driver's expression",
            )
        )
    for part in ("mouth", "eyes"):
        if values.get(f"{part}_r") is not None:
            facts.append((_figure(values[f"{part}_r"]), f"correlation of {part} with the driver's"))
    tables = [following_table({"": values})] if "mouth_r" in values else []
    if values.get("faces_found") is not None:
        facts.append((f"{values['faces_found']:.0%}", "of the results show a face to the detector"))
    rows = [(name, _figure(value)) for name, value in values.items()]
    return Report(
        title=f"dexportrait evaluate, {result['split']} split",
        headline=HEADLINES[protocol],
        facts=facts,
        grids=[
            grid_picture(directory / f"{name}.png", name, _people(grid))
            for name, grid in found.grids.items()
        ],
        pictures=[Video(directory / SAMPLES, f"{len(found.items)} items", ROWS[protocol])],
        quality=[Quality(result["stage"], values)] if protocol == "self" else [],
        tables=[
            *tables,
            Table(
                "All figures",
                ("key", "value"),
                rows,
                f"{MEANS[protocol]} By item in metrics.json.",
            ),
        ],
        provenance=f"Everything beside sources and drivers is synthetic, made by weights {result['weights_sha256']}.",
    )


def _people(grid: Grid) -> str:
    drivers = ", ".join(f"{clip} frame {frame}" for clip, frame in grid.driver_frames)
    return f"Portraits: {', '.join(grid.source_clips)}. Drivers: {drivers}."


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
