"""One process per host: joining the others, who speaks for all, and leaving when one of them fails."""

from __future__ import annotations

import atexit
import os
import socket
import threading
import time
from collections.abc import Sequence

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
        and os.environ.get("MEGASCALE_NUM_SLICES", "1") == "1"
        and not any(os.environ.get(sign) for sign in _SIGNS[:3])
    ):
        return  # a TPU host on its own
    # JAX's own watch for preemptions takes SIGTERM away from whoever has it, and nothing here asks what it saw.
    jax.config.update("jax_enable_preemption_service", False)
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address and "JAX_NUM_PROCESSES" in os.environ:
        # All is known. In a Slurm job JAX would still ask Slurm, and take one GPU a process.
        jax.distributed.initialize(
            address,
            int(os.environ["JAX_NUM_PROCESSES"]),
            int(os.environ["JAX_PROCESS_ID"]),
            cluster_detection_method="deactivate",
        )
    else:
        jax.distributed.initialize(local_device_ids=_slurm_gpus())


def _slurm_gpus() -> list[int] | None:
    """The GPUs of this process among those that it sees, where Slurm started it; None: JAX decides.

    JAX takes the one whose number the process has on its node. That is right for a process a GPU which all see each
    other's, but not for a process a node, nor where each sees its own alone (`--gpus-per-task=1`).
    """
    known = os.environ
    if "SLURM_LOCALID" not in known or known.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    visible = known.get("CUDA_VISIBLE_DEVICES")
    count = len(visible.split(",")) if visible else int(known.get("SLURM_GPUS_ON_NODE") or 0)
    one_a_node = known.get("SLURM_NTASKS") == known.get("SLURM_STEP_NUM_NODES")
    return list(range(count)) if count and (one_a_node or count == 1) else None


def end_soon(code: int, seconds: float = 60.0, more: float = 5.0) -> None:
    """Bounds how long the end of a process that failed may take, where there are others.

    They do not know yet, and wait for it in their next collective, while JAX's shutdown waits for them: five minutes of
    a pod, after which all are killed. Its end is what they hear of within seconds.

    Args:
      code: exit code of the process.
      seconds: what a running save of it may take, which Python waits for first.
      more: what may take the rest.
    """
    if not jax.distributed.is_initialized():
        return
    _exit_after(seconds, code)
    atexit.register(_exit_after, more, code)  # runs when the threads that save have ended


def _exit_after(seconds: float, code: int) -> None:
    timer = threading.Timer(seconds, os._exit, [code])
    timer.daemon = True
    timer.start()


def is_main() -> bool:
    """True in the one process that prints and writes records."""
    return jax.process_index() == 0


def here() -> str:
    """This process, as errors name it."""
    return f"process {jax.process_index()} on {socket.gethostname()}"


class Agreement:
    """What all processes know together, asked often enough that a signal is not left waiting.

    Clocks and signals differ between hosts, while saving needs every one of them. Asking makes all of them wait for the
    slowest and for their devices, so that they ask about every `seconds`: at which step, each works out from what the
    slowest one took for the last ones. A process alone always knows.

    Args:
      step: steps done before; all processes begin with the same.
      seconds: between two times of asking, where steps are shorter.
    """

    def __init__(self, step: int, seconds: float = 10.0):
        self._seconds = seconds
        self._asked, self._at = step, time.monotonic()
        self._next = step + 1

    def due(self, step: int) -> bool:
        """Whether all ask after this step."""
        return jax.process_count() == 1 or step >= self._next

    def greatest(self, step: int, figures: dict[str, float]) -> dict[str, float]:
        """The greatest of each figure over all processes; all must ask after the same steps, for the same names."""
        now = time.monotonic()
        pace = (now - self._at) / max(step - self._asked, 1)
        if jax.process_count() > 1:
            mine = np.array([pace, *figures.values()], np.float32)
            pace, *greatest = multihost_utils.process_allgather(mine).max(axis=0).tolist()
            figures = dict(zip(figures, greatest, strict=True))
        self._asked, self._at = step, now
        self._next = step + max(1, int(self._seconds / max(pace, 1e-3)))
        return figures


def everywhere(holds: bool) -> bool:
    """Whether it holds in every process; all must ask."""
    if jax.process_count() == 1:
        return holds
    return bool(multihost_utils.process_allgather(np.array(holds, np.int32)).all())


def from_main(numbers: Sequence[int]) -> list[int]:
    """The main process's numbers, each below 2**31, in every process; all must ask, and may have other ones."""
    if jax.process_count() == 1:
        return list(numbers)
    count = int(multihost_utils.broadcast_one_to_all(np.array(len(numbers), np.int32)))
    if not count:
        return []
    mine = np.resize(np.array(numbers, np.int32), count)
    return np.asarray(multihost_utils.broadcast_one_to_all(mine)).tolist()


def wait_for_all(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
