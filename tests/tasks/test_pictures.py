"""Pictures between bytes and what networks take, and those that a run evaluates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dexportrait_jax import config as configs
from dexportrait_jax.platforms import planned_for
from dexportrait_jax.tasks.pictures import SHOWN, in_turn, shown_batch, to_float, to_uint8

HEADS = "synthetic:identities=6,frames=30,size=32,holdout=0.5"


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
    sizes = ("image_size=32", "pose_size=32", "expression_size=32")
    config = configs.load_config(address, [f"data.{one}" for one in (f"path={HEADS}", *sizes)])
    assert shown_batch(config)["target_image"].shape == (sources, targets, 32, 32, 3)


def test_pictures_in_turn_are_pictures_at_once():
    images = jax.random.normal(jax.random.key(0), (5, 4, 4, 3))

    def norm(images):
        return jnp.sum(images**2, axis=(1, 2, 3))[:, None] * jnp.arange(2.0)

    with planned_for("tpu"):
        assert "scan" in str(jax.make_jaxpr(lambda images: in_turn(norm, images))(images))
        np.testing.assert_allclose(in_turn(norm, images), norm(images), rtol=1e-6)
    assert "scan" not in str(jax.make_jaxpr(lambda images: in_turn(norm, images))(images))
