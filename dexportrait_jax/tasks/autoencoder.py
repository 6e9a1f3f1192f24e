"""A small autoencoder, trained where no pretrained one is at hand; the network is the animator's VAE."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Array, Float

from data_pipelines.survey import Survey
from dexportrait_jax import config_values
from dexportrait_jax.errors import UserError
from dexportrait_jax.models.animator.tiny_autoencoder import TinyAutoencoder
from dexportrait_jax.models.animator.vae import VAE
from dexportrait_jax.models.perceptual import PerceptualNetwork
from dexportrait_jax.optim import make_optimizer
from dexportrait_jax.state import Network
from dexportrait_jax.step import Outputs, Phase
from dexportrait_jax.tasks import losses
from dexportrait_jax.tasks.pictures import (
    flatten_targets,
    in_turn,
    to_float,
)
from dexportrait_jax.weights import names
from dexportrait_jax.weights.lpips_names import load_perceptual

KINDS = {"vae": VAE, "tiny": TinyAutoencoder}


def build_networks(config: ml_collections.ConfigDict) -> dict[str, Network]:
    """Group autoencoder; UserError for a kind that is not known."""
    settings = config.model.autoencoder.to_dict()
    kind = settings.pop("kind", "vae")  # exports older than the key are of this one
    if kind not in KINDS:
        raise UserError(f"config.model.autoencoder.kind={kind!r} is none of {', '.join(KINDS)}")
    dtype = jnp.dtype(config.dtype)
    return {"autoencoder": Network(lambda rngs: KINDS[kind](**settings, dtype=dtype, rngs=rngs))}


def identity(options: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """What tells an autoencoder's encoder from others, as JSON values: sha256 of its weights, and its options.

    Weights count as bfloat16: so they are in an image stage that holds them frozen, and in its export. The scale
    does not count, because cached latents are unscaled.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(names.flatten(params)):
        digest.update(f"{'/'.join(path)} {leaf.shape}".encode())
        digest.update(np.asarray(leaf).astype(jnp.bfloat16).tobytes())
    kind = options.get("kind", "vae")
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(KINDS[kind]).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    resolved = {**known, **options, "kind": kind}
    for name in ("scale", "backend", "dtype"):
        resolved.pop(name, None)
    return {"sha256": digest.hexdigest(), "options": json.loads(json.dumps(resolved))}


class AutoencoderTask:
    """L1 + LPIPS + a weak KL term, and a pull of the scaled latents' moments to 0 and 1.

    Scaled, by the model's `scale`, they are what the diffusion stages see, which need about unit variance.
    `loss.latent_noise` is the deviation, in scaled latents, of noise that the decoder learns to see through. What a
    diffusion model of few steps gets wrong is such noise: without it those errors come out as blotches.
    """

    def __init__(self, config: ml_collections.ConfigDict):
        config_values.check(config)
        self.config = config
        self.networks = build_networks(config)
        self.perceptual = Network(lambda rngs: PerceptualNetwork(config.loss.perceptual, rngs=rngs))
        self.ema_groups = ("autoencoder",)
        self.phases = (
            Phase(
                "autoencoder",
                ("autoencoder",),
                self.loss,
                make_optimizer(config.optim.autoencoder, config.num_steps),
            ),
        )

    def check_data(self, found: Survey) -> None:
        """Any will do."""

    def events(self, step: int) -> frozenset[str]:
        """Every step is like every other."""
        return frozenset()

    def pretrained(self) -> dict[str, Any]:
        """None: this stage exists because there is nothing to start from."""
        return {}

    def constants(self) -> dict[str, Any]:
        """Weights of the perceptual network."""
        loss = self.config.loss
        return {"perceptual": load_perceptual(loss.perceptual, loss.perceptual_weights)}

    def abstract_constants(self) -> dict[str, Any]:
        """Shapes of the perceptual network's weights."""
        return {"perceptual": self.perceptual.abstract}

    def loss(self, params, batch, key, step, shared, events):
        """All frames of the batch, sources and targets alike."""
        del step, shared, events
        weights = self.config.loss
        # A source beside its own targets: all sources before all targets would change places among the devices.
        frames = jnp.concatenate([batch["source_image"][:, None], batch["target_image"]], axis=1)
        images = to_float(flatten_targets(frames))
        autoencoder = self.networks["autoencoder"].bind(params["autoencoder"])
        with jax.named_scope("autoencoder"):
            mean, log_variance = autoencoder.encode(images)
        sample_key, noise_key = jax.random.split(key)
        latents = autoencoder.sample(mean, log_variance, sample_key) if weights.sample else mean
        if weights.latent_noise:  # see the class
            noise = jax.random.normal(noise_key, latents.shape)
            latents = latents + weights.latent_noise / autoencoder.scale * noise
        with jax.named_scope("autoencoder"):
            decoded = autoencoder.decode(latents)
        with jax.named_scope("perceptual"):
            distances = self.perceptual.bind(params["perceptual"]).lpips(decoded, images)
        scaled = mean * autoencoder.scale
        centre, spread = jnp.mean(scaled, (0, 1, 2)), jnp.std(scaled, (0, 1, 2))
        terms = {
            "l1": (weights.l1, losses.mean_absolute(decoded, images)),
            "lpips": (weights.lpips, jnp.mean(distances)),
            "kl": (weights.kl, losses.kullback_leibler(mean, log_variance)),
            "moments": (weights.moments, jnp.mean(centre**2 + (spread - 1.0) ** 2)),
        }
        error = jnp.mean(jnp.square(decoded - images))
        metrics = {name: value for name, (_, value) in terms.items()}
        metrics["psnr"] = 10.0 * jnp.log10(4.0 / error)
        return sum(weight * value for weight, value in terms.values()), Outputs(metrics, {})

    def preview(
        self, params: dict[str, Any], batch: dict[str, Array]
    ) -> Float[Array, "sources*targets h w 3"]:
        """The reconstructions of a batch's targets."""
        autoencoder = self.networks["autoencoder"].bind(params["autoencoder"])
        images = to_float(flatten_targets(batch["target_image"]))
        return in_turn(lambda image: autoencoder.decode(autoencoder.encode(image)[0]), images)


def make(config: ml_collections.ConfigDict) -> AutoencoderTask:
    """The task of an autoencoder config."""
    return AutoencoderTask(config)
