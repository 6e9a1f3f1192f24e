"""Optimizers from config: Adam, AdamW or Muon with warm-up, decay and clipping."""

from __future__ import annotations

import jax
import ml_collections
import optax
import optax.contrib

from dexportrait_jax.choices import nearest
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

    Config keys: name (adam | adamw | muon), learning_rate, b1, b2, eps, weight_decay (adamw and muon), warmup_steps,
    decay (constant | cosine), final_fraction, clip_norm (0 = off; global norm over the phase's groups),
    matrix_rms (muon: root mean square of a kernel's update at learning rate 1), multipliers (pairs of the start of
    a parameter's path, "group/module", and a factor of its learning rate; the first that fits holds).

    Raises:
        UserError: another name or decay, a decay of weights that adam has not, multipliers that are no such pairs. The
            transformation's init: a multiplier of no group.
    """
    if config.name == "adam" and config.weight_decay:
        raise UserError(
            f"optimizer adam decays no weights, and weight_decay is {config.weight_decay:g}; give name=adamw, or "
            "weight_decay=0"
        )
    steps = []
    if config.clip_norm > 0:
        steps.append(optax.clip_by_global_norm(config.clip_norm))
    if config.name == "muon":
        steps.append(_muon(config))
    else:
        steps.append(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps))
        if config.name == "adamw":
            steps.append(optax.add_decayed_weights(config.weight_decay))
        elif config.name != "adam":
            raise UserError(f"optimizer name is 'adam', 'adamw' or 'muon', not {config.name!r}")
    if config.multipliers:
        steps.append(_scale_by_path(config.multipliers))
    steps.append(optax.scale_by_learning_rate(learning_rate_schedule(config, num_steps)))
    return optax.chain(*steps)


def with_lazy_penalty(config: ml_collections.ConfigDict, every: int) -> ml_collections.ConfigDict:
    """The optimizer of a loss whose penalty comes in every `every`-th step alone (StyleGAN2, appendix B).

    With c = every / (every + 1) the rate times c and the betas to the power of c. There the penalty is a step of its
    own, so that `every` steps are every + 1 updates of 1 / c the strength; here it is part of the step, and the
    correction only makes the discriminator's optimizer the published one.
    """
    share = every / (every + 1)
    corrected = ml_collections.ConfigDict(config.to_dict())
    corrected.learning_rate = share * config.learning_rate
    corrected.b1, corrected.b2 = config.b1**share, config.b2**share
    return corrected


def _muon(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Muon (Jordan 2024; Liu et al. 2502.16982) for kernels, Adam with Nesterov's momentum for all else; no rate yet.

    A kernel is the matrix from all it reads, window and features, to the features it gives. Depthwise kernels
    are no matrix of that kind.
    """

    def dimension_numbers(params):
        def of(path, leaf):
            if path[-1].key != "kernel" or leaf.ndim < 2 or leaf.shape[-2] == 1:
                return None
            inputs = tuple(range(leaf.ndim - 1))
            return optax.contrib.MuonDimensionNumbers(inputs, (leaf.ndim - 1,))

        return jax.tree_util.tree_map_with_path(of, params)

    return optax.contrib.muon(
        learning_rate=-1.0,  # the sign and the rate come at the end of the chain, as for the others
        weight_decay=config.weight_decay,
        adam_weight_decay=config.weight_decay,
        adam_b1=config.b1,
        adam_b2=config.b2,
        eps=config.eps,
        consistent_rms=config.matrix_rms,
        muon_weight_dimension_numbers=dimension_numbers,
    )


def _scale_by_path(multipliers: tuple[tuple[str, float], ...]) -> optax.GradientTransformation:
    for pair in multipliers:
        if not isinstance(pair, tuple) or [isinstance(one, str) for one in pair] != [True, False]:
            raise UserError(
                f"optimizer multipliers are pairs such as (('denoiser/conv_in',0.1),), not {multipliers}"
            )

    def init(params):
        # The group alone: a module may be one that a config leaves out.
        for group in (start.partition("/")[0] for start, _ in multipliers):
            if not any(name.startswith(group) for name in params):
                raise UserError(
                    f"optimizer multipliers name the group {group!r}, but this phase trains {', '.join(params)}"
                    f"{nearest(group, params)}"
                )
        return optax.EmptyState()

    def update(updates, state, params=None):
        del params

        def scale(path, leaf):
            name = "/".join(str(key.key) for key in path)
            factors = (factor for start, factor in multipliers if name.startswith(start))
            return leaf * next(factors, 1.0)

        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(init, update)
