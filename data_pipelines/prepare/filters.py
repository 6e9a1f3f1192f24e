"""What is fit for training: a verdict on every frame, cuts between frames, and runs of good frames.

Everything here works on what was seen of the frames (`Observation`), never on pictures, so that it is
quick to test and independent of the detector.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from data_pipelines.prepare import crop, detect

GOOD = ""
NO_FACE = "no face found"
TOO_SMALL = "face too small"
SEVERAL = "several people"
OUTSIDE = "face partly outside the picture"
NOT_HUMAN = "not a human face, or too unclear"
TOO_SHORT = "too few good frames in a row"
TOO_FEW = "too few frames"
UNREADABLE = "unreadable"
FAILED = "failed"
UNREACHABLE = "cannot be reached any more"  # of the machine and not of the video: never kept

# The same point of a mirrored face: corners and lids of the eyes, mouth, brows, cheeks, midline.
_MIRROR_PAIRS = np.array(
    [(33, 263), (133, 362), (159, 386), (145, 374), (61, 291), (105, 334), (234, 454)]
    + [(1, 1), (10, 10), (13, 13), (14, 14), (152, 152)]
)


class Observation(NamedTuple):
    """What was seen in one frame.

    Attributes:
        time: seconds.
        face: the largest face, or None.
        verdict: one of the reasons above, `GOOD` if none.
        cut: whether a new shot begins here.
        mirror_error: see `mirror_error`; None if it was not asked.
        picture: width and height of the frame.
    """

    time: float
    face: detect.Face | None
    verdict: str
    cut: bool
    mirror_error: float | None
    picture: tuple[int, int]


@dataclasses.dataclass
class Verdict:
    """What became of one video.

    `reason` is of a few kinds that can be counted, `detail` the rest of the sentence; `damaged` says
    where a file stopped being readable.
    """

    source: str
    kept: bool
    reason: str = ""
    detail: str = ""
    frames: int = 0
    kept_frames: int = 0
    clips: int = 0
    cuts: int = 0
    dropped_frames: dict[str, int] = dataclasses.field(default_factory=dict)
    damaged: str = ""

    def words(self) -> str:
        """One line for people."""
        if self.reason == UNREACHABLE:
            return f"not done: {self.reason}{self.detail}"
        if not self.kept:
            return f"dropped: {self.reason}{self.detail}"
        text = f"kept {self.kept_frames} of {self.frames} frames in {self.clips} clip(s)"
        if self.cuts:
            text += f", {self.cuts} cut(s)"
        if self.dropped_frames:
            text += ", dropped " + ", ".join(f"{n} ({r})" for r, n in self.dropped_frames.items())
        return text + (f"; {self.damaged}" if self.damaged else "")

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def judge(
    faces: list[detect.Face], picture: tuple[int, int], settings: crop.Settings
) -> tuple[detect.Face | None, str]:
    """The face of a frame and whether it can be used.

    Args:
        faces: largest first.
        picture: width and height.
    """
    if not faces:
        return None, NO_FACE
    face = faces[0]
    if any(_another_person(face, other, settings) for other in faces[1:]):
        return face, SEVERAL
    if face.size < settings.min_face:
        return face, TOO_SMALL
    points = face.landmarks[:, :2]
    outside = (points < 0).any(axis=1) | (points > picture).any(axis=1)
    if outside.mean() > settings.max_outside:
        return face, OUTSIDE
    return face, GOOD


def _another_person(face: detect.Face, other: detect.Face, settings: crop.Settings) -> bool:
    a, b = face.box, other.box
    middle = (b[:2] + b[2:]) / 2
    same = (middle > a[:2]).all() and (middle < a[2:]).all()  # found twice
    return not same and other.size >= settings.second_face * face.size


def mirror_error(face: detect.Face, mirrored: list[detect.Face], width: int) -> float:
    """Mean distance, in face boxes, between a face's landmarks and those of the mirrored picture.

    A human face is read alike both ways: at most 0.016 (median of a clip) and 0.022 (a single
    portrait) on 17 clips and 29 portraits. What is read into a dog's face, say, is not: 0.055.
    1.0 if the mirrored picture shows no face there.
    """
    if not mirrored:
        return 1.0
    ours, theirs = _MIRROR_PAIRS[:, 0], _MIRROR_PAIRS[:, 1]
    errors = []
    for other in mirrored:
        points = other.landmarks[:, :2] * (-1, 1) + (width, 0)
        apart = np.concatenate(
            [face.landmarks[ours, :2] - points[theirs], face.landmarks[theirs, :2] - points[ours]]
        )
        errors.append(float(np.linalg.norm(apart, axis=1).mean()) / face.size)
    return min(1.0, *errors)


def thumbnail(image: np.ndarray) -> np.ndarray:
    """(32, 32) float32 grey picture in [0, 1], to notice cuts."""
    small = cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255


FACELESS = (
    2.0  # times the difference that is a cut between two frames with a face, where one shows none
)


def is_cut(
    before: Observation,
    seen: Observation,
    difference: float,
    settings: crop.Settings,
) -> bool:
    """Whether a new shot begins with `seen`: the picture changes, the face jumps, or time does.

    A picture of another size is one as well, as of a call whose connection got better: one box cannot cut both.
    """
    face, time = seen.face, seen.time
    if seen.picture != before.picture or time - before.time > settings.max_pause:
        return True
    if face is None or before.face is None:
        # What covers or takes away a face changes the picture, too, and the face may come back: it is no cut as soon.
        return difference > FACELESS * settings.max_cut_difference
    if difference > settings.max_cut_difference:
        return True
    old, new = before.face.box, face.box
    jump = np.linalg.norm((new[:2] + new[2:] - old[:2] - old[2:]) / 2) / before.face.size
    ratio = face.size / before.face.size
    return bool(jump > settings.max_jump or not 1 / 1.5 < ratio < 1.5)


def segments(
    observations: list[Observation], source: str, settings: crop.Settings
) -> tuple[list[tuple[int, int]], Verdict]:
    """Runs [first, last) of good frames without a cut, and the verdict on the whole video.

    A run is of a human face where the median of its mirror errors says so; where none was asked, that of its shot.
    """
    counts = collections.Counter(seen.verdict for seen in observations if seen.verdict)
    verdict = Verdict(source=source, kept=False, frames=len(observations))
    verdict.cuts = sum(seen.cut for seen in observations)
    total = max(1, len(observations))
    if counts[SEVERAL] > settings.max_several * total:
        verdict.reason = SEVERAL
        verdict.detail = f" in {counts[SEVERAL]} of {total} frames"
        return [], verdict

    runs, first = [], None
    for index, seen in enumerate(observations):
        if first is not None and (seen.verdict or seen.cut):
            runs.append((first, index))
            first = None
        if first is None and not seen.verdict:
            first = index
    if first is not None:
        runs.append((first, len(observations)))
    human = _human(runs, observations, settings)
    strange = _frames(runs) - _frames(human)
    if strange:
        counts[NOT_HUMAN] += strange
    runs = human
    kept = [run for run in runs if run[1] - run[0] >= settings.min_frames]
    short = _frames(runs) - _frames(kept)
    if short:
        counts[TOO_SHORT] += short
    verdict.dropped_frames = dict(counts.most_common())
    if not kept:
        verdict.reason, verdict.detail = _main_reason(counts, len(observations), runs, settings)
        return [], verdict
    pieces = [piece for run in kept for piece in _pieces(*run, settings.clip_frames)]
    verdict.kept, verdict.clips = True, len(pieces)
    verdict.kept_frames = _frames(pieces)
    return pieces, verdict


def _frames(runs: list[tuple[int, int]]) -> int:
    return sum(last - first for first, last in runs)


def _human(
    runs: list[tuple[int, int]], observations: list[Observation], settings: crop.Settings
) -> list[tuple[int, int]]:
    """The runs that show a human face: another shot of the same video may show a dog, or a doll."""
    shots = np.cumsum([seen.cut for seen in observations])
    errors = np.array(
        [np.nan if seen.mirror_error is None else seen.mirror_error for seen in observations]
    )
    asked = ~np.isnan(errors)
    human = []
    for first, last in runs:
        inside = errors[first:last][asked[first:last]]
        if not len(inside):
            inside = errors[asked & (shots == shots[first])]
        if is_human(inside, settings):
            human.append((first, last))
    return human


def is_human(errors: Sequence[float], settings: crop.Settings) -> bool:
    """Whether a face is human by its mirror errors; where none was asked, it is."""
    return not len(errors) or bool(np.median(errors) <= settings.mirror_error)


def _pieces(first: int, last: int, longest: int) -> list[tuple[int, int]]:
    """A run in parts of nearly equal length, none longer than `longest`."""
    count = -(-(last - first) // longest)
    edges = np.linspace(first, last, count + 1).round().astype(int).tolist()
    return list(zip(edges[:-1], edges[1:], strict=True))


def _main_reason(counts, frames, runs, settings) -> tuple[str, str]:
    if frames < settings.min_frames:
        return TOO_FEW, f": {frames}; at least {settings.min_frames} are needed"
    reason, number = counts.most_common(1)[0]
    if reason == TOO_SHORT:
        longest = max(last - first for first, last in runs)
        return TOO_SHORT, f": {longest}; at least {settings.min_frames} are needed"
    return reason, f" in {number} of {frames} frames"
