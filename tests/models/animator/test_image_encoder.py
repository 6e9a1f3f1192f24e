"""CLIP's image encoder against transformers, and its size."""

import jax
import numpy as np
import pytest
import torch
import transformers

from dexportrait_jax.models.animator.image_encoder import DEVIATION, MEAN, ImageEncoder
from dexportrait_jax.state import Network, parameter_count
from tests.published import parameters_from_torch, randomise, relative_error

SMALL = {
    "image_size": 32,
    "patch_size": 8,
    "features": 32,
    "layers": 2,
    "heads": 4,
    "projection": 24,
}


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_equals_transformers(activation):
    published = randomise(
        transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(
                image_size=32,
                patch_size=8,
                hidden_size=32,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                projection_dim=24,
                hidden_act=activation,
            )
        )
    )
    state = {k: v for k, v in published.state_dict().items() if not k.endswith("position_ids")}
    network = Network(lambda rngs: ImageEncoder(**SMALL, activation=activation, rngs=rngs))
    params = parameters_from_torch(network.abstract, state)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    normalised = ((images + 1) / 2 - np.array(MEAN)) / np.array(DEVIATION)
    with torch.no_grad():
        expected = published(torch.tensor(normalised).permute(0, 3, 1, 2).float()).image_embeds
    ours = jax.jit(lambda p, x: network.bind(p)(x))(params, images)
    assert relative_error(ours, expected) <= 1e-4


def test_full_size():
    abstract = Network(lambda rngs: ImageEncoder(rngs=rngs)).abstract
    assert parameter_count(abstract) == pytest.approx(303.97e6, rel=0.001)


def test_wrong_image_size():
    network = Network(lambda rngs: ImageEncoder(**SMALL, rngs=rngs))
    with pytest.raises(ValueError, match="takes 32x32"):
        jax.eval_shape(lambda p: network.bind(p)(np.zeros((1, 30, 32, 3))), network.abstract)
