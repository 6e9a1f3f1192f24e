"""Work of the `full` animator against method.md 4.6, from shapes alone: nothing is allocated."""

import jax
import jax.numpy as jnp
import pytest

from dexportrait_jax import config as configs
from dexportrait_jax.flops import count
from dexportrait_jax.models.animator.conditioning import Conditions
from dexportrait_jax.models.animator.transformer import ExpressionTransformer, TransformerOptions
from dexportrait_jax.models.animator.unet import UNet
from dexportrait_jax.state import Network, parameter_count
from dexportrait_jax.tasks import build_networks
from dexportrait_jax.workload import forward_work
from tests.benchmarks.animator import sampling_work
from tests.test_workload import GIGA, gmacs, shape

LATENT, POSE, EXPRESSION = shape(1, 64, 64, 4), shape(1, 3, 4), shape(1, 512)
SLOW = pytest.mark.slow  # tracing takes seconds each
BARE = ["model.denoiser.raymap=none", "model.denoiser.expression_injector=none"]


def networks(*overrides, stage="animator_image"):
    return build_networks(configs.load_config(f"configs/{stage}.py:full", list(overrides)))


def one_token(mode):
    return shape(1, 1, 768) if mode == "clip_image" else None


def denoiser_work(mode, *overrides, poses=True):
    """(GMAC of a frame and step with the reference's features, million parameters)."""
    found = networks(f"model.attn2.attn2={mode}", *overrides)
    context, denoiser = one_token(mode), found["denoiser"]

    def reference(params, latent, context, pose):
        return found["reference"].bind(params)(latent, context, pose)

    bank = jax.eval_shape(reference, found["reference"].abstract, LATENT, context, POSE)

    def denoise(params, latent, bank, context, pose, expression):
        conditions = Conditions(
            reference=bank,
            source_pose=pose if poses else None,
            driving_pose=pose if poses else None,
            expression=expression,
            context=context,
        )
        return denoiser.bind(params)(latent, jnp.zeros(1), conditions)

    work = count(denoise, denoiser.abstract, LATENT, bank, context, POSE, EXPRESSION)
    return work.macs / GIGA, parameter_count(denoiser.abstract) / 1e6


@pytest.mark.parametrize(
    ("mode", "whole"), [("none", 386), pytest.param("clip_image", 398, marks=SLOW)]
)
def test_reference(mode, whole):
    """What it gives is read before the last block's attention; what comes behind is not computed."""
    found = networks(f"model.attn2.attn2={mode}")["reference"]

    def bank(params, latent, context):
        return found.bind(params)(latent, context)

    work = count(bank, found.abstract, LATENT, one_token(mode)).macs
    tokens, features = 64 * 64, 320
    behind = 17 * tokens * features**2 + 2 * tokens**2 * features + 9 * tokens * features * 4
    if mode == "clip_image":
        behind += tokens * (2 * features**2 + 2 * features) + 2 * 768 * features
    assert (work + behind) / GIGA == pytest.approx(whole, rel=5e-3)


@pytest.mark.parametrize(
    ("mode", "overrides", "gmac", "parameters"),
    [
        pytest.param("clip_image", [*BARE, "model.denoiser.warp_kernel=0"], 472, 859.5, marks=SLOW),
        pytest.param("clip_image", [], 544, 996.3, marks=SLOW),
        ("none", [], 531, 952.3),
        pytest.param("none", ["model.denoiser.warp_kernel=0"], 473, 840.8, marks=SLOW),
    ],
)
def test_denoiser(mode, overrides, gmac, parameters):
    found, millions = denoiser_work(mode, *overrides)
    assert found == pytest.approx(gmac, rel=3e-2)
    assert millions == pytest.approx(parameters, rel=5e-3)


@pytest.mark.parametrize(("tokens", "gmac"), [(77, 402), pytest.param(1, 398, marks=SLOW)])
def test_stable_diffusion(tokens, gmac):
    network = Network(lambda rngs: UNet(rngs=rngs))
    found = gmacs(network, LATENT, shape(1), shape(1, tokens, 768))
    assert found == pytest.approx(gmac, rel=3e-2)
    assert found == pytest.approx(gmac, abs=1)  # the two rows are 1 % apart


def test_injector_of_xnemo():
    """Its 21 places by grid; that the denoiser has them all, its parameters say (test_denoiser.py)."""
    options = TransformerOptions(expression_features=16, expression_injector="xnemo")
    found, places = 0.0, {(64, 320): 5, (32, 640): 5, (16, 1280): 5, (8, 1280): 6}
    for (height, features), times in places.items():
        network = Network(
            lambda rngs, features=features: ExpressionTransformer(features, options, rngs=rngs)
        )
        found += times * gmacs(network, shape(1, height, height, features), shape(1, 32, 16))
    assert found == pytest.approx(126, rel=3e-2)


@SLOW
def test_targets_share_what_is_made_of_their_source():
    """The reference UNet, and the keys and values of its features, once for one target and for four."""
    sizes = ["model.unet.block_channels=(16, 32)", "model.pose.depths=(1, 1, 1, 1)"]
    config = configs.load_config("configs/animator_image.py:tiny", sizes)
    one, four = (forward_work(config, targets=targets).by_scope for targets in (1, 4))
    assert four["reference"] == one["reference"] > 0
    # Three blocks on the 16x16 grid, one on 8x8, each with keys and values.
    keys_values = 2 * (3 * 16**2 * 16**2 + 8**2 * 32**2)
    assert four["denoiser"] == 4 * one["denoiser"] - 3 * keys_values
    for name in ("autoencoder", "pose"):
        assert four[name] == pytest.approx(one[name] * 5 / 2)
    assert four["expression"] == 4 * one["expression"]


@pytest.mark.slow
def test_sampling_is_spared():
    """A guided clip of 35 steps against three branches in every step with the reference computed again.

    0.4 is met against a sampler without a bank, which runs the reference with every pass of every frame. Against one
    that runs it once a step for all frames and branches it is not: 74 of 105 passes alone are 0.70.
    """
    found = sampling_work()
    assert (found["passes"], found["frames"]) == (74, 24)
    ratios = {name: naive["ratio"] for name, naive in found["naive"].items()}
    assert ratios["reference with every pass"] <= 0.4
    assert ratios["reference with the passes that read it"] == pytest.approx(0.45, abs=0.01)
    assert ratios["reference once a step"] == pytest.approx(0.61, abs=0.01)
    work = found["giga_macs_a_frame_and_pass"]
    assert work["naive"] > work["full"] > work["null"]


@SLOW
def test_temporal_modules():
    found = networks(stage="animator_video")
    frames = 24

    def denoise(params, latents, temporal):
        modules = None if temporal is None else found["temporal"].bind(temporal)
        return found["denoiser"].bind(params)(
            latents, jnp.zeros(frames), Conditions(), temporal=modules, frames=frames
        )

    latents = shape(frames, 64, 64, 4)
    with_and_without = [
        count(denoise, found["denoiser"].abstract, latents, temporal).macs
        for temporal in (found["temporal"].abstract, None)
    ]
    work = (with_and_without[0] - with_and_without[1]) / frames / GIGA
    assert work == pytest.approx(153, rel=3e-2)


def test_autoencoder():
    autoencoder = networks()["autoencoder"]
    images = shape(1, 512, 512, 3)
    assert gmacs(autoencoder, images, part=lambda vae: vae.encode) == pytest.approx(558, rel=3e-2)
    assert gmacs(autoencoder, LATENT, part=lambda vae: vae.decode) == pytest.approx(1257, rel=3e-2)
