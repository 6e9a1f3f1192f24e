"""Predictions of the denoiser for the windows of one clip, and what of them is kept from step to step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dexportrait_jax.diffusion.guidance import Branch
from dexportrait_jax.inference import Drive
from dexportrait_jax.models.animator.branches import NullReading, branch_conditions
from dexportrait_jax.models.animator.conditioning import Conditions

# Warped features of windows that are kept on the device between denoising steps. At the paper's sizes 24
# frames of them are 552 MB in half precision, so one window fits; those of a long clip are made anew.
WINDOW_CACHE_BYTES = 1 << 30
# Branches without reference and driver's pose: all windows have the same residuals, if any.
BARE: tuple[Branch, ...] = ("null", "expression")


class DenoiserPrograms(NamedTuple):
    """What is compiled of a denoiser: what is fixed for a clip, for a window, and a pass."""

    keys_values: Callable[..., Any]
    residuals: Callable[..., Any]
    predict: Callable[..., Any]


def null_reading(settings: dict[str, Any], drop_attn2: str) -> NullReading:
    """What config.sampling says of the branches that leave something out, and how the denoiser was trained."""
    return NullReading(
        expression="source" if settings["expression_null"] == "source" else "null",
        reference=settings["null_reference"],
        pose=settings["null_pose"],
        context="kept" if drop_attn2 == "never" else "dropped",
    )


def warps(branch: Branch, reading: NullReading) -> bool:
    """Does a pass of this branch read warped features of the reference?"""
    return branch not in BARE or (reading.reference == "kept" and reading.pose == "source")


class ClipWindows:
    """Predictions for windows of one clip; the parts that no step changes are kept while they fit."""

    def __init__(
        self,
        params: Any,
        programs: DenoiserPrograms,
        drive: Drive,
        bank: dict[str, Array],
        context: Array | None,
        reading: NullReading,
    ):
        self.params, self.programs = params, programs
        self.drive, self.bank, self.context = drive, bank, context
        self.keys_values = programs.keys_values(params, bank)
        self.reading = reading
        self._kept: dict[bytes, Any] = {}
        self._bytes = 0

    def predict(self, latents, timesteps, frames, branch) -> Array:
        """The prediction of one branch for the frames of one window."""
        source_expression = np.repeat(self.drive.source_expression[None], len(frames), 0)
        conditions = branch_conditions(
            self._conditions(frames, branch), branch, self.reading, source_expression
        )
        return self.programs.predict(self.params, latents, timesteps, conditions)

    def _conditions(self, frames: np.ndarray, branch: Branch) -> Conditions:
        """Those of "full", with keys, values and residuals in place of the reference's features."""
        context = None
        if self.context is not None:
            context = jnp.repeat(self.context, len(frames), 0)
        source = self.drive.source_pose[None]
        poses = self.drive.poses[frames]
        bare = branch in BARE
        kept = b"" if bare else frames.tobytes()
        if bare:  # in whose poses nothing moves: all windows have one residual, if any
            poses = np.repeat(source, len(frames), 0)
        needs_residuals = warps(branch, self.reading)
        return Conditions(
            keys_values=self.keys_values,
            residuals=self._residuals(kept, source, poses) if needs_residuals else None,
            source_pose=source,
            driving_pose=poses,
            expression=self.drive.expressions[frames],
            context=context,
        )

    def _residuals(self, key: bytes, source: np.ndarray, poses: np.ndarray) -> Any:
        if key in self._kept:
            return self._kept[key]
        conditions = Conditions(reference=self.bank, source_pose=source, driving_pose=poses)
        residuals = self.programs.residuals(self.params, conditions)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(residuals))
        if self._bytes + size <= WINDOW_CACHE_BYTES:
            self._bytes += size
            self._kept[key] = residuals
        return residuals
