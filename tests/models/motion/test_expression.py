"""The face alignment network against a PyTorch statement of its layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from dexportrait_jax.models.motion.expression import (
    ExpressionEncoder,
    FanBlock,
    Hourglass,
    PatchAttention,
)
from dexportrait_jax.state import Network
from tests.models.motion.torch_statements import close, conv2d, group_norm, randomised, to_torch

SIZES = {"image_size": 32, "stem": 8, "widths": (8, 16, 32), "depth": 2, "heat_maps": 4}
BUILD = {"norm": "group", "dtype": jnp.float32, "rngs": nnx.Rngs(0)}


def torch_block(block, x):
    first = conv2d(block.conv1, group_norm(block.bn1, x).relu(), padding=1)
    second = conv2d(block.conv2, group_norm(block.bn2, first).relu(), padding=1)
    third = conv2d(block.conv3, group_norm(block.bn3, second).relu(), padding=1)
    if block.downsample is not None:
        x = conv2d(block.downsample["2"], group_norm(block.downsample["0"], x).relu())
    return torch.cat([first, second, third], 1) + x


def torch_hourglass(hourglass, level, x, halves=torch.nn.functional.avg_pool2d):
    upper = torch_block(getattr(hourglass, f"b1_{level}"), x)
    lower = torch_block(getattr(hourglass, f"b2_{level}"), halves(x, 2))
    if level > 1:
        lower = torch_hourglass(hourglass, level - 1, lower, halves)
    else:
        lower = torch_block(hourglass.b2_plus_1, lower)
    lower = torch_block(getattr(hourglass, f"b3_{level}"), lower)
    resize = {"size": upper.shape[-2:], "mode": "bilinear", "align_corners": False}
    return upper + torch.nn.functional.interpolate(lower, **resize)


@pytest.mark.parametrize("features", [16, 8])
def test_fan_block_equals_torch(features):
    block = randomised(FanBlock(features, 16, **BUILD))
    inputs = np.random.default_rng(0).standard_normal((2, 6, 5, features)).astype(np.float32)
    close(jax.jit(block)(inputs), torch_block(block, to_torch(inputs)))


@pytest.mark.parametrize(
    ("pooling", "halves"),
    [("average", torch.nn.functional.avg_pool2d), ("max", torch.nn.functional.max_pool2d)],
)
def test_hourglass_equals_torch_at_uneven_sizes(pooling, halves):
    """7 -> 3 -> 1 and back to 3 and 7."""
    hourglass = randomised(Hourglass(8, 2, dropout=0.5, pooling=pooling, **BUILD))
    inputs = np.random.default_rng(0).standard_normal((2, 7, 7, 8)).astype(np.float32)
    close(jax.jit(hourglass)(inputs), torch_hourglass(hourglass, 2, to_torch(inputs), halves))


@pytest.mark.parametrize("kind", ["fan", "fan_sa"])
def test_whole_encoder_equals_torch(kind):
    """Pooled as PD-FGC's and X-NeMo's, and X-NeMo's three transformers where it has them."""
    attention = {"heads": 2, "head_features": 32}
    settings = {"kind": kind, "pooling": "max", "latent": 12, **attention}
    encoder = randomised(ExpressionEncoder(**SIZES, **settings, rngs=nnx.Rngs(0)))

    # Random as the rest, a block's output is tens of times its input, and float32's rounding with it.
    for block in (encoder.sa1, encoder.sa2, encoder.sa3):
        if block is not None:
            block.proj_out.kernel = nnx.Param(0.01 * block.proj_out.kernel[...])

    def attended(block, x):
        return x if block is None else torch_patch_attention(block, x, attention["heads"])

    image = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    x = conv2d(encoder.conv1, to_torch(image), stride=2, padding=3)
    x = attended(encoder.sa1, torch_block(encoder.conv2, group_norm(encoder.bn1, x).relu()))
    x = torch_block(encoder.conv3, torch.nn.functional.max_pool2d(x, 2))
    x = attended(encoder.sa2, torch_block(encoder.conv4, x))
    x = torch_hourglass(encoder.m0, 2, x, torch.nn.functional.max_pool2d)
    x = group_norm(encoder.bn_end0, conv2d(encoder.conv_last0, torch_block(encoder.top_m_0, x)))
    x = conv2d(encoder.l0, attended(encoder.sa3, x).relu())
    x = conv2d(encoder.conv6, group_norm(encoder.bn5, x).relu(), stride=2, padding=1)
    kernel, bias = (torch.tensor(np.asarray(p[...])) for p in (encoder.fc.kernel, encoder.fc.bias))
    close(jax.jit(encoder)(image), x.flatten(1).relu() @ kernel + bias)


def test_more_pictures_before_the_last_layer():
    """The linear layer reads all of them: a change in any one of the heat maps' pictures moves the latent."""
    encoder = ExpressionEncoder(**SIZES, latent=6, pictures=3, leak=0.2, rngs=nnx.Rngs(0))
    assert encoder.conv6.kernel.shape == (3, 3, 4, 3) and encoder.fc.kernel.shape == (3 * 16, 6)
    image = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3), minval=-1)
    latent = encoder(image)
    for picture in range(3):
        bias = np.zeros(3, np.float32)
        bias[picture] = 1.0
        encoder.conv6.bias = nnx.Param(jnp.asarray(bias))
        assert np.abs(encoder(image) - latent).max() > 1e-3


def test_attention_blocks_change_nothing_at_first():
    attention = {"kind": "fan_sa", "heads": 2, "head_features": 32}
    with_attention = ExpressionEncoder(**SIZES, **attention, latent=12, rngs=nnx.Rngs(0))
    image = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    run = jax.jit(lambda model, image: nnx.merge(*model)(image))
    before = run(nnx.split(with_attention), image)
    with_attention.sa1 = with_attention.sa2 = with_attention.sa3 = None
    np.testing.assert_allclose(before, with_attention(image), atol=1e-5)


def torch_linear(layer, x):
    x = x @ torch.tensor(np.asarray(layer.kernel[...]))
    return x if layer.bias is None else x + torch.tensor(np.asarray(layer.bias[...]))


def torch_patch_attention(block, x, heads):
    """(B, C, h, w): norm, tokens from patches, attention, GEGLU, a token's parts as its patch's positions, added."""
    functional, p = torch.nn.functional, block.patch
    batch, _, height, width = x.shape

    def norm(layer, x):
        scale, bias = (torch.tensor(np.asarray(part[...])) for part in (layer.scale, layer.bias))
        return functional.layer_norm(x, x.shape[-1:], scale, bias, 1e-5)

    def split(x):  # (B, n, heads * d) -> (B, heads, n, d)
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    # As diffusers' PatchEmbed has it.
    tokens = conv2d(block.proj_in, group_norm(block.norm, x), stride=p).flatten(2).transpose(1, 2)
    tokens = tokens + torch.tensor(np.asarray(block.pos_embed[...]))
    normed = norm(block.norm1, tokens)
    query, key, value = (
        split(torch_linear(layer, normed)) for layer in (block.to_q, block.to_k, block.to_v)
    )
    weights = torch.softmax(query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5, -1)
    attended = (weights @ value).transpose(1, 2).flatten(2)
    tokens = tokens + torch_linear(block.to_out, attended)
    hidden, gate = torch_linear(block.ff_in, norm(block.norm2, tokens)).chunk(2, -1)
    tokens = tokens + torch_linear(block.ff_out, hidden * functional.gelu(gate))
    parts = tokens.reshape(batch, height // p, width // p, p, p, -1)
    return x + torch.einsum("nhwpqc->nchpwq", torch_linear(block.proj_out, parts)).reshape(x.shape)


def test_patch_attention_equals_torch():
    """With the published eight heads, narrower ones, and weights at which the attention picks among tokens."""
    sizes = {"heads": 8, "head_features": 8}
    block = randomised(PatchAttention(6, 8, 2, **sizes, rngs=nnx.Rngs(0)))
    inputs = np.random.default_rng(0).standard_normal((2, 8, 8, 6)).astype(np.float32)
    expected = torch_patch_attention(block, to_torch(inputs), sizes["heads"])
    close(jax.jit(block)(inputs), expected)
    assert PatchAttention.__init__.__kwdefaults__["heads"] == 8
    assert PatchAttention.__init__.__kwdefaults__["head_features"] == 128
    assert block.norm.epsilon == 1e-6


def test_patches_start_where_those_of_diffusers_do():
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    block = PatchAttention(6, 12, 2, heads=2, head_features=32, rngs=nnx.Rngs(0))
    theirs = embeddings.PatchEmbed(12, 12, 2, 6, 64, interpolation_scale=1).pos_embed
    np.testing.assert_allclose(block.pos_embed[...], theirs, atol=1e-6)


def test_attention_moves_information_between_patches():
    attention = {"kind": "fan_sa", "heads": 2, "head_features": 32}
    block = ExpressionEncoder(**SIZES, **attention, latent=12, rngs=nnx.Rngs(0)).sa2
    block.proj_out.kernel = nnx.Param(0.1 * jnp.ones_like(block.proj_out.kernel[...]))
    inputs = jax.random.normal(jax.random.key(0), (1, 8, 8, 32))
    gradient = jax.jit(jax.grad(lambda x: jnp.sin(block(x)[0, 0, 0]).sum()))(inputs)
    assert np.all(np.abs(gradient).max(axis=-1) > 0)


def test_dropout_acts_only_with_a_key_and_keeps_the_mean():
    hourglass = Hourglass(8, 1, dropout=0.5, pooling="max", **BUILD)
    inputs = jax.random.normal(jax.random.key(0), (2, 16, 16, 8))
    run = jax.jit(jax.vmap(hourglass, (None, 0)))
    plain = jax.jit(hourglass)(inputs)
    dropped = run(inputs, jax.random.split(jax.random.key(1), 200))
    assert np.abs(dropped[0] - plain).max() > 0.1
    np.testing.assert_allclose(dropped.mean(axis=0), plain, atol=1.0)
    np.testing.assert_allclose(dropped.mean(), plain.mean(), atol=0.02)


def test_a_key_reaches_the_hourglass(monkeypatch):
    given = []
    monkeypatch.setattr(
        Hourglass, "__call__", lambda self, inputs, key=None: given.append(key) or inputs
    )
    network = Network(lambda rngs: ExpressionEncoder(**SIZES, latent=6, rngs=rngs))

    def run(params, image, key):
        encoder = network.bind(params)
        return encoder(image, key), encoder.heat_maps(image, key), encoder(image)

    jax.eval_shape(run, network.abstract, jnp.zeros((1, 32, 32, 3)), jax.random.key(0))
    assert [key is not None for key in given] == [True, True, False]


def test_sizes_that_cannot_work():
    with pytest.raises(ValueError, match="at least 64"):
        ExpressionEncoder(image_size=32, depth=4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="transformer"):
        ExpressionEncoder(kind="transformer", rngs=nnx.Rngs(0))
