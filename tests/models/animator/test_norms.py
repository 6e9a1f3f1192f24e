"""The written-out gradients of the norms against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dexportrait_jax.models.animator.norms import GroupNorm, LayerNorm
from dexportrait_jax.state import Network


@pytest.mark.parametrize("kind", ["group", "layer"])
def test_value_and_gradients_equal_torch(kind):
    generator = np.random.default_rng(0)
    hidden = (generator.normal(size=(2, 3, 5, 8)) + 10).astype(np.float32)
    scale, bias = generator.normal(size=(2, 8)).astype(np.float32)
    if kind == "group":
        network = Network(lambda rngs: GroupNorm(8, 4, epsilon=1e-6, rngs=rngs))
        published = torch.nn.GroupNorm(4, 8, eps=1e-6)
    else:
        network = Network(lambda rngs: LayerNorm(8, rngs=rngs))
        published = torch.nn.LayerNorm(8)
    published.load_state_dict({"weight": torch.tensor(scale), "bias": torch.tensor(bias)})
    inputs = torch.tensor(hidden, requires_grad=True)
    moved = inputs.movedim(-1, 1) if kind == "group" else inputs
    expected = published(moved).movedim(1, -1) if kind == "group" else published(moved)
    torch.sin(expected).sum().backward()

    def loss(params, hidden):
        ours = network.bind(params)(hidden)
        return jnp.sum(jnp.sin(ours)), ours

    params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
    (_, ours), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, hidden)
    close = {"rtol": 1e-3, "atol": 2e-5}
    np.testing.assert_allclose(ours, expected.detach(), **close)
    np.testing.assert_allclose(gradients[1], inputs.grad, **close)
    np.testing.assert_allclose(gradients[0]["scale"], published.weight.grad, **close)
    np.testing.assert_allclose(gradients[0]["bias"], published.bias.grad, **close)


def test_half_precision_keeps_float32_statistics():
    network = Network(lambda rngs: LayerNorm(8, dtype=jnp.bfloat16, rngs=rngs))
    layer = network.bind(network.init(jax.random.key(0)))
    hidden = jnp.linspace(100.0, 101.0, 8)
    ours = layer(hidden[None])
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours[0, 0], -1.5275, rtol=0.01)


def test_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="6 channels do not divide into 4"):
        Network(lambda rngs: GroupNorm(6, 4, epsilon=1e-5, rngs=rngs))
