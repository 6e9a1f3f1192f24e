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
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from data_pipelines.files import write_json, writing_to
from dexportrait_jax import assets, demo_report
from dexportrait_jax.config import PROJECT_ROOT
from dexportrait_jax.demo_plan import PEOPLE, Part, clip_command, clip_files, clip_jobs, plan
from dexportrait_jax.errors import UserError

MODELS = ("face_landmarker", "lpips_alexnet")  # assets that the parts look for themselves
STOPPED, INTERRUPTED = 75, 130  # exit codes after SIGTERM and after Ctrl-C


def run_demo(workdir: str = "runs/demo") -> None:
    """The job `demo`."""
    root = Path(workdir)
    try:
        with _claimed(root), _stopped_by_sigterm():
            _run_all(root)
    except (KeyboardInterrupt, SystemExit) as stop:
        print(
            "dexportrait demo: stopped; start the same command again to go on",
            file=sys.stderr,
            flush=True,
        )
        code = stop.code if isinstance(stop, SystemExit) else INTERRUPTED
        raise SystemExit(code) from None


def _run_all(root: Path) -> None:
    record, parts, jobs = _Record(root / "demo.json"), plan(root), clip_jobs(root)
    if not all(record.done(part) for part in parts):
        start = time.monotonic()
        if _gather_inputs(root / "inputs") or not record.seconds("inputs"):
            record.write("inputs", time.monotonic() - start, _memory_gb(os.getpid()), True)
    with writing_to(root):
        write_json(root / "clips.json", jobs)  # all of them: it is for people
    for number, part in enumerate(parts, 1):
        label = f"[{number}/{len(parts)}] {part.name}"
        if part.name == "animate" and not record.done(part):
            missing = [job for job in jobs if not all(path.exists() for path in clip_files(job))]
            if not missing:  # killed between its last file and its end
                record.write(part.name, record.seconds(part.name), 0.0, True)
            with writing_to(root):
                write_json(root / "clips_missing.json", missing)
        if record.done(part):
            print(f"{label}: done before, in {record.seconds(part.name):.0f} s", flush=True)
            continue
        print(f"{label}: {shlex.join(['dexportrait', *part.arguments])}", flush=True)
        _run(part, record)
    start = time.monotonic()
    commands = {mode: clip_command(root, mode) for mode in demo_report.MODES}
    with writing_to(root / "summary.json"):
        report = demo_report.write(root, parts, commands, record.values)
    record.write("report", time.monotonic() - start, _memory_gb(os.getpid()), True)
    print(f"the demo is finished: open {report}")


@contextlib.contextmanager
def _claimed(root: Path) -> Iterator[None]:
    """Holds the directory for this process alone."""
    with contextlib.ExitStack() as stack:
        with writing_to(root):
            root.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((root / ".lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another demo is running in {root}; wait for it or end it") from None
        yield


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM unwinds the demo as Ctrl-C does, so that the running part is ended and can save."""

    def stop(*_):
        raise SystemExit(STOPPED)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: somebody else's program, somebody else's signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Record:
    """`demo.json`: for each part its seconds, its peak memory, and whether it is done."""

    def __init__(self, path: Path):
        self.path = path
        self.values: dict[str, dict] = {}
        if path.exists():
            try:
                self.values = json.loads(path.read_text())
            except ValueError as error:
                raise UserError(
                    f"{path} is damaged ({error}); remove it, and what is done is found again"
                ) from error

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
        with writing_to(self.path):
            write_json(self.path, self.values)


def _gather_inputs(folder: Path) -> bool:
    """Fetches all that the parts need, and puts the clips where `--videos` finds them.

    Returns whether anything was not here already. Whole copies are left alone: a dataset knows its videos by
    their times too.
    """
    new = False
    for name in MODELS:
        new |= assets.find(name) is None
        assets.fetch(name)
    for person in PEOPLE:
        here = folder / f"{person}.mp4"
        if here.exists() and _sha256(here) == assets.ASSETS[person].sha256:
            continue
        clip, new = assets.fetch(person), True
        with writing_to(here):
            folder.mkdir(exist_ok=True)
            temporary = here.with_suffix(".part")
            shutil.copyfile(clip, temporary)
            temporary.replace(here)
    return new


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _executed(arguments: list[str]) -> list[str]:
    """The arguments with the project's own configs, whatever lies under their names where we are."""
    own = f"--config={PROJECT_ROOT}/configs/"
    return [text.replace("--config=configs/", own, 1) for text in arguments]


def _run(part: Part, record: _Record) -> None:
    """Runs a part as a process, watching its memory; raises UserError with the part's name if it fails."""
    before, start, peak, noted = record.seconds(part.name), time.monotonic(), 0.0, 0.0
    environment = dict(os.environ)
    # Parts with the same program (the five clips, a part that was killed) compile it once.
    environment.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str((record.path.parent / "compilation_cache").absolute())
    )
    # Large pages, where the system leaves the choice: every step takes some 400 MB of fresh memory.
    environment.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    process = subprocess.Popen(
        # -P: a folder named like one of our packages, where we are, is none of ours.
        [sys.executable, "-P", "-m", "dexportrait_jax", *_executed(part.arguments)],
        env=environment,
        preexec_fn=_bound_to_parent,
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
        _end(process)
        raise
    record.write(part.name, before + time.monotonic() - start, peak, code == 0)
    if code == STOPPED:
        raise SystemExit(STOPPED)
    if code != 0:
        raise UserError(
            f"the part {part.name} ended with code {code}, its own message stands above; "
            "mend that and run the demo again, it goes on from here"
        )


def _end(process: subprocess.Popen) -> None:
    """Lets a part save and end; asked a second time, it does not wait for that."""
    process.terminate()
    try:
        process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise


def _bound_to_parent() -> None:
    # Killed with SIGKILL, the demo cannot end its parts; the kernel does it (PR_SET_PDEATHSIG = 1).
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    # A terminal sends Ctrl-C to parts too, which would die without saving; the demo sends them SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
