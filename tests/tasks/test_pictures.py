"""Pictures between bytes and what networks take, and those that a run evaluates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dexportrait_jax import config as configs
from dexportrait_jax.platforms import planned_for
from dexportrait_jax.tasks.pictures import SHOWN, in_turn, shown_data, to_float, to_uint8
from dexportrait_jax.workload import abstract_batch


def test_to_float_is_minus_one_to_one():
    values = jnp.arange(256, dtype=jnp.uint8)
    assert to_float(values).min() == -1 and to_float(values).max() == 1
    np.testing.assert_array_equal(to_uint8(to_float(values)), np.arange(256))


@pytest.mark.parametrize(
    ("address", "sources", "targets"),
    [
        ("configs/motion.py:tiny", 4, 2),  # the whole batch
        ("configs/motion.py:full", SHOWN // 4, 4),  # of 28
        ("configs/animator_image.py:full@v5e:16x16", SHOWN // 4, 4),  # of 16
        ("configs/animator_video.py:full", 1, 24),  # of 8
    ],
)
def test_an_evaluation_does_not_grow_with_the_batch(address, sources, targets):
    config = configs.load_config(address, ["data.latents=somewhere"] * ("animator" in address))
    batch = abstract_batch(shown_data(config.data))
    assert batch["target_image"].shape[:2] == (sources, targets) and "target_latents" not in batch


def test_pictures_in_turn_are_pictures_at_once():
    images = jax.random.normal(jax.random.key(0), (5, 4, 4, 3))

    def norm(images):
        return jnp.sum(images**2, axis=(1, 2, 3))[:, None] * jnp.arange(2.0)

    with planned_for("tpu"):
        assert "scan" in str(jax.make_jaxpr(lambda images: in_turn(norm, images))(images))
        np.testing.assert_allclose(in_turn(norm, images), norm(images), rtol=1e-6)
    assert "scan" not in str(jax.make_jaxpr(lambda images: in_turn(norm, images))(images))
