"""The job `render`: a dataset of rendered heads in the record schema, with the truth in its settings."""

from __future__ import annotations

import collections
import concurrent.futures
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2

from data_pipelines import background, dataset_files, files, records
from data_pipelines.prepare import crop
from data_pipelines.synthetic import source
from data_pipelines.workers import live_with_the_parent
from dexportrait_jax.errors import UserError

MADE_WITH = "render.json"


def run_render(
    out: str | os.PathLike,
    *,
    identities: int = 100,
    clips: int = 1,
    frames: int = 50,
    cameras: int = 1,
    size: int = 256,
    fps: float = 25.0,
    seed: int = 0,
    holdout_fraction: float = 0.1,
    face_scale: float = crop.Settings.face_scale,
    workers: int | None = None,
    overwrite: bool = False,
) -> None:
    """Makes a dataset of rendered heads.

    Args:
        out: directory of the dataset.
        identities: how many people.
        clips: sessions of each.
        frames: of a clip.
        cameras: that watch each session; each gives a clip.
        size: side of the pictures in pixels.
        fps: frames per second of the motion.
        seed: other seeds, other people.
        holdout_fraction: part of the people kept for validation, by a hash of their names.
        face_scale: side of the crop in faces, chin to brow, as of `prepare`.
        workers: processes; None for one a core.
        overwrite: replace a dataset that is there.

    Raises:
        UserError: a value that cannot be, or the result cannot be written.
    """
    plan = source.Plan(
        identities, clips, frames, cameras, size, fps, seed, holdout_fraction, face_scale
    )
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}; it must be at least 1")
    out = Path(out).absolute()
    made_with = json.dumps(plan.made_with, indent=1)
    if _finished(out, made_with, overwrite):
        return
    files.check_destination(out, "heads")
    from data_pipelines.prepare import builder  # needs TFDS, which reading does not

    started = time.monotonic()
    progress = _Progress(identities * clips * cameras)
    with files.alone_at(out), _Renderers(plan, workers or _cores()) as renderers:

        def split(seeds: list[int]) -> Callable[[], Iterator[records.Clip]]:
            return lambda: map(progress.count, renderers.clips(seeds))

        builder.write_dataset(
            {name: split(seeds) for name, seeds in plan.split().items()},
            out,
            reports={MADE_WITH: made_with},
            overwrite=True,
        )
    parts = [f"{name} {len(seeds)} people" for name, seeds in plan.split().items()]
    total = identities * clips * cameras
    _say(
        f"{out}: {total} clips, {total * frames} frames of {', '.join(parts)}, "
        f"made in {time.monotonic() - started:.0f} s"
    )


def _finished(out: Path, made_with: str, overwrite: bool) -> bool:
    """Whether the very dataset is there already; UserError where anything else is that may not be replaced."""
    if not files.already_there(out, "a dataset", dataset_files.is_dataset) or overwrite:
        return False
    try:
        same = (out / MADE_WITH).read_text() == made_with
    except OSError:
        same = False
    if not same:
        raise UserError(
            f"{out} is another dataset than this; choose another --out or pass --overwrite"
        )
    _say(f"{out}: already rendered; nothing to do (--overwrite makes it anew)")
    return True


class _Renderers:
    """Processes that draw people's clips, at most a few people ahead of whoever takes them."""

    def __init__(self, plan: source.Plan, workers: int):
        self.plan, self.workers = plan, workers
        self.pool = None
        if workers > 1:
            self.pool = concurrent.futures.ProcessPoolExecutor(
                workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start
            )

    def __enter__(self) -> _Renderers:
        return self

    def __exit__(self, *error) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def clips(self, seeds: list[int]) -> Iterator[records.Clip]:
        """The clips of people, in order, whole."""
        if self.pool is None:
            for seed in seeds:
                yield from map(records.decode, _encoded(self.plan, seed))
            return
        waiting: collections.deque = collections.deque()
        for seed in seeds:
            waiting.append(self.pool.submit(_encoded, self.plan, seed))
            if len(waiting) > 2 * self.workers:
                yield from map(records.decode, waiting.popleft().result())
        while waiting:
            yield from map(records.decode, waiting.popleft().result())


def _encoded(plan: source.Plan, seed: int) -> list[bytes]:
    return [records.encode(background.measured(clip)) for clip in plan.clips_of(seed)]


def _start() -> None:
    cv2.setNumThreads(1)  # there is a process for every core already
    live_with_the_parent()  # a pool whose parent was killed would wait for ever


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Progress:
    """Says how far it is, at most every `EVERY` seconds."""

    EVERY = 5.0

    def __init__(self, total: int):
        self.total, self.done = total, 0
        self.started = self.said = time.monotonic()

    def count(self, clip: records.Clip) -> records.Clip:
        self.done += 1
        now = time.monotonic()
        if now - self.said > self.EVERY:
            self.said = now
            left = (now - self.started) / self.done * (self.total - self.done)
            _say(f"{self.done} of {self.total} clips, about {left:.0f} s to go")
        return clip


def _say(text: str) -> None:
    print(f"render: {text}", flush=True)
