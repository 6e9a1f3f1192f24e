"""One process per host: joining the others, and who speaks for all."""

from __future__ import annotations

import os

import jax

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
