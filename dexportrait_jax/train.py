"""The one training loop, read from top to bottom.

    dexportrait train --config=configs/motion.py:tiny --workdir=runs/motion

Running the same command again goes on from the newest checkpoint; a finished run says so. What a stage
trains is in `tasks/`; what one step does is in `step.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

import dexportrait_jax
from data_pipelines import loading
from data_pipelines.files import write_json
from dexportrait_jax import checkpoint, distributed, sharding
from dexportrait_jax import config as configs
from dexportrait_jax.errors import UserError
from dexportrait_jax.metrics import MetricWriter, Progress
from dexportrait_jax.step import init_optimizers, make_step
from dexportrait_jax.tasks import Task, make_task

# Changing these does not make another run of it.
FREE_KEYS = ("num_steps", "log_every", "checkpoint.", "evaluate.", "data.workers", "mesh.")
RESUME_ME = 75  # EX_TEMPFAIL: the launcher should start the same command again


def run_train(
    config: str, workdir: str, overrides: list[str], distributed_mode: str = "auto"
) -> None:
    """The job `train`."""
    distributed.initialize(distributed_mode)
    train(configs.load_config(config, overrides), Path(workdir))


def train(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains until `config.num_steps` and returns the final state.

    Raises:
      UserError: the directory holds another run, the data do not fit, or a phase keeps giving
        non-finite gradients.
      SystemExit: code 75 after SIGTERM, once the state is saved.
    """
    started = time.monotonic()
    with _claimed(workdir, config), _sigterm() as stop_asked:
        # Mesh, task, the shape of everything, and the step.
        mesh = sharding.make_mesh(config.mesh)
        task = make_task(config)
        _check_batch(config, mesh, task)
        abstract, shardings, step_function = build(task, config, mesh)
        say = print if distributed.is_main() else lambda *_: None

        # Restore, or make the first state.
        checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint.keep)
        restored = checkpoints.restore(abstract)
        if restored is None:
            state, done = jax.device_put(first_state(task, config), shardings), 0
        else:
            done, state = restored
            checkpoints.set_aside_after(done)
            if done >= config.num_steps:
                say(f"{workdir}: already trained to step {done} of {config.num_steps}")
                checkpoints.close()
                return state
            say(f"{workdir}: going on from step {done}")
        constants = jax.device_put(task.constants(), sharding.replicated(mesh))

        # Data: batch number `done` is the next one, whatever happened before.
        loader = loading.make_loader(
            config.data,
            seed=config.seed,
            step=done,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

        # The loop.
        writer = MetricWriter(workdir, done)
        last_save = time.monotonic()
        with jax.set_mesh(mesh):
            for step, batch in zip(range(done + 1, config.num_steps + 1), loader, strict=False):
                batch = sharding.put_batch(batch, mesh, task.frames)
                state, metrics = step_function(state, batch, constants, task.events(step - 1))
                if step == done + 1:
                    jax.block_until_ready(metrics)
                    seconds = time.monotonic() - started
                    say(f"{config.stage}: ready to train after {seconds:.0f} s")
                    progress = Progress(config.stage, config.num_steps, step)
                writer.add(step, metrics)

                last, stopping = step == config.num_steps, stop_asked()
                save = last or stopping or _due(config.checkpoint, step, last_save)
                if save or len(writer) >= config.log_every:
                    # Rows reach the disk before the checkpoint that covers them.
                    rows = writer.flush()
                    _refuse_endless_skipping(rows, task, config)
                    progress.update(step, _note(rows[-1], task))
                if save:
                    checkpoints.save(step, state)
                    last_save = time.monotonic()
                if stopping and not last:
                    loader.close()
                    checkpoints.close()
                    say(
                        f"{config.stage}: stopped at step {step}, saved; start the same command to go on"
                    )
                    raise SystemExit(RESUME_ME)
                every = config.evaluate.every_steps
                if (last and config.evaluate.at_end) or (every and step % every == 0):
                    task.evaluate(state, constants, workdir, step)
        loader.close()
        writer.close()
        checkpoints.close()
        say(f"{workdir}: trained to step {config.num_steps}")
        return state


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
    step = make_step(
        task.phases,
        seed=config.seed,
        ema_decay=config.ema_decay,
        accumulate=config.accumulate,
    )
    compiled = jax.jit(
        step,
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
        static_argnums=3,
    )
    return abstract, shardings, compiled


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


def first_state(task: Task, config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The State before the first step: pretrained groups where the task has them, else fresh ones."""
    pretrained = task.pretrained()
    abstract = abstract_state(task, config)
    params = {}
    for group, network in task.networks.items():
        if group in pretrained:
            tree = pretrained[group]
        else:
            # The group's name, not its place in a list, decides what it is drawn from.
            key = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(group.encode()))
            tree = network.init(key)
        params[group] = jax.tree.map(
            lambda shape, leaf: jnp.asarray(leaf, shape.dtype), abstract["params"][group], tree
        )
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "opt": init_optimizers(task.phases, params),
        # Copies: the step gives its input's memory away, and one buffer cannot be given twice.
        "ema": {group: jax.tree.map(jnp.copy, params[group]) for group in task.ema_groups},
    }


def _check_batch(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, task: Task) -> None:
    replicas = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.data.batch_size % (replicas * config.accumulate):
        raise UserError(
            f"config.data.batch_size={config.data.batch_size} cannot be shared by mesh data x fsdp = "
            f"{replicas} devices in {config.accumulate} part(s); choose a multiple of "
            f"{replicas * config.accumulate}, or spread over context or tensor"
        )
    if task.frames and config.data.frames % mesh.shape["context"]:
        raise UserError(
            f"config.data.frames={config.data.frames} cannot be shared by mesh context = "
            f"{mesh.shape['context']}; choose a multiple"
        )


def _due(config: ml_collections.ConfigDict, step: int, last_save: float) -> bool:
    if config.every_steps:
        return step % config.every_steps == 0
    return time.monotonic() - last_save > 60 * config.minutes


def _note(row: dict[str, Any], task: Task) -> str:
    losses = {phase.name: row.get(f"{phase.name}/loss") for phase in task.phases}
    return ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None)


def _refuse_endless_skipping(rows, task: Task, config: ml_collections.ConfigDict) -> None:
    for row in rows:
        for phase in task.phases:
            if row[f"{phase.name}/skipped_in_a_row"] >= config.max_skipped_in_a_row:
                raise UserError(
                    f"phase '{phase.name}' gave non-finite losses or gradients in "
                    f"{config.max_skipped_in_a_row} steps in a row, up to step {row['step']}; its "
                    "parameters are unharmed in the last checkpoint: lower its learning rate or look at the data"
                )


@contextlib.contextmanager
def _claimed(workdir: Path, config: ml_collections.ConfigDict) -> Iterator[None]:
    """Holds the directory for this process alone and checks that it belongs to this config."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / f".lock{jax.process_index() or ''}").open("w")
    except OSError as error:
        raise UserError(f"cannot write to --workdir={workdir}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another process is training in {workdir}; wait for it or end it"
            ) from error
        _same_run(workdir, config)
        yield


def _same_run(workdir: Path, config: ml_collections.ConfigDict) -> None:
    path, values = workdir / "config.json", configs.to_json(config)
    if path.exists():
        before = json.loads(path.read_text())
        if before.get("stage") != values["stage"]:
            raise UserError(
                f"{workdir} holds a run of stage {before.get('stage')!r}, this config is of stage "
                f"{values['stage']!r}; give another --workdir"
            )
        changed = [
            (key, old, new)
            for key, old, new in configs.differences(before, values)
            if not key.startswith(FREE_KEYS)
        ]
        if changed:
            key, old, new = changed[0]
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise UserError(
                f"{workdir} was started with config.{key}={old!r}, now it is {new!r}{more}; "
                "give another --workdir, or the config it was started with"
            )
    if distributed.is_main():
        write_json(path, values)
        write_json(
            workdir / "environment.json",
            {
                "dexportrait_jax": dexportrait_jax.__version__,
                "jax": jax.__version__,
                "numpy": np.__version__,
                "devices": len(jax.devices()),
                "platform": jax.default_backend(),
                "processes": jax.process_count(),
                "pid": os.getpid(),
            },
        )


@contextlib.contextmanager
def _sigterm():
    """Turns SIGTERM into a question the loop asks between steps."""
    asked = []
    try:
        old = signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    except ValueError:  # not the main thread: somebody else's program, somebody else's signals
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGTERM, old)
