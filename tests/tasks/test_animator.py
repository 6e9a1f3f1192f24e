"""What the animator's loss draws, and the encoders that it takes over."""

import jax
import numpy as np
import pytest

from dexportrait_jax.errors import UserError
from dexportrait_jax.tasks import animator
from tests.stages import micro


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_timesteps_follow_the_power(power):
    """The cumulative distribution is (t / steps)^power; 200k draws are within 0.005 of it (4 deviations)."""
    drawn = np.asarray(animator.draw_timesteps(jax.random.key(0), 200_000, 1000, power))
    assert drawn.dtype == np.int32 and drawn.min() >= 0 and drawn.max() == 999
    for limit in (100, 500, 900):
        assert np.mean(drawn < limit) == pytest.approx((limit / 1000) ** power, abs=0.005)


def test_every_timestep_is_drawn():
    drawn = animator.draw_timesteps(jax.random.key(1), 10_000, 10, 1.0)
    assert set(np.asarray(drawn)) == set(range(10))


@pytest.mark.parametrize("stage", ["animator_image", "animator_video"])
def test_frozen_encoders_see_the_pictures_they_learned_from(tmp_path, stage):
    config = micro(stage, tmp_path / "data", tmp_path / "exports")
    assert "expression" in animator.AnimatorTask(config).pretrained()
    config.data.augment.colour.probability = (
        1.0  # random: what the animator trains on is its own affair
    )
    assert "expression" in animator.AnimatorTask(config).pretrained()
    config.data.augment.expression_crop.gray = True
    config.data.augment.pose_mask.dilation = 0.25
    config.data.pose_size = 32
    with pytest.raises(UserError) as caught:
        animator.AnimatorTask(config).pretrained()
    said = str(caught.value)
    assert "\n" not in said and str(tmp_path / "exports") in said
    assert said.split(": ", 1)[1].split() == [
        "--config.data.augment.pose_mask.dilation=0.2",
        "--config.data.augment.expression_crop.gray=False",
        "--config.data.pose_size=64",
    ]
