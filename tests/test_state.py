"""Networks as pure functions: what their fresh parameters are drawn from."""

import jax
import numpy as np
from flax import nnx

from dexportrait_jax.state import Keys, Network


def test_keys_are_those_of_flax():
    """So that weights drawn by layers of Flax are the ones that Flax draws from the same seed."""
    ours, theirs = Keys(jax.random.key(3)), nnx.Rngs(jax.random.key(3))
    for _ in range(4):
        np.testing.assert_array_equal(
            jax.random.key_data(ours.params()), jax.random.key_data(theirs.params())
        )


def test_fresh_weights_are_those_of_flax():
    network = Network(
        lambda rngs: nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs))
    )
    fresh = network.bind(network.init(jax.random.key(5)))
    rngs = nnx.Rngs(jax.random.key(5))
    flax = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs))
    for ours, theirs in zip(
        jax.tree.leaves(nnx.state(fresh)), jax.tree.leaves(nnx.state(flax)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
