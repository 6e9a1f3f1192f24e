"""Meshes and where every array lives on them.

Axes: `data` (replicas), `fsdp` (parameters and batch), `context` (a clip's frames, or a source's targets; parameters
too), `tensor` (heads and feed-forward widths). Parameters: the first rule whose pattern matches gives `tensor` its
dimension; the largest that is left goes over `fsdp` and `context`, if it can be cut. Optimizer state and moving
averages follow their parameters, because their paths end alike.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dexportrait_jax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")
# Devices that share the targets of a source need the same weights no more than others do: each keeps its part.
PARAMETER_AXES = ("fsdp", "context")

# Attention heads and feed-forward widths over `tensor`: columns of the first matrix, rows of the second.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r".*/(to_q|to_k|to_v)/kernel", (None, "tensor")),
    (r".*/to_out/0/kernel", ("tensor", None)),
    (r".*/ff/net/0/proj/kernel", (None, "tensor")),
    (r".*/ff/net/2/kernel", ("tensor", None)),
)
# Below this, gathering costs more than the memory it saves.
SMALLEST_SHARDED = 2**14
# Half a GiB in float32, beside a chip's 16 and more.
LARGEST_WHOLE = 2**27


def make_mesh(
    config: ml_collections.ConfigDict,
    devices: Sequence[Any] | None = None,
    rows: int | None = None,
) -> Mesh:
    """A mesh over `devices` (default: all); one axis may be -1 and takes what is left.

    Args:
      config: the size of every axis.
      devices: what to spread over.
      rows: with it, data or fsdp at -1 takes only as many devices as can share a batch of so many rows evenly; the
        last devices stay idle. (In one process: with several, each has to have its part of the batch.)
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {axis: config[axis] for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError("config.mesh: only one axis may be -1")
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    for axis in free:
        most, rest = divmod(len(devices), known)
        shared = []
        if rows is not None and axis in BATCH_AXES:
            others = int(np.prod([sizes[other] for other in BATCH_AXES if other != axis]))
            shared = [size for size in range(1, most + 1) if rows % (size * others) == 0]
        if shared:
            sizes[axis] = max(shared)
            devices = devices[: known * sizes[axis]]
        elif not rest:
            sizes[axis] = most
    if -1 in sizes.values() or int(np.prod(list(sizes.values()))) != len(devices):
        wanted = ", ".join(f"{axis}={config[axis]}" for axis in AXES)
        raise UserError(
            f"config.mesh ({wanted}) does not fit {len(devices)} devices; the product must be equal"
        )
    # Automatic axes: the compiler places what we do not name. (The default is explicit since jax 0.9.)
    automatic = (AxisType.Auto,) * 4
    shape = tuple(sizes.values())
    if devices[0].platform != "tpu":
        # XLA gives every host of GPUs or CPUs a slice of its own. Any axis may cross hosts; the devices of one lie side
        # by side, so that `data` does so first.
        return Mesh(mesh_utils.create_device_mesh(shape, devices), AXES, axis_types=automatic)
    slices = len({getattr(device, "slice_index", None) for device in devices})
    # The network between slices is slow: gradients alone cross it.
    if sizes["data"] % slices:
        raise UserError(
            f"config.mesh.data={sizes['data']} cannot be shared by {slices} slices, and no other axis may cross them; "
            f"choose a multiple of {slices}"
        )
    inside = (sizes["data"] // slices, *(sizes[axis] for axis in AXES[1:]))
    # An axis may take a part of a row or column of chips. JAX's own make_mesh lets it on v5e alone, and then a row of
    # 16 cannot be 2 x 8.
    part = {"devices": devices, "allow_split_physical_axes": True}
    if slices == 1:
        placed = mesh_utils.create_device_mesh(inside, **part)
    else:
        placed = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1, 1), **part)
    return Mesh(placed, AXES, axis_types=automatic)


# Where these are cut over the features they read, XLA's partitioner (jaxlib 0.10.2) adds up their gradient once for
# every device that has the same sources, which is twice on a mesh of fsdp 2 and context or tensor 2. Cut over the
# features they make, it is right. tests/test_sharded_steps.py compares gradients on such meshes.
OUTPUTS_FIRST = r".*appearance_latent/convs/.*kernel"


def parameter_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Where the array at `path` ("a/b/kernel") of this shape goes."""
    axes: list[str | tuple[str, ...] | None] = [None] * len(shape)
    for pattern, spec in RULES:
        if re.fullmatch(pattern, path) and len(spec) == len(shape):
            for dimension, axis in enumerate(spec):
                if axis and shape[dimension] % mesh.shape[axis] == 0 and mesh.shape[axis] > 1:
                    axes[dimension] = axis
            break
    over = tuple(axis for axis in PARAMETER_AXES if mesh.shape[axis] > 1)
    if over and np.prod(shape, dtype=np.int64) >= SMALLEST_SHARDED:
        largest = sorted(range(len(shape)), key=lambda d: -shape[d])
        if re.fullmatch(OUTPUTS_FIRST, path):
            largest.remove(len(shape) - 1)
            largest.insert(0, len(shape) - 1)
        # One dimension for all axes, or else one for each: 320 can be cut by 64, not by 256.
        for together in (over, *((axis,) for axis in over if len(over) > 1)):
            size = int(np.prod([mesh.shape[axis] for axis in together]))
            free = (d for d in largest if axes[d] is None and shape[d] % size == 0)
            dimension = next(free, None)
            if dimension is not None:
                axes[dimension] = together if len(together) > 1 else together[0]
                if together == over:
                    break
    return PartitionSpec(*axes)


def state_shardings(tree: Any, mesh: Mesh) -> Any:
    """A tree of shardings like `tree` (arrays or shapes)."""

    def place(path, leaf):
        return NamedSharding(mesh, parameter_spec(path_name(path), tuple(leaf.shape), mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def put(tree: Any, places: Any) -> Any:
    """What every process has whole, on the devices of all: each puts its own parts there, and asks nobody.

    `jax.device_put` would have each array of all processes gathered on every device, to see that they are equal.
    """

    def put_one(leaf, place):
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, place, lambda index: whole[index])

    return jax.tree.map(put_one, tree, places)


def shardings_in_use(groups: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Of weights while a step computes with them: whole over `context`, and in small networks over `fsdp` too.

    Left to itself, the compiler sees the cut weights of networks whose pictures do not lie over `context`, such as
    those that read the source, and cuts the pictures' channels to match, back and forth. So it does over `fsdp` where
    pictures are smaller than weights. A network of at most LARGEST_WHOLE parameters is gathered once a step instead.
    """

    def size(tree):
        return sum(np.prod(leaf.shape, dtype=np.int64) for leaf in jax.tree.leaves(tree))

    small = {name for name, tree in groups.items() if size(tree) <= LARGEST_WHOLE}

    def place(path, leaf):
        gathered = PARAMETER_AXES if path[0].key in small else ("context",)
        spec = parameter_spec(path_name(path), tuple(leaf.shape), mesh)
        parts = ((part,) if isinstance(part, str) else part or () for part in spec)
        kept = (tuple(axis for axis in part if axis not in gathered) for part in parts)
        return NamedSharding(mesh, PartitionSpec(*(part or None for part in kept)))

    return jax.tree_util.tree_map_with_path(place, groups)


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's place in a tree, "a/b/kernel", alike for dicts, named tuples and sequences."""
    return "/".join(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shardings(batch: dict[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Sources over data and fsdp; the targets of each, a clip's frames or a source's pictures, over context."""

    def place(name):
        if name.startswith("target_"):
            return NamedSharding(mesh, PartitionSpec(BATCH_AXES, "context"))
        return NamedSharding(mesh, PartitionSpec(BATCH_AXES))

    return {name: place(name) for name in batch}


def rows_of_process(mesh: Mesh, sources: int) -> list[int]:
    """The sources of a batch that this process has to bring, in order: those of its devices.

    Processes whose devices share the targets of a source bring the same one.
    """
    place = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    parts = place.addressable_devices_indices_map((sources,)).values()
    return sorted({row for (part,) in parts for row in range(*part.indices(sources))})


def rows_of_several_processes(mesh: Mesh, sources: int) -> list[int]:
    """The sources of a batch that more than one process has to bring, in order."""
    parts = mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
    length = sources // len(parts)
    return [
        row
        for number, devices in enumerate(parts)
        if len({device.process_index for device in devices}) > 1
        for row in range(number * length, (number + 1) * length)
    ]


def put_batch(
    batch: dict[str, Any], mesh: Mesh, sources: int, rows: Sequence[int]
) -> dict[str, jax.Array]:
    """The global batch on the mesh, from the part that this process loaded.

    Args:
      batch: arrays whose first axis is `rows`.
      mesh: where they go.
      sources: of the global batch.
      rows: of it, that `batch` holds; see `rows_of_process`.
    """

    def part(value: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        first = rows.index(index[0].indices(sources)[0])
        count = len(range(*index[0].indices(sources)))
        return value[(slice(first, first + count), *index[1:])]

    return {
        name: jax.make_array_from_callback(
            (sources, *batch[name].shape[1:]), place, functools.partial(part, batch[name])
        )
        for name, place in batch_shardings(batch, mesh).items()
    }
