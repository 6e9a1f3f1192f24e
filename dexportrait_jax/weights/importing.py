"""Exported weights back in: every file is checked against the description before it is believed.

A file is read tensor by tensor, and laid out as it comes: what is in memory is what was asked for, and one tensor more.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from dexportrait_jax.errors import UserError
from dexportrait_jax.weights import names
from dexportrait_jax.weights.exporting import DESCRIPTION, FORMAT, file_sha256


def load_groups(
    path: str | os.PathLike,
    wanted: Iterable[str] | Mapping[str, names.Params] | None = None,
    *,
    stage: str | Iterable[str] | None = None,
    called: str = "",
) -> tuple[dict[str, Any], dict[str, names.Params]]:
    """Read parameter groups of an export directory.

    Args:
        path: the directory that ``export_groups`` wrote.
        wanted: names of groups; or ``{name: abstract tree}`` (``Network.abstract``), then every
            shape is compared and types are cast to those of the tree; or None for all groups as
            they are in the files.
        stage: the stage or stages the export may be of; None for any.
        called: what errors of fit call the directory, such as the config key that names it; its path by default.

    Returns ``(contents of model.json, {group: nested dict of numpy arrays})``.

    Raises UserError, one line, when this is no export, a file is missing or corrupted, the stage
    is another one, a group is missing, or names and shapes do not fit (all differences are
    listed).
    """
    directory = Path(path)
    model = read_description(directory)
    _check_stage(directory, model, stage)
    wanted_names = list(model["groups"]) if wanted is None else list(wanted)
    absent = [name for name in wanted_names if name not in model["groups"]]
    if absent:
        raise UserError(
            f"{directory} is an export of stage {model.get('stage')!r} with the groups "
            f"{', '.join(model['groups'])}; it has no {', '.join(absent)}. Give an export that does"
        )
    groups = {}
    for name in wanted_names:
        file = _checked_file(directory, name, model["groups"][name])
        tensors, layout = _read_header(file)
        if isinstance(wanted, Mapping):
            where = f"group {name!r} of {called or directory}"
            groups[name] = names.from_torch(tensors, wanted[name], where=where)
        else:
            groups[name] = names.from_torch_alone(tensors, layout)
    return model, groups


def read_description(directory: Path) -> dict[str, Any]:
    """The contents of ``model.json``; UserError when the directory is no export of this format."""
    file = directory / DESCRIPTION
    if not file.is_file():
        raise UserError(
            f"{directory} holds no {DESCRIPTION}: not exported weights; make them with: dexportrait export "
            "--workdir=RUN --out=DIR, of published weights with: dexportrait import --kind=KIND --source=PATH --out=DIR"
        )
    try:
        model = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({_one_line(error)}); export again") from error
    if not isinstance(model, dict) or model.get("format") != FORMAT:
        found = model.get("format") if isinstance(model, dict) else type(model).__name__
        raise UserError(f"{file} has format {found!r}, expected {FORMAT!r}; export again")
    groups = model.get("groups")
    if not isinstance(groups, dict) or not all(
        isinstance(group, dict) and {"file", "sha256"} <= set(group) for group in groups.values()
    ):
        raise UserError(f"{file} does not list its parameter groups; export again")
    return model


def _check_stage(directory: Path, model: dict[str, Any], stage: str | Iterable[str] | None) -> None:
    if stage is None:
        return
    accepted = (stage,) if isinstance(stage, str) else tuple(stage)
    if model.get("stage") not in accepted:
        raise UserError(
            f"{directory} is an export of stage {model.get('stage')!r}, needed is "
            f"{' or '.join(repr(name) for name in accepted)}; give an export of that stage"
        )


def _checked_file(directory: Path, name: str, group: dict[str, Any]) -> Path:
    # The name comes from a file that may be anybody's: it must not lead out of the directory.
    file = directory / Path(str(group["file"])).name
    if not file.is_file():
        raise UserError(f"{file} (group {name!r}) is missing; copy the whole export directory")
    found = file_sha256(file)
    if found != group["sha256"]:
        raise UserError(
            f"{file} is corrupted: its sha256 is {found}, {DESCRIPTION} says {group['sha256']}; "
            "copy or export it again"
        )
    return file


class _InFile(NamedTuple):
    """A tensor that is read when NumPy asks for an array of it; nothing of it is kept."""

    file: Path
    key: str
    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        # Opened for this tensor alone: what was read through a mapping counts as the process's memory until it is shut.
        try:
            with safe_open(self.file, framework="np") as opened:
                return opened.get_tensor(self.key)
        except (SafetensorError, OSError, ValueError) as error:
            raise _unreadable(self.file, error) from error


def _read_header(file: Path) -> tuple[dict[str, _InFile], dict[str, str]]:
    """The tensors, none of them read yet, and the layout that ``names.from_torch_alone`` takes."""
    try:
        with safe_open(file, framework="np") as opened:
            metadata = opened.metadata() or {}
            tensors = {
                key: _InFile(file, key, tuple(opened.get_slice(key).get_shape()))
                for key in opened.keys()  # noqa: SIM118
            }
        return tensors, json.loads(metadata.get("layout", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(f"{file} cannot be read as safetensors: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
