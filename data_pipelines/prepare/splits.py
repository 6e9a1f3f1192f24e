"""Which clips are held out for validation: some people, or the end of every clip."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator

from data_pipelines import records

HOLDOUTS = ("identity", "time")

Clips = Callable[[], Iterator[records.Clip]]


def split(
    videos: list[Clips],
    holdout: str,
    fraction: float,
    gap: int,
    people: Collection[str] = (),
) -> dict[str, Callable[[], Iterable[records.Clip]]]:
    """split name -> function that yields its clips.

    Args:
        videos: per video, a function that yields its clips in order; they are read as often as needed.
        holdout: "identity" or "time".
        fraction: how much of it is held out; 0 makes no validation split.
        gap: frames between training and validation, for "time".
        people: who is held out, for "identity", in place of those that `held_out` chooses.
    """
    if holdout == "time":
        parts = {"train": 0, "validation": 1} if fraction else {"train": 0}
        return {
            name: lambda which=which: _in_time(videos, fraction, gap, which)
            for name, which in parts.items()
        }
    identities = {clip.identity for clips in videos for clip in clips()}
    held = identities & set(people) if people else held_out(identities, fraction)

    def pick(validation: bool) -> Iterator[records.Clip]:
        for clips in videos:
            for clip in clips():
                if (clip.identity in held) == validation:
                    yield clip

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


def split_in_time(
    clip: records.Clip, fraction: float, gap: int, *, gap_before: bool = False
) -> tuple[records.Clip, records.Clip | None]:
    """(training part, last `fraction` of the frames for validation or None), `gap` frames apart.

    A clip that is too short to give two frames to either side is kept for training whole.

    Args:
        gap_before: the frames just before this clip were held out: keep the distance to them too.
    """
    first = gap if gap_before and len(clip) > gap + 1 else 0
    held = round(len(clip) * fraction)
    last = len(clip) - held - gap
    if held < 2 or last - first < 2:
        return _part(clip, first, len(clip)), None
    return _part(clip, first, last), _part(clip, len(clip) - held, len(clip))


def _in_time(videos: list[Clips], fraction: float, gap: int, which: int) -> Iterator[records.Clip]:
    for clips in videos:
        gap_before = False  # long runs of frames are several clips, one right after the other
        for clip in clips():
            parts = split_in_time(clip, fraction, gap, gap_before=gap_before)
            gap_before = parts[1] is not None
            if parts[which] is not None:
                yield parts[which]


def _part(clip: records.Clip, first: int, last: int) -> records.Clip:
    name, start, _ = clip.clip_id.rsplit("-", 2)
    begin = int(start)
    return clip.part(first, last, f"{name}-{begin + first:06d}-{begin + last - 1:06d}")
