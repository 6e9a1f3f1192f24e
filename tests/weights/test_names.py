"""Names and layouts against torch's own modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from dexportrait_jax.errors import UserError
from dexportrait_jax.state import Network
from dexportrait_jax.weights import names


class _Block(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(4, 6, (3, 5), feature_group_count=2, padding=1, rngs=rngs)
        self.norm = nnx.GroupNorm(6, num_groups=3, rngs=rngs)
        self.linear = nnx.Linear(6, 2, rngs=rngs)
        self.token = nnx.Embed(7, 6, rngs=rngs)
        self.layers = nnx.List(
            [nnx.Conv(2, 3, (1, 2, 3), rngs=rngs), nnx.Conv(2, 3, (3,), rngs=rngs)]
        )
        self.null_tokens = nnx.Param(jnp.zeros((2, 6)))


class _TorchBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 6, (3, 5), groups=2, padding=1)
        self.norm = torch.nn.GroupNorm(3, 6)
        self.linear = torch.nn.Linear(6, 2)
        self.token = torch.nn.Embedding(7, 6)
        self.layers = torch.nn.ModuleList(
            [torch.nn.Conv3d(2, 3, (1, 2, 3)), torch.nn.Conv1d(2, 3, 3)]
        )
        self.null_tokens = torch.nn.Parameter(torch.zeros(2, 6))


@pytest.fixture(scope="module")
def network():
    return Network(lambda rngs: _Block(rngs=rngs))


def test_keys_and_shapes_are_those_of_torch(network):
    tensors = names.to_torch(network.init(jax.random.key(0)))
    expected = {key: tuple(value.shape) for key, value in _TorchBlock().state_dict().items()}
    assert {key: value.shape for key, value in tensors.items()} == expected
    assert all(value.flags.c_contiguous for value in tensors.values())


def test_torch_computes_the_same_with_the_converted_weights(network):
    params = network.init(jax.random.key(1))
    module, reference = network.bind(params), _TorchBlock()
    reference.load_state_dict({k: torch.tensor(v) for k, v in names.to_torch(params).items()})
    image = np.random.default_rng(0).normal(size=(2, 8, 9, 4)).astype(np.float32)
    theirs = reference.conv(torch.tensor(image.transpose(0, 3, 1, 2))).detach().numpy()
    np.testing.assert_allclose(module.conv(image), theirs.transpose(0, 2, 3, 1), atol=1e-5)
    rows = image.reshape(-1, 6)
    np.testing.assert_allclose(
        module.linear(rows), reference.linear(torch.tensor(rows)).detach().numpy(), atol=1e-5
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_round_trip_is_exact(network, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), network.init(jax.random.key(2)))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    tensors = names.to_torch(params)
    for back in (
        names.from_torch(tensors, abstract),
        names.from_torch_alone(tensors, names.layout_exceptions(params)),
    ):
        assert jax.tree.structure(back) == jax.tree.structure(params)
        for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
            assert theirs.dtype == ours.dtype
            np.testing.assert_array_equal(np.asarray(ours), theirs)


def test_tensors_are_cast_to_the_type_the_network_wants(network):
    half = {
        k: v.astype(np.float16) for k, v in names.to_torch(network.init(jax.random.key(0))).items()
    }
    assert {x.dtype for x in jax.tree.leaves(names.from_torch(half, network.abstract))} == {
        np.dtype("float32")
    }


def test_all_differences_are_named_in_one_line(network):
    tensors = names.to_torch(network.init(jax.random.key(0)))
    del tensors["conv.bias"]
    tensors["conv.surplus"] = np.zeros(3)
    tensors["linear.weight"] = np.zeros((6, 2), np.float32)
    with pytest.raises(UserError) as error:
        names.from_torch(tensors, network.abstract, where="file a.safetensors")
    message = str(error.value)
    assert "\n" not in message and message.startswith("file a.safetensors")
    assert "1 missing: conv.bias" in message and "1 extra: conv.surplus" in message
    assert "1 misshapen: linear.weight is (6, 2), expected (2, 6)" in message


def test_two_parameters_of_one_name_are_refused():
    with pytest.raises(ValueError, match="a.weight"):
        names.to_torch({"a": {"kernel": np.zeros((2, 2)), "scale": np.zeros(2)}})
