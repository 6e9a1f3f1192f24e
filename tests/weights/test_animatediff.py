"""`dexportrait import` of motion modules: diffusers' numbers from each layout; positions that must be ours."""

import json

import diffusers
import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers.loaders.single_file_utils import convert_animatediff_checkpoint_to_diffusers
from safetensors.numpy import save_file

from dexportrait_jax import cli
from dexportrait_jax import config as configs
from dexportrait_jax.errors import UserError
from dexportrait_jax.tasks import build_networks
from dexportrait_jax.tasks.animator import AnimatorTask
from dexportrait_jax.weights.exporting import export_groups
from tests.published import parameters_from_torch, randomise
from tests.stages import micro, random_weights

CHANNELS, LAYERS = (16, 32), 1  # those of `micro`


def adapter(middle=True, frames=32, heads=2, channels=CHANNELS):
    return randomise(
        diffusers.MotionAdapter(
            block_out_channels=channels,
            motion_layers_per_block=LAYERS,
            motion_num_attention_heads=heads,
            motion_norm_num_groups=4,
            motion_max_seq_length=frames,
            use_motion_mid_block=middle,
        )
    )


def as_published(model, folder, prefix=""):
    """The names of AnimateDiff's own files, and half precision as there."""
    words = {
        ".transformer_blocks.0.attn1.": ".transformer_blocks.0.attention_blocks.0.",
        ".transformer_blocks.0.attn2.": ".transformer_blocks.0.attention_blocks.1.",
        ".transformer_blocks.0.norm1.": ".transformer_blocks.0.norms.0.",
        ".transformer_blocks.0.norm2.": ".transformer_blocks.0.norms.1.",
        ".transformer_blocks.0.norm3.": ".transformer_blocks.0.ff_norm.",
    }
    tensors = {}
    for key, value in model.state_dict().items():
        value = value.numpy().astype(np.float16)
        module, rest = (
            key[: key.index(".motion_modules.") + 17],
            key[key.index(".motion_modules.") + 17 :],
        )
        key = f"{prefix}{module}.temporal_transformer{rest}"
        for new, old in words.items():
            key = key.replace(new, old)
        if key.endswith(".pos_embed.pe"):
            for number in (0, 1):  # there every attention has its own table
                place = f".attention_blocks.{number}.pos_encoder.pe"
                tensors[key.replace(".pos_embed.pe", place)] = value
        else:
            tensors[key] = value
    assert not prefix or all(key.startswith(prefix) for key in tensors)
    save_file(tensors, folder / "mm_sd_v15.safetensors")
    return folder / "mm_sd_v15.safetensors"


def as_parallel(model, folder):
    return as_published(model, folder, prefix="module.")


def as_adapter(model, folder):
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def imported(source, out):
    return cli.run(["import", "--kind=motion_modules", f"--source={source}", f"--out={out}"])


def video_stage(tmp_path, out, **changes):
    sizes = {"model__unet__heads": 2, "init__temporal": out}
    return micro("animator_video", tmp_path / "data", tmp_path / "exports", **(sizes | changes))


@pytest.mark.parametrize("layout", [as_published, as_parallel, as_adapter])
@pytest.mark.parametrize("middle", [True, False])
def test_the_video_stage_starts_from_them(tmp_path, layout, middle):
    """Our tree is that of diffusers' adapter, to which `TemporalModules` is equal (test_temporal.py)."""
    model = adapter(middle, frames=16)
    assert imported(layout(model, tmp_path), tmp_path / "out") == 0
    told = json.loads((tmp_path / "out" / "model.json").read_text())["config"]["model"]
    own = {} if layout is as_adapter else {"norm": "frame"}
    assert told["temporal"] == {"max_frames": 16, "middle": middle, **own}
    task = AnimatorTask(video_stage(tmp_path, tmp_path / "out", model__temporal__middle=middle))
    found = task.pretrained()["temporal"]
    state = {key: value for key, value in model.state_dict().items() if not key.endswith(".pe")}
    expected = parameters_from_torch(task.networks["temporal"].abstract, state)
    tolerance = 0 if layout is as_adapter else 1e-3
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(
            ours, theirs, rtol=tolerance, atol=tolerance
        ),
        found,
        expected,
    )


def test_animatediffs_names_are_those_that_diffusers_reads(tmp_path):
    """The files that these tests draw are ours to get wrong; diffusers' own conversion makes its adapter of them."""
    model = adapter()
    file = as_published(model, tmp_path)
    converted = convert_animatediff_checkpoint_to_diffusers(safetensors.torch.load_file(file))
    state = {key: value for key, value in model.state_dict().items() if not key.endswith(".pe")}
    assert converted.keys() == state.keys()
    for key, value in state.items():
        torch.testing.assert_close(converted[key], value.half(), rtol=0, atol=0, msg=key)


@pytest.mark.parametrize(
    ("layout", "norm", "noted"),
    [
        (as_published, "clip", True),
        (as_published, "frame", False),
        (as_adapter, "clip", False),
        (as_adapter, "frame", False),
    ],
)
def test_how_animatediff_normalised_is_told(tmp_path, layout, norm, noted, capsys):
    """Its own names tell; both norms are in use on these weights, so neither is refused."""
    override = "--config.model.temporal.norm=frame"
    assert imported(layout(adapter(frames=16), tmp_path), tmp_path / "out") == 0
    assert (override in capsys.readouterr().out) == (layout is as_published)
    task = AnimatorTask(video_stage(tmp_path, tmp_path / "out", model__temporal__norm=norm))
    assert "temporal" in task.pretrained()
    lines = [line for line in capsys.readouterr().err.splitlines() if "AnimateDiff" in line]
    assert [override in line for line in lines] == [True] * noted


def test_what_a_run_trained_with_another_norm_is_refused(tmp_path):
    """The note is for imports alone."""
    config = video_stage(tmp_path, "", model__temporal__norm="frame")
    group = random_weights(build_networks(config)["temporal"], seed=1)
    values = configs.to_json(config)
    model = {"stage": "animator_video", "config": values, "step": 1, "ema": False, "crop": {}}
    export_groups(tmp_path / "run", model, {"temporal": group})
    with pytest.raises(UserError, match="--config.model.temporal.norm=frame$"):
        AnimatorTask(video_stage(tmp_path, tmp_path / "run")).pretrained()


def test_modules_of_another_width_are_told_in_words(tmp_path):
    """And not by a list of tensors, nor by an option that the image stage's weights would not fit."""
    out = tmp_path / "out"
    assert imported(as_adapter(adapter(frames=16, channels=(16, 48)), tmp_path), out) == 0
    with pytest.raises(UserError) as caught:
        AnimatorTask(video_stage(tmp_path, out)).pretrained()
    said = str(caught.value)
    assert said.startswith(f"config.init.temporal={out} does not fit this config, ")
    assert (
        "are of another UNet, with '--config.model.unet.block_channels=(16,48)', than that of the image"
        in said
    )
    assert said.endswith(
        "give modules of a UNet like that one, or leave config.init.temporal empty"
    )


def test_the_contracts_name_of_the_kind(tmp_path):
    source = as_adapter(adapter(middle=False), tmp_path)
    out = tmp_path / "out"
    assert cli.run(["import", "--kind=motion_module", f"--source={source}", f"--out={out}"]) == 0
    assert json.loads((out / "model.json").read_text())["config"]["kind"] == "motion_modules"


def test_clips_longer_than_they_know_and_modules_in_the_middle(tmp_path):
    assert imported(as_adapter(adapter(middle=False, frames=24), tmp_path), tmp_path / "out") == 0
    for changes, word in (
        ({"model__temporal__middle": False}, "--config.model.temporal.max_frames=24"),
        ({"model__temporal__max_frames": 24}, "--config.model.temporal.middle=False"),
    ):
        with pytest.raises(UserError) as caught:
            AnimatorTask(video_stage(tmp_path, tmp_path / "out", **changes)).pretrained()
        assert word in str(caught.value) and "\n" not in str(caught.value)


def test_other_positions_are_refused(tmp_path, capsys):
    model = adapter()
    for key, value in model.state_dict().items():
        if key.endswith(".pe"):
            value += 0.1
    assert imported(as_adapter(model, tmp_path), tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "not the sine" in said


def test_heads_and_groups_of_an_adapter_are_told(tmp_path, capsys):
    """No shape tells them: with other heads the same weights are another network."""
    assert imported(as_adapter(adapter(frames=16), tmp_path), tmp_path / "out") == 0
    assert "note: " not in capsys.readouterr().out
    told = json.loads((tmp_path / "out" / "model.json").read_text())["config"]["model"]["unet"]
    assert (told["heads"], told["groups"]) == (2, 4)
    for key, other in (("heads", 4), ("groups", 8)):
        changes = {f"model__unet__{key}": other, "model__temporal__max_frames": 16}
        # The image stage's export, of the same config, fits: the adapter is what does not.
        config = video_stage(tmp_path / key, tmp_path / "out", **changes)
        with pytest.raises(UserError, match="modules are of another UNet") as caught:
            AnimatorTask(config).pretrained()
        assert f"--config.model.unet.{key}={told[key]}" in str(caught.value)


def test_nothing_tells_the_heads_of_a_file_alone(tmp_path, capsys):
    assert imported(as_published(adapter(), tmp_path), tmp_path / "out") == 0
    assert "tells the heads of its attention; those of the config" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"motion_num_attention_heads": [2, 4]}, "[2, 4] heads at its levels"),
        ({"motion_max_seq_length": 24}, "says motion_max_seq_length=24, its tensors say 32"),
        ({"use_motion_mid_block": False}, "says use_motion_mid_block=False, its tensors say True"),
    ],
)
def test_a_config_that_does_not_fit_is_one_line(tmp_path, changes, word, capsys):
    file = as_adapter(adapter(), tmp_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert imported(file.parent, tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and word in said
    assert not (tmp_path / "out").exists()
