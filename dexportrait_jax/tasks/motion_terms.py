"""The loss terms of the motion trainer, each (weight, value), of what its networks made (method.md 3.10 - 3.12).

Terms are functions of activations and of nothing that is trained behind them, so that the gradient of each can be
asked for alone (`losses.gradient_norms`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float

from dexportrait_jax.models.perceptual import PerceptualNetwork, feature_norms, reduce_maps
from dexportrait_jax.tasks import losses
from dexportrait_jax.tasks.pictures import flatten_targets, to_float

Terms = dict[str, tuple[Any, Array]]


class Encoded(NamedTuple):
    """What the encoders make of S sources and B targets.

    Attributes:
      source_poses: (S, 3, 4).
      target_poses: (B, 3, 4).
      expression: (B, e), of the targets.
      heat_maps: (B, h, w, maps), that `expression` is made of.
      second_expression: (B, e), of another view of each target's instant; None where the batch has none.
      moved_poses, expected_poses: (B, 3, 4), P(S I) and S P(I) for a similarity S of each target; None where
        nobody asks for them.
    """

    source_poses: Float[Array, "s 3 4"]
    target_poses: Float[Array, "b 3 4"]
    expression: Float[Array, "b e"]
    heat_maps: Float[Array, "b h w maps"]
    second_expression: Float[Array, "b e"] | None = None
    moved_poses: Float[Array, "b 3 4"] | None = None
    expected_poses: Float[Array, "b 3 4"] | None = None


def label_terms(
    weights: ml_collections.ConfigDict,
    read_blendshapes: Callable[[Array], Array],
    batch: Mapping[str, Array],
    step: Array | int,
    encoded: Encoded,
) -> Terms:
    """Towards the labels that every record carries (method.md 2), between two views, and against leaks.

    Args:
      weights: `config.loss`.
      read_blendshapes: expression latents -> blendshapes.
      batch: of the loader.
      step: that decaying weights have come to.
      encoded: by what the terms are differentiated.
    """
    of_sources, of_targets, expression = encoded[:3]
    blendshapes = flatten_targets(batch["target_blendshapes"])

    def label_error(latent):
        return losses.mean_squared(read_blendshapes(latent), blendshapes)

    labels_of_targets = flatten_targets(batch["target_head_pose"])
    count = len(of_sources) + len(of_targets)
    pose_label = len(of_sources) / count * losses.pose_label(
        of_sources, batch["source_head_pose"]
    ) + len(of_targets) / count * losses.pose_label(of_targets, labels_of_targets)
    values = {
        "pose_label": pose_label,
        "blendshape_label": label_error(expression),
        "landmark_label": losses.landmark_label(
            encoded.heat_maps[..., : weights.landmark_maps],
            flatten_targets(batch["target_expression_landmarks"]),
        ),
    }
    further = {}
    if weights.person_leak:
        targets = batch["target_image"].shape[1]
        of_people = expression.astype(jnp.float32).reshape(-1, targets, expression.shape[-1])
        further["person_leak"] = (weights.person_leak, losses.person_leak(of_people))
    if weights.pose_leak:
        further["pose_leak"] = (weights.pose_leak, losses.pose_leak(expression, labels_of_targets))
    if encoded.second_expression is not None:
        second = encoded.second_expression
        further["invariance"] = (weights.invariance, losses.mean_squared(expression, second))
        # One instant has one expression, whichever camera sees it.
        error = (values["blendshape_label"] + label_error(second)) / 2
        values["blendshape_label"] = error
    if encoded.moved_poses is not None:
        error = losses.pose_label(encoded.moved_poses, encoded.expected_poses)
        further["equivariance"] = (weights.equivariance, error)
    return {
        name: (losses.decaying_weight(step, **weights[name]), value)
        for name, value in values.items()
    } | further


def image_terms(
    weights: ml_collections.ConfigDict,
    perceptual: PerceptualNetwork,
    judge: Callable[[Array], Array] | None,
    batch: Mapping[str, Array],
    image: Float[Array, "b h w 3"],
) -> Terms:
    """10 L1 + LPIPS + 100 component LPIPS + adversarial (method.md 3.10), and the optional terms.

    Args:
      weights: `config.loss`.
      perceptual: the network whose features are compared.
      judge: the discriminator's logits of pictures; None before its start, when its gradient would be noise.
      batch: of the loader.
      image: what was made of each target; by this the terms are differentiated.
    """
    target = to_float(flatten_targets(batch["target_image"]))
    mask = flatten_targets(batch["target_component_mask"]).astype(jnp.float32) / 255.0
    with jax.named_scope("perceptual"):
        distance = _perceptual_distance(perceptual, weights.perceptual_form, image, target)
    terms = {
        "l1": (weights.l1, losses.mean_absolute(image, target)),
        "lpips": (weights.lpips, jnp.mean(distance())),
        "clpips": (weights.clpips, jnp.mean(distance(mask, weights.clpips_reduction))),
        "masked_l1": (weights.masked_l1, losses.masked_absolute(image, target, mask)),
        "gradient_l1": (weights.gradient_l1, losses.gradient_absolute(image, target)),
        "multiscale_l1": (weights.multiscale_l1, losses.multiscale_absolute(image, target)),
    }
    if judge is not None:
        terms["adversarial"] = (weights.adversarial, losses.generator_adversarial(judge(image)))
    return terms


def _perceptual_distance(perceptual, form: str, image: Array, target: Array) -> Callable:
    """A function of (mask, reduction), or of nothing: the distance of each picture from its target."""
    features = functools.partial(perceptual.features, unit_length=form == "lpips")
    made, wanted = features(image), jax.lax.stop_gradient(features(target))
    if form == "lpips":
        return functools.partial(reduce_maps, perceptual.distance_maps(made, wanted))
    return functools.partial(feature_norms, made, wanted)


def total(terms: Terms) -> Float[Array, ""]:
    """Every value times its weight, in one sum."""
    return sum(weight * value for weight, value in terms.values())


def values(terms: Terms) -> dict[str, Array]:
    """Every value without its weight, for the metrics."""
    return {name: value for name, (_, value) in terms.items()}
