"""Predictions of the denoiser for the windows of one clip, and what of them is kept from step to step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dexportrait_jax.diffusion.guidance import Branch
from dexportrait_jax.errors import UserError
from dexportrait_jax.inference import Drive, Sampling, nbytes
from dexportrait_jax.models.animator.branches import NullReading, branch_conditions
from dexportrait_jax.models.animator.conditioning import Conditions

# Warped features of windows that are kept on the device between denoising steps. At the paper's sizes 24
# frames of them are 552 MB in half precision, so one window fits; those of a long clip are made anew.
WINDOW_CACHE_BYTES = 1 << 30
# Branches without reference and driver's pose: all windows have the same residuals, if any.
BARE: tuple[Branch, ...] = ("null", "expression")
# Keys of config.sampling that say how a clip is cut into windows.
WINDOW_KNOBS = ("overlap", "window_offset", "window_ends", "window_weights")


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


def check_windows(sampling: Sampling, length: int, *, temporal: bool) -> None:
    """UserError for flags that the windows of a model, of so many frames, cannot follow."""
    for name in _given(sampling):
        if not temporal:
            raise UserError(
                f"--{name} is for the video stage: an export of the image stage makes each frame alone; leave it "
                "out, or give an export of the video stage"
            )
    overlap = sampling.overlap
    if overlap is not None and not 0 <= overlap < length:
        raise UserError(
            f"--overlap={overlap}: windows of this model have {length} frames, so two can share 0 to {length - 1}"
        )


def idle_flags(sampling: Sampling, frames: int, length: int) -> str | None:
    """A line where flags of windows were given and a clip of so many frames fits one window of ``length``."""
    given = ", ".join(f"--{name}" for name in _given(sampling))
    if not given or frames > length:
        return None
    return f"{given} had no effect: the video's {frames} frames fit one window of {length}"


def _given(sampling: Sampling) -> list[str]:
    """Flags of windows that were given."""
    return [name for name in WINDOW_KNOBS if asdict(sampling)[name] is not None]


def grid_options(settings: dict[str, Any], length: int, *, temporal: bool) -> dict[str, Any]:
    """Arguments of ``windows.windowed`` by config.sampling; frames that stand alone need no overlap."""
    if not temporal:
        return {"length": length, "overlap": 0, "offset": "none"}
    # That of a config holds for clips of its own length, which may be shorter.
    grid = {"length": length, "overlap": min(settings["overlap"], length - 1)}
    grid |= {knob.removeprefix("window_"): settings[knob] for knob in WINDOW_KNOBS[1:]}
    return grid | {"seed": settings["seed"]}


class ClipWindows:
    """Predictions for windows of one clip; the parts that no step changes are kept while they fit.

    ``moving``: other steps have other windows.
    """

    def __init__(
        self,
        params: Any,
        programs: DenoiserPrograms,
        drive: Drive,
        bank: dict[str, Array],
        context: Array | None,
        reading: NullReading,
        *,
        moving: bool = False,
    ):
        self.params, self.programs = params, programs
        self.drive, self.bank, self.context = drive, bank, context
        self.keys_values = programs.keys_values(params, bank)
        self.reading = reading
        self._moving = moving
        self._kept: dict[bytes, Any] = {}

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
        if self._moving and key:  # only the branches of a step share a window
            self._kept = {other: kept for other, kept in self._kept.items() if not other}
        conditions = Conditions(reference=self.bank, source_pose=source, driving_pose=poses)
        residuals = self.programs.residuals(self.params, conditions)
        if nbytes(self._kept) + nbytes(residuals) <= WINDOW_CACHE_BYTES:
            self._kept[key] = residuals
        return residuals
