"""What to change where a plan does not fit: only what config, batch and mesh allow."""

from __future__ import annotations

from typing import Any, get_args

import jax
import ml_collections

from dexportrait_jax import config as configs
from dexportrait_jax.errors import UserError
from dexportrait_jax.models.rematerialisation import Remat
from dexportrait_jax.train_checks import check_shares


def advice(config: ml_collections.ConfigDict, sizes: dict[str, int], slices: int = 1) -> list[str]:
    """Changes that need less memory and keep batch and devices, the least costly first.

    Args:
      sizes: of the mesh's axes.
      slices: that `data` has to go over.

    Returns:
      For each change the flags, such as "--config.mesh.data=2 --config.mesh.fsdp=8".
    """
    changes: list[dict[str, Any]] = []
    if "remat" in config:
        known = list(get_args(Remat))
        changes += [{"remat": name} for name in known[known.index(config.remat) + 1 :]]
    for axis, source in (("fsdp", "data"), ("fsdp", "tensor"), ("context", "tensor")):
        if sizes[source] % 2 == 0:
            changes.append({f"mesh.{source}": sizes[source] // 2, f"mesh.{axis}": 2 * sizes[axis]})
    changes.append({"accumulate": 2 * config.accumulate})
    # Twice the devices for the targets of a source, and one source after the other, as that asks.
    replicas = sizes["data"] * sizes["fsdp"]
    for axis in ("data", "fsdp"):
        if sizes[axis] % 2 == 0:
            changes.append(
                {
                    f"mesh.{axis}": sizes[axis] // 2,
                    "mesh.context": 2 * sizes["context"],
                    "accumulate": 2 * config.data.batch_size // replicas,
                }
            )
    return [
        " ".join(f"--config.{key}={value}" for key, value in change.items())
        for change in changes
        if _allowed(config, sizes, change, slices)
    ]


def _allowed(config, sizes: dict[str, int], change: dict[str, Any], slices: int) -> bool:
    after = ml_collections.ConfigDict(config.to_dict())
    for key, value in change.items():
        configs.apply_override(after, f"{key}={value}")
    over = {axis: after.mesh[axis] if f"mesh.{axis}" in change else sizes[axis] for axis in sizes}
    if over["data"] % slices:
        return False
    try:
        check_shares(after, jax.sharding.AbstractMesh(tuple(over.values()), tuple(over)))
    except UserError:
        return False
    return True
