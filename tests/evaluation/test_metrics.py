"""Picture metrics against their plain statements."""

import jax
import numpy as np
import pytest

from dexportrait_jax.errors import UserError
from dexportrait_jax.evaluation import metrics
from dexportrait_jax.evaluation.metrics import LearnedDistance, psnr, ssim
from dexportrait_jax.models.perceptual import PerceptualNetwork
from dexportrait_jax.state import Network


def _pictures(seed=0, shape=(2, 24, 20, 3)):
    random = np.random.default_rng(seed)
    x = random.integers(0, 256, shape).astype(np.uint8)
    y = np.clip(x + random.normal(0, 25, shape), 0, 255).astype(np.uint8)
    return x, y


def _plain_ssim(x, y, data_range):
    """Wang et al. 2004, window by window, in double precision."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for channel in range(x.shape[-1]):
        for row in range(x.shape[0] - 10):
            for column in range(x.shape[1] - 10):
                a = x[row : row + 11, column : column + 11, channel].astype(np.float64)
                b = y[row : row + 11, column : column + 11, channel].astype(np.float64)
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                variance_a = (window * (a - mean_a) ** 2).sum()
                variance_b = (window * (b - mean_b) ** 2).sum()
                covariance = (window * (a - mean_a) * (b - mean_b)).sum()
                values.append(
                    (2 * mean_a * mean_b + c1)
                    * (2 * covariance + c2)
                    / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))
                )
    return np.mean(values)


def test_psnr_by_hand():
    x = np.zeros((2, 8, 8, 3), np.uint8)
    y = np.stack([np.full((8, 8, 3), 255, np.uint8), np.full((8, 8, 3), 51, np.uint8)])
    np.testing.assert_allclose(psnr(x, y, data_range=255), [0, 10 * np.log10(25)], atol=1e-4)


def test_psnr_of_equal_pictures_is_finite():
    x, _ = _pictures()
    np.testing.assert_allclose(psnr(x, x, data_range=255), 100, rtol=1e-6)


@pytest.mark.parametrize("offset", [0, 1])
def test_ssim_is_the_plain_statement(offset):
    x, y = _pictures()
    if offset:  # bright and flat: where single precision is most easily lost
        x, y = (value // 64 + 190 for value in (x, y))
    expected = [_plain_ssim(a, b, 255) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(ssim(x, y, data_range=255), expected, atol=2e-5)


def test_ssim_limits():
    x, y = _pictures()
    np.testing.assert_allclose(ssim(x, x, data_range=255), 1, atol=1e-6)
    np.testing.assert_allclose(ssim(x, y, data_range=255), ssim(y, x, data_range=255), atol=1e-6)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_data_range_is_a_matter_of_units(metric):
    x, y = _pictures()
    unit = metric(x / 255, y / 255, data_range=1.0)
    np.testing.assert_allclose(metric(x, y, data_range=255), unit, rtol=1e-4)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_shapes_must_agree(metric):
    x, y = _pictures()
    with pytest.raises(ValueError, match="one shape"):
        metric(x, y[:, 1:], data_range=255)


def test_ssim_of_tiny_pictures():
    x, y = _pictures(shape=(1, 8, 20, 3))
    with pytest.raises(ValueError, match="at least 11 px"):
        ssim(x, y, data_range=255)


def test_learned_distance_takes_bytes_and_floats(monkeypatch):
    network = Network(lambda rngs: PerceptualNetwork("alexnet", rngs=rngs))
    random = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: random.normal(0, 0.05, x.shape).astype(np.float32), network.abstract
    )
    monkeypatch.setattr(metrics, "load_lpips", lambda name: params)
    distance = LearnedDistance("alexnet")
    x, y = _pictures(shape=(2, 40, 40, 3))
    assert distance(x, x, data_range=255) == pytest.approx([0, 0])
    value = distance(x, y, data_range=255)
    assert value.shape == (2,) and np.all(value != 0)
    for scale, shift, data_range in ((255, 0, 1), (127.5, 1, 2)):
        again = distance(x / scale - shift, y / scale - shift, data_range=data_range)
        np.testing.assert_allclose(again, value, rtol=1e-3, atol=1e-6)
    with pytest.raises(UserError, match="at least 31 px"):
        distance(x[:, :20], y[:, :20], data_range=255)


def test_masked_psnr_by_hand():
    """An error of 25.5 in one of two positions inside: mean square 0.005, 23.01 dB; outside nothing counts."""
    wanted = np.zeros((1, 2, 2, 3), np.uint8)
    made = wanted.astype(float)
    made[0, 0, 0], made[0, 1, 1] = 25.5, 255
    mask = np.array([[[255, 255], [0, 0]]], np.uint8)
    assert metrics.masked_psnr(made, wanted, mask)[0] == pytest.approx(-10 * np.log10(0.005))
    assert metrics.masked_psnr(wanted, wanted, mask)[0] == 100
