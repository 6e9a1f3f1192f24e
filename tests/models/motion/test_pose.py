"""ConvNeXtV2 against transformers, and the heads of the pose encoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import ConvNextV2Config, ConvNextV2Model

from dexportrait_jax import geometry
from dexportrait_jax.models.motion.pose import ConvNeXtV2, PoseEncoder
from dexportrait_jax.state import Network
from tests.compiling import products_on_tpus
from tests.models.motion.torch_statements import close

SIZES = {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32)}


def published_weights(torch_model):
    """Parameters of transformers' model under the names used here."""
    tree = {}
    for key, tensor in torch_model.state_dict().items():
        key = key.replace("embeddings.patch_embeddings", "downsample_layers.0.0")
        key = key.replace("embeddings.layernorm", "downsample_layers.0.1")
        if key.startswith("encoder.stages."):
            _, _, stage, kind, *rest = key.split(".")
            if kind == "downsampling_layer":
                key = f"downsample_layers.{stage}." + ".".join(rest)
            else:
                key = f"stages.{stage}." + ".".join(rest)
        key = key.replace("layernorm.", "norm.")
        key = key.replace("grn.weight", "grn.gamma").replace("grn.bias", "grn.beta")
        value = tensor.numpy()
        if key.endswith("weight"):
            key = key.removesuffix("weight") + ("scale" if value.ndim == 1 else "kernel")
            axes = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}[value.ndim]
            value = value.transpose(axes)
        node = tree
        *path, last = key.split(".")
        for part in path:
            node = node.setdefault(part, {})
        node[last] = jnp.asarray(value)
    return tree


def test_backbone_equals_transformers():
    torch.manual_seed(0)
    config = ConvNextV2Config(depths=list(SIZES["depths"]), hidden_sizes=list(SIZES["dims"]))
    config.layer_norm_eps = 1e-6  # of the last norm; the published models have it everywhere
    model = ConvNextV2Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    network = Network(lambda rngs: ConvNeXtV2(**SIZES, rngs=rngs))
    params = published_weights(model)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, network.abstract)
    image = np.random.default_rng(0).standard_normal((2, 64, 96, 3)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.tensor(image.transpose(0, 3, 1, 2))).pooler_output
    actual = jax.jit(lambda params, image: network.bind(params).features(image))(params, image)
    close(actual, expected)


@pytest.mark.parametrize("head", ["euler_bins", "6d"])
def test_untrained_heads_are_about_frontal(head):
    encoder = PoseEncoder(**SIZES, rotation_head=head, rngs=nnx.Rngs(0))
    image = np.random.default_rng(0).uniform(-1, 1, (4, 32, 32, 3)).astype(np.float32)
    pose, raw = jax.jit(encoder)(image)
    rotation, translation, scale = geometry.decompose(pose)
    assert pose.dtype == jnp.float32
    np.testing.assert_allclose(rotation, np.broadcast_to(np.eye(3), (4, 3, 3)), atol=0.1)
    np.testing.assert_allclose(translation, 0, atol=0.1)
    np.testing.assert_allclose(scale, 1, atol=0.1)
    expected = {"t", "scale"} | ({"rotation"} if head == "6d" else {"pitch", "yaw", "roll"})
    assert set(raw) == expected


@pytest.mark.parametrize("limit", [2.0, 0.5])
def test_heads_give_the_angles_translation_and_scale_they_say(limit):
    encoder = PoseEncoder(**SIZES, translation_limit=1.5, scale_limit=limit, rngs=nnx.Rngs(0))
    for name, bin_index in (("pitch", 30), ("yaw", 45), ("roll", 20)):
        head = getattr(encoder, f"fc_{name}")
        head.bias = nnx.Param(1e3 * jax.nn.one_hot(bin_index, 66))
        head.kernel = nnx.Param(jnp.zeros_like(head.kernel[...]))
    for head, bias in ((encoder.fc_t, [0.2, -9.0, 5.0]), (encoder.fc_scale, [3.0])):
        head.bias = nnx.Param(jnp.array(bias))
        head.kernel = nnx.Param(jnp.zeros_like(head.kernel[...]))
    pose, _ = jax.jit(encoder)(jnp.zeros((1, 32, 32, 3)))
    rotation, translation, scale = geometry.decompose(pose)
    angles = np.array(geometry.rotation_to_euler(rotation))[:, 0]
    np.testing.assert_allclose(angles, [3 * n - 97.5 for n in (30, 45, 20)], atol=1e-2)
    np.testing.assert_allclose(translation[0], [1.5 * np.tanh(0.2), -1.5, 0], atol=1e-5)
    np.testing.assert_allclose(scale[0], np.exp(limit), rtol=1e-5)  # clipped


def test_blocks_of_a_narrow_network_start_empty_unless_by_fan_in():
    """What a block adds to its input, relative to it: 1 % with the published deviation, the same order by fan-in."""
    hidden = jax.random.normal(jax.random.key(0), (2, 8, 8, 32))

    def added(initialisation):
        network = ConvNeXtV2(
            depths=(1,), dims=(32,), initialisation=initialisation, rngs=nnx.Rngs(0)
        )
        block = network.stages[0][0]
        return float(jnp.std(block(hidden) - hidden) / jnp.std(hidden))

    assert added("published") < 0.03
    assert 0.2 < added("fan_in") < 2


def test_unknown_head():
    with pytest.raises(ValueError, match="quaternion"):
        PoseEncoder(**SIZES, rotation_head="quaternion", rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("rotation_head", "heads"), [("euler_bins", 5), ("6d", 3)])
def test_heads_are_float32_on_tpus(rotation_head, heads):
    encoder = PoseEncoder(
        **SIZES, rotation_head=rotation_head, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    found = products_on_tpus(encoder, np.zeros((1, 64, 64, 3), np.float32))
    assert [how for kind, how in found if kind == "f32"] == [True] * heads
