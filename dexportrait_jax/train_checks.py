"""What no stage can be trained with, found before anything is compiled: of a config alone, on a mesh, and of data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import jax
import ml_collections
import numpy as np

from data_pipelines import loading
from dexportrait_jax import config_values, distributed, metric_sinks
from dexportrait_jax.errors import UserError


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for values that no stage can work with."""
    config_values.check(config)
    if config.data.latents and not config.stage.startswith("animator"):
        raise UserError(
            f"stage {config.stage!r} learns from pictures: config.data.latents is for the animator's stages; "
            "leave it out"
        )
    metric_sinks.check(config.report)


def check_shares(
    config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
) -> None:
    """Raises UserError where batch or clips cannot be cut into equal parts."""
    replicas = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.data.batch_size % (replicas * config.accumulate):
        raise UserError(
            f"config.data.batch_size={config.data.batch_size} cannot be shared by mesh data x fsdp = "
            f"{replicas} devices in {config.accumulate} part(s); choose a multiple of "
            f"{replicas * config.accumulate}, or spread over context or tensor, as FILE.py:VARIANT@TOPOLOGY does"
        )
    if mesh.shape["context"] == 1:
        return
    targets = loading.targets_of_a_source(config.data)
    if targets % mesh.shape["context"]:
        key = "frames" if config.data.mode == "video" else "targets"
        raise UserError(
            f"config.data.{key}={targets} cannot be shared by mesh context = {mesh.shape['context']}; choose a multiple"
        )
    # Of several sources, a device would hold targets that do not lie side by side in the batch of all targets, and
    # the compiler would gather them everywhere.
    if config.data.batch_size > replicas * config.accumulate:
        raise UserError(
            f"mesh context = {mesh.shape['context']} shares the targets of one source at a time, but each part of "
            f"mesh data x fsdp = {replicas} has {config.data.batch_size // (replicas * config.accumulate)}; choose "
            f"config.accumulate={config.data.batch_size // replicas}, or more of data and fsdp"
        )


def check_same_data(path: str, fingerprint: Mapping[str, str]) -> None:
    """Raises UserError in every process where one sees other data than the main process; all must ask.

    A batch is a function of (seed, n) and the data: rows of other data would be put beside each other unnoticed.

    Args:
      path: of the data, to be told.
      fingerprint: of what this process sees, as `survey.Survey` has it.
    """
    digest = hashlib.sha256(json.dumps(dict(fingerprint), sort_keys=True).encode()).digest()
    mine = np.frombuffer(digest, "<u2").tolist()
    same = distributed.from_main(mine) == mine
    if distributed.everywhere(same):
        return
    raise UserError(
        f"not every process sees the same data in {path}: {distributed.here()} sees "
        + ("what the main process sees" if same else "other data than the main process")
        + "; give all hosts the same copy, or a shared disk"
    )
