"""What the animator's loss draws: noise levels."""

import jax
import numpy as np
import pytest

from dexportrait_jax.tasks import animator


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
