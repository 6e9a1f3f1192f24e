"""Optimizers from config: Adam or AdamW with warm-up, decay and clipping."""

from __future__ import annotations

import ml_collections
import optax

from dexportrait_jax.errors import UserError


def learning_rate_schedule(config: ml_collections.ConfigDict, num_steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup_steps`, then constant or cosine down to `final_fraction`."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.decay == "constant":
        after = optax.constant_schedule(peak)
    elif config.decay == "cosine":
        after = optax.cosine_decay_schedule(peak, max(num_steps - warmup, 1), config.final_fraction)
    else:
        raise UserError(f"optimizer decay is 'constant' or 'cosine', not {config.decay!r}")
    if warmup == 0:
        return after
    # Starts at peak/warmup rather than at 0: a first step that changes nothing is a step lost.
    ramp = optax.linear_schedule(peak / warmup, peak, warmup)
    return optax.join_schedules([ramp, after], [warmup])


def make_optimizer(
    config: ml_collections.ConfigDict, num_steps: int
) -> optax.GradientTransformation:
    """The transformation for one phase.

    Config keys: name (adam | adamw), learning_rate, b1, b2, eps, weight_decay, warmup_steps,
    decay (constant | cosine), final_fraction, clip_norm (0 = off; global norm over the phase's groups).
    """
    steps = []
    if config.clip_norm > 0:
        steps.append(optax.clip_by_global_norm(config.clip_norm))
    steps.append(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps))
    if config.name == "adamw":
        steps.append(optax.add_decayed_weights(config.weight_decay))
    elif config.name != "adam":
        raise UserError(f"optimizer name is 'adam' or 'adamw', not {config.name!r}")
    steps.append(optax.scale_by_learning_rate(learning_rate_schedule(config, num_steps)))
    return optax.chain(*steps)
