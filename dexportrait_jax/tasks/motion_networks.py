"""The parameter groups of the motion trainer, and how a picture is made with them (method.md 3.1)."""

from __future__ import annotations

from typing import Any, get_args

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jaxtyping import Array, Float

from dexportrait_jax import geometry
from dexportrait_jax.errors import UserError
from dexportrait_jax.models.motion.appearance import AppearanceEncoder
from dexportrait_jax.models.motion.discriminator import Discriminator
from dexportrait_jax.models.motion.expression import ExpressionEncoder
from dexportrait_jax.models.motion.generator import Generator
from dexportrait_jax.models.motion.pose import PoseEncoder
from dexportrait_jax.models.rematerialisation import Remat
from dexportrait_jax.state import Network

BLENDSHAPES = 52
BLENDSHAPE_SPREAD = 0.25  # the deviation of one that moves freely in [0, 1], about


class LabelHeads(nnx.Module):
    """Linear read-out of MediaPipe's blendshapes from the expression latent; used by training alone.

    Its columns are of length 1, times the spread of a blendshape. A free read-out would leave the latent's scale open:
    a small latent is overlooked by the decoder, to which it comes beside the appearance, and differences between two
    views of an instant would mean nothing.
    """

    def __init__(self, latent: int, *, rngs: nnx.Rngs):
        self.blendshapes = nnx.Linear(latent, BLENDSHAPES, rngs=rngs)

    def __call__(self, latent: Float[Array, "b e"]) -> Float[Array, "b 52"]:
        kernel = self.blendshapes.kernel[...]
        length = jnp.sqrt(jnp.sum(jnp.square(kernel), axis=0) + 1e-12)
        return latent @ (BLENDSHAPE_SPREAD * kernel / length) + self.blendshapes.bias[...]


def encoder_networks(config: ml_collections.ConfigDict) -> dict[str, Network]:
    """The two groups that the diffusion stages take over: pose and expression."""
    model, dtype = config.model, jnp.dtype(config.dtype)
    return {
        "pose": Network(lambda rngs: PoseEncoder(**model.pose, dtype=dtype, rngs=rngs)),
        "expression": Network(
            lambda rngs: ExpressionEncoder(**model.expression, dtype=dtype, rngs=rngs)
        ),
    }


def chosen_remat(config: ml_collections.ConfigDict) -> Remat:
    """What the backward pass keeps; exports made before the key was there only run forward.

    Raises:
      UserError: a name that is not known.
    """
    remat = config.get("remat", "none")
    if remat not in get_args(Remat):
        raise UserError(f"config.remat is one of {', '.join(get_args(Remat))}, not {remat!r}")
    return remat


def discriminator_network(config: ml_collections.ConfigDict, dtype: jnp.dtype) -> Network:
    """The discriminator that computes in ``dtype``; its parameters are float32 in any."""
    settings = {**config.model.discriminator, "remat": chosen_remat(config), "dtype": dtype}
    return Network(lambda rngs: Discriminator(**settings, rngs=rngs))


def build_networks(config: ml_collections.ConfigDict) -> dict[str, Network]:
    """Groups appearance, pose, expression, generator, discriminator, label_heads."""
    model = config.model
    build = {"dtype": jnp.dtype(config.dtype), "remat": chosen_remat(config)}
    return encoder_networks(config) | {
        "appearance": Network(
            lambda rngs: AppearanceEncoder(**model.appearance, **build, rngs=rngs)
        ),
        "generator": Network(
            lambda rngs: Generator(
                expression_features=model.expression.latent,
                **model.generator,
                **build,
                rngs=rngs,
            )
        ),
        "discriminator": discriminator_network(config, build["dtype"]),
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
    with jax.named_scope("appearance"):
        volume = networks["appearance"].bind(params["appearance"])(source)
    targets = driving_pose.shape[0] // source.shape[0]
    warped = geometry.warp(volume, jnp.repeat(source_pose, targets, 0), driving_pose, padding)
    with jax.named_scope("generator"):
        return networks["generator"].bind(params["generator"])(volume, warped, expression)
