"""What there is to say of the data before anything is compiled.

What cannot be trained on is an error; what can, but was perhaps not meant, is a warning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from data_pipelines import dataset, records, transforms
from data_pipelines.loading import Examples
from dexportrait_jax.errors import UserError

_ATTEMPTS = 100  # damaged records in a row before a split counts as damaged; as in `loading`


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a run finds.

    Attributes:
        warnings: one line each.
        evaluable: whether there is something held out to evaluate while training.
    """

    warnings: tuple[str, ...]
    evaluable: bool


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
    warnings = _too_short(examples)
    alone = len(set(examples.clips.index["identity"])) == 1
    missing = bool(held_out) and held_out not in dataset.available_splits(config["path"])
    if alone:
        warnings.append(
            f"warning: {_place(examples)} shows one person: the model will know this face alone, and "
            "--protocol=cross, disentangled and synthetic need others"
        )
        if missing:
            warnings[-1] += (
                f"; there is no split '{held_out}', so nothing is evaluated while training "
                "(prepare --holdout=time holds out the end of every clip)"
            )
            return Survey(tuple(warnings), evaluable=False)
    if held_out:
        evaluated = Examples(config, split=held_out)
        _check_readable(evaluated)
        warnings += _too_short(evaluated)
    return Survey(tuple(warnings), evaluable=bool(held_out))


def _check_readable(examples: Examples) -> None:
    """One clip with one of its frames; that others are damaged is found and said while loading."""
    first = None
    for number in examples.usable[:_ATTEMPTS]:
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


def _place(examples: Examples) -> str:
    return f"split '{examples.clips.split}' of {examples.clips.directory}"
