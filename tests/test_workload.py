"""Work of the `full` networks against method.md 3, from shapes alone: nothing is allocated."""

import jax
import jax.numpy as jnp
import pytest

from dexportrait_jax import config as configs
from dexportrait_jax.flops import count
from dexportrait_jax.models.convolution import convolution_backend
from dexportrait_jax.models.motion.generator import Generator
from dexportrait_jax.models.perceptual import PerceptualNetwork
from dexportrait_jax.state import Network
from dexportrait_jax.tasks import build_networks
from dexportrait_jax.workload import forward_work, step_work
from tests import traces

GIGA = 1e9
CONFIG = "configs/motion.py:full"


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def gmacs(network, *inputs, part=lambda module: module):
    """Of one network, or of the part of it that ``part`` picks."""

    def apply(params, *inputs):
        return part(network.bind(params))(*inputs)

    with convolution_backend("xla"):
        return count(apply, network.abstract, *inputs).macs / GIGA


@pytest.fixture(scope="module")
def networks():
    return build_networks(configs.load_config(CONFIG))


IMAGE, VOLUME = shape(1, 256, 256, 3), shape(1, 16, 64, 64, 32)


def test_encoders_discriminator_and_perceptual_network(networks):
    assert gmacs(networks["appearance"], IMAGE) == pytest.approx(32.1, rel=5e-3)
    assert gmacs(networks["pose"], IMAGE) == pytest.approx(5.82, rel=5e-3)
    assert gmacs(networks["expression"], shape(1, 224, 224, 3)) == pytest.approx(6.33, rel=1e-2)
    assert gmacs(networks["discriminator"], IMAGE) == pytest.approx(46.5, rel=5e-3)
    vgg = Network(lambda rngs: PerceptualNetwork("vgg16", rngs=rngs))
    features = gmacs(vgg, IMAGE, part=lambda module: module.features)
    assert features == pytest.approx(20.0, rel=5e-3)


def test_expression_encoder_with_attention():
    config = configs.load_config(CONFIG, ["model.expression.kind=fan_sa"])
    found = gmacs(build_networks(config)["expression"], shape(1, 224, 224, 3))
    assert found == pytest.approx(53.4, rel=5e-3)


def test_appearance_latent(networks):
    found = gmacs(networks["generator"], VOLUME, part=lambda module: module.appearance_latent)
    assert found == pytest.approx(0.33, rel=2e-2)


@pytest.mark.parametrize("stride", ["last", "first"])
def test_flatten_block(stride):
    """method.md 3.6: 1.4 with the stride taken first, four times that where the pooling comes last, our default."""
    generator = Network(lambda rngs: Generator(flatten_stride=stride, rngs=rngs))
    found = gmacs(generator, shape(1, 16, 64, 64, 64), part=lambda module: module.flatten)
    cells, pooled = 16 * 64 * 64, 16 * 32 * 32
    convolved = cells if stride == "last" else pooled
    assert found == pytest.approx((convolved * 27 * (64 * 32 + 32 * 32) + pooled * 64 * 32) / GIGA)
    assert found == pytest.approx({"last": 4, "first": 1}[stride] * 1.4, rel=3e-2)


def test_decoder(networks):
    """By the definition of its layers, and in what way method.md's 86.2 counts the same layers.

    StyleGAN2 doubles by a transposed convolution of stride 2, in which every input meets every one of the nine
    taps once. method.md counts nine taps at each of four times as many outputs, as if the zeros between the
    inputs were data. Here four windows of 2 x 2 are done at once, with zeros in 7 places of 16.
    """
    found = gmacs(
        networks["generator"],
        shape(1, 32, 32, 512),
        shape(1, 2560),
        shape(1, 512),
        part=lambda module: module.decoder,
    )
    same = 9 * sum(
        side**2 * before * after
        for side, before, after in (
            *((32, 512, 512),) * 3,
            *((16, 512, 512),) * 2,
            *((8, 512, 512),) * 2,
            *((64, 512, 512), (128, 256, 256), (256, 128, 128)),
        )
    )
    doubling = sum(
        side**2 * before * after
        for side, before, after in ((32, 512, 512), (64, 512, 256), (128, 256, 128))
    )
    assert found == pytest.approx((same + 16 * doubling) / GIGA, rel=2e-2)  # the rest: style, RGB
    assert found + (4 * 9 - 16) * doubling / GIGA == pytest.approx(86.2, rel=5e-3)
    assert found - (16 - 9) * doubling / GIGA == pytest.approx(49.95, rel=5e-3)


def test_sample_of_the_motion_trainer():
    """A + 2 E_p + E_e + generator + 2 VGG + D; 0.23 TMAC in method.md, with the doubling counted as above."""
    work = forward_work(configs.load_config(CONFIG))
    found = {scope: macs / GIGA for scope, macs in work.by_scope.items() if macs > 1e-3 * GIGA}
    assert found == pytest.approx(
        {
            "appearance": 32.1,
            "pose": 2 * 5.82,
            "expression": 6.33,
            "generator": 59.35 + 5.47 + 0.33,
            "discriminator": 46.5,
            "perceptual": 2 * 20.0,
        },
        rel=1e-2,
    )
    assert work.macs / GIGA == pytest.approx(201.8, rel=1e-3)
    # Counted as method.md counts the decoder, 86.2 for 59.35: the README's correction of it.
    as_there = work.macs / GIGA + 86.2 - 59.35
    assert as_there == pytest.approx(228.6, rel=1e-3) and as_there == pytest.approx(230, rel=1e-2)


@pytest.mark.slow
def test_step_is_three_times_its_forward_passes():
    """With 1 source and 2 targets: the discriminator sees 2 pictures, then 2 + 2, and 2 again for the penalty.

    Not differentiated: the perceptual network on the targets, and its and the discriminator's weights. Not
    needed, and so not counted: gradients of the pictures themselves, up to 4.3 % of a network this small.
    """
    config = configs.load_config("configs/motion.py:tiny")
    with config.unlocked():
        config.data.batch_size, config.data.targets = 1, 2
    sample = forward_work(config).by_scope
    step = step_work(config, {"joint", "adversarial"}).by_scope
    judge = sample["discriminator"]
    expected = {
        "appearance": 3 * sample["appearance"],
        "pose": 3 * sample["pose"] * 3 / 2,
        "expression": 3 * sample["expression"] * 2,
        "perceptual": 3 / 2 * sample["perceptual"] * 2,
        "discriminator": 2 * judge * 2 + 3 * judge * 4,
    }
    assert {name: step[name] for name in expected} == pytest.approx(expected, rel=5e-2)

    # The penalty: forward, gradient of the picture, and the gradients of both.
    with_penalty = step_work(config, {"joint", "adversarial", "r1"}).by_scope
    extra = with_penalty["discriminator"] - step["discriminator"]
    assert extra == pytest.approx(3 * 2 * judge * 2, rel=5e-2)
    assert with_penalty["generator"] == step["generator"]


def test_choices_of_the_denoiser():
    """Where things stand costs nothing; a linear layer less is its products less, for each of two samples."""

    def macs(*choices):
        overrides = [f"model.denoiser.{choice}" for choice in choices]
        _, function, given = traces.denoiser("animator_image", overrides)
        return count(function, *given).macs

    default = macs()
    elsewhere = macs(
        "volume_order=depth_channel",
        "expression_place=after_feed_forward",
        "expression_positions=none",
        "raymap_points=corners",
    )
    assert elsewhere == default > 1e5
    assert default - macs("expression_linear=False") == 2 * 64 * 64


@pytest.mark.parametrize(
    "stage",
    ["autoencoder", pytest.param("animator_image", marks=pytest.mark.slow), "animator_video"],
)
def test_every_group_that_computes_is_told_apart(stage):
    config = configs.load_config(f"configs/{stage}.py:tiny")
    work = forward_work(config)
    used = {name for name, macs in work.by_scope.items() if macs}
    wanted = set(build_networks(config)) | ({"perceptual"} if stage == "autoencoder" else set())
    assert used - {""} == wanted
    assert work.by_scope.get("", 0) < 1e-3 * work.macs
