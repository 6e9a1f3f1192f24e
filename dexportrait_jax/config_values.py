"""What every key of a config may be: one table of kinds, ranges and words for all stages.

A value outside of it would end in a traceback hours later, or train something else in silence. Kinds are held against
the table where a value is read from the command line, ranges and words where a run, a plan or a task begins; what two
keys have to do with each other is said by the tasks. Ranges keep out what has no meaning, not what is unwise.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from dexportrait_jax.choices import ANIMATOR, AUTOENCODER, MOTION, OPTIMIZER, nearest
from dexportrait_jax.errors import UserError
from dexportrait_jax.value_rules import (
    Rule,
    interval,
    is_int,
    is_multiplier,
    is_number,
    one_of,
    or_none,
    real,
    several,
    whole,
)

SWITCH = Rule("bool", lambda value: isinstance(value, bool))
TEXT = Rule("str", lambda value: isinstance(value, str))
COUNT, SIZE = whole(0), whole(1)
SIZES = several(SIZE)
SHARE, WEIGHT, POSITIVE = real(least=0, most=1), real(least=0), real(above=0)
DECAY = real(least=0, below=1)
PARTS = real(above=0, below=1)
LANDMARKS = Rule("int", is_int, "1 to 68", lambda value: 1 <= value <= 68)
# Of parameters' paths, with factors of their learning rate.
MULTIPLIERS = several(
    Rule("(str, float)", is_multiplier, "0 or more", lambda pair: 0 <= pair[1] < math.inf), 0
)
AXIS = dataclasses.replace(
    SIZE,
    range=f"{SIZE.range}, or -1 for all devices that are left",
    contains=lambda value: value == -1 or SIZE.contains(value),
)

# By dotted key, where * is one part of it; the first that fits holds.
TABLE: dict[str, Rule] = {
    **{key: one_of(*words) for key, words in {**AUTOENCODER, **MOTION, **ANIMATOR}.items()},
    **{f"optim.*.{key}": one_of(*words) for key, words in OPTIMIZER.items()},
    "stage": TEXT,
    "variant": TEXT,
    "seed": whole(0, bits=32),
    "num_steps": SIZE,
    "accumulate": SIZE,
    "ema_decay": DECAY,
    "max_skipped_in_a_row": SIZE,
    "log_every": SIZE,
    "report.stuck_minutes": WEIGHT,
    "report.spikes": WEIGHT,
    "report.tensorboard": SWITCH,
    "report.wandb": TEXT,
    "report.peak_tflops": WEIGHT,
    "report.profile.*": COUNT,
    "mesh.*": AXIS,
    "checkpoint.minutes": WEIGHT,
    "checkpoint.every_steps": COUNT,
    "checkpoint.keep": SIZE,
    "checkpoint.timeout_seconds": SIZE,
    "evaluate.every_steps": COUNT,
    "evaluate.at_end": SWITCH,
    "evaluate.split": TEXT,
    "init.*": TEXT,
    "pretraining.steps": COUNT,
    "optim.*.learning_rate": WEIGHT,
    "optim.*.b1": DECAY,
    "optim.*.b2": DECAY,
    "optim.*.eps": POSITIVE,
    "optim.*.weight_decay": WEIGHT,
    "optim.*.warmup_steps": COUNT,
    "optim.*.final_fraction": SHARE,
    "optim.*.clip_norm": WEIGHT,
    "optim.*.matrix_rms": POSITIVE,
    "optim.*.multipliers": MULTIPLIERS,
    "optim.*.lazy_correction": SWITCH,
    "optim.*.decay_ends_with_run": SWITCH,
    # --- data
    "data.path": TEXT,
    "data.latents": TEXT,
    "data.split": TEXT,
    "data.batch_size": SIZE,
    "data.targets": SIZE,
    "data.frames": SIZE,
    "data.frame_stride": SIZE,
    "data.source_margin": COUNT,
    "data.cross_view": SHARE,
    "data.*_size": whole(1, bits=16),
    "data.second_expression": SWITCH,
    "data.workers": COUNT,
    "data.cache_megabytes": COUNT,
    "data.calm.max_difference": SHARE,
    "data.calm.candidates": SIZE,
    "data.augment.*.probability": SHARE,
    "data.augment.similarity.roll": real(least=0, most=180),
    "data.augment.similarity.scale": interval(above=0),
    "data.augment.similarity.shift": SHARE,
    "data.augment.*.brightness": SHARE,
    "data.augment.*.contrast": SHARE,
    "data.augment.*.saturation": SHARE,
    "data.augment.*.hue": SHARE,
    "data.augment.expression_crop.gray": SWITCH,
    "data.augment.*.gray": SHARE,
    "data.augment.pose_mask.applied": SWITCH,
    "data.augment.*.dilation": SHARE,
    "data.augment.pose_mask.dilation_range": interval(least=0, most=1),
    "data.augment.pose_mask.minimum_height": WEIGHT,
    "data.augment.pose_mask.fill_jitter": SHARE,
    "data.augment.*.blur": SHARE,
    "data.augment.expression_rotation.degrees": real(least=0, most=180),
    "data.augment.expression_crop.margin": POSITIVE,
    "data.augment.expression_crop.margin_range": interval(above=0),
    "data.augment.expression_crop.centre_jitter": WEIGHT,
    "data.augment.expression_crop.*": SWITCH,
    "data.augment.expression_affine.points": SIZE,
    "data.augment.expression_affine.displacement": WEIGHT,
    "data.augment.component_mask.parts": several(TEXT),
    # --- losses
    "loss.perceptual_weights": TEXT,
    "loss.sample": SWITCH,
    "loss.adversarial_start": COUNT,
    "loss.adversarial_images": COUNT,
    "loss.r1_every": SIZE,
    "loss.gradient_norms_every": COUNT,
    "loss.landmark_maps": LANDMARKS,
    "loss.*.decay_steps": COUNT,
    "loss.*": WEIGHT,
    "loss.*.*": WEIGHT,
    "sample_latents": SWITCH,
    "min_snr_gamma": WEIGHT,
    "component_weight": WEIGHT,
    "noise_offset": WEIGHT,
    "timestep_power": POSITIVE,
    "dropout.reference_tokens": DECAY,
    "dropout.*": SHARE,
    # --- networks
    "model.*.widths": SIZES,
    "model.autoencoder.middle_attention": SWITCH,
    "model.autoencoder.scale": POSITIVE,
    "model.denoiser.expression_heads": or_none(SIZE),
    "model.denoiser.expression_linear": SWITCH,
    "model.denoiser.expression_tokens": several(SIZE, exactly=2),
    "model.expression.dropout": DECAY,
    "model.expression.leak": real(least=0, most=1),
    "model.generator.expression_gain": real(),
    "model.generator.expression_mixing": real(),
    "model.generator.mapping_features": or_none(SIZE),
    "model.image_encoder.feed_forward": or_none(SIZE),
    "model.generator.rgb_channels": or_none(SIZES),
    "model.generator.volume_shape": several(SIZE, exactly=3),
    "model.generator.down_channels": SIZES,
    "model.generator.up_channels": SIZES,
    "model.generator.appearance_*": SIZES,
    "model.pose.depths": several(COUNT),
    "model.pose.dims": SIZES,
    "model.pose.scale_limit": POSITIVE,
    "model.pose.translation_limit": or_none(POSITIVE),
    "model.reference.raymap_reference": SWITCH,
    "model.temporal.middle": SWITCH,
    "model.*.block_channels": SIZES,
    "model.*.blocks": COUNT,
    "model.*.*": SIZE,
    # --- diffusion and sampling
    "diffusion.steps": or_none(whole(2)),
    "diffusion.beta_*": or_none(PARTS),
    "diffusion.*": or_none(SWITCH),
    "sampling.steps": SIZE,
    "sampling.guidance": WEIGHT,
    "sampling.hybrid_steps": COUNT,
    "sampling.expression_guidance": or_none(WEIGHT),
    "sampling.offset": COUNT,
    "sampling.eta": SHARE,
    "sampling.temperature": WEIGHT,
    "sampling.shared_noise": SHARE,
    "sampling.overlap": COUNT,
}


@functools.cache
def rule_of(key: str) -> Rule | None:
    """The rule of a dotted key; None of one that only a config of someone's own has."""
    if key in TABLE:
        return TABLE[key]
    fitting = (rule for pattern, rule in TABLE.items() if fnmatch.fnmatchcase(key, pattern))
    return next(fitting, None)


def as_kind(key: str, value: Any, old: Any) -> Any:
    """`value` as the key holds it: whole numbers become floats, lists tuples, where those are wanted.

    Args:
      key: dotted, as in "optim.generator.b1".
      value: what was given.
      old: what it stands in place of; of a key without a rule, it says the kind.

    Raises:
      UserError: another kind; None where the key may not be None; a tuple of other things.
    """
    rule = rule_of(key) or _as_before(old)
    if isinstance(value, list | tuple):
        value = _tuples(value)
    if not rule.is_kind(value):
        raise UserError(f"--config.{key}={value}: expected {_expected(rule)}, like {old!r}")
    return float(value) if is_int(value) and rule.kind.startswith("float") else value


def check(config: Mapping[str, Any]) -> None:
    """UserError in one line for the first key whose value is not what the table says: key, value, what is allowed."""
    for key, value in _leaves(config):
        rule = rule_of(key)
        if rule is None:
            continue
        if not rule.is_kind(value):
            raise UserError(f"config.{key}={value!r}: expected {_expected(rule)}")
        if rule.words and value not in rule.words:
            names = ", ".join(str(word) for word in rule.words if word is not None)
            raise UserError(
                f"config.{key} is one of {names}, not {value!r}{nearest(str(value), map(str, rule.words))}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config.{key}={value:g} is no number; give a finite one")
        if not rule.contains(value):
            none = ", or None" if rule.is_kind(None) else ""
            raise UserError(f"config.{key}={value} is out of range; it is {rule.range}{none}")


def _expected(rule: Rule) -> str:
    words = ", ".join(str(word) for word in rule.words if word is not None)
    said = f"one of {words}" if words else rule.range
    return f"{rule.kind}, {said}" if said else rule.kind


def _as_before(old: Any) -> Rule:
    """Of a key that the table does not know: the kind of the value that is there."""
    if old is None:
        return Rule("any value", lambda value: True)
    if isinstance(old, bool):
        return SWITCH
    if isinstance(old, float):
        return Rule("float", is_number)
    if is_int(old):
        return Rule("int", is_int)
    if isinstance(old, tuple | list):
        return Rule("tuple", lambda value: isinstance(value, tuple))
    return Rule(type(old).__name__, lambda value: isinstance(value, type(old)))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _leaves(config: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            yield from _leaves(value, f"{before}{key}.")
        else:
            yield before + key, value
