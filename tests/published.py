"""PyTorch weights as parameter trees, by the generic key rule, for comparisons with published code."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

SUFFIXES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def parameters_from_torch(abstract: dict, state_dict: dict) -> dict:
    """A tree like ``abstract`` filled from a PyTorch state dict; every key must be used."""
    left = set(state_dict)

    def load(path, leaf):
        names = [entry.key for entry in path]
        key = ".".join([*names[:-1], SUFFIXES.get(names[-1], names[-1])])
        value = state_dict[key].detach().double().numpy()
        left.discard(key)
        if names[-1] == "kernel":
            value = np.moveaxis(value, (1, 0), (-2, -1))
        assert value.shape == leaf.shape, (key, value.shape, leaf.shape)
        return jnp.asarray(value, jnp.float32)

    tree = jax.tree_util.tree_map_with_path(load, abstract)
    assert not left, f"unused keys: {sorted(left)}"
    return tree


def published_unet(block_channels, layers, *, heads, context, groups, **settings):
    """diffusers' UNet of SD1.5's structure: text attention at every level but the last."""
    import diffusers

    attentive = len(block_channels) - 1
    return diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=block_channels,
        down_block_types=("CrossAttnDownBlock2D",) * attentive + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * attentive,
        layers_per_block=layers,
        cross_attention_dim=context,
        attention_head_dim=heads,  # their name for the number of heads
        norm_num_groups=groups,
        **settings,
    )


def randomise(module, seed: int = 0):
    """Give a PyTorch module weights far from any special initial value, and return it in eval mode."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.5 / max(parameter[0].numel(), 1) ** 0.5 if parameter.ndim > 1 else 0.2
            base = 1.0 if parameter.ndim == 1 else 0.0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(base + scale * noise)
    return module.eval()


def random_like(abstract: dict, seed: int = 0) -> dict:
    """Random parameters for a tree of shapes, none of them at a special value."""
    generator = np.random.default_rng(seed)

    def draw(leaf):
        fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 25.0
        return jnp.asarray(generator.normal(size=leaf.shape) / np.sqrt(fan_in), jnp.float32)

    return jax.tree.map(draw, abstract)


def relative_error(ours, theirs) -> float:
    """Largest difference over the largest magnitude of the expected values."""
    theirs = np.asarray(theirs)
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())
