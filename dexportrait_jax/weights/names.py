"""Parameter trees <-> tensors with PyTorch's names and layout, by one rule for every network.

Attributes are named as in the published PyTorch modules, so a path joined with dots is the
PyTorch key once its last word is translated: ``kernel``, ``scale`` and ``embedding`` are
``weight`` there, every other word is itself. Only kernels differ in layout: (in, out) is (out,
in) and (*window, in, out) is (out, in, *window), also for grouped convolutions. All other
parameters keep their shape.

Needs numpy alone: neither jax nor torch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dexportrait_jax.errors import UserError

Params = dict[str, Any]

_WEIGHTS = ("kernel", "scale", "embedding")
_SHOWN = 6  # names listed in an error before "and n more": one line has to stay readable


def torch_key(path: tuple[str, ...]) -> str:
    """The PyTorch name of the parameter at this path of the tree."""
    *parents, leaf = path
    return ".".join([*parents, "weight" if leaf in _WEIGHTS else leaf])


def flatten(params: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, leaf) of every leaf of a nested dict, in the order of the keys."""
    for key, value in params.items():
        if isinstance(value, Mapping):
            for path, leaf in flatten(value):
                yield (str(key), *path), leaf
        else:
            yield (str(key),), value


def unflatten(leaves: Mapping[tuple[str, ...], Any]) -> Params:
    """The nested dict with these leaves; the inverse of ``flatten``."""
    tree: Params = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def torch_shape(leaf_name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in PyTorch of a parameter that has this name and shape here."""
    if leaf_name == "kernel" and len(shape) >= 2:
        return (shape[-1], shape[-2], *shape[:-2])
    return tuple(shape)


def to_torch_layout(leaf_name: str, array: np.ndarray) -> np.ndarray:
    """A parameter as PyTorch lays it out; contiguous."""
    if leaf_name == "kernel" and array.ndim >= 2:
        array = array.transpose(array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))
    return np.ascontiguousarray(array).reshape(array.shape)


def from_torch_layout(leaf_name: str, array: np.ndarray) -> np.ndarray:
    """The inverse of ``to_torch_layout``."""
    if leaf_name == "kernel" and array.ndim >= 2:
        array = array.transpose(*range(2, array.ndim), 1, 0)
    return np.ascontiguousarray(array).reshape(array.shape)


def to_torch(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A parameter tree as ``{PyTorch key: array in PyTorch's layout}``.

    Arrays may be numpy or jax arrays; types are kept (bfloat16 as ``ml_dtypes.bfloat16``). Raises
    ValueError when two parameters would get the same key.
    """
    return {
        key: to_torch_layout(path[-1], np.asarray(leaf))
        for key, (path, leaf) in by_torch_key(params).items()
    }


def by_torch_key(params: Mapping[str, Any]) -> dict[str, tuple[tuple[str, ...], Any]]:
    """``{PyTorch key: (path, leaf)}`` of every leaf; ValueError when two would get the same key."""
    found: dict[str, tuple[tuple[str, ...], Any]] = {}
    for path, leaf in flatten(params):
        key = torch_key(path)
        if key in found:
            raise ValueError(
                f"two parameters are both called {key!r} in PyTorch; rename one of them"
            )
        found[key] = (path, leaf)
    return found


def from_torch(
    tensors: Mapping[str, np.ndarray], abstract: Mapping[str, Any], *, where: str = "the weights"
) -> Params:
    """The parameter tree with the shapes and types of ``abstract``, filled from PyTorch tensors.

    Args:
        tensors: ``{PyTorch key: array in PyTorch's layout}``, or what NumPy makes an array of (``shape`` and
            ``__array__``): one is asked for at a time, once all of their shapes fit.
        abstract: nested dict of anything with ``shape`` and ``dtype`` (``Network.abstract``).
        where: what the tensors are, for the error ("file x.safetensors").

    Returns a nested dict of numpy arrays, cast to the types of ``abstract``.

    Raises UserError, one line, with the keys that are missing, that the network does not have,
    and whose shape differs.
    """
    wanted = {torch_key(path): (path, leaf) for path, leaf in flatten(abstract)}
    missing = [key for key in wanted if key not in tensors]
    extra = [key for key in tensors if key not in wanted]
    misshapen = []
    for key, (path, leaf) in wanted.items():
        expected = torch_shape(path[-1], tuple(leaf.shape))
        if key in tensors and tuple(tensors[key].shape) != expected:
            misshapen.append(f"{key} is {tuple(tensors[key].shape)}, expected {expected}")
    refuse_misfit(where, missing, extra, misshapen)
    return unflatten(
        {
            path: from_torch_layout(path[-1], np.asarray(tensors[key])).astype(
                leaf.dtype, copy=False
            )
            for key, (path, leaf) in wanted.items()
        }
    )


def refuse_misfit(where: str, missing: list[str], extra: list[str], misshapen: list[str]) -> None:
    """Raise UserError unless all three lists are empty.

    One line with counts and the first names; where there are more, all of them are in a file of the temporary
    directory, which the line names, and below the traceback of --debug.
    """
    lists = {"missing": missing, "extra": extra, "misshapen": misshapen}
    complaints = [f"{len(items)} {what}: {listed(items)}" for what, items in lists.items() if items]
    if not complaints:
        return
    text = f"{where} does not fit this network: {'; '.join(complaints)}. "
    everything = "".join(f"{what}: {item}\n" for what, items in lists.items() for item in items)
    if max(map(len, lists.values())) > _SHOWN:
        text += f"All of them: {_written(everything)}. "
    error = UserError(
        f"{text}Use weights of the same network and sizes, or a config with the sizes of these weights"
    )
    error.add_note(everything)
    raise error


def _written(text: str) -> str:
    """A new file with the text, or what to do where none can be written."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="dexportrait-keys-", suffix=".txt", delete=False
        ) as stream:
            stream.write(text)
    except OSError:
        return "add --debug"
    return stream.name


def guessed_leaf(key: str, dimensions: int) -> str:
    """A PyTorch key's last word here, in all likelihood: a vector ``weight`` is a scale."""
    leaf = key.rsplit(".", 1)[-1]
    if leaf != "weight":
        return leaf
    return "scale" if dimensions == 1 else "kernel"


def layout_exceptions(params: Mapping[str, Any]) -> dict[str, str]:
    """``{PyTorch key: name here}`` where ``guessed_leaf`` would be wrong (embeddings, chiefly).

    Stored beside exported tensors, it lets ``from_torch_alone`` rebuild the tree without the
    network.
    """
    return {
        torch_key(path): path[-1]
        for path, leaf in flatten(params)
        if guessed_leaf(torch_key(path), len(leaf.shape)) != path[-1]
    }


def from_torch_alone(tensors: Mapping[str, np.ndarray], exceptions: Mapping[str, str]) -> Params:
    """The parameter tree of exported tensors, without a network to compare with."""
    leaves = {}
    for key, array in tensors.items():
        name = exceptions.get(key) or guessed_leaf(key, array.ndim)
        leaves[(*key.split(".")[:-1], name)] = from_torch_layout(name, np.asarray(array))
    return unflatten(leaves)


def listed(items: list[str]) -> str:
    """The first few, and how many more there are."""
    shown = ", ".join(items[:_SHOWN])
    rest = len(items) - _SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown
