"""The decoder's levels, its options, and the generator's source-major batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dexportrait_jax.models.motion.decoder import (
    Decoder,
    ExpressionMixing,
    StyledConv,
)
from dexportrait_jax.models.motion.generator import Generator
from dexportrait_jax.state import Network

SIZES = {
    "in_features": 8,
    "style_features": 6,
    "down_channels": (8, 12),
    "up_channels": (12, 8),
    "expression_features": 3,
}
GENERATOR = {
    "volume_shape": (4, 8, 8),
    "volume_channels": 4,
    "expression_features": 6,
    "appearance_widths": (4, 4, 4, 4, 4),
    "down_channels": (8, 12),
    "up_channels": (12, 8),
}


def test_paper_rgb_channels_are_the_default():
    decoder = Network(lambda rngs: Decoder(rngs=rngs)).abstract
    widths = [decoder["to_rgbs"][str(n)]["bias"].shape[0] for n in range(6)]
    assert widths == [96, 48, 24, 12, 6, 3]


@pytest.mark.parametrize(
    "options",
    [{}, {"injection": "adain"}, {"mapping_features": 5}, {"expression_mixing": 0.5}],
)
def test_every_option_reads_features_and_style(options):
    decoder = Decoder(**SIZES, **options, rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    features = random.standard_normal((2, 4, 4, 8)).astype(np.float32)
    style = random.standard_normal((2, 6)).astype(np.float32)
    expression = random.standard_normal((2, 3)).astype(np.float32)

    def outputs(features, style):
        return decoder(features, style, expression), jax.grad(
            lambda f, s: jnp.sum(decoder(f, s, expression) ** 2), (0, 1)
        )(features, style)

    image, gradients = jax.jit(outputs)(features, style)
    assert image.shape == (2, 16, 16, 3)
    assert image.dtype == jnp.float32
    for gradient in gradients:
        assert (
            np.all(np.isfinite(gradient))
            and np.abs(gradient).max(axis=tuple(range(1, gradient.ndim))).min() > 0
        )


def test_expression_mixing_by_its_formula():
    mixing = ExpressionMixing(3, 5, 0.25, dtype=jnp.float32)
    random = np.random.default_rng(0)
    inputs = random.standard_normal((2, 4, 4, 5)).astype(np.float32)
    latent = random.standard_normal((2, 3)).astype(np.float32)
    np.testing.assert_array_equal(mixing(inputs, latent), inputs)  # nothing is mixed at the start
    matrices = random.standard_normal((3, 5, 5)).astype(np.float32)
    mixing.matrices[...] = jnp.asarray(matrices)
    wanted = inputs.copy()
    for sample in range(2):
        mixed = sum(latent[sample, k] * matrices[k] for k in range(3))
        for row in range(4):
            for column in range(4):
                wanted[sample, row, column] += 0.25 * mixed.T @ inputs[sample, row, column]
    np.testing.assert_allclose(mixing(inputs, latent), wanted, rtol=1e-5, atol=1e-5)


def test_mixing_stands_at_the_entry_and_at_every_level_of_the_way_up():
    """Each place alone lets the latent into the picture; without the option it has no way but the style."""
    random = np.random.default_rng(0)
    features = random.standard_normal((1, 4, 4, 8)).astype(np.float32)
    style = random.standard_normal((1, 6)).astype(np.float32)
    latents = random.standard_normal((2, 1, 3)).astype(np.float32)
    plain = Decoder(**SIZES, rngs=nnx.Rngs(0))
    assert not plain.mixings
    np.testing.assert_array_equal(*(plain(features, style, latent) for latent in latents))
    widths = [8, 12, 8]
    for place, width in enumerate(widths):
        decoder = Decoder(**SIZES, expression_mixing=0.5, rngs=nnx.Rngs(0))
        assert [mixing.matrices.shape[1] for mixing in decoder.mixings] == widths
        decoder.mixings[place].matrices[...] = jnp.ones((3, width, width))
        first, second = (decoder(features, style, latent) for latent in latents)
        assert np.abs(first - second).max() > 1e-3


def test_adain_sets_mean_and_deviation():
    layer = StyledConv(3, 4, 5, injection="adain", rngs=nnx.Rngs(0)).conv
    random = np.random.default_rng(0)
    inputs = random.standard_normal((2, 8, 8, 3)).astype(np.float32)
    style = random.standard_normal((2, 5)).astype(np.float32)
    output = jax.jit(layer)(inputs, style)
    scale, shift = np.split(np.asarray(layer.modulation(style)), 2, axis=-1)
    np.testing.assert_allclose(output.mean((1, 2)), shift, atol=1e-4)
    np.testing.assert_allclose(output.std((1, 2)), np.abs(1 + scale), rtol=1e-3)


def test_mistaken_options():
    with pytest.raises(ValueError, match="noise"):
        Decoder(**SIZES, injection="noise", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="4 levels"):
        Decoder(**SIZES, rgb_channels=(6, 3), rngs=nnx.Rngs(0))


def test_one_source_serves_its_own_targets():
    network = Network(lambda rngs: Generator(**GENERATOR, rngs=rngs))
    params = network.init(jax.random.key(0))
    random = np.random.default_rng(0)
    volume = random.standard_normal((2, 4, 8, 8, 4)).astype(np.float32)
    warped = random.standard_normal((6, 4, 8, 8, 4)).astype(np.float32)
    expression = random.standard_normal((6, 6)).astype(np.float32)
    run = jax.jit(lambda params, *inputs: network.bind(params)(*inputs))
    together = run(params, volume, warped, expression)
    assert together.shape == (6, 16, 16, 3)
    apart = run(params, volume.repeat(3, axis=0), warped, expression)
    np.testing.assert_allclose(together, apart, atol=1e-5)
    with pytest.raises(ValueError, match="4 outputs"):
        network.bind(params)(volume[[0, 1, 1]], warped[:4], expression[:4])
