"""What flags and config keys that choose a way of doing something may be: one table for the command line, files of
jobs and configs.

Imports nothing heavy: the command line reads it for its help.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from dexportrait_jax.errors import UserError

Choices = Mapping[str, tuple[Any, ...]]

# Keys of config.sampling. Most are flags of `animate`, too.
SAMPLING: Choices = {
    "reading": ("hybrid", "expression_in_both", "three_scale"),
    "expression_null": ("learned", "zero", "source"),
    "null_reference": ("dropped", "kept"),
    "null_pose": ("zero", "source"),
    "start": ("noise", "ref_blur"),
    "spacing": ("leading", "trailing", "linspace"),
    "window_offset": ("none", "random"),
    "window_ends": ("open", "closed"),
    "window_weights": ("triangular", "equal"),
}
# Flags of `animate`, in a file of jobs too.
ANIMATE: Choices = {
    "smooth": ("none", "gaussian", "one_euro", "kalman"),
    "paste_mask": ("face", "crop"),
    "length": ("shortest", "hold"),
    **SAMPLING,
}
_RAYMAPS = ("displacement", "plucker6", "none")
# Keys of an animator's config.
ANIMATOR: Choices = {
    "model.attn2.attn2": ("none", "null_text", "clip_image"),
    "model.reference.raymap": _RAYMAPS,
    "model.reference.raymap_w": (1, 0),
    "model.denoiser.raymap": _RAYMAPS,
    "model.denoiser.raymap_w": (1, 0),
    "model.denoiser.warp_kernel": (3, 1, 0),
    "model.denoiser.warp_padding": ("zeros", "border"),
    "model.denoiser.expression_injector": ("in_block", "xnemo", "none"),
    "model.denoiser.expression_null": ("learned", "zero"),
    "model.temporal.norm": ("clip", "frame"),
    "model.image_encoder.activation": ("quick_gelu", "gelu"),
    "diffusion.preset": ("sd15", "xnemo", "zero_snr", None),
    "diffusion.prediction": ("epsilon", "v", "sample", None),
    **{f"sampling.{name}": values for name, values in SAMPLING.items()},
}


def check_choices(config: Mapping[str, Any], choices: Choices) -> None:
    """UserError for the first key, such as "sampling.start", that is none of its values; it names the nearest."""
    for dotted, values in choices.items():
        *sections, key = dotted.split(".")
        node = config
        for section in sections:
            node = node[section]
        if key in node and node[key] not in values:
            names = ", ".join(str(value) for value in values if value is not None)
            raise UserError(
                f"config.{dotted} is one of {names}, not {node[key]!r}{nearest(str(node[key]), map(str, values))}"
            )


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the known one that is meant, where one is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
