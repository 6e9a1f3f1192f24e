"""Published motion modules of AnimateDiff for the temporal stage (method.md 4.5).

Known are AnimateDiff's own names (``down_blocks.0.motion_modules.0.temporal_transformer...``, also behind ``module.``)
and those of diffusers' motion adapter. Both also hold the positional encoding as a table; ours is computed, so the
table has only to be that same sine. The code that uses AnimateDiff's own names normalises every frame alone, which is
told; diffusers' names do not tell where weights were trained. Its config.json tells heads and groups.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dexportrait_jax.errors import UserError
from dexportrait_jax.models.animator.blocks import position_features
from dexportrait_jax.models.animator.temporal import TemporalModules
from dexportrait_jax.state import Network
from dexportrait_jax.weights.kinds import ImportPlan
from dexportrait_jax.weights.published import matched
from dexportrait_jax.weights.tensor_files import TensorFiles

GROUP = "temporal"
_OWN = ".temporal_transformer."
_TABLE = re.compile(r".*\.(pos_encoder|pos_embed)\.pe")
_RULES = (
    (r"^module\.", ""),
    (r"\.temporal_transformer\.", "."),
    (r"\.attention_blocks\.(\d)\.", lambda match: f".attn{int(match[1]) + 1}."),
    (r"\.norms\.(\d)\.", lambda match: f".norm{int(match[1]) + 1}."),
    (r"\.ff_norm\.", ".norm3."),
)


def plan(files: TensorFiles) -> ImportPlan:
    """The plan of `--kind=motion_modules`: one group, temporal.

    Widths, modules a level, the module in the middle (v2) and the longest clip are read from names and shapes, heads
    and the groups of GroupNorm from an adapter's config.json beside them; without one a note says what is taken.
    Raises UserError when these are no motion modules, their positional encoding is none that we compute, their heads
    differ from level to level, or the config.json is of other ones.
    """
    ours = {_translate(key): key for key in files.shapes}
    tables = [key for key in files.shapes if _TABLE.fullmatch(key)]
    widths, modules = [], 0
    for key in ours:
        match = re.fullmatch(r"down_blocks\.(\d+)\.motion_modules\.(\d+)\.norm\.weight", key)
        if match:
            modules = max(modules, int(match[2]) + 1)
            if match[2] == "0":
                widths.append((int(match[1]), files.shapes[ours[key]][0]))
    if not widths or not tables:
        raise UserError(
            f"{files.source} holds no motion modules: no down_blocks.N.motion_modules.N and its positions are in it, "
            f"its first key is {min(files.shapes)}; give those of AnimateDiff"
        )
    frames = {files.shapes[key][1] for key in tables}
    middle = any(key.startswith("mid_block.") for key in ours)
    for key in tables:
        _check_positions(files, key)
    sizes = {"block_channels": [width for _, width in sorted(widths)], "layers_per_block": modules}
    network = Network(
        lambda rngs: TemporalModules(**sizes, heads=1, middle=middle, groups=1, rngs=rngs)
    )
    found, left_out = matched(files, network.abstract, _translate)
    temporal = {"max_frames": min(frames), "middle": middle}
    told, notes = _heads_and_groups(files, temporal)
    if any(_OWN in key for key in files.shapes):
        temporal["norm"] = "frame"
        notes += (
            "AnimateDiff's own code, whose names these are, normalises every frame alone: "
            "--config.model.temporal.norm=frame does so too, the default is as in diffusers",
        )
    config = {"model": {"unet": sizes | told, "temporal": temporal}}
    return ImportPlan({GROUP: (network.abstract, found)}, config, left_out, notes)


def _heads_and_groups(
    files: TensorFiles, temporal: Mapping[str, Any]
) -> tuple[dict[str, int], tuple[str, ...]]:
    """What no shape tells, as far as an adapter's config.json does, and a note where there is none."""
    settings = files.settings()
    heads = settings.get("motion_num_attention_heads")
    if heads is None:
        return {}, (
            f"nothing beside {files.source} tells the heads of its attention; those of the config are taken "
            "(model.unet.heads; AnimateDiff's have 8): an adapter's config.json beside it says them",
        )
    for name, ours in (("motion_max_seq_length", "max_frames"), ("use_motion_mid_block", "middle")):
        if settings.get(name, temporal[ours]) != temporal[ours]:
            raise UserError(
                f"config.json beside {files.source} says {name}={settings[name]}, its tensors say {temporal[ours]}: "
                "it is of other motion modules; put theirs there, or none"
            )
    if isinstance(heads, list):
        if len(set(heads)) > 1:
            raise UserError(
                f"{files.source} has {heads} heads at its levels; here all levels have the same number: give other "
                "motion modules, such as AnimateDiff's"
            )
        heads = heads[0]
    told = {"heads": heads, "groups": settings.get("motion_norm_num_groups")}
    return {name: value for name, value in told.items() if value is not None}, ()


def _translate(key: str) -> str:
    if _TABLE.fullmatch(key):
        return ""
    for pattern, replacement in _RULES:
        key = re.sub(pattern, replacement, key)
    return key


def _check_positions(files: TensorFiles, key: str) -> None:
    table = files.read(key).astype(np.float32)
    expected = np.asarray(position_features(table.shape[-2], table.shape[-1]))
    # Half precision keeps three digits.
    if table.shape[0] != 1 or np.abs(table[0] - expected).max() > 2e-3:
        raise UserError(
            f"{key} of {files.source} is not the sine that AnimateDiff's modules have; they were trained with "
            "positions that this network does not compute"
        )
