"""What flags and config keys that choose a way of doing something may be: one table for the command line, files of
jobs and configs. `config_values.py` has them in its table of all keys.

Imports nothing heavy: the command line reads it for its help.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

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
_POINTS = ("centres", "corners")
_NORMS = ("group", "instance", "layer")
# Of what is computed. Not float16: it would lose small gradients in silence, as nothing scales the loss.
_TYPES = ("float32", "bfloat16")
# Keys of every stage: of how it computes, and of its pictures.
_COMMON: Choices = {
    "dtype": _TYPES,
    "frozen_dtype": (*_TYPES, "float16"),  # that is stored alone, and has no gradient
    "data.mode": ("pairs", "video"),
    "data.augment.similarity.border": ("reflect", "replicate", "black"),
}
# Of every optimizer.
OPTIMIZER: Choices = {"name": ("adam", "adamw", "muon"), "decay": ("constant", "cosine")}
_REMAT: Choices = {"remat": ("none", "products", "blocks")}
_AUTOENCODER: Choices = {"model.autoencoder.kind": ("vae", "tiny")}
# Those of every stage that has the encoders.
_ENCODERS: Choices = {
    **_COMMON,
    "model.pose.rotation_head": ("euler_bins", "6d"),
    "model.pose.initialisation": ("published", "fan_in"),
    "model.expression.kind": ("fan", "fan_sa"),
    "model.expression.pooling": ("average", "max"),
    "model.expression.norm": _NORMS,
    "data.augment.pose_mask.fill": ("mean", "black"),
}
_PERCEPTUAL = ("vgg16", "alexnet")
# Keys of the autoencoder's config.
AUTOENCODER: Choices = {**_COMMON, **_AUTOENCODER, "loss.perceptual": _PERCEPTUAL}
# Keys of the motion trainer's config.
MOTION: Choices = {
    **_ENCODERS,
    **_REMAT,
    "model.appearance.norm": _NORMS,
    "model.generator.norm": _NORMS,
    "model.generator.flatten_stride": ("last", "first"),
    "model.generator.injection": ("modulated", "adain"),
    "model.warp_padding": ("zeros", "border"),
    "loss.perceptual": _PERCEPTUAL,
    "loss.perceptual_form": ("lpips", "features"),
    "loss.clpips_reduction": ("all_positions", "mask_area"),
}
# Keys of an animator's config.
ANIMATOR: Choices = {
    **_ENCODERS,
    **_REMAT,
    **_AUTOENCODER,
    "model.attn2.attn2": ("none", "null_text", "clip_image"),
    "model.reference.raymap": _RAYMAPS,
    "model.reference.raymap_w": (1, 0),
    "model.reference.raymap_points": _POINTS,
    "model.denoiser.drop_attn2": ("image", "always", "never"),
    "model.denoiser.raymap": _RAYMAPS,
    "model.denoiser.raymap_w": (1, 0),
    "model.denoiser.raymap_points": _POINTS,
    "model.denoiser.warp_kernel": (3, 1, 0),
    "model.denoiser.warp_padding": ("zeros", "border"),
    "model.denoiser.volume_order": ("channel_depth", "depth_channel"),
    "model.denoiser.expression_injector": ("in_block", "xnemo", "none"),
    "model.denoiser.expression_place": (
        "before_feed_forward",
        "after_feed_forward",
        "before_text",
    ),
    "model.denoiser.expression_positions": ("sinusoidal", "none"),
    "model.denoiser.expression_null": ("learned", "zero"),
    "model.temporal.norm": ("clip", "frame"),
    "model.image_encoder.activation": ("quick_gelu", "gelu"),
    "diffusion.preset": ("sd15", "xnemo", "zero_snr", None),
    "diffusion.prediction": ("epsilon", "v", "sample", None),
    **{f"sampling.{name}": values for name, values in SAMPLING.items()},
}


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the known one that is meant, where one is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
