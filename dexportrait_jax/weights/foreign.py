"""Published weights that people take for those of a kind: what they are, told by a key, says more than what lacks.

Only whole families are known here; what else does not fit is listed tensor by tensor (``names.refuse_misfit``).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from dexportrait_jax.errors import UserError
from dexportrait_jax.weights.kinds import Kind
from dexportrait_jax.weights.tensor_files import TensorFiles


class _Family(NamedTuple):
    """What a key says of the weights it is in; ``kinds``: for which it is nothing to import (none: for all).

    A pattern need match the beginning of one key; with ``most``, of most of them.
    """

    pattern: re.Pattern[str]
    what: str
    kinds: tuple[str, ...] = ()
    most: bool = False


_FAMILIES = (
    _Family(
        re.compile(r"lora_(unet|te\d?|prior)_|.*[._]lora[._]|.*\.(hada_w\d|lokr_w\d|dora_scale)"),
        "a LoRA, a change to weights and no network; merge it into its model (diffusers: fuse_lora, save_pretrained)",
        most=True,
    ),
    _Family(
        re.compile(r".*\.(absmax|quant_map|quant_state|qweight|qzeros)($|\.)"),
        "quantised; get the weights as they were before",
    ),
    _Family(
        re.compile(
            r"(model\.diffusion_model\.)?(label_emb\.|add_embedding\.)|conditioner\.embedders\."
        ),
        "a UNet of SDXL, or of another that takes embeddings beside the time",
        ("unet",),
    ),
    _Family(
        re.compile(r"controlnet_|control_model\.|(input_hint_block|zero_convs)\."),
        "a ControlNet",
        ("unet",),
    ),
    _Family(
        re.compile(
            r"(model\.diffusion_model\.)?(double_blocks|joint_blocks|transformer_blocks)\.\d+\."
        ),
        "a diffusion transformer, such as SD3's or Flux's, and no UNet",
        ("unet",),
    ),
    _Family(
        re.compile(r".*motion_modules\."),
        "motion modules (--kind=motion_modules)",
        ("unet",),
        most=True,
    ),
    _Family(
        re.compile(r"((image_proj|ip_adapter)\.|.*\.to_[kv]_ip\.)"),
        "an IP-Adapter",
        ("unet", "image_encoder"),
    ),
    _Family(
        re.compile(r"(encoder|decoder)\.layers\.\d+\.(conv\.\d|weight|bias)"),
        "a tiny autoencoder (--kind=tiny_autoencoder)",
        ("vae",),
    ),
    _Family(
        re.compile(r"(encoder|decoder)\.(down|up|mid)(_blocks?)?\."),
        "an autoencoder of Stable Diffusion (--kind=vae)",
        ("unet", "tiny_autoencoder"),
    ),
    _Family(
        re.compile(r".*\.layer_scale_parameter$"),
        "a ConvNeXt of the first version",
        ("convnextv2",),
    ),
    _Family(
        re.compile(r"(vision_model\.)?embeddings\.patch_embedding\.bias$"),
        "a SigLIP, not a CLIP",
        ("image_encoder",),
    ),
)


def refuse_foreign(kind: str, sort: Kind, files: TensorFiles) -> None:
    """UserError, one line, for weights of a family that is none of this kind."""
    for family in _FAMILIES:
        if family.kinds and kind not in family.kinds:
            continue
        found = [key for key in files.shapes if family.pattern.match(key)]
        if found and (not family.most or 2 * len(found) > len(files.shapes)):
            raise UserError(
                f"{files.source} is {family.what}; its keys are such as {min(found)}. --kind={kind} takes "
                f"{sort.summary}"
            )
