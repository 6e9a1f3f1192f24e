"""Published weights of Stable Diffusion's autoencoder (method.md 4.1).

Known are diffusers' names, with its newer and its older words for the attention, and those of the checkpoints that
hold the autoencoder alone (``encoder.down.0.block...``) or a whole Stable Diffusion (``first_stage_model.``).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from dexportrait_jax.errors import UserError
from dexportrait_jax.models.animator.vae import VAE
from dexportrait_jax.state import Network
from dexportrait_jax.weights.kinds import ImportPlan
from dexportrait_jax.weights.published import matched
from dexportrait_jax.weights.tensor_files import TensorFiles

GROUP = "autoencoder"
CHECKPOINT = "first_stage_model."
# Of a config.json: how latents are moved and scaled beside scaling_factor.
_NORMALISED = ("shift_factor", "latents_mean", "latents_std")
SCALE = 0.18215  # of SD1.5, where no config.json says another
# Beside the weights: averages, and the discriminator and perceptual network of its training.
_NOT_NEEDED = r"(model_ema|loss)\..*"
_ATTENTION = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
    "norm": "group_norm",
}


def plan(files: TensorFiles) -> ImportPlan:
    """The plan of `--kind=vae`: one group, autoencoder. Sizes are read from names and shapes.

    The scale of the latents is that of a config.json beside the weights, or SD1.5's, which a note says. Raises
    UserError when this is no such autoencoder.
    """
    prefix = CHECKPOINT if any(key.startswith(CHECKPOINT) for key in files.shapes) else ""
    levels = _count(rf"{prefix}encoder\.down(?:_blocks)?\.(\d+)\.", files)
    translate = _translation(prefix, levels)
    ours = {translate(key): shape for key, shape in files.shapes.items()}
    widths = [f"encoder.down_blocks.{level}.resnets.0.conv1.weight" for level in range(levels)]
    latent = "post_quant_conv.weight"
    settings = _settings(files)
    first = ours.get("decoder.conv_in.weight")
    if first and (latent not in ours or any(settings.get(name) for name in _NORMALISED)):
        raise UserError(
            f"{files.source} is an autoencoder such as SD3's or Flux's, with latents of {first[1]} channels: without "
            f"quant_conv, or, as Playground v2.5's, with {', '.join(_NORMALISED[:-1])} or {_NORMALISED[-1]}, which "
            "this network does not have; give that of SD1.5 or SDXL, or a tiny one (--kind=tiny_autoencoder) such as "
            "TAEF1"
        )
    absent = [key for key in (*widths, latent) if key not in ours]
    if absent or not widths:
        raise UserError(
            f"{files.source} holds no autoencoder of Stable Diffusion: {', '.join(absent) or 'its encoder'} is not in "
            f"it, its first key is {min(files.shapes)}; give one"
        )
    sizes = {
        "kind": "vae",
        "latent_channels": ours[latent][0],
        "block_channels": [ours[key][0] for key in widths],
        "layers_per_block": _count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.", ours),
        "groups": settings.get("norm_num_groups", 32),
        "scale": settings.get("scaling_factor", SCALE),
        "middle_attention": any(key and ".attentions." in key for key in ours),
    }
    # No shape tells the groups of GroupNorm.
    options = {name: value for name, value in sizes.items() if name != "kind"} | {"groups": 1}
    abstract = Network(lambda rngs: VAE(**options, rngs=rngs)).abstract
    found, left_out = matched(files, abstract, translate)
    notes = ()
    if not settings:
        notes = (
            f"nothing beside {files.source} tells the scale of its latents; taken is {SCALE}, as of SD1.5's and its "
            "kin. That of SDXL, whose autoencoder has the same shapes, is 0.13025: put its config.json beside it",
        )
    return ImportPlan({GROUP: (abstract, found)}, {"model": {GROUP: sizes}}, left_out, notes)


def _settings(files: TensorFiles) -> dict[str, Any]:
    """A config.json of an autoencoder; without a scale in it, that is diffusers' default, SD1.5's."""
    settings = files.settings()
    kind = settings.get("_class_name")
    known = kind == "AutoencoderKL" or (kind is None and "scaling_factor" in settings)
    return settings if known else {}


def _count(pattern: str, keys: Any) -> int:
    names = keys.shapes if isinstance(keys, TensorFiles) else keys
    found = [int(match[1]) for key in names if key and (match := re.match(pattern, key))]
    return 1 + max(found, default=-1)


def _translation(prefix: str, levels: int) -> Callable[[str], str | None]:
    def translate(key: str) -> str | None:
        if prefix and not key.startswith(prefix):
            return ""
        key = key.removeprefix(prefix)
        if re.fullmatch(_NOT_NEEDED, key):
            return ""
        key = re.sub(r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1.", key)
        # A checkpoint counts the decoder's levels from the picture, diffusers in the order they run.
        key = re.sub(
            r"^decoder\.up\.(\d+)\.",
            lambda match: f"decoder.up_blocks.{levels - 1 - int(match[1])}.",
            key,
        )
        key = re.sub(r"\.block\.(\d+)\.", r".resnets.\1.", key)
        key = re.sub(r"\.mid\.block_(\d)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", key)
        key = key.replace(".mid.attn_1.", ".mid_block.attentions.0.")
        key = re.sub(r"\.(down|up)sample\.", r".\1samplers.0.", key)
        key = key.replace(".nin_shortcut.", ".conv_shortcut.").replace(
            ".norm_out.", ".conv_norm_out."
        )
        attention = re.fullmatch(r"(.*\.attentions\.0)\.(\w+)\.(\w+)", key)
        if attention and attention[2] in _ATTENTION:
            return f"{attention[1]}.{_ATTENTION[attention[2]]}.{attention[3]}"
        return key

    return translate
