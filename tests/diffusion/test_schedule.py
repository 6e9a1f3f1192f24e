"""Noise schedules against diffusers."""

import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dexportrait_jax import config as configs
from dexportrait_jax.diffusion.schedule import (
    SCHEDULES,
    NoiseSchedule,
    noise_schedule,
    training_noise,
)
from dexportrait_jax.errors import UserError

TIMESTEPS = np.array([0, 1, 500, 998])


def published(schedule: NoiseSchedule, **settings):
    return diffusers.DDIMScheduler(
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=schedule.final_alpha_one,
        steps_offset=1,
        prediction_type="v_prediction" if schedule.prediction == "v" else schedule.prediction,
        rescale_betas_zero_snr=schedule.zero_terminal_snr,
        **settings,
    )


OF_CLEAN_LATENTS = dataclasses.replace(SCHEDULES["zero_snr"], prediction="sample")


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), OF_CLEAN_LATENTS])
def test_equals_diffusers(schedule):
    other = published(schedule)
    np.testing.assert_allclose(
        schedule.alphas_cumprod, other.alphas_cumprod.numpy(), rtol=2e-4, atol=1e-7
    )
    generator = np.random.default_rng(0)
    latents, noise = generator.normal(size=(2, 4, 8, 8, 3)).astype(np.float32)
    arguments = [torch.tensor(latents), torch.tensor(noise), torch.tensor(TIMESTEPS)]
    noisy = schedule.add_noise(latents, noise, TIMESTEPS)
    np.testing.assert_allclose(noisy, other.add_noise(*arguments), rtol=1e-4, atol=1e-4)
    target = schedule.target(latents, noise, TIMESTEPS)
    if schedule.prediction == "epsilon":
        np.testing.assert_array_equal(target, noise)
    elif schedule.prediction == "sample":
        np.testing.assert_array_equal(target, latents)
    else:
        np.testing.assert_allclose(target, other.get_velocity(*arguments), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        schedule.clean(target, noisy, TIMESTEPS), latents, rtol=1e-3, atol=1e-3
    )


def test_terminal_signal():
    assert np.sqrt(SCHEDULES["sd15"].alphas_cumprod[-1]) == pytest.approx(0.0683, abs=1e-4)
    assert np.sqrt(SCHEDULES["xnemo"].alphas_cumprod[-1]) == pytest.approx(0.0152, abs=1e-4)
    assert SCHEDULES["zero_snr"].alphas_cumprod[-1] == 0.0


def of_config(*overrides, variant="full"):
    address = f"configs/animator_image.py:{variant}"
    return noise_schedule(configs.load_config(address, list(overrides)).diffusion)


def test_presets_of_the_config():
    assert of_config() == SCHEDULES["sd15"]
    assert of_config(variant="tiny") == SCHEDULES["zero_snr"]
    for name, schedule in SCHEDULES.items():
        assert of_config(f"diffusion.preset={name}") == schedule
    # A key beside a preset changes it.
    changed = of_config("diffusion.preset=xnemo", "diffusion.prediction=v", "diffusion.steps=500")
    expected = NoiseSchedule(steps=500, beta_end=0.02, prediction="v", final_alpha_one=True)
    assert changed == expected
    keys = ("diffusion.beta_end=0.02", "diffusion.final_alpha_one=True")
    assert of_config(*keys) == SCHEDULES["xnemo"]


def test_keys_of_a_config_older_than_presets():
    keys = {"steps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "final_alpha_one": False}
    old = noise_schedule(keys | {"prediction": "v", "zero_terminal_snr": True})
    assert old == SCHEDULES["zero_snr"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("preset=xnemmo", "one of sd15, xnemo, zero_snr, not 'xnemmo'"),
        ("zero_terminal_snr=True", "config.diffusion: zero_terminal_snr .* use 'v'"),
        ("prediction=noise", "config.diffusion: prediction 'noise'"),
    ],
)
def test_wrong_schedules_are_one_line(override, words):
    with pytest.raises(UserError, match=words) as caught:
        of_config(f"diffusion.{override}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_min_snr_weights(prediction):
    schedule = NoiseSchedule(prediction=prediction)
    snr = schedule.alphas_cumprod[TIMESTEPS] / (1 - schedule.alphas_cumprod[TIMESTEPS])
    expected = np.minimum(snr, 5.0) / {"epsilon": snr, "v": snr + 1, "sample": 1}[prediction]
    np.testing.assert_allclose(schedule.min_snr_weights(TIMESTEPS, 5.0), expected, rtol=1e-4)
    np.testing.assert_allclose(schedule.snr(TIMESTEPS), snr, rtol=1e-5)


def test_min_snr_weights_where_the_end_is_pure_noise():
    """alpha_bar .9, .8, .5, 0: SNR 9, 4, 1, 0, and the last, which sampling begins with, weighs as much as any."""
    schedule = SCHEDULES["zero_snr"]
    assert schedule.min_snr_weights(np.array([999]), 5.0) == 1.0
    by_hand = dataclasses.replace(schedule, steps=4)
    by_hand.__dict__["alphas_cumprod"] = np.array([0.9, 0.8, 0.5, 0.0])
    weights = by_hand.min_snr_weights(np.arange(4), 5.0)
    np.testing.assert_allclose(weights, [5 / 10, 5 / 5, 2 / 2, 1 / 1], rtol=1e-6)
    by_hand.__dict__["prediction"] = "sample"
    np.testing.assert_allclose(by_hand.min_snr_weights(np.arange(4), 5.0), [5, 5, 2, 1], rtol=1e-6)


def test_a_weighted_loss_does_not_depend_on_what_is_predicted():
    """An error of the clean latents, as the error of noise or v that it makes, weighs the same."""
    generator = np.random.default_rng(0)
    latents, noise, off = generator.normal(size=(3, 4, 8, 8, 3)).astype(np.float32)
    losses = []
    for prediction in ("epsilon", "v", "sample"):
        schedule = NoiseSchedule(prediction=prediction)
        signal, amount = schedule.signal_and_noise(TIMESTEPS, latents)
        noisy = schedule.add_noise(latents, noise, TIMESTEPS)
        # What a network that sees latents + off in place of latents says.
        said = schedule.target(
            latents + off, (noisy - signal * (latents + off)) / amount, TIMESTEPS
        )
        np.testing.assert_allclose(
            schedule.clean(said, noisy, TIMESTEPS), latents + off, rtol=1e-3, atol=1e-3
        )
        weights = schedule.min_snr_weights(TIMESTEPS, 5.0)
        error = said - schedule.target(latents, noise, TIMESTEPS)
        losses.append(weights * np.mean(np.square(error), axis=(1, 2, 3)))
    np.testing.assert_allclose(losses[0], losses[2], rtol=2e-2)
    np.testing.assert_allclose(losses[1], losses[2], rtol=2e-2)


def test_what_cannot_be():
    with pytest.raises(ValueError, match="use 'v'"):
        NoiseSchedule(zero_terminal_snr=True)
    with pytest.raises(ValueError, match="none of epsilon, v, sample"):
        NoiseSchedule(prediction="x0")


def test_noise_offset_is_common_to_a_channel():
    shape = (64, 16, 16, 4)
    plain = training_noise(jax.random.key(0), shape)
    shifted = training_noise(jax.random.key(0), shape, 0.5) - plain
    assert float(jnp.std(plain)) == pytest.approx(1.0, abs=0.01)
    np.testing.assert_allclose(jnp.std(shifted, axis=(1, 2)), 0.0, atol=1e-5)
    assert float(jnp.std(shifted)) == pytest.approx(0.5, abs=0.07)
    # And to all frames of a clip, which flicker would not be.
    clips = (training_noise(jax.random.key(0), shape, 0.5, frames=4) - plain).mean((1, 2))
    clips = clips.reshape(16, 4, 4)
    np.testing.assert_allclose(clips, jnp.broadcast_to(clips[:, :1], clips.shape), atol=1e-5)
    assert float(jnp.std(clips)) == pytest.approx(0.5, abs=0.15)
