"""What an animator's config may say: words that are known, numbers that are finite.

A misspelt word would train another model in silence.
"""

from __future__ import annotations

import math

import ml_collections

from dexportrait_jax.choices import ANIMATOR, check_choices
from dexportrait_jax.errors import UserError


def check_config(config: ml_collections.ConfigDict) -> None:
    """UserError in one line for the first thing that is wrong about a config of either animator stage."""
    check_choices(config, ANIMATOR)
    for name, value in config.sampling.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config.sampling.{name}={value:g} is no number; give a finite one")
