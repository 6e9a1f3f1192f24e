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
from jaxtyping import Array, Float

from data_pipelines.survey import Survey
from dexportrait_jax import config_values, geometry
from dexportrait_jax.errors import UserError
from dexportrait_jax.models.perceptual import PerceptualNetwork
from dexportrait_jax.optim import make_optimizer, with_lazy_penalty
from dexportrait_jax.state import Network
from dexportrait_jax.step import Outputs, Phase
from dexportrait_jax.tasks import losses
from dexportrait_jax.tasks.equivariance import draw_similarities, move_pictures
from dexportrait_jax.tasks.motion_networks import build_networks, discriminator_network, reenact
from dexportrait_jax.tasks.motion_terms import (
    Encoded,
    Terms,
    image_terms,
    label_terms,
    total,
    values,
)
from dexportrait_jax.tasks.pictures import (
    encode_poses,
    flatten_targets,
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
        config_values.check(config)
        data = config.data
        # Both losses compare the samples of what is computed at once.
        sources = data.batch_size // config.accumulate
        if config.loss.person_leak and (sources < 2 or data.targets < 2):
            raise UserError(
                "config.loss.person_leak compares targets of one source with those of others: it needs "
                "config.data.targets of 2 or more, and config.data.batch_size of 2 or more in each of the "
                f"config.accumulate={config.accumulate} parts"
            )
        if config.loss.pose_leak and sources * data.targets < 4:
            raise UserError(
                f"config.loss.pose_leak needs 4 targets in each of the config.accumulate={config.accumulate} parts of "
                f"a batch, not {sources * data.targets}; give a larger batch, or --config.accumulate=1"
            )
        if config.loss.adversarial_images % config.accumulate:
            raise UserError(
                f"config.loss.adversarial_images={config.loss.adversarial_images} pictures of a batch cannot be shared "
                f"by its config.accumulate={config.accumulate} parts; choose a multiple, or 0 for all pictures"
            )
        if config.loss.invariance and not data.second_expression:
            raise UserError(
                "config.loss.invariance compares two expression pictures of an instant: give "
                "--config.data.second_expression=True, or --config.loss.invariance=0"
            )
        self.config = config
        self.networks = build_networks(config)
        self.perceptual = Network(lambda rngs: PerceptualNetwork(config.loss.perceptual, rngs=rngs))
        self.ema_groups = TRAINED
        joint_steps = config.num_steps - config.pretraining.steps
        discriminator = config.optim.discriminator
        if discriminator.lazy_correction:
            discriminator = with_lazy_penalty(discriminator, config.loss.r1_every)
        judging_steps = joint_steps
        if discriminator.decay_ends_with_run:  # its optimizer counts from its own start
            judging_steps -= config.loss.adversarial_start
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
                make_optimizer(discriminator, judging_steps),
                when="adversarial",
            ),
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
            if weights.r1_gamma and step % weights.r1_every == 0:
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
            called = f"config.init.motion={init.motion}"
            return load_groups(init.motion, wanted, stage="motion", called=called)[1]
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

    def _encode(self, params, batch, key=None) -> Encoded:
        """What the encoders make of a batch; with a key as in training, with dropout where there is any."""
        networks, config = self.networks, self.config
        first = second = moved = expected = None  # keys of dropout, poses of the moved targets
        if key is not None and config.model.expression.dropout:
            first, second = jax.random.split(jax.random.fold_in(key, 0))
        with jax.named_scope("pose"):
            encoder = networks["pose"].bind(params["pose"])
            of_sources, of_targets = encode_poses(encoder, batch)
            if key is not None and config.loss.equivariance:
                moved, expected = self._moved(
                    encoder, batch, of_targets, jax.random.fold_in(key, 1)
                )
        encoder = networks["expression"].bind(params["expression"])
        crops = to_float(flatten_targets(batch["target_expression_image"]))
        with jax.named_scope("expression"):
            heat_maps = encoder.heat_maps(crops, first)
            expression, other = encoder.latent(heat_maps), None
        if key is not None and "target_second_expression_image" in batch:
            crops = to_float(flatten_targets(batch["target_second_expression_image"]))
            with jax.named_scope("expression"):
                other = encoder(crops, second)
        return Encoded(of_sources, of_targets, expression, heat_maps, other, moved, expected)

    def _moved(self, encoder, batch, poses, key):
        """P(S I) and S P(I) of the targets, each with a similarity S of its own."""
        pictures = to_float(flatten_targets(batch["target_pose_image"]))
        similarities = draw_similarities(key, len(pictures), self.config.data.augment.similarity)
        moved, _ = encoder(move_pictures(pictures, similarities))
        return moved.astype(jnp.float32), geometry.compose(similarities, poses)

    def _predict(self, params, batch, encoded: Encoded):
        """The targets as the source in these poses and expressions."""
        return reenact(
            self.networks,
            params,
            to_float(batch["source_image"]),
            encoded.source_poses,
            encoded.target_poses,
            encoded.expression,
            self.config.model.warp_padding,
        )

    def _label_terms(self, params, batch, step, encoded) -> Terms:
        def read_blendshapes(latent):
            with jax.named_scope("label_heads"):
                return self.networks["label_heads"].bind(params["label_heads"])(latent)

        return label_terms(self.config.loss, read_blendshapes, batch, step, encoded)

    def _image_terms(self, params, batch, events, image) -> Terms:
        def judge(image):
            discriminator = self.networks["discriminator"].bind(params["discriminator"])
            with jax.named_scope("discriminator"):
                return discriminator(image[: self.judged(image.shape[0])])

        perceptual = self.perceptual.bind(params["perceptual"])
        judging = judge if "adversarial" in events else None
        return image_terms(self.config.loss, perceptual, judging, batch, image)

    def label_loss(self, params, batch, key, step, shared, events):
        """The encoders alone, from labels: a network that sees nothing yet is no use to a decoder."""
        del step, shared, events
        # The weights of the first joint step: pretraining is over before they fall.
        terms = self._label_terms(params, batch, 0, self._encode(params, batch, key))
        return total(terms), Outputs(values(terms), {})

    def generator_loss(self, params, batch, key, step, shared, events):
        """All terms that look at the picture, and those that look at poses and latents (motion_terms.py)."""
        del shared
        encoded = self._encode(params, batch, key)
        image = self._predict(params, batch, encoded)
        of_image = functools.partial(self._image_terms, params, batch, events)
        joint_step = step - self.config.pretraining.steps
        of_encoded = functools.partial(self._label_terms, params, batch, joint_step)
        terms = of_image(image) | of_encoded(encoded)
        norms = {}
        if "gradient_norms" in events:
            norms = losses.gradient_norms(of_image, image)
            norms |= losses.gradient_norms(of_encoded, encoded)
        judged = image[: self.judged(image.shape[0])]
        return total(terms), Outputs(values(terms) | norms, {"image": judged})

    def discriminator_loss(self, params, batch, key, step, shared, events):
        """softplus losses and lazy R1: gamma/2 * |grad D(real)|^2 every `r1_every` steps, times `r1_every`.

        R1, a derivative that is derived again, is computed in float32 throughout (method.md 3.11).
        """
        del key, step
        weights = self.config.loss
        fake = shared["image"]
        real = to_float(flatten_targets(batch["target_image"]))[: fake.shape[0]]
        discriminator = self.networks["discriminator"].bind(params["discriminator"])
        with jax.named_scope("discriminator"):
            fake_logits, real_logits = discriminator(fake), discriminator(real)
        value = losses.discriminator_adversarial(fake_logits, real_logits)
        metrics = {"fake": jnp.mean(fake_logits), "real": jnp.mean(real_logits)}
        if "r1" in events:
            with jax.named_scope("discriminator"):
                exact = self.exact_discriminator.bind(params["discriminator"])
                # Else TPUs multiply float32 in one pass of bfloat16. "high" is three there, but TF32 on GPUs.
                with jax.default_matmul_precision("highest"):
                    metrics["r1"] = losses.r1_penalty(exact, real)
            value += 0.5 * weights.r1_gamma * weights.r1_every * metrics["r1"]
        return value, Outputs(metrics, {})

    @functools.cached_property
    def exact_discriminator(self) -> Network:
        """The discriminator, on the same parameters, whose activations are float32."""
        if jnp.dtype(self.config.dtype) == jnp.float32:
            return self.networks["discriminator"]
        return discriminator_network(self.config, jnp.float32)

    def judged(self, targets: int) -> int:
        """How many targets of a part of a batch the discriminator sees: all, or its share of `adversarial_images`."""
        share = self.config.loss.adversarial_images // self.config.accumulate
        return min(targets, share or targets)

    def preview(
        self, params: dict[str, Any], batch: dict[str, Array]
    ) -> Float[Array, "sources*targets h w 3"]:
        """What the generator makes of a batch's targets."""
        return self._predict(params, batch, self._encode(params, batch))


def make(config: ml_collections.ConfigDict) -> MotionTask:
    """The task of a motion config."""
    return MotionTask(config)
