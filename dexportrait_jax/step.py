"""The one train step, for every stage.

A stage is a sequence of phases. Each phase differentiates one loss with respect to some parameter groups and
updates them with its own optimizer: a GAN is two phases, a diffusion stage is one. A group in no phase is
frozen: it has no gradient and no optimizer state.

Randomness comes from `fold_in(seed, step)`, so a resumed run draws what the uninterrupted run would have drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dexportrait_jax.platforms import target_platform

Tree = Any


class Outputs(NamedTuple):
    """What a loss gives beside its value.

    Attributes:
      metrics: scalars to record.
      shared: arrays handed to the later phases of the same step (a generated picture, say); gradients do
        not flow through them.
    """

    metrics: dict[str, jax.Array]
    shared: dict[str, jax.Array]


class Phase(NamedTuple):
    """These groups are differentiated by this loss with this optimizer.

    Attributes:
      name: prefix of its metrics and key of its optimizer state.
      groups: the parameter groups it trains.
      loss: `(params, batch, key, step, shared, events) -> (scalar, Outputs)`; params holds every group
        and the constants.
      tx: the optax transformation.
      when: the event that has to be on for the phase to run; None: it always runs.
    """

    name: str
    groups: tuple[str, ...]
    loss: Callable[..., tuple[jax.Array, Outputs]]
    tx: optax.GradientTransformation
    when: str | None = None


def init_optimizers(phases: Sequence[Phase], params: dict[str, Tree]) -> dict[str, Tree]:
    """The optimizer state of every phase, with its counts of skipped steps."""
    return {
        phase.name: {
            "tx": phase.tx.init({group: params[group] for group in phase.groups}),
            "skipped": jnp.zeros((), jnp.int32),
            "skipped_in_a_row": jnp.zeros((), jnp.int32),
        }
        for phase in phases
    }


def make_step(
    phases: Sequence[Phase],
    *,
    seed: int,
    ema_decay: float,
    accumulate: int = 1,
    in_use: Callable[[Tree], Tree] | None = None,
) -> Callable[[Tree, Tree, Tree, frozenset[str]], tuple[Tree, dict[str, jax.Array]]]:
    """Builds the pure function `(state, batch, constants, events) -> (state, metrics)`.

    Args:
      phases: run in this order on the same batch.
      seed: of everything random in the losses.
      ema_decay: decay of the moving average of `state["ema"]`'s groups, warmed up as
        min(decay, (1+n)/(10+n)).
      accumulate: the batch is cut into this many parts along its first axis and the gradients averaged; what a
        phase shares stays in these parts, so that a later phase sees with each part what was made of it.
      in_use: puts weights where they are to lie while losses are computed; the State lies elsewhere.

    `events` are the names of what happens in this step and not in every step (a lazy penalty, a phase that has
    not started before). They are static: each set of them is a program of its own, which computes nothing that
    the step does not need. A conditional inside one program would be a trap, at least on CPUs, where
    convolutions inside it run some forty times slower.

    A step whose loss or gradient is not finite leaves the phase's parameters and optimizer as they were and
    is counted in `opt[phase]["skipped"]` and `["skipped_in_a_row"]`; averages go on towards the parameters that stayed.
    """

    def step_function(state, batch, constants, events=frozenset()):
        step = state["step"]
        key = jax.random.fold_in(jax.random.key(seed), step)
        params, opt = dict(state["params"]), dict(state["opt"])
        metrics: dict[str, jax.Array] = {}
        shared: dict[str, jax.Array] = {}

        for index, phase in enumerate(phases):
            if phase.when is None or phase.when in events:
                trained, opt[phase.name], phase_metrics, given = _run_phase(
                    phase,
                    params,
                    opt[phase.name],
                    constants,
                    batch,
                    jax.random.fold_in(key, index),
                    step,
                    shared,
                    events,
                    accumulate,
                    in_use or (lambda weights: weights),
                )
                params |= trained
                shared |= given
                metrics |= {f"{phase.name}/{name}": value for name, value in phase_metrics.items()}
            metrics[f"{phase.name}/skipped"] = opt[phase.name]["skipped"]
            metrics[f"{phase.name}/skipped_in_a_row"] = opt[phase.name]["skipped_in_a_row"]

        count = step.astype(jnp.float32)
        decay = jnp.minimum(ema_decay, (1.0 + count) / (10.0 + count))
        ema = {
            group: jax.tree.map(
                lambda old, new: old + (1.0 - decay) * (new - old), tree, params[group]
            )
            for group, tree in state["ema"].items()
        }
        return {"step": step + 1, "params": params, "opt": opt, "ema": ema}, metrics

    return step_function


def _run_phase(
    phase, params, opt_state, constants, batch, key, step, shared, events, accumulate, in_use
):
    trained = {group: params[group] for group in phase.groups}
    used = in_use(params)
    frozen = {group: tree for group, tree in used.items() if group not in phase.groups} | constants
    used = {group: used[group] for group in phase.groups}

    def loss_of(trained, batch, key, shared):
        value, outputs = phase.loss(frozen | trained, batch, key, step, shared, events)
        return value.astype(jnp.float32), outputs

    differentiate = jax.value_and_grad(loss_of, has_aux=True)
    if accumulate == 1:
        (value, outputs), gradients = differentiate(used, batch, key, shared)
        metrics, given = outputs
    else:
        (value, metrics, gradients), given = _accumulated(
            differentiate, used, batch, key, shared, accumulate
        )

    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(norm) & jnp.isfinite(value)
    updates, new_tx = phase.tx.update(gradients, opt_state["tx"], trained)
    updated = optax.apply_updates(trained, updates)

    def keep_if_finite(new, old):
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

    new_opt = {
        "tx": keep_if_finite(new_tx, opt_state["tx"]),
        "skipped": opt_state["skipped"] + jnp.where(finite, 0, 1),
        "skipped_in_a_row": jnp.where(finite, 0, opt_state["skipped_in_a_row"] + 1),
    }
    metrics = {"loss": value, "gradient_norm": norm} | metrics
    return keep_if_finite(updated, trained), new_opt, metrics, jax.lax.stop_gradient(given)


def _accumulated(differentiate, trained, batch, key, shared, parts):
    """Mean loss, metrics and gradients over `parts` equal pieces of the batch, one piece at a time.

    Every array of `shared`, and of what is shared in turn, has the piece as its first axis.
    """
    # Every device's own rows in turn: successive rows would lie on few devices, and travel.
    cut = jax.tree.map(lambda leaf: leaf.reshape(-1, parts, *leaf.shape[1:]).swapaxes(0, 1), batch)

    def one(index, piece, given):
        (value, outputs), gradients = differentiate(
            trained, piece, jax.random.fold_in(key, index), given
        )
        return (value, outputs.metrics, gradients), outputs.shared

    def body(total, piece):
        sums, made = one(*piece)
        return jax.tree.map(jnp.add, total, sums), made

    pieces = (jnp.arange(parts), cut, shared)
    shapes, _ = jax.eval_shape(one, *jax.tree.map(lambda leaf: leaf[0], pieces))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    # A loop on the device keeps the memory of one piece. On CPUs, convolutions inside loops run many times slower,
    # so there the pieces are written out one after the other.
    total, made = jax.lax.scan(body, zeros, pieces, unroll=target_platform() == "cpu")
    return jax.tree.map(lambda leaf: leaf / parts, total), made
