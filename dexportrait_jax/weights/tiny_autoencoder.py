"""Published weights of TAESD, TAEF1, TAEF2: tiny autoencoders that give a large one's latents.

Known are the layouts of their own project, encoder and decoder in a file each, keys like ``3.conv.0.weight``, and
diffusers' ``AutoencoderTiny``, one file with ``encoder.layers.3.conv.0.weight``.
"""

from __future__ import annotations

import re

from dexportrait_jax.errors import UserError
from dexportrait_jax.models.animator.tiny_autoencoder import TinyAutoencoder
from dexportrait_jax.state import Network
from dexportrait_jax.weights.kinds import ImportPlan
from dexportrait_jax.weights.published import matched
from dexportrait_jax.weights.tensor_files import TensorFiles

GROUP = "autoencoder"
GROUPS = 4  # of the middle blocks' GroupNorm, which no shape tells


def plan(files: TensorFiles) -> ImportPlan:
    """The plan of `--kind=tiny_autoencoder`: one group, autoencoder. Sizes are read from names and shapes.

    The scale is that of a config.json of such an autoencoder beside the weights, or 1. Raises UserError when either
    half is missing, or this is no such autoencoder.
    """
    ours = {_translate(key): shape for key, shape in files.shapes.items()}
    first, latents = "encoder.layers.0.weight", "decoder.layers.0.weight"
    absent = [key for key in (first, latents) if key not in ours]
    if absent:
        half = absent[0].partition(".")[0]
        raise UserError(
            f"{files.source} holds no {half} of a tiny autoencoder: its first key is {min(files.shapes)}; give a "
            "folder with both halves, NAME_encoder.safetensors and NAME_decoder.safetensors"
        )
    # A level begins with a convolution, without bias, that stands alone.
    kinds = [_kind(number, ours) for number in range(_length("encoder", ours))]
    levels = 1 + kinds.count("halving")
    last = max((n for n, kind in enumerate(kinds) if kind == "halving"), default=0)
    width = ours[first][0]
    told = files.settings()
    if told.get("_class_name", "AutoencoderTiny") != "AutoencoderTiny":
        told = {}  # the scale of the large one, whose latents these are without it
    sizes = {
        "kind": "tiny",
        "latent_channels": ours[latents][1],
        "block_channels": [width] * levels,
        "layers_per_block": kinds[last:].count("block"),
        "groups": GROUPS,
        "scale": told.get("scaling_factor", 1.0),
        "middle_attention": any(".pool." in key for key in ours),
    }
    settings = {name: value for name, value in sizes.items() if name != "kind"}
    abstract = Network(lambda rngs: TinyAutoencoder(**settings, rngs=rngs)).abstract
    found, left_out = matched(files, abstract, _translate)
    return ImportPlan({GROUP: (abstract, found)}, {"model": {GROUP: sizes}}, left_out)


def _length(half: str, keys) -> int:
    numbers = [re.match(rf"{half}\.layers\.(\d+)\.", key) for key in keys]
    return 1 + max((int(match[1]) for match in numbers if match), default=-1)


def _kind(number: int, keys) -> str:
    stem = f"encoder.layers.{number}"
    if f"{stem}.conv.0.weight" in keys:
        return "block"
    return "convolution" if f"{stem}.bias" in keys else "halving"


def _translate(key: str) -> str:
    match = re.fullmatch(r"(encoder|decoder)\.(\d+)\.(.+)", key)
    if match is None:
        return key
    # Its own project begins the decoder with the bending of latents, which has no weights.
    number = int(match[2]) - (match[1] == "decoder")
    return f"{match[1]}.layers.{number}.{match[3]}"
