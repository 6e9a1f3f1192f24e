"""Every network at its published size, in bfloat16, by shape evaluation (method.md 3.1)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dexportrait_jax import geometry
from dexportrait_jax.models.layers import convolution_backend
from dexportrait_jax.models.motion.appearance import AppearanceEncoder
from dexportrait_jax.models.motion.discriminator import Discriminator
from dexportrait_jax.models.motion.expression import ExpressionEncoder
from dexportrait_jax.models.motion.generator import Generator
from dexportrait_jax.models.motion.pose import PoseEncoder
from dexportrait_jax.state import Network

TINY = {
    "appearance": {"widths": (8, 8, 16), "volume_depth": 4, "volume_channels": 8, "blocks": 1},
    "pose": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
    "expression": {"image_size": 32, "stem": 8, "widths": (8, 8, 16), "depth": 2, "latent": 8},
    "generator": {
        "volume_shape": (4, 8, 8),
        "volume_channels": 8,
        "expression_features": 8,
        "appearance_widths": (8, 8, 8, 8, 8),
        "down_channels": (16, 16),
        "up_channels": (16, 8, 8),
    },
    "discriminator": {"image_size": 32, "widths": (8, 8, 8, 8)},
}
CLASSES = {
    "appearance": AppearanceEncoder,
    "pose": PoseEncoder,
    "expression": ExpressionEncoder,
    "generator": Generator,
    "discriminator": Discriminator,
}


def networks(sizes, dtype):
    return {
        name: Network(
            lambda rngs, make=make, name=name: make(**sizes.get(name, {}), dtype=dtype, rngs=rngs)
        )
        for name, make in CLASSES.items()
    }


def motion(nets, params, image, crop):
    """One source and two targets through all networks."""
    run = {name: net.bind(params[name]) for name, net in nets.items()}
    volume = run["appearance"](image[:1])
    pose, _ = run["pose"](image)
    warped = geometry.warp(volume, jnp.repeat(pose[:1], 2, axis=0), pose[1:])
    expression = run["expression"](crop[1:])
    output = run["generator"](volume, warped, expression)
    return volume, pose, expression, output, run["discriminator"](output)


@pytest.mark.parametrize("backend", ["xla", "matmul"])
def test_published_shapes(backend):
    nets = networks({}, jnp.bfloat16)
    params = {name: net.abstract for name, net in nets.items()}
    image = jax.ShapeDtypeStruct((3, 256, 256, 3), jnp.float32)
    crop = jax.ShapeDtypeStruct((3, 224, 224, 3), jnp.float32)
    with convolution_backend(backend):
        outputs = jax.eval_shape(lambda *a: motion(nets, *a), params, image, crop)
    volume, pose, expression, output, logits = outputs
    assert (volume.shape, volume.dtype) == ((1, 16, 64, 64, 32), jnp.bfloat16)
    assert (pose.shape, pose.dtype) == ((3, 3, 4), jnp.float32)
    assert (expression.shape, expression.dtype) == ((2, 512), jnp.float32)
    assert (output.shape, output.dtype) == ((2, 256, 256, 3), jnp.float32)
    assert (logits.shape, logits.dtype) == ((2,), jnp.float32)


@pytest.mark.slow
def test_bfloat16_is_near_float32():
    """The tiny networks are the same code: only numbers in the constructors differ."""
    random = np.random.default_rng(0)
    image = random.uniform(-1, 1, (3, 32, 32, 3)).astype(np.float32)
    results = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        nets = networks(TINY, dtype)
        params = {name: net.init(jax.random.key(0)) for name, net in nets.items()}
        results[dtype] = jax.jit(lambda *a, nets=nets: motion(nets, *a))(params, image, image)
    for wide, narrow in zip(results[jnp.float32], results[jnp.bfloat16], strict=True):
        assert wide.shape == narrow.shape
        error = np.abs(np.asarray(narrow, np.float32) - wide).max() / np.abs(wide).max()
        assert error < 0.1
    assert results[jnp.float32][3].shape == (2, 32, 32, 3)
