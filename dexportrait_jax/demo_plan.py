"""What the demo does: its parts in order, and the five videos it makes, as the commands of ordinary jobs."""

from __future__ import annotations

import glob
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from dexportrait_jax import demo_report, provenance

PEOPLE = ("carphone", "pexels_langer", "pyfeat_single")
FRAMES_A_CLIP = 64


@dataclass
class Part:
    """One part of the demo: an ordinary job, and the files that show it is done.

    `arguments` are what the demo runs. `redo` does the part again, alone, and leaves what the others made: it
    overwrites, or trains beside the run that is there.
    """

    name: str
    arguments: list[str]
    made: list[Path] = field(default_factory=list)
    redo: list[str] = field(default_factory=list)

    @property
    def command(self) -> str:
        """What a person types to do it again alone."""
        return shlex.join(["dexportrait", *(self.redo or self.arguments)])


def plan(workdir: Path) -> list[Part]:
    """Every part in order."""
    data, exports, results = workdir / "data", workdir / "exports", workdir / "results"

    def train(name: str, config: str, *overrides: str) -> Part:
        run = workdir / "runs" / name
        settings = [f"--config.{text}" for text in (f"data.path={data}", *overrides)]
        first, again = (
            ["train", f"--config=configs/{config}.py:tiny", f"--workdir={place}", *settings]
            for place in (run, run.with_name(f"{name}_again"))
        )
        return Part(f"train_{name}", first, [run / "config.json"], again)

    def export(name: str) -> Part:
        out = exports / name
        return Part(
            f"export_{name}",
            ["export", f"--workdir={workdir / 'runs' / name}", f"--out={out}", "--overwrite"],
            [out / "model.json"],
        )

    def evaluate(name: str, protocol: str) -> Part:
        out = results / f"{name}_{protocol}"
        arguments = ["evaluate", f"--weights={exports / name}", f"--data={data}"]
        arguments += [f"--protocol={protocol}", f"--out={out}", "--overwrite"]
        return Part(f"evaluate_{name}_{protocol}", arguments, [out / "metrics.json"])

    encoders = f"init.motion={exports / 'motion'}"
    autoencoder = f"init.autoencoder={exports / 'autoencoder'}"
    prepare = [
        "prepare",
        f"--videos={glob.escape(str(workdir / 'inputs'))}/*.mp4",
        f"--out={data}",
        "--size=64",
        "--face_scale=1.6",  # at 64 pixels a face needs all of them
        "--holdout=time",
        "--holdout_fraction=0.2",
    ]
    animate = ["animate", f"--weights={exports / 'video'}"]
    return [
        Part("prepare", prepare, [data], [*prepare, "--overwrite"]),
        train("motion", "motion"),
        export("motion"),
        evaluate("motion", "self"),
        evaluate("motion", "cross"),
        train("autoencoder", "autoencoder"),
        export("autoencoder"),
        train("image", "animator_image", encoders, autoencoder),
        export("image"),
        train("video", "animator_video", f"init.image={exports / 'image'}"),
        export("video"),
        evaluate("video", "self"),
        Part(
            "animate",
            [*animate, f"--jobs={workdir / 'clips_missing.json'}", "--overwrite"],
            [path for job in clip_jobs(workdir) for path in clip_files(job)],
            [*animate, f"--jobs={workdir / 'clips.json'}", "--overwrite"],
        ),
    ]


def clip_jobs(workdir: Path) -> list[dict]:
    """The five modes of method.md 7.3 as jobs of `animate`."""
    inputs, clips = workdir / "inputs", workdir / "clips"
    person = {name: str(inputs / f"{name}.mp4") for name in PEOPLE}
    source, other, third = (person[name] for name in ("pyfeat_single", "carphone", "pexels_langer"))
    modes = {
        "self": {"source": source, "driving": source},
        "cross": {"source": source, "driving": other, "relative_pose": "all"},
        "disentangled": {
            "source": source,
            "pose": other,
            "expression": third,
            "relative_pose": "all",
        },
        "expression_only": {"source": source, "expression": third, "paste_back": True},
        "pose_only": {"source": source, "pose": other, "relative_pose": "all"},
    }
    return [
        flags
        | {
            "out": str(clips / f"{mode}.mp4"),
            "side_by_side": str(clips / f"{mode}_side_by_side.mp4"),
            "max_frames": FRAMES_A_CLIP,
        }
        for mode, flags in modes.items()
    ]


def clip_files(job: dict) -> list[Path]:
    """What one job of `animate` makes; each is there whole or not at all, and the sidecar comes last."""
    return [Path(job["out"]), Path(job["side_by_side"]), provenance.sidecar_path(job["out"])]


def clip_command(workdir: Path, mode: str) -> str:
    """What a person types to make one of the five videos again."""
    job = clip_jobs(workdir)[list(demo_report.MODES).index(mode)]
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in job.items()]
    weights = f"--weights={workdir / 'exports' / 'video'}"
    return shlex.join(["dexportrait", "animate", weights, *flags, "--overwrite"])
