"""`dexportrait import` of every kind and layout: what is missing, extra or misshapen, and pickles, in one line.

UNet and autoencoder are in test_stable_diffusion.py, ConvNeXtV2 in test_published.py, LPIPS in test_lpips_names.py.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from dexportrait_jax import cli
from dexportrait_jax.weights.kinds import KINDS
from tests.weights import test_animatediff, test_clip_image, test_tiny_autoencoder


class Layout(NamedTuple):
    """A published file or folder, a key of it to damage, and ours for it, which a missing one is called."""

    kind: str
    write: Callable[[Path], Path]  # into a folder; gives the source
    key: str
    ours: str


def adapter(folder):
    return test_animatediff.as_adapter(test_animatediff.adapter(), folder)


def animatediff(folder):
    return test_animatediff.as_published(test_animatediff.adapter(), folder)


def clip(folder):
    test_clip_image.alone().save_pretrained(folder / "clip")
    return folder / "clip"


def openai(folder):
    tensors = test_clip_image.openai_names(test_clip_image.alone())
    save_file(tensors, folder / "clip.safetensors")
    return folder / "clip.safetensors"


def tiny(folder):
    return test_tiny_autoencoder.as_folder(test_tiny_autoencoder.drawn(), folder)


def tiny_halves(folder):
    (folder / "halves").mkdir()
    return test_tiny_autoencoder.as_two_files(test_tiny_autoencoder.drawn(), folder / "halves")


_MODULE = "down_blocks.0.motion_modules.0."
_BLOCK = "transformer_blocks.0."
_LAYER = "vision_model.encoder.layers.1."
LAYOUTS = {
    "adapter": Layout(
        "motion_modules",
        adapter,
        f"{_MODULE}{_BLOCK}attn2.to_k.weight",
        f"{_MODULE}{_BLOCK}attn2.to_k.weight",
    ),
    "animatediff": Layout(
        "motion_modules",
        animatediff,
        f"{_MODULE}temporal_transformer.{_BLOCK}attention_blocks.1.to_k.weight",
        f"{_MODULE}{_BLOCK}attn2.to_k.weight",
    ),
    "clip": Layout(
        "image_encoder",
        clip,
        f"{_LAYER}self_attn.k_proj.weight",
        f"{_LAYER}self_attn.k_proj.weight",
    ),
    "openai": Layout(
        "image_encoder",
        openai,
        "visual.transformer.resblocks.1.mlp.c_fc.weight",
        f"{_LAYER}mlp.fc1.weight",
    ),
    "tiny": Layout(
        "tiny_autoencoder", tiny, "decoder.layers.3.conv.2.bias", "decoder.layers.3.conv.2.bias"
    ),
    "tiny_halves": Layout(
        "tiny_autoencoder", tiny_halves, "1.conv.2.bias", "encoder.layers.1.conv.2.bias"
    ),
}


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs an import that must fail; returns its line, and checks that nothing was written."""

    def run(kind, source):
        out = tmp_path / "out"
        capsys.readouterr()
        assert cli.run(["import", f"--kind={kind}", f"--source={source}", f"--out={out}"]) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and not out.exists()
        return said

    return run


def damage(source, key, value=None, beside=None):
    """Puts `value`, or with None nothing, in the place of the tensor `key`, or beside it under another name."""
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    file, tensors = next(
        (file, tensors) for file in files if key in (tensors := dict(load_file(file)))
    )
    if beside is None:
        del tensors[key]
    if value is not None:
        tensors[beside or key] = value
    save_file(tensors, file)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_missing_tensor(tmp_path, layout, refused):
    source = layout.write(tmp_path)
    damage(source, layout.key)
    said = refused(layout.kind, source)
    assert f"1 missing: {layout.ours}." in said and "extra" not in said and "missh" not in said


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_an_extra_tensor(tmp_path, layout, refused):
    """Beside one that is known, where no layout keeps anything else."""
    source = layout.write(tmp_path)
    beside = layout.key.rpartition(".")[0] + ".somebodys"
    damage(source, layout.key, np.ones(3, np.float32), beside=beside)
    said = refused(layout.kind, source)
    assert f"1 extra: {'encoder.' * (layout.write is tiny_halves)}{beside}." in said
    assert "missing" not in said and "misshapen" not in said


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_misshapen_tensor(tmp_path, layout, refused):
    source = layout.write(tmp_path)
    damage(source, layout.key, np.ones((7, 5), np.float32))
    said = refused(layout.kind, source)
    assert "1 misshapen: " in said and f"{layout.key} is (7, 5), expected (" in said
    assert "missing" not in said and "extra" not in said


def test_openais_attention_that_is_no_three_matrices(tmp_path, refused):
    """97 rows are no three times 32."""
    source = openai(tmp_path)
    key = "visual.transformer.resblocks.0.attn.in_proj_weight"
    damage(source, key, np.ones((97, 32), np.float32))
    said = refused("image_encoder", source)
    assert f"1 misshapen: {key}.v is (33, 32), expected (32, 32)." in said
    damage(source, key)
    said = refused("image_encoder", source)
    assert "3 missing: vision_model.encoder.layers.0.self_attn.k_proj.weight, " in said


def test_openais_other_networks(tmp_path, refused):
    """CLIP's ResNets have no tokens; some of open_clip's cut patches by a linear layer."""
    names = {"visual.conv1.weight": (4, 3, 3, 3), "visual.attnpool.positional_embedding": (9, 4)}
    resnet = {key: np.ones(shape, np.float32) for key, shape in names.items()}
    save_file(resnet, tmp_path / "resnet.safetensors")
    said = refused("image_encoder", tmp_path / "resnet.safetensors")
    assert "holds no image encoder of CLIP" in said and "position_embedding" in said
    source = openai(tmp_path)
    damage(source, "visual.conv1.weight", np.ones((32, 192), np.float32))
    said = refused("image_encoder", source)
    assert "patch_embedding.weight is not in it" in said


class _Touches:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_is_not_opened(tmp_path, kind, refused):
    """A file, and the folder of a pipeline that holds one; opening it would leave a trace."""
    trace = tmp_path / "trace"
    folder = tmp_path / "pipeline" / KINDS[kind].folder
    folder.mkdir(parents=True)
    torch.save({"a": torch.zeros(2), "b": _Touches(trace)}, folder / "pytorch_model.bin")
    shutil.copy(folder / "pytorch_model.bin", tmp_path / "encoder_decoder.ckpt")
    for source in (tmp_path / "pipeline", tmp_path / "encoder_decoder.ckpt"):
        said = refused(kind, source)
        assert "is a pickle" in said and "weights_only=True" in said
    assert not trace.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert trace.exists()  # it is one that leaves a trace
