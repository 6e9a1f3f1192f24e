"""Windows over long clips."""

import tracemalloc

import numpy as np
import pytest

from dexportrait_jax.diffusion.guidance import GuidanceStep, guidance_plan
from dexportrait_jax.diffusion.sampler import frame_noise, sample
from dexportrait_jax.diffusion.schedule import SCHEDULES
from dexportrait_jax.diffusion.windows import triangular_weights, window_frames, windowed

FULL = GuidanceStep(("full",), (1.0,))


def joined(guided, latents, timesteps, step=FULL):
    """The parts of a prediction, which must follow each other without a gap, as one array."""
    at, parts = 0, []
    for part, prediction in guided(latents, timesteps, step):
        assert part.start == at and len(prediction) == part.stop - at
        at = part.stop
        parts.append(prediction)
    assert at == len(latents)
    return np.concatenate(parts)


@pytest.mark.parametrize("frames", [1, 5, 24, 25, 44, 45, 100])
def test_every_frame_is_in_a_window_of_the_same_length(frames):
    table = window_frames(frames, 24, 4)
    assert table.shape[1] == 24
    assert set(table.ravel()) == set(range(frames))
    if frames >= 24:
        assert (np.diff(table, axis=1) == 1).all()


def test_clamped_table():
    assert window_frames(44, 24, 4)[:, 0].tolist() == [0, 20]
    assert window_frames(50, 24, 4)[:, 0].tolist() == [0, 20, 26]
    assert window_frames(3, 5, 1).tolist() == [[0, 1, 2, 2, 2]]


def test_weights():
    assert triangular_weights(5).tolist() == [1, 2, 3, 2, 1]
    assert triangular_weights(4).tolist() == [1, 2, 2, 1]


@pytest.mark.parametrize("frames", [3, 8, 9, 21])
def test_average_of_predictions(frames):
    latents = np.random.default_rng(0).normal(size=(frames, 2, 2, 1)).astype(np.float32)
    timesteps = np.full(frames, 13, np.int32)
    shapes = set()

    def frame_by_frame(latents, timesteps, chosen, branch):
        shapes.add(latents.shape)
        assert branch == "full"
        return latents * chosen[:, None, None, None] + timesteps[0]

    guided = windowed(frame_by_frame, frames, length=8, overlap=3)
    expected = latents * np.arange(frames)[:, None, None, None] + 13
    np.testing.assert_allclose(joined(guided, latents, timesteps), expected, rtol=1e-5)
    assert shapes == {(8, 2, 2, 1)}


def test_overlaps_blend_by_weight():
    def number_of_window(latents, timesteps, chosen, branch):
        return np.full(latents.shape, float(chosen[0] > 0))

    guided = windowed(number_of_window, 6, length=4, overlap=2)
    result = joined(guided, np.zeros((6, 1, 1, 1)), np.zeros(6, np.int32)).ravel()
    np.testing.assert_allclose(result, [0, 0, 1 / 3, 2 / 3, 1, 1], rtol=1e-6)
    alike = windowed(number_of_window, 6, length=4, overlap=2, weights="equal")
    result = joined(alike, np.zeros((6, 1, 1, 1)), np.zeros(6, np.int32)).ravel()
    np.testing.assert_allclose(result, [0, 0, 1 / 2, 1 / 2, 1, 1], rtol=1e-6)


def test_latents_renewed_part_by_part_are_those_renewed_at_once():
    """No window reads what the same step has already made of an earlier one."""
    latents = np.random.default_rng(0).normal(size=(21, 2, 2, 1)).astype(np.float32)
    plan = guidance_plan(4, hold=1)

    def looks_at_its_window(latents, timesteps, chosen, branch):
        return 0.2 * latents + np.tanh(latents.mean()) * (1.0 if branch == "full" else 0.5)

    guided = windowed(looks_at_its_window, 21, length=8, overlap=3)

    def at_once(latents, timesteps, step):
        yield slice(0, 21), joined(guided, latents, timesteps, step)

    np.testing.assert_array_equal(
        sample(guided, SCHEDULES["sd15"], plan, latents),
        sample(at_once, SCHEDULES["sd15"], plan, latents),
    )


def test_in_place_is_the_same_and_otherwise_the_start_is_left_alone():
    latents = frame_noise(0, 5, (2, 2, 1))
    start, plan = latents.copy(), guidance_plan(4, hold=1)
    guided = windowed(lambda latents, *_: 0.1 * latents, 5, length=3, overlap=1)
    made = sample(guided, SCHEDULES["sd15"], plan, latents)
    np.testing.assert_array_equal(latents, start)
    assert sample(guided, SCHEDULES["sd15"], plan, latents, in_place=True) is latents
    np.testing.assert_array_equal(latents, made)


def test_memory_of_a_long_clip_is_its_latents():
    """Of every frame one latent is held; predictions and sums are those of one window."""
    plan, shape = guidance_plan(4, hold=1), (16, 16, 4)

    def peak(frames):
        tracemalloc.start()
        guided = windowed(lambda latents, *_: 0.1 * latents, frames, length=24, overlap=4)
        sample(guided, SCHEDULES["sd15"], plan, frame_noise(0, frames, shape), in_place=True)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(100)
    held = (peak(1100) - peak(100)) / 1000 / (4 * np.prod(shape))
    # 1: the start, over which the result is written; and 8 bytes a window number and a timestep
    assert held < 1.1


def test_what_cannot_be():
    with pytest.raises(ValueError, match="at least one"):
        window_frames(0)
    with pytest.raises(ValueError, match="overlap"):
        window_frames(10, 4, 4)
