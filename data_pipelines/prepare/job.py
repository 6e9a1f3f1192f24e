"""The job `prepare`: face videos -> a dataset, with a verdict on every video.

Videos are looked at on all cores, one landmarker a process. What is done is kept in a hidden folder
beside the result, so an interrupted job goes on where it was; the dataset itself appears whole.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from data_pipelines import files, records
from data_pipelines.prepare import clips as clip_making
from data_pipelines.prepare import crop, detect, filters
from dexportrait_jax.errors import UserError

HOLDOUTS = ("identity", "time")
REPORT, MADE_WITH = "drop_report.json", "prepare.json"
_CACHE_VERSION = 1  # raise when the same video and settings would give other clips


def run_prepare(
    videos: str,
    out: str | os.PathLike,
    *,
    size: int = 512,
    holdout: str = "identity",
    holdout_fraction: float = 0.1,
    holdout_gap: int = 5,
    max_frames: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    landmarker_path: str | os.PathLike | None = None,
    identity: str | None = None,
    settings: crop.Settings | None = None,
) -> None:
    """Makes a dataset of face videos.

    Args:
        videos: glob pattern (`**` for any depth); several ones separated by commas.
        out: directory of the dataset.
        size: side of the stored frames in pixels.
        holdout: what validation keeps: "identity", some people chosen by a hash of their name, or
            "time", the end of every clip.
        holdout_fraction: how much of it.
        holdout_gap: frames left out between training and validation with holdout="time".
        max_frames: frames to read of each video; None for all.
        workers: processes; None for one a core.
        overwrite: replace a dataset that is there.
        landmarker_path: `face_landmarker.task`; None for the fetched asset.
        identity: regular expression searched in each path, with groups named identity, session and
            camera (all optional); without it every video is a person of its own.
        settings: further constants of crop and filters; `size` overrides theirs.

    Raises:
        UserError: no video matches, none can be used, or the result cannot be written.
    """
    paths = _matching(videos)
    if holdout not in HOLDOUTS:
        raise UserError(f"--holdout is '{holdout}'; it must be one of {', '.join(HOLDOUTS)}")
    if not 0 <= holdout_fraction < 1:
        raise UserError(
            f"--holdout_fraction is {holdout_fraction}; it must be from 0 up to below 1"
        )
    if not 16 <= size <= 4096:
        raise UserError(f"--size is {size}; it must lie between 16 and 4096 pixels")
    if max_frames is not None and max_frames < 1:
        raise UserError(f"--max_frames is {max_frames}; it must be at least 1")
    names = _naming(paths, identity)
    settings = dataclasses.replace(settings or crop.Settings(), size=size)
    made_with = {
        "videos": {name.name: _fingerprint(path) for path, name in zip(paths, names, strict=True)},
        "holdout": [holdout, holdout_fraction, holdout_gap],
        "max_frames": max_frames,
        "identity": identity,
        "settings": dataclasses.asdict(settings),
    }
    out = Path(out).absolute()
    if not overwrite and _finished(out, made_with):
        return
    landmarker_path = _landmarker(landmarker_path)

    work = out.with_name(f".{out.name}.work")
    with files.writing_to(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir(exist_ok=True)
    with _alone(work):
        started = time.monotonic()
        jobs = [
            _Job(
                os.fspath(path),
                name,
                settings,
                max_frames,
                work / f"{_key(path, name, settings, max_frames)}.clips",
            )
            for path, name in zip(paths, names, strict=True)
        ]
        verdicts = _process(jobs, os.fspath(landmarker_path), workers or _cores())
        _print_funnel(verdicts)
        kept = [job for job, verdict in zip(jobs, verdicts, strict=True) if verdict.kept]
        if not kept:
            shutil.rmtree(work, ignore_errors=True)
            first = verdicts[0]
            raise UserError(
                f"none of {len(jobs)} video(s) can be used; {Path(first.source).name}: {first.reason}; "
                "give videos of one person whose face is in view"
            )
        splits = _splits([job.result for job in kept], holdout, holdout_fraction, holdout_gap)
        report = json.dumps(
            {"funnel": _funnel(verdicts), "videos": [verdict.as_dict() for verdict in verdicts]},
            indent=1,
        )
        from data_pipelines.prepare import builder  # needs TFDS, which reading does not

        builder.write_dataset(
            splits,
            out,
            reports={REPORT: report, MADE_WITH: json.dumps(made_with, indent=1)},
            overwrite=overwrite,
        )
        shutil.rmtree(work, ignore_errors=True)
    _say(f"{out}: {_contents(out)}, made in {time.monotonic() - started:.0f} s")


@dataclasses.dataclass(frozen=True)
class _Job:
    """One video to look at; `result` is the file its clips go to."""

    path: str
    naming: clip_making.Naming
    settings: crop.Settings
    max_frames: int | None
    result: Path


# --- what to do -----------------------------------------------------------------------------------


def _matching(pattern: str) -> list[Path]:
    found = {
        Path(path)
        for part in str(pattern).split(",")
        for path in glob.glob(os.path.expanduser(part.strip()), recursive=True)  # noqa: PTH207
        if Path(path).is_file()
    }
    if not found:
        raise UserError(
            f"no video matches {pattern}; put the pattern in quotes, such as --videos='clips/*.mp4'"
        )
    return sorted(found)


def _naming(paths: list[Path], pattern: str | None) -> list[clip_making.Naming]:
    """Keys of every video; names are stems, with the folder before them where two are alike."""
    try:
        expression = re.compile(pattern) if pattern else None
    except re.error as error:
        raise UserError(f"--identity is not a regular expression: {error}") from error
    stems = collections.Counter(path.stem for path in paths)
    names = []
    for path in paths:
        name = path.stem
        if stems[name] > 1:
            digest = hashlib.sha256(os.fspath(path.absolute()).encode()).hexdigest()[:6]
            name = f"{path.absolute().parent.name}-{path.stem}-{digest}"
        groups: Mapping[str, str | None] = {}
        if expression:
            match = expression.search(os.fspath(path))
            if not match:
                raise UserError(
                    f"--identity={pattern} does not match {path}; correct the expression"
                )
            groups = match.groupdict()
        names.append(
            clip_making.Naming(
                name=name,
                identity=groups.get("identity") or path.stem,
                session=groups.get("session") or name,
                camera=groups.get("camera") or "0",
            )
        )
    return names


def _fingerprint(path: Path) -> str:
    """Changes whenever the file does; the content itself would take as long to read as to use."""
    status = path.stat()
    text = f"{path.absolute()} {status.st_size} {status.st_mtime_ns}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _key(path, naming, settings, max_frames) -> str:
    parts = [_CACHE_VERSION, _fingerprint(path), dataclasses.asdict(naming)]
    parts += [dataclasses.asdict(settings), max_frames]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _finished(out: Path, made_with: dict) -> bool:
    """Whether the very dataset is there; anything else in its place is an error."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not out.is_dir():
        raise UserError(f"{out} is a file; choose another --out")
    try:
        before = json.loads((out / MADE_WITH).read_text())
    except (OSError, ValueError):
        raise UserError(
            f"{out} holds something else than a dataset; choose another --out or pass --overwrite"
        ) from None
    if before == json.loads(json.dumps(made_with)):
        _say(
            f"{out}: already prepared, {_contents(out)}; nothing to do (--overwrite makes it anew)"
        )
        return True
    changed = ", ".join(
        key for key in made_with if before.get(key) != json.loads(json.dumps(made_with[key]))
    )
    raise UserError(
        f"{out} is a dataset made with other {changed}; choose another --out or pass --overwrite"
    )


def _contents(out: Path) -> str:
    from data_pipelines import dataset

    parts = []
    for split in dataset.split_names(out):
        frames = dataset.ClipDataset(out, split).frames
        parts.append(f"{split} {len(frames)} clips, {frames.sum()} frames")
    return "; ".join(parts)


def _landmarker(path: str | os.PathLike | None) -> Path:
    if path is None:
        from dexportrait_jax import assets

        path = assets.fetch("face_landmarker")
    if not Path(path).is_file():
        raise UserError(f"no face landmarker at {path}; `dexportrait assets --fetch` gets it")
    return Path(path)


@contextlib.contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Two jobs for one dataset would spoil each other's work."""
    lock = work.with_name(f"{work.name}.lock")
    with files.writing_to(work), lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another job is preparing {work.name[1:-5]} right now; wait for it"
            ) from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- looking at the videos ------------------------------------------------------------------------

_landmarker_of_process: detect.Landmarker | None = None


def _start_process(model: str) -> None:
    global _landmarker_of_process
    sys.stderr.flush()
    os.dup2(
        os.open(os.devnull, os.O_WRONLY), 2
    )  # native code notes; errors come back as exceptions
    _landmarker_of_process = detect.Landmarker(model)


def _look_at(job: _Job) -> filters.Verdict:
    """In a worker process: a video to its clips, written to `job.result`."""
    try:
        clips, verdict = clip_making.clips_from_video(
            job.path,
            _landmarker_of_process,
            job.settings,
            max_frames=job.max_frames,
            naming=job.naming,
        )
    except UserError as error:
        clips, verdict = (
            [],
            filters.Verdict(job.path, False, str(error).removeprefix(f"{job.path} ")),
        )
    except Exception as error:  # one strange video must not end a job of days
        clips, verdict = (
            [],
            filters.Verdict(job.path, False, f"failed: {type(error).__name__}: {error}"),
        )
    head = json.dumps(verdict.as_dict()).encode()
    parts = [head, *(records.encode(clip) for clip in clips)]
    with files.writing_to(job.result.parent):
        files.write_bytes(
            job.result, b"".join(struct.pack("<Q", len(part)) + part for part in parts)
        )
    return verdict


def _parts(result: Path) -> Iterator[bytes]:
    with result.open("rb") as stream:
        while head := stream.read(8):
            yield stream.read(struct.unpack("<Q", head)[0])


def _done(job: _Job) -> filters.Verdict | None:
    if not job.result.exists():
        return None
    return filters.Verdict(**json.loads(next(_parts(job.result))))


def _process(jobs: list[_Job], model: str, workers: int) -> list[filters.Verdict]:
    verdicts = {job: _done(job) for job in jobs}
    open_jobs = [job for job in jobs if verdicts[job] is None]
    if len(open_jobs) < len(jobs):
        _say(f"going on: {len(jobs) - len(open_jobs)} of {len(jobs)} videos are done already")
    started, seen = time.monotonic(), 0

    def tell(job: _Job, verdict: filters.Verdict) -> None:
        nonlocal seen
        seen += 1
        verdicts[job] = verdict
        left = (time.monotonic() - started) / seen * (len(open_jobs) - seen)
        number = len(jobs) - len(open_jobs) + seen
        note = f" [{left:.0f} s left]" if left >= 1 else ""
        _say(f"{number}/{len(jobs)} {job.naming.name}: {verdict.words()}{note}")

    broken = _run_all(open_jobs, model, workers, tell)
    for job in broken:  # a process died: find out at which video, one by one
        if _run_all([job], model, 1, tell):
            tell(job, filters.Verdict(job.path, False, "failed: the process that read it died"))
    return [verdicts[job] for job in jobs]


def _run_all(jobs: list[_Job], model: str, workers: int, tell) -> list[_Job]:
    """Runs jobs on processes; returns those that were not done because a process died."""
    if not jobs:
        return []
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(jobs)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_process,
        initargs=(model,),
    )
    try:
        # The longest first, so that no core waits for one big video at the end.
        waiting = {
            pool.submit(_look_at, job): job
            for job in sorted(jobs, key=lambda job: -Path(job.path).stat().st_size)
        }
        broken = []
        for future in concurrent.futures.as_completed(waiting):
            try:
                tell(waiting[future], future.result())
            except concurrent.futures.process.BrokenProcessPool:
                broken.append(waiting[future])
        return broken
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# --- splits and reports ---------------------------------------------------------------------------


def _clips_of(result: Path) -> Iterator[records.Clip]:
    parts = _parts(result)
    next(parts)
    for part in parts:
        yield records.decode(part)


def _splits(results: list[Path], holdout: str, fraction: float, gap: int):
    """split -> function that yields its clips."""
    if holdout == "time":

        def cut(which: int):
            for result in results:
                for clip in _clips_of(result):
                    part = split_in_time(clip, fraction, gap)[which]
                    if part is not None:
                        yield part

        return (
            {"train": lambda: cut(0), "validation": lambda: cut(1)}
            if fraction
            else {"train": lambda: cut(0)}
        )

    people = {result: {clip.identity for clip in _clips_of(result)} for result in results}
    held = held_out(set().union(*people.values()), fraction)

    def pick(validation: bool):
        for result in results:
            for clip in _clips_of(result):
                if (clip.identity in held) == validation:
                    yield clip

    return {"train": lambda: pick(False)} | ({"validation": lambda: pick(True)} if held else {})


def held_out(identities: set[str], fraction: float) -> set[str]:
    """The people of the validation split: those whose hash lies below `fraction`.

    So a person stays on his side when others join. With two people or more neither side is empty.
    """

    def place(identity: str) -> float:
        return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") / 2**64

    ordered = sorted(identities, key=place)
    if fraction <= 0 or len(ordered) < 2:
        return set()
    below = sum(place(identity) < fraction for identity in ordered)
    return set(ordered[: min(max(below, 1), len(ordered) - 1)])


def split_in_time(
    clip: records.Clip, fraction: float, gap: int
) -> tuple[records.Clip, records.Clip | None]:
    """(training part, last `fraction` of the frames for validation or None), `gap` frames apart.

    A clip that is too short to give two frames to either side is kept for training whole.
    """
    held = round(len(clip) * fraction)
    first = len(clip) - held - gap
    if held < 2 or first < 2:
        return clip, None
    name, start, _ = clip.clip_id.rsplit("-", 2)
    number = int(start)

    def part(begin: int, end: int) -> records.Clip:
        return clip.part(begin, end, f"{name}-{number + begin:06d}-{number + end - 1:06d}")

    return part(0, first), part(len(clip) - held, len(clip))


def _funnel(verdicts: list[filters.Verdict]) -> dict:
    reasons = collections.Counter(
        re.sub(r"[ :]*\b(in )?\d+ .*|[:(].*", "", verdict.reason)
        for verdict in verdicts
        if not verdict.kept
    )
    lost: collections.Counter[str] = collections.Counter()
    for verdict in verdicts:
        if verdict.kept:
            lost.update(verdict.dropped_frames)
    return {
        "videos": len(verdicts),
        "videos_kept": sum(verdict.kept for verdict in verdicts),
        "videos_dropped": dict(reasons.most_common()),
        "frames": sum(verdict.frames for verdict in verdicts),
        "frames_kept": sum(verdict.kept_frames for verdict in verdicts),
        "frames_dropped_of_kept_videos": dict(lost.most_common()),
        "clips": sum(verdict.clips for verdict in verdicts),
        "cuts": sum(verdict.cuts for verdict in verdicts if verdict.kept),
    }


def _print_funnel(verdicts: list[filters.Verdict]) -> None:
    funnel = _funnel(verdicts)
    _say(f"videos  {funnel['videos']:6d} -> kept {funnel['videos_kept']}")
    for reason, number in funnel["videos_dropped"].items():
        _say(f"        {-number:6d} {reason}")
    _say(
        f"frames  {funnel['frames']:6d} -> kept {funnel['frames_kept']} in {funnel['clips']} clips"
    )
    for reason, number in funnel["frames_dropped_of_kept_videos"].items():
        _say(f"        {-number:6d} {reason}")


def _say(text: str) -> None:
    print(f"prepare: {text}", flush=True)
