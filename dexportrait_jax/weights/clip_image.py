"""Published weights of CLIP's image encoder with its projection, for attn2 in the mode "clip_image" (method.md 4.1).

Two names for the same layers are known: transformers', which are ours, and those of OpenAI and open_clip (``visual.``),
which single files of SD's image variations also hold (``cond_stage_model.model.visual.``). A whole CLIP or a whole
checkpoint may be given, what else is in it is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from dexportrait_jax.errors import UserError
from dexportrait_jax.models.animator.image_encoder import ACTIVATIONS, ImageEncoder
from dexportrait_jax.state import Network
from dexportrait_jax.weights.kinds import ImportPlan
from dexportrait_jax.weights.published import matched
from dexportrait_jax.weights.tensor_files import TensorFiles, View

GROUP = "image_encoder"
_NOT_NEEDED = (
    r"text_model\..*|text_projection\..*|logit_scale|vision_model\.embeddings\.position_ids"
)
_OPENAI = re.compile(r"((?:.*\.)?visual\.)conv1\.weight")
_OPENAI_RULES = (
    (r"^conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^ln_post\.", "vision_model.post_layernorm."),
    (r"^proj\.T$", "visual_projection.weight"),
    (r"^transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.attn\.in_proj_(weight|bias)\.([qkv])$", r".self_attn.\2_proj.\1"),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
_PATCHES = "vision_model.embeddings.patch_embedding.weight"
_POSITIONS = "vision_model.embeddings.position_embedding.weight"
_PROJECTION = "visual_projection.weight"
_INNER = "vision_model.encoder.layers.0.mlp.fc1.weight"
# transformers' words for what a config says of a vision transformer.
_OF_TRANSFORMERS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "features",
    "num_hidden_layers": "layers",
    "intermediate_size": "feed_forward",
    "num_attention_heads": "heads",
    "hidden_act": "activation",
}
_AXES = {_PATCHES: 4, _POSITIONS: 2, _PROJECTION: 2}


def plan(files: TensorFiles) -> ImportPlan:
    """The plan of `--kind=image_encoder`: one group of that name.

    Sizes are read from shapes. How many heads share the channels and the activation stand in a config.json or
    open_clip_config.json beside the weights; without one of these sizes they are those of OpenAI's, and a note says
    so. Raises UserError when this is no CLIP, or one of an activation that is not known here.
    """
    files, translate = _read_as_ours(files)
    ours = {translate(key): shape for key, shape in files.shapes.items()}
    absent = [key for key, axes in _AXES.items() if len(ours.get(key, ())) != axes]
    if absent:
        raise UserError(
            f"{files.source} holds no image encoder of CLIP with its projection: {', '.join(absent)} is not in it, "
            f"its first key is {min(files.shapes)}; give CLIPVisionModelWithProjection, a whole CLIPModel, or a vision "
            "transformer of OpenAI's or open_clip's"
        )
    features, _, _, patch = ours[_PATCHES]
    layers = [re.match(r"vision_model\.encoder\.layers\.(\d+)\.", key) for key in ours]
    sizes = {
        "image_size": patch * math.isqrt(ours[_POSITIONS][0] - 1),
        "patch_size": patch,
        "features": features,
        "layers": 1 + max((int(match[1]) for match in layers if match), default=-1),
        "feed_forward": ours.get(_INNER, (4 * features,))[0],
        "projection": ours[_PROJECTION][0],
    }
    heads, activation, notes = _heads_and_activation(files, sizes)
    if activation not in ACTIVATIONS:
        raise UserError(
            f"{files.source} is a CLIP with the activation {activation}; known are {', '.join(ACTIVATIONS)}: give one "
            "that has one of these"
        )
    sizes |= {"heads": heads, "activation": activation}
    if sizes["feed_forward"] == 4 * features:  # as a config says it
        sizes["feed_forward"] = None
    network = Network(lambda rngs: ImageEncoder(**sizes, rngs=rngs))
    found, left_out = matched(files, network.abstract, translate)
    config = {"model": {GROUP: sizes}}
    return ImportPlan({GROUP: (network.abstract, found)}, config, left_out, notes, files)


def _read_as_ours(files: TensorFiles) -> tuple[TensorFiles, Callable[[str], str]]:
    """The tensors in our shapes, and published key -> our key in PyTorch's form; "" for what is not needed."""
    prefixes = [match[1] for key in files.shapes if (match := _OPENAI.fullmatch(key))]
    if _PATCHES in files.shapes or not prefixes:
        return files, lambda key: "" if re.fullmatch(_NOT_NEEDED, key) else key
    prefix = min(prefixes, key=len)
    views = {}
    for key in files.shapes:
        # Queries, keys and values are one tensor there, and the projection is multiplied from the other side.
        if key.startswith(prefix) and re.search(r"\.attn\.in_proj_(weight|bias)$", key):
            views |= {f"{key}.{name}": View(key, part, 3) for part, name in enumerate("qkv")}
        elif key == f"{prefix}proj":
            views[f"{key}.T"] = View(key, transposed=True)

    def translate(key: str) -> str:
        if not key.startswith(prefix):
            return ""
        key = key.removeprefix(prefix)
        for pattern, replacement in _OPENAI_RULES:
            key = re.sub(pattern, replacement, key)
        return key

    return files.seen_as(views), translate


def _heads_and_activation(
    files: TensorFiles, sizes: Mapping[str, int]
) -> tuple[int, str, tuple[str, ...]]:
    """What no shape tells, and a note where nothing beside the weights does."""
    # 64 channels a head, but never more than 16 heads: so are OpenAI's, and also the larger ones of open_clip.
    heads, activation = min(max(sizes["features"] // 64, 1), 16), "quick_gelu"
    beside = {"config.json": _of_transformers, "open_clip_config.json": _of_open_clip}
    others = []
    for name, read in beside.items():
        told = read(files.settings(name), sizes["features"])
        if any(told[size] != sizes[size] for size in told.keys() & sizes.keys()):
            others.append(name)
        elif "heads" in told:
            return told["heads"], told.get("activation", activation), ()
    why = f", {' and '.join(others)} there is of another model" if others else ""
    note = (
        f"nothing beside {files.source} tells the heads and the activation of this CLIP{why}; taken are {heads} heads "
        f"and {activation}, as in OpenAI's. Most of open_clip's have gelu: put their open_clip_config.json beside them"
    )
    return heads, activation, (note,)


def _of_transformers(settings: Mapping[str, Any], _: int) -> dict[str, Any]:
    """What a config.json says of a vision transformer, in our words; that of a text model says nothing."""
    settings = settings.get("vision_config") or settings
    if "text" in str(settings.get("model_type")):
        return {}
    return {
        ours: settings[theirs] for theirs, ours in _OF_TRANSFORMERS.items() if theirs in settings
    }


def _of_open_clip(settings: Mapping[str, Any], features: int) -> dict[str, Any]:
    """What an open_clip_config.json says; what it leaves out has open_clip's default."""
    settings = settings.get("model_cfg") or settings
    vision = settings.get("vision_cfg")
    if not vision:
        return {}
    width = vision.get("width", features)
    known = {
        name: vision[name] for name in ("image_size", "patch_size", "layers") if name in vision
    }
    return known | {
        "features": width,
        "heads": width // vision.get("head_width", 64),
        "feed_forward": int(width * vision.get("mlp_ratio", 4.0)),
        "activation": "quick_gelu" if settings.get("quick_gelu") else "gelu",
    }
