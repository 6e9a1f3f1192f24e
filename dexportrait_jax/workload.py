"""What a config asks a machine to compute, by shape alone: no data, no weights, no memory."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import ml_collections

from data_pipelines import loading
from dexportrait_jax import flops
from dexportrait_jax.models.attention import attention_backend
from dexportrait_jax.models.convolution import convolution_backend
from dexportrait_jax.programs import abstract_state
from dexportrait_jax.step import make_step
from dexportrait_jax.tasks import Task, make_task

Shapes = dict[str, Any]


def forward_work(config: ml_collections.ConfigDict, targets: int = 1) -> flops.Work:
    """The first loss of a step forward for one source, with so many targets or with one clip.

    In the motion trainer that is every network once and the perceptual one on both pictures; by scope it is
    told apart into the parameter groups and those of the task's constants.
    """
    task = make_task(config)
    events = task.events(config.num_steps - 1)
    phase = next(phase for phase in task.phases if phase.when is None or phase.when in events)
    params = {name: network.abstract for name, network in task.networks.items()}

    def forward(params: Shapes, batch: Shapes, key: jax.Array) -> jax.Array:
        return phase.loss(params, batch, key, 0, {}, events)[0]

    batch = abstract_batch({**config.data, "batch_size": 1, "targets": targets})
    key = jax.eval_shape(lambda: jax.random.key(0))
    return _count(task, forward, params | task.abstract_constants(), batch, key)


def step_work(config: ml_collections.ConfigDict, events: Collection[str]) -> flops.Work:
    """One training step of the config's batch with these events: losses, gradients, everything."""
    task = make_task(config)
    step = make_step(
        task.phases, seed=config.seed, ema_decay=config.ema_decay, accumulate=config.accumulate
    )
    return _count(
        task,
        lambda state, batch, constants: step(state, batch, constants, frozenset(events)),
        abstract_state(task, config),
        abstract_batch(config.data),
        task.abstract_constants(),
    )


def abstract_batch(data: Any) -> Shapes:
    """Shapes and types of a batch of ``config.data``."""
    return {
        name: jax.ShapeDtypeStruct(shape, kind)
        for name, (shape, kind) in loading.batch_shapes(data).items()
    }


def _count(task: Task, function, *arguments: Shapes) -> flops.Work:
    # As the networks define them: a CPU's way of writing them would be counted with its detours, and a kernel's
    # products cannot be seen.
    with convolution_backend("xla"), attention_backend("plain"):
        return flops.count(
            function, *arguments, scopes=(*task.networks, *task.abstract_constants())
        )
