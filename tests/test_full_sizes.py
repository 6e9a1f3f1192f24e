"""Parameter counts of the `full` configs, by shape evaluation, against method.md's."""

import pytest

from dexportrait_jax import config as configs
from dexportrait_jax.state import parameter_count
from dexportrait_jax.tasks import build_networks

MILLION = 1e6


def counts(address, *overrides):
    networks = build_networks(configs.load_config(address, list(overrides)))
    return {name: parameter_count(network.abstract) / MILLION for name, network in networks.items()}


def test_motion():
    found = counts("configs/motion.py:full")
    assert found["appearance"] == pytest.approx(0.836, rel=5e-3)
    assert found["pose"] == pytest.approx(27.87 + 0.155, rel=5e-3)
    assert found["expression"] == pytest.approx(6.65, rel=5e-3)
    # decoder, flatten block and appearance latent
    assert found["generator"] == pytest.approx(44.53 + 0.085 + 1.485, rel=5e-3)
    assert found["discriminator"] == pytest.approx(28.86, rel=5e-3)


def test_motion_with_attention_in_the_expression_encoder():
    found = counts("configs/motion.py:full", "model.expression.kind=fan_sa")
    assert found["expression"] == pytest.approx(63.8, rel=5e-3)


@pytest.mark.parametrize(
    ("attn2", "reference", "denoiser"), [("none", 815.5, 952.3), ("null_text", 859.5, 996.3)]
)
def test_animator_video(attn2, reference, denoiser):
    found = counts("configs/animator_video.py:full", f"model.attn2.attn2={attn2}")
    assert found["reference"] == pytest.approx(reference, rel=5e-3)
    assert found["denoiser"] == pytest.approx(denoiser, rel=5e-3)
    assert found["temporal"] == pytest.approx(453.2, rel=5e-3)
    assert found["autoencoder"] == pytest.approx(34.2 + 49.5, rel=5e-3)
    assert found["pose"] == pytest.approx(28.02, rel=5e-3)
    assert found["expression"] == pytest.approx(6.65, rel=5e-3)
