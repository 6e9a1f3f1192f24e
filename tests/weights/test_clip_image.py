"""`dexportrait import` of CLIP's image encoder: transformers' numbers, alone and out of a whole CLIP."""

import json

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from dexportrait_jax import cli
from dexportrait_jax.models.animator.image_encoder import DEVIATION, MEAN, ImageEncoder
from dexportrait_jax.state import Network
from dexportrait_jax.weights.importing import load_groups
from tests.published import randomise, relative_error

VISION = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
    "projection_dim": 12,
    "hidden_act": "gelu",
}


def alone():
    return randomise(CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)))


def whole():
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text |= {"vocab_size": 20, "max_position_embeddings": 8, "projection_dim": 12}
    return randomise(
        CLIPModel(CLIPConfig(vision_config=VISION, text_config=text, projection_dim=12))
    )


@pytest.mark.parametrize("make", [alone, whole])
def test_equals_transformers(tmp_path, make, capsys):
    model = make()
    model.save_pretrained(tmp_path / "clip" / "image_encoder")  # as a pipeline keeps it
    arguments = [
        "--kind=image_encoder",
        f"--source={tmp_path / 'clip'}",
        f"--out={tmp_path / 'out'}",
    ]
    assert cli.run(["import", *arguments]) == 0
    assert ("text_model" in capsys.readouterr().out) == (make is whole)
    described = json.loads((tmp_path / "out" / "model.json").read_text())
    sizes = described["config"]["model"]["image_encoder"]
    assert sizes == {
        "image_size": 24,
        "patch_size": 8,
        "features": 32,
        "layers": 2,
        "heads": 4,
        "projection": 12,
        "activation": "gelu",
    }
    network = Network(lambda rngs: ImageEncoder(**sizes, rngs=rngs))
    params = load_groups(tmp_path / "out", {"image_encoder": network.abstract})[1]["image_encoder"]
    images = np.random.default_rng(0).uniform(-1, 1, (2, 24, 24, 3)).astype(np.float32)
    seen = torch.tensor(((images + 1) / 2 - MEAN) / DEVIATION).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(seen).pooler_output)
    ours = jax.jit(lambda params, images: network.bind(params)(images))(params, images)
    assert relative_error(ours, expected) <= 1e-4


def test_names_of_openai_are_told_apart(tmp_path, capsys):
    """In a single file of SD's image variations they stand behind a prefix."""
    for number, prefix in enumerate(("", "cond_stage_model.model.")):
        source = tmp_path / f"{number}.safetensors"
        save_file({f"{prefix}visual.proj": np.zeros((4, 4), np.float32)}, source)
        arguments = ["--kind=image_encoder", f"--source={source}", f"--out={tmp_path / 'out'}"]
        assert cli.run(["import", *arguments]) == 1
        assert "visual.*" in (said := capsys.readouterr().err) and "image_encoder" in said
