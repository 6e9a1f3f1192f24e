"""Windows over long clips."""

import numpy as np
import pytest

from dexportrait_jax.diffusion.windows import (
    rotated_window_frames,
    triangular_weights,
    window_frames,
    windowed,
)


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


def test_rotated_windows_close_the_loop():
    table = rotated_window_frames(30, 24, 4, 7)
    assert set(table.ravel()) == set(range(30))
    assert table[0, 0] == 7
    assert table.max() == 29


def test_weights():
    assert triangular_weights(5).tolist() == [1, 2, 3, 2, 1]
    assert triangular_weights(4).tolist() == [1, 2, 2, 1]


@pytest.mark.parametrize("frames", [3, 8, 21])
@pytest.mark.parametrize("rotate", [None, lambda timestep: timestep % 8])
def test_average_of_predictions(frames, rotate):
    latents = np.random.default_rng(0).normal(size=(frames, 2, 2, 1)).astype(np.float32)
    timesteps = np.full(frames, 13, np.int32)
    shapes = set()

    def frame_by_frame(latents, timesteps, branch, chosen):
        shapes.add(latents.shape)
        assert branch == "full"
        return latents * chosen[:, None, None, None] + timesteps[0]

    denoise = windowed(frame_by_frame, frames, length=8, overlap=3, rotate=rotate)
    expected = latents * np.arange(frames)[:, None, None, None] + 13
    np.testing.assert_allclose(denoise(latents, timesteps, "full"), expected, rtol=1e-5)
    assert shapes == {(8, 2, 2, 1)}


def test_overlaps_blend_by_weight():
    def number_of_window(latents, timesteps, branch, chosen):
        return np.full(latents.shape, float(chosen[0] > 0))

    denoise = windowed(number_of_window, 6, length=4, overlap=2)
    result = denoise(np.zeros((6, 1, 1, 1)), np.zeros(6, np.int32), "full").ravel()
    np.testing.assert_allclose(result, [0, 0, 1 / 3, 2 / 3, 1, 1], rtol=1e-6)


def test_what_cannot_be():
    with pytest.raises(ValueError, match="at least one"):
        window_frames(0)
    with pytest.raises(ValueError, match="overlap"):
        window_frames(10, 4, 4)
