"""`dexportrait import` of motion modules: diffusers' numbers from each layout; positions that must be ours."""

import json

import diffusers
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from dexportrait_jax import cli
from dexportrait_jax.errors import UserError
from dexportrait_jax.tasks.animator import AnimatorTask
from tests.published import parameters_from_torch, randomise
from tests.stages import micro

CHANNELS, LAYERS = (16, 32), 1  # those of `micro`


def adapter(middle=True, frames=32):
    return randomise(
        diffusers.MotionAdapter(
            block_out_channels=CHANNELS,
            motion_layers_per_block=LAYERS,
            motion_num_attention_heads=2,
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
    assert told["temporal"] == {"max_frames": 16, "middle": middle}
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
