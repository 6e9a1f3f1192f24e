"""The diffusion animator at work: one source, clips denoised in windows, decoded in chunks.

DDIM with the progressive hybrid guidance (method.md 7.1, 7.2), windows as in 7.4. The reference,
the windows' warped features, the denoiser and the decoder are compiled once each; a clip's length
changes none of their shapes, and what is kept on the device is bounded (WINDOW_CACHE_BYTES). A clip's
latents (64 KiB a frame at 512 pixels) are on disk, see `spill`; in memory are those of a window. The
reference UNet runs once a clip, and so does the projection of its features to keys and values.
"""

from __future__ import annotations

import collections
import functools
import math
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from data_pipelines import spill
from dexportrait_jax.animator_windows import (
    BARE,
    WINDOW_CACHE_BYTES,
    ClipWindows,
    DenoiserPrograms,
    check_windows,
    grid_options,
    idle_flags,
    null_reading,
    warps,
)
from dexportrait_jax.diffusion.guidance import GuidancePlan, guidance_plan
from dexportrait_jax.diffusion.sampler import blurred_start, frame_noise, sample, sampling_timesteps
from dexportrait_jax.diffusion.schedule import noise_schedule
from dexportrait_jax.diffusion.windows import windowed
from dexportrait_jax.errors import UserError
from dexportrait_jax.inference import (
    BATCH,
    ClipProgram,
    PortraitModel,
    Sampling,
    nbytes,
    padded,
)
from dexportrait_jax.models.animator.branches import NullReading, branch_conditions
from dexportrait_jax.models.animator.conditioning import Conditions
from dexportrait_jax.state import Network
from dexportrait_jax.tasks.animator_networks import denoiser_network
from dexportrait_jax.tasks.pictures import to_float, to_uint8

# Knobs of config.sampling that an older export lacks, at what was true before them.
LATER_KNOBS = {"null_reference": "dropped", "null_pose": "zero", "expression_guidance": None}
LATER_KNOBS |= {"window_offset": "none", "window_ends": "open", "window_weights": "triangular"}


class AnimatorModel(PortraitModel):
    """An export of the image stage (every frame alone) or the video stage (windows of frames)."""

    groups = (
        "pose",
        "expression",
        "autoencoder",
        "reference",
        "denoiser",
        "temporal",
        "image_encoder",
    )

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.schedule = noise_schedule(self.config.diffusion)
        self._source = jax.jit(self._encode_source)
        self._decode = jax.jit(self._decode_batch)
        self._denoisers: dict[bool, DenoiserPrograms] = {}

    @property
    def clip_length(self) -> int:
        return self.config.data.frames if self._temporal else 1

    @property
    def window(self) -> int:
        """Frames that the denoiser is given together."""
        return self.config.data.frames if self._temporal else BATCH

    @property
    def _temporal(self) -> bool:
        return "temporal" in self.networks

    # --- settings ---------------------------------------------------------------------

    def plan(self, sampling: Sampling) -> GuidancePlan:
        """The guidance of every step.

        Where only the number of steps is given, S keeps its share of them (5 of 35). UserError
        where 2 S is more than the steps, or these are fewer than 1 or more than the schedule's.
        """
        settings = self._chosen(sampling)
        # First, or S, which follows the steps, is said to be wrong.
        if not 1 <= settings["steps"] <= self.schedule.steps:
            raise UserError(f"--steps={settings['steps']}: from 1 to {self.schedule.steps}")
        if 2 * settings["hybrid_steps"] > settings["steps"]:
            raise UserError(
                f"--hybrid_steps={settings['hybrid_steps']} must be at most half of the "
                f"{settings['steps']} denoising steps"
            )
        if settings["expression_guidance"] is not None and settings["reading"] != "three_scale":
            raise UserError("--expression_guidance needs --reading=three_scale")
        check_windows(sampling, self.window, temporal=self._temporal)
        return guidance_plan(
            settings["steps"],
            scale=settings["guidance"],
            hold=settings["hybrid_steps"],
            reading=settings["reading"],
            expression_scale=settings["expression_guidance"],
        )

    def _chosen(self, sampling: Sampling) -> dict[str, Any]:
        """All of config.sampling, and what is given in its place."""
        default = {**LATER_KNOBS, **self.config.sampling.to_dict()}
        given = {name: value for name, value in asdict(sampling).items() if value is not None}
        chosen = {**default, **given}
        if sampling.hybrid_steps is None:
            share = default["hybrid_steps"] / default["steps"]
            # Rounded up it could be more than half, which nobody asked for.
            chosen["hybrid_steps"] = min(round(share * chosen["steps"]), chosen["steps"] // 2)
        trained = self.config.model.denoiser.get("expression_null", "learned")
        if chosen["expression_null"] == "learned" and trained != "learned":
            if sampling.expression_null is None:  # the config's default, which nobody asked for
                return chosen | {"expression_null": trained}
            raise UserError(
                f"--expression_null=learned: this model was trained with {trained!r} and has no "
                "null tokens; use zero or source"
            )
        return chosen

    def _reading(self, settings: dict[str, Any]) -> NullReading:
        return null_reading(settings, self.config.model.denoiser.get("drop_attn2", "image"))

    def settings(self, sampling: Sampling) -> dict[str, Any]:
        self.plan(sampling)
        # All of it: a picture is not to be had again from the steps and the scale alone.
        return self._chosen(sampling)

    def idle_flags(self, sampling: Sampling, frames: int) -> str | None:
        return idle_flags(sampling, frames, self.window)

    # --- compiled parts ---------------------------------------------------------------

    def _encode_source(self, params, source, source_pose):
        """Scaled latent of the source (the mean), the reference bank, and the context of attn2."""
        autoencoder = self.networks["autoencoder"].bind(params["autoencoder"])
        image = to_float(source)
        latent = autoencoder.encode(image)[0].astype(jnp.float32) * autoencoder.scale
        context = None
        if "image_encoder" in self.networks:
            encoder = self.networks["image_encoder"].bind(params["image_encoder"])
            shape = (1, encoder.image_size, encoder.image_size, 3)
            context = encoder(jax.image.resize(image, shape, "bilinear"))[:, None]
        bank = self.networks["reference"].bind(params["reference"])(latent, context, source_pose)
        return latent, bank, context

    def _decode_batch(self, params, latents):
        autoencoder = self.networks["autoencoder"].bind(params["autoencoder"])
        return autoencoder.decode(latents / autoencoder.scale)

    def _denoiser(self, null: str) -> DenoiserPrograms:
        zero = null == "zero"
        if zero not in self._denoisers:
            network = self._denoiser_network(zero)
            temporal = self.networks.get("temporal")
            frames = self.window if temporal else 1

            def keys_values(params, bank):
                return network.bind(params["denoiser"]).keys_values(bank)

            def residuals(params, conditions):
                return network.bind(params["denoiser"]).residuals(conditions)

            def predict(params, latents, timesteps, conditions):
                modules = temporal.bind(params["temporal"]) if temporal else None
                return network.bind(params["denoiser"])(
                    latents, timesteps, conditions, temporal=modules, frames=frames
                )

            self._denoisers[zero] = DenoiserPrograms(
                jax.jit(keys_values), jax.jit(residuals), jax.jit(predict)
            )
        return self._denoisers[zero]

    def _denoiser_network(self, zero: bool) -> Network:
        if not zero:
            return self.networks["denoiser"]
        # The same weights, but for the learned null tokens.
        return denoiser_network(self.config, expression_null="zero")

    def clip_programs(self, sampling):
        settings, plan = self._chosen(sampling), self.plan(sampling)
        denoiser = self._denoiser(settings["expression_null"])
        length, data = self.window, self.config.data
        source = jax.ShapeDtypeStruct((1, data.image_size, data.image_size, 3), jnp.uint8)
        pose, poses = (jax.ShapeDtypeStruct((n, 3, 4), jnp.float32) for n in (1, length))
        latent, bank, context = jax.eval_shape(self._source, self.params, source, pose)
        latents = jax.ShapeDtypeStruct((length, *latent.shape[1:]), jnp.float32)
        timesteps = jax.ShapeDtypeStruct((length,), jnp.int32)
        warped = Conditions(reference=bank, source_pose=pose, driving_pose=poses)
        residuals = jax.eval_shape(denoiser.residuals, self.params, warped)
        kept = {
            "keys_values": jax.eval_shape(denoiser.keys_values, self.params, bank),
            "residuals": residuals,
        }
        if context is not None:
            context = jax.ShapeDtypeStruct((length, *context.shape[1:]), context.dtype)
        encode, expression = self._encode_program(length)
        expressions = jax.ShapeDtypeStruct((length, expression.shape[-1]), expression.dtype)
        full = Conditions(
            **kept,
            source_pose=pose,
            driving_pose=poses,
            expression=expressions,
            context=context,
        )
        reading = self._reading(settings)
        passes = collections.Counter(branch for step in plan.steps for branch in step.branches)
        # Those of the branches that warp nothing are made for other poses than those of the rest.
        warpings = sum(times for branch, times in passes.items() if warps(branch, reading))
        if nbytes(residuals) <= WINDOW_CACHE_BYTES:
            warpings = 1
        programs = [
            encode,
            ClipProgram("source", self._source, (self.params, source, pose), 1),
            ClipProgram("keys and values", denoiser.keys_values, (self.params, bank), 1),
            ClipProgram("warp", denoiser.residuals, (self.params, warped), warpings),
        ]
        for name, branches in (("denoiser", ("full", "reduced")), ("bare denoiser", BARE)):
            times = sum(passes[branch] for branch in branches)
            if times:
                conditions = jax.eval_shape(
                    functools.partial(branch_conditions, branch=branches[0], reading=reading),
                    full,
                    source_expression=expressions,
                )
                arguments = (self.params, latents, timesteps, conditions)
                programs.append(ClipProgram(name, denoiser.predict, arguments, times))
        chunk = jax.ShapeDtypeStruct((BATCH, *latent.shape[1:]), jnp.float32)
        programs.append(
            ClipProgram("decode", self._decode, (self.params, chunk), math.ceil(length / BATCH))
        )
        # Of a clip of many windows: the residuals of as many as are kept, and of the one that is at work.
        window = nbytes(residuals)
        others = window * (WINDOW_CACHE_BYTES // window) if window else 0
        return length, programs, nbytes([bank, kept]) + others

    # --- a clip -----------------------------------------------------------------------

    def animate(self, source, drive, sampling, report=lambda part, note: None):
        settings, plan = self._chosen(sampling), self.plan(sampling)
        latent, bank, context = self._source(self.params, source[None], drive.source_pose[None])
        programs = self._denoiser(settings["expression_null"])
        grid = grid_options(settings, self.window, temporal=self._temporal)
        moving = grid["offset"] == "random"
        windows = ClipWindows(
            self.params, programs, drive, bank, context, self._reading(settings), moving=moving
        )
        source_latent = np.asarray(latent)[0]
        shape, steps = source_latent.shape, len(plan.steps)
        start = spill.zeros((len(drive), *shape))
        for first in range(0, len(drive), BATCH):
            part = slice(first, min(first + BATCH, len(drive)))
            start[part] = self._start(source_latent, part, settings)
        share = 0.95  # of the work; the rest is decoding
        latents = sample(
            windowed(windows.predict, len(drive), **grid),
            self.schedule,
            plan,
            start,
            spacing=settings["spacing"],
            offset=settings["offset"],
            eta=settings["eta"],
            noise=lambda step, part: self._noise(part, shape, sampling.seed, step + 1),
            progress=lambda step, done: report(
                share * (step + done) / steps, f"step {step + 1} of {steps}"
            ),
            in_place=True,
        )
        for first in range(0, len(latents), BATCH):
            chunk = latents[first : first + BATCH]
            finite = np.isfinite(chunk).all(axis=(1, 2, 3))
            if not finite.all():
                raise UserError(
                    f"frame {first + int(np.argmin(finite))} cannot be shown: its latents are not finite after "
                    f"{steps} denoising steps; lower --guidance, or give an export whose training did not diverge"
                )
            # Cut on the host: on the device every number of frames would be a program of its own.
            images = np.asarray(self._decode(self.params, padded(chunk, BATCH)))[: len(chunk)]
            done = (first + len(chunk)) / len(latents)
            yield to_uint8(images)
            report(share + (1 - share) * done, "")

    def _start(
        self, source: Float[np.ndarray, "h w c"], part: slice, settings: dict[str, Any]
    ) -> Float[np.ndarray, "frames h w c"]:
        """Pure noise, or the blurred source with noise (``sampling.start``, method.md 7.1), of some frames."""
        noise = self._noise(part, source.shape, settings["seed"], step=0)
        if settings["start"] == "noise":
            return noise
        options = {name: settings[name] for name in ("spacing", "offset")}
        first = sampling_timesteps(self.schedule, settings["steps"], **options)[0]
        return blurred_start(self.schedule, source, noise, int(first))

    def _noise(self, part: slice, shape: tuple[int, ...], seed: int, step: int) -> np.ndarray:
        """Noise of the start (step 0) or of a stochastic step, for some frames."""
        sampling, frames = self.config.sampling, part.stop - part.start
        noise = frame_noise(
            seed, frames, shape, first=part.start, step=step, shared=sampling.shared_noise
        )
        noise *= np.float32(sampling.temperature)
        return noise
