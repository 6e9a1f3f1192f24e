"""The platform that a program is made for, which is not always the one that makes it, and what its compiler is told."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import jax

# XLA for TPUs cuts a product with weights that lie in parts into as many products, so as to send one part round a ring
# while another is multiplied. Sixteenths of SD1.5's kernels, 20 of 320 features, leave most of the matrix unit idle,
# and every part's sum goes to memory and back. Where an operand has fewer MiB than this, parts are gathered instead.
TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": str(2**20)}
# Part of the key under which JAX keeps what it traced: another platform traces again.
_planned = jax.make_user_context("")


def target_platform() -> str:
    """ "cpu", "gpu" or "tpu": what `planned_for` says, else what JAX runs on.

    Wherever a network is written differently for a platform, this is asked, and not `jax.default_backend()`: a CPU
    compiles programs for TPUs.
    """
    return _planned.value or jax.default_backend()


@contextlib.contextmanager
def planned_for(platform: str) -> Iterator[None]:
    """Programs traced inside are made for this platform."""
    with _planned(platform):
        yield


def jit_on(mesh: jax.sharding.Mesh, function: Callable, **how) -> Callable:
    """`jax.jit` of what runs on the whole mesh, with weights that may lie there in parts."""
    on_tpus = mesh.devices.flat[0].platform == "tpu"
    return jax.jit(function, compiler_options=TPU_OPTIONS if on_tpus else None, **how)
