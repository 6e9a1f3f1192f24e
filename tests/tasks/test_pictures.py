"""Pictures between bytes and what networks take."""

import jax.numpy as jnp
import numpy as np

from dexportrait_jax.tasks.pictures import to_float, to_uint8


def test_to_float_is_minus_one_to_one():
    values = jnp.arange(256, dtype=jnp.uint8)
    assert to_float(values).min() == -1 and to_float(values).max() == 1
    np.testing.assert_array_equal(to_uint8(to_float(values)), np.arange(256))
