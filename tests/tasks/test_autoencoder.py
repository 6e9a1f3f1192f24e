"""The autoencoder's loss against values worked out by hand, with an autoencoder that changes nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dexportrait_jax.config import load_config
from dexportrait_jax.tasks.autoencoder import AutoencoderTask


class Unchanged:
    """Latents are the picture; `lpips` is a constant."""

    scale = 1.0

    def bind(self, params):
        return self

    def encode(self, images):
        return images, jnp.zeros_like(images)

    def decode(self, latents):
        return latents

    def sample(self, mean, log_variance, key):
        return mean + 10.0

    def lpips(self, first, second):
        return jnp.full(first.shape[0], 0.25)


@pytest.fixture
def task():
    task = AutoencoderTask(load_config("configs/autoencoder.py:tiny"))
    task.networks = {"autoencoder": Unchanged()}
    task.perceptual = Unchanged()
    return task


def loss(task, **weights):
    values = {"l1": 1.0, "lpips": 0.0, "kl": 0.0, "moments": 0.0, "latent_noise": 0.0}
    task.config.loss.update(values | {"sample": False} | weights)
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64, 3), np.uint8)
    batch = {"source_image": images[:, 0], "target_image": images[:, 1:]}
    params = {"autoencoder": None, "perceptual": None}
    return task.loss(params, batch, jax.random.key(1), 0, None, frozenset())


def test_each_term(task):
    assert float(loss(task)[0]) == 0.0
    assert float(loss(task, lpips=0.1)[0]) == pytest.approx(0.025)
    assert float(loss(task, sample=True)[0]) == pytest.approx(10.0, rel=1e-5)


def test_noise_on_the_latents(task):
    """What comes back is the noise alone: deviation 0.3, mean absolute value 0.3 sqrt(2/pi)."""
    value, outputs = loss(task, latent_noise=0.3)  # 73,728 draws: their mean spreads by 0.3 %
    assert float(value) == pytest.approx(0.3 * np.sqrt(2 / np.pi), rel=0.01)
    assert float(outputs.metrics["psnr"]) == pytest.approx(10 * np.log10(4 / 0.09), abs=0.1)


def test_noise_on_samples_is_other_noise(task, monkeypatch):
    """Of deviations 1 and 0.3: together sqrt(1.09), where the same noise twice would be 1.3."""

    def sample(mean, log_variance, key):
        return mean + jax.random.normal(key, mean.shape)

    monkeypatch.setattr(task.networks["autoencoder"], "sample", sample, raising=False)
    value = float(loss(task, latent_noise=0.3, sample=True)[0])
    assert value == pytest.approx(np.sqrt(1.09 * 2 / np.pi), rel=0.01)


def test_scaled_latents_are_pulled_to_moments_of_0_and_1(task):
    """Bytes in [-1, 1], as many of each: their mean is 0, their deviation 1 / sqrt(3)."""
    for scale in (1.0, 0.18215, 3**0.5):
        task.networks["autoencoder"].scale = scale
        value = float(loss(task, l1=0.0, moments=1.0)[0])
        assert value == pytest.approx((scale / 3**0.5 - 1) ** 2, abs=0.01)
    # And the noise is that of scaled latents.
    task.networks["autoencoder"].scale = 0.25
    value, _ = loss(task, latent_noise=0.3)
    assert float(value) == pytest.approx(4 * 0.3 * np.sqrt(2 / np.pi), rel=0.01)
