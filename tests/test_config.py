"""Configs: every variant loads, and wrong words end in one line that names the right one."""

import pytest

from dexportrait_jax import config as configs
from dexportrait_jax.errors import UserError

FILES = ("motion", "autoencoder", "animator_image", "animator_video")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("variant", ["tiny", "small", "full"])
def test_every_variant_loads_and_survives_json(name, variant):
    config = configs.load_config(f"configs/{name}.py:{variant}")
    assert config.variant == variant
    again = configs.from_json(configs.to_json(config))
    assert configs.to_json(again) == configs.to_json(config)


def test_overrides_keep_the_type():
    config = configs.load_config(
        "configs/motion.py:tiny",
        ["num_steps=7", "optim.generator.learning_rate=1", "data.path=/a=b", "mesh.fsdp=2"],
    )
    assert (config.num_steps, config.data.path, config.mesh.fsdp) == (7, "/a=b", 2)
    assert config.optim.generator.learning_rate == 1.0
    assert isinstance(config.optim.generator.learning_rate, float)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("num_step=7", "did you mean 'num_steps'"),
        ("optim.generator.learning_rat=1", "did you mean 'learning_rate'"),
        ("num_steps=many", "expected int, 1 or more"),
        ("num_steps=1.5", "expected int"),
        ("num_steps", "has no value"),
        ("optim.generator=3", "is a group of keys"),
        ("num_steps.more=3", "is a single value"),
    ],
)
def test_wrong_overrides_say_what_is_right(override, words):
    with pytest.raises(UserError, match=words) as caught:
        configs.load_config("configs/motion.py:tiny", [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("configs/moton.py:tiny", "no config file configs/moton.py; the project has"),
        ("configs/motion.py:tyni", "did you mean 'tiny'"),
        ("pyproject.toml", "cannot be read as Python|is it a config file|no config file"),
    ],
)
def test_wrong_addresses(address, words):
    with pytest.raises(UserError, match=words):
        configs.load_config(address)


def test_the_files_to_choose_from_are_configs():
    with pytest.raises(UserError) as caught:
        configs.load_config("configs/moton.py")
    names = ", ".join(f"configs/{name}.py" for name in sorted(FILES))
    assert str(caught.value).endswith(f"; the project has {names}")


def test_differences_name_the_key():
    old = {"a": {"b": 1, "c": 2}, "d": 3}
    assert configs.differences(old, {"a": {"b": 1, "c": 4}, "d": 3}) == [("a.c", 2, 4)]
    gone, new = ("a.c", 2, configs.ABSENT), ("e.f.g", configs.ABSENT, None)
    assert configs.differences(old, {"a": {"b": 1}, "d": 3, "e": {"f": {"g": None}}}) == [gone, new]
