"""Looking at many videos on all cores, one landmarker a process, and keeping what is done.

Each video's clips and verdict go to a file of their own as soon as they are there, so an interrupted
job goes on where it was. A process that dies (native code can) costs the video it was at, not the job.
A video whose disk drops out gets no verdict: it is left to the next start of the same command.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from data_pipelines import files, records, spill, video
from data_pipelines.prepare import clips as clip_making
from data_pipelines.prepare import crop, detect, filters, splits
from dexportrait_jax.errors import UserError

# Of clips; datasets say it too. Raise it when the same video and settings would give other ones.
# 2: pose labels are of the face as its crop shows it.
# 3: a crop that is larger than the picture shows all of it; times held out are the same for all cameras.
# 4: HDR videos become SDR as on a screen; cuts between people in like framing are seen; faces that are not human are
# left out by shot.
VERSION = 4

PAUSES = (
    1.0,
    10.0,
    60.0,
)  # seconds before a video is tried again whose disk does not answer: a mount made anew

_landmarker: detect.Landmarker | UserError | None = None  # of a worker process, loaded once
_answers = True  # of a worker process: whether the last video could be reached


@dataclasses.dataclass(frozen=True)
class Job:
    """One video to look at; its clips go to a file in `folder`."""

    path: str
    naming: clip_making.Naming
    settings: crop.Settings
    max_frames: int | None
    folder: Path

    @functools.cached_property
    def result(self) -> Path:
        """Named after the video as it was when first asked: it may be written to, or gone, when its clips are read."""
        parts = [VERSION, fingerprint(self.path), dataclasses.asdict(self.naming)]
        parts += [dataclasses.asdict(self.settings), self.max_frames]
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
        return self.folder / f"{key}.clips"

    @property
    def _times(self) -> Path:
        return self.result.with_suffix(".times")

    def clips(self) -> Iterator[records.Clip]:
        """The clips that were made, one at a time."""
        parts = _parts(self.result)
        next(parts)
        yield from map(records.decode, parts)

    def times(self) -> list[splits.Times]:
        """Of every clip that was made, in order: to be known without reading all pictures."""
        if not self._times.exists():  # looked at before they were kept
            return [splits.Times.of(clip) for clip in self.clips()]
        return [splits.Times.from_json(values) for values in json.loads(self._times.read_text())]

    def video(self) -> splits.Video:
        """What `splits.split` asks of it."""
        return splits.Video(self.naming, self.clips, self.times)


def fingerprint(path: str | os.PathLike) -> str:
    """Changes whenever a file does; hashing its content would take as long as reading it."""
    status = Path(path).stat()
    text = f"{Path(path).absolute()} {status.st_size} {status.st_mtime_ns}"
    # Names are bytes to the system, and need not be UTF-8.
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def process(
    jobs: list[Job], model: str, workers: int, say: Callable[[str], None]
) -> list[filters.Verdict]:
    """The verdicts on all videos; those done before are not looked at again.

    Args:
        model: path of the landmarker.
        workers: processes.
        say: gets one line of progress a video.

    Raises:
        UserError: the results cannot be written, the landmarker cannot be loaded, or some videos cannot be reached
            any more: the others are done then, and that is kept.
    """
    verdicts = {job: _done(job) for job in jobs}
    waiting = [job for job in jobs if verdicts[job] is None]
    if len(waiting) < len(jobs):
        say(f"going on: {len(jobs) - len(waiting)} of {len(jobs)} videos are done already")
    started, seen = time.monotonic(), 0

    def tell(job: Job, verdict: filters.Verdict) -> None:
        nonlocal seen
        seen += 1
        verdicts[job] = verdict
        left = (time.monotonic() - started) / seen * (len(waiting) - seen)
        note = f" [{left:.0f} s left]" if left >= 1 else ""
        number = len(jobs) - len(waiting) + seen
        say(f"{number}/{len(jobs)} {job.naming.name}: {verdict.words()}{note}")

    left = waiting
    while left:
        for job in _run(left, model, workers, tell):  # a process died: find out at which video
            if _run([job], model, 1, tell):
                tell(job, filters.Verdict(job.path, False, filters.FAILED, ": its process died"))
        left = [job for job in left if verdicts[job] is None]
    away = [verdict for verdict in verdicts.values() if verdict.reason == filters.UNREACHABLE]
    if away:
        first = f"{away[0].source}{away[0].detail}"
        raise UserError(
            f"{len(away)} of {len(jobs)} video(s) cannot be reached any more (first: {first}); start the same command "
            "again when they can, or without them: what is done is kept"
        )
    return [verdicts[job] for job in jobs]


def _run(jobs: list[Job], model: str, workers: int, tell) -> list[Job]:
    """Runs jobs on processes until one of these dies; returns the jobs that were being done then.

    A pool whose process died is of no more use; jobs that were not begun are left to another one.
    """
    if not jobs:
        return []
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(jobs)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(model,),
    )
    try:
        # The longest first, so that no core waits for one big video at the end.
        ordered = iter(sorted(jobs, key=lambda job: -_size(job.path)))
        begun: dict[concurrent.futures.Future, Job] = {}
        broken: list[Job] = []
        while True:
            if not broken:
                with contextlib.suppress(BrokenProcessPool):  # it broke in between: to the next one
                    # No more than there are processes, so that what was begun is what was being done.
                    for job in itertools.islice(ordered, workers - len(begun)):
                        begun[pool.submit(_look_at, job)] = job
            if not begun:
                return broken
            done, _ = concurrent.futures.wait(begun, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                job = begun.pop(future)
                try:
                    tell(job, future.result())
                except BrokenProcessPool:
                    broken.append(job)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _size(path: str) -> int:
    """Bytes of a file, 0 where it cannot be reached."""
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0


def _start(model: str) -> None:
    global _landmarker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.stderr.flush()
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)  # notes of native code; errors come back as exceptions
    os.close(sink)
    try:
        _landmarker = detect.Landmarker(model)
    except (
        UserError
    ) as error:  # left to the first video: a pool says nothing of why its processes did not start
        _landmarker = error


def _end_with_parent() -> None:
    """A killed job must not leave its workers behind; the pool itself would let them wait forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _look_at(job: Job) -> filters.Verdict:
    """The verdict on a video, kept with its clips; UNREACHABLE, and nothing kept, after the last of PAUSES."""
    global _answers
    if isinstance(_landmarker, UserError):
        raise _landmarker
    # Once a disk has been waited for, the other videos on it are not, or a heap of them would take days to fail.
    for pause in (*(PAUSES if _answers else ()), None):
        try:
            verdict = _kept(job)
        except video.DiskError as error:
            failure = error
        else:
            _answers = True
            return verdict
        if pause is not None:
            time.sleep(pause)
    _answers = False
    return filters.Verdict(job.path, False, filters.UNREACHABLE, f" ({failure.why})")


def _kept(job: Job) -> filters.Verdict:
    """Looks at a video and writes its result file; where its disk does not answer, a DiskError, and no file."""
    with files.writing_to(job.folder), files.staged_stream(job.result) as stream:
        for part, times in _made(job):
            if isinstance(part, filters.Verdict):
                verdict, of_clips = part, []
                stream.seek(0)
                stream.truncate()
                part = json.dumps(verdict.as_dict()).encode()
            else:
                of_clips.append(times.as_json())
            stream.write(struct.pack("<Q", len(part)))
            stream.write(part)
        files.write_bytes(job._times, json.dumps(of_clips).encode())  # before the result is there
    return verdict


def _made(job: Job) -> Iterator[tuple[filters.Verdict | bytes, splits.Times | None]]:
    """The verdict, then the clips one by one; where one fails, another verdict, in place of all before it."""
    try:
        clips, verdict = clip_making.clips_from_video(
            job.path, _landmarker, job.settings, max_frames=job.max_frames, naming=job.naming
        )
        if verdict.damaged:
            _check_reachable(job)
        yield verdict, None
        for clip in clips:
            yield records.encode(clip), splits.Times.of(clip)
    except (spill.NoRoomError, video.DiskError):
        raise  # a fault of the machine
    except UserError as error:
        _check_reachable(job)
        detail = f" ({str(error).removeprefix(job.path).strip()})"
        yield filters.Verdict(job.path, False, filters.UNREADABLE, detail), None
    except Exception as error:  # one strange video must not end a job of days
        _check_reachable(job)
        detail = f": {type(error).__name__}: {error}"
        yield filters.Verdict(job.path, False, filters.FAILED, detail), None


def _check_reachable(job: Job) -> None:
    """Raises DiskError unless a video is there as it was when the job began, and every byte of it can be read.

    What is wrong with a file that is there is for FFmpeg to say; that it is not there FFmpeg does not always.
    """
    try:
        # Of another job, as this one's was named when the video was first asked for.
        changed = dataclasses.replace(job).result != job.result
        with Path(job.path).open("rb", buffering=0) as stream:
            buffer = bytearray(1 << 20)
            while stream.readinto(buffer):
                pass
    except PermissionError:
        return  # it is there
    except OSError as error:
        raise video.DiskError(job.path, error.strerror) from error
    if changed:
        raise video.DiskError(job.path, "it was changed while it was read")


def _parts(result: Path) -> Iterator[bytes]:
    with result.open("rb") as stream:
        while head := stream.read(8):
            yield stream.read(struct.unpack("<Q", head)[0])


def _done(job: Job) -> filters.Verdict | None:
    if not job.result.exists():
        return None
    return filters.Verdict(**json.loads(next(_parts(job.result))))
