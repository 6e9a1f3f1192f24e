"""A task as programs: the shape of its State, its first values, and the step compiled for a mesh."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from data_pipelines import loading
from dexportrait_jax import sharding
from dexportrait_jax.compiling import placed
from dexportrait_jax.errors import UserError
from dexportrait_jax.platforms import jit_on
from dexportrait_jax.state import filled
from dexportrait_jax.step import init_optimizers, make_step
from dexportrait_jax.tasks import Task


def build(
    task: Task, config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> tuple[Any, Any, Callable[..., tuple[Any, dict[str, jax.Array]]]]:
    """Shapes of the State with their shardings, the shardings, and the compiled-on-first-use step."""
    abstract = abstract_state(task, config)
    shardings = sharding.state_shardings(abstract, mesh)
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract,
        shardings,
    )

    def in_use(weights):
        places = sharding.shardings_in_use(weights, mesh)
        return jax.lax.with_sharding_constraint(weights, places)

    step = make_step(
        task.phases,
        seed=config.seed,
        ema_decay=config.ema_decay,
        accumulate=config.accumulate,
        in_use=in_use if mesh.shape["fsdp"] * mesh.shape["context"] > 1 else None,
    )
    compiled = jit_on(
        mesh,
        step,
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
        static_argnums=3,
    )
    return abstract, shardings, compiled


def try_programs(task: Task, config, step_function, abstract: Any, mesh, done: int) -> None:
    """Goes through all kinds of steps by shape alone: the later ones must not fail after hours of others.

    Those that come now are not traced again when they are compiled.

    Raises:
      UserError: a phase cannot be built with the config's sizes.
    """
    now = task.events(done)
    later = {task.events(step) for step in range(done, config.num_steps)} - {now}
    kinds = [now, *sorted(later, key=sorted)]
    shapes = loading.batch_shapes(config.data)
    batch = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
    # JAX remembers a trace by shapes and places.
    batch = placed(batch, sharding.batch_shardings(batch, mesh))
    constants = task.abstract_constants()
    constants = placed(constants, jax.tree.map(lambda _: sharding.replicated(mesh), constants))
    with jax.set_mesh(mesh):
        for events in kinds:
            try:
                step_function.eval_shape(abstract, batch, constants, events)
            except (ArithmeticError, IndexError, TypeError, ValueError) as error:
                steps = f"steps with {', '.join(sorted(events))}" if events else "its steps"
                raise UserError(
                    f"{config.stage}: {steps} cannot be built: sizes in config.model and config.data do not fit "
                    f"together ({' '.join(str(error).split())[:300]}); --debug shows where"
                ) from error


def abstract_state(task: Task, config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Shapes and types of the State; no memory is used."""
    trained = {group for phase in task.phases for group in phase.groups}
    frozen_type = jnp.dtype(config.frozen_dtype)
    params = {
        group: network.abstract
        if group in trained
        else jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, frozen_type), network.abstract
        )
        for group, network in task.networks.items()
    }
    return {
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "params": params,
        "opt": jax.eval_shape(lambda tree: init_optimizers(task.phases, tree), params),
        "ema": {group: params[group] for group in task.ema_groups},
    }


def first_state(task: Task, config: ml_collections.ConfigDict, shardings: Any) -> dict[str, Any]:
    """The State before the first step: pretrained groups where the task has them, else fresh ones.

    Every group is put in its place before the next one is made: no device has to hold them all.

    Raises:
      UserError: a group would be neither trained nor read from weights.
    """
    pretrained = task.pretrained()
    trained = {group for phase in task.phases for group in phase.groups}
    whole = {
        name
        for name, tree in pretrained.items()
        if jax.tree.structure(tree) == jax.tree.structure(task.networks[name].abstract)
    }
    forgotten = [name for name in task.networks if name not in trained and name not in whole]
    if forgotten:
        raise UserError(
            f"{config.stage}: {', '.join(forgotten)} would stay random, because this stage does not train it and "
            "config.init names no weights that hold it; name an export that does"
        )
    abstract = abstract_state(task, config)
    params = {}
    for group, network in task.networks.items():
        tree = pretrained.pop(group, {})
        if group not in whole:
            # The group's name, not its place in a list, decides what it is drawn from.
            key = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(group.encode()))
            tree = filled(tree, network.init(key))
        typed = jax.tree.map(
            lambda shape, leaf: leaf.astype(shape.dtype), abstract["params"][group], tree
        )
        params[group] = sharding.put(typed, shardings["params"][group])
        del tree, typed
    make_optimizers = jax.jit(
        functools.partial(init_optimizers, task.phases), out_shardings=shardings["opt"]
    )
    # Copies: the step gives its input's memory away, and one buffer cannot be given twice.
    averages = {group: jax.tree.map(jnp.copy, params[group]) for group in task.ema_groups}
    return {
        "step": sharding.put(np.zeros((), np.int32), shardings["step"]),
        "params": params,
        "opt": make_optimizers(params),
        "ema": jax.device_put(averages, shardings["ema"]),
    }
