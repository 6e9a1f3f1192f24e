"""Stages 2a and 2b: the latent-diffusion animator, first on images, then its temporal modules on clips.

Pose and expression encoders come frozen from the motion trainer, the autoencoder is frozen too. The image
stage trains the reference UNet and the denoiser with all its branches; the video stage trains the temporal
modules alone (method.md 4).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float

from data_pipelines import loading
from dexportrait_jax.diffusion.schedule import make_schedule
from dexportrait_jax.models.animator.conditioning import Conditions, Denoiser
from dexportrait_jax.models.animator.image_encoder import ImageEncoder
from dexportrait_jax.models.animator.reference import ReferenceUNet
from dexportrait_jax.models.animator.temporal import TemporalModules
from dexportrait_jax.optim import make_optimizer
from dexportrait_jax.state import Network
from dexportrait_jax.step import Outputs, Phase
from dexportrait_jax.tasks import autoencoder, losses, motion
from dexportrait_jax.tasks.pictures import save_comparison, to_float
from dexportrait_jax.weights.importing import load_groups

FROZEN = ("pose", "expression", "autoencoder")
IMAGE_TRAINED = ("reference", "denoiser")


def build_networks(config: ml_collections.ConfigDict) -> dict[str, Network]:
    """Groups pose, expression, autoencoder, reference, denoiser[, temporal][, image_encoder]."""
    model, dtype = config.model, jnp.dtype(config.dtype)
    networks = motion.encoder_networks(config) | autoencoder.build_networks(config)
    networks["reference"] = Network(
        lambda rngs: ReferenceUNet(**model.unet, **model.reference, dtype=dtype, rngs=rngs)
    )
    networks["denoiser"] = Network(
        lambda rngs: Denoiser(**model.unet, **model.denoiser, dtype=dtype, rngs=rngs)
    )
    if config.stage == "animator_video":
        networks["temporal"] = Network(
            lambda rngs: TemporalModules(**model.unet, **model.temporal, dtype=dtype, rngs=rngs)
        )
    if model.unet.attn2 == "clip_image":
        networks["image_encoder"] = Network(
            lambda rngs: ImageEncoder(**model.image_encoder, dtype=dtype, rngs=rngs)
        )
    return networks
