"""Batches for training and evaluation: Grain over random-access clips.

The data is a function of (seed, batch number): starting at batch `step` costs nothing, no iterator
state is saved, and hosts or workers only divide the work. With H hosts, host h makes rows
[h*B/H, (h+1)*B/H) of the very batch that one host would make.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from data_pipelines import augment as augmentation
from data_pipelines import (
    background,
    dataset,
    face_landmarks,
    latents,
    network_inputs,
    records,
    workers,
)
from data_pipelines.cross_view import CrossView, Shown, far_frames
from dexportrait_jax.errors import UserError

_MODES = ("pairs", "video")
_ENDLESS = 1 << 60


def default_data() -> dict[str, Any]:
    """`config.data` as a plain nested dict."""
    return {
        "path": "",  # a dataset, or rendered heads: "synthetic:identities=2000,frames=8,size=64"
        # Latents of these data (`dexportrait encode`) in place of the pictures that the animator's step would encode;
        # "": it encodes. Needs augment's similarity and colour off, and flip too unless it was cached (--flips).
        "latents": "",
        "split": "train",
        "mode": "pairs",
        "batch_size": 28,  # sources, over all hosts
        "targets": 4,  # a source, in mode "pairs"
        "frames": 24,  # a source, in mode "video"
        "frame_stride": 1,
        "source_margin": 30,  # frames between source and targets, where the clip is long enough
        # How often a target (in mode "video" the source) comes from another camera's clip of the session, at another
        # time: the head's own turns and a change of camera together (method.md 5). With one camera nothing changes.
        "cross_view": 0.5,
        "image_size": 256,
        "pose_size": 256,
        "expression_size": 224,
        # A second expression picture of every target under another draw, from another camera where there is one:
        # what an invariance loss compares.
        "second_expression": False,
        "workers": 0,  # processes; 0 reads with threads of this one
        "cache_megabytes": 256,  # of read clips, a process
        # Mode "video" wants calm backgrounds. Of windows drawn one after the other, half from the sample's own clip
        # and half from those that follow, the first is taken whose background changes by at most `max_difference`
        # (brightness in [0, 1], mean over pixels and pairs of neighbouring frames), or else the calmest.
        "calm": {"max_difference": 0.03, "candidates": 8},
        "augment": augmentation.default_augment(),
    }


def targets_of_a_source(config: Mapping[str, Any]) -> int:
    """Pictures that one source of a batch drives: targets, or the frames of a clip."""
    return config["frames" if config["mode"] == "video" else "targets"]


def make_loader(
    config: Mapping[str, Any],
    *,
    seed: int,
    step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    rows: Sequence[int] | None = None,
) -> Loader:
    """Endless training batches from batch number `step` on.

    Args:
        config: `config.data`, see `default_data`.
        seed: of order and augmentation.
        step: number of the first batch.
        process_index, process_count: this host and how many there are, for equal parts in order.
        rows: of every batch, that this host brings instead: hosts of a mesh may share a source.

    Returns:
        Iterator of dicts, to be closed when no more is wanted; S = len(rows) or batch_size / process_count
        sources, N = targets (or frames):
        source_image (S, H, W, 3), source_pose_image, source_expression_image, target_image
        (S, N, H, W, 3), target_pose_image, target_expression_image, target_component_mask
        (S, N, H, W), all uint8; source_head_pose (S, 3, 4), target_head_pose (S, N, 3, 4),
        target_blendshapes (S, N, 52), target_expression_landmarks (S, N, 68, 2) float32; and with
        `second_expression` target_second_expression_image, uint8. With `latents` there is no target_image, but
        source_latents (S, 2, h, w, c) and target_latents (S, N, 2, h, w, c), float16 or float32: mean and
        log-variance of the pictures, unscaled.

    Raises:
        UserError: no such dataset or split, its clips are too short, latents that are not of it, or an
            impossible setting.
    """
    import grain  # imports jax where it is installed, and this package must stay free of it

    batch = config["batch_size"]
    if rows is None:
        if batch < 1 or batch % process_count:
            raise UserError(
                f"data.batch_size is {batch}, which {process_count} host(s) cannot share evenly; "
                "choose a multiple"
            )
        local = batch // process_count
        rows = range(process_index * local, (process_index + 1) * local)
    data = grain.MapDataset.range(_ENDLESS).seed(seed).random_map(Examples(config, seed=seed))
    data = grain.MapDataset.source(_RowsOfBatches(data, batch, rows)).batch(len(rows))[step:]
    processes = config["workers"]
    if processes:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers read flags; ours is no absl command line
        iterator = data.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
        iterator = iterator.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=processes),
            worker_init_fn=workers.live_with_the_parent,
        )
    else:
        threads = min(4, os.cpu_count() or 1)
        iterator = data.to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        )
    return Loader(iter(iterator), starts_processes=processes > 0)


@dataclasses.dataclass(frozen=True)
class _RowsOfBatches:
    """The examples of some rows of every batch, one batch after the other, as a source for Grain."""

    examples: Any
    batch: int
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.examples) // self.batch * len(self.rows)

    def __getitem__(self, index: int) -> Any:
        number, row = divmod(index, len(self.rows))
        return self.examples[number * self.batch + self.rows[row]]


def batch_shapes(config: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of everything in a batch of `make_loader` on one host, without any data.

    Args:
        config: `config.data`, see `default_data`.
    """
    image, pose, expression = (config[f"{name}_size"] for name in ("image", "pose", "expression"))
    frame = {
        "image": ((image, image, 3), "uint8"),
        "pose_image": ((pose, pose, 3), "uint8"),
        "expression_image": ((expression, expression, 3), "uint8"),
        "head_pose": ((3, 4), "float32"),
    }
    target = frame | {
        "component_mask": ((image, image), "uint8"),
        "blendshapes": ((len(records.BLENDSHAPES),), "float32"),
        "expression_landmarks": ((len(face_landmarks.FAN_LANDMARKS), 2), "float32"),
    }
    if config["second_expression"]:
        target["second_expression_image"] = frame["expression_image"]
    if config["latents"]:
        made = latents.read_description(config["latents"])
        target["latents"] = frame["latents"] = made.record_shape, made.dtype
        del target["image"]
    sources = (config["batch_size"],)
    targets = (*sources, targets_of_a_source(config))
    return {
        f"source_{name}": ((*sources, *shape), kind) for name, (shape, kind) in frame.items()
    } | {f"target_{name}": ((*targets, *shape), kind) for name, (shape, kind) in target.items()}


class Loader(Iterator[dict[str, np.ndarray]]):
    """An iterator of batches that ends its threads and worker processes when closed or forgotten.

    `starts_processes`: with its first batch.
    """

    def __init__(self, iterator, *, starts_processes: bool):
        self._holder = [iterator]
        self._starts_processes = starts_processes
        self.close = weakref.finalize(self, _let_go, self._holder)  # also called when Python ends

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._holder:
            raise StopIteration
        if not self._starts_processes:
            return next(self._holder[0])
        self._starts_processes = False
        with workers.signals_held_back():
            return next(self._holder[0])


def evaluation_batches(
    config: Mapping[str, Any], split: str, count: int
) -> Iterator[dict[str, np.ndarray]]:
    """`count` batches without augmentation, always the same ones, with the keys of `make_loader`.

    Row r of batch b shows clip (b * batch_size + r) modulo the number of clips: its first frame is
    the source, the targets are spaced evenly over the rest (mode "pairs") or consecutive (mode
    "video"). Where clips come again, other targets are taken.
    """
    examples = Examples(config, split=split)
    batch = config["batch_size"]
    for number in range(count):
        rows = [examples.evaluation_example(number * batch + row) for row in range(batch)]
        yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class Examples:
    """(position in the endless data, random generator) -> one example: a source and its targets.

    Every epoch shows all usable clips in an order of its own. (Grain's own shuffle walks through a
    large cipher for every index, which takes 7 ms for a dataset of four clips.)

    Damaged records are reported once, over all worker processes, and replaced by the next one.
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
        self.seed = seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
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
        self.views = self.clips.views()
        self.cross_view = CrossView(
            self.clips, self.views, config["cross_view"], config["source_margin"]
        )
        self.reported = Path(tempfile.mkdtemp(prefix="dexportrait-reported-"))
        owner = os.getpid()
        weakref.finalize(self, _remove_own, str(self.reported), owner)

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
        number = int(self.order(epoch)[place])
        seed = rng.integers(0, 1 << 63)
        return self._replacing(number, lambda at: self._training(at, np.random.default_rng(seed)))

    def evaluation_example(self, row: int) -> dict[str, np.ndarray]:
        """A deterministic example, see `evaluation_batches`."""
        count, passes = len(self), row // len(self)
        return self._replacing(row % count, lambda at: self._evaluation(at, passes))

    def _replacing(self, number: int, make) -> dict[str, np.ndarray]:
        for attempt in range(min(len(self), 100)):
            clip = int(self.usable[(number + attempt) % len(self)])
            try:
                return make(clip)
            except records.RecordError as error:
                self._report(clip, error)
        raise UserError(
            f"the records of {self.clips.directory} are damaged, 100 in a row or all; "
            "prepare it again"
        )

    def _report(self, clip: int, error: Exception) -> None:
        try:
            (self.reported / str(clip)).touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError:
            pass  # no way to know whether it was said: say it
        print(
            f"warning: {self.clips.directory}, split {self.clips.split}, record {clip} is damaged "
            f"and left out: {error}",
            file=sys.stderr,
            flush=True,
        )

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
                found[target.clip] = self._other_view(target.clip, rng)
        return [found.get(target.clip) for target in targets]

    def _other_view(self, number: int, rng: np.random.Generator) -> records.Clip | None:
        others = self.views.get(number)
        return self.clips[int(rng.choice(others))] if others else None

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


def _let_go(holder: list) -> None:
    # Dropped here too: Grain's iterators cannot be deleted once Python has taken its modules down.
    holder.pop().close()


def _remove_own(directory: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(directory, ignore_errors=True)
