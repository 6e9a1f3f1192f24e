"""What is computed twice changes nothing but the work: gradients of every network that `config.remat` reaches."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dexportrait_jax import config as configs
from dexportrait_jax import flops
from dexportrait_jax.errors import UserError
from dexportrait_jax.models.animator.temporal import TemporalModules
from dexportrait_jax.models.animator.transformer import BlockInputs, TransformerOptions
from dexportrait_jax.models.animator.unet import UNet
from dexportrait_jax.models.convolution import convolution_backend
from dexportrait_jax.models.motion.appearance import AppearanceEncoder
from dexportrait_jax.models.motion.discriminator import Discriminator
from dexportrait_jax.models.motion.generator import Generator
from dexportrait_jax.models.rematerialisation import Remat
from dexportrait_jax.state import Network
from dexportrait_jax.tasks import build_networks
from dexportrait_jax.workload import step_work
from tests.published import random_like

REMATS = get_args(Remat)


def noise(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def appearance(remat):
    sizes = {"widths": (4, 8), "volume_depth": 2, "volume_channels": 4, "blocks": 1}
    network = Network(lambda rngs: AppearanceEncoder(**sizes, remat=remat, rngs=rngs))
    return network, lambda p: jnp.mean(network.bind(p)(noise(1, 1, 8, 8, 3)) ** 2)


def generator(remat):
    sizes = {
        "volume_shape": (2, 8, 8),
        "volume_channels": 4,
        "expression_features": 3,
        "expression_mixing": 0.1,
        "appearance_widths": (4, 4),
        "appearance_strides": (2,),
        "down_channels": (8, 8),
        "up_channels": (8,),
    }
    network = Network(lambda rngs: Generator(**sizes, remat=remat, rngs=rngs))
    inputs = noise(1, 1, 2, 8, 8, 4), noise(2, 2, 2, 8, 8, 4), noise(3, 2, 3)
    return network, lambda p: jnp.mean(network.bind(p)(*inputs) ** 2)


def discriminator(remat):
    """With the penalty on its gradient, whose gradient goes twice through what is computed again."""
    sizes = {"image_size": 16, "widths": (4, 8, 8)}
    network = Network(lambda rngs: Discriminator(**sizes, remat=remat, rngs=rngs))
    image = noise(1, 2, 16, 16, 3)

    def loss(params):
        judge = network.bind(params)
        slope = jax.grad(lambda image: jnp.sum(judge(image)))(image)
        return jnp.mean(jax.nn.softplus(judge(image))) + jnp.sum(slope**2)

    return network, loss


def temporal(remat):
    sizes = {"block_channels": (8, 8), "layers_per_block": 1, "groups": 4}
    options = TransformerOptions(heads=2, cross_attention_features=None)
    unet = Network(lambda rngs: UNet(**sizes, options=options, remat=remat, rngs=rngs))
    modules = Network(lambda rngs: TemporalModules(**sizes, heads=2, rngs=rngs))
    frozen = unet.bind(random_like(unet.abstract))
    latents, timesteps = noise(1, 2, 4, 4, 4), jnp.array([10.0, 10.0])

    def loss(params):
        bound = modules.bind(params)
        result, _ = frozen.forward(latents, timesteps, BlockInputs(), temporal=bound, frames=2)
        return jnp.mean(result**2)

    return modules, loss


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# Two minutes; a step of the video stage with `remat=blocks` stands against one without in test_sharded_steps.py.
TEMPORAL = pytest.param(temporal, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize("made", [appearance, slow(generator), slow(discriminator), TEMPORAL])
def test_gradients_are_the_same(made):
    found = {remat: made(remat) for remat in REMATS}
    params = random_like(found["none"][0].abstract)
    gradients = {
        remat: jax.tree.leaves(jax.jit(jax.grad(loss))(params))
        for remat, (_, loss) in found.items()
    }
    for remat in REMATS[1:]:
        for ours, expected in zip(gradients[remat], gradients["none"], strict=True):
            size = np.abs(expected).max()
            np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4 * size + 1e-7)
    assert all(np.abs(leaf).max() > 0 for leaf in gradients["none"])

    with convolution_backend("xla"):
        again = {remat: flops.count(jax.grad(loss), params) for remat, (_, loss) in found.items()}
    assert again["none"].recomputed == 0
    assert again["blocks"].recomputed > again["products"].recomputed
    # Convolutions and projections are kept by "products", not by "blocks".
    model = again["none"].macs
    assert again["products"].recomputed < 0.12 * model < again["blocks"].recomputed


@pytest.mark.parametrize(
    ("stage", "scopes"),
    [
        slow("motion", ("appearance", "generator", "discriminator")),
        slow("animator_image", ("reference", "denoiser")),
        slow("animator_video", ("denoiser", "temporal")),
    ],
)
def test_a_config_reaches_its_networks(stage, scopes):
    address = f"configs/{stage}.py:tiny"
    events = {"joint", "adversarial"} if stage == "motion" else set()
    kept, again = (
        step_work(configs.load_config(address, [f"remat={remat}"]), events)
        for remat in ("none", "blocks")
    )
    assert kept.recomputed == 0
    # Of a frozen network, the end of a unit that nobody asks for is still charged.
    assert again.macs - again.recomputed == pytest.approx(kept.macs, rel=3e-3)
    for scope in scopes:
        assert again.by_scope[scope] > 1.1 * kept.by_scope[scope], scope


@pytest.mark.parametrize("stage", ["motion", "animator_image"])
def test_an_unknown_name_is_an_error(stage):
    config = configs.load_config(f"configs/{stage}.py:tiny", ["remat=block"])
    with pytest.raises(UserError, match="config.remat is one of none, products, blocks"):
        build_networks(config)


def test_an_export_without_the_key_still_loads():
    config = configs.load_config("configs/motion.py:tiny")
    with config.unlocked():
        del config["remat"]
    assert build_networks(config).keys() >= {"generator"}
