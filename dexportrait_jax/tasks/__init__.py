"""What each stage trains. A task gives the loop in `train.py` its networks, phases and evaluation."""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import ml_collections
from jaxtyping import Array, Float

from data_pipelines.survey import Survey
from dexportrait_jax.errors import UserError
from dexportrait_jax.state import Network
from dexportrait_jax.step import Phase

_STAGES = {
    "motion": "motion",
    "autoencoder": "autoencoder",
    "animator_image": "animator",
    "animator_video": "animator",
}


class Task(Protocol):
    """What the loop asks of a stage.

    Attributes:
      networks: parameter group -> network; groups in no phase are frozen.
      phases: what is trained, in order.
      ema_groups: groups of which a moving average is kept.
    """

    networks: dict[str, Network]
    phases: tuple[Phase, ...]
    ema_groups: tuple[str, ...]

    def check_data(self, found: Survey) -> None:
        """UserError where the stage cannot be trained on these data, before anything is compiled."""

    def events(self, step: int) -> frozenset[str]:
        """What happens in step number `step` (from 0) beside what happens in every step."""

    def pretrained(self) -> dict[str, Any]:
        """Groups that start from saved weights, as host arrays; all frozen ones have to be among them.

        A group that is trained may be there in part; the rest of it starts fresh.
        """

    def constants(self) -> dict[str, Any]:
        """Groups that losses need but checkpoints do not hold, because they come from assets."""

    def abstract_constants(self) -> dict[str, Any]:
        """Shapes and types of `constants()`, which nothing is read for."""

    def preview(
        self, params: dict[str, Any], batch: dict[str, Array]
    ) -> Float[Array, "sources*targets h w 3"]:
        """What the model makes of a batch's targets now, in [-1, 1]; see `pictures.write_samples`."""


def task_module(stage: str):
    """The module of a stage; it has `build_networks(config)` and `make(config) -> Task`."""
    if stage not in _STAGES:
        raise UserError(f"config.stage is one of {', '.join(_STAGES)}, not {stage!r}")
    return importlib.import_module(f"dexportrait_jax.tasks.{_STAGES[stage]}")


def build_networks(config: ml_collections.ConfigDict) -> dict[str, Network]:
    """All parameter groups of the config's stage, without making a single parameter."""
    return task_module(config.stage).build_networks(config)


def make_task(config: ml_collections.ConfigDict) -> Task:
    """The task of the config's stage; UserError for networks whose sizes do not go together."""
    module = task_module(config.stage)
    try:
        return module.make(config)
    except (ArithmeticError, ValueError) as error:  # what networks say of their sizes
        raise UserError(f"config.model does not fit together: {error}; give other sizes") from error
