"""Batches for training and evaluation: Grain over random-access clips.

The data is a function of (seed, batch number): starting at batch `step` costs nothing, no iterator
state is saved, and hosts or workers only divide the work. With H hosts, host h makes rows
[h*B/H, (h+1)*B/H) of the very batch that one host would make.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from data_pipelines import augment as augmentation
from data_pipelines import (
    face_landmarks,
    latents,
    records,
    workers,
)
from data_pipelines.examples import Examples
from dexportrait_jax.errors import UserError

_ENDLESS = 1 << 60
_DEATHS = 3  # of workers without a batch in between, before the run ends


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
    examples: Examples | None = None,
) -> Loader:
    """Endless training batches from batch number `step` on.

    Args:
        config: `config.data`, see `default_data`.
        seed: of order and augmentation.
        step: number of the first batch.
        process_index, process_count: this host and how many there are, for equal parts in order.
        rows: of every batch, that this host brings instead: hosts of a mesh may share a source.
        examples: those of `config`, where they are open already (`survey.Survey`); large data take long to open.

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
    examples = Examples(config, seed=seed) if examples is None else examples.seeded(seed)
    data = grain.MapDataset.range(_ENDLESS).seed(seed).random_map(examples)
    data = grain.MapDataset.source(_RowsOfBatches(data, batch, rows)).batch(len(rows))
    processes = config["workers"]
    if not processes:
        threads = min(4, os.cpu_count() or 1)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        return Loader(
            lambda first: iter(data[first:].to_iter_dataset(options)),
            step,
            left_out=examples.left_out,
        )
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's workers read flags; ours is no absl command line
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)

    def start(first: int) -> Iterator[dict[str, np.ndarray]]:
        prefetched = (
            data[first:]
            .to_iter_dataset(options)
            .mp_prefetch(
                grain.MultiprocessingOptions(num_workers=processes),
                worker_init_fn=workers.live_with_the_parent,
            )
        )
        return iter(prefetched)

    return Loader(start, step, starts_processes=True, left_out=examples.left_out)


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

    Where a worker process is killed, it starts all of them again at the batch that is due: batches are a function of
    their number.

    Args:
        start: number of a batch -> iterator of the batches from it on.
        step: number of the first batch.
        starts_processes: whether such an iterator does so, with its first batch.
        left_out: says which records could not be read so far, and why.

    Raises:
        UserError: when iterated: workers were killed `_DEATHS` times, and no batch was made in between.
    """

    def __init__(
        self,
        start: Callable[[int], Iterator],
        step: int,
        *,
        starts_processes: bool = False,
        left_out: Callable[[], list[str]] = list,
    ):
        self._start, self._number, self.left_out = start, step, left_out
        self._starts_processes = starts_processes
        self._holder = [start(step)]
        self.close = weakref.finalize(self, _let_go, self._holder)  # also called when Python ends

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._holder:
            raise StopIteration
        for deaths in range(1, _DEATHS + 1):
            try:
                batch = self._due()
            except RuntimeError as error:
                killed = workers.killed_by(error)
                if killed is None:
                    raise
                failure = error
            else:
                self._number += 1
                return batch
            if deaths < _DEATHS:
                print(
                    f"warning: a data worker was killed by {killed}; all start again at batch {self._number}",
                    file=sys.stderr,
                    flush=True,
                )
                _let_go(self._holder)
                self._holder.append(self._start(self._number))
                self._starts_processes = True
        raise UserError(
            f"data workers were killed by {killed} {_DEATHS} times before batch {self._number} was made; give the job "
            "more memory, or lower --config.data.workers or --config.data.cache_megabytes"
        ) from failure

    def _due(self) -> dict[str, np.ndarray]:
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


def _let_go(holder: list) -> None:
    # Dropped here too: Grain's iterators cannot be deleted once Python has taken its modules down.
    holder.pop().close()
