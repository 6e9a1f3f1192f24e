"""Other people's safetensors, read one tensor at a time, and ours written the same way.

``TensorFiles`` is what ``--source`` names: one file, or a folder in transformers' or diffusers' layout
(one file, or shards with an index). Only names and shapes are read until a tensor is asked for. A torch pickle
is never opened: it is a program.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dexportrait_jax.errors import UserError
from dexportrait_jax.weights import model_folder

# What a zip archive (torch's format since 1.6) and pickles of protocol 2 and later begin with.
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
# What else people have under a name that ends with .safetensors, by how it begins.
_OTHER_STARTS = {
    b"GGUF": "a GGUF file, whose weights are quantised; get the safetensors that it was made of",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; fetch that: git lfs pull",
    b"<": "a web page, not the file it links to; download that",
    b"\x89HDF": "an HDF5 file, of TensorFlow or Keras; get the safetensors of PyTorch",
    b"": "empty; get it again",
}

# Types that are kept as they are; float64 becomes float32, whatever else is no weight.
_TYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float32),
}
# What our own files may hold.
_CODES = {_TYPES[code]: code for code in ("F32", "F16", "BF16")} | {np.dtype(np.float64): "F64"}


class View(NamedTuple):
    """A tensor as it lies within a stored one.

    Attributes:
        key: of the stored tensor.
        part, parts: which of how many equal parts of its first axis; all of it is part 0 of 1.
        transposed: its axes the other way round.
    """

    key: str
    part: int = 0
    parts: int = 1
    transposed: bool = False

    def rows(self, stored: tuple[int, ...]) -> slice:
        """Which rows these are of a tensor of that shape; what does not divide shows in the shapes of the parts."""
        return slice(stored[0] * self.part // self.parts, stored[0] * (self.part + 1) // self.parts)

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the view of a tensor of that shape."""
        rows = self.rows(stored)
        shape = (rows.stop - rows.start, *stored[1:])
        return shape[::-1] if self.transposed else shape


class _Place(NamedTuple):
    """Where a tensor is: in which file, as what type, under which key, and what of the tensor of that key."""

    file: Path
    code: str
    stored: str
    view: View | None = None


class TensorFiles:
    """The tensors of one file or folder: ``shapes`` at once, ``read`` one by one.

    Args:
        source: file or folder.
        folder: of a source that has a folder of this name, that folder is meant.
        parts: a file whose name has one of these words in it gives its keys with that word and a dot in front.
        several: a folder may hold a file of each part of the network (parts does imply that).

    ``notes`` says which of a folder's files were taken, where that was a choice.

    Raises UserError, one line, when there is nothing, a pickle, or a file that is no safetensors.
    """

    def __init__(
        self,
        source: str | os.PathLike,
        folder: str = "",
        parts: tuple[str, ...] = (),
        several: bool = False,
    ):
        self.source = Path(source)
        if folder and (self.source / folder).is_dir():
            self.source /= folder
            folder = ""
        self.parts = parts
        self.files, self.notes = model_folder.choose(self.source, several or bool(parts), folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, _Place] = {}
        for file in self.files:
            self._read_header(file)
        if not self.shapes:
            raise UserError(f"{self.source} holds no tensors; give the weights themselves")

    def dtype(self, key: str) -> np.dtype:
        """The type ``read`` gives; UserError for numbers that are no floats of 16, 32 or 64 bits."""
        place = self._places[key]
        if place.code not in _TYPES:
            raise UserError(
                f"{key} in {place.file} has type {place.code}; weights are {', '.join(_TYPES)}, so convert them"
            )
        return _TYPES[place.code]

    def read(self, key: str) -> np.ndarray:
        """One tensor, contiguous; UserError when it cannot be read or holds values that are not finite."""
        file, _, stored, view = self._places[key]
        try:
            with safe_open(file, framework="np") as opened:
                if view is None:
                    found = opened.get_tensor(stored)
                else:
                    tensor = opened.get_slice(stored)
                    found = tensor[view.rows(tensor.get_shape())]
                    found = found.T if view.transposed else found
                array = np.ascontiguousarray(found).astype(self.dtype(key), copy=False)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{key} in {file} cannot be read: {_one_line(error)}") from error
        if not np.isfinite(array).all():
            raise UserError(f"{key} in {file} holds values that are not finite; get other weights")
        return array

    def seen_as(self, views: Mapping[str, View]) -> TensorFiles:
        """The same tensors with views, ``{key of the view: view}``, in place of those that they are of."""
        seen = copy.copy(self)
        whole = {view.key for view in views.values()}
        seen.shapes = {key: shape for key, shape in self.shapes.items() if key not in whole}
        seen._places = {key: self._places[key] for key in seen.shapes}
        for key, view in views.items():
            seen.shapes[key] = view.shape(self.shapes[view.key])
            seen._places[key] = self._places[view.key]._replace(view=view)
        return seen

    def _read_header(self, file: Path) -> None:
        _refuse_other_format(file)
        try:
            with safe_open(file, framework="np") as opened:
                for stored in opened.keys():  # noqa: SIM118
                    key = self._prefix(file) + stored
                    if key in self.shapes:
                        raise UserError(
                            f"{key} is both in {self._places[key].file} and in {file}; keep one of them"
                        )
                    tensor = opened.get_slice(stored)
                    self.shapes[key] = tuple(tensor.get_shape())
                    self._places[key] = _Place(file, tensor.get_dtype(), stored)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"{file} cannot be read as safetensors ({_one_line(error)}); it is damaged, cut "
                "short, or another format: get it again, or convert it"
            ) from error

    def _prefix(self, file: Path) -> str:
        # A word of its own: an autoencoder.safetensors holds both halves.
        found = (part for part in self.parts if re.search(rf"(?<![a-z]){part}", file.stem.lower()))
        return next((f"{part}." for part in found), "")

    def settings(self, name: str = "config.json") -> dict[str, Any]:
        """The JSON of that name beside the tensors, transformers' and diffusers' config; empty where there is none."""
        file = (self.source if self.source.is_dir() else self.source.parent) / name
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read ({_one_line(error)}); get it again") from error
        return found if isinstance(found, dict) else {}


class Stored(NamedTuple):
    """A tensor that ``write_tensors`` asks for when its turn comes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def write_tensors(file: Path, tensors: Mapping[str, Stored], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file holding one tensor at a time in memory.

    The format is 8 bytes with the length of a JSON header, the header, and the tensors without
    gaps; the larger types come first, so that each begins at a multiple of its own size.
    """
    ordered = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for key in ordered:
        shape, dtype, _ = tensors[key]
        start, end = end, end + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[key] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for key in ordered:
            shape, dtype, read = tensors[key]
            array = np.ascontiguousarray(read().reshape(shape), dtype=dtype)
            stream.write(array.view(np.uint8).data if array.ndim else array.tobytes())


def _refuse_other_format(file: Path) -> None:
    """UserError for a file that does not begin as safetensors do, where it is known what it is instead."""
    try:
        with file.open("rb") as stream:
            start = stream.read(32)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    if start[8:9] == b"{":  # safetensors: eight bytes of length, then JSON
        return
    if start.startswith(_PICKLE_STARTS):
        _refuse_pickle(file)
    for beginning, what in _OTHER_STARTS.items():
        if start.startswith(beginning) and (beginning or not start):
            raise UserError(f"{file} cannot be read as safetensors: it is {what}")
    if file.suffix.lower() in model_folder.PICKLES:
        _refuse_pickle(file)


def _refuse_pickle(file: Path) -> None:
    raise UserError(
        f"{file} is a pickle, which can run any program when it is opened, so it is not; get the .safetensors of the "
        "same weights, or convert it where you trust it (torch refuses one that holds more than tensors, as "
        f"Lightning's may): python -c {shlex.quote(_conversion(file))}"
    )


def _conversion(file: Path) -> str:
    """A program of one line that makes safetensors of a checkpoint's tensors, wherever in it they commonly lie."""
    made = file.with_suffix(".safetensors")
    if made == file:  # a pickle by another name
        made = file.with_name(f"{file.stem}_converted.safetensors")
    return (
        "import torch, safetensors.torch as s; "
        f'w = torch.load({json.dumps(str(file))}, weights_only=True, map_location="cpu"); '
        'w = next((w[k] for k in ("state_dict", "model", "module") if isinstance(w.get(k), dict)), w); '
        "s.save_file({k: v.contiguous().clone() for k, v in w.items() if torch.is_tensor(v)}, "
        f"{json.dumps(str(made))})"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
