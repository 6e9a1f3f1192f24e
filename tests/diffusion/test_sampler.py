"""DDIM against diffusers step by step, and the sampling loop."""

import numpy as np
import pytest
import torch

from dexportrait_jax.diffusion.guidance import guidance_plan
from dexportrait_jax.diffusion.sampler import (
    blurred_start,
    ddim_step,
    frame_noise,
    sample,
    sampling_timesteps,
    whole,
)
from dexportrait_jax.diffusion.schedule import SCHEDULES, NoiseSchedule
from tests.diffusion.test_schedule import OF_CLEAN_LATENTS, published


def test_published_timesteps():
    steps = sampling_timesteps(SCHEDULES["sd15"], 35)
    assert steps[:2].tolist() == [953, 925]
    assert steps[-1] == 1
    assert len(steps) == 35


def test_as_many_steps_as_there_are_timesteps():
    """With the offset the first would be 1000, which no table has."""
    steps = sampling_timesteps(SCHEDULES["sd15"], 1000)
    assert steps.tolist() == [999, *range(999, 0, -1)]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("count", [3, 7, 30, 35, 50, 61])
def test_timesteps_equal_diffusers(spacing, count):
    other = published(SCHEDULES["sd15"], timestep_spacing=spacing)
    other.set_timesteps(count)
    ours = sampling_timesteps(SCHEDULES["sd15"], count, spacing=spacing)
    assert len(ours) == count
    # With "trailing" and 61 steps theirs has a 62nd, which no one asked for: rounding makes it.
    np.testing.assert_array_equal(ours, other.timesteps.numpy()[:count])


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "schedule",
    [
        *SCHEDULES.values(),
        OF_CLEAN_LATENTS,
        NoiseSchedule(prediction="v"),
        NoiseSchedule(prediction="sample"),
        NoiseSchedule(final_alpha_one=True),
    ],
)
def test_every_step_equals_diffusers(schedule, eta, spacing):
    count = 12
    # Diffusers' own float32 table: at zero SNR the last entries differ by rounding alone.
    other = published(schedule, timestep_spacing=spacing)
    other.set_timesteps(count)
    generator = np.random.default_rng(0)
    latents = generator.normal(size=(2, 4, 4, 3)).astype(np.float32)
    theirs = torch.tensor(latents)
    for timestep in sampling_timesteps(schedule, count, spacing=spacing).tolist():
        prediction, noise = generator.normal(size=(2, 2, 4, 4, 3)).astype(np.float32)
        theirs = other.step(
            torch.tensor(prediction), timestep, theirs, eta=eta, variance_noise=torch.tensor(noise)
        ).prev_sample
        previous = timestep - schedule.steps // count
        latents = ddim_step(schedule, prediction, latents, timestep, previous, eta=eta, noise=noise)
        np.testing.assert_allclose(latents, theirs.numpy(), rtol=2e-4, atol=2e-4)
        latents = theirs.numpy()


def test_a_perfect_network_gives_the_clean_latents():
    schedule = SCHEDULES["sd15"]
    generator = np.random.default_rng(0)
    clean, start = generator.normal(size=(2, 3, 4, 4, 2)).astype(np.float32)
    seen, told = [], []

    def denoise(latents, timesteps, branch):
        share = schedule.alphas_cumprod[timesteps[0]]
        seen.append((int(timesteps[0]), branch))
        return (latents - np.sqrt(share) * clean) / np.sqrt(1 - share)

    plan = guidance_plan(35)
    before = start.copy()
    result = sample(
        whole(denoise), schedule, plan, start, progress=lambda step, done: told.append((step, done))
    )
    np.testing.assert_array_equal(start, before)
    np.testing.assert_allclose(result, clean, atol=0.1)
    assert len(seen) == 74
    assert told == [(step, 1.0) for step in range(35)]
    assert [branch for timestep, branch in seen if timestep == 953] == ["null", "reduced"]
    assert [branch for timestep, branch in seen if timestep == 1] == ["null", "full"]


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize(
    ("schedule", "spacing"),
    [
        (SCHEDULES["sd15"], "leading"),
        (SCHEDULES["zero_snr"], "trailing"),
        (OF_CLEAN_LATENTS, "trailing"),
    ],
)
def test_a_whole_run_equals_diffusers(schedule, spacing, eta):
    """The loop itself: timesteps, the last step, and which noise a step gets."""
    count = 35
    other = published(schedule, timestep_spacing=spacing)
    other.set_timesteps(count)
    assert other.timesteps[0] == (953 if spacing == "leading" else 999)
    start = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)

    def predict(latents, timestep):
        return np.tanh(latents + timestep / 1000).astype(np.float32)

    def noise(step, part):
        return frame_noise(5, part.stop - part.start, (4, 4, 3), first=part.start, step=step)

    theirs = torch.tensor(start)
    for step, timestep in enumerate(other.timesteps.tolist()):
        prediction = torch.tensor(predict(theirs.numpy(), timestep))
        fresh = torch.tensor(noise(step, slice(0, 2)))
        theirs = other.step(prediction, timestep, theirs, eta=eta, variance_noise=fresh).prev_sample
    ours = sample(
        whole(lambda latents, timesteps, branch: predict(latents, timesteps[0])),
        schedule,
        guidance_plan(count, scale=1.0, hold=0),
        start,
        spacing=spacing,
        eta=eta,
        noise=noise,
    )
    # 35 steps of float32 rounding, each 1e-6 or so
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-4, atol=2e-4)


def test_scale_one_is_the_conditional_prediction():
    schedule = SCHEDULES["sd15"]
    start = np.random.default_rng(0).normal(size=(1, 4, 4, 2)).astype(np.float32)
    predictions = {"full": 0.3 * start, "reduced": -start, "null": 7 * start}
    plan = guidance_plan(5, scale=1.0, hold=0)
    assert all(step.branches == ("full",) for step in plan.steps)
    guided = sample(whole(lambda z, t, branch: predictions[branch]), schedule, plan, start)
    expected = start
    for timestep in sampling_timesteps(schedule, 5).tolist():
        expected = ddim_step(schedule, predictions["full"], expected, timestep, timestep - 200)
    np.testing.assert_allclose(guided, expected, rtol=1e-6)


def test_noise_of_a_frame_depends_on_nothing_else():
    long = frame_noise(3, 10, (4, 4, 2))
    np.testing.assert_array_equal(frame_noise(3, 2, (4, 4, 2), first=5), long[5:7])
    assert np.abs(frame_noise(3, 10, (4, 4, 2), step=1) - long).max() > 0.1
    assert np.abs(frame_noise(4, 10, (4, 4, 2)) - long).max() > 0.1


def test_noise_that_frames_share():
    own = frame_noise(3, 4, (32, 32, 4))
    one = frame_noise(3, 4, (32, 32, 4), shared=1.0)
    np.testing.assert_array_equal(one, np.repeat(one[:1], 4, 0))
    half = frame_noise(3, 4, (32, 32, 4), shared=0.5)
    np.testing.assert_allclose(half, np.sqrt(0.5) * (one + own), atol=1e-6)
    # Four draws of 4096 numbers, half of their variance common: both estimates spread by about 0.01.
    assert abs(half.std() - 1) < 0.03
    assert abs(np.corrcoef(half[0].ravel(), half[1].ravel())[0, 1] - 0.5) < 0.05
    longer = frame_noise(3, 2, (32, 32, 4), first=2, shared=0.5)
    np.testing.assert_array_equal(longer, half[2:])


def test_blurred_start_of_a_flat_reference():
    schedule, timestep = SCHEDULES["xnemo"], 953
    noise = frame_noise(0, 3, (16, 16, 4))
    start = blurred_start(schedule, np.full((16, 16, 4), 2.0), noise, timestep)
    expected = schedule.add_noise(np.full_like(noise, 2.0), noise, np.full(3, timestep))
    np.testing.assert_allclose(start, expected, atol=1e-5)


def test_what_cannot_be():
    schedule = SCHEDULES["sd15"]
    with pytest.raises(ValueError, match="1 to 1000"):
        sampling_timesteps(schedule, 0)
    with pytest.raises(ValueError, match="none of leading"):
        sampling_timesteps(schedule, 5, spacing="other")
    with pytest.raises(ValueError, match="needs noise"):
        sample(None, schedule, guidance_plan(5, hold=0), np.zeros((1, 2, 2, 1)), eta=1.0)
