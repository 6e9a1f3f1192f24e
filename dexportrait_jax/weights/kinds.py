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
    """What it brings, which config key takes it, and where its ``plan`` lives."""

    summary: str
    config_key: str
    plan: str  # "module:function"


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
    ),
}


class ImportPlan(NamedTuple):
    """Where every parameter of the new export comes from.

    Attributes:
        groups: group -> (abstract tree of the network, {our key in PyTorch's form: published key}).
        config: what ``model.json`` tells about the network; JSON-able.
        left_out: published keys that are known and not needed, such as a classifier.
    """

    groups: dict[str, tuple[Mapping[str, Any], dict[str, str]]]
    config: dict[str, Any]
    left_out: list[str]


def plan_import(kind: str, files: TensorFiles) -> ImportPlan:
    """The plan of a kind for these files; UserError for a kind or tensors that are not known."""
    if kind not in KINDS:
        raise UserError(f"there is no kind {kind!r} to import; kinds are {', '.join(KINDS)}")
    module, _, function = KINDS[kind].plan.partition(":")
    plan: Callable[[TensorFiles], ImportPlan] = getattr(importlib.import_module(module), function)
    return plan(files)
