"""One process per host: joining the others, and who speaks for all."""

from __future__ import annotations

import os

import jax
import numpy as np
from jax.experimental import multihost_utils

# Set by launchers of ours, by JAX's own, by Slurm's srun and on Cloud TPU pods.
_SIGNS = (
    "JAX_COORDINATOR_ADDRESS",
    "COORDINATOR_ADDRESS",
    "SLURM_STEP_NODELIST",
    "TPU_WORKER_HOSTNAMES",
)


def initialize(mode: str = "auto") -> None:
    """Joins the other processes; must run before any device is touched.

    Args:
      mode: "on", "off", or "auto" (on when the environment names a coordinator or a cluster). A coordinator of our
        own is named by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    if mode == "off" or (mode == "auto" and not any(os.environ.get(sign) for sign in _SIGNS)):
        return
    if (
        mode == "auto"
        and "," not in os.environ.get("TPU_WORKER_HOSTNAMES", ",")
        and not any(os.environ.get(sign) for sign in _SIGNS[:3])
    ):
        return  # a TPU host on its own
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address and "JAX_NUM_PROCESSES" in os.environ:
        jax.distributed.initialize(
            address, int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
        )
    else:
        jax.distributed.initialize()


def is_main() -> bool:
    """True in the one process that prints and writes records."""
    return jax.process_index() == 0


def agree(save: bool, stop: bool) -> tuple[bool, bool]:
    """What all processes do together: save when the main one finds it is time, stop when any was asked to.

    Clocks and signals differ between hosts, while saving needs every one of them. All must call this in the
    same step.
    """
    if jax.process_count() == 1:
        return save, stop
    asked = multihost_utils.process_allgather(np.array([save, stop], np.int32))
    return bool(asked[0, 0]), bool(asked[:, 1].any())


def everywhere(holds: bool) -> bool:
    """Whether it holds in every process; all must ask."""
    if jax.process_count() == 1:
        return holds
    return bool(multihost_utils.process_allgather(np.array(holds, np.int32)).all())


def wait_for_all(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
