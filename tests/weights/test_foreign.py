"""Files that are something else: one line says what they are and what to do; nothing is written."""

import io

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import save_file

from dexportrait_jax import cli
from dexportrait_jax.errors import UserError
from dexportrait_jax.weights.tensor_files import TensorFiles

TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
MOTION_TO_Q = "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.to_q"


@pytest.fixture
def said(tmp_path, capsys):
    """The one line of an import that must fail."""

    def run(kind, content):
        source = tmp_path / "x.safetensors"
        if isinstance(content, bytes):
            source.write_bytes(content)
        else:
            ones = {key: np.ones(shape, np.float32) for key, shape in content.items()}
            save_file(ones, source)
        arguments = ["import", f"--kind={kind}", f"--source={source}", f"--out={tmp_path / 'out'}"]
        capsys.readouterr()
        assert cli.run(arguments) == 1
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and sorted(tmp_path.iterdir()) == [source]
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("kind", "key", "word"),
    [
        ("unet", "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA"),
        ("unet", f"unet.{TO_Q}.lora_A.weight", "a LoRA"),
        ("motion_modules", f"{MOTION_TO_Q}_lora.down.weight", "a LoRA"),
        ("unet", "add_embedding.linear_1.weight", "SDXL"),
        ("unet", "model.diffusion_model.label_emb.0.0.weight", "SDXL"),
        ("unet", "controlnet_cond_embedding.conv_in.weight", "a ControlNet"),
        ("unet", "model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "transformer"),
        ("unet", "down_blocks.0.motion_modules.0.norm.weight", "--kind=motion_modules"),
        ("unet", "decoder.mid_block.resnets.0.norm1.weight", "--kind=vae"),
        ("unet", f"{TO_Q}.weight.absmax", "quantised"),
        ("vae", "encoder.layers.0.weight", "--kind=tiny_autoencoder"),
        ("tiny_autoencoder", "encoder.down.0.block.0.norm1.weight", "--kind=vae"),
        ("image_encoder", "vision_model.embeddings.patch_embedding.bias", "SigLIP"),
        ("image_encoder", "image_proj.proj.weight", "an IP-Adapter"),
        ("convnextv2", "encoder.stages.0.layers.0.layer_scale_parameter", "first version"),
    ],
)
def test_weights_of_another_family(said, kind, key, word):
    line = said(kind, {key: (2,)})
    assert word in line and key in line and f"--kind={kind} takes " in line


def test_a_checkpoint_with_a_few_changes_in_it_is_no_lora(said):
    keys = {f"layer{number}.weight": (2,) for number in range(3)}
    assert "LoRA" not in said("unet", keys | {"lora_unet_x.alpha": ()})


@pytest.mark.parametrize(
    ("begins", "word"),
    [
        (b"GGUF\3\0\0\0", "a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"\x89HDF\r\n", "an HDF5 file"),
        (b"", "it is empty"),
        (b"anything else that is long enough", "damaged, cut short, or another format"),
    ],
)
def test_other_formats_under_the_name(said, begins, word):
    line = said("unet", begins + b" " * 40 if begins else b"")
    assert word in line and "cannot be read as safetensors" in line


def test_the_conversion_of_a_pickle_by_another_name_keeps_it(said):
    stream = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, stream)
    line = said("unet", stream.getvalue())
    assert "is a pickle" in line and "x_converted.safetensors" in line


@pytest.mark.parametrize(("channels", "word"), [(9, "inpainting"), (8, "editing"), (5, "depth")])
def test_a_unet_that_takes_more_than_latents(said, channels, word):
    line = said(
        "unet",
        {
            "conv_in.weight": (8, channels, 3, 3),
            "conv_out.weight": (4, 8, 3, 3),
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (8, 6),
            "down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3),
        },
    )
    assert word in line and f"takes {channels} channels" in line and "SD1.5" in line


def test_an_autoencoder_without_quant_conv(said):
    tensors = {
        "encoder.down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3),
        "decoder.conv_in.weight": (8, 16, 3, 3),
    }
    line = said("vae", tensors)
    assert "SD3's or Flux's" in line and "16 channels" in line


@pytest.mark.parametrize(("dtype", "code"), [("int8", "I8"), ("float8_e4m3fn", "F8_E4M3")])
def test_types_that_are_no_weights(tmp_path, dtype, code):
    source = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2, dtype=getattr(torch, dtype))}, source)
    with pytest.raises(UserError, match=f"a in .* has type {code}; weights are F32, F16"):
        TensorFiles(source).dtype("a")
