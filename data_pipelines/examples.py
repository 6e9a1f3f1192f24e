"""One example of training or evaluation: a source and its targets, drawn from clips that are read at random.

What an example shows is a function of (seed, position); which positions make a batch is `loading.py`'s.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import augment as augmentation
from data_pipelines import (
    background,
    dataset,
    latents,
    network_inputs,
    records,
    shard_reader,
)
from data_pipelines.cross_view import CrossView, OtherViews, Shown, far_frames
from dexportrait_jax.errors import MayPass, UserError

_MODES = ("pairs", "video")
_ATTEMPTS = 100  # damaged records in a row before all count as damaged


class Examples:
    """(position in the endless data, random generator) -> one example: a source and its targets.

    Every epoch shows all usable clips in an order of its own. (Grain's own shuffle walks through a
    large cipher for every index, which takes 7 ms for a dataset of four clips.)

    Damaged records, and shards that cannot be read, are reported once, over all worker processes. Their clips are
    replaced by the next ones in the order of the epoch, so that those of a shard are not all replaced by the same one.
    """

    def __init__(self, config: Mapping[str, Any], split: str | None = None, seed: int = 0):
        config = _plain(config)
        if config["mode"] not in _MODES:
            raise UserError(f"data.mode is '{config['mode']}'; it must be 'pairs' or 'video'")
        if config["calm"]["candidates"] < 1 or not 0 <= config["calm"]["max_difference"] <= 1:
            raise UserError(
                f"data.calm is {config['calm']}; candidates must be 1 or more, max_difference from 0 to 1"
            )
        if not 0 <= config["cross_view"] <= 1:
            raise UserError(
                f"data.cross_view is {config['cross_view']}; it must lie between 0 and 1"
            )
        parts = config["augment"]["component_mask"]["parts"]
        unknown = [part for part in parts if part not in records.POLYGONS]
        if unknown:
            raise UserError(
                f"data.augment.component_mask.parts: there is no {unknown[0]!r}; there are "
                f"{', '.join(records.POLYGONS)}"
            )
        self.config = config
        self._begin(seed)
        self.augment = config["augment"]
        self.video = config["mode"] == "video"
        self.sizes = (config["image_size"], config["pose_size"], config["expression_size"])
        self.clips = dataset.open_clips(
            config["path"], split or config["split"], cache_bytes=config["cache_megabytes"] << 20
        )
        self.latents = None
        if config["latents"] and split is None:  # whoever evaluates compares with pictures
            self.latents = latents.Latents(config, self.clips)
        self.span = (config["frames"] - 1) * config["frame_stride"] + 1 if self.video else 2
        self.usable = np.flatnonzero(self.clips.frames >= self.span)
        if len(self.usable) == 0:
            raise UserError(
                f"the clips of split '{self.clips.split}' in {self.clips.directory} have at most "
                f"{self.clips.frames.max()} frames, but {self.span} are needed in a row; "
                + (
                    "lower data.frames or data.frame_stride"
                    if self.video
                    else "prepare longer videos"
                )
            )
        view_change = self.augment["view_change"]["probability"]
        asked = any((config["cross_view"], config["second_expression"], view_change))
        self.views = OtherViews(self.clips.index) if asked else {}
        self.cross_view = CrossView(
            self.clips, self.views, config["cross_view"], config["source_margin"]
        )

    def _begin(self, seed: int) -> None:
        self.seed = seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        self.reported = Path(tempfile.mkdtemp(prefix="dexportrait-reported-"))
        owner = os.getpid()
        weakref.finalize(self, _remove_own, str(self.reported), owner)

    def seeded(self, seed: int) -> Examples:
        """The same data in the order of a seed; nothing is opened again."""
        other = copy.copy(self)
        other._begin(seed)
        return other

    def __len__(self) -> int:
        return len(self.usable)

    def order(self, epoch: int) -> np.ndarray:
        """The usable clips in the order of an epoch, as positions in `usable`."""
        known, order = self._order
        if known != epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self))
            self._order = epoch, order
        return order

    def __call__(self, position: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The training example at a position; `rng` decides frames and augmentation."""
        epoch, place = divmod(int(position), len(self))
        seed = rng.integers(0, 1 << 63)
        return self._replacing(
            self.order(epoch), place, lambda at: self._training(at, np.random.default_rng(seed))
        )

    def evaluation_example(self, row: int) -> dict[str, np.ndarray]:
        """A deterministic example, see `evaluation_batches`."""
        passes, place = divmod(row, len(self))
        return self._replacing(range(len(self)), place, lambda at: self._evaluation(at, passes))

    def _replacing(self, order: Sequence[int], place: int, make) -> dict[str, np.ndarray]:
        """`make` of the clip at a place of an order of `usable`, or of the first one after it that can be read."""
        failed, away = 0, True
        for attempt in range(len(self)):
            clip = int(self.usable[order[(place + attempt) % len(self)]])
            try:
                return make(clip)
            except shard_reader.ShardError as error:
                if (
                    error.known
                ):  # which costs nothing: a shard may hold more clips than may be damaged in a row
                    continue
                away = away and error.away
                self._report(error.path.name, f"{error}; its clips are left out until it can be")
            except records.RecordError as error:
                away, damaged = False, self._damaged(clip, error)
                self._report(str(damaged), f"record {damaged} is damaged and left out: {error}")
            failed += 1
            if failed == _ATTEMPTS:
                break
        if failed and away:
            raise MayPass(
                f"no shard of {self.clips.directory} can be opened, in {failed} attempts: that disk does not answer; "
                "look after it, and start the same command again"
            )
        raise UserError(
            f"the records of {self.clips.directory} are damaged, {_ATTEMPTS} in a row or all; "
            "prepare it again"
        )

    def _damaged(self, clip: int, error: records.RecordError) -> int:
        """The record that is damaged: that of `clip`, or another camera's that its example shows."""
        ids = self.clips.index["clip_id"]
        return ids.index(error.clip_id) if error.clip_id in ids else clip

    def _report(self, name: str, text: str) -> None:
        """Says once what is left out; `name` is its own."""
        try:
            with (self.reported / name).open("x") as said:
                said.write(text)
        except FileExistsError:
            return
        except OSError:
            pass  # no way to know whether it was said: say it
        print(
            f"warning: {self.clips.directory}, split {self.clips.split}, {text}",
            file=sys.stderr,
            flush=True,
        )

    def left_out(self) -> list[str]:
        """What was reported so far, by all worker processes, the newest last."""
        said = sorted(self.reported.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        return [path.read_text() for path in said]

    def _training(self, number: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        sample = augmentation.random_sample(rng, self.augment)
        source_draw = augmentation.random_draw(rng, self.augment, sample)
        if self.video:
            number, source, targets = self._choose_window(number, rng)
            target_draws = [augmentation.random_draw(rng, self.augment, sample)] * len(targets)
        else:
            source, targets = self._choose_pairs(number, rng)
            target_draws = [augmentation.random_draw(rng, self.augment, sample) for _ in targets]
        source, targets = Shown(number, source), [Shown(number, int(at)) for at in targets]
        if self.video:
            source = self.cross_view.source(source, targets, rng)
        else:
            targets = self.cross_view.targets(source, targets, rng)
        return self._example(source, targets, source_draw, target_draws, rng)

    def _choose_pairs(self, number: int, rng: np.random.Generator) -> tuple[int, np.ndarray]:
        """Source frame and targets, at least `source_margin` apart where the clip allows it."""
        frames = int(self.clips.frames[number])
        source = int(rng.integers(frames))
        count = self.config["targets"]
        far = far_frames(np.abs(np.arange(frames) - source), self.config["source_margin"], count)
        return source, rng.choice(far, count, replace=len(far) < count)

    def _choose_window(self, number: int, rng: np.random.Generator) -> tuple[int, int, np.ndarray]:
        """Clip, source frame and consecutive targets whose background hardly moves: `data.calm`."""
        knobs = self.config["calm"]
        position = int(np.searchsorted(self.usable, number))
        best = None
        for candidate in range(knobs["candidates"]):
            further = max(0, candidate - knobs["candidates"] // 2 + 1)
            clip = int(self.usable[(position + further) % len(self)])
            frames = int(self.clips.frames[clip])
            start = int(rng.integers(frames - self.span + 1))
            targets = start + self.config["frame_stride"] * np.arange(self.config["frames"])
            outside = [f for f in range(frames) if f < start or f >= start + self.span]
            source = int(rng.choice(outside)) if outside else int(rng.integers(frames))
            motion = self.window_motion(clip, start)
            if best is None or motion < best[0]:
                best = motion, clip, source, targets
            if motion <= knobs["max_difference"]:
                break
        return best[1:]

    def window_motion(self, number: int, start: int) -> float:
        """How much the background of a clip's window moves; see `background.window_motion`."""
        of_frames = self.clips.background_motion(number)
        if of_frames is not None:
            return background.window_motion(of_frames[start : start + self.span])
        return background.window_motion(
            background.motion(self.clips[number], start, start + self.span)
        )

    def _evaluation(self, number: int, passes: int) -> dict[str, np.ndarray]:
        clip = self.clips[number]
        if self.video:
            starts = len(clip) - self.span + 1
            start = min(1, starts - 1) if passes == 0 else (passes * self.span + 1) % starts
            targets = start + self.config["frame_stride"] * np.arange(self.config["frames"])
        else:
            count = self.config["targets"]
            spaced = np.arange(1, count + 1) * (len(clip) - 1) / count - passes
            targets = 1 + (np.ceil(spaced).astype(int) - 1) % (len(clip) - 1)
        draw = augmentation.neutral_draw(self.augment)
        targets = [Shown(number, int(at)) for at in targets]
        return self._example(Shown(number, 0), targets, draw, [draw] * len(targets), None)

    def _example(
        self,
        source: Shown,
        targets: Sequence[Shown],
        source_draw: augmentation.Draw,
        target_draws: Sequence[augmentation.Draw],
        rng: np.random.Generator | None,
    ) -> dict[str, np.ndarray]:
        one = network_inputs.frame_inputs(
            self.clips[source.clip], source.frame, source_draw, self.augment, self.sizes
        )
        seconds = self._second_draws(target_draws, rng)
        others = self._other_views(targets, target_draws, seconds, rng)
        many = []
        for (number, frame), draw, second, other in zip(
            targets, target_draws, seconds, others, strict=True
        ):
            clip = self.clips[number]
            if second is not None:
                second = second, self._same_instant(clip, frame, other, second)
            many.append(
                network_inputs.frame_inputs(
                    clip,
                    frame,
                    draw,
                    self.augment,
                    self.sizes,
                    with_image=self.latents is None,
                    expression_from=self._same_instant(clip, frame, other, draw),
                    second=second,
                )
            )
        example = {
            f"source_{name}": one[name]
            for name in ("image", "pose_image", "expression_image", "head_pose")
        }
        for name in many[0]:
            example[f"target_{name}"] = np.stack([part[name] for part in many])
        if self.latents is not None:
            flip = source_draw.sample.flip  # the whole sample's
            example["source_latents"] = self.latents(*source, flip)
            example["target_latents"] = np.stack(
                [self.latents(*target, flip) for target in targets]
            )
        return example

    def _second_draws(self, draws, rng) -> list[augmentation.Draw | None]:
        """Draws of the second expression pictures: the sample of the first, the other camera than it."""
        if not self.config["second_expression"]:
            return [None] * len(draws)
        if rng is None:
            return list(draws)
        return [
            dataclasses.replace(
                augmentation.random_draw(rng, self.augment, draw.sample),
                other_view=not draw.other_view,
            )
            for draw in draws
        ]

    def _other_views(self, targets, draws, seconds, rng) -> list[records.Clip | None]:
        """Of every target, the clip of another camera than its own that may show its expression (E2).

        Targets of one clip share it, so that a video's expression is not seen from all sides in turn.
        """
        if rng is None:
            return [None] * len(targets)
        found: dict[int, records.Clip | None] = {}
        for target, draw, second in zip(targets, draws, seconds, strict=True):
            if target.clip not in found and (second is not None or draw.other_view):
                own = [one for one in targets if one.clip == target.clip]
                found[target.clip] = self._other_view(own, rng)
        return [found.get(target.clip) for target in targets]

    def _other_view(
        self, targets: Sequence[Shown], rng: np.random.Generator
    ) -> records.Clip | None:
        """A clip of another camera that lasts over some of the targets, all of one clip.

        A long session is several clips of every camera, few of which show the same instants.
        """
        others = self.views.get(targets[0].clip)
        if not others:
            return None
        clip, index = self.clips[targets[0].clip], self.clips.index
        times = clip.timestamps[[frame for _, frame in targets]]
        slack = 0.5 / max(clip.fps, 1.0)

        def lasts(other: int) -> bool:
            first = index["start"][other] - slack
            length = (index["frames"][other] - 1) / max(index["fps"][other], 1e-6)
            return bool(((times >= first) & (times <= first + length + 2 * slack)).any())

        there = [other for other in others if lasts(other)]
        return self.clips[int(rng.choice(there))] if there else None

    @staticmethod
    def _same_instant(clip, index, other, draw) -> tuple[records.Clip, int] | None:
        """The frame of the other camera at this frame's time, if it has one (E2)."""
        if other is None or not draw.other_view:
            return None
        apart = np.abs(other.timestamps - clip.timestamps[index])
        nearest = int(apart.argmin())
        return (other, nearest) if apart[nearest] <= 0.5 / max(clip.fps, 1.0) else None


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A ConfigDict or dict as plain dicts: quick to read and to send to worker processes."""
    return {
        name: _plain(value) if isinstance(value, Mapping) or hasattr(value, "items") else value
        for name, value in config.items()
    }


def _remove_own(directory: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(directory, ignore_errors=True)
