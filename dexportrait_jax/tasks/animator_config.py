"""What an animator's config may say: values that are known (`config_values.py`), and that go together.

A misspelt word would train another model in silence; a size that does not fit would end while the step is traced.
"""

from __future__ import annotations

import ml_collections

from dexportrait_jax import config_values
from dexportrait_jax.errors import UserError

LARGEST = 1024  # pixels up to which sizes that fit are named, at least


def check_config(config: ml_collections.ConfigDict) -> None:
    """UserError in one line for the first thing that is wrong about a config of either animator stage."""
    config_values.check(config)
    _check_sampling(config)
    dropped = sum(config.dropout[name] for name in ("everything", "expression", "pose"))
    if dropped > 1 + 1e-9:  # sums round
        raise UserError(
            f"config.dropout: everything, expression and pose are dropped one or the other, but their shares are "
            f"{dropped:g} together; give 1 or less"
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
    if config.stage == "animator_video":
        _check_clips(config)


def _check_sampling(config: ml_collections.ConfigDict) -> None:
    """What `animate` would refuse of an export's own settings, said before it is trained."""
    sampling = config.sampling
    if 2 * sampling.hybrid_steps > sampling.steps:
        raise UserError(
            f"config.sampling.hybrid_steps={sampling.hybrid_steps}: at most half of "
            f"config.sampling.steps={sampling.steps}, which is {sampling.steps // 2}"
        )
    if sampling.expression_guidance is not None and sampling.reading != "three_scale":
        raise UserError(
            f"config.sampling.expression_guidance={sampling.expression_guidance:g} needs "
            "--config.sampling.reading=three_scale; give that, or None"
        )


def _check_clips(config: ml_collections.ConfigDict) -> None:
    if config.data.mode != "video":
        raise UserError(
            f"config.data.mode={config.data.mode!r}: the temporal modules learn from clips; give "
            "--config.data.mode=video, or train animator_image"
        )
    frames, longest = config.data.frames, config.model.temporal.max_frames
    if config.sampling.overlap >= frames:
        raise UserError(
            f"config.sampling.overlap={config.sampling.overlap}: windows of a long video have "
            f"config.data.frames={frames} frames, so two can share 0 to {frames - 1}; give "
            f"--config.sampling.overlap={frames - 1} or fewer"
        )
    if frames > longest:
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
