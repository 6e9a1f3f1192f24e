"""Parameter counts at the published sizes, by shape evaluation (method.md 3.2 - 3.9)."""

import pytest

from dexportrait_jax.models.motion.appearance import AppearanceEncoder
from dexportrait_jax.models.motion.decoder import Decoder
from dexportrait_jax.models.motion.discriminator import Discriminator
from dexportrait_jax.models.motion.expression import ExpressionEncoder
from dexportrait_jax.models.motion.generator import Generator
from dexportrait_jax.models.motion.pose import PoseEncoder
from dexportrait_jax.state import Network, parameter_count


def millions(tree):
    return parameter_count(tree) / 1e6


@pytest.mark.parametrize(
    ("constructor", "expected"),
    [
        (lambda rngs: AppearanceEncoder(rngs=rngs), 0.836),
        (lambda rngs: ExpressionEncoder(rngs=rngs), 6.65),
        (lambda rngs: ExpressionEncoder(kind="fan_sa", rngs=rngs), 63.8),
        (lambda rngs: Decoder(rngs=rngs), 44.5),
        (lambda rngs: Discriminator(rngs=rngs), 28.86),
    ],
    ids=["appearance", "fan", "fan_sa", "decoder", "discriminator"],
)
def test_parameter_count(constructor, expected):
    assert millions(Network(constructor).abstract) == pytest.approx(expected, rel=0.005)


def test_pose_backbone_and_heads():
    tree = Network(lambda rngs: PoseEncoder(rngs=rngs)).abstract
    heads = {name: tree.pop(name) for name in list(tree) if name.startswith("fc_")}
    assert sorted(heads) == ["fc_pitch", "fc_roll", "fc_scale", "fc_t", "fc_yaw"]
    assert millions(tree) == pytest.approx(27.87, rel=0.005)
    assert millions(heads) == pytest.approx(0.155, rel=0.005)


def test_generator_parts():
    tree = Network(lambda rngs: Generator(rngs=rngs)).abstract
    assert millions(tree["flatten"]) == pytest.approx(0.085, rel=0.005)
    assert millions(tree["appearance_latent"]) == pytest.approx(1.48, rel=0.005)
    assert millions(tree["decoder"]) == pytest.approx(44.5, rel=0.005)


def test_mapping_network_makes_the_decoder_smaller():
    """27.8 M without the mapping's own two layers (method.md 3.8)."""
    tree = Network(lambda rngs: Decoder(mapping_features=512, rngs=rngs)).abstract
    mapping = tree.pop("mapping")
    assert millions(mapping) == pytest.approx((2560 + 512 + 2) * 512 / 1e6)
    assert millions(tree) == pytest.approx(27.8, rel=0.005)
