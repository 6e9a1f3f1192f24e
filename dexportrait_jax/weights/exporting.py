"""Trained weights out to PyTorch users: a directory of safetensors and one JSON that describes it.

An export holds ``model.json`` (format, stage, config, step, crop constants, versions and, for
every parameter group, its file, sha256 and parameter count) and one ``<group>.safetensors`` per
group with PyTorch's names and layouts (``names.py``). It is written under a temporary name and
renamed, so a half-written export never has the final name. Torch is not needed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import dexportrait_jax
from data_pipelines import files
from dexportrait_jax.errors import UserError
from dexportrait_jax.weights import names
from dexportrait_jax.weights.tensor_files import Stored, write_tensors

FORMAT = "dexportrait-export-1"
DESCRIPTION = "model.json"


def export_groups(
    out_dir: str | os.PathLike,
    model: Mapping[str, Any],
    groups: Mapping[str, names.Params],
    overwrite: bool = False,
) -> Path:
    """Write parameter groups as an export directory.

    Args:
        out_dir: the directory to make. One that is there is replaced only with ``overwrite``, and
            only if it is an export.
        model: what ``model.json`` shall say: "stage", "config" (JSON-able), "step", "ema", "crop".
        groups: ``{group name: parameter tree}``; arrays keep their types, floats of 16, 32 or 64 bits.

    Returns the directory. Raises UserError when it may not or cannot be written; what was there
    stays as it was.
    """

    laid_out = {name: (params, _stored(params)) for name, params in groups.items()}
    return export_streamed(out_dir, model, laid_out, overwrite)


def export_streamed(
    out_dir: str | os.PathLike,
    model: Mapping[str, Any],
    groups: Mapping[str, tuple[names.Params, Mapping[str, Stored]]],
    overwrite: bool = False,
) -> Path:
    """``export_groups`` for tensors that are in PyTorch's layout already and too many for memory.

    ``groups`` are ``{group name: (tree of the network's parameters or of their shapes, {PyTorch key: tensor})}``;
    tensors are asked for one at a time.
    """
    out = Path(out_dir)
    check_replaceable(out, overwrite)
    lacking = sorted({"stage", "config", "step", "ema", "crop"} - set(model))
    if lacking:
        raise ValueError(f"the description of an export lacks {', '.join(lacking)}")
    with files.whole_directory(out) as directory:
        described = {}
        for name, (params, tensors) in groups.items():
            file = directory / f"{name}.safetensors"
            write_tensors(file, tensors, _metadata(params))
            described[name] = {
                "file": file.name,
                "sha256": file_sha256(file),
                "parameters": sum(math.prod(tensor.shape) for tensor in tensors.values()),
            }
        description = {**model, "format": FORMAT, "groups": described, "versions": _versions()}
        text = json.dumps(description, indent=2, sort_keys=True, default=_plain)
        (directory / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
    return out


def _stored(params: names.Params) -> dict[str, Stored]:
    """A tree's leaves as a file takes them: one is laid out as PyTorch has it when its turn comes."""
    return {
        key: Stored(
            names.torch_shape(path[-1], tuple(leaf.shape)),
            np.dtype(leaf.dtype),
            functools.partial(_laid_out, path[-1], leaf),
        )
        for key, (path, leaf) in names.by_torch_key(params).items()
    }


def _laid_out(leaf_name: str, leaf: Any) -> np.ndarray:
    return names.to_torch_layout(leaf_name, np.asarray(leaf))


def _metadata(params: Mapping[str, Any]) -> dict[str, str]:
    # PyTorch's loaders look for "format"; the layout lets importing rebuild the tree alone.
    layout = json.dumps(names.layout_exceptions(params), sort_keys=True)
    return {"format": "pt", "layout": layout}


def run_export(workdir: str | os.PathLike, out: str | os.PathLike, overwrite: bool = False) -> None:
    """Job ``export``: the newest checkpoint of a run, averaged weights where there are any."""
    check_replaceable(Path(out), overwrite)
    from dexportrait_jax import (
        checkpoint_groups,  # JAX and Orbax load only once the arguments are right
    )

    config, step, groups = checkpoint_groups.load_groups(Path(workdir))
    crop = _crop_settings(config)
    if crop is not None:
        # Whoever uses the model crops as its training data was cropped; that reads the config.
        config = {**config, "data": {**config["data"], "crop": crop}}
    model = {
        "stage": config["stage"],
        "config": config,
        "step": int(step),
        "ema": bool(config.get("ema_decay")),
        "crop": crop,
    }
    directory = export_groups(out, model, groups, overwrite)
    description = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))
    for name, group in description["groups"].items():
        print(f"{name}: {group['parameters'] / 1e6:.2f} M parameters, {group['file']}")
    print(f"exported step {step} of {workdir} to {directory}")


def check_replaceable(out: Path, overwrite: bool) -> None:
    """Raise UserError, before any work is done, unless an export may and can be written at ``out``."""
    if files.already_there(out, "an export", _is_export) and not overwrite:
        raise UserError(f"{out} already holds an export; add --overwrite, or give another --out")
    files.check_destination(out, "export")


def _is_export(directory: Path) -> bool:
    try:
        described = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))
        return described["format"].startswith(FORMAT.rstrip("0123456789"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def file_sha256(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _crop_settings(config: dict[str, Any]) -> dict[str, Any] | None:
    """Crop constants of the data a run was trained on; None when the data is not there any more."""
    from data_pipelines.dataset import open_clips
    from data_pipelines.records import RecordError

    data = config.get("data", {})
    if data.get("crop"):
        return data["crop"]
    try:
        clip = open_clips(data.get("path", ""), data.get("split", "train"))[0]
    except (UserError, RecordError) as error:
        print(f"note: the export holds no crop constants, animate will use the defaults ({error})")
        return None
    # What is true of a rendered clip's frames is no constant of its crop.
    settings = {name: value for name, value in clip.settings.items() if name != "synthetic"}
    return settings | {"size": clip.size}


def _versions() -> dict[str, str]:
    versions = {"dexportrait_jax": dexportrait_jax.__version__}
    for package in ("jax", "flax", "numpy", "safetensors"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _plain(value: Any) -> Any:
    """JSON for what a config may hold beside plain values: numpy, nested configs, paths."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return str(value)
