"""Published weights of CLIP's image encoder with its projection, for attn2 in the mode "clip_image" (method.md 4.1).

transformers' names, which are ours; a whole CLIP may be given, its text tower is left out.
"""

from __future__ import annotations

import math
import re

from dexportrait_jax.errors import UserError
from dexportrait_jax.models.animator.image_encoder import ImageEncoder
from dexportrait_jax.state import Network
from dexportrait_jax.weights.kinds import ImportPlan
from dexportrait_jax.weights.published import matched
from dexportrait_jax.weights.tensor_files import TensorFiles

GROUP = "image_encoder"
_NOT_NEEDED = (
    r"text_model\..*|text_projection\..*|logit_scale|vision_model\.embeddings\.position_ids"
)
# Queries, keys and values are one tensor there, and the projection lies the other way.
_OPENAI = re.compile(r"(^|\.)visual\.(conv1\.weight|proj)$")
_NEEDED = (
    "vision_model.embeddings.patch_embedding.weight",
    "vision_model.embeddings.position_embedding.weight",
    "visual_projection.weight",
)


def plan(files: TensorFiles) -> ImportPlan:
    """The plan of `--kind=image_encoder`: one group of that name.

    Sizes are read from shapes. How many heads share the channels and the activation stand in a config.json beside
    the weights; without it they are OpenAI's: 64 channels a head, quick_gelu. Raises UserError when this is no CLIP.
    """
    absent = [key for key in _NEEDED if key not in files.shapes]
    if absent and any(_OPENAI.search(key) for key in files.shapes):
        raise UserError(
            f"{files.source} holds CLIP in the names of OpenAI and open_clip (visual.*), as single files of SD's image "
            "variations do; they are not read: give the folder image_encoder of the same model in diffusers' "
            "layout, or CLIPVisionModelWithProjection of transformers, saved as safetensors"
        )
    if absent:
        raise UserError(
            f"{files.source} holds no image encoder of CLIP with its projection: {', '.join(absent)} is not in it; "
            "give CLIPVisionModelWithProjection or a whole CLIPModel"
        )
    features, _, _, patch = files.shapes[_NEEDED[0]]
    settings = files.settings()
    settings = settings.get("vision_config") or settings
    layers = [re.match(r"vision_model\.encoder\.layers\.(\d+)\.", key) for key in files.shapes]
    sizes = {
        "image_size": patch * math.isqrt(files.shapes[_NEEDED[1]][0] - 1),
        "patch_size": patch,
        "features": features,
        "layers": 1 + max((int(match[1]) for match in layers if match), default=-1),
        "heads": settings.get("num_attention_heads", max(features // 64, 1)),
        "projection": files.shapes[_NEEDED[2]][0],
        "activation": settings.get("hidden_act", "quick_gelu"),
    }
    # The width of the feed-forward layers is always four times the features here.
    network = Network(lambda rngs: ImageEncoder(**sizes, rngs=rngs))
    found, left_out = matched(
        files, network.abstract, lambda key: "" if re.fullmatch(_NOT_NEEDED, key) else key
    )
    return ImportPlan({GROUP: (network.abstract, found)}, {"model": {GROUP: sizes}}, left_out)
