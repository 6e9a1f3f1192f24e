"""A video as a driver: one shot of it on its own clock, with the frames that show no usable face told.

A dataset wants runs of good frames; a driver must keep time. So a face that leaves the picture for a
while leaves a gap in the clip and none in the clock, and whoever drives with it bridges the gap.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
from collections.abc import Callable

import numpy as np

from data_pipelines import records
from data_pipelines.prepare import clips, crop, detect, filters
from dexportrait_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Driver:
    """A clip and its clock.

    Attributes:
        clip: the frames that show the face, in order, cut by one box.
        times: (frames,) float64, seconds from the first frame, of every frame between the first and
            the last of the clip.
        seen: (frames,) bool, whether a frame shows the face; the first and the last do, and as many as
            the clip has.
        left_out: what of the video is not there or not seen, in words; empty if nothing.
        first: number in the video of the clip's first frame.
    """

    clip: records.Clip
    times: np.ndarray
    seen: np.ndarray
    left_out: str = ""
    first: int = 0

    @classmethod
    def steady(cls, clip: records.Clip) -> Driver:
        """A clip without gaps at its own rate; of one frame, a still."""
        return cls(clip, np.arange(len(clip)) / clip.fps, np.ones(len(clip), bool))

    def __len__(self) -> int:
        return len(self.times)

    @property
    def still(self) -> bool:
        return len(self.times) == 1

    @property
    def shown(self) -> np.ndarray:
        """(frames,) int, the frame of the clip to show for every frame: in a gap, the last before it."""
        return np.cumsum(self.seen) - 1


def driver_from_video(
    path: str | os.PathLike,
    landmarker: detect.Landmarker,
    settings: crop.Settings | None = None,
    *,
    max_frames: int | None = None,
    seconds: float = 0.0,
    on_frame: Callable[[int], None] | None = None,
) -> Driver:
    """The shot with the most usable frames, from the first to the last of them; or the first that has enough.

    Pictures and landmarks of the clip are on disk (`spill`). Of each frame less than a kilobyte stays in
    memory: blendshapes, pose, box, times; and as much again while it is made.

    Args:
        max_frames: how many usable frames are enough of a shot, if it also lasts ``seconds``: the video is read up to
            there, or until a second person is in few enough of them. None: all of it.
        seconds: from the first usable frame of the shot to its last.
        on_frame: told how many frames were looked at.

    Raises:
        UserError: the video cannot be read, or shows no usable face; the message says why.
    """
    # A pause is no cut here: a recording at a variable rate may well show one picture for a second.
    settings = dataclasses.replace(
        settings or crop.Settings(), min_frames=1, clip_frames=1 << 30, max_pause=math.inf
    )
    damage: list[str] = []
    shot = _Shot(max_frames, seconds, settings)
    observations = clips.observe(
        path, landmarker, settings, None, damage.append, on_frame, enough=shot.add, spilled=True
    )
    # What lies before a shot that is enough is no more of a reason against it than what would come behind it.
    begin = shot.begin if shot.enough else 0
    runs, verdict = filters.segments(observations[begin:], os.fspath(path), settings)
    if not runs:
        raise UserError(f"{path} cannot be used: {verdict.reason}{verdict.detail}")
    good = begin + _longest_shot(runs, observations[begin:])
    naming = clips.Naming.of(path)
    (clip,) = clips.cut_out(path, observations, [good], naming, settings, spilled=True)
    span = np.arange(good[0], good[-1] + 1)
    times = np.array([observations[index].time for index in span])
    seen = np.isin(span, good)
    said = [*_gaps(observations, span, seen), *damage, *_outside(span, len(observations))]
    return Driver(clip, times - times[0], seen, "; ".join(said), int(span[0]))


class _Shot:
    """Counts the usable frames of a shot while a video is read.

    Attributes:
        begin: number of the first usable frame of the shot that is being read.
        enough: whether this shot has as many as are wanted, lasts as long, and would be taken for what was read of it.
    """

    def __init__(self, max_frames: int | None, seconds: float, settings: crop.Settings):
        self._wanted, self._seconds, self._settings = max_frames, seconds, settings
        self._read, self.begin, self.enough = 0, 0, False
        self._begin_shot()

    def _begin_shot(self) -> None:
        self._since: float | None = None  # time of the first usable frame
        self._several = 0  # frames from there on
        self._errors: list[float] = []  # mirror errors from there on
        self._before = 0  # usable frames in runs that have ended
        self._begin_run()

    def _begin_run(self) -> None:
        self._run, self._asked = 0, []

    def _usable(self) -> int:
        """As `filters.segments` counts: a run of frames that is not human is of no use."""
        human = filters.is_human(self._asked or self._errors, self._settings)
        return self._before + (self._run if human else 0)

    def add(self, seen: filters.Observation) -> bool:
        """The next frame of the video; whether the shot is enough with it."""
        if seen.cut:
            self._begin_shot()
        if seen.verdict:
            self._before = self._usable()
            self._begin_run()
        elif self._since is None:
            self.begin, self._since = self._read, seen.time
        self._read += 1
        if self._since is None:
            return False
        asked = [] if seen.mirror_error is None else [seen.mirror_error]
        self._errors += asked
        if not seen.verdict:
            self._run += 1
            self._asked += asked
        self._several += seen.verdict == filters.SEVERAL
        self.enough = self._is_enough(seen.time)
        return self.enough

    def _is_enough(self, time: float) -> bool:
        if self._wanted is None or time - self._since < self._seconds:
            return False
        # A second person in two frames is a large share of a few, and a small one with those that follow.
        few = self._several <= self._settings.max_several * (self._read - self.begin)
        return few and self._usable() >= self._wanted


def _longest_shot(
    runs: list[tuple[int, int]], observations: list[filters.Observation]
) -> np.ndarray:
    """Numbers of the usable frames of the shot that has the most."""
    shot = np.cumsum([seen.cut for seen in observations])
    frames: dict[int, list[int]] = collections.defaultdict(list)
    for first, last in runs:
        frames[int(shot[first])].extend(range(first, last))
    return np.array(max(frames.values(), key=len))


def _gaps(observations, span, seen) -> list[str]:
    if seen.all():
        return []
    # What is good by itself was left out with its run.
    reasons = collections.Counter(
        observations[index].verdict or filters.NOT_HUMAN for index in span[~seen]
    )
    edges = np.flatnonzero(np.diff(seen.astype(int)))  # a gap lies behind an even one
    times = np.array([observations[index].time for index in span])
    lengths = times[edges[1::2] + 1] - times[edges[::2]]
    longest = int(np.argmax(lengths))
    why = ", ".join(reason for reason, _ in reasons.most_common())
    return [
        f"{int((~seen).sum())} of {len(span)} frames show no usable face ({why}), in {len(lengths)} "
        f"gap(s), the longest of {lengths[longest]:.2f} s from {times[edges[2 * longest]]:.2f} s: pose "
        "and expression are interpolated there"
    ]


def _outside(span, total: int) -> list[str]:
    before, behind = int(span[0]), total - 1 - int(span[-1])
    return [
        f"{count} frame(s) {where} are left out"
        for count, where in ((before, "before the shot"), (behind, "behind the shot"))
        if count
    ]
