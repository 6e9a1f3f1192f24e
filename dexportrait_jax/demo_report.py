"""What the demo shows at its end: `summary.json` for programs and `report.html` for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_pipelines.files import write_json
from dexportrait_jax import driving
from dexportrait_jax.evaluation.curves import read_curves
from dexportrait_jax.evaluation.report import Quality, Report, Stage, Video, write_report
from dexportrait_jax.evaluation.results import following_table, grid_picture

MODES = {
    "self": ("Self-reenactment", "pose and expression of the same person"),
    "cross": ("Cross-reenactment", "pose and expression of another person"),
    "disentangled": ("Pose of A, expression of B", "two drivers, neither of them the portrait"),
    "expression_only": ("Expression only", "the pose stays; pasted back into the full picture"),
    "pose_only": ("Pose only", "the expression stays"),
}
CURVES = {
    "train_motion": (
        "generator/loss",
        "generator/l1",
        "generator/lpips",
        "generator/clpips",
        "generator/adversarial",
        "discriminator/loss",
    ),
    "train_autoencoder": ("autoencoder/loss", "autoencoder/psnr"),
    "train_image": ("denoise/loss",),
    "train_video": ("denoise/loss",),
}
QUALITY_KEYS = ("psnr", "psnr_copy", "ssim", "lpips", "lpips_copy")
LIMITS = (
    "Three people and minutes of training on a CPU at 64 pixels: this shows that every part works together, "
    "not what the method can do. The full sizes are in configs/*.py:full.",
    "The figures are on the last fifth of every clip, which was not trained on, from the clip's first frame as the "
    "source, which was: the people are known, the measured frames are not.",
    "Pose and expression of people it was not trained on will not be followed well by a model of this size.",
)


def write(
    workdir: Path, parts: list, clip_commands: dict[str, str], record: dict[str, dict[str, Any]]
) -> Path:
    """Writes summary.json and report.html into `workdir` and returns the report's path.

    Args:
      workdir: of the demo.
      parts: the demo's parts, with name and command.
      clip_commands: mode -> the command that makes its video again.
      record: part -> seconds and peak_memory_gb.
    """
    summary = summarize(workdir, record)
    write_json(workdir / "summary.json", summary)
    motion, animator = summary["motion"], summary["animator"]
    minutes = sum(summary["seconds"].values()) / 60
    report = Report(
        title="dexportrait demo",
        headline="From face videos to an animated portrait: pose and expression, each from its own driver.",
        facts=[
            (f"{minutes:.1f} min", "all parts together"),
            (f"{summary['peak_memory_gb']:.1f} GB", "peak memory"),
            (
                f"{motion['psnr'] - motion['psnr_copy']:+.1f} dB",
                "motion trainer over repeating the source",
            ),
            (
                f"{animator['psnr'] - animator['psnr_copy']:+.1f} dB",
                "animator over repeating the source",
            ),
        ],
        videos=[
            Video(
                workdir / "clips" / f"{mode}_side_by_side.mp4",
                title,
                note,
                panels=driving.PANELS[mode],
                command=clip_commands[mode],
            )
            for mode, (title, note) in MODES.items()
        ],
        grids=[
            grid_picture(
                workdir / "results" / "motion_cross" / "grid.png", "grid", "Motion trainer."
            )
        ],
        pictures=_pictures(workdir),
        quality=[
            Quality("Motion trainer", motion, "one forward pass"),
            Quality("Animator", animator, "DDIM with progressive hybrid guidance"),
        ],
        tables=[
            following_table(
                {
                    "motion trainer": _metrics(workdir, "motion"),
                    "animator": _metrics(workdir, "video"),
                }
            )
        ],
        stages=[
            Stage(
                part.name.replace("_", " "),
                record[part.name]["seconds"],
                record[part.name]["peak_memory_gb"],
                part.command,
                _curves(workdir, part.name),
            )
            for part in parts
        ],
        limits=LIMITS,
        provenance="Every video made here is synthetic and says so in its metadata: dexportrait inspect VIDEO "
        "prints by what and with which weights it was made. The clips of real people come from published packages "
        "under the licences that dexportrait assets lists.",
    )
    return write_report(workdir / "report.html", report)


def summarize(workdir: Path, record: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The content of summary.json."""

    def quality(name: str) -> dict[str, float]:
        values = _metrics(workdir, name)
        return {key: values[key] for key in QUALITY_KEYS}

    artifacts = {
        "report": workdir / "report.html",
        "dataset": workdir / "data",
        "motion_weights": workdir / "exports" / "motion",
        "animator_weights": workdir / "exports" / "video",
        **{f"video_{mode}": workdir / "clips" / f"{mode}.mp4" for mode in MODES},
    }
    return {
        "motion": quality("motion"),
        "animator": quality("video"),
        "seconds": {name: values["seconds"] for name, values in record.items()},
        "peak_memory_gb": max(values["peak_memory_gb"] for values in record.values()),
        "artifacts": {name: str(path) for name, path in artifacts.items()},
    }


def _metrics(workdir: Path, name: str) -> dict[str, Any]:
    return json.loads((workdir / "results" / f"{name}_self" / "metrics.json").read_text())


def _pictures(workdir: Path) -> list[Video]:
    titles = {
        "motion_self": "Motion trainer, frames it was not trained on",
        "video_self": "Animator, frames it was not trained on",
    }
    found = [(workdir / "results" / name / "samples.png", title) for name, title in titles.items()]
    return [Video(path, title) for path, title in found if path.exists()]


def _curves(workdir: Path, part: str) -> list:
    if part not in CURVES:
        return []
    run = workdir / "runs" / part.removeprefix("train_")
    return read_curves(run / "metrics.jsonl", CURVES[part])
