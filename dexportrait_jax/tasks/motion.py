"""Stage 1: the motion trainer, a GAN that learns appearance, pose and expression encoders (method.md 3).

A source frame and a driving frame of the same person go in; the source's volume is moved rigidly by the
relative pose, and the decoder, styled by the driving frame's expression latent, paints the driving frame.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array

from data_pipelines import loading
from data_pipelines.survey import Survey
from dexportrait_jax.errors import UserError
from dexportrait_jax.models.perceptual import PerceptualNetwork, reduce_maps
from dexportrait_jax.optim import make_optimizer
from dexportrait_jax.state import Network
from dexportrait_jax.step import Outputs, Phase
from dexportrait_jax.tasks import losses
from dexportrait_jax.tasks.motion_networks import build_networks, reenact
from dexportrait_jax.tasks.pictures import (
    encode_poses,
    flatten_targets,
    save_comparison,
    to_float,
)
from dexportrait_jax.weights.convnextv2 import load_trunk
from dexportrait_jax.weights.importing import load_groups, read_description
from dexportrait_jax.weights.lpips_names import load_perceptual

TRAINED = ("appearance", "pose", "expression", "generator")
ENCODERS = ("pose", "expression", "label_heads")


class MotionTask:
    """The motion trainer for `train.py`."""

    def __init__(self, config: ml_collections.ConfigDict):
        data = config.data
        if config.loss.person_leak and (data.batch_size < 2 or data.targets < 2):
            raise UserError(
                "config.loss.person_leak compares targets of one source with those of others: it needs "
                "config.data.batch_size and config.data.targets of 2 or more"
            )
        self.config = config
        self.networks = build_networks(config)
        self.perceptual = Network(lambda rngs: PerceptualNetwork(config.loss.perceptual, rngs=rngs))
        self.ema_groups = TRAINED
        joint_steps = config.num_steps - config.pretraining.steps
        pretraining = ()
        if config.pretraining.steps:
            pretraining = (
                Phase(
                    "pretraining",
                    ENCODERS,
                    self.label_loss,
                    make_optimizer(config.optim.pretraining, config.pretraining.steps),
                    when="pretraining",
                ),
            )
        self.phases = (
            *pretraining,
            Phase(
                "generator",
                (*TRAINED, "label_heads"),
                self.generator_loss,
                make_optimizer(config.optim.generator, joint_steps),
                when="joint",
            ),
            Phase(
                "discriminator",
                ("discriminator",),
                self.discriminator_loss,
                make_optimizer(config.optim.discriminator, joint_steps),
                when="adversarial",
            ),
        )
        self._preview = jax.jit(
            lambda params, batch: self._predict(params, batch, *self._encode(params, batch)[:2])
        )

    def check_data(self, found: Survey) -> None:
        """UserError for one person and a loss that wants several.

        Two sources of a batch would be the same person, and what their expressions have apart taken for what people
        have apart: the loss would hold down expression itself.
        """
        if self.config.loss.person_leak and found.people < 2:
            raise UserError(
                f"config.loss.person_leak compares people, but {self.config.data.path} shows one; give "
                "--config.loss.person_leak=0, or data of several people"
            )

    def events(self, step: int) -> frozenset[str]:
        """ "pretraining" first, where there is any, then "joint".

        In the latter, "adversarial" from its start on, "r1" in every `r1_every`-th of these steps, and
        "gradient_norms" in every `gradient_norms_every`-th.
        """
        weights, step = self.config.loss, step - self.config.pretraining.steps
        if step < 0:
            return frozenset({"pretraining"})
        events = {"joint"}
        if weights.gradient_norms_every and step % weights.gradient_norms_every == 0:
            events.add("gradient_norms")
        step -= weights.adversarial_start
        if weights.adversarial > 0 and step >= 0:
            events.add("adversarial")
            if step % weights.r1_every == 0:
                events.add("r1")
        return frozenset(events)

    def pretrained(self) -> dict[str, Any]:
        """All groups of another motion trainer, from `config.init.motion`, or a pose trunk from `config.init.pose`.

        Discriminator and label heads start fresh where an export lacks them; without either, everything does.
        """
        init = self.config.init
        if init.motion and init.pose:
            raise UserError(
                "config.init.motion brings the whole pose encoder, config.init.pose a trunk for it; name one of them"
            )
        if init.motion:
            there = read_description(Path(init.motion))["groups"]
            wanted = {
                name: network.abstract
                for name, network in self.networks.items()
                if name in TRAINED or name in there
            }
            return load_groups(init.motion, wanted, stage="motion")[1]
        if init.pose:
            return {"pose": load_trunk(init.pose, self.networks["pose"].abstract)}
        return {}

    def constants(self) -> dict[str, Any]:
        """Weights of the perceptual network."""
        loss = self.config.loss
        return {"perceptual": load_perceptual(loss.perceptual, loss.perceptual_weights)}

    def abstract_constants(self) -> dict[str, Any]:
        """Shapes of the perceptual network's weights."""
        return {"perceptual": self.perceptual.abstract}

    def _encode(self, params, batch):
        """Poses of (sources, targets), expression latents of the targets, and their heat maps."""
        with jax.named_scope("pose"):
            poses = encode_poses(self.networks["pose"].bind(params["pose"]), batch)
        encoder = self.networks["expression"].bind(params["expression"])
        crops = to_float(flatten_targets(batch["target_expression_image"]))
        with jax.named_scope("expression"):
            heat_maps = encoder.heat_maps(crops)
            return poses, encoder.latent(heat_maps), heat_maps

    def _predict(self, params, batch, poses, expression):
        """The targets as the source in these poses and expressions."""
        return reenact(
            self.networks,
            params,
            to_float(batch["source_image"]),
            *poses,
            expression,
            self.config.model.warp_padding,
        )

    def _label_terms(self, params, batch, poses, expression, heat_maps, step):
        """Towards the labels that every record carries (method.md 2), and between two views of an instant."""
        weights = self.config.loss
        blendshapes = flatten_targets(batch["target_blendshapes"])

        def label_error(latent):
            with jax.named_scope("label_heads"):
                read = self.networks["label_heads"].bind(params["label_heads"])(latent)
            return losses.mean_squared(read, blendshapes)

        of_sources, of_targets = poses
        poses_of_targets = flatten_targets(batch["target_head_pose"])
        count = len(of_sources) + len(of_targets)
        pose_label = len(of_sources) / count * losses.pose_label(
            of_sources, batch["source_head_pose"]
        ) + len(of_targets) / count * losses.pose_label(of_targets, poses_of_targets)
        values = {
            "pose_label": pose_label,
            "blendshape_label": label_error(expression),
            "landmark_label": losses.landmark_label(
                heat_maps[..., : weights.landmark_maps],
                flatten_targets(batch["target_expression_landmarks"]),
            ),
        }
        invariance = {}
        if "target_second_expression_image" in batch:
            crops = to_float(flatten_targets(batch["target_second_expression_image"]))
            with jax.named_scope("expression"):
                second = self.networks["expression"].bind(params["expression"])(crops)
            invariance = {
                "invariance": (weights.invariance, losses.mean_squared(expression, second))
            }
            # One instant has one expression, whichever camera sees it.
            error = (values["blendshape_label"] + label_error(second)) / 2
            values["blendshape_label"] = error
        targets = batch["target_image"].shape[1]
        of_people = expression.astype(jnp.float32).reshape(-1, targets, expression.shape[-1])
        leaks = {
            "person_leak": lambda: losses.person_leak(of_people),
            "pose_leak": lambda: losses.pose_leak(expression, poses_of_targets),
        }
        return (
            {
                name: (losses.decaying_weight(step, **weights[name]), value)
                for name, value in values.items()
            }
            | {name: (weights[name], leak()) for name, leak in leaks.items() if weights[name]}
            | invariance
        )

    def label_loss(self, params, batch, key, step, shared, events):
        """The encoders alone, from labels: a network that sees nothing yet is no use to a decoder."""
        del key, step, shared, events
        # The weights of the first joint step: pretraining is over before they fall.
        terms = self._label_terms(params, batch, *self._encode(params, batch), 0)
        return _total(terms), Outputs(_values(terms), {})

    def generator_loss(self, params, batch, key, step, shared, events):
        """10 L1 + LPIPS + 100 component LPIPS + adversarial (method.md 3.10), and the optional terms."""
        del key, shared
        poses, expression, heat_maps = self._encode(params, batch)
        image = self._predict(params, batch, poses, expression)
        image_terms = functools.partial(self._image_terms, params, batch, events)
        terms = image_terms(image)
        metrics = {}
        if "gradient_norms" in events:
            metrics = losses.gradient_norms(image_terms, image)
        joint_step = step - self.config.pretraining.steps
        terms |= self._label_terms(params, batch, poses, expression, heat_maps, joint_step)
        judged = image[: self.judged(image.shape[0])]
        return _total(terms), Outputs(_values(terms) | metrics, {"image": judged})

    def _image_terms(self, params, batch, events, image):
        """The terms that look at the picture: name -> (weight, value)."""
        weights = self.config.loss
        target = to_float(flatten_targets(batch["target_image"]))
        mask = flatten_targets(batch["target_component_mask"]).astype(jnp.float32) / 255.0
        perceptual = self.perceptual.bind(params["perceptual"])
        with jax.named_scope("perceptual"):
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
        # Before the discriminator has started it knows nothing; its gradient would be noise.
        if "adversarial" in events:
            discriminator = self.networks["discriminator"].bind(params["discriminator"])
            with jax.named_scope("discriminator"):
                logits = discriminator(image[: self.judged(image.shape[0])])
            terms["adversarial"] = (weights.adversarial, losses.generator_adversarial(logits))
        return terms

    def discriminator_loss(self, params, batch, key, step, shared, events):
        """softplus losses and lazy R1: gamma/2 * |grad D(real)|^2 every `r1_every` steps, times `r1_every`."""
        del key, step
        weights = self.config.loss
        fake = shared["image"]
        real = to_float(flatten_targets(batch["target_image"]))[: fake.shape[0]]
        discriminator = self.networks["discriminator"].bind(params["discriminator"])
        with jax.named_scope("discriminator"):
            fake_logits, real_logits = discriminator(fake), discriminator(real)
        total = losses.discriminator_adversarial(fake_logits, real_logits)
        metrics = {"fake": jnp.mean(fake_logits), "real": jnp.mean(real_logits)}
        if "r1" in events:
            with jax.named_scope("discriminator"):
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
            image = self._preview(params, batch)
            save_comparison(
                workdir / "samples" / f"step_{step:07d}.png",
                batch["source_image"],
                batch["target_image"],
                image,
            )


def _total(terms: dict[str, tuple[Any, Array]]) -> Array:
    return sum(weight * value for weight, value in terms.values())


def _values(terms: dict[str, tuple[Any, Array]]) -> dict[str, Array]:
    return {name: value for name, (_, value) in terms.items()}


def make(config: ml_collections.ConfigDict) -> MotionTask:
    """The task of a motion config."""
    return MotionTask(config)
