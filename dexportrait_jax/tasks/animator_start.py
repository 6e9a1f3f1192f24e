"""What an animator starts from: exports of the stages before it, and imports of published networks.

Weights that do not fit are refused in one line that says which option to give: other shapes, other pictures for the
frozen encoders, another scale of the latents, another noise schedule. Where published weights are in use under both
settings, as AnimateDiff's are, a line says it. What has no effect in either config is not compared.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from data_pipelines import latents
from data_pipelines.augment import neutral_knobs
from dexportrait_jax.diffusion.schedule import noise_schedule
from dexportrait_jax.errors import UserError
from dexportrait_jax.run_directory import BEFORE_THE_KEY
from dexportrait_jax.state import Network
from dexportrait_jax.tasks import autoencoder
from dexportrait_jax.weights import published, stable_diffusion
from dexportrait_jax.weights.importing import load_groups, read_description
from dexportrait_jax.weights.names import Params

UNETS = ("reference", "denoiser")
_UNET = (
    "unet.block_channels",
    "unet.layers_per_block",
    "unet.heads",
    "unet.groups",
    "attn2.attn2",
)
# Of config.model, for every group: what shapes do not tell, or not in words, and has to be what the weights were
# trained with.
_MODEL = {
    "pose": ("pose.rotation_head", "pose.translation_limit", "pose.scale_limit"),
    "expression": (
        "expression.kind",
        "expression.pictures",
        "expression.pooling",
        "expression.leak",
        "expression.norm",
    ),
    "autoencoder": (
        "autoencoder.kind",
        "autoencoder.latent_channels",
        "autoencoder.block_channels",
        "autoencoder.layers_per_block",
        "autoencoder.groups",
        "autoencoder.scale",
        "autoencoder.middle_attention",
    ),
    "reference": (
        *_UNET,
        "reference.raymap_reference",
        "reference.raymap",
        "reference.raymap_w",
        "reference.raymap_points",
    ),
    "denoiser": (
        *_UNET,
        "denoiser.raymap",
        "denoiser.drop_attn2",
        "denoiser.raymap_w",
        "denoiser.raymap_points",
        "denoiser.warp_kernel",
        "denoiser.warp_padding",
        "denoiser.volume_order",
        "denoiser.expression_injector",
        "denoiser.expression_heads",
        "denoiser.expression_place",
        "denoiser.expression_tokens",
        "denoiser.expression_linear",
        "denoiser.expression_positions",
        "denoiser.expression_null",
    ),
    "temporal": (
        "temporal.max_frames",
        "temporal.middle",
        "temporal.norm",
        "unet.block_channels",
        "unet.layers_per_block",
        "unet.heads",
        "unet.groups",
    ),
    "image_encoder": (
        "image_encoder.image_size",
        "image_encoder.patch_size",
        "image_encoder.features",
        "image_encoder.layers",
        "image_encoder.heads",
        "image_encoder.feed_forward",
        "image_encoder.projection",
        "image_encoder.activation",
    ),
}
# Of _MODEL: what has no effect where another is one of these values, in the weights' training and here.
_IDLE = {
    "reference.raymap": ("reference.raymap_reference", (False,)),
    "reference.raymap_w": ("reference.raymap_reference", (False,)),
    "reference.raymap_points": ("reference.raymap_reference", (False,)),
    "denoiser.raymap_w": ("denoiser.raymap", ("none",)),
    "denoiser.raymap_points": ("denoiser.raymap", ("none",)),
    "denoiser.drop_attn2": ("attn2.attn2", ("none",)),
    "denoiser.warp_padding": ("denoiser.warp_kernel", (0,)),
    "denoiser.volume_order": ("denoiser.warp_kernel", (0,)),
    "denoiser.expression_heads": ("denoiser.expression_injector", ("none",)),
    "denoiser.expression_place": ("denoiser.expression_injector", ("none", "xnemo")),
    "denoiser.expression_tokens": ("denoiser.expression_injector", ("none",)),
    "denoiser.expression_linear": ("denoiser.expression_injector", ("none",)),
    "denoiser.expression_positions": ("denoiser.expression_injector", ("none",)),
    "denoiser.expression_null": ("denoiser.expression_injector", ("none",)),
}
# The same of the encoders' pictures, of data.augment: without the former the latter do nothing.
_WITHOUT = {
    "pose_mask.applied": ("pose_mask.dilation", "pose_mask.minimum_height", "pose_mask.fill"),
    "expression_crop.applied": ("expression_crop.margin", "expression_crop.upright"),
}
# Of _MODEL: what of an import is for the user to choose, because others run the same weights otherwise.
_CHOSEN = ("model.temporal.norm",)


def load_start(
    config: ml_collections.ConfigDict,
    networks: Mapping[str, Network],
    key: str,
    names: Sequence[str],
) -> dict[str, Params]:
    """The groups ``names``, or parts of them, from what ``config.init.<key>`` names.

    Raises:
        UserError: it is no export, lacks a group, or does not fit the config.
    """
    path = config.init[key]
    where = f"config.init.{key}={path}"
    absent = [name for name in names if name not in networks]
    if absent:
        raise UserError(
            f"config.init.{key} brings {', '.join(absent)}, which this model has not; leave it empty, or give the "
            "model one (model.attn2.attn2=clip_image)"
        )
    description = read_description(Path(path))
    there = description.get("config", {})
    is_import = description.get("stage") == published.STAGE
    is_unet = is_import and "unet" in description["groups"]
    held = {*description["groups"], *(UNETS if is_unet else ())}
    lacking = [name for name in names if name not in held]
    # Of another kind altogether: what is said of its sizes would mislead.
    if lacking and (is_import or lacking == list(names)):
        clip = lacking == ["image_encoder"] and key == "unet"
        raise UserError(
            f"{where} is an export of stage {description.get('stage')!r} with the groups "
            f"{', '.join(description['groups'])}; it has no {', '.join(lacking)}. Give an export that does"
            f"{', or name an import of CLIP in config.init.image_encoder' if clip else ''}"
        )
    if is_unet:
        return _of_published_unet(config, networks, key, there)
    # Before shapes are compared: an option to give says more than a list of tensors.
    differing = {
        name: {
            f"model.{knob}": value
            for knob, value in _differing(config, there, _MODEL[name]).items()
        }
        for name in names
    }
    if is_import:
        chosen = {
            knob: values.pop(knob)
            for values in differing.values()
            for knob in _CHOSEN
            if knob in values
        }
        if chosen:
            print(
                f"note: {path} has the names of AnimateDiff's own code, which does as {_overrides(chosen)} here; with "
                "this config its weights run as in diffusers",
                file=sys.stderr,
            )
    unets = [name for name in names if name in UNETS]
    for name in (name for name in names if name not in unets):
        if name == "temporal":
            _refuse_modules_of_another_unet(where, differing[name])
        refuse(where, f"its {name} is another one", differing[name])
    if unets:
        other = {knob: value for name in unets for knob, value in differing[name].items()}
        other |= _other_schedule(config, there, path)
        refuse(where, "its reference and denoiser were trained otherwise", other)
    if "expression" in names and "data" in there:
        other = _pictures(config.data, there["data"])
        refuse(where, "its encoders learned from other pictures", other)
    wanted = {name: networks[name].abstract for name in names}
    groups = load_groups(path, wanted, called=where)[1]
    if config.data.latents and "autoencoder" in names:
        _refuse_other_autoencoder(config, groups["autoencoder"], path)
    return groups


def _of_published_unet(
    config: ml_collections.ConfigDict, networks: Mapping[str, Network], key: str, there: Mapping
) -> dict[str, Params]:
    """Both UNets from an import of one, whose settings are ``there``; raises UserError as ``load_start``."""
    path = config.init[key]
    told = _differing(config, there, ("unet.heads", "unet.groups"))
    other = {f"model.{knob}": value for knob, value in told.items()}
    other |= _other_sizes(config, there.get("unet", {}))
    if not other or config.stage == "animator_video":
        other |= _other_schedule(config, there, path)
    why = "its UNet is another one, or was trained otherwise"
    refuse(f"config.init.{key}={path}", why, other)
    _, groups = load_groups(path, ["unet"], called=f"config.init.{key}={path}")
    latent_channels = config.model.autoencoder.latent_channels
    groups, said = stable_diffusion.starts(groups["unet"], networks, latent_channels, path)
    for line in dict.fromkeys(said):
        print(line, file=sys.stderr)
    return groups


def _refuse_modules_of_another_unet(where: str, differing: Mapping[str, Any]) -> None:
    """UserError for temporal modules whose UNet has other sizes, heads or groups than the one of the image stage."""
    of_unet = {knob: value for knob, value in differing.items() if knob.startswith("model.unet.")}
    if of_unet:
        # No option to give: with another UNet the image stage's weights would not fit.
        raise UserError(
            f"{where} does not fit this config, its temporal modules are of another UNet, with "
            f"{_overrides(of_unet)}, than that of the image stage; give modules of a UNet like that one, or leave "
            "config.init.temporal empty"
        )


def refuse(where: str, why: str, other: Mapping[str, Any]) -> None:
    """UserError that gives the overrides as a shell takes them, unless there are none."""
    if other:
        raise UserError(f"{where} does not fit this config, {why}; give: {_overrides(other)}")


def _overrides(values: Mapping[str, Any]) -> str:
    given = {
        knob: str(tuple(value)).replace(" ", "") if isinstance(value, list | tuple) else value
        for knob, value in values.items()
    }
    return " ".join(shlex.quote(f"--config.{knob}={value}") for knob, value in given.items())


def _differing(
    config: ml_collections.ConfigDict, there: Mapping[str, Any], knobs: Sequence[str]
) -> dict[str, Any]:
    """Of knobs such as "unet.heads": what the weights were trained with, where it is told and is another value."""
    found = {}
    for dotted in knobs:
        section, knob = dotted.split(".")
        given, trained = config.model[section], there.get("model", {}).get(section, {})
        key = f"model.{dotted}"
        # The config of a run may be older than the key; that of an import tells what it knows.
        if "stage" in there and key in BEFORE_THE_KEY:
            trained = {knob: BEFORE_THE_KEY[key], **trained}
        if knob not in trained or knob not in given or _idle(config, there, dotted):
            continue
        if not _same(given[knob], trained[knob]):
            found[dotted] = trained[knob]
    return found


def _idle(config: ml_collections.ConfigDict, there: Mapping[str, Any], dotted: str) -> bool:
    """Whether a knob of config.model does nothing, neither in the weights' config, as far as that is told, nor here."""
    if dotted not in _IDLE:
        return False
    switch, values = _IDLE[dotted]
    section, name = switch.split(".")
    here = config.model[section][name]
    return here in values and there.get("model", {}).get(section, {}).get(name, here) in values


def _other_sizes(config: ml_collections.ConfigDict, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides that give this config's UNets the sizes of an imported one: of its text only where that is read."""
    known = {f"unet.{name}": sizes.get(name) for name in ("block_channels", "layers_per_block")}
    if config.model.attn2.attn2 != "none":
        known["attn2.cross_attention_features"] = sizes.get("context")
    found = {}
    for dotted, value in known.items():
        section, knob = dotted.split(".")
        if value is not None and not _same(config.model[section][knob], value):
            found[f"model.{dotted}"] = value
    return found


def _other_schedule(
    config: ml_collections.ConfigDict, there: Mapping[str, Any], path: str
) -> dict[str, Any]:
    """Overrides that give UNets the noise schedule of their training; a note instead where they go on learning."""
    trained = _trained_schedule(config, there)
    if config.stage == "animator_video" or not trained:
        return trained
    # What goes on learning can learn another noise; nobody should do so without knowing.
    print(
        f"note: reference and denoiser of {path} were trained with another noise schedule, {_overrides(trained)}, "
        "and have to learn this one",
        file=sys.stderr,
    )
    return {}


def _trained_schedule(
    config: ml_collections.ConfigDict, there: Mapping[str, Any]
) -> dict[str, Any]:
    """Keys of config.diffusion that make the noise schedule the one of an export: of what it is, not of its name."""
    if "diffusion" not in there:
        return {}
    ours, theirs = (
        dataclasses.asdict(noise_schedule(one)) for one in (config.diffusion, there["diffusion"])
    )
    return {f"diffusion.{name}": value for name, value in theirs.items() if value != ours[name]}


def _refuse_other_autoencoder(
    config: ml_collections.ConfigDict, params: Mapping[str, Any], path: str
) -> None:
    """UserError where cached latents were made by another autoencoder than the one of this run."""
    made = latents.read_description(config.data.latents).autoencoder
    ours = autoencoder.identity(config.model.autoencoder, params)
    if made != ours:
        raise UserError(
            f"config.data.latents={config.data.latents} was made by another autoencoder than that of {path} (sha256 "
            f"{made['sha256'][:12]}, here {ours['sha256'][:12]}, options {made['options']}, here {ours['options']}); "
            f"encode again: dexportrait encode --weights={path} --data={config.data.path} --out=DIR"
        )


def _pictures(here: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, Any]:
    """What of the encoders' pictures differs: overrides that make it the same."""
    ours, trained = (neutral_knobs(one["augment"]) for one in (here, there))
    idle = {
        knob
        for switch, knobs in _WITHOUT.items()
        if not (ours[switch] or trained[switch])
        for knob in knobs
    }
    pairs = {
        f"data.augment.{name}": (value, trained[name])
        for name, value in ours.items()
        if name not in idle
    } | {f"data.{size}": (here[size], there[size]) for size in ("pose_size", "expression_size")}
    return {name: theirs for name, (ours, theirs) in pairs.items() if not _same(ours, theirs)}


def _same(one: Any, other: Any) -> bool:
    sequence = list | tuple  # JSON has no tuples
    return (
        list(one) == list(other)
        if isinstance(one, sequence) and isinstance(other, sequence)
        else one == other
    )
