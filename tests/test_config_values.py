"""Every key of every config has a rule that its own value keeps; others are one line that says what is allowed."""

import importlib

import pytest

from dexportrait_jax import cli, config_values
from dexportrait_jax import config as configs
from dexportrait_jax.errors import UserError
from dexportrait_jax.train_checks import check

STAGES = ("motion", "autoencoder", "animator_image", "animator_video")
VARIANTS = [
    (stage, variant)
    for stage in STAGES
    for variant in importlib.import_module(f"configs.{stage}").VARIANTS
]


def keys(values, before=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from keys(value, f"{before}{key}.")
        else:
            yield before + key


@pytest.mark.parametrize(("stage", "variant"), VARIANTS)
def test_every_key_has_a_rule_that_its_value_keeps(stage, variant):
    config = configs.load_config(f"configs/{stage}.py:{variant}")
    assert [key for key in keys(config.to_dict()) if config_values.rule_of(key) is None] == []
    check(config)
    config_values.check(configs.from_json(configs.to_json(config)))


@pytest.mark.parametrize("stage", STAGES)
def test_none_is_for_keys_that_may_be_none(stage):
    address = f"configs/{stage}.py:full"
    config = configs.load_config(address)
    for key in keys(config.to_dict()):
        value = config
        for part in key.split("."):
            value = value[part]
        rule = config_values.rule_of(key)
        if rule.is_kind(None):
            check(configs.load_config(address, [f"{key}=None"]))
        elif not isinstance(value, str):  # "None" may be the name of a folder
            with pytest.raises(UserError, match=f"^--config.{key}=None: expected "):
                configs.load_config(address, [f"{key}=None"])


# Stage, override and what is said of it: of another kind, where it is read ...
KINDS = [
    ("motion", "num_steps=None", "expected int, 1 or more, below 2^31, like 620"),
    ("motion", "num_steps=1.5", "expected int, 1 or more"),
    ("motion", "num_steps=True", "expected int, 1 or more"),
    ("motion", "model.pose.dims=('a',)", "expected tuple of int"),
    ("motion", "model.pose.dims=(1.5,)", "expected tuple of int"),
    ("motion", "model.pose.dims=64", "expected tuple of int"),
    ("motion", "model.pose.translation_limit=far", "expected float or None, above 0, like None"),
    ("motion", "model.generator.rgb_channels=3", "expected tuple of int or None"),
    ("motion", "model.generator.mapping_features=wide", "expected int or None"),
    ("motion", "optim.generator.multipliers=('pose',0.1)", "expected tuple of (str, float)"),
    ("motion", "optim.generator.multipliers=((0.1,'pose'),)", "expected tuple of (str, float)"),
    ("motion", "data.augment.similarity.scale=('a','b')", "expected tuple of float"),
    ("motion", "stage=autoencoder", "it is 'motion' by the address"),
    ("motion", "variant=full", "it is 'tiny' by the address"),
    ("autoencoder", "checkpoint.keep=None", "expected int"),
    ("autoencoder", "evaluate.at_end=1", "expected bool"),
    ("animator_image", "diffusion.steps=many", "expected int or None"),
    ("animator_image", "diffusion.beta_end=a", "expected float or None"),
    ("animator_image", "diffusion.final_alpha_one=3", "expected bool or None"),
    ("animator_image", "diffusion.prediction=3", "expected str or None, one of epsilon, v, sample"),
    ("animator_image", "sampling.expression_guidance=a", "expected float or None"),
    ("animator_video", "model.denoiser.expression_heads=(8,)", "expected int or None"),
]
# ... and out of range, before anything is made.
RANGES = [
    ("motion", "num_steps=0", "1 or more"),
    ("motion", "num_steps=2147483648", "below 2^31"),
    ("motion", "seed=4294967296", "below 2^32"),
    ("motion", "optim.generator.warmup_steps=-1", "0 or more"),
    ("motion", "optim.generator.b1=1.0", "0 or more and below 1"),
    ("motion", "optim.discriminator.b2=-0.1", "0 or more and below 1"),
    ("motion", "optim.pretraining.eps=0.0", "above 0"),
    ("motion", "optim.generator.clip_norm=-1.0", "0 or more"),
    ("motion", "optim.generator.learning_rate=-1e-4", "0 or more"),
    ("motion", "optim.generator.final_fraction=2", "1 or less"),
    ("motion", "optim.generator.multipliers=(('pose',-1.0),)", "each 0 or more"),
    ("motion", "ema_decay=1.0", "below 1"),
    ("motion", "accumulate=0", "1 or more"),
    ("motion", "max_skipped_in_a_row=0", "1 or more"),
    ("motion", "pretraining.steps=-1", "0 or more"),
    ("motion", "loss.r1_every=0", "1 or more"),
    ("motion", "loss.l1=-1", "0 or more"),
    ("motion", "loss.pose_label.floor=-1", "0 or more"),
    ("motion", "loss.landmark_maps=69", "1 to 68"),
    ("motion", "model.pose.dims=(0,48,96,128)", "each 1 or more"),
    ("motion", "model.pose.dims=()", "it is 1 or more values, each 1 or more"),
    ("motion", "model.expression.dropout=1.0", "below 1"),
    ("motion", "data.augment.similarity.scale=(1.25,0.8)", "the smaller first"),
    ("motion", "data.augment.similarity.scale=(0.0,1.0)", "above 0"),
    ("motion", "data.augment.flip.probability=1.5", "1 or less"),
    ("motion", "data.augment.colour.brightness=-0.1", "0 or more"),
    ("autoencoder", "data.batch_size=0", "1 or more"),
    ("autoencoder", "data.workers=-1", "0 or more"),
    ("autoencoder", "log_every=0", "1 or more"),
    ("autoencoder", "checkpoint.keep=0", "1 or more"),
    ("autoencoder", "checkpoint.minutes=-1", "0 or more"),
    ("autoencoder", "checkpoint.every_steps=-1", "0 or more"),
    ("autoencoder", "checkpoint.timeout_seconds=0", "1 or more"),
    ("autoencoder", "evaluate.every_steps=-5", "0 or more"),
    ("autoencoder", "report.profile.steps=-3", "0 or more"),
    ("autoencoder", "mesh.fsdp=-2", "or -1 for all devices that are left"),
    ("animator_image", "dropout.pose=1.5", "1 or less"),
    ("animator_image", "timestep_power=0", "above 0"),
    ("animator_image", "diffusion.beta_end=1.5", "below 1, or None"),
    ("animator_image", "sampling.steps=0", "1 or more"),
    ("animator_image", "sampling.eta=1.5", "1 or less"),
    ("animator_video", "data.frames=0", "1 or more"),
    (
        "animator_video",
        "model.denoiser.expression_tokens=(4,16,2)",
        "it is 2 values, each 1 or more",
    ),
]


@pytest.mark.parametrize(("stage", "override", "words"), KINDS)
def test_another_kind_is_refused_where_it_is_read(stage, override, words):
    with pytest.raises(UserError) as caught:
        configs.load_config(f"configs/{stage}.py:tiny", [override])
    said = str(caught.value)
    assert said.startswith(f"--config.{override.partition('=')[0]}=")
    assert words in said and "\n" not in said


@pytest.mark.parametrize(("stage", "override", "words"), RANGES)
def test_out_of_range_is_refused_before_anything_is_made(stage, override, words):
    key, _, given = override.partition("=")
    config = configs.load_config(f"configs/{stage}.py:tiny", [override])
    with pytest.raises(UserError) as caught:
        check(config)
    said = str(caught.value)
    assert said.startswith(f"config.{key}=") and " is out of range; it is " in said
    assert words in said and "\n" not in said


def test_a_number_that_is_none():
    config = configs.load_config("configs/motion.py:tiny", ["loss.l1=1e999"])
    with pytest.raises(UserError, match="^config.loss.l1=inf is no number; give a finite one$"):
        check(config)


def test_a_topology_computes_with_sizes_that_are_in_range():
    with pytest.raises(UserError, match="^config.data.batch_size=0 is out of range"):
        configs.load_config("configs/motion.py:full@v5e:4x4", ["data.batch_size=0"])


def test_values_of_a_config_file_are_held_to_the_table(tmp_path):
    """Of one's own as well; keys that the table does not know are kept to the kind that they have."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from configs import autoencoder\n"
        "def get_config(variant='tiny'):\n"
        "    config = autoencoder.get_config(variant)\n"
        "    config.unlock()\n"
        "    config.log_every = None\n"
        "    config.mine = 3\n"
        "    return config\n"
    )
    with pytest.raises(UserError, match="^config.log_every=None: expected int, 1 or more"):
        check(configs.load_config(str(file)))
    config = configs.load_config(str(file), ["log_every=1", "mine=4"])
    check(config)
    assert config.mine == 4
    with pytest.raises(UserError, match="^--config.mine=None: expected int, like 3$"):
        configs.load_config(str(file), ["mine=None"])


def test_values_become_the_kind_that_is_wanted():
    overrides = ["model.pose.translation_limit=2", "diffusion.preset=None", "diffusion.steps=500"]
    config = configs.load_config("configs/animator_image.py:tiny", overrides)
    assert isinstance(config.model.pose.translation_limit, float)
    assert (config.diffusion.preset, config.diffusion.steps) == (None, 500)
    pairs = ["optim.denoise.multipliers=[['denoiser',2]]"]
    config = configs.load_config("configs/animator_image.py:tiny", pairs)
    assert config.optim.denoise.multipliers == (("denoiser", 2),)


@pytest.mark.parametrize("override", ["num_steps=None", "optim.autoencoder.eps=-1"])
def test_the_command_line_ends_in_one_line_and_no_fault(override, tmp_path, capsys):
    flags = ["--config=configs/autoencoder.py:tiny", f"--workdir={tmp_path / 'run'}"]
    assert cli.run(["train", *flags, f"--config.{override}"]) == cli.FAILED
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and override.partition("=")[0] in said
    assert not (tmp_path / "run").exists()
