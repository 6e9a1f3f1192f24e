"""What the protocols of `evaluate` share: a model that makes pictures of clips, and measures over many of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from data_pipelines.dataset import ClipDataset, available_splits, open_clips
from data_pipelines.records import Clip
from dexportrait_jax.errors import UserError
from dexportrait_jax.face_clips import encode_clip, model_inputs
from dexportrait_jax.inference import BATCH, Drive, PortraitModel, Sampling, padded

SHOWN_ROWS, SHOWN_COLUMNS = 6, 9
MORE_PEOPLE = (
    "prepare longer videos or more people, or render more of both; where other splits have them, hold out the end of "
    "every clip with --holdout=time"
)
TRAINED = "train"  # the split that training reads
_OF_A_VIDEO = re.compile(
    r"(?P<video>.+)-(?P<first>\d+)-(?P<last>\d+)"
)  # clip ids, see `records.Clip`
Picture = UInt8[np.ndarray, "h w 3"]
Frames = UInt8[np.ndarray, "frames h w 3"]


class Runner:
    """One model with its settings: from clips and frame numbers to pictures.

    Args:
        max_frames: frames made of each clip; of a model of clips no fewer than one run of its length, where the clip
            has them: a shorter one it would be given filled up with its last frame.
        max_people: people of the dataset that pictures are made of, the first ones; None: all.
    """

    def __init__(
        self,
        model: PortraitModel,
        sampling: Sampling,
        max_frames: int,
        max_people: int | None = None,
    ):
        self.model, self.sampling = model, sampling
        self.max_frames, self.max_people = max_frames, max_people
        self.frames = 0  # made so far

    def people(self, clips: ClipDataset) -> list[str]:
        """Names of the people whose clips are measured, in order of their first clips."""
        return list(dict.fromkeys(clips.index["identity"]))[: self.max_people]

    def parts(self, frames: int) -> list[Int[np.ndarray, " n"]]:
        """Which frames of a clip of ``frames`` to make, in groups that the model makes together.

        A model of single frames gets evenly spaced ones; a model of clips gets runs of consecutive
        frames (at the stride it was trained with), evenly spaced over the clip, at least one. Frame 0
        is the source's.
        """
        length = self.model.clip_length
        last = frames - 1
        if length == 1:
            count = min(self.max_frames, last)
            return [np.unique(np.round(np.linspace(1, last, count)).astype(int))]
        stride = self._stride(last - 1, length - 1)
        length = min(length, last)
        reach = (length - 1) * stride
        runs = max(1, min(self.max_frames // length, last // (reach + 1)))
        starts = np.unique(np.round(np.linspace(1, last - reach, runs)).astype(int))
        return [start + stride * np.arange(length) for start in starts]

    @property
    def run_frames(self) -> int:
        """Consecutive frames to make of a clip where one run is made of it, as many as it has of them."""
        return max(self.max_frames, self.model.clip_length)

    def runs_through(
        self, frames: int, wanted: Int[np.ndarray, " n"]
    ) -> list[tuple[Int[np.ndarray, " run"], Int[np.ndarray, " k"]]]:
        """Frames of a clip of ``frames`` to make so that the wanted ones are among them, and their places there.

        A model of single frames makes just these; a model of clips makes for each of them a run of
        frames about it.
        """
        if self.model.clip_length == 1:
            return [(wanted, np.arange(len(wanted)))]
        length = min(self.model.clip_length, frames)
        # As of one step more than a run has: on either side of a frame some are left that make no whole step.
        stride = self._stride(frames - 1, length)
        runs = []
        for frame in wanted:
            place = np.clip(
                length // 2, length - 1 - (frames - 1 - frame) // stride, frame // stride
            )
            runs.append((frame + stride * (np.arange(length) - place), np.array([place])))
        return runs

    def _stride(self, reach: int, steps: int) -> int:
        """Frames from one to the next: as in training, where so many steps within ``reach`` frames allow it."""
        return max(1, min(self.model.config.data.frame_stride, reach // steps))

    def pictures(self, clip: Clip, indices: Sequence[int]) -> Frames:
        """Frames of a clip at the model's size."""
        return model_inputs(self.model, clip, np.asarray(indices))["image"]

    def make(
        self,
        source: Clip,
        pose: tuple[Clip, np.ndarray] | None,
        expression: tuple[Clip, np.ndarray] | None,
    ) -> Frames:
        """The first frame of ``source``, driven by frames of clips; None = its own."""
        own_pose, own_expression = encode_clip(self.model, source, np.array([0]))
        count = len((pose or expression)[1])
        poses, expressions = np.repeat(own_pose, count, 0), np.repeat(own_expression, count, 0)
        if pose:
            poses = encode_clip(self.model, *pose)[0]
        if expression:
            expressions = encode_clip(self.model, *expression)[1]
        drive = Drive(own_pose[0], own_expression[0], poses, expressions)
        self.frames += count
        first = self.pictures(source, [0])[0]
        return np.concatenate(list(self.model.animate(first, drive, self.sampling)))


class FirstFrames:
    """What drives a clip's frames: the first frame of its shot in its own crop, over all splits of a dataset.

    Where the end of every clip was held out, the beginning of a held-out part is a moment before
    the frames to be measured, and repeating it would be hard to beat and prove nothing. So the
    first frame of the part before it is taken, which training has: of the clips of one file the
    one directly before it. Another clip would not do. Its crop is another, in which the face has
    another size and place, or, of videos that were cropped before, the same, and it shows another
    shot. Without such a part the clip's own frame 0 is taken, which is never driven to.
    """

    def __init__(self, directory: str | Path):
        videos: dict[str, list[tuple[int, int, ClipDataset, int]]] = {}
        for split in available_splits(directory):
            clips = open_clips(directory, split)
            for number, clip_id in enumerate(clips.index["clip_id"]):
                named = _OF_A_VIDEO.fullmatch(clip_id)
                if named:
                    part = int(named["first"]), int(named["last"]), clips, number
                    videos.setdefault(named["video"], []).append(part)
        self._parts_before: dict[str, tuple[ClipDataset, int]] = {}
        for parts in videos.values():
            parts.sort(key=lambda part: part[:2])
            for (_, last, clips, number), (first, _, own, own_number) in itertools.pairwise(parts):
                # What training has in front of what it has not was one clip: people are on one side with all theirs.
                if last < first and clips.split == TRAINED != own.split:
                    self._parts_before[own.index["clip_id"][own_number]] = clips, number

    def __call__(self, clip: Clip) -> Clip:
        if clip.clip_id in self._parts_before:
            clips, number = self._parts_before[clip.clip_id]
            before = clips[number]
            if np.array_equal(before.crop_box, clip.crop_box):
                return before.part(0, 1)
        return clip.part(0, 1)


class ChosenClips(Sequence[Clip]):
    """Clips of a dataset by their numbers, each read when it is asked for; only the dataset's cache keeps any."""

    def __init__(self, clips: ClipDataset, numbers: Sequence[int]):
        self._clips, self._numbers = clips, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self._clips[number] for number in self._numbers[index]]
        return self._clips[self._numbers[index]]


def one_clip_each(
    runner: Runner, clips: ClipDataset, least: int, protocol: str, advice: str = MORE_PEOPLE
) -> ChosenClips:
    """The first clip with two frames of each person, of as many people as the runner takes.

    UserError where they are fewer than ``least``, with ``advice`` on how to get more.
    """
    chosen: dict[str, int] = {}
    for number, identity in enumerate(clips.index["identity"]):
        if clips.frames[number] > 1:
            chosen.setdefault(identity, number)
    if len(chosen) < least:
        people = len(set(clips.index["identity"]))
        short = (
            f", {people - len(chosen)} more in clips of one frame alone"
            if people > len(chosen)
            else ""
        )
        raise UserError(
            f"--protocol={protocol} needs {least} people with clips of two frames; split '{clips.split}' of "
            f"{clips.directory} has {len(chosen)}{short}: {advice}"
        )
    if runner.max_people is not None and runner.max_people < least:
        raise UserError(
            f"--max_people={runner.max_people}: --protocol={protocol} needs {least} people"
        )
    return ChosenClips(clips, list(chosen.values())[: runner.max_people])


def in_batches(measure: Callable, made: Frames, truth: Frames) -> np.ndarray:
    """A measure of every frame, computed on batches of one size so that it is compiled once."""
    values = []
    for first in range(0, len(made), BATCH):
        part = slice(first, first + BATCH)
        pair = padded(made[part], BATCH), padded(truth[part], BATCH)
        values.append(np.asarray(measure(*pair, data_range=255))[: len(made[part])])
    return np.concatenate(values)


class FrameValues:
    """Figures of single frames by name, of one item or, pooled, of many: every frame weighs the same."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, name: str, values: Iterable[float]) -> None:
        """One for each of some more frames; of none, the name is known all the same."""
        self._values.setdefault(name, []).extend(map(float, values))

    def pool(self, item: FrameValues) -> None:
        """Adds all frames of an item."""
        for name, values in item._values.items():
            self.add(name, values)

    def means(self) -> dict[str, float | None]:
        """Name -> mean over all frames; None where there are none, such as frames without a face."""
        return {
            name: float(np.mean(values)) if values else None
            for name, values in self._values.items()
        }


class ShownRows:
    """Rows of pictures of the first SHOWN_ROWS items, which are all that a page shows."""

    def __init__(self) -> None:
        self.pictures: list[list[Picture]] = []

    def add(self, source: Picture, shown: Sequence[tuple[Picture, ...]]) -> None:
        """One more item: the source, then drivers and result of a few of its frames, evenly spaced."""
        if len(self.pictures) == SHOWN_ROWS:
            return
        count = (SHOWN_COLUMNS - 1) // len(shown[0])
        chosen = np.unique(np.linspace(0, len(shown) - 1, count).round().astype(int))
        pictures = [source, *(picture for number in chosen for picture in shown[number])]
        # A picture is a view, which would keep all frames of its clip in memory.
        self.pictures.append([picture.copy() for picture in pictures])
