"""What an animator's config may say: words that are known, numbers that are finite, sizes that go together.

A misspelt word would train another model in silence; a size that does not fit would end while the step is traced.
"""

from __future__ import annotations

import math

import ml_collections

from dexportrait_jax.choices import ANIMATOR, check_choices
from dexportrait_jax.errors import UserError

LARGEST = 1024  # pixels up to which sizes that fit are named, at least


def check_config(config: ml_collections.ConfigDict) -> None:
    """UserError in one line for the first thing that is wrong about a config of either animator stage."""
    check_choices(config, ANIMATOR)
    for name, value in config.sampling.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config.sampling.{name}={value:g} is no number; give a finite one")
    if config.sampling.overlap < 0:
        raise UserError(
            f"config.sampling.overlap={config.sampling.overlap}: windows of a long video share 0 frames or more"
        )
    _check_image_size(config)
    attn2, encoder = config.model.attn2, config.model.image_encoder
    if attn2.attn2 == "clip_image" and attn2.cross_attention_features != encoder.projection:
        raise UserError(
            f"config.model.attn2.cross_attention_features={attn2.cross_attention_features}: the image encoder's "
            f"embedding, which attn2 reads, has {encoder.projection}; give "
            f"--config.model.attn2.cross_attention_features={encoder.projection} and a UNet of that context, or "
            "another image encoder"
        )
    frames, longest = config.data.frames, config.model.temporal.max_frames
    if config.stage == "animator_video" and frames > longest:
        raise UserError(
            f"config.data.frames={frames}: the temporal modules take clips of at most {longest} frames; give "
            f"--config.data.frames={longest} or fewer, or --config.model.temporal.max_frames={frames}"
        )


def _check_image_size(config: ml_collections.ConfigDict) -> None:
    size = config.data.image_size
    if not _fits(config, size):
        largest = max(LARGEST, 2 * size)
        fitting = [str(other) for other in range(1, largest + 1) if _fits(config, other)]
        if not fitting:
            raise UserError(
                f"config.model.unet.block_channels={tuple(config.model.unet.block_channels)}: no picture up to "
                f"{largest} pixels has grids whose depth divides them; give widths that are multiples of 32, or "
                "--config.model.denoiser.warp_kernel=0"
            )
        raise UserError(
            f"config.data.image_size={size} does not fit the levels of model.autoencoder and model.unet; up to "
            f"{largest} there are {', '.join(fitting)}"
        )


def _fits(config: ml_collections.ConfigDict, size: int) -> bool:
    """Whether pictures divide through all levels, and features reshape to volumes of depth h/2 (method.md 4.3)."""
    model = config.model
    widths = model.unet.block_channels
    side, rest = divmod(size, 2 ** (len(model.autoencoder.block_channels) - 1))
    if rest or side < 1 or side % 2 ** (len(widths) - 1):
        return False
    # Every level has transformers but the last, whose grid is the middle's.
    grids = [side >> level for level in range(len(widths))]
    return model.denoiser.warp_kernel == 0 or all(
        grid > 1 and width % (grid // 2) == 0 for grid, width in zip(grids, widths, strict=True)
    )
