"""`dexportrait import` of CLIP's image encoder: transformers' numbers, in its own names and in OpenAI's."""

import json
import tracemalloc

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from dexportrait_jax import cli
from dexportrait_jax.models.animator.image_encoder import DEVIATION, MEAN, ImageEncoder
from dexportrait_jax.state import Network
from dexportrait_jax.weights import clip_image, published
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
SIZES = {
    "image_size": 24,
    "patch_size": 8,
    "features": 32,
    "layers": 2,
    "heads": 4,
    "feed_forward": None,
    "projection": 12,
    "activation": "gelu",
}
IN_A_CHECKPOINT = "cond_stage_model.model.visual."


def alone(**changes):
    return randomise(CLIPVisionModelWithProjection(CLIPVisionConfig(**(VISION | changes))))


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


def openai_names(model, prefix="visual."):
    """The weights as OpenAI's code and open_clip name and lay them."""
    words = {
        "vision_model.embeddings.patch_embedding.": "conv1.",
        "vision_model.embeddings.class_embedding": "class_embedding",
        "vision_model.embeddings.position_embedding.weight": "positional_embedding",
        "vision_model.pre_layrnorm.": "ln_pre.",
        "vision_model.post_layernorm.": "ln_post.",
        "vision_model.encoder.layers.": "transformer.resblocks.",
        ".self_attn.out_proj.": ".attn.out_proj.",
        ".layer_norm": ".ln_",
        ".fc1.": ".c_fc.",
        ".fc2.": ".c_proj.",
    }
    state, tensors = model.state_dict(), {}
    for key, value in state.items():
        if key == "visual_projection.weight":
            tensors["proj"] = value.T
        elif ".q_proj." in key:
            three = [state[key.replace(".q_proj.", f".{name}_proj.")] for name in "qkv"]
            tensors[key.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(three)
        elif ".k_proj." not in key and ".v_proj." not in key and "position_ids" not in key:
            tensors[key] = value
    for ours, theirs in words.items():
        tensors = {key.replace(ours, theirs): value for key, value in tensors.items()}
    return {f"{prefix}{key}": value.contiguous().numpy() for key, value in tensors.items()}


class PublishedBlock(torch.nn.Module):
    """A layer as OpenAI's model.py states it: torch's own attention has the three matrices in one."""

    def __init__(self, width, heads):
        super().__init__()
        nn = torch.nn
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x):
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class PublishedTransformer(torch.nn.Module):
    """The vision transformer of OpenAI's model.py; what has no module there is a parameter."""

    def __init__(self, image, patch, width, layers, heads, projection):
        super().__init__()
        nn = torch.nn
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((image // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(
            *(PublishedBlock(width, heads) for _ in range(layers))
        )
        self.proj = nn.Parameter(torch.zeros(width, projection))

    def forward(self, x):
        x = self.conv1(x).flatten(2).permute(0, 2, 1)
        first = self.class_embedding.expand(len(x), 1, -1)
        x = self.ln_pre(torch.cat([first, x], dim=1) + self.positional_embedding)
        x = self.transformer.resblocks(x.permute(1, 0, 2))  # there the tokens come first
        return self.ln_post(x[0]) @ self.proj


def pictures():
    """Ours, in [-1, 1], and as CLIP sees them."""
    images = np.random.default_rng(0).uniform(-1, 1, (2, 24, 24, 3)).astype(np.float32)
    return images, torch.tensor(((images + 1) / 2 - MEAN) / DEVIATION).permute(0, 3, 1, 2).float()


def embeddings(model):
    with torch.no_grad():
        return model.visual_projection(model.vision_model(pictures()[1]).pooler_output)


def imported(source, out):
    """What `import` tells of the sizes, and what the weights make of the pictures."""
    assert cli.run(["import", "--kind=image_encoder", f"--source={source}", f"--out={out}"]) == 0
    sizes = json.loads((out / "model.json").read_text())["config"]["model"]["image_encoder"]
    network = Network(lambda rngs: ImageEncoder(**sizes, rngs=rngs))
    params = load_groups(out, {"image_encoder": network.abstract})[1]["image_encoder"]
    ours = jax.jit(lambda params, images: network.bind(params)(images))(params, pictures()[0])
    return sizes, ours


@pytest.mark.parametrize("make", [alone, whole])
def test_equals_transformers(tmp_path, make, capsys):
    model = make()
    model.save_pretrained(tmp_path / "clip" / "image_encoder")  # as a pipeline keeps it
    sizes, ours = imported(tmp_path / "clip", tmp_path / "out")
    said = capsys.readouterr().out
    assert ("text_model" in said) == (make is whole) and "note: " not in said
    assert sizes == SIZES
    assert relative_error(ours, embeddings(model)) <= 1e-4


def test_openais_names_are_those_of_its_modules():
    """The renaming of the tests below is ours to get wrong: modules as published take all of it, and agree."""
    model = alone()
    published_form = PublishedTransformer(24, 8, 32, 2, 4, 12)
    tensors = {key: torch.tensor(value) for key, value in openai_names(model, "").items()}
    published_form.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        found = published_form(pictures()[1])
    assert relative_error(found, embeddings(model)) <= 1e-4


def test_openais_names_with_open_clips_config(tmp_path, capsys):
    """A whole CLIP of open_clip: the text tower's names have no prefix there."""
    model = alone()
    text = {"text_projection": (4, 12), "transformer.resblocks.0.ln_1.bias": (4,)}
    rest = {key: np.ones(shape, np.float32) for key, shape in text.items()}
    save_file(openai_names(model) | rest, tmp_path / "open_clip_model.safetensors")
    told = {"model_cfg": {"embed_dim": 12, "vision_cfg": {"head_width": 8, "width": 32}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(told))
    sizes, ours = imported(tmp_path / "open_clip_model.safetensors", tmp_path / "out")
    said = capsys.readouterr().out
    assert "note: " not in said
    assert "left out, not needed: text_projection, transformer.resblocks.0.ln_1.bias\n" in said
    assert sizes == SIZES
    assert relative_error(ours, embeddings(model)) <= 1e-4


def test_openais_names_in_a_whole_checkpoint(tmp_path, capsys):
    """A single file of SD's image variations; nothing beside it tells what shapes do not, so a line does."""
    model = alone(num_attention_heads=1, hidden_act="quick_gelu")
    rest = {
        key: np.ones(3, np.float32)
        for key in ("model.diffusion_model.out.0.bias", "cond_stage_model.model.ln_final.bias")
    }
    source = tmp_path / "sd-image-variations.safetensors"
    save_file(openai_names(model, IN_A_CHECKPOINT) | rest, source)
    sizes, ours = imported(source, tmp_path / "out")
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert "1 heads and quick_gelu" in note and "open_clip_config.json" in note
    assert sizes == SIZES | {"heads": 1, "activation": "quick_gelu"}
    assert relative_error(ours, embeddings(model)) <= 1e-4


def test_openais_names_are_read_one_tensor_at_a_time(tmp_path):
    """The thirds of a tensor, too: with all of the file in memory this is more than the file."""
    large = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12}
    source = tmp_path / "clip.safetensors"
    save_file(openai_names(alone(**large)), source)
    published.run_import("image_encoder", str(source), str(tmp_path / "warm"))
    tracemalloc.start()
    published.run_import("image_encoder", str(source), str(tmp_path / "out"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 0.3 * source.stat().st_size


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1024, 16), (1280, 16)])
def test_heads_where_nothing_tells_them(width, heads):
    """ViT-B and ViT-L have 64 channels a head, ViT-H has 80."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**(VISION | sizes)))

    class Files:  # shapes are all that a plan looks at
        source = "clip"
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}

        def settings(self, name="config.json"):
            return {}

    found = clip_image.plan(Files()).config["model"]["image_encoder"]
    assert (found["heads"], found["features"]) == (heads, width)


def open_clips_config(folder, **vision):
    told = {"vision_cfg": {"head_width": 8, "width": 32, "layers": 2, **vision}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": told}))


@pytest.mark.parametrize("named", ["transformers", "openai"])
def test_another_width_of_the_feed_forward_layers(tmp_path, named, capsys):
    """As open_clip's ViT-g and bigG have it: 4.9231 times 1664 is 8192."""
    model = alone(intermediate_size=157)
    if named == "transformers":
        model.save_pretrained(tmp_path / "clip")
    else:
        (tmp_path / "clip").mkdir()
        save_file(openai_names(model), tmp_path / "clip" / "open_clip_model.safetensors")
        open_clips_config(tmp_path / "clip", mlp_ratio=4.9231)
    sizes, ours = imported(tmp_path / "clip", tmp_path / "out")
    assert sizes == SIZES | {"feed_forward": 157}
    assert "note: " not in capsys.readouterr().out
    assert relative_error(ours, embeddings(model)) <= 1e-4


def test_the_feed_forward_layers_of_open_clips_large_ones():
    for width, ratio, inner in ((1408, 4.3637, 6144), (1664, 4.9231, 8192)):
        told = {"vision_cfg": {"width": width, "head_width": width // 16, "mlp_ratio": ratio}}
        found = clip_image._of_open_clip(told, width)
        assert (found["heads"], found["feed_forward"]) == (16, inner)


@pytest.mark.parametrize(
    ("other", "contradicts"),
    [
        ({"_class_name": "StableDiffusionPipeline"}, False),
        ({"model_type": "clip_text_model", "hidden_size": 32, "num_attention_heads": 2}, False),
        ({"hidden_size": 64, "num_attention_heads": 2, "hidden_act": "gelu"}, True),
        ({"vision_config": {"patch_size": 16, "num_attention_heads": 2}}, True),
        ({"vision_config": {"hidden_size": 32, "patch_size": 8}}, False),
    ],
)
def test_a_config_that_does_not_tell_the_heads_of_these_weights_is_not_believed(
    tmp_path, other, contradicts, capsys
):
    save_file(openai_names(alone()), tmp_path / "clip.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(other))
    sizes, _ = imported(tmp_path / "clip.safetensors", tmp_path / "out")
    said = capsys.readouterr().out
    assert (sizes["heads"], sizes["activation"]) == (1, "quick_gelu")
    assert "tells the heads and the activation of this CLIP" in said
    assert ("config.json there is of another model" in said) == contradicts
    open_clips_config(tmp_path)  # beside the other one, and of these weights
    sizes, _ = imported(tmp_path / "clip.safetensors", tmp_path / "more")
    assert (sizes["heads"], sizes["activation"]) == (4, "gelu")
    assert "note: " not in capsys.readouterr().out


def test_an_activation_that_is_not_known_is_one_line(tmp_path, capsys):
    alone(hidden_act="relu").save_pretrained(tmp_path / "clip")
    out = tmp_path / "out"
    capsys.readouterr()
    arguments = ["import", "--kind=image_encoder", f"--source={tmp_path / 'clip'}", f"--out={out}"]
    assert cli.run(arguments) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "activation relu; known are quick_gelu, gelu" in said
    assert not out.exists()
