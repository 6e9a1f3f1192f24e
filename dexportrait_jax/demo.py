"""The whole day in miniature: face videos in, an animated portrait and a report out.

    dexportrait demo --workdir=runs/demo

Every part is one of the ordinary jobs, run as a process of its own with the command that the report shows. What is
done is remembered in `WORKDIR/demo.json`: started again, the demo says what is done and goes on, and a part that
was killed in the middle goes on from its own checkpoint.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from data_pipelines.files import write_json
from dexportrait_jax import assets, demo_report
from dexportrait_jax.errors import UserError

PEOPLE = ("carphone", "pexels_langer", "pyfeat_single")
FRAMES_A_CLIP = 16


@dataclass
class Part:
    """One part of the demo: an ordinary job, and the files that show it is done."""

    name: str
    arguments: list[str]
    made: list[Path] = field(default_factory=list)

    @property
    def command(self) -> str:
        """What a person types to redo it alone."""
        return shlex.join(["dexportrait", *self.arguments])


def plan(workdir: Path) -> list[Part]:
    """Every part in order."""
    data, exports, results = workdir / "data", workdir / "exports", workdir / "results"

    def train(name: str, config: str, *overrides: str) -> Part:
        run = workdir / "runs" / name
        arguments = ["train", f"--config=configs/{config}.py:tiny", f"--workdir={run}"]
        arguments += [f"--config.data.path={data}", *(f"--config.{text}" for text in overrides)]
        return Part(f"train_{name}", arguments, [run / "config.json"])

    def export(name: str) -> Part:
        out = exports / name
        return Part(
            f"export_{name}",
            ["export", f"--workdir={workdir / 'runs' / name}", f"--out={out}", "--overwrite"],
            [out / "model.json"],
        )

    def evaluate(name: str) -> Part:
        out = results / f"{name}_self"
        arguments = ["evaluate", f"--weights={exports / name}", f"--data={data}", "--protocol=self"]
        return Part(
            f"evaluate_{name}", [*arguments, f"--out={out}", "--overwrite"], [out / "metrics.json"]
        )

    encoders = f"init.motion={exports / 'motion'}"
    autoencoder = f"init.autoencoder={exports / 'autoencoder'}"
    clips = workdir / "clips"
    return [
        Part(
            "prepare",
            [
                "prepare",
                f"--videos={workdir / 'inputs' / '*.mp4'}",
                f"--out={data}",
                "--size=64",
                "--holdout=time",
                "--holdout_fraction=0.2",
            ],
            [data],
        ),
        train("motion", "motion"),
        export("motion"),
        evaluate("motion"),
        train("autoencoder", "autoencoder"),
        export("autoencoder"),
        train("image", "animator_image", encoders, autoencoder),
        export("image"),
        train("video", "animator_video", f"init.image={exports / 'image'}"),
        export("video"),
        evaluate("video"),
        Part(
            "animate",
            ["animate", f"--weights={exports / 'video'}", f"--jobs={workdir / 'clips.json'}"],
            [clips / f"{mode}.mp4" for mode in demo_report.MODES],
        ),
    ]


def clip_jobs(workdir: Path) -> list[dict]:
    """The five modes of method.md 7.3 as jobs of `animate`."""
    inputs, clips = workdir / "inputs", workdir / "clips"
    person = {name: str(inputs / f"{name}.mp4") for name in PEOPLE}
    source, other, third = person["pexels_langer"], person["carphone"], person["pyfeat_single"]
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


def clip_command(workdir: Path, mode: str) -> str:
    """What a person types to make one of the five videos again."""
    job = clip_jobs(workdir)[list(demo_report.MODES).index(mode)]
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in job.items()]
    weights = f"--weights={workdir / 'exports' / 'video'}"
    return shlex.join(["dexportrait", "animate", weights, *flags, "--overwrite"])


def run_demo(workdir: str = "runs/demo") -> None:
    """The job `demo`."""
    root = Path(workdir)
    try:
        (root / "clips").mkdir(parents=True, exist_ok=True)
        lock = (root / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write to --workdir={workdir}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another demo is running in {workdir}; wait for it or end it"
            ) from error
        record = _Record(root / "demo.json")
        with record.timed("inputs"):
            _gather_inputs(root / "inputs")
        # Clips that are there are whole: they are renamed into place when they are.
        missing = [job for job in clip_jobs(root) if not Path(job["side_by_side"]).exists()]
        write_json(root / "clips.json", [job | {"overwrite": True} for job in missing])
        parts = plan(root)
        for number, part in enumerate(parts, 1):
            label = f"[{number}/{len(parts)}] {part.name}"
            if record.done(part):
                print(f"{label}: done before, in {record.seconds(part.name):.0f} s", flush=True)
                continue
            print(f"{label}: {part.command}", flush=True)
            _run(part, record)
        with record.timed("report"):
            report = demo_report.write(
                root,
                parts,
                {mode: clip_command(root, mode) for mode in demo_report.MODES},
                record.values,
            )
        print(f"the demo is finished: open {report}")


class _Record:
    """`demo.json`: for each part its seconds, its peak memory, and whether it is done."""

    def __init__(self, path: Path):
        self.path = path
        self.values: dict[str, dict] = {}
        if path.exists():
            self.values = json.loads(path.read_text())

    def done(self, part: Part) -> bool:
        return self.values.get(part.name, {}).get("done", False) and all(
            path.exists() for path in part.made
        )

    def seconds(self, name: str) -> float:
        return self.values.get(name, {}).get("seconds", 0.0)

    def write(self, name: str, seconds: float, memory: float, done: bool) -> None:
        before = self.values.get(name, {}).get("peak_memory_gb", 0.0)
        self.values[name] = {
            "seconds": round(seconds, 1),
            "peak_memory_gb": round(max(before, memory), 2),
            "done": done,
        }
        write_json(self.path, self.values)

    def timed(self, name: str):
        return _Timed(self, name)


class _Timed:
    """Times a part that runs inside this process."""

    def __init__(self, record: _Record, name: str):
        self.record, self.name = record, name

    def __enter__(self):
        self.start = time.monotonic()

    def __exit__(self, kind, *_):
        if kind is None:
            seconds = time.monotonic() - self.start
            self.record.write(self.name, seconds, _memory_gb(os.getpid()), True)


def _gather_inputs(folder: Path) -> None:
    """Puts the talking-head clips where `--videos` finds them, under the names of the people."""
    assets.fetch("face_landmarker")
    folder.mkdir(parents=True, exist_ok=True)
    for person in PEOPLE:
        clip, here = assets.fetch(person), folder / f"{person}.mp4"
        if not here.exists() or here.stat().st_size != clip.stat().st_size:
            temporary = here.with_suffix(".part")
            shutil.copyfile(clip, temporary)
            temporary.replace(here)


def _run(part: Part, record: _Record) -> None:
    """Runs a part as a process, watching its memory; raises UserError with the part's name if it fails."""
    before, start, peak, noted = record.seconds(part.name), time.monotonic(), 0.0, 0.0
    environment = dict(os.environ)
    # Parts with the same program (the five clips, a part that was killed) compile it once.
    environment.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str((record.path.parent / "compilation_cache").absolute())
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "dexportrait_jax", *part.arguments],
        env=environment,
        preexec_fn=_die_with_parent,
    )
    try:
        while (code := process.poll()) is None:
            peak = max(peak, _memory_gb(process.pid))
            seconds = time.monotonic() - start
            if seconds - noted > 5:
                noted = seconds
                record.write(part.name, before + seconds, peak, False)
            time.sleep(0.2)
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise
    record.write(part.name, before + time.monotonic() - start, peak, code == 0)
    if code == 75:
        raise SystemExit(75)
    if code != 0:
        raise UserError(
            f"the part {part.name} ended with code {code}, its own message stands above; "
            "mend that and run the demo again, it goes on from here"
        )


def _die_with_parent() -> None:
    # Killed with SIGKILL, the demo cannot end its parts; the kernel does it (PR_SET_PDEATHSIG = 1).
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _memory_gb(pid: int) -> float:
    """Resident memory of a process and all below it, in GB; shared pages count for each process that holds them."""
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    total = 0
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total / 1e9
