"""The layers in which the branches end that an animator adds to SD1.5: all that keeps them from a fresh network."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np

from dexportrait_jax.weights.names import flatten

# Branch, and the layer inside it that adds to the hidden state; the branch itself may be that layer.
ENDS = {
    "warp_projection": "warp_projection",
    "attn_expression": "to_out",
    "expression_modules": "proj_out",
    "motion_modules": "proj_out",
}


def assert_nothing_is_added(params: dict[str, Any], layers: dict[str, int]) -> None:
    """Kernels and biases of the branches' last layers are 0, not only small, and there are so many layers."""
    found = collections.Counter()
    for path, leaf in flatten(params):
        branch = next((name for name in ENDS if name in path), None)
        if branch is not None and ENDS[branch] in path:
            assert np.all(np.asarray(leaf) == 0), path
            found[branch] += path[-1] == "kernel"
    assert found == layers


def assert_rays_are_not_read(params: dict[str, Any], latent_channels: int, rays: int) -> None:
    """The input channels behind the latents have weights of 0, those of the latents have not."""
    kernel = np.asarray(params["conv_in"]["kernel"])
    assert kernel.shape[2] == latent_channels + rays
    assert np.all(kernel[:, :, latent_channels:] == 0)
    assert np.all(np.any(kernel[:, :, :latent_channels], (0, 1, 3)))
