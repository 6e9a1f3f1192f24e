"""Small PyTorch statements that several tests compare with."""

import jax
import numpy as np
import torch
from flax import nnx


def to_torch(array):
    """(B, *space, C) -> (B, C, *space)."""
    return torch.tensor(np.moveaxis(np.asarray(array), -1, 1))


def from_torch(tensor):
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def close(actual, tensor, tolerance=1e-4):
    """Equal relative to the largest value."""
    expected = from_torch(tensor) if tensor.ndim > 2 else tensor.detach().numpy()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, atol=tolerance * scale, rtol=0)


def randomised(module):
    """The module with every parameter random, so that none hides behind its zeros or ones."""
    random = np.random.default_rng(0)
    state = nnx.state(module, nnx.Param)
    state = jax.tree.map(lambda p: p + 0.3 * random.standard_normal(p.shape, np.float32), state)
    nnx.update(module, state)
    return module


def group_norm(layer, x):
    scale, bias = (torch.tensor(np.asarray(p[...])) for p in (layer.scale, layer.bias))
    return torch.nn.functional.group_norm(x, layer.groups, scale, bias, layer.epsilon)


def conv2d(layer, x, **options):
    kernel = torch.tensor(np.asarray(layer.kernel[...])).permute(3, 2, 0, 1)
    bias = None if layer.bias is None else torch.tensor(np.asarray(layer.bias[...]))
    return torch.nn.functional.conv2d(x, kernel, bias, **options)
