"""`dexportrait import`: published weights in, an export in our names out, one tensor at a time.

What belongs where is a ``plan`` of the kind (``kinds.py``); here it is checked against the network
and written. Values are copied as they are: what has to be changed for a network (the input that it
expects, say) is changed by whoever starts from the import, and model.json says what it is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dexportrait_jax.weights import names
from dexportrait_jax.weights.exporting import check_replaceable, export_streamed
from dexportrait_jax.weights.foreign import refuse_foreign
from dexportrait_jax.weights.kinds import kind_called, plan_import
from dexportrait_jax.weights.tensor_files import Stored, TensorFiles

STAGE = "import"


def run_import(kind: str, source: str, out: str, overwrite: bool = False) -> None:
    """Job ``import``: read ``source`` as weights of this kind and write an export to ``out``.

    Needs the memory of the largest tensor beside what the system keeps of the file. Raises UserError,
    one line, when the source cannot be read, does not fit, or ``out`` may not be written; then
    nothing is written.
    """
    check_replaceable(Path(out), overwrite)
    kind, sort = kind_called(kind)
    files = TensorFiles(source, folder=sort.folder, parts=sort.parts, several=sort.several)
    refuse_foreign(kind, sort, files)
    plan = plan_import(sort, files)
    groups = {
        group: (abstract, _stored(plan.files or files, abstract, found))
        for group, (abstract, found) in plan.groups.items()
    }
    model = {
        "stage": STAGE,
        "config": {"kind": kind, "source": str(source), **plan.config},
        "step": 0,
        "ema": False,
        "crop": None,
    }
    directory = export_streamed(out, model, groups, overwrite)
    for group, (_, tensors) in groups.items():
        count = sum(math.prod(tensor.shape) for tensor in tensors.values())
        print(f"{group}: {count / 1e6:.2f} M parameters in {len(tensors)} tensors")
    if plan.left_out:
        print(f"left out, not needed: {names.listed(plan.left_out)}")
    for note in (*files.notes, *plan.notes):
        print(f"note: {note}")
    print(f"imported {source} to {directory}; it goes to {sort.config_key}")


def matched(
    files: TensorFiles, abstract: Mapping[str, Any], translate: Callable[[str], str | None]
) -> tuple[dict[str, str], list[str]]:
    """Which published tensor each parameter of a network is.

    Args:
        files: the published tensors.
        abstract: the network's parameters (``Network.abstract``).
        translate: published key -> our key in PyTorch's form, "" for one that is not needed, or
            None for one that is not known.

    Returns ``({our key: published key}, [keys that are not needed])``. Axes of one cell may stand
    or lack: (4, 2, 1, 1) is (4, 2).

    Raises UserError that lists what is missing, extra or misshapen.
    """
    wanted = shapes(abstract)
    found: dict[str, str] = {}
    left_out, extra, misshapen = [], [], []
    for key, shape in files.shapes.items():
        ours = translate(key)
        if ours == "":
            left_out.append(key)
        elif ours not in wanted or ours in found:
            extra.append(key)
        else:
            found[ours] = key
            if _without_ones(shape) != _without_ones(wanted[ours]):
                misshapen.append(f"{key} is {shape}, expected {wanted[ours]}")
    missing = [key for key in wanted if key not in found]
    names.refuse_misfit(str(files.source), missing, extra, misshapen)
    return found, left_out


def shapes(abstract: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """``{key: shape}`` of a network's parameters in PyTorch's names and layout."""
    return {
        names.torch_key(path): names.torch_shape(path[-1], tuple(leaf.shape))
        for path, leaf in names.flatten(abstract)
    }


def _stored(
    files: TensorFiles, abstract: Mapping[str, Any], found: Mapping[str, str]
) -> dict[str, Stored]:
    wanted = shapes(abstract)
    return {
        ours: Stored(wanted[ours], files.dtype(theirs), functools.partial(files.read, theirs))
        for ours, theirs in found.items()
    }


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
