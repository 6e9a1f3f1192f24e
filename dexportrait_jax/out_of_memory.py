"""Devices whose memory is too small, in people's words and with what to change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import ml_collections

from dexportrait_jax.errors import UserError
from dexportrait_jax.plan_advice import advice


@contextlib.contextmanager
def in_words(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> Iterator[None]:
    """UserError where what runs inside needs more memory than the devices have: it would again, however often."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        changes = advice(config, dict(mesh.shape))
        less = f"; less need {', or '.join(changes)}" if changes else ""
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"the devices have too little memory for {config.stage} on {mesh.size} of them ({said}){less}, or take "
            "more devices; `dexportrait plan` tells for TPUs beforehand"
        ) from error
