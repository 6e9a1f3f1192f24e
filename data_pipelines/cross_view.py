"""Pairs across cameras: source and targets of one sample from different cameras of one session (method.md 3.12 E2, 5).

The decision is each target's own, as the paper pairs one source with four driving frames "possibly from different
cameras": one pass over the source then serves near and far views together, and no sample lacks either for long. The
source stays with the clip whose turn it is, and every camera's clip has its turn. A video's frames are one camera's,
so there the source alone may change.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Shown(NamedTuple):
    """A frame of the dataset: number of its clip, and its place there."""

    clip: int
    frame: int


def far_frames(distance: np.ndarray, margin: int, count: int) -> np.ndarray:
    """Frames at least `margin` from a source; where a clip has fewer than `count`, the farthest ones.

    Args:
        distance: (frames,) of each frame from the source, in frames.
    """
    margin = min(margin, int(distance.max()))
    far = np.flatnonzero(distance >= max(margin, 1))
    if len(far) < count:  # a short clip
        far = np.argsort(-distance, kind="stable")[: max(1, min(count, len(distance) - 1))]
    return far


class OtherViews:
    """clip number -> clips of the same person and session from other cameras.

    What is kept is a group's members and not a list a clip, which in a long session of many cameras would be as long.

    Args:
        index: of all clips, see `dataset.build_index`.
    """

    def __init__(self, index: Mapping[str, Sequence[Any]]):
        self._groups = _numbered(zip(index["identity"], index["session"], strict=True))
        self._cameras = _numbered(index["camera"])
        self._members = np.argsort(self._groups, kind="stable").astype(np.int32)
        self._edges = np.concatenate([[0], np.cumsum(np.bincount(self._groups))])

    def get(self, number: int) -> list[int]:
        group = self._groups[number]
        members = self._members[self._edges[group] : self._edges[group + 1]]
        return members[self._cameras[members] != self._cameras[number]].tolist()


def _numbered(values: Iterable[Hashable]) -> np.ndarray:
    """(n,) int32: equal values have equal numbers, counted from 0."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(value, len(known)) for value in values], np.int32)


class CrossView:
    """Moves targets, or a video's source, to other cameras' clips.

    Where the probability is 0 or there is no other camera, nothing is drawn from `rng` either: such samples are
    bit for bit those of a dataset with one camera.

    Args:
        clips: the clips by number.
        views: what `OtherViews` gives, or the same as a dict.
        probability: `data.cross_view`.
        margin: `data.source_margin`.
    """

    def __init__(
        self,
        clips: Any,
        views: OtherViews | Mapping[int, Sequence[int]],
        probability: float,
        margin: int,
    ):
        self.clips, self.probability, self.margin = clips, probability, margin
        self.views = views if probability else {}

    def targets(
        self, source: Shown, targets: Sequence[Shown], rng: np.random.Generator
    ) -> list[Shown]:
        """The targets, each with `probability` replaced by a frame of another camera.

        As far from the source in time as a target of its own clip has to be: at the same instant the source
        would show the target's expression, and the latent would be of no use.
        """
        others = self.views.get(source.clip)
        if not others:
            return list(targets)
        clip = self.clips[source.clip]
        now = clip.timestamps[source.frame]

        def elsewhere() -> Shown:
            number = int(rng.choice(others))
            distance = np.rint(np.abs(self.clips[number].timestamps - now) * clip.fps)
            return Shown(number, int(rng.choice(far_frames(distance, self.margin, len(targets)))))

        return [elsewhere() if rng.random() < self.probability else target for target in targets]

    def source(self, source: Shown, window: Sequence[Shown], rng: np.random.Generator) -> Shown:
        """The source of a window of consecutive targets, with `probability` a frame of another camera.

        From outside the window's time where the other clip has such frames, as of its own clip.
        """
        others = self.views.get(source.clip)
        if not others or rng.random() >= self.probability:
            return source
        clip = self.clips[window[0].clip]
        first, last = clip.timestamps[[window[0].frame, window[-1].frame]]
        number = int(rng.choice(others))
        times = self.clips[number].timestamps
        slack = 0.5 / max(clip.fps, 1.0)
        outside = np.flatnonzero((times < first - slack) | (times > last + slack))
        return Shown(number, int(rng.choice(outside if len(outside) else len(times))))
