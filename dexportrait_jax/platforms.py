"""The platform that a program is made for, which is not always the one that makes it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

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
