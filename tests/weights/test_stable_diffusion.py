"""`dexportrait import` of SD1.5's UNet and autoencoder: diffusers' numbers from every layout; what animators take."""

import json
import re
import subprocess
import sys
import tracemalloc

import diffusers
import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers.loaders import single_file_utils
from safetensors.numpy import save_file

from dexportrait_jax import cli
from dexportrait_jax.errors import UserError
from dexportrait_jax.models.animator.conditioning import Conditions
from dexportrait_jax.models.animator.temporal import TemporalModules
from dexportrait_jax.models.animator.transformer import TransformerOptions
from dexportrait_jax.models.animator.unet import UNet
from dexportrait_jax.models.animator.vae import VAE
from dexportrait_jax.state import Network, filled
from dexportrait_jax.tasks import build_networks
from dexportrait_jax.tasks.animator import AnimatorTask
from dexportrait_jax.weights import stable_diffusion
from dexportrait_jax.weights.exporting import export_groups
from dexportrait_jax.weights.importing import load_groups
from dexportrait_jax.weights.names import flatten
from tests.models.animator.added_branches import (
    assert_nothing_is_added,
    assert_rays_are_not_read,
)
from tests.published import published_unet, random_like, randomise, relative_error
from tests.stages import micro

CHANNELS, LAYERS, CONTEXT = (16, 32, 32), 2, 24
VAE_SIZES = {"block_channels": (8, 16, 16), "layers_per_block": 1, "groups": 4}
# What diffusers' own conversion of checkpoints asks to know of the network.
LEVELS = len(CHANNELS)


@pytest.fixture(scope="module")
def unet():
    return randomise(published_unet(CHANNELS, LAYERS, heads=2, context=CONTEXT, groups=4))


@pytest.fixture(scope="module")
def vae():
    return randomise(
        diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=VAE_SIZES["block_channels"],
            layers_per_block=VAE_SIZES["layers_per_block"],
            norm_num_groups=VAE_SIZES["groups"],
            scaling_factor=0.25,
        )
    )


def arrays_of(model):
    return {key: value.numpy() for key, value in model.state_dict().items()}


def checkpoint_of_unet(state, levels=LEVELS):
    """The weights under the names of a single-file checkpoint, by its published structure: a list of blocks."""
    layers = {}

    def resnet(place, theirs):
        words = (
            ("in_layers.0", "norm1"),
            ("in_layers.2", "conv1"),
            ("emb_layers.1", "time_emb_proj"),
        )
        words += (
            ("out_layers.0", "norm2"),
            ("out_layers.3", "conv2"),
            ("skip_connection", "conv_shortcut"),
        )
        for name, word in words:
            layers[f"{place}.{name}"] = f"{theirs}.{word}"

    layers |= {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
    layers |= {"input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}
    number = 1
    for level in range(levels):
        for layer in range(LAYERS):
            resnet(f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{layer}")
            layers[f"input_blocks.{number}.1"] = f"down_blocks.{level}.attentions.{layer}"
            number += 1
        if level < levels - 1:
            layers[f"input_blocks.{number}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            number += 1
    for place, part in ((0, "resnets.0"), (2, "resnets.1")):
        resnet(f"middle_block.{place}", f"mid_block.{part}")
    layers["middle_block.1"] = "mid_block.attentions.0"
    number = 0
    for level in range(levels):
        for layer in range(LAYERS + 1):
            resnet(f"output_blocks.{number}.0", f"up_blocks.{level}.resnets.{layer}")
            place = 1
            if level > 0:  # the lowest level has no attention
                layers[f"output_blocks.{number}.1"] = f"up_blocks.{level}.attentions.{layer}"
                place = 2
            if layer == LAYERS and level < levels - 1:
                layers[f"output_blocks.{number}.{place}.conv"] = (
                    f"up_blocks.{level}.upsamplers.0.conv"
                )
            number += 1
    return renamed(state, layers, "model.diffusion_model.")


def checkpoint_of_vae(state, prefix="first_stage_model."):
    layers = {
        word: word
        for word in ("quant_conv", "post_quant_conv", "encoder.conv_in", "decoder.conv_in")
    }
    levels = len(VAE_SIZES["block_channels"])
    for half, blocks, more, change in (("encoder", "down", 0, "down"), ("decoder", "up", 1, "up")):
        layers[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        layers[f"{half}.conv_out"] = f"{half}.conv_out"
        for level in range(levels):
            place = level if half == "encoder" else levels - 1 - level
            for layer in range(VAE_SIZES["layers_per_block"] + more):
                theirs = f"{half}.{blocks}_blocks.{level}.resnets.{layer}"
                for word in ("norm1", "conv1", "norm2", "conv2"):
                    layers[f"{half}.{blocks}.{place}.block.{layer}.{word}"] = f"{theirs}.{word}"
                layers[f"{half}.{blocks}.{place}.block.{layer}.nin_shortcut"] = (
                    f"{theirs}.conv_shortcut"
                )
            theirs = f"{half}.{blocks}_blocks.{level}.{change}samplers.0.conv"
            layers[f"{half}.{blocks}.{place}.{change}sample.conv"] = theirs
        for number in (0, 1):
            for word in ("norm1", "conv1", "norm2", "conv2"):
                layers[f"{half}.mid.block_{number + 1}.{word}"] = (
                    f"{half}.mid_block.resnets.{number}.{word}"
                )
        attention = f"{half}.mid_block.attentions.0"
        words = {
            "norm": "group_norm",
            "q": "to_q",
            "k": "to_k",
            "v": "to_v",
            "proj_out": "to_out.0",
        }
        layers |= {
            f"{half}.mid.attn_1.{word}": f"{attention}.{ours}" for word, ours in words.items()
        }
    tensors = renamed(state, layers, prefix)
    # There the attention's matrices are 1x1 convolutions.
    return {
        key: value[:, :, None, None] if ".attn_1." in key and value.ndim == 2 else value
        for key, value in tensors.items()
    }


def renamed(state, layers, prefix):
    """Every tensor under its new name; none may be left over."""
    tensors, state = {}, dict(state)
    for name, theirs in sorted(layers.items(), key=lambda item: -len(item[1])):
        for key in [key for key in state if key.startswith(f"{theirs}.")]:
            tensors[f"{prefix}{name}{key.removeprefix(theirs)}"] = state.pop(key)
    assert not state
    return tensors


def old_words(model):
    words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for key, value in model.state_dict().items():
        for new, old in words.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        tensors[key] = value.numpy()
    return tensors


def write(path, tensors):
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, path)
    return path


def a_whole_checkpoint(folder, unet, vae):
    rest = {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": np.zeros(
            (1, 7), np.int64
        ),
        "alphas_cumprod": np.ones(1000, np.float32),
        "model_ema.decay": np.ones((), np.float32),
    }
    both = checkpoint_of_unet(arrays_of(unet)) | checkpoint_of_vae(arrays_of(vae))
    return write(folder / "sd15.safetensors", both | rest)


def a_pipeline(folder, unet, vae):
    unet.save_pretrained(folder / "sd15" / "unet")
    vae.save_pretrained(folder / "sd15" / "vae")
    return folder / "sd15"


def imported(kind, source, out):
    assert cli.run(["import", f"--kind={kind}", f"--source={source}", f"--out={out}"]) == 0
    return out


@pytest.mark.parametrize("layout", [a_pipeline, a_whole_checkpoint])
def test_unet_equals_diffusers(tmp_path, unet, vae, layout, capsys):
    out = imported("unet", layout(tmp_path, unet, vae), tmp_path / "out")
    said = capsys.readouterr().out
    assert "--config.init.unet" in said and ("left out" in said) == (layout is a_whole_checkpoint)
    assert ("tells the heads of its attention" in said) == (layout is a_whole_checkpoint)
    assert max(map(len, said.splitlines())) < 600  # not a line of hundreds of keys
    options = TransformerOptions(heads=2, cross_attention_features=CONTEXT)
    network = Network(
        lambda rngs: UNet(
            block_channels=CHANNELS, layers_per_block=LAYERS, options=options, groups=4, rngs=rngs
        )
    )
    _, groups = load_groups(out, {"unet": network.abstract})
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(1, 8, 8, 4)).astype(np.float32)
    context = rng.normal(size=(1, 5, CONTEXT)).astype(np.float32)
    with torch.no_grad():
        expected = unet(
            torch.tensor(latents).permute(0, 3, 1, 2), torch.tensor([300]), torch.tensor(context)
        ).sample
    ours = jax.jit(lambda p, *given: network.bind(p)(*given))(
        groups["unet"], latents, np.array([300]), context
    )
    assert relative_error(ours, expected.permute(0, 2, 3, 1)) <= 1e-4
    sizes = json.loads((out / "model.json").read_text())["config"]["unet"]
    assert (sizes["block_channels"], sizes["layers_per_block"]) == (list(CHANNELS), LAYERS)
    assert (sizes["in_channels"], sizes["context"]) == (4, CONTEXT)


@pytest.mark.parametrize("kind", ["unet", "vae"])
def test_the_names_of_a_whole_checkpoint_are_those_that_diffusers_reads(tmp_path, unet, vae, kind):
    """The files that these tests draw are ours to get wrong; diffusers' own conversion makes its models of them."""
    checkpoint = safetensors.torch.load_file(a_whole_checkpoint(tmp_path, unet, vae))
    model, convert = {
        "unet": (unet, single_file_utils.convert_ldm_unet_checkpoint),
        "vae": (vae, single_file_utils.convert_ldm_vae_checkpoint),
    }[kind]
    converted, expected = convert(checkpoint, model.config), model.state_dict()
    assert converted.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(converted[key], value, rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("config", [True, False])
def test_a_unet_of_stable_diffusion_2_is_refused(tmp_path, config, capsys):
    """Its shapes are taken for SD1.5's, its heads are another number at every level."""
    model = published_unet(
        CHANNELS, LAYERS, heads=(1, 2, 2), context=CONTEXT, groups=4, use_linear_projection=True
    )
    model.save_pretrained(tmp_path / "unet")
    if not config:
        (tmp_path / "unet" / "config.json").unlink()
    out = tmp_path / "out"
    assert cli.run(["import", "--kind=unet", f"--source={tmp_path}", f"--out={out}"]) == 1
    said = capsys.readouterr().err
    told = "[1, 2, 2] heads at its levels" if config else "linear layers about its transformers"
    assert said.count("\n") == 1 and "Stable Diffusion 2 or later" in said and told in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("beside", "told"),
    [
        ({"num_attention_heads": 16, "hidden_size": 1024}, {}),  # CLIP's
        ({"block_out_channels": [8, 16, 16], "attention_head_dim": 4}, {}),
        ({"block_out_channels": CHANNELS, "attention_head_dim": 2}, {"heads": 2}),
        ({"_class_name": "UNet2DConditionModel", "attention_head_dim": 2}, {"heads": 2}),
        ({"_class_name": "UNet3DConditionModel", "attention_head_dim": 2}, {}),
    ],
)
def test_only_a_unets_config_tells_its_heads(tmp_path, unet, vae, beside, told, capsys):
    source = a_whole_checkpoint(tmp_path, unet, vae)
    (tmp_path / "config.json").write_text(json.dumps(beside))
    out = imported("unet", source, tmp_path / "out")
    assert json.loads((out / "model.json").read_text())["config"]["model"]["unet"] == told
    assert ("tells the heads of its attention" in capsys.readouterr().out) == (not told)


def a_vae_alone(folder, unet, vae):
    return write(folder / "vae-ft-mse.safetensors", checkpoint_of_vae(arrays_of(vae), prefix=""))


def a_vae_in_old_words(folder, unet, vae):
    return write(folder / "old.safetensors", old_words(vae))


@pytest.mark.parametrize(
    ("layout", "known_scale"),
    [
        (a_pipeline, 0.25),
        (a_whole_checkpoint, None),
        (a_vae_alone, None),
        (a_vae_in_old_words, None),
    ],
)
def test_autoencoder_equals_diffusers(tmp_path, unet, vae, layout, known_scale, capsys):
    out = imported("vae", layout(tmp_path, unet, vae), tmp_path / "out")
    # SDXL's has the same shapes and another scale: what was taken is told.
    assert ("note: nothing beside" in capsys.readouterr().out) == (known_scale is None)
    settings = json.loads((out / "model.json").read_text())["config"]["model"]["autoencoder"]
    assert settings["scale"] == (known_scale or 0.18215)
    assert settings["latent_channels"] == 4 and settings["layers_per_block"] == 1
    assert tuple(settings["block_channels"]) == VAE_SIZES["block_channels"]
    network = Network(lambda rngs: VAE(**VAE_SIZES, rngs=rngs))
    params = load_groups(out, {"autoencoder": network.abstract})[1]["autoencoder"]
    images = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)

    @jax.jit
    def run(params, images):
        mean, _ = network.bind(params).encode(images)
        return mean, network.bind(params).decode(mean)

    mean, decoded = run(params, images)
    with torch.no_grad():
        expected = vae.encode(torch.tensor(images).permute(0, 3, 1, 2)).latent_dist.mean
        expected_images = vae.decode(expected).sample
    assert relative_error(mean, expected.permute(0, 2, 3, 1)) <= 1e-4
    assert relative_error(decoded, expected_images.permute(0, 2, 3, 1)) <= 1e-4


@pytest.mark.parametrize(
    ("beside", "noted", "scale"),
    [
        ({"_class_name": "UNet2DConditionModel", "norm_num_groups": 8}, True, 0.18215),
        ({"_class_name": "AutoencoderKL", "norm_num_groups": 4}, False, 0.18215),
        ({"scaling_factor": 0.5, "norm_num_groups": 4}, False, 0.5),
        ({"_class_name": "AutoencoderTiny", "scaling_factor": 1.0}, True, 0.18215),
    ],
)
def test_only_an_autoencoders_config_tells_the_scale(
    tmp_path, unet, vae, beside, noted, scale, capsys
):
    """SD1.5's and sd-vae-ft-mse's are older than the scale in it: it is diffusers' default then."""
    source = a_vae_alone(tmp_path, unet, vae)
    (tmp_path / "config.json").write_text(json.dumps(beside))
    out = imported("vae", source, tmp_path / "out")
    assert ("note: nothing beside" in capsys.readouterr().out) == noted
    told = json.loads((out / "model.json").read_text())["config"]["model"]["autoencoder"]
    assert (told["scale"], told["groups"]) == (scale, 32 if noted else 4)


@pytest.mark.parametrize("knob", ["latents_mean", "latents_std"])
def test_an_autoencoder_whose_latents_have_a_scale_each_is_refused(
    tmp_path, unet, vae, knob, capsys
):
    """Playground v2.5's has SDXL's shapes; null, as SDXL's config has them, is nothing."""
    source, out = a_vae_alone(tmp_path, unet, vae), tmp_path / "out"
    told = {"_class_name": "AutoencoderKL", "norm_num_groups": 4, "scaling_factor": 0.5}
    beside = tmp_path / "config.json"
    beside.write_text(json.dumps(told | {knob: [8.4927, 5.9022, 6.5498, 5.2299]}))
    assert cli.run(["import", "--kind=vae", f"--source={source}", f"--out={out}"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Playground" in said and knob in said and not out.exists()
    beside.write_text(json.dumps(told | {knob: None}))
    imported("vae", source, out)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (
            "unet",
            {"model.diffusion_model.middle_block.2.in_layers.0.bias": None},
            ["1 missing", "norm1.bias"],
        ),
        (
            "unet",
            {"model.diffusion_model.what.weight": np.ones(3, np.float32)},
            ["1 extra", "what.weight"],
        ),
        (
            "unet",
            {"model.diffusion_model.out.0.bias": np.ones(3, np.float32)},
            ["1 misshapen", "out.0.bias"],
        ),
        ("unet", {"somebodys.weight": np.ones(3, np.float32)}, ["1 extra", "somebodys.weight"]),
        (
            "vae",
            {"first_stage_model.encoder.mid.attn_1.q.weight": None},
            ["1 missing", "to_q.weight"],
        ),
        ("vae", {"first_stage_model.encoder.up.weight": np.ones(3, np.float32)}, ["1 extra"]),
        (
            "vae",
            {"first_stage_model.decoder.mid.block_1.norm1.bias": np.ones(3, np.float32)},
            ["1 misshapen", "norm1.bias is (3,), expected (16,)"],
        ),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, unet, vae, kind, change, words, capsys):
    tensors = checkpoint_of_unet(arrays_of(unet)) | checkpoint_of_vae(arrays_of(vae))
    for key, value in change.items():
        tensors.pop(key, None)
        if value is not None:
            tensors[key] = value
    source = write(tmp_path / "sd.safetensors", tensors)
    out = tmp_path / "out"
    assert cli.run(["import", f"--kind={kind}", f"--source={source}", f"--out={out}"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(word in said for word in words), said
    assert not out.exists()


@pytest.mark.parametrize(
    "kind", ["unet", "vae", "tiny_autoencoder", "motion_modules", "image_encoder"]
)
def test_something_else_is_one_line(tmp_path, kind, capsys):
    source = write(tmp_path / "other.safetensors", {"layer.weight": np.ones((2, 2), np.float32)})
    out = f"--out={tmp_path / 'out'}"
    assert cli.run(["import", f"--kind={kind}", f"--source={source}", out]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "holds no" in said and "layer.weight" in said or "CLIP" in said


# --- what an animator takes of them -----------------------------------------------------


def sd15_sized(unet, folder, latent_channels=4, **changes):
    """An image stage of the published UNet's sizes, and its export."""
    if not (folder / "unet").exists():
        unet.save_pretrained(folder / "published")
        imported("unet", folder / "published", folder / "unet")
    sizes = {
        "model__unet__block_channels": CHANNELS,
        "model__unet__layers_per_block": LAYERS,
        "model__unet__heads": 2,
        "model__autoencoder__latent_channels": latent_channels,
        "init__unet": folder / "unet",
    }
    config = micro("animator_image", folder / "data", folder / "exports", **(sizes | changes))
    if "init__autoencoder" not in changes:
        networks = {"autoencoder": build_networks(config)["autoencoder"]}
        groups = {
            name: jax.tree.map(np.asarray, n.init(jax.random.key(3)))
            for name, n in networks.items()
        }
        model = {"stage": "autoencoder", "config": {}, "step": 0, "ema": False, "crop": None}
        with config.unlocked():
            config.init.autoencoder = str(export_groups(folder / "latents", model, groups))
    return config


@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize(
    ("injector", "expression"),
    [
        pytest.param("in_block", {"attn_expression": 11}, marks=pytest.mark.exhaustive),
        pytest.param("xnemo", {"expression_modules": 16}, marks=pytest.mark.exhaustive),
    ],
)
def test_both_unets_start_as_the_published_one(tmp_path, unet, capsys, injector, expression):
    """The denoiser with every branch and temporal modules, its reference dropped, says what diffusers says."""
    changes = {
        "model__attn2__attn2": "null_text",
        "model__attn2__cross_attention_features": CONTEXT,
        "model__denoiser__expression_injector": injector,
    }
    config = sd15_sized(unet, tmp_path, **changes)
    task, frames = AnimatorTask(config), 2
    start = task.pretrained()
    assert "start fresh" not in capsys.readouterr().err
    temporal = Network(
        lambda rngs: TemporalModules(**config.model.unet, **config.model.temporal, rngs=rngs)
    )
    denoiser, reference = task.networks["denoiser"], task.networks["reference"]
    params = filled(start["denoiser"], denoiser.init(jax.random.key(0)))
    modules = temporal.init(jax.random.key(1))
    assert_nothing_is_added(params, {"warp_projection": 11} | expression)
    assert_nothing_is_added(modules, {"motion_modules": 16})
    assert_rays_are_not_read(params, latent_channels=4, rays=6)

    rng = np.random.default_rng(1)
    text = rng.normal(size=denoiser.abstract["null_text"].shape).astype(np.float32)
    params["null_text"] = text
    read = filled(start["reference"], random_like(reference.abstract))
    source = rng.normal(size=(1, 8, 8, 4)).astype(np.float32)
    latents = rng.normal(size=(frames, 8, 8, 4)).astype(np.float32)
    timesteps = np.full(frames, 300)
    pose = np.eye(3, 4, dtype=np.float32)[None] * 1.1
    conditions = Conditions(
        reference=jax.jit(lambda p: reference.bind(p)(source))(read),
        source_pose=pose,
        driving_pose=np.concatenate([0.9 * pose, 1.2 * pose]),
        expression=rng.normal(size=(frames, 64)).astype(np.float32),
        keep_reference=np.zeros(frames, np.float32),
    )
    ours = jax.jit(
        lambda p, m, c: denoiser.bind(p)(
            latents, timesteps, c, temporal=temporal.bind(m), frames=frames
        )
    )(params, modules, conditions)
    with torch.no_grad():
        expected = unet(
            torch.tensor(latents).permute(0, 3, 1, 2),
            torch.tensor(timesteps),
            torch.tensor(text).expand(frames, -1, -1),
        ).sample
    assert relative_error(ours, expected.permute(0, 2, 3, 1)) <= 1e-4
    published = unet.state_dict()["mid_block.resnets.1.conv2.weight"].numpy()
    kept = start["reference"]["mid_block"]["resnets"]["1"]["conv2"]["kernel"]
    np.testing.assert_array_equal(kept, published.transpose(2, 3, 1, 0))


def test_without_text_attention_it_is_left_out_and_said(tmp_path, unet, capsys):
    start = AnimatorTask(sd15_sized(unet, tmp_path)).pretrained()
    assert "text attention" in capsys.readouterr().err
    block = start["denoiser"]["down_blocks"]["0"]["attentions"]["0"]["transformer_blocks"]["0"]
    assert "attn1" in block and "attn2" not in block and "norm2" not in block


def test_other_latents_have_convolutions_of_their_own(tmp_path, unet, capsys):
    task = AnimatorTask(sd15_sized(unet, tmp_path, latent_channels=6))
    start = task.pretrained()
    said = capsys.readouterr().err
    assert "latents of 4 channels, here they have 6" in said and said.count("start fresh") == 1
    assert not {"conv_in", "conv_out"} & set(start["denoiser"])
    whole = filled(start["denoiser"], random_like(task.networks["denoiser"].abstract))
    assert whole["conv_in"]["kernel"].shape[2] == 6 + 6  # latents, and two ray maps of 3


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"model__unet__block_channels": (16, 32, 64)},
            "'--config.model.unet.block_channels=(16,32,32)'",
        ),
        (
            {"model__attn2__attn2": "null_text", "model__unet__heads": 4},
            f"--config.model.unet.heads=2 --config.model.attn2.cross_attention_features={CONTEXT}",
        ),
    ],
)
def test_other_sizes_are_options_to_give(tmp_path, unet, changes, told, capsys):
    """All of them at once, and not a list of tensors nor notes before it."""
    config = sd15_sized(unet, tmp_path, **changes)
    capsys.readouterr()
    with pytest.raises(UserError) as caught:
        AnimatorTask(config).pretrained()
    assert str(caught.value).endswith(f"give: {told}")
    assert capsys.readouterr().err == ""


def test_heads_and_noise_of_a_pipeline_are_told(tmp_path, unet, vae, capsys):
    """No shape tells them. Other heads are refused; UNets that go on learning may learn another noise."""
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = diffusers.DDIMScheduler(**noise, prediction_type="v_prediction")
    scheduler.save_pretrained(a_pipeline(tmp_path, unet, vae) / "scheduler")
    out = imported("unet", tmp_path / "sd15", tmp_path / "unet")
    told = json.loads((out / "model.json").read_text())["config"]
    assert told["model"]["unet"] == {"heads": 2, "groups": 4}
    assert told["diffusion"]["prediction"] == "v" and told["diffusion"]["beta_end"] == 0.012
    config = sd15_sized(unet, tmp_path, model__unet__heads=4, diffusion__preset="sd15")
    with pytest.raises(UserError, match=r"give: --config\.model\.unet\.heads=2$"):
        AnimatorTask(config).pretrained()
    config.model.unet.heads = 2
    capsys.readouterr()
    AnimatorTask(config).pretrained()
    said = capsys.readouterr().err
    assert "another noise schedule, --config.diffusion.prediction=v, and have to learn" in said
    with config.unlocked():
        config.diffusion.prediction = "v"
    AnimatorTask(config).pretrained()
    assert "schedule" not in capsys.readouterr().err


@pytest.mark.parametrize("prediction", ["epsilon", None, "v_prediction"])
def test_a_scheduler_that_cannot_be_sampled_with_is_mended_and_said(
    tmp_path, unet, vae, prediction, capsys
):
    """Noise alone, predicted from noise alone, tells nothing: a config that says both is refused."""
    folder = a_pipeline(tmp_path, unet, vae) / "scheduler"
    folder.mkdir()
    told = {"beta_schedule": "scaled_linear", "beta_end": 0.013, "rescale_betas_zero_snr": True}
    told |= {"prediction_type": prediction} if prediction else {}
    (folder / "scheduler_config.json").write_text(json.dumps(told))
    out = imported("unet", tmp_path / "sd15", tmp_path / "unet")
    noted = "rescale_betas_zero_snr" in capsys.readouterr().out
    schedule = json.loads((out / "model.json").read_text())["config"]["diffusion"]
    assert schedule["beta_end"] == 0.013
    assert (noted, "zero_terminal_snr" in schedule) == (
        (False, True) if prediction == "v_prediction" else (True, False)
    )
    AnimatorTask(sd15_sized(unet, tmp_path, diffusion__preset="sd15")).pretrained()


def test_both_unets_start_without_a_copy(tmp_path, unet):
    """SD1.5's is 3.4 GB: a copy for each of them, and one in PyTorch's layout, would be four of it."""
    task = AnimatorTask(sd15_sized(unet, tmp_path))
    _, groups = load_groups(tmp_path / "unet", ["unet"])
    size = sum(leaf.nbytes for _, leaf in flatten(groups["unet"]))
    stable_diffusion.starts(groups["unet"], task.networks, 4, "warm")
    tracemalloc.start()
    stable_diffusion.starts(groups["unet"], task.networks, 4, "import")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 0.3 * size


def test_another_scale_of_the_latents_is_refused(tmp_path, unet, vae):
    vae.save_pretrained(tmp_path / "published_vae")
    imported("vae", tmp_path / "published_vae", tmp_path / "vae")
    changes = {
        "model__autoencoder__block_channels": VAE_SIZES["block_channels"],
        "model__autoencoder__middle_attention": True,
        "init__autoencoder": tmp_path / "vae",
        "init__unet": "",
    }
    with pytest.raises(UserError) as caught:
        AnimatorTask(sd15_sized(unet, tmp_path, **changes)).pretrained()
    told = re.findall(r"--config\.(\S+)=(\S+)", str(caught.value))
    assert told == [("model.autoencoder.scale", "0.25")]
    config = sd15_sized(unet, tmp_path, **changes, model__autoencoder__scale=0.25)
    assert "autoencoder" in AnimatorTask(config).pretrained()


# The job alone in a process, which says how much memory it held at most, in KiB.
# VmHWM and not ru_maxrss: the latter is handed on through fork and exec, so it is at least what the tests hold.
_MEASURED_IMPORT = """
import pathlib, re, sys
from dexportrait_jax import cli
code = cli.run(sys.argv[1:])
print("held", re.search(r"VmHWM:\\s*(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
sys.exit(code)
"""


def a_unet_of_32_bits():
    return real_unet(np.float32)


def a_whole_checkpoint_of_16_bits():
    """SD1.5's; of the rest, which is left where it is, only the size is true."""
    rest = {"first_stage_model.all": 83_653_863, "cond_stage_model.all": 123_060_480}
    tensors = {name: np.zeros(count, np.float16) for name, count in rest.items()}
    return tensors | checkpoint_of_unet(real_unet(np.float16), levels=4)


def real_unet(dtype):
    """SD1.5's tensors; zeros of NumPy hold no memory until they are written."""
    with torch.device("meta"):
        shapes = diffusers.UNet2DConditionModel(cross_attention_dim=768).state_dict()
    return {name: np.zeros(tensor.shape, dtype) for name, tensor in shapes.items()}


@pytest.mark.slow
@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("published", [a_unet_of_32_bits, a_whole_checkpoint_of_16_bits])
def test_import_of_the_real_size_holds_little_memory(tmp_path, published):
    """SD1.5's 859.52 M parameters, 3.4 and 2.1 GB: tensor by tensor, everything of the process counted."""
    file = write(tmp_path / "published.safetensors", published())
    job = ("import", "--kind=unet", f"--source={file}", f"--out={tmp_path / 'unet'}")
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED_IMPORT, *job], capture_output=True, text=True, check=True
    )
    held = int(re.search(r"held (\d+)", done.stdout)[1]) * 1024
    assert "859.52 M parameters" in done.stdout
    assert held < 1.3 * file.stat().st_size
