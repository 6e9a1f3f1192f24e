"""Published weights of CLIP's image encoder with its projection, for attn2 in the mode "clip_image" (method.md 4.1).

Two names for the same layers are known: transformers', which are ours, and those of OpenAI and open_clip (``visual.``),
which single files of SD's image variations also hold (``cond_stage_model.model.visual.``). A whole CLIP or a whole
checkpoint may be given, what else is in it is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from dexportrait_jax.errors import UserError
from dexportrait_jax.models.animator.image_encoder import ImageEncoder
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
_AXES = {_PATCHES: 4, _POSITIONS: 2, _PROJECTION: 2}


def plan(files: TensorFiles) -> ImportPlan:
    """The plan of `--kind=image_encoder`: one group of that name.

    Sizes are read from shapes. How many heads share the channels and the activation stand in a config.json or
    open_clip_config.json beside the weights; without it they are those of OpenAI's, and a note says so. Raises
    UserError when this is no CLIP.
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
    heads, activation, notes = _heads_and_activation(files, features)
    sizes = {
        "image_size": patch * math.isqrt(ours[_POSITIONS][0] - 1),
        "patch_size": patch,
        "features": features,
        "layers": 1 + max((int(match[1]) for match in layers if match), default=-1),
        "heads": heads,
        "projection": ours[_PROJECTION][0],
        "activation": activation,
    }
    # The width of the feed-forward layers is always four times the features here.
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


def _heads_and_activation(files: TensorFiles, features: int) -> tuple[int, str, tuple[str, ...]]:
    """What no shape tells, and a note where nothing beside the weights does."""
    # 64 channels a head, but never more than 16 heads: so are OpenAI's, and also the larger ones of open_clip.
    heads, activation = min(max(features // 64, 1), 16), "quick_gelu"
    if settings := files.settings():
        settings = settings.get("vision_config") or settings
        heads = settings.get("num_attention_heads", heads)
        return heads, settings.get("hidden_act", activation), ()
    if settings := files.settings("open_clip_config.json"):
        settings = settings.get("model_cfg") or settings
        width = (settings.get("vision_cfg") or {}).get("head_width", 64)
        return features // width, "quick_gelu" if settings.get("quick_gelu") else "gelu", ()
    note = (
        f"nothing beside {files.source} tells the heads and the activation of this CLIP; taken are {heads} heads and "
        f"{activation}, as in OpenAI's. Most of open_clip's have gelu: put their open_clip_config.json beside them"
    )
    return heads, activation, (note,)
