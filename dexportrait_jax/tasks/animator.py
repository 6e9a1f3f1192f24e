"""Stages 2a and 2b: the latent-diffusion animator, first on images, then its temporal modules on clips.

Pose and expression encoders come frozen from the motion trainer, the autoencoder is frozen too. The image
stage trains the reference UNet and the denoiser with all its branches; the video stage trains the temporal
modules alone (method.md 4).
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float, Int

from data_pipelines.survey import Survey
from dexportrait_jax.diffusion.sampler import sampling_timesteps
from dexportrait_jax.diffusion.schedule import NoiseSchedule, noise_schedule, training_noise
from dexportrait_jax.errors import UserError
from dexportrait_jax.models.animator.conditioning import Conditions, random_token_keep
from dexportrait_jax.optim import make_optimizer
from dexportrait_jax.step import Outputs, Phase
from dexportrait_jax.tasks import losses
from dexportrait_jax.tasks.animator_config import check_config
from dexportrait_jax.tasks.animator_networks import build_networks
from dexportrait_jax.tasks.animator_start import UNETS, load_start
from dexportrait_jax.tasks.pictures import (
    encode_poses,
    flatten_targets,
    in_turn,
    to_float,
)


class AnimatorTask:
    """Both animator stages for `train.py`; `config.stage` says which."""

    def __init__(self, config: ml_collections.ConfigDict):
        check_config(config)
        self.config = config
        self.networks = build_networks(config)
        self.video = config.stage == "animator_video"
        self.schedule = noise_schedule(config.diffusion)
        _refuse_late_start(self.schedule, config.sampling)
        trained = ("temporal",) if self.video else UNETS
        self.ema_groups = trained
        self.phases = (
            Phase(
                "denoise",
                trained,
                self.loss,
                make_optimizer(config.optim.denoise, config.num_steps),
            ),
        )

    def check_data(self, found: Survey) -> None:
        """Any will do."""

    def events(self, step: int) -> frozenset[str]:
        """Every step is like every other."""
        return frozenset()

    def pretrained(self) -> dict[str, Any]:
        """What `config.init` names: an export of the image stage, or of the motion trainer and an autoencoder.

        The two UNets of `init.unet` go before those of `init.image`. In the image stage it may be an import of one
        published UNet, which both start from, and otherwise also brings the image encoder, where the model has one
        and `init.image_encoder` names none. The same export may be named more than once.

        Raises:
            UserError: nothing is named where something must be, or it does not fit this config.
        """
        init = self.config.init
        unet = list(UNETS)
        if self.video:
            # Two UNets that others replace may be trained as they like.
            left = {"temporal", *(unet if init.unet else ())}
            needed = {"image": [name for name in self.networks if name not in left]}
            more = {"unet": unet, "temporal": ["temporal"]}
        else:
            needed = {"motion": ["pose", "expression"], "autoencoder": ["autoencoder"]}
            more = {"unet": unet, "image_encoder": ["image_encoder"]}
            if "image_encoder" in self.networks and not init.image_encoder:
                more["unet"] = [*unet, "image_encoder"]
        for key in needed:
            if not init[key]:
                raise UserError(
                    f"config.init.{key} must name the exported weights that this stage starts from"
                )
        groups = {}
        for key, names in (needed | more).items():
            if init[key]:
                groups |= load_start(self.config, self.networks, key, names)
        return groups

    def constants(self) -> dict[str, Any]:
        """None."""
        return {}

    def abstract_constants(self) -> dict[str, Any]:
        """None."""
        return {}

    @jax.named_scope("autoencoder")
    def encode(
        self,
        params: dict[str, Any],
        batch: dict[str, Array],
        which: Literal["source", "target"],
        key: Array | None = None,
    ) -> Float[Array, "b h w c"]:
        """Scaled latents of a batch's frames: the mean, or with a key a sample (method.md 4.1).

        Sources (S), or targets (S*N). Their posterior is read from the batch where it was cached.
        """
        network = self.networks["autoencoder"].bind(params["autoencoder"])
        if f"{which}_latents" in batch:
            cached = batch[f"{which}_latents"].astype(jnp.float32)
            cached = cached.reshape(-1, *cached.shape[-4:])
            mean, log_variance = cached[:, 0], cached[:, 1]
        else:
            images = batch[f"{which}_image"]
            images = images.reshape(-1, *images.shape[-3:])
            mean, log_variance = network.encode(to_float(images))
        latents = mean if key is None else network.sample(mean, log_variance, key)
        return latents.astype(jnp.float32) * network.scale

    def conditions(
        self, params: dict[str, Any], batch: dict[str, Array], source_key: Array | None = None
    ) -> Conditions:
        """Everything but the drops, from a batch: reference bank, poses, expression latents, context.

        With ``source_key`` the reference network reads a sample of the source's posterior.
        """
        with jax.named_scope("pose"):
            poses = encode_poses(self.networks["pose"].bind(params["pose"]), batch)
        crops = to_float(flatten_targets(batch["target_expression_image"]))
        with jax.named_scope("expression"):
            expression = self.networks["expression"].bind(params["expression"])(crops)
        (source_poses, poses), expression = jax.lax.stop_gradient((poses, expression))
        sources = batch["source_image"].shape[0]
        context = None
        if "image_encoder" in self.networks:
            encoder = self.networks["image_encoder"].bind(params["image_encoder"])
            source = to_float(batch["source_image"])
            resized = _resized(source, self.config.model.image_encoder.image_size)
            with jax.named_scope("image_encoder"):
                context = encoder(resized)[:, None]
        latents = jax.lax.stop_gradient(self.encode(params, batch, "source", source_key))
        with jax.named_scope("reference"):
            bank = self.networks["reference"].bind(params["reference"])(
                latents, context, source_poses
            )
        targets = expression.shape[0] // sources
        return Conditions(
            reference=bank,
            source_pose=source_poses,
            driving_pose=poses,
            expression=expression,
            context=None if context is None else jnp.repeat(context, targets, 0),
        )

    def loss(self, params, batch, key, step, shared, events):
        """Mean squared error of the denoiser's prediction, with condition dropout (method.md 4.7)."""
        del step, shared, events
        config = self.config
        sources, targets = batch["target_pose_image"].shape[:2]
        keys = jax.random.split(key, 5)
        # The mean where the autoencoder was trained without sampling: its variance then means nothing.
        target_key = source_key = None
        if config.sample_latents:
            target_key, source_key = keys[0], jax.random.fold_in(keys[0], 1)
        latents = jax.lax.stop_gradient(self.encode(params, batch, "target", target_key))
        conditions = self.conditions(params, batch, source_key)

        # A clip has one noise level and one fate of its conditions; images each have their own.
        independent = sources if self.video else sources * targets
        repeats = sources * targets // independent
        timesteps = draw_timesteps(keys[1], independent, self.schedule.steps, config.timestep_power)
        timesteps = jnp.repeat(timesteps, repeats)
        keep = {
            name: jnp.repeat(value, repeats)
            for name, value in draw_keeps(keys[2], independent, config.dropout).items()
        }
        conditions = conditions.replace(**keep)
        if config.dropout.reference_tokens > 0:
            conditions = conditions.replace(
                reference_token_keep=random_token_keep(
                    keys[4], conditions.reference, config.dropout.reference_tokens
                )
            )

        noise = training_noise(keys[3], latents.shape, config.noise_offset, repeats)
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        prediction = self._denoise(params, noisy, timesteps, conditions, targets)
        wanted = self.schedule.target(latents, noise, timesteps)
        weights = None
        if config.min_snr_gamma > 0:
            weights = self.schedule.min_snr_weights(timesteps, config.min_snr_gamma)
        places = None
        if config.component_weight > 0:
            mask = flatten_targets(batch["target_component_mask"]).astype(jnp.float32) / 255.0
            # Of a latent, the mean of what it shows.
            mask = jax.image.resize(mask, latents.shape[:3], "linear")
            places = 1.0 + config.component_weight * mask
        return losses.denoising_error(prediction, wanted, weights, places), Outputs({}, {})

    @jax.named_scope("denoiser")
    def _denoise(self, params, noisy, timesteps, conditions: Conditions, targets: int):
        temporal = self.networks["temporal"].bind(params["temporal"]) if self.video else None
        return self.networks["denoiser"].bind(params["denoiser"])(
            noisy, timesteps, conditions, temporal=temporal, frames=targets if self.video else 1
        )

    def preview(
        self, params: dict[str, Any], batch: dict[str, Array]
    ) -> Float[Array, "sources*targets h w 3"]:
        """What one denoising step from 60 % noise makes of a batch's targets: cheap, and shows the pose."""
        targets = batch["target_image"].shape[1]
        network = self.networks["autoencoder"].bind(params["autoencoder"])
        with jax.named_scope("autoencoder"):
            for which in ("source", "target"):
                images = batch[f"{which}_image"].reshape(-1, *batch["source_image"].shape[1:])
                posterior = in_turn(
                    lambda image: jnp.stack(network.encode(to_float(image)), axis=1), images
                )
                batch = batch | {f"{which}_latents": posterior}
        latents = self.encode(params, batch, "target")
        timesteps = jnp.full((latents.shape[0],), self.schedule.steps * 6 // 10)
        noise = jax.random.normal(jax.random.key(0), latents.shape)
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        conditions = self.conditions(params, batch)
        prediction = self._denoise(params, noisy, timesteps, conditions, targets)
        clean = self.schedule.clean(prediction, noisy, timesteps)
        with jax.named_scope("autoencoder"):
            return in_turn(network.decode, clean / network.scale)


def draw_timesteps(key: Array, count: int, steps: int, power: float) -> Int[Array, " count"]:
    """Timesteps 0 .. steps - 1 with a density that grows as timestep^(power - 1); 1 is uniform."""
    place = jax.random.uniform(key, (count,)) ** (1 / power)
    # A float just below 1 times `steps` may round up to `steps`.
    return jnp.minimum((place * steps).astype(jnp.int32), steps - 1)


def draw_keeps(
    key: Array, count: int, rates: ml_collections.ConfigDict
) -> dict[str, Float[Array, " count"]]:
    """Which conditions each sample keeps: everything dropped, expression alone, or pose alone (method.md 4.7)."""
    draw = jax.random.uniform(key, (count,))
    everything = draw < rates.everything
    expression = (draw >= rates.everything) & (draw < rates.everything + rates.expression)
    floor = rates.everything + rates.expression
    pose = (draw >= floor) & (draw < floor + rates.pose)
    return {
        "keep_reference": 1.0 - everything,
        "keep_pose": 1.0 - (everything | pose),
        "keep_expression": 1.0 - (everything | expression),
    }


def _refuse_late_start(schedule: NoiseSchedule, sampling: ml_collections.ConfigDict) -> None:
    """UserError where a schedule that ends in pure noise is not sampled from its end.

    Pure noise is what the last timestep has learned to begin with, and no other has seen (2305.08891).
    """
    spacing, last = sampling.spacing, schedule.steps - 1
    try:
        steps = sampling_timesteps(
            schedule, sampling.steps, spacing=spacing, offset=sampling.offset
        )
    except ValueError as error:
        raise UserError(f"config.sampling: {error}") from error
    first = steps[0]
    if schedule.zero_terminal_snr and first != last:
        raise UserError(
            f"with zero terminal SNR, pure noise belongs to timestep {last}, but config.sampling.spacing={spacing} "
            f"starts at {first}; give --config.sampling.spacing=trailing"
        )


def _resized(images: Float[Array, "b h w 3"], size: int) -> Float[Array, "b size size 3"]:
    return jax.image.resize(images, (images.shape[0], size, size, 3), "bilinear", antialias=True)


def make(config: ml_collections.ConfigDict) -> AnimatorTask:
    """The task of an animator config."""
    return AnimatorTask(config)
