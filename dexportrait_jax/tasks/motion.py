"""Stage 1: the motion trainer, a GAN that learns appearance, pose and expression encoders (method.md 3).

A source frame and a driving frame of the same person go in; the source's volume is moved rigidly by the
relative pose, and the decoder, styled by the driving frame's expression latent, paints the driving frame.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Float

from data_pipelines import loading
from dexportrait_jax import geometry
from dexportrait_jax.models.motion.appearance import AppearanceEncoder
from dexportrait_jax.models.motion.decoder import Generator
from dexportrait_jax.models.motion.discriminator import Discriminator
from dexportrait_jax.models.motion.expression import ExpressionEncoder
from dexportrait_jax.models.motion.pose import PoseEncoder
from dexportrait_jax.models.perceptual import PerceptualNetwork, reduce_maps
from dexportrait_jax.optim import make_optimizer
from dexportrait_jax.state import Network
from dexportrait_jax.step import Outputs, Phase
from dexportrait_jax.tasks import losses
from dexportrait_jax.tasks.pictures import flatten_targets, save_comparison, to_float
from dexportrait_jax.weights.convnextv2 import load_trunk
from dexportrait_jax.weights.lpips_names import load_perceptual

BLENDSHAPES = 52
TRAINED = ("appearance", "pose", "expression", "generator")


class LabelHeads(nnx.Module):
    """Linear read-out of MediaPipe's blendshapes from the expression latent; used by training alone."""

    def __init__(self, latent: int, *, rngs: nnx.Rngs):
        self.blendshapes = nnx.Linear(latent, BLENDSHAPES, rngs=rngs)

    def __call__(self, latent: Float[Array, "b e"]) -> Float[Array, "b 52"]:
        return self.blendshapes(latent)


def encoder_networks(config: ml_collections.ConfigDict) -> dict[str, Network]:
    """The two groups that the diffusion stages take over: pose and expression."""
    model, dtype = config.model, jnp.dtype(config.dtype)
    return {
        "pose": Network(lambda rngs: PoseEncoder(**model.pose, dtype=dtype, rngs=rngs)),
        "expression": Network(
            lambda rngs: ExpressionEncoder(**model.expression, dtype=dtype, rngs=rngs)
        ),
    }


def build_networks(config: ml_collections.ConfigDict) -> dict[str, Network]:
    """Groups appearance, pose, expression, generator, discriminator, label_heads."""
    model, dtype = config.model, jnp.dtype(config.dtype)
    return encoder_networks(config) | {
        "appearance": Network(
            lambda rngs: AppearanceEncoder(**model.appearance, dtype=dtype, rngs=rngs)
        ),
        "generator": Network(lambda rngs: Generator(**model.generator, dtype=dtype, rngs=rngs)),
        "discriminator": Network(
            lambda rngs: Discriminator(**model.discriminator, dtype=dtype, rngs=rngs)
        ),
        "label_heads": Network(lambda rngs: LabelHeads(model.expression.latent, rngs=rngs)),
    }


def reenact(
    networks: dict[str, Network],
    params: dict[str, Any],
    source: Float[Array, "s h w 3"],
    source_pose: Float[Array, "s 3 4"],
    driving_pose: Float[Array, "b 3 4"],
    expression: Float[Array, "b e"],
    padding: str,
) -> Float[Array, "b h w 3"]:
    """The picture of every source with driving pose and expression; B = S * targets, source-major."""
    volume = networks["appearance"].bind(params["appearance"])(source)
    targets = driving_pose.shape[0] // source.shape[0]
    warped = geometry.warp(volume, jnp.repeat(source_pose, targets, 0), driving_pose, padding)
    return networks["generator"].bind(params["generator"])(volume, warped, expression)


class MotionTask:
    """The motion trainer for `train.py`."""

    frames = False

    def __init__(self, config: ml_collections.ConfigDict):
        self.config = config
        self.networks = build_networks(config)
        self.perceptual = Network(lambda rngs: PerceptualNetwork(config.loss.perceptual, rngs=rngs))
        self.ema_groups = TRAINED
        self.phases = (
            Phase(
                "generator",
                (*TRAINED, "label_heads"),
                self.generator_loss,
                make_optimizer(config.optim.generator, config.num_steps),
            ),
            Phase(
                "discriminator",
                ("discriminator",),
                self.discriminator_loss,
                make_optimizer(config.optim.discriminator, config.num_steps),
                when="adversarial",
            ),
        )
        self._preview = jax.jit(self._predict)

    def events(self, step: int) -> frozenset[str]:
        """ "adversarial" from its start on, "r1" in every `r1_every`-th of these steps."""
        weights = self.config.loss
        if weights.adversarial == 0 or step < weights.adversarial_start:
            return frozenset()
        lazy = (step - weights.adversarial_start) % weights.r1_every == 0
        return frozenset({"adversarial", "r1"} if lazy else {"adversarial"})

    def pretrained(self) -> dict[str, Any]:
        """The trunk of the pose encoder, where `config.init.pose` names one; the rest starts fresh."""
        path = self.config.init.pose
        return {"pose": load_trunk(path, self.networks["pose"].abstract)} if path else {}

    def constants(self) -> dict[str, Any]:
        """Weights of the perceptual network."""
        loss = self.config.loss
        return {"perceptual": load_perceptual(loss.perceptual, loss.perceptual_weights)}

    def _predict(self, params, batch):
        """Predicted targets, with the poses and latents that made them."""
        pose_images = jnp.concatenate(
            [batch["source_pose_image"], flatten_targets(batch["target_pose_image"])]
        )
        poses, _ = self.networks["pose"].bind(params["pose"])(to_float(pose_images))
        sources = batch["source_image"].shape[0]
        expression = self.networks["expression"].bind(params["expression"])(
            to_float(flatten_targets(batch["target_expression_image"]))
        )
        image = reenact(
            self.networks,
            params,
            to_float(batch["source_image"]),
            poses[:sources],
            poses[sources:],
            expression,
            self.config.model.warp_padding,
        )
        return image, poses, expression

    def generator_loss(self, params, batch, key, step, shared, events):
        """10 L1 + LPIPS + 100 component LPIPS + adversarial (method.md 3.10), and the optional terms."""
        del key, shared
        weights = self.config.loss
        target = to_float(flatten_targets(batch["target_image"]))
        mask = flatten_targets(batch["target_component_mask"]).astype(jnp.float32) / 255.0
        image, poses, expression = self._predict(params, batch)

        perceptual = self.perceptual.bind(params["perceptual"])
        maps = perceptual.distance_maps(
            perceptual.features(image), jax.lax.stop_gradient(perceptual.features(target))
        )
        terms = {
            "l1": (weights.l1, losses.mean_absolute(image, target)),
            "lpips": (weights.lpips, jnp.mean(reduce_maps(maps))),
            "clpips": (weights.clpips, jnp.mean(reduce_maps(maps, mask, weights.clpips_reduction))),
            "masked_l1": (weights.masked_l1, losses.masked_absolute(image, target, mask)),
            "gradient_l1": (weights.gradient_l1, losses.gradient_absolute(image, target)),
            "multiscale_l1": (weights.multiscale_l1, losses.multiscale_absolute(image, target)),
        }
        labels = jnp.concatenate(
            [batch["source_head_pose"], flatten_targets(batch["target_head_pose"])]
        )
        terms["pose_label"] = (
            losses.decaying_weight(step, **weights.pose_label),
            losses.pose_label(poses, labels),
        )
        read = self.networks["label_heads"].bind(params["label_heads"])(expression)
        terms["blendshape_label"] = (
            losses.decaying_weight(step, **weights.blendshape_label),
            jnp.mean(jnp.square(read - flatten_targets(batch["target_blendshapes"]))),
        )
        judged = image[: self.judged(image.shape[0])]
        # Before the discriminator has started it knows nothing; its gradient would be noise.
        if "adversarial" in events:
            discriminator = self.networks["discriminator"].bind(params["discriminator"])
            terms["adversarial"] = (
                weights.adversarial,
                losses.generator_adversarial(discriminator(judged)),
            )
        total = sum(weight * value for weight, value in terms.values())
        metrics = {name: value for name, (_, value) in terms.items()}
        return total, Outputs(metrics, {"image": judged})

    def discriminator_loss(self, params, batch, key, step, shared, events):
        """softplus losses and lazy R1: gamma/2 * |grad D(real)|^2 every `r1_every` steps, times `r1_every`."""
        del key, step
        weights = self.config.loss
        fake = shared["image"]
        real = to_float(flatten_targets(batch["target_image"]))[: fake.shape[0]]
        discriminator = self.networks["discriminator"].bind(params["discriminator"])
        fake_logits, real_logits = discriminator(fake), discriminator(real)
        total = losses.discriminator_adversarial(fake_logits, real_logits)
        metrics = {"fake": jnp.mean(fake_logits), "real": jnp.mean(real_logits)}
        if "r1" in events:
            metrics["r1"] = losses.r1_penalty(discriminator, real)
            total += 0.5 * weights.r1_gamma * weights.r1_every * metrics["r1"]
        return total, Outputs(metrics, {})

    def judged(self, targets: int) -> int:
        """How many of a batch's targets the discriminator sees: all, or `loss.adversarial_images`."""
        return min(targets, self.config.loss.adversarial_images or targets)

    def evaluate(self, state, constants, workdir: Path, step: int) -> None:
        """A picture of held-out frames: source, driving frame, result."""
        del constants
        params = state["params"] | state["ema"]
        for batch in loading.evaluation_batches(self.config.data, self.config.evaluate.split, 1):
            image, _, _ = self._preview(params, batch)
            save_comparison(
                workdir / "samples" / f"step_{step:07d}.png",
                batch["source_image"],
                batch["target_image"],
                image,
            )


def make(config: ml_collections.ConfigDict) -> MotionTask:
    """The task of a motion config."""
    return MotionTask(config)
