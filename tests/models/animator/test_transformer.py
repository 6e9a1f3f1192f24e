"""Both expression injectors: what they add, where, and that they start as nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dexportrait_jax.models.animator.transformer import (
    BlockInputs,
    ExpressionTransformer,
    TransformerBlock,
    TransformerOptions,
)
from dexportrait_jax.state import Network
from tests.published import random_like

FEATURES = 16


def in_block(block, hidden, tokens):
    """Attention to itself, then to the tokens, then the feed-forward, each added to what is there."""
    hidden = hidden + block.attn1(block.norm1(hidden))
    added = block.attn_expression(block.norm_expression(hidden), tokens)
    hidden = hidden + added
    return hidden + block.ff(block.norm3(hidden)), added


def separate(module, hidden, tokens):
    """Two attentions to the tokens and a feed-forward, inside one residual."""
    inner = module.proj_in(module.norm(hidden))
    for place in (0, 1):
        inner = inner + module.attentions[place](module.norms[place](inner), tokens)
    added = module.proj_out(inner + module.ff(module.norm3(inner)))
    return hidden + added, added


PLACES = {
    "before_feed_forward": ("text", "expression", "feed_forward"),
    "after_feed_forward": ("text", "feed_forward", "expression"),
    "before_text": ("expression", "text", "feed_forward"),
}


@pytest.mark.parametrize("place", PLACES)
def test_place_of_the_expression_attention(place):
    """The block's own layers, each added to what is there, in that order; and in no other."""
    options = TransformerOptions(
        heads=2, cross_attention_features=6, expression_features=8, expression_place=place
    )
    network = Network(lambda rngs: TransformerBlock(FEATURES, options, rngs=rngs))
    rng = np.random.default_rng(0)
    hidden, text, tokens = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((2, 3, 3, FEATURES), (2, 5, 6), (2, 4, 8))
    )

    @jax.jit
    def run(params):
        block = network.bind(params)
        layers = {
            "text": lambda x: block.attn2(block.norm2(x), text),
            "expression": lambda x: block.attn_expression(block.norm_expression(x), tokens),
            "feed_forward": lambda x: block.ff(block.norm3(x)),
        }
        flat = hidden.reshape(2, 9, FEATURES)
        flat = flat + block.attn1(block.norm1(flat))
        by_hand = {}
        for name, order in PLACES.items():
            by_hand[name] = flat
            for layer in order:
                by_hand[name] = by_hand[name] + layers[layer](by_hand[name])
        ours = block(hidden, BlockInputs(context=text, expression=tokens))[0]
        return ours.reshape(flat.shape), by_hand

    ours, by_hand = run(random_like(network.abstract))
    for name, wanted in by_hand.items():
        if name == place:
            np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)
        else:
            assert np.abs(ours - wanted).max(axis=(1, 2)).min() > 1e-2, name


@pytest.mark.parametrize("injector", ["in_block", "xnemo"])
def test_injector_adds_what_it_reads_off_the_tokens(injector):
    options = TransformerOptions(
        heads=2,
        cross_attention_features=None,
        expression_features=8,
        expression_injector=injector,
    )
    if injector == "in_block":
        network = Network(lambda rngs: TransformerBlock(FEATURES, options, rngs=rngs))
        by_hand, output = in_block, "attn_expression"
    else:
        network = Network(
            lambda rngs: ExpressionTransformer(FEATURES, options, groups=4, rngs=rngs)
        )
        by_hand, output = separate, "proj_out"
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 3, 3, FEATURES)), jnp.float32)
    tokens = jnp.asarray(rng.normal(size=(2, 4, 8)), jnp.float32)

    @jax.jit
    def run(params, tokens):
        module = network.bind(params)
        if injector == "in_block":
            ours = module(hidden, BlockInputs(expression=tokens))[0]
        else:
            ours = module(hidden, tokens)
        wanted, added = by_hand(module, hidden.reshape(2, 9, FEATURES), tokens)
        return ours.reshape(2, 9, FEATURES), wanted, added

    params = random_like(network.abstract)
    ours, wanted, added = run(params, tokens)
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)
    assert np.abs(added).max(axis=(1, 2)).min() > 0.1
    other = run(params, -tokens)[0]
    assert np.abs(other - ours).max(axis=(1, 2)).min() > 1e-2

    # Fresh, the layer that ends the branch is zero.
    fresh = network.init(jax.random.key(0))
    leaves = jax.tree.leaves(
        fresh["attn_expression"]["to_out"] if injector == "in_block" else fresh[output]
    )
    assert leaves and not any(np.any(leaf) for leaf in leaves)
