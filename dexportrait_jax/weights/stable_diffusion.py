"""Published weights of SD1.5's UNet, for the reference UNet and the denoiser (method.md 4.1).

Two names for the same layers are known: diffusers', which are ours, and those of the checkpoints that hold a whole
Stable Diffusion in one file (``model.diffusion_model.input_blocks...``). ``starts`` says what of them the animator's
two UNets take over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dexportrait_jax.errors import UserError
from dexportrait_jax.models.animator.transformer import TransformerOptions
from dexportrait_jax.models.animator.unet import UNet
from dexportrait_jax.state import Network
from dexportrait_jax.weights import names
from dexportrait_jax.weights.kinds import ImportPlan
from dexportrait_jax.weights.published import matched
from dexportrait_jax.weights.tensor_files import TensorFiles

GROUP = "unet"
CHECKPOINT = "model.diffusion_model."
# A checkpoint holds the whole pipeline, the schedule's tables and sometimes averages of the weights.
_OF_CHECKPOINT = (
    r"(first_stage_model|cond_stage_model|conditioner|model_ema|lora_\w+)\..*|model_ema.*"
)
_TABLES = r"betas|alphas_cumprod\w*|sqrt_\w+|log_one_minus\w+|posterior_\w+|logvar|scale_factor"
# What text attention brings; a model without it leaves them where they are.
_TEXT = re.compile(r".*\.transformer_blocks\.\d+\.(attn2|norm2)\..*")

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ALONE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
# diffusers' words, and config.diffusion.prediction.
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}


def plan_unet(files: TensorFiles) -> ImportPlan:
    """The plan of `--kind=unet`: one group, unet, with its text attention.

    Sizes are read from names and shapes. How many heads share the channels, the groups of GroupNorm and the noise
    schedule of its training stand in diffusers' JSON beside the weights; without it they are the config's, which a note
    says of the heads. Raises UserError when this is no such UNet, or one that takes more than latents.
    """
    translate = _translation(files)
    sizes = _sizes(files, translate)
    network = _plain(**sizes)
    found, left_out = matched(files, network.abstract, translate)
    told = _heads_and_groups(files, found, sizes["block_channels"])
    config = {GROUP: sizes, "model": {"unet": told}}
    notes = []
    if "heads" not in told:
        notes.append(
            f"nothing beside {files.source} tells the heads of its attention; those of the config are taken "
            "(model.unet.heads; SD1.5's have 8): a diffusers config.json beside it says them"
        )
    schedule = _schedule(files)
    if schedule.get("zero_terminal_snr") and schedule.get("prediction", "epsilon") == "epsilon":
        # Where there is only noise, a prediction of the noise tells nothing of the picture.
        del schedule["zero_terminal_snr"]
        notes.append(
            f"the scheduler beside {files.source} says rescale_betas_zero_snr, which epsilon prediction cannot be "
            "sampled with; it is left out, and the noise schedule taken without it"
        )
    if schedule:
        config["diffusion"] = schedule
    return ImportPlan({GROUP: (network.abstract, found)}, config, left_out, tuple(notes))


def starts(
    imported: Mapping[str, Any], networks: Mapping[str, Network], latent_channels: int, where: str
) -> tuple[dict[str, names.Params], list[str]]:
    """What the reference UNet and the denoiser begin with.

    Args:
        imported: the group unet of an import.
        networks: of the animator; "reference" and "denoiser" are filled.
        latent_channels: of the autoencoder. Where the published UNet has others, its first and last convolution
            stay out, and the networks' own start fresh.
        where: the import, for errors.

    Returns ``({group: part of its parameters}, [what was done, a line each])``. Ray maps are input channels behind the
    latents; their weights are zero, so that nothing changes at the start.

    Raises UserError when sizes differ.
    """
    # Not in PyTorch's layout: that would be a copy of all of it.
    tensors = {names.torch_key(path): leaf for path, leaf in names.flatten(imported)}
    said = []
    channels = tensors["conv_in.weight"].shape[-2]
    fits = channels == latent_channels
    if not fits:
        said.append(
            f"{where}: its UNet takes latents of {channels} channels, here they have "
            f"{latent_channels}: conv_in and conv_out start fresh"
        )
    groups = {}
    for group in ("reference", "denoiser"):
        abstract = dict(names.flatten(networks[group].abstract))
        wanted = {names.torch_key(path): (path, leaf) for path, leaf in abstract.items()}
        has_text = any(map(_TEXT.match, wanted))
        part, misshapen, extra = {}, [], []
        for key, array in tensors.items():
            if (key.startswith(("conv_in.", "conv_out.")) and not fits) or (
                _TEXT.match(key) and not has_text
            ):
                continue
            if key not in wanted:
                extra.append(key)
                continue
            path, leaf = wanted[key]
            if path == ("conv_in", "kernel"):
                array = _widened(array, leaf.shape[-2])
            if array.shape != tuple(leaf.shape):
                theirs, ours = (
                    names.torch_shape(path[-1], tuple(one.shape)) for one in (array, leaf)
                )
                misshapen.append(f"{key} is {theirs}, {group} has {ours}")
            part[path] = array.astype(leaf.dtype, copy=False)
        names.refuse_misfit(where, [], extra, misshapen)
        groups[group] = names.unflatten(part)
        if not has_text and any(map(_TEXT.match, tensors)):
            said.append(f"{where}: {group} has no text attention (model.attn2); it is left out")
    return groups, said


def _widened(kernel: np.ndarray, channels: int) -> np.ndarray:
    extra = channels - kernel.shape[-2]
    return np.pad(kernel, [(0, 0), (0, 0), (0, max(extra, 0)), (0, 0)])


def _plain(block_channels, layers_per_block, in_channels, out_channels, context) -> Network:
    options = TransformerOptions(heads=1, cross_attention_features=context)
    return Network(
        lambda rngs: UNet(
            in_channels=in_channels,
            out_channels=out_channels,
            block_channels=block_channels,
            layers_per_block=layers_per_block,
            options=options,
            groups=1,
            rngs=rngs,
        )
    )


def _sizes(files: TensorFiles, translate: Callable[[str], str | None]) -> dict[str, Any]:
    ours = {translate(key): shape for key, shape in files.shapes.items()}
    levels = 1 + _last(r"down_blocks\.(\d+)\.", ours)
    layers = 1 + _last(r"down_blocks\.0\.resnets\.(\d+)\.", ours)
    text = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    widths = [f"down_blocks.{level}.resnets.0.conv1.weight" for level in range(levels)]
    needed = ["conv_in.weight", "conv_out.weight", text, *widths]
    absent = [key for key in needed if key not in ours]
    if absent or not widths:
        raise UserError(
            f"{files.source} holds no UNet of Stable Diffusion: {names.listed(absent)} is not in it, its first key is "
            f"{min(files.shapes)}; give one"
        )
    channels, predicted = ours["conv_in.weight"][1], ours["conv_out.weight"][0]
    if channels != predicted:
        purpose = {2 * predicted: "editing", 2 * predicted + 1: "inpainting"}.get(channels, "depth")
        raise UserError(
            f"{files.source} is a UNet for {purpose} or the like: it takes {channels} channels, the latents' "
            f"{predicted} and others beside them; give the UNet of SD1.5, or of a model that was made of it and takes "
            "latents alone"
        )
    return {
        "block_channels": [ours[key][0] for key in widths],
        "layers_per_block": layers,
        "in_channels": channels,
        "out_channels": predicted,
        "context": ours[text][1],
    }


def _heads_and_groups(
    files: TensorFiles, found: Mapping[str, str], block_channels: list[int]
) -> dict[str, int]:
    """What no shape tells, as far as a config.json beside the weights does.

    Raises UserError for heads that differ from level to level, as those of Stable Diffusion 2 do.
    """
    settings = files.settings()
    kind = settings.get("_class_name")
    fits = kind is None and settings.get("block_out_channels") == block_channels
    if kind != "UNet2DConditionModel" and not fits:
        settings = {}  # of another model in the same folder
    # diffusers calls the number of heads by the name of their width.
    heads = settings.get("num_attention_heads") or settings.get("attention_head_dim")
    if isinstance(heads, list) and len(set(heads)) == 1:
        heads = heads[0]
    # Stable Diffusion 2 has linear layers about its transformers, and heads of 64 channels each at every level.
    linear = any(
        len(files.shapes[theirs]) == 2
        for ours, theirs in found.items()
        if ours.endswith(".proj_in.weight")
    )
    if isinstance(heads, list) or (linear and heads is None):
        told = f"{heads} heads at its levels" if heads else "linear layers about its transformers"
        raise UserError(
            f"{files.source} is a UNet of Stable Diffusion 2 or later, with {told}; here all levels have the same "
            "number of heads: give the UNet of SD1.5, or of a model that was made of it"
        )
    known = {"heads": heads, "groups": settings.get("norm_num_groups")}
    return {name: value for name, value in known.items() if value is not None}


def _schedule(files: TensorFiles) -> dict[str, Any]:
    """config.diffusion of the UNet's training, as far as the scheduler beside it in a diffusers pipeline tells it."""
    settings = files.settings("../scheduler/scheduler_config.json")
    if settings.get("beta_schedule") != "scaled_linear":
        return {}
    known = {
        "steps": settings.get("num_train_timesteps"),
        "beta_start": settings.get("beta_start"),
        "beta_end": settings.get("beta_end"),
        "prediction": _PREDICTIONS.get(settings.get("prediction_type")),
        "zero_terminal_snr": settings.get("rescale_betas_zero_snr"),
    }
    return {name: value for name, value in known.items() if value is not None}


def _last(pattern: str, keys: Mapping[str | None, Any]) -> int:
    numbers = [int(match[1]) for key in keys if key and (match := re.match(pattern, key))]
    return max(numbers, default=-1)


def _translation(files: TensorFiles) -> Callable[[str], str | None]:
    """Published key -> our key in PyTorch's form; "" for what is not of the UNet."""
    prefix = CHECKPOINT if any(key.startswith(CHECKPOINT) for key in files.shapes) else ""
    if f"{prefix}input_blocks.0.0.weight" not in files.shapes:
        return lambda key: key
    # Level n of the checkpoint ends with a downsampling; the first tells how many blocks a level has.
    first = min(
        (
            int(match[1])
            for key in files.shapes
            if (match := re.match(rf"{re.escape(prefix)}input_blocks\.(\d+)\.0\.op\.", key))
        ),
        default=3,
    )

    def translate(key: str) -> str | None:
        if prefix and not key.startswith(prefix):
            known = re.fullmatch(_OF_CHECKPOINT, key) or re.fullmatch(_TABLES, key)
            return "" if known else None
        return _ours(key.removeprefix(prefix), first)

    return translate


def _ours(key: str, per_level: int) -> str | None:
    """Our key of a checkpoint's; ``per_level``: input blocks of a level, the downsampling included."""
    stem, _, leaf = key.rpartition(".")
    if stem in _ALONE:
        return f"{_ALONE[stem]}.{leaf}"
    match = re.fullmatch(r"(input_blocks|output_blocks|middle_block)\.(\d+)\.(.+)", key)
    if match is None:
        return None
    side, number, rest = match[1], int(match[2]), match[3]
    if side == "middle_block":
        return _inner(f"mid_block.{_MIDDLE.get(match[2])}", rest)
    level, place = divmod(number - 1 if side == "input_blocks" else number, per_level)
    where, _, rest = rest.partition(".")
    if side == "input_blocks" and place == per_level - 1:
        return f"down_blocks.{level}.downsamplers.0.conv.{leaf}" if stem.endswith("0.op") else None
    block = f"{'down' if side == 'input_blocks' else 'up'}_blocks.{level}"
    if side == "output_blocks" and rest == f"conv.{leaf}":
        return f"{block}.upsamplers.0.conv.{leaf}"
    return _inner(f"{block}.{'resnets' if where == '0' else 'attentions'}.{place}", rest)


def _inner(unit: str, rest: str) -> str | None:
    """A layer within a ResNet block, which has other names, or within a transformer, which has the same."""
    stem, _, leaf = rest.rpartition(".")
    if ".resnets." in unit:
        return f"{unit}.{_RESNET[stem]}.{leaf}" if stem in _RESNET else None
    return f"{unit}.{rest}" if ".attentions." in unit else None
