"""Which clips are held out for validation: some people, or the end of every clip."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from data_pipelines import records
from data_pipelines.prepare.clips import Naming

HOLDOUTS = ("identity", "time")

Clips = Callable[[], Iterator[records.Clip]]


class Times(NamedTuple):
    """When the frames of a clip are, as its record has it.

    Attributes:
        seconds: (frames,) float64, of numbers that are float32.
        fps: likewise.
    """

    seconds: np.ndarray
    fps: float

    @classmethod
    def of(cls, clip: records.Clip) -> Times:
        seconds = np.asarray(clip.timestamps, np.float32).astype(
            np.float64
        )  # a copy: no record stays
        return cls(seconds, float(np.float32(clip.fps)))

    def as_json(self) -> list:
        return [self.fps, self.seconds.tolist()]

    @classmethod
    def from_json(cls, values: list) -> Times:
        return cls(np.array(values[1], np.float64), values[0])


class Video(NamedTuple):
    """A video whose clips are split.

    Attributes:
        naming: keys of all its clips.
        clips: yields them in order, as often as it is called.
        times: gives those of every clip, without reading it where that can be.
    """

    naming: Naming
    clips: Clips
    times: Callable[[], list[Times]]

    @property
    def key(self) -> tuple[str, str]:
        return self.naming.identity, self.naming.session


class Held(NamedTuple):
    """A time of a session that is held out of all its cameras, in seconds.

    Attributes:
        before: training may go on until here, and including it.
        first: time of the first frame that is held out.
        last: time of the last one.
        after: training may go on behind this.
    """

    before: float
    first: float
    last: float
    after: float


def split(
    videos: list[Video],
    holdout: str,
    fraction: float,
    gap: int,
    people: Collection[str] = (),
) -> dict[str, Callable[[], Iterable[records.Clip]]]:
    """split name -> function that yields its clips.

    Args:
        videos: by identity, each is read once; by time, once a split.
        holdout: "identity" or "time".
        fraction: how much of it is held out; 0 makes no validation split.
        gap: frames between training and validation, for "time", where all cameras of a session are cut alike.
        people: who is held out, for "identity", in place of those that `held_out` chooses.
    """
    if holdout == "time":
        times = held_times(videos, fraction, gap) if fraction else {}
        parts = {"train": lambda: _in_time(videos, times, validation=False)}
        if times:
            parts["validation"] = lambda: _in_time(videos, times, validation=True)
        return parts
    identities = {video.naming.identity for video in videos}
    held = identities & set(people) if people else held_out(identities, fraction)

    def pick(validation: bool) -> Iterator[records.Clip]:
        for video in videos:
            if (video.naming.identity in held) == validation:
                yield from video.clips()

    chosen = {"train": lambda: pick(False)}
    return chosen | {"validation": lambda: pick(True)} if held else chosen


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


def held_times(
    videos: Iterable[Video], fraction: float, gap: int
) -> dict[tuple[str, str], list[Held]]:
    """(identity, session) -> the times that are held out: the last `fraction` of the frames of every clip.

    Cameras of a session show the same instants, but their clips begin and end where each of them saw the face. So
    the camera with the most frames decides, and the others do where it has nothing to hold out. A clip that is too
    short to give two frames to either side holds out nothing.

    Args:
        gap: frames left out before and behind what is held out.
    """
    sessions: dict[tuple[str, str], list[Video]] = {}
    for video in videos:
        sessions.setdefault(video.key, []).append(video)
    found = {}
    for key, of_session in sessions.items():  # one after the other: the times of all are gigabytes
        cameras: dict[str, list[Times]] = {}
        for video in of_session:
            cameras.setdefault(video.naming.camera, []).extend(video.times())
        ordered = sorted(
            cameras.values(), key=lambda camera: -sum(len(times) for times, _ in camera)
        )
        held: list[Held] = []
        decided: list[tuple[float, float]] = []
        for times, fps in itertools.chain(*ordered):
            if any(times[0] <= last and first <= times[-1] for first, last in decided):
                continue
            end = _end(times, fps, fraction, gap, held)
            if end is not None:
                held.append(end)
                decided.append((times[0], times[-1]))
        if held:
            found[key] = held
    return found


def _end(times: np.ndarray, fps: float, fraction: float, gap: int, held: list[Held]) -> Held | None:
    """What a clip of frames at `times` holds out, where others hold out `held`."""
    count = round(len(times) * fraction)
    last = len(times) - count - gap
    if count < 2 or _trainable(times, held)[: max(last, 0)].sum() < 2:
        return None
    first = times[len(times) - count]
    return Held(times[last - 1], first, times[-1], times[-1] + (gap + 0.5) / fps)


def _trainable(times: np.ndarray, held: list[Held]) -> np.ndarray:
    """(frames,) bool: which frames are far enough from all that is held out."""
    far = np.ones(len(times), bool)
    for one in held:
        far &= (times <= one.before) | (times > one.after)
    return far


def _held_out(times: np.ndarray, held: list[Held]) -> np.ndarray:
    """(frames,) bool: which frames are held out."""
    inside = np.zeros(len(times), bool)
    for one in held:
        inside |= (times >= one.first) & (times <= one.last)
    return inside


def _in_time(
    videos: list[Video], held: dict[tuple[str, str], list[Held]], *, validation: bool
) -> Iterator[records.Clip]:
    chosen = _held_out if validation else _trainable
    for video in videos:
        of_session = held.get(video.key, [])
        if validation and not of_session:
            continue
        for clip in video.clips():
            yield from _parts(clip, chosen(Times.of(clip).seconds, of_session))


def _parts(clip: records.Clip, chosen: np.ndarray) -> Iterator[records.Clip]:
    """The clip whole, or each of its runs of at least two `chosen` (frames,) frames."""
    if chosen.all():
        yield clip
        return
    edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False))
    for first, last in edges.reshape(-1, 2).tolist():
        if last - first >= 2:
            yield _part(clip, first, last)


def _part(clip: records.Clip, first: int, last: int) -> records.Clip:
    name, start, _ = clip.clip_id.rsplit("-", 2)
    begin = int(start)
    return clip.part(first, last, f"{name}-{begin + first:06d}-{begin + last - 1:06d}")
