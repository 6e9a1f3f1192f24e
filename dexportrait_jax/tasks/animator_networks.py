"""The networks of the animator's stages, as a config sizes them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import ml_collections

from dexportrait_jax.models.animator.denoiser import Denoiser
from dexportrait_jax.models.animator.image_encoder import ImageEncoder
from dexportrait_jax.models.animator.reference import ReferenceUNet
from dexportrait_jax.models.animator.temporal import TemporalModules
from dexportrait_jax.state import Network
from dexportrait_jax.tasks import autoencoder
from dexportrait_jax.tasks.motion_networks import chosen_remat, encoder_networks


def denoiser_network(config: ml_collections.ConfigDict, **changes: Any) -> Network:
    """The denoiser of a config, where given with other options of `model.denoiser`."""
    model = config.model
    options = {
        "in_channels": model.autoencoder.latent_channels,
        "expression_latent": model.expression.latent,
        "dtype": jnp.dtype(config.dtype),
        "remat": chosen_remat(config),
        **model.unet,
        **model.attn2,
        **model.denoiser,
        **changes,
    }
    return Network(lambda rngs: Denoiser(**options, rngs=rngs))


def build_networks(config: ml_collections.ConfigDict) -> dict[str, Network]:
    """Groups pose, expression, autoencoder, reference, denoiser[, temporal][, image_encoder]."""
    model = config.model
    latents = {"in_channels": model.autoencoder.latent_channels}
    build = {"dtype": jnp.dtype(config.dtype)}
    networks = encoder_networks(config) | autoencoder.build_networks(config)
    networks["reference"] = Network(
        lambda rngs: ReferenceUNet(
            **model.unet,
            **latents,
            **model.attn2,
            **model.reference,
            **build,
            remat=chosen_remat(config),
            rngs=rngs,
        )
    )
    networks["denoiser"] = denoiser_network(config)
    if config.stage == "animator_video":
        networks["temporal"] = Network(
            lambda rngs: TemporalModules(**model.unet, **model.temporal, **build, rngs=rngs)
        )
    if model.attn2.attn2 == "clip_image":
        networks["image_encoder"] = Network(
            lambda rngs: ImageEncoder(**model.image_encoder, **build, rngs=rngs)
        )
    return networks
