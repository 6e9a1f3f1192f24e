"""What a network tells the compiler about the mesh it may run on, where the compiler would choose badly.

A network that is not on a mesh, or whose sizes the mesh does not divide, is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Shaped

SAMPLES = ("data", "fsdp")  # mesh axes that share the clips, or the sources, of a batch
FRAMES = ("context",)  # mesh axis that shares a clip's frames, or a source's targets


def spread(array: Array, *dimensions: tuple[str, ...]) -> Array:
    """`array`, whose first dimensions lie over these mesh axes, as far as they divide them; the others over none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return array
    over = (
        dividing(size, axes, mesh.shape)
        for size, axes in zip(array.shape, dimensions, strict=False)
    )
    return jax.lax.with_sharding_constraint(array, PartitionSpec(*over))


def attend_in_parts(
    attend: Callable[..., Array],
    query: Float[Array, "batch queries heads features"],
    key: Float[Array, "batch keys heads features"],
    value: Float[Array, "batch keys heads features"],
    *of_samples: Shaped[Array, "batch ..."],
) -> Float[Array, "batch queries heads features"]:
    """`attend` of every device's part of its arguments: samples over data, fsdp and context, heads over tensor.

    For attention that the compiler cannot cut up, kernels and loops over heads: it would bring everything everywhere.
    `of_samples` is what else it is told of each sample, such as which keys take part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend(query, key, value, *of_samples)
    over = dividing(query.shape[0], SAMPLES + FRAMES, mesh.shape)
    heads = dividing(query.shape[2], ("tensor",), mesh.shape)
    whole = PartitionSpec(over, None, heads, None)
    attend = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(whole, whole, whole, *(PartitionSpec(over) for _ in of_samples)),
        out_specs=whole,
        check_vma=False,  # kernels do not say what varies over the mesh
    )
    return attend(query, key, value, *of_samples)


def dividing(
    length: int, axes: tuple[str, ...], shape: Mapping[str, int]
) -> tuple[str, ...] | None:
    """The first of these axes of a mesh whose product divides a length."""
    taken: tuple[str, ...] = ()
    for axis in axes:
        size = shape.get(axis, 1)
        if length % size:
            break
        length //= size
        taken += (axis,)
    return taken or None
