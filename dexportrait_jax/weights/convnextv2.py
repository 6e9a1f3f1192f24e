"""Published ConvNeXtV2 weights for the trunk of the pose encoder (method.md 3.3).

Three names for the same layers are known: timm's, transformers' and those of ConvNeXtV2's own code,
which are ours. Published weights were trained on RGB pictures, 224 x 224 or larger, in [0, 1] with
ImageNet's mean taken away and divided by its deviation, channels first in PyTorch. Our encoder
gives its trunk RGB in [0, 1], channels last, 256 x 256. The size does not matter, the trunk
averages over space. ``load_trunk`` puts mean and deviation into the first convolution; it has no
padding, so that nothing is lost by it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dexportrait_jax.errors import UserError
from dexportrait_jax.models.motion.pose import ConvNeXtV2
from dexportrait_jax.state import Network
from dexportrait_jax.weights import names
from dexportrait_jax.weights.importing import load_groups, read_description
from dexportrait_jax.weights.kinds import ImportPlan
from dexportrait_jax.weights.published import matched
from dexportrait_jax.weights.tensor_files import TensorFiles

IMAGENET = {"mean": (0.485, 0.456, 0.406), "deviation": (0.229, 0.224, 0.225)}
STEM = "downsample_layers.0.0"

# Per layout: how its keys are told, what precedes them, what is not needed, and (pattern, our name).
_LAYOUTS: dict[str, tuple[str, str, str, tuple[tuple[str, str], ...]]] = {
    "timm": (
        "stem.0.weight",
        "",
        r"head\.fc\.",
        (
            (r"stem\.(\d)\.", r"downsample_layers.0.\1."),
            (r"stages\.(\d+)\.downsample\.(\d)\.", r"downsample_layers.\1.\2."),
            (r"stages\.(\d+)\.blocks\.(\d+)\.conv_dw\.", r"stages.\1.\2.dwconv."),
            (r"stages\.(\d+)\.blocks\.(\d+)\.norm\.", r"stages.\1.\2.norm."),
            (r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc(\d)\.", r"stages.\1.\2.pwconv\3."),
            (r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.grn\.", r"stages.\1.\2.grn."),
            (r"head\.norm\.", "norm."),
        ),
    ),
    "transformers": (
        "embeddings.patch_embeddings.weight",
        "convnextv2.",
        r"classifier\.",
        (
            (r"embeddings\.patch_embeddings\.", f"{STEM}."),
            (r"embeddings\.layernorm\.", "downsample_layers.0.1."),
            (
                r"encoder\.stages\.(\d+)\.downsampling_layer\.(\d)\.",
                r"downsample_layers.\1.\2.",
            ),
            (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layernorm\.", r"stages.\1.\2.norm."),
            (
                r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(dwconv|pwconv1|pwconv2|grn)\.",
                r"stages.\1.\2.\3.",
            ),
            (r"layernorm\.", "norm."),
        ),
    ),
    "original": (
        f"{STEM}.weight",
        "",
        r"head\.",
        (
            (r"downsample_layers\.(\d+)\.(\d)\.", r"downsample_layers.\1.\2."),
            (r"stages\.(\d+)\.(\d+)\.(dwconv|norm|pwconv1|pwconv2|grn)\.", r"stages.\1.\2.\3."),
            (r"norm\.", "norm."),
        ),
    ),
}


def plan(files: TensorFiles) -> ImportPlan:
    """The plan of `--kind=convnextv2`: one group, pose, that holds the trunk alone.

    Depths and dims are read from names and shapes. Raises UserError when the names are of none of
    the layouts, or do not fit a ConvNeXtV2.
    """
    layout = _layout_of(files)
    translate = _translation(layout)
    depths, dims = _sizes(files, translate)
    network = Network(lambda rngs: ConvNeXtV2(depths=depths, dims=dims, rngs=rngs))
    found, left_out = matched(files, network.abstract, translate)
    config = {"names": layout, "depths": depths, "dims": dims, "input": IMAGENET}
    return ImportPlan({"pose": (network.abstract, found)}, config, left_out)


def load_trunk(path: str | os.PathLike, abstract: names.Params) -> names.Params:
    """The trunk of the pose encoder ``abstract`` from an export whose group pose holds one.

    From an import, the input that it was trained on goes into the first convolution: with w of a
    channel, w' = w / deviation and bias' = bias - sum w mean / deviation. From a motion trainer's
    export, which has the input of our encoder, the trunk is taken as it is. Heads (fc_*) are left
    where they are. Raises UserError when the export has no trunk of these sizes.
    """
    _, groups = load_groups(path, ["pose"])
    trunk = {key: value for key, value in abstract.items() if not key.startswith("fc_")}
    given = {key: value for key, value in groups["pose"].items() if not key.startswith("fc_")}
    loaded = names.from_torch(names.to_torch(given), trunk, where=f"the pose trunk of {path}")
    trained_on = read_description(Path(path)).get("config", {}).get("input")
    if trained_on is not None:
        stem = loaded["downsample_layers"]["0"]["0"]
        mean, deviation = (
            np.asarray(trained_on[name], np.float64)[:, None] for name in ("mean", "deviation")
        )
        kernel = np.asarray(stem["kernel"], np.float64) / deviation  # (4, 4, 3, features)
        bias = stem["bias"] - np.sum(kernel * mean, axis=(0, 1, 2))
        stem["kernel"], stem["bias"] = kernel.astype(np.float32), bias.astype(np.float32)
    return loaded


def _layout_of(files: TensorFiles) -> str:
    for layout, (mark, prefix, _, _) in _LAYOUTS.items():
        if mark in files.shapes or prefix + mark in files.shapes:
            return layout
    marks = ", ".join(f"{mark} ({layout})" for layout, (mark, *_) in _LAYOUTS.items())
    raise UserError(
        f"{files.source} holds no ConvNeXtV2: none of {marks} is in it, its first key is "
        f"{min(files.shapes)}; give the weights of a ConvNeXtV2"
    )


def _translation(layout: str) -> Callable[[str], str | None]:
    _, prefix, not_needed, rules = _LAYOUTS[layout]

    def translate(key: str) -> str | None:
        key = key.removeprefix(prefix)
        if re.match(not_needed, key):
            return ""
        for pattern, ours in rules:
            match = re.fullmatch(rf"{pattern}(\w+)", key)
            if match is None:
                continue
            parameter = match.groups()[-1]
            if ".grn." in key:
                # transformers and timm call gamma and beta weight and bias.
                parameter = {"weight": "gamma", "bias": "beta"}.get(parameter, parameter)
            return match.expand(ours) + parameter
        return None

    return translate


def _sizes(
    files: TensorFiles, translate: Callable[[str], str | None]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Depths and dims, from how many blocks each stage has and how wide its first one is."""
    ours = {translate(key): shape for key, shape in files.shapes.items()}
    blocks: dict[int, set[int]] = {}
    for key in ours:
        block = re.match(r"stages\.(\d+)\.(\d+)\.", key or "")
        if block:
            blocks.setdefault(int(block[1]), set()).add(int(block[2]))
    depths = tuple(max(blocks.get(stage, {0})) + 1 for stage in range(max(blocks, default=0) + 1))
    stem = ours.get(f"{STEM}.weight", ())
    if len(stem) != 4 or not blocks:
        raise UserError(
            f"{files.source} holds no ConvNeXtV2: its first convolution is {stem}, its stages have "
            f"{len(blocks)} blocks; give the weights of a ConvNeXtV2"
        )
    dims = [stem[0]]
    for stage in range(1, len(depths)):
        conv = ours.get(f"downsample_layers.{stage}.1.weight", ())
        dims.append(conv[0] if conv else 2 * dims[-1])
    return depths, tuple(dims)
