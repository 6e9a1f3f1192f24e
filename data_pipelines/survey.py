"""What there is to say of the data before anything is compiled.

What cannot be trained on is an error; what can, but was perhaps not meant, is a warning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from data_pipelines import background, dataset, records, transforms
from data_pipelines.examples import Examples
from dexportrait_jax.errors import UserError

_ATTEMPTS = 100  # damaged records before a split counts as damaged
_MEASURED = 256  # frames that are measured of a dataset that does not say how much backgrounds move
_BINS = 1_000_000  # of the motion of windows, whose median is told to three digits
_FEW = 0.1  # calm windows that are worth a warning


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a run finds.

    Attributes:
        warnings: one line each.
        evaluable: whether there is something held out to evaluate while training.
        fingerprint: of what is trained on; other data have another.
        people: how many are trained on.
        examples: what is trained on, opened, for `loading.make_loader` to go on with.
        notes: what is worth knowing and nothing to worry about, one line each.
    """

    warnings: tuple[str, ...]
    evaluable: bool
    fingerprint: dict[str, str]
    people: int
    examples: Examples
    notes: tuple[str, ...] = ()


def survey(config: Mapping[str, Any], held_out: str = "") -> Survey:
    """Opens the splits of a run and reads one record of each.

    Training on one person is a personalised model, and legitimate; `prepare` cannot hold out people
    there, so that the want of a held-out split is no error then.

    Args:
        config: `config.data`, see `loading.default_data`.
        held_out: the split to evaluate while training; "" where nothing is to be evaluated.

    Raises:
        UserError: no such dataset or split, all its clips are too short, or no record can be used.
    """
    examples = Examples(config)
    _check_readable(examples)
    warnings, notes = _too_short(examples), []
    if examples.video:
        _judge_calm(examples, warnings, notes)
    people = len(set(examples.clips.index["identity"]))
    if examples.latents is None:
        fingerprint = examples.clips.fingerprint()
    else:  # they were just found to be of these shards, which need not be looked at again
        fingerprint = examples.latents.description.shards
    missing = bool(held_out) and held_out not in dataset.available_splits(config["path"])
    if people == 1:
        warnings.append(
            f"warning: {_place(examples)} shows one person: the model will know this face alone, and "
            "--protocol=cross, disentangled and synthetic need others"
        )
        if missing:
            warnings[-1] += (
                f"; there is no split '{held_out}', so nothing is evaluated while training "
                "(prepare --holdout=time holds out the end of every clip)"
            )
            return Survey(tuple(warnings), False, fingerprint, people, examples, tuple(notes))
    if held_out:
        evaluated = Examples(config, split=held_out)
        _check_readable(evaluated)
        warnings += _too_short(evaluated)
    return Survey(tuple(warnings), bool(held_out), fingerprint, people, examples, tuple(notes))


def _check_readable(examples: Examples) -> None:
    """One clip with one of its frames; that others are damaged is found and said while loading.

    Where the first is damaged, some from all over the split: its shard may be.
    """
    first = None
    spaced = np.linspace(0, len(examples) - 1, min(len(examples), _ATTEMPTS)).astype(int)
    for number in examples.usable[spaced]:
        try:
            transforms.decode_frame(examples.clips[int(number)], 0)
            return
        except records.RecordError as error:
            first = first or error
    raise UserError(
        f"no record of {_place(examples)} can be used, such as the first: {first}; prepare the dataset again"
    )


def _too_short(examples: Examples) -> list[str]:
    """The warning that some clips are left out, where some are."""
    clips = len(examples.clips)
    short = clips - len(examples)
    if not short:
        return []
    return [
        f"warning: {_place(examples)}: {short} of {clips} clips are left out, because they have fewer "
        f"than the {examples.span} frames in a row that are needed"
    ]


def _judge_calm(examples: Examples, warnings: list[str], notes: list[str]) -> None:
    """How many windows have a calm background, as a note, or as a warning where they are few.

    Where it is not stored, a part of the clips is measured, as while training.
    """
    stored = examples.clips.background_motion(int(examples.usable[0])) is not None
    looked_at = windows = calm = 0
    histogram = np.zeros(_BINS, np.int64)
    limit = examples.config["calm"]["max_difference"]
    for clips, motion in _stored_windows(examples) if stored else _measured_windows(examples):
        looked_at += clips
        windows += len(motion)
        # Sums differ from the loader's in the last digit.
        calm += int((motion <= limit + 1e-6).sum())
        places = np.clip(motion * _BINS, 0, _BINS - 1).astype(np.int64)
        histogram += np.bincount(places, minlength=_BINS)
    if not windows:
        return
    part = "" if looked_at == len(examples) else f" in {looked_at} clips looked at"
    found = (
        f"{_place(examples)}: {calm} of {windows} windows of {examples.span} frames{part} have a calm "
        f"background, at most data.calm.max_difference={limit:g}"
    )
    if calm < _FEW * windows:
        warnings.append(
            f"warning: {found}; else the calmest of {examples.config['calm']['candidates']} is taken: raise "
            f"--config.data.calm.max_difference (half of them have {_median(histogram):.3f} or less), or give "
            "calmer videos"
        )
    else:
        notes.append(found)
    if not stored and isinstance(examples.clips, dataset.ClipDataset):
        notes.append(
            f"{_place(examples)} does not say how much backgrounds move: windows are measured from their frames as "
            f"they are drawn; `dexportrait measure --data={examples.clips.directory}` stores it once"
        )


def _stored_windows(examples: Examples) -> Iterator[tuple[int, np.ndarray]]:
    """How many usable clips, and `background.window_motion` of all their windows, of some at a time."""
    for of_frames, frames in examples.clips.background_motions():
        usable = int((frames >= examples.span).sum())
        yield usable, background.all_windows(of_frames, frames, examples.span)


def _measured_windows(examples: Examples) -> Iterator[tuple[int, np.ndarray]]:
    """The same of clips from all over the split, one at a time, until `_MEASURED` frames were measured."""
    frames = 0
    for place in np.random.default_rng(0).permutation(len(examples)):
        if frames >= _MEASURED:
            return
        try:
            clip = examples.clips[int(examples.usable[place])]
            of_frames = background.motion(clip, 0, len(clip))
        except records.RecordError:
            continue  # said when it is loaded
        frames += len(clip)
        yield 1, background.all_windows(of_frames, np.array([len(clip)]), examples.span)


def _median(histogram: np.ndarray) -> float:
    """The median of values from 0 to 1 that are counted in bins, to half a bin."""
    below, count = np.cumsum(histogram), histogram.sum()
    middle = np.searchsorted(below, [(count - 1) // 2, count // 2], side="right")
    return float((middle.mean() + 0.5) / len(histogram))


def _place(examples: Examples) -> str:
    return f"split '{examples.clips.split}' of {examples.clips.directory}"
