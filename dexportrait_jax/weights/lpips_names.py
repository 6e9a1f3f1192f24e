"""Published VGG16 and AlexNet weights with the heads of LPIPS, for the perceptual loss.

The trunk has torchvision's names (features.N.weight) or those of the published `lpips` module
(net.sliceK.N.weight), the heads those of `lpips` (lin0.model.1.weight, or lins.0.model.1.weight);
all in one file, or a folder with a file of each. Pictures in [-1, 1] go in; the network itself takes
ImageNet's mean away (models/perceptual.py).
"""

from __future__ import annotations

import os
import re
from typing import Any

from dexportrait_jax.errors import UserError
from dexportrait_jax.models.perceptual import PerceptualNetwork
from dexportrait_jax.state import Network
from dexportrait_jax.weights.importing import load_groups
from dexportrait_jax.weights.kinds import ImportPlan
from dexportrait_jax.weights.lpips import load_lpips
from dexportrait_jax.weights.published import matched, shapes
from dexportrait_jax.weights.tensor_files import TensorFiles

GROUP = "perceptual"
# The window of the first convolution tells the two networks apart.
_FIRST_WINDOW = {3: "vgg16", 11: "alexnet"}
# torchvision's classifier, and the constants of the published module, which are also ours.
_NOT_NEEDED = r"classifier\.\d+\.(weight|bias)|scaling_layer\.(shift|scale)"


def plan(files: TensorFiles) -> ImportPlan:
    """The plan of `--kind=lpips`: one group, perceptual. UserError when it is neither network."""
    network = _network_of(files)
    abstract = Network(lambda rngs: PerceptualNetwork(network, rngs=rngs)).abstract
    slice_of = {
        key.split(".")[2]: key.rsplit(".", 1)[0] for key in shapes(abstract) if key[:4] == "net."
    }

    def translate(key: str) -> str | None:
        if re.fullmatch(_NOT_NEEDED, key):
            return ""
        layer = re.fullmatch(r"features\.(\d+)\.(weight|bias)", key)
        if layer:
            return f"{slice_of[layer[1]]}.{layer[2]}" if layer[1] in slice_of else None
        head = re.fullmatch(r"lins\.(\d+)\.model\.1\.weight", key)
        if head:
            # The published module holds its heads twice, under both names.
            ours = f"lin{head[1]}.model.1.weight"
            return "" if ours in files.shapes else ours
        return key

    found, left_out = matched(files, abstract, translate)
    return ImportPlan({GROUP: (abstract, found)}, {"network": network}, left_out)


def load_perceptual(network: str, path: str | os.PathLike) -> Any:
    """Parameters of ``PerceptualNetwork(network)``: of an import, or with path "" the published ones.

    Raises UserError when the import is of another network.
    """
    if not path:
        return load_lpips(network)
    abstract = Network(lambda rngs: PerceptualNetwork(network, rngs=rngs)).abstract
    return load_groups(path, {GROUP: abstract})[1][GROUP]


def _network_of(files: TensorFiles) -> str:
    for key in ("features.0.weight", "net.slice1.0.weight"):
        shape = files.shapes.get(key)
        if shape is None:
            continue
        if len(shape) == 4 and shape[-1] in _FIRST_WINDOW:
            return _FIRST_WINDOW[shape[-1]]
        raise UserError(
            f"{files.source} is neither VGG16 nor AlexNet: {key} is {shape}, expected (64, 3, 3, 3) or "
            "(64, 3, 11, 11); give one of these"
        )
    raise UserError(
        f"{files.source} holds no VGG16 or AlexNet: neither features.0.weight nor net.slice1.0.weight is "
        f"in it, its first key is {min(files.shapes)}; give the trunk and the heads of LPIPS"
    )
