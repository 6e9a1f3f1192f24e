"""Every loss against a value worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dexportrait_jax import geometry
from dexportrait_jax.tasks import losses
from dexportrait_jax.tasks.motion_networks import LabelHeads
from tests.compiling import products_on_tpus


def picture(values):
    return jnp.asarray(values, jnp.float32)[None, :, :, None]


def test_mean_absolute():
    assert losses.mean_absolute(picture([[1, 2], [3, 4]]), picture([[0, 2], [3, 7]])) == 1.0


def test_mean_squared():
    prediction, target = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[0.0, 2.0], [3.0, 7.0]])
    assert losses.mean_squared(prediction, target) == (1 + 9) / 4


def test_masked_absolute_is_a_mean_over_all_positions():
    error = picture([[4, 0], [0, 2]])
    mask = jnp.array([[[1.0, 0.0], [0.0, 0.5]]])
    assert losses.masked_absolute(error, 0 * error, mask) == (4 + 1) / 4


def test_gradient_absolute():
    # error rows: [1 3; 0 0]: between rows |-1|,|-3| mean 2; between columns |2|,|0| mean 1
    assert losses.gradient_absolute(picture([[1, 3], [0, 0]]), picture([[0, 0], [0, 0]])) == 3.0


def test_multiscale_absolute():
    error = np.zeros((4, 4), np.float32)
    error[0, 0], error[0, 1] = 4, -4  # cancels at the first halving
    error[2:, 2:] = 1
    # first halving: cells [0 0; 0 1] mean 1/4; second: 1/4
    value = losses.multiscale_absolute(picture(error), picture(0 * error), scales=2)
    assert value == pytest.approx((0.25 + 0.25) / 2)


def test_adversarial_losses():
    zero, one = jnp.zeros((2,)), jnp.ones((2,))
    assert losses.generator_adversarial(zero) == pytest.approx(np.log(2))
    assert losses.discriminator_adversarial(zero, zero) == pytest.approx(2 * np.log(2))
    expected = np.log1p(np.exp(-1)) + np.log1p(np.exp(-1))
    assert losses.discriminator_adversarial(-one, one) == pytest.approx(expected)


def test_r1_of_a_linear_discriminator_is_its_weights_squared_norm():
    weights = jnp.arange(12.0).reshape(2, 2, 3)

    def discriminator(images):
        return jnp.sum(images * weights, (1, 2, 3)) ** 1

    assert losses.r1_penalty(discriminator, jnp.ones((4, 2, 2, 3))) == float(jnp.sum(weights**2))


def test_pose_label():
    def pose(yaw, scale, shift):
        rotation = geometry.euler_to_rotation(*(jnp.array([angle]) for angle in (0.0, yaw, 0.0)))
        return geometry.pose_matrix(rotation, jnp.array([[*shift, 0.0]]), jnp.array([scale]))

    here = pose(0.0, 1.0, (0.0, 0.0))
    assert losses.pose_label(here, here) == pytest.approx(0, abs=1e-9)
    # |R - R'|^2 of a turn by a is 4 (1 - cos a): 90 degrees gives 4
    assert losses.pose_label(pose(90.0, 1.0, (0, 0)), here) == pytest.approx(4.0, rel=1e-4)
    assert losses.pose_label(pose(0.0, np.e, (0, 0)), here) == pytest.approx(1.0, rel=1e-4)
    assert losses.pose_label(pose(0.0, 1.0, (0.3, 0.4)), here) == pytest.approx(0.25, rel=1e-4)


def test_landmark_label():
    """Of 4 x 4 cells the one in row 0, column 3 has its middle at x = .75, y = -.75."""
    maps = np.full((1, 4, 4, 2), -1e4, np.float32)  # two maps, each with one hot cell
    maps[0, 0, 3, 0] = maps[0, 2, 1, 1] = 0.0  # the second's middle: x = -.25, y = .25
    heat_maps = jnp.asarray(maps)

    def error(*landmarks):
        return float(losses.landmark_label(heat_maps, jnp.asarray([landmarks], jnp.float32)))

    assert error((0.75, -0.75), (-0.25, 0.25)) == pytest.approx(0, abs=1e-6)
    assert error((-0.75, 0.75), (-0.25, 0.25)) == pytest.approx(1.5 / 2, rel=1e-6)  # x for y
    assert error((0.35, -0.75), (-0.25, 0.45)) == pytest.approx((0.4 + 0.2) / 4, rel=1e-5)
    # One that lies outside, in one axis or in both, says nothing, but the mean stays over all.
    assert error((1.01, 0.0), (-0.25, 0.45)) == pytest.approx(0.2 / 4, rel=1e-5)
    assert error((0.0, -1.01), (-0.25, 0.45)) == pytest.approx(0.2 / 4, rel=1e-5)
    assert error((0.0, -1.01), (2.0, 2.0)) == 0
    # The landmarks beyond the maps are nobody's.
    assert error((0.75, -0.75), (-0.25, 0.25), (0.9, 0.9)) == pytest.approx(0, abs=1e-6)


def test_landmark_label_is_float32_on_tpus():
    maps, wanted = np.zeros((1, 4, 4, 2), np.float32), np.zeros((1, 2, 2), np.float32)
    assert products_on_tpus(losses.landmark_label, maps, wanted) == [("f32", True)]


def test_landmark_label_reads_a_mean():
    """Equal heat in two cells of a row lies between them; logits, not heat, are given."""
    maps = np.full((1, 2, 4, 1), -1e4, np.float32)
    maps[0, 1, 0, 0], maps[0, 1, 1, 0] = np.log(3.0), 0.0  # 3/4 at x = -.75, 1/4 at -.25; y = .5
    wanted = jnp.array([[[-0.625, 0.5]]])
    assert losses.landmark_label(jnp.asarray(maps), wanted) == pytest.approx(0, abs=1e-6)


def test_label_heads_read_along_columns_of_one_length():
    """Whatever the kernel's size, a column's length is .25, the spread of a blendshape."""
    heads = LabelHeads(2, rngs=nnx.Rngs(0))
    kernel = np.zeros((2, 52), np.float32)
    kernel[:, 0], kernel[:, 1], kernel[:, 2] = (30, 40), (0, -0.002), (1, 0)
    bias = np.zeros(52, np.float32)
    bias[2] = 5.0
    heads.blendshapes.kernel, heads.blendshapes.bias = map(
        nnx.Param, map(jnp.asarray, (kernel, bias))
    )
    read = heads(jnp.array([[1.0, 2.0]]))
    assert read.shape == (1, 52)
    expected = [0.25 * (0.6 * 1 + 0.8 * 2), 0.25 * -2, 0.25 * 1 + 5]
    np.testing.assert_allclose(read[0, :3], expected, rtol=1e-5)


def test_person_leak_by_hand():
    # Two people, two targets, one number. Alike: (1*3 + 5*7) / 2 = 19; people apart: (1+3)(5+7) / 4 = 12.
    latents = jnp.array([[[1.0], [3.0]], [[5.0], [7.0]]])
    np.testing.assert_allclose(losses.person_leak(latents), 7, rtol=1e-6)
    wider = jnp.concatenate([latents, 0 * latents], -1)
    np.testing.assert_allclose(losses.person_leak(wider), 7 / 2, rtol=1e-6)


def test_person_leak_is_the_variance_between_people():
    rng = np.random.default_rng(0)

    def drawn(people, frames):
        latents = (
            people * rng.normal(size=(8, 1, 5)) + frames * rng.normal(size=(8, 2, 5)) + 3
            for _ in range(400)
        )
        return np.mean([losses.person_leak(jnp.asarray(one)) for one in latents])

    # In small batches too, and whatever else the latents hold.
    assert abs(drawn(0, 1)) < 0.02
    assert drawn(1, 0) == pytest.approx(1, abs=0.06) == pytest.approx(drawn(1, 1), abs=0.1)


def test_pose_leak_is_the_variance_that_goes_with_the_pose():
    rng = np.random.default_rng(0)

    def poses(angles):
        turned = geometry.euler_to_rotation(*jnp.asarray(angles).T)
        return jnp.concatenate([1.3 * turned, jnp.zeros((len(angles), 3, 1))], -1)

    drawn = {"nothing": [], "yaw": []}
    for _ in range(300):
        angles = rng.uniform(-30, 30, (64, 3)).astype(np.float32)
        latents = rng.normal(size=(64, 4))
        drawn["nothing"].append(losses.pose_leak(jnp.asarray(latents), poses(angles)))
        # One of four numbers is the yaw times 1 / 10 degree: its variance is 3.
        latents[:, 2] = -angles[:, 1] / 10
        drawn["yaw"].append(losses.pose_leak(jnp.asarray(latents), poses(angles)))
    assert abs(np.mean(drawn["nothing"])) < 0.05
    assert np.mean(drawn["yaw"]) == pytest.approx(3 / 4, abs=0.1)


@pytest.mark.parametrize(("step", "weight"), [(0, 1.0), (50, 0.55), (100, 0.1), (1000, 0.1)])
def test_decaying_weight(step, weight):
    assert losses.decaying_weight(step, 1.0, 0.1, 100) == pytest.approx(weight)


def test_kullback_leibler():
    mean, log_variance = jnp.full((1, 1, 1, 2), 2.0), jnp.full((1, 1, 1, 2), np.log(4.0))
    expected = 0.5 * (4 + 4 - 1 - np.log(4))
    assert losses.kullback_leibler(mean, log_variance) == pytest.approx(expected, rel=1e-6)


def test_denoising_error_weights_samples():
    prediction = jnp.stack([jnp.ones((2, 2, 1)), 2 * jnp.ones((2, 2, 1))])
    target = jnp.zeros_like(prediction)
    assert losses.denoising_error(prediction, target) == 2.5
    assert losses.denoising_error(prediction, target, jnp.array([1.0, 0.5])) == 1.5


def test_denoising_error_weighs_places():
    """Errors of 1 and 2 in each half; the first half three times, and of the second sample the second twice."""
    target = jnp.zeros((2, 2, 2, 3))
    prediction = target.at[:, 0].set(1.0).at[:, 1].set(2.0)
    places = jnp.ones((2, 2, 2)).at[:, 0].set(3.0).at[1, 1].set(2.0)
    assert losses.denoising_error(prediction, target, places=places) == (3.5 + 5.5) / 2
    both = losses.denoising_error(prediction, target, jnp.array([2.0, 0.0]), places)
    assert both == 3.5


def test_gradient_norms_of_each_term_at_the_picture():
    """3 * mean(x^2) over 2 numbers (1, 2): gradient 3 x, norm 3 sqrt(5); 2 * sum(x): norm 2 sqrt(2)."""

    def terms(image):
        return {"square": (3.0, jnp.mean(image**2)), "sum": (2.0, jnp.sum(image))}

    norms = losses.gradient_norms(terms, jnp.array([1.0, 2.0]))
    assert set(norms) == {"gradient_norm/square", "gradient_norm/sum"}
    assert float(norms["gradient_norm/square"]) == pytest.approx(3 * 5**0.5)
    assert float(norms["gradient_norm/sum"]) == pytest.approx(2 * 2**0.5)
