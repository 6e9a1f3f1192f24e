"""The diffusion animator at work: one source, clips denoised in windows, decoded in chunks.

DDIM with the progressive hybrid guidance (method.md 7.1, 7.2), windows as in 7.4. The reference,
the windows' warped features, the denoiser and the decoder are compiled once each; a clip's length
changes none of their shapes, and what is kept on the device is bounded (WINDOW_CACHE_BYTES). The
reference UNet runs once a clip, and so does the projection of its features to keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dexportrait_jax.diffusion.guidance import Branch, GuidancePlan, guidance_plan
from dexportrait_jax.diffusion.sampler import blurred_start, frame_noise, sample, sampling_timesteps
from dexportrait_jax.diffusion.schedule import NoiseSchedule
from dexportrait_jax.diffusion.windows import windowed
from dexportrait_jax.errors import UserError
from dexportrait_jax.inference import BATCH, Drive, PortraitModel, Sampling, padded
from dexportrait_jax.models.animator.branches import NullReading, branch_conditions
from dexportrait_jax.models.animator.conditioning import Conditions
from dexportrait_jax.state import Network
from dexportrait_jax.tasks.animator_networks import denoiser_network
from dexportrait_jax.tasks.pictures import to_float, to_uint8

# Warped features of windows that are kept on the device between denoising steps. At the paper's sizes 24
# frames of them are 552 MB in half precision, so one window fits; those of a long clip are made anew.
WINDOW_CACHE_BYTES = 1 << 30
# Knobs of config.sampling that an older export lacks, at what was true before them.
LATER_KNOBS = {"null_reference": "dropped", "null_pose": "zero", "expression_guidance": None}


class DenoiserPrograms(NamedTuple):
    """What is compiled of a denoiser: what is fixed for a clip, for a window, and a pass."""

    keys_values: Callable[..., Any]
    residuals: Callable[..., Any]
    predict: Callable[..., Any]


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
        self.schedule = NoiseSchedule(**self.config.diffusion)
        self._source = jax.jit(self._encode_source)
        self._decode = jax.jit(self._decode_batch)
        self._denoisers: dict[bool, DenoiserPrograms] = {}

    @property
    def clip_length(self) -> int:
        return self.config.data.frames if "temporal" in self.networks else 1

    @property
    def window(self) -> tuple[int, int]:
        """Length of a window and the overlap of two."""
        if "temporal" not in self.networks:
            return BATCH, 0
        length = self.config.data.frames
        return length, min(self.config.sampling.overlap, length - 1)

    # --- settings ---------------------------------------------------------------------

    def plan(self, sampling: Sampling) -> GuidancePlan:
        """The guidance of every step.

        Where only the number of steps is given, S keeps its share of them (5 of 35). UserError
        where 2 S is more than the steps.
        """
        settings = self._chosen(sampling)
        if 2 * settings["hybrid_steps"] > settings["steps"]:
            raise UserError(
                f"--hybrid_steps={settings['hybrid_steps']} must be at most half of the "
                f"{settings['steps']} denoising steps"
            )
        if settings["steps"] > self.schedule.steps:
            raise UserError(f"--steps={settings['steps']}: at most {self.schedule.steps}")
        if settings["expression_guidance"] is not None and settings["reading"] != "three_scale":
            raise UserError("--expression_guidance needs --reading=three_scale")
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
            chosen["hybrid_steps"] = round(share * chosen["steps"])
        trained = self.config.model.denoiser.get("expression_null", "learned")
        if chosen["expression_null"] == "learned" and trained != "learned":
            raise UserError(
                f"--expression_null=learned: this model was trained with {trained!r} and has no "
                "null tokens; use zero or source"
            )
        return chosen

    def settings(self, sampling: Sampling) -> dict[str, Any]:
        self.plan(sampling)
        # All of it: a picture is not to be had again from the steps and the scale alone.
        return self._chosen(sampling)

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
            frames = self.window[0] if temporal else 1

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

    # --- a clip -----------------------------------------------------------------------

    def animate(self, source, drive, sampling, report=lambda part, note: None):
        settings, plan = self._chosen(sampling), self.plan(sampling)
        latent, bank, context = self._source(self.params, source[None], drive.source_pose[None])
        windows = _Windows(self, drive, bank, context, settings)
        length, overlap = self.window
        source_latent = np.asarray(latent)[0]
        shape, steps = source_latent.shape, len(plan.steps)
        share = 0.95  # of the work; the rest is decoding
        latents = sample(
            windowed(windows.predict, len(drive), length=length, overlap=overlap),
            self.schedule,
            plan,
            self._start(source_latent, len(drive), plan, sampling.seed),
            spacing=settings["spacing"],
            offset=settings["offset"],
            eta=settings["eta"],
            noise=lambda step, part: self._noise(part, shape, sampling.seed, step + 1),
            progress=lambda step, done: report(
                share * (step + done) / steps, f"step {step + 1} of {steps}"
            ),
        )
        for first in range(0, len(latents), BATCH):
            chunk = latents[first : first + BATCH]
            # Cut on the host: on the device every number of frames would be a program of its own.
            images = np.asarray(self._decode(self.params, padded(chunk, BATCH)))[: len(chunk)]
            done = (first + len(chunk)) / len(latents)
            yield to_uint8(images)
            report(share + (1 - share) * done, "")

    def _start(
        self, source: Float[np.ndarray, "h w c"], frames: int, plan: GuidancePlan, seed: int
    ) -> Float[np.ndarray, "frames h w c"]:
        """Pure noise, or the blurred source with noise (``sampling.start``, method.md 7.1)."""
        noise = self._noise(slice(0, frames), source.shape, seed, step=0)
        if self.config.sampling.start == "noise":
            return noise
        options = {"spacing": self.config.sampling.spacing, "offset": self.config.sampling.offset}
        first = sampling_timesteps(self.schedule, len(plan.steps), **options)[0]
        return blurred_start(self.schedule, source, noise, int(first))

    def _noise(self, part: slice, shape: tuple[int, ...], seed: int, step: int) -> np.ndarray:
        """Noise of the start (step 0) or of a stochastic step, for some frames."""
        sampling, frames = self.config.sampling, part.stop - part.start
        noise = frame_noise(
            seed, frames, shape, first=part.start, step=step, shared=sampling.shared_noise
        )
        noise *= np.float32(sampling.temperature)
        return noise


class _Windows:
    """Predictions for windows of one clip; the parts that no step changes are kept while they fit."""

    def __init__(
        self, model: AnimatorModel, drive: Drive, bank: dict[str, Array], context, settings
    ):
        self.model, self.drive, self.bank, self.context = model, drive, bank, context
        null = settings["expression_null"]
        self.programs = model._denoiser(null)
        self.keys_values = self.programs.keys_values(model.params, bank)
        self.reading = NullReading(
            expression="source" if null == "source" else "null",
            reference=settings["null_reference"],
            pose=settings["null_pose"],
        )
        self._kept: dict[bytes, Any] = {}
        self._bytes = 0

    def predict(self, latents, timesteps, frames, branch) -> Array:
        """The prediction of one branch for the frames of one window."""
        source_expression = np.repeat(self.drive.source_expression[None], len(frames), 0)
        conditions = branch_conditions(
            self._conditions(frames, branch), branch, self.reading, source_expression
        )
        return self.programs.predict(self.model.params, latents, timesteps, conditions)

    def _conditions(self, frames: np.ndarray, branch: Branch) -> Conditions:
        """Those of "full", with keys, values and residuals in place of the reference's features."""
        context = None
        if self.context is not None:
            context = jnp.repeat(self.context, len(frames), 0)
        source = self.drive.source_pose[None]
        poses = self.drive.poses[frames]
        bare = branch in ("null", "expression")
        kept = b"" if bare else frames.tobytes()
        if bare:  # in whose poses nothing moves: all windows have one residual, if any
            poses = np.repeat(source, len(frames), 0)
        needs_residuals = not bare or (
            self.reading.reference == "kept" and self.reading.pose == "source"
        )
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
        residuals = self.programs.residuals(self.model.params, conditions)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(residuals))
        if self._bytes + size <= WINDOW_CACHE_BYTES:
            self._bytes += size
            self._kept[key] = residuals
        return residuals
