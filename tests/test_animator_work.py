"""Work of the `full` animator against method.md 4.6, from shapes alone: nothing is allocated."""

import jax
import jax.numpy as jnp
import pytest

from dexportrait_jax import config as configs
from dexportrait_jax.flops import count
from dexportrait_jax.models.animator.conditioning import Conditions
from dexportrait_jax.state import parameter_count
from dexportrait_jax.tasks import build_networks
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
