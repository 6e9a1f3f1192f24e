"""The gradient of the trilinear reading: by rounds, by the scatter, and many outputs on one cell."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dexportrait_jax import geometry, trilinear
from tests.benchmarks import warp


def gradients(read, volume, coordinates, weights):
    def both(volume, coordinates):
        return jax.vjp(read, volume, coordinates)[1](weights)

    return jax.jit(both)(volume, coordinates)


@pytest.mark.parametrize("most_rounds", [256, 0])
def test_both_ways_equal_map_coordinates(monkeypatch, most_rounds):
    monkeypatch.setattr(trilinear, "_MOST_ROUNDS", most_rounds)
    volume, source, driving, weights = warp.random_case((5, 9, 7, 3), batch=2)
    coordinates = geometry.source_coordinates(source, driving, (5, 9, 7))
    ours = gradients(geometry.warp_volume, volume, coordinates, weights)
    theirs = gradients(warp.warp_by_map_coordinates, volume, coordinates, weights)
    assert warp.largest_difference(ours, theirs) < 1e-5


@pytest.mark.parametrize("most_rounds", [1000, 0])
def test_many_outputs_on_one_cell_add_up(monkeypatch, most_rounds):
    """All 105 outputs read the corner of the volume; with a border its gradient is their sum."""
    monkeypatch.setattr(trilinear, "_MOST_ROUNDS", most_rounds)
    volume = jnp.ones((1, 3, 5, 7, 2))
    coordinates = jnp.full((1, 3, 5, 7, 3), -2.0)
    weights = jnp.asarray(np.random.default_rng(0).standard_normal(volume.shape), jnp.float32)

    def border(volume, coordinates):
        return geometry.warp_volume(volume, coordinates, "border")

    to_volume, to_coordinates = gradients(border, volume, coordinates, weights)
    np.testing.assert_allclose(to_volume[0, 0, 0, 0], weights.sum((0, 1, 2, 3)), rtol=1e-5)
    assert np.count_nonzero(to_volume) == 2
    assert not to_coordinates.any()


def test_outputs_outside_cost_no_rounds_and_have_no_gradient():
    volume = jnp.ones((1, 3, 5, 7, 2))
    to_volume, to_coordinates = gradients(
        geometry.warp_volume, volume, jnp.full((1, 3, 5, 7, 3), 9.0), volume
    )
    assert not to_volume.any() and not to_coordinates.any()


def test_several_outputs_of_one_source_add_up():
    volume, source, driving, _ = warp.random_case((3, 6, 5, 2), batch=4)
    weights = jnp.ones_like(volume)
    coordinates = geometry.source_coordinates(source, driving, (3, 6, 5))
    shared, _ = gradients(geometry.warp_volume, volume[:2], coordinates, weights)
    repeated = jnp.repeat(volume[:2], 2, axis=0)
    apart, _ = gradients(geometry.warp_volume, repeated, coordinates, weights)
    np.testing.assert_allclose(shared, apart.reshape(2, 2, 3, 6, 5, 2).sum(1), atol=1e-5)
