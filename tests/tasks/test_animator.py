"""What the animator's loss draws, and the encoders that it takes over."""

from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from dexportrait_jax import choices, geometry
from dexportrait_jax import config as configs
from dexportrait_jax.diffusion import guidance, sampler, schedule, windows
from dexportrait_jax.errors import UserError
from dexportrait_jax.models.animator import (
    branches,
    conditioning,
    denoiser,
    image_encoder,
    reference,
    temporal,
    transformer,
)
from dexportrait_jax.platforms import planned_for
from dexportrait_jax.state import QUICK
from dexportrait_jax.step import init_optimizers, make_step
from dexportrait_jax.tasks import animator, animator_start, build_networks, make_task
from dexportrait_jax.tasks.animator_config import check_config
from dexportrait_jax.weights.exporting import export_groups
from dexportrait_jax.workload import abstract_batch
from tests.published import random_like
from tests.stages import micro

# Stable Diffusion 1.5, written out.
SIGNAL = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
SOURCES, TARGETS, SIDE, CHANNELS = 40, 3, 8, 4
SCALE = 2.0


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_timesteps_follow_the_power(power):
    """The cumulative distribution is (t / steps)^power; 200k draws are within 0.005 of it (4 deviations)."""
    drawn = np.asarray(animator.draw_timesteps(jax.random.key(0), 200_000, 1000, power))
    assert drawn.dtype == np.int32 and drawn.min() >= 0 and drawn.max() == 999
    for limit in (100, 500, 900):
        assert np.mean(drawn < limit) == pytest.approx((limit / 1000) ** power, abs=0.005)


def test_a_draw_just_below_one_is_the_last_timestep(monkeypatch):
    """Its fourth root is 1 in float32, and a thousand times that one timestep too many."""
    below = np.nextafter(np.float32(1), np.float32(0))
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.full(shape, below))
    for power in (1.0, 4.0):
        assert animator.draw_timesteps(None, 2, 1000, power).tolist() == [999, 999]


def test_every_timestep_is_drawn():
    drawn = animator.draw_timesteps(jax.random.key(1), 10_000, 10, 1.0)
    assert set(np.asarray(drawn)) == set(range(10))


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        ("animator_image", ("model.attn2.attn2=null_text",)),
        ("animator_video", ("data.frames=15", "dropout.reference_tokens=0.1")),
    ],
)
def test_the_loss_has_gradients_on_a_gpu(stage, overrides, cudnn_stubbed):
    """In bfloat16, traced as for a GPU: what cuDNN cannot do is left to others, and it does the rest."""
    small = ("model.unet.block_channels=(16,)", "model.unet.groups=4", "model.unet.heads=2")
    encoders = ("model.pose.depths=(1,1,1,1)", "model.expression.depth=1")
    config = configs.load_config(
        f"configs/{stage}.py:tiny", ["dtype=bfloat16", *small, *encoders, *overrides]
    )
    task = make_task(config)
    params = {name: network.abstract for name, network in task.networks.items()}
    trained = {name: params.pop(name) for name in task.phases[0].groups}

    def gradients(params, trained, batch, key):
        def loss(trained):
            return task.loss({**params, **trained}, batch, key, 0, {}, ())[0]

        return jax.grad(loss)(trained)

    key = jax.eval_shape(lambda: jax.random.key(0))
    with planned_for("gpu"):
        traced, found = jax.make_jaxpr(gradients, return_shape=True)(
            params, trained, abstract_batch(config.data), key
        )
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, trained)
    assert "dot_product_attention_bwd" in str(traced)


@pytest.mark.parametrize("stage", ["animator_image", "animator_video"])
def test_frozen_encoders_see_the_pictures_they_learned_from(tmp_path, stage):
    config = micro(stage, tmp_path / "data", tmp_path / "exports")
    assert "expression" in animator.AnimatorTask(config).pretrained()
    config.data.augment.colour.probability = (
        1.0  # random: what the animator trains on is its own affair
    )
    assert "expression" in animator.AnimatorTask(config).pretrained()
    config.data.augment.expression_crop.gray = True
    config.data.augment.pose_mask.dilation = 0.25
    config.data.pose_size = 32
    with pytest.raises(UserError) as caught:
        animator.AnimatorTask(config).pretrained()
    said = str(caught.value)
    assert "\n" not in said and str(tmp_path / "exports") in said
    assert said.split(": ", 1)[1].split() == [
        "--config.data.augment.pose_mask.dilation=0.2",
        "--config.data.augment.expression_crop.gray=False",
        "--config.data.pose_size=64",
    ]


@pytest.mark.parametrize("key", [pytest.param("image", marks=pytest.mark.slow), "unet"])
def test_frozen_unets_are_what_they_were_trained_as(tmp_path, key):
    """Noise schedule, heads, ray maps: no shape tells of them, and every one is another network."""
    config = micro("animator_video", tmp_path / "data", tmp_path / "exports")
    export = str(tmp_path / "exports" / "image")
    if key == "unet":
        config.init.unet = export
    assert "denoiser" in animator.AnimatorTask(config).pretrained()
    # The same schedule in other words is no other one.
    config.diffusion.update(preset="sd15", prediction="v", zero_terminal_snr=True)
    assert "denoiser" in animator.AnimatorTask(config).pretrained()
    config.diffusion.update(beta_end=0.02, prediction="epsilon", zero_terminal_snr=False)
    config.model.unet.heads = 2
    config.model.reference.raymap_w = 0  # whose UNet has no ray map: not worth a word
    config.model.denoiser.update(raymap_w=0, warp_padding="border", expression_heads=2)
    config.model.denoiser.update(volume_order="depth_channel", expression_linear=False)
    with pytest.raises(UserError) as caught:
        animator.AnimatorTask(config).pretrained()
    said = str(caught.value)
    assert "\n" not in said and said.startswith(
        f"config.init.{key}={export} does not fit this config"
    )
    assert said.split("give: ", 1)[1].split() == [
        "--config.model.unet.heads=1",
        "--config.model.denoiser.raymap_w=1",
        "--config.model.denoiser.warp_padding=zeros",
        "--config.model.denoiser.volume_order=channel_depth",
        "--config.model.denoiser.expression_heads=None",
        "--config.model.denoiser.expression_linear=True",
        "--config.diffusion.beta_end=0.012",
        "--config.diffusion.prediction=v",
        "--config.diffusion.zero_terminal_snr=True",
    ]
    for override in said.split("give: ", 1)[1].split():
        configs.apply_override(config, override.removeprefix("--config."))
    assert "denoiser" in animator.AnimatorTask(config).pretrained()
    config.model.attn2.attn2 = "null_text"
    with pytest.raises(UserError, match=r"give: --config\.model\.attn2\.attn2=none$"):
        animator.AnimatorTask(config).pretrained()


@pytest.mark.parametrize(
    ("stage", "key", "stored", "lacking"),
    [
        ("animator_image", "autoencoder", "unet", "autoencoder"),
        ("animator_image", "unet", "temporal", "reference, denoiser"),
        ("animator_video", "temporal", "unet", "temporal"),
        ("animator_video", "image", "unet", "pose, expression, autoencoder"),
    ],
)
def test_an_import_of_another_kind_is_told_by_its_key(tmp_path, stage, key, stored, lacking):
    """And not by what its own sizes, or the groups that stay without weights, would need."""
    config = micro(stage, tmp_path / "data", tmp_path / "exports")
    told = {"model": {"unet": {"heads": 7, "block_channels": [8]}}, "unet": {"block_channels": [8]}}
    model = {"stage": "import", "config": told, "step": 0, "ema": False, "crop": None}
    out = export_groups(tmp_path / "out", model, {stored: {"bias": np.zeros(2, np.float32)}})
    config.init[key] = str(out)
    with pytest.raises(UserError) as caught:
        animator.AnimatorTask(config).pretrained()
    assert str(caught.value) == (
        f"config.init.{key}={out} is an export of stage 'import' with the groups {stored}; it has no {lacking}. "
        "Give an export that does"
    )


def test_an_export_without_temporal_modules_is_told_as_such(tmp_path):
    """Its config has settings of them, which say nothing."""
    config = micro("animator_video", tmp_path / "data", tmp_path / "exports")
    config.init.temporal = config.init.image
    config.model.temporal.max_frames += 1
    with pytest.raises(UserError, match=r"^config\.init\.temporal=.* it has no temporal\. Give"):
        animator.AnimatorTask(config).pretrained()


def test_a_published_unet_brings_no_image_encoder(tmp_path):
    config = micro("animator_image", tmp_path / "data", tmp_path / "exports")
    config.model.attn2.attn2 = "clip_image"
    config.model.image_encoder.update(features=16, layers=1, heads=1)
    model = {"stage": "import", "config": {}, "step": 0, "ema": False, "crop": None}
    bias = {"bias": np.zeros(2, np.float32)}
    config.init.unet = str(export_groups(tmp_path / "out", model, {"unet": bias}))
    with pytest.raises(UserError, match="or name an import of CLIP in config.init.image_encoder$"):
        animator.AnimatorTask(config).pretrained()


def test_unets_that_go_on_learning_may_learn_another_noise(tmp_path, capsys):
    config = micro("animator_image", tmp_path / "data", tmp_path / "exports")
    micro("animator_video", tmp_path / "data", tmp_path / "exports")
    config.init.unet = str(tmp_path / "exports" / "image")
    config.diffusion.preset = "sd15"
    assert "denoiser" in animator.AnimatorTask(config).pretrained()
    (said,) = capsys.readouterr().err.splitlines()
    assert "another noise schedule, --config.diffusion.prediction=v " in said
    config.model.unet.heads = 2
    with pytest.raises(UserError, match=r"give: --config\.model\.unet\.heads=1$"):
        animator.AnimatorTask(config).pretrained()


@pytest.mark.parametrize("knob", animator_start._IDLE)
def test_what_has_no_effect_refuses_no_weights(knob):
    """Where it has, here or in the weights' training, it does."""
    config = configs.load_config("configs/animator_image.py:tiny")
    there = configs.to_json(config)
    section, name = knob.split(".")
    there["model"][section][name] = "other"
    switch, values = animator_start._IDLE[knob]
    group, of = switch.split(".")
    trained = there["model"][group]
    alive = {
        "attn2.attn2": "null_text",
        "denoiser.expression_injector": "in_block",
        "denoiser.raymap": "displacement",
        "denoiser.warp_kernel": 3,
        "reference.raymap_reference": True,
    }[switch]
    for ours in values:
        for theirs in values:
            config.model[group][of], trained[of] = ours, theirs
            assert animator_start._differing(config, there, [knob]) == {}
    for ours, theirs in ((alive, alive), (values[0], alive), (alive, values[0])):
        config.model[group][of], trained[of] = ours, theirs
        assert animator_start._differing(config, there, [knob]) == {knob: "other"}


@pytest.mark.parametrize(
    ("group", "knob", "value"), [("pose_mask", "dilation", 0.3), ("expression_crop", "margin", 2.0)]
)
def test_pictures_are_compared_by_what_shows(group, knob, value):
    config = configs.load_config("configs/animator_image.py:tiny")
    there = configs.to_json(config)["data"]
    there["augment"][group][knob] = value
    other = {f"data.augment.{group}.{knob}": value}
    assert animator_start._pictures(config.data, there) == other
    config.data.augment[group].applied = there["augment"][group]["applied"] = False
    assert animator_start._pictures(config.data, there) == {}
    there["augment"][group]["applied"] = True
    other[f"data.augment.{group}.applied"] = True
    assert animator_start._pictures(config.data, there) == other


@pytest.mark.parametrize("key", choices.ANIMATOR)
def test_a_misspelt_choice_is_one_line(key):
    """What is no choice would be taken for the last one that the code asks about."""
    meant = choices.ANIMATOR[key][0]
    config = configs.load_config("configs/animator_image.py:tiny")
    config.unlock()
    *sections, name = key.split(".")
    node = config
    for section in sections:
        node = node[section]
    node[name] = f"{meant}x" if isinstance(meant, str) else 7
    with pytest.raises(UserError, match=f"^config.{key} is one of {meant}, .*, not ") as caught:
        animator.AnimatorTask(config)
    said = str(caught.value)
    assert "\n" not in said
    assert not isinstance(meant, str) or said.endswith(f"; did you mean {meant!r}?")


def test_choices_are_those_that_the_code_knows():
    def values(key):
        return {value for value in choices.ANIMATOR[key] if value is not None}

    null = get_type_hints(branches.NullReading)
    for key, known in {
        "model.attn2.attn2": get_args(reference.Attn2),
        "model.reference.raymap": conditioning.RAY_CHANNELS,
        "model.denoiser.raymap": conditioning.RAY_CHANNELS,
        "model.denoiser.expression_injector": (*get_args(transformer.ExpressionInjector), "none"),
        "model.denoiser.expression_null": get_args(conditioning.ExpressionNull),
        "model.denoiser.expression_place": get_args(transformer.ExpressionPlace),
        "model.denoiser.expression_positions": get_args(conditioning.ExpressionPositions),
        "model.denoiser.volume_order": get_args(conditioning.VolumeOrder),
        "model.denoiser.drop_attn2": get_args(denoiser.DropAttn2),
        "model.denoiser.raymap_points": get_args(geometry.RayMapPoints),
        "model.reference.raymap_points": get_args(geometry.RayMapPoints),
        "model.image_encoder.activation": image_encoder.ACTIVATIONS,
        "diffusion.preset": schedule.SCHEDULES,
        "diffusion.prediction": get_args(schedule.Prediction),
        "sampling.reading": get_args(guidance.Reading),
        "sampling.spacing": get_args(sampler.Spacing),
        "sampling.null_reference": get_args(null["reference"]),
        "sampling.null_pose": get_args(null["pose"]),
        "sampling.window_offset": get_args(windows.Offset),
        "sampling.window_ends": get_args(windows.Ends),
        "sampling.window_weights": get_args(windows.Weights),
        "model.temporal.norm": get_args(temporal.Norm),
    }.items():
        assert values(key) == set(known), key


@pytest.mark.parametrize("name", ["guidance", "temperature", "eta"])
def test_numbers_of_sampling_are_finite(name):
    config = configs.load_config("configs/animator_image.py:tiny", [f"sampling.{name}=1e999"])
    with pytest.raises(UserError, match=f"^config.sampling.{name}=inf is no number"):
        animator.AnimatorTask(config)


@pytest.mark.parametrize(
    ("stage", "overrides", "said"),
    [
        ("image", ["dropout.everything=0.5", "dropout.pose=0.5"], "their shares are 1.1 together"),
        (
            "image",
            ["sampling.hybrid_steps=5"],
            "at most half of config.sampling.steps=8, which is 4",
        ),
        (
            "image",
            ["sampling.expression_guidance=2"],
            "needs --config.sampling.reading=three_scale",
        ),
        ("video", ["data.mode=pairs"], "give --config.data.mode=video"),
        ("video", ["sampling.overlap=8"], "data.frames=8 .* --config.sampling.overlap=7 or fewer"),
        ("video", ["data.frames=2"], "so two can share 0 to 1; give"),
    ],
)
def test_settings_that_do_not_go_together(stage, overrides, said):
    config = configs.load_config(f"configs/animator_{stage}.py:tiny", overrides)
    with pytest.raises(UserError, match=f"^config.*{said}") as caught:
        check_config(config)
    assert "\n" not in str(caught.value)


def test_images_alone_need_no_windows():
    check_config(configs.load_config("configs/animator_image.py:tiny", ["sampling.overlap=99"]))


@pytest.mark.parametrize("size", [64, 100, 384])
def test_sizes_of_pictures_that_do_not_fit(size):
    """SD1.5's widths at 384 pixels: a grid of 48, of depth 24, which does not divide 320; at 64 one of depth 0."""
    address = "configs/animator_image.py:full"
    config = configs.load_config(address, [f"data.image_size={size}"])
    with pytest.raises(UserError, match=f"^config.data.image_size={size} does not fit") as caught:
        animator.AnimatorTask(config)
    said = str(caught.value)
    assert said.endswith("up to 1024 there are 128, 256, 320, 512, 640, 1024")
    for fitting in said.rsplit("are ", 1)[1].split(", "):
        grid = int(fitting) // 8
        for channels in (320, 640, 1280, 1280):
            assert channels % (grid // 2) == 0
            grid //= 2
        check_config(configs.load_config(address, [f"data.image_size={fitting}"]))
    without = [f"data.image_size={size}", "model.denoiser.warp_kernel=0"]
    if size % 64 == 0:
        check_config(configs.load_config(address, without))


@pytest.mark.parametrize(
    ("stage", "override", "said"),
    [
        (
            "animator_image",
            "model.unet.heads=7",
            "32 channels do not divide into 7 attention heads",
        ),
        ("animator_video", "model.unet.groups=7", "do not divide into 7 GroupNorm groups"),
        ("animator_image", "model.denoiser.expression_tokens=(3,5)", "does not reshape to tokens"),
        ("autoencoder", "model.autoencoder.groups=5", "do not divide into 5 GroupNorm groups"),
    ],
)
def test_sizes_of_networks_that_do_not_fit_are_no_fault(stage, override, said):
    """What the networks refuse is for the user to put right: exit code 1, not 70."""
    config = configs.load_config(f"configs/{stage}.py:tiny", [override])
    with pytest.raises(UserError, match="config.model does not fit together: ") as error:
        make_task(config)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_an_image_encoder_of_another_embedding_than_attn2_reads():
    overrides = ["model.attn2.attn2=clip_image", "model.image_encoder.projection=1024"]
    config = configs.load_config("configs/animator_image.py:tiny", overrides)
    with pytest.raises(UserError, match=r"attn2\.cross_attention_features=1024 and a UNet of that"):
        animator.AnimatorTask(config)


def test_clips_longer_than_the_temporal_modules_take():
    address = "configs/animator_video.py:tiny"
    config = configs.load_config(address, ["data.frames=17"])
    with pytest.raises(
        UserError, match=r"^config\.data\.frames=17: .* at most 16 frames"
    ) as caught:
        animator.AnimatorTask(config)
    assert str(caught.value).endswith(
        "give --config.data.frames=16 or fewer, or --config.model.temporal.max_frames=17"
    )
    check_config(configs.load_config("configs/animator_image.py:tiny", ["data.frames=17"]))


def test_shares_of_the_dropped_conditions():
    """method.md 4.7: everything .10, expression alone .10, pose alone .05, and nothing else ever."""
    rates = ConfigDict({"everything": 0.1, "expression": 0.1, "pose": 0.05})
    keeps = animator.draw_keeps(jax.random.key(0), 100_000, rates)
    names = ("keep_reference", "keep_pose", "keep_expression")
    fates, counts = np.unique(np.stack([keeps[n] for n in names], -1), axis=0, return_counts=True)
    shares = {tuple(fate): count / 100_000 for fate, count in zip(fates, counts, strict=True)}
    # 0.004 is four deviations of the rarest but one.
    expected = {(0, 0, 0): 0.1, (1, 1, 0): 0.1, (1, 0, 1): 0.05, (1, 1, 1): 0.75}
    assert shares == pytest.approx(expected, abs=0.004)


class Stub:
    """A network that computes the same whatever its weights."""

    def __init__(self, module):
        self.module = module

    def bind(self, params):
        return self.module


class Autoencoder:
    scale = SCALE


class Asked:
    """A loss whose denoiser answers zero, or else `answer(noisy)`, and what it was asked."""

    def __init__(self, monkeypatch, *overrides, stage="animator_image", networks=None):
        def denoise(noisy, timesteps, conditions, *, temporal, frames):
            self.noisy, self.timesteps = np.asarray(noisy), np.asarray(timesteps)
            self.conditions, self.frames = conditions, frames
            return self.answer(noisy)

        self.answer = jnp.zeros_like
        stubs = {
            "pose": Stub(lambda images: (jnp.tile(jnp.eye(3, 4), (len(images), 1, 1)), None)),
            "expression": Stub(lambda images: images.mean((1, 2))),
            "autoencoder": Stub(Autoencoder()),
            "reference": Stub(lambda latents, context, pose: {"block": latents}),
            "denoiser": Stub(denoise),
            "temporal": Stub(None),
        }
        stubs |= networks or {}
        monkeypatch.setattr(animator, "build_networks", lambda config: stubs)
        address = f"configs/{stage}.py:full"
        config = configs.load_config(address, ["sample_latents=False", *overrides])
        rng = np.random.default_rng(0)
        pictures = {
            f"{which}_{name}": rng.integers(0, 256, (*shape, 2, 2, 3), np.uint8)
            for which, shape in (("source", (SOURCES,)), ("target", (SOURCES, TARGETS)))
            for name in ("image", "pose_image", "expression_image")
        }
        # A corner of each target shows features of the face.
        self.mask = np.zeros((SOURCES, TARGETS, 4 * SIDE, 4 * SIDE), np.uint8)
        self.mask[:, :, : 2 * SIDE, : 2 * SIDE] = 255
        pictures["target_component_mask"] = self.mask
        posterior = (2, SIDE, SIDE, CHANNELS)
        latents = {
            "source_latents": rng.normal(size=(SOURCES, *posterior)).astype(np.float32),
            "target_latents": rng.normal(size=(SOURCES, TARGETS, *posterior)).astype(np.float32),
        }
        self.batch = pictures | latents
        self.task, self.params = animator.AnimatorTask(config), dict.fromkeys(stubs)
        self.loss = float(self.task.loss(self.params, self.batch, jax.random.key(3), 0, {}, ())[0])
        signal = SIGNAL[self.timesteps]
        self.snr = signal / (1 - signal)
        self.clean = SCALE * latents["target_latents"][:, :, 0].reshape(self.noisy.shape)
        self.signal, self.amount = (np.sqrt(x)[:, None, None, None] for x in (signal, 1 - signal))
        self.noise = (self.noisy - self.signal * self.clean) / self.amount

    def error(self, wanted):
        """Of an answer of zero: per sample."""
        return np.mean(wanted**2, axis=(1, 2, 3))


@pytest.mark.parametrize("stage", ["animator_image", "animator_video"])
def test_a_clip_has_one_fate_and_pictures_have_their_own(monkeypatch, stage):
    rates = ["dropout.everything=.3", "dropout.expression=.3", "dropout.pose=.2"]
    asked = Asked(monkeypatch, *rates, stage=stage)
    given = asked.conditions
    fates = np.stack([given.keep_reference, given.keep_pose, given.keep_expression], axis=-1)
    drawn = {tuple(fate) for fate in fates.tolist()}
    assert drawn == {(0, 0, 0), (1, 1, 0), (1, 0, 1), (1, 1, 1)}
    fates = fates.reshape(SOURCES, TARGETS, 3)
    timesteps = asked.timesteps.reshape(SOURCES, TARGETS)
    alike = [(x == x[:, :1]).reshape(SOURCES, -1).all(1) for x in (fates, timesteps)]
    if stage == "animator_video":
        assert asked.frames == TARGETS and np.all(alike)
    else:
        assert asked.frames == 1 and alike[0].mean() < 0.5 and alike[1].sum() == 0
    assert len(set(asked.timesteps)) > SOURCES / 2


def test_what_is_dropped_says_nothing_of_the_noise(monkeypatch):
    """Both are drawn anew: of one draw, the samples without their conditions would be those with the least noise."""
    asked = Asked(monkeypatch, "dropout.everything=.5", "dropout.expression=0", "dropout.pose=0")
    kept = np.asarray(asked.conditions.keep_reference) == 1
    # About 60 of each: that none of them is below 300 would be one in 10^9.
    for chosen in (kept, ~kept):
        assert asked.timesteps[chosen].min() < 300 and asked.timesteps[chosen].max() > 700


class Sampled(Autoencoder):
    """A posterior whose sample is its mean and ten times its log-variance; its keys are noted."""

    def __init__(self):
        self.keys = []

    def sample(self, mean, log_variance, key):
        self.keys.append(jax.random.key_data(key).tolist())
        return mean + 10 * log_variance


def test_latents_are_samples_where_asked(monkeypatch):
    """Those that are denoised and those that the reference reads, each drawn for itself (method.md 4.1)."""
    autoencoder = Sampled()
    networks = {"autoencoder": Stub(autoencoder)}
    asked = Asked(monkeypatch, "sample_latents=True", networks=networks)
    samples = []
    for which in ("source", "target"):
        posterior = asked.batch[f"{which}_latents"].reshape(-1, 2, SIDE, SIDE, CHANNELS)
        samples.append(SCALE * (posterior[:, 0] + 10 * posterior[:, 1]))
    np.testing.assert_allclose(asked.conditions.reference["block"], samples[0], rtol=1e-5)
    noise = (asked.noisy - asked.signal * samples[1]) / asked.amount
    assert noise.std() == pytest.approx(1, abs=0.03)
    assert asked.loss == pytest.approx(asked.error(noise).mean(), rel=1e-3)
    assert len(autoencoder.keys) == 2 and autoencoder.keys[0] != autoencoder.keys[1]


def test_loss_by_hand(monkeypatch):
    """Noise of deviation one on scaled latents; every noise level weighs the same."""
    asked = Asked(monkeypatch)
    assert asked.noise.std() == pytest.approx(1, abs=0.03)
    assert abs(asked.noise.mean((1, 2)).std() - 1 / SIDE) < 0.02
    assert asked.loss == pytest.approx(asked.error(asked.noise).mean(), rel=1e-4)
    assert asked.conditions.reference_token_keep is None


def test_a_preset_reaches_the_loss(monkeypatch):
    """With X-NeMo's betas, what was added to the latents is standard noise by its table, not by SD1.5's."""
    asked = Asked(monkeypatch, "diffusion.preset=xnemo")
    table = np.cumprod(1 - np.linspace(0.00085**0.5, 0.02**0.5, 1000) ** 2)[asked.timesteps]
    signal = np.sqrt(table)[:, None, None, None]
    noise = (asked.noisy - signal * asked.clean) / np.sqrt(1 - signal**2)
    assert asked.loss == pytest.approx(asked.error(noise).mean(), rel=1e-4)
    assert asked.loss != pytest.approx(asked.error(asked.noise).mean(), rel=1e-2)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_pure_noise_is_where_sampling_starts(monkeypatch, spacing):
    """With zero terminal SNR no other timestep than the last has seen it; "leading" starts at 953."""
    given = ["diffusion.preset=zero_snr", f"sampling.spacing={spacing}"]
    if spacing != "leading":
        assert np.isfinite(Asked(monkeypatch, *given).loss)
        return
    with pytest.raises(UserError, match="timestep 999.*starts at 953") as caught:
        Asked(monkeypatch, *given)
    said = str(caught.value)
    assert "\n" not in said and said.endswith("give --config.sampling.spacing=trailing")


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_min_snr_weighs_the_loss(monkeypatch, prediction):
    asked = Asked(monkeypatch, "min_snr_gamma=5.0", f"diffusion.prediction={prediction}")
    if prediction == "epsilon":
        errors, weights = asked.error(asked.noise), np.minimum(asked.snr, 5) / asked.snr
    else:
        errors = asked.error(asked.signal * asked.noise - asked.amount * asked.clean)
        weights = np.minimum(asked.snr, 5) / (asked.snr + 1)
    assert asked.loss == pytest.approx(np.mean(weights * errors), rel=1e-3)
    assert abs(asked.loss / errors.mean() - 1) > 0.05


def test_the_face_weighs_more_where_it_is_told_to(monkeypatch):
    """The corner that the mask has, a quarter of the latents, four times; a border between is a part of both."""
    asked = Asked(monkeypatch, "component_weight=3.0")
    squares = np.square(asked.noise).mean(-1)
    places = np.ones((SIDE, SIDE))
    places[: SIDE // 2, : SIDE // 2] = 4
    assert asked.loss == pytest.approx((places * squares).mean(), rel=0.01)
    assert asked.loss > 1.6 * squares.mean()


def test_noise_offset_is_in_what_is_denoised(monkeypatch):
    """Channels of a sample are shifted together: variance of their means .5^2 + 1/64, of the noise 1.25."""
    asked = Asked(monkeypatch, "noise_offset=0.5")
    assert asked.noise.mean((1, 2)).std() == pytest.approx((0.25 + 1 / SIDE**2) ** 0.5, abs=0.06)
    assert asked.loss == pytest.approx(asked.error(asked.noise).mean(), rel=1e-4)
    assert asked.loss == pytest.approx(1.25, abs=0.1)


@pytest.mark.parametrize("stage", ["animator_image", "animator_video"])
def test_a_preview_by_hand(monkeypatch, stage):
    """From 60 % of the noise, told exactly, come the targets again, whatever was cached of them; from none, others."""

    class Pictures(Autoencoder):
        def encode(self, images):
            return images + 0.25, 0 * images

        def decode(self, latents):
            return latents - 0.25

    asked = Asked(monkeypatch, stage=stage, networks={"autoencoder": Stub(Pictures())})
    asked.answer = lambda noisy: jax.random.normal(jax.random.key(0), noisy.shape)
    made = asked.task.preview(asked.params, asked.batch)
    targets = asked.batch["target_image"].reshape(-1, 2, 2, 3) / 127.5 - 1
    np.testing.assert_allclose(made, targets, atol=1e-4)
    assert set(asked.timesteps) == {600}
    sources = asked.batch["source_image"] / 127.5 - 1
    np.testing.assert_allclose(
        asked.conditions.reference["block"], SCALE * (sources + 0.25), atol=1e-5
    )
    assert asked.frames == (TARGETS if stage == "animator_video" else 1)
    asked.answer = jnp.zeros_like
    assert np.abs(asked.task.preview(asked.params, asked.batch) - targets).max() > 0.1


def test_reference_tokens_are_hidden_from_the_denoiser(monkeypatch):
    asked = Asked(monkeypatch, "dropout.reference_tokens=0.3")
    keep = np.asarray(asked.conditions.reference_token_keep["block"])
    assert keep.shape == (SOURCES, SIDE * SIDE)
    assert keep.mean() == pytest.approx(0.7, abs=0.04)  # four deviations of 2560 draws


def test_both_unets_read_the_embedding_of_the_source(monkeypatch):
    """In the mode clip_image: one token a source, for the reference, and for each of its targets."""
    seen = []
    networks = {
        "image_encoder": Stub(lambda images: images.mean((1, 2))),
        "reference": Stub(
            lambda latents, context, pose: seen.append(context) or {"block": latents}
        ),
    }
    asked = Asked(monkeypatch, networks=networks)
    mean = asked.batch["source_image"].mean((1, 2)) / 127.5 - 1
    np.testing.assert_allclose(seen[0], mean[:, None], atol=1e-5)
    expected = np.repeat(mean[:, None], TARGETS, 0)
    np.testing.assert_allclose(asked.conditions.context, expected, atol=1e-5)


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("clip_image", marks=pytest.mark.exhaustive),
        pytest.param("null_text", marks=pytest.mark.slow),
    ],
)
def test_a_step_trains_the_text_attention_of_both_unets(monkeypatch, mode):
    """With an embedding of the source, which stays, or with a constant that is learned from zero."""
    overrides = [
        f"model.attn2.attn2={mode}",
        "model.attn2.cross_attention_features=12",
        "model.attn2.null_text_tokens=3",
        "model.unet.block_channels=(8, 8)",
        "model.unet.groups=4",
    ]
    config = configs.load_config("configs/animator_image.py:tiny", overrides)
    with config.unlocked():
        sizes = {"image_size": 16, "patch_size": 8, "features": 8, "layers": 1, "heads": 1}
        config.model.image_encoder.update(sizes | {"projection": 12})
    rng = np.random.default_rng(0)
    networks = build_networks(config) | {
        "pose": Stub(lambda images: (jnp.tile(jnp.eye(3, 4), (len(images), 1, 1)), None)),
        "expression": Stub(lambda images: jnp.ones((len(images), 64))),
        "autoencoder": Stub(Autoencoder()),
    }
    monkeypatch.setattr(animator, "build_networks", lambda config: networks)
    task = animator.AnimatorTask(config)
    params = {
        name: {} if isinstance(network, Stub) else random_like(network.abstract)
        for name, network in networks.items()
    }
    trained = ("reference", "denoiser")
    if mode == "null_text":
        for name in trained:
            params[name]["null_text"] = jnp.zeros((3, 12))
    batch = {
        f"{which}_{name}": rng.integers(0, 256, (*shape, 32, 32, 3), np.uint8)
        for which, shape in (("source", (2,)), ("target", (2, 2)))
        for name in ("image", "pose_image", "expression_image")
    } | {
        "source_latents": rng.normal(size=(2, 2, 8, 8, 16)).astype(np.float32),
        "target_latents": rng.normal(size=(2, 2, 2, 8, 8, 16)).astype(np.float32),
    }
    state = {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "opt": init_optimizers(task.phases, params),
        "ema": {name: params[name] for name in trained},
    }
    step = jax.jit(make_step(task.phases, seed=0, ema_decay=0.9), static_argnums=3)
    compiled = step.lower(state, batch, {}, frozenset()).compile(compiler_options=QUICK)
    after, metrics = compiled(state, batch, {})
    assert int(metrics["denoise/skipped"]) == 0

    def values(tree, name):
        block = tree["params"][name]["down_blocks"]["0"]["attentions"]["0"]["transformer_blocks"]
        return block["0"]["attn2"]["to_v"]["kernel"]

    for name in trained:
        if mode == "clip_image":
            assert np.any(values(after, name) != values(state, name))
        else:  # while the constant is zero, its values have no gradient, but it has one itself
            text = np.abs(after["params"][name]["null_text"])
            assert text.min() > 0 and np.isfinite(text.max())
    if mode == "clip_image":
        jax.tree.map(
            np.testing.assert_array_equal, after["params"]["image_encoder"], params["image_encoder"]
        )
