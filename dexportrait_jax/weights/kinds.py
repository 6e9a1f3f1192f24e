"""The kinds of published weights that `dexportrait import` knows, in one table.

A kind is a line here and a function ``plan(files: TensorFiles) -> ImportPlan`` somewhere, which says
which of the published tensors each parameter of our networks is. Imports nothing heavy: the
command line reads the table for its help.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from dexportrait_jax.errors import UserError

if TYPE_CHECKING:
    from dexportrait_jax.weights.tensor_files import TensorFiles


class Kind(NamedTuple):
    """What it brings, which config key takes it, and where its ``plan`` lives.

    Attributes:
        summary, config_key: for people.
        plan: "module:function".
        folder: where a diffusers pipeline keeps it, so that ``--source`` may be the whole pipeline.
        parts: published as a file each, whose keys collide: a key of the file ``taesd_encoder.safetensors``
            is ``encoder.`` and the key.
        several: a folder may hold a file of each part, whose keys do not collide.
    """

    summary: str
    config_key: str
    plan: str
    folder: str = ""
    parts: tuple[str, ...] = ()
    several: bool = False


KINDS = {
    "convnextv2": Kind(
        "ConvNeXtV2, the trunk of the pose encoder, in timm's or transformers' names",
        "--config.init.pose of the motion trainer",
        "dexportrait_jax.weights.convnextv2:plan",
    ),
    "lpips": Kind(
        "VGG16 or AlexNet in torchvision's names with the heads of LPIPS",
        "--config.loss.perceptual_weights of the motion trainer and the autoencoder",
        "dexportrait_jax.weights.lpips_names:plan",
        several=True,
    ),
    "unet": Kind(
        "the UNet of SD1.5 or of its image variations: a diffusers folder, or a single file of a checkpoint",
        "--config.init.unet of the animator's image stage",
        "dexportrait_jax.weights.stable_diffusion:plan_unet",
        folder="unet",
    ),
    "vae": Kind(
        "the autoencoder of Stable Diffusion, or sd-vae-ft-mse, in the same layouts",
        "--config.init.autoencoder of the animator",
        "dexportrait_jax.weights.stable_diffusion_vae:plan",
        folder="vae",
    ),
    "tiny_autoencoder": Kind(
        "TAESD, TAEF2 and kin: a folder with *_encoder.safetensors and *_decoder.safetensors, or diffusers'",
        "--config.init.autoencoder of the animator",
        "dexportrait_jax.weights.tiny_autoencoder:plan",
        parts=("encoder", "decoder"),
    ),
    "motion_modules": Kind(
        "motion modules of AnimateDiff v1, v2 or v3, or diffusers' motion adapter",
        "--config.init.temporal of the animator's video stage",
        "dexportrait_jax.weights.animatediff:plan",
        folder="motion_adapter",
    ),
    "image_encoder": Kind(
        "CLIP's image encoder with its projection in transformers', OpenAI's or open_clip's names, or a whole CLIP",
        "--config.init.image_encoder of the animator's image stage",
        "dexportrait_jax.weights.clip_image:plan",
        folder="image_encoder",
    ),
}


# Other names that `--kind` takes.
ALIASES = {"sd15": "unet", "motion_module": "motion_modules"}


class ImportPlan(NamedTuple):
    """Where every parameter of the new export comes from.

    Attributes:
        groups: group -> (abstract tree of the network, {our key in PyTorch's form: published key}).
        config: what ``model.json`` tells about the network; JSON-able.
        left_out: published keys that are known and not needed, such as a classifier.
        notes: what people should know of these weights, a line each.
        files: what holds the keys in groups, where these are views of published tensors.
    """

    groups: dict[str, tuple[Mapping[str, Any], dict[str, str]]]
    config: dict[str, Any]
    left_out: list[str]
    notes: tuple[str, ...] = ()
    files: TensorFiles | None = None


def kind_called(name: str) -> tuple[str, Kind]:
    """The kind of that name or alias, behind its own name; UserError for one that is not known."""
    known = ALIASES.get(name, name)
    if known not in KINDS:
        raise UserError(
            f"there is no kind {name!r} to import; kinds are {', '.join((*KINDS, *ALIASES))}"
        )
    return known, KINDS[known]


def plan_import(kind: Kind, files: TensorFiles) -> ImportPlan:
    """The plan of a kind for these files; UserError for tensors that are not known."""
    module, _, function = kind.plan.partition(":")
    plan: Callable[[TensorFiles], ImportPlan] = getattr(importlib.import_module(module), function)
    return plan(files)
