"""The one training loop, read from top to bottom.

    dexportrait train --config=configs/motion.py:tiny --workdir=runs/motion

Running the same command again goes on from the newest checkpoint; a finished run says so. What a stage
trains is in `tasks/`; what one step does is in `step.py`.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections

from data_pipelines import loading
from data_pipelines.survey import survey
from dexportrait_jax import (
    checkpoint,
    distributed,
    evaluations,
    metric_sinks,
    out_of_memory,
    run_directory,
    sharding,
)
from dexportrait_jax import config as configs
from dexportrait_jax.efficiency import Efficiency, ProfileWindow, memory_in_use
from dexportrait_jax.errors import RESUME_ME, MayPass, UserError
from dexportrait_jax.metrics import MetricWriter, Progress
from dexportrait_jax.platforms import jit_on
from dexportrait_jax.programs import build, first_state, try_programs
from dexportrait_jax.shared_sources import SharedSources
from dexportrait_jax.spikes import Spikes
from dexportrait_jax.tasks import Task, make_task
from dexportrait_jax.train_checks import check, check_same_data, check_shares
from dexportrait_jax.wall_time import GOOD_SECONDS, WallTime, Watch, stacks_file


def run_train(
    config: str, workdir: str, overrides: list[str], distributed_mode: str = "auto"
) -> None:
    """The job `train`."""
    if "://" in workdir:
        raise UserError(
            f"--workdir={workdir} is an address, not a directory; mount the bucket and give the path it has there"
        )
    # From here on: joining the others and reading data take minutes, in which one may be told to stop.
    with _sigterm() as stop_asked:
        distributed.initialize(distributed_mode)
        settings = configs.load_config(config, overrides)
        changed = configs.what_topology_changed(config, settings, overrides)
        if changed and distributed.is_main():
            print(changed)
        train(settings, Path(workdir), stop_asked)


def train(
    config: ml_collections.ConfigDict,
    workdir: Path,
    stop_asked: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Trains until `config.num_steps` and returns the final state.

    Args:
      config: what to train.
      workdir: the run's directory.
      stop_asked: says whether SIGTERM came, for a caller that catches it already; None: it is caught here.

    Raises:
      UserError: the directory holds another run, the data do not fit, the devices' memory is too small, or a
        phase keeps giving non-finite gradients.
      SystemExit: code 75 after SIGTERM, once the state is saved, or cannot be and an older one is.
    """
    started, began = time.monotonic(), time.time()
    wall = WallTime(started)
    check(config)
    with (
        run_directory.claimed(workdir),
        contextlib.nullcontext(stop_asked) if stop_asked else _sigterm() as stop_asked,
        contextlib.closing(_watch(config, wall, workdir)) as watch,
    ):
        run_directory.check_shared(workdir)
        run_directory.check_same_run(workdir, config)
        run_directory.check_nothing_lost(workdir)
        say = print if distributed.is_main() else lambda *_, **__: None

        # Mesh, task, the shape of everything, and the step.
        mesh = _mesh(config, say)
        task = make_task(config)
        check_shares(config, mesh)
        abstract, shardings, step_function = build(task, config, mesh)

        # Restore what there is.
        checkpoints = checkpoint.Checkpoints(
            workdir, config.checkpoint.keep, config.checkpoint.timeout_seconds
        )
        done, state = checkpoints.restore(abstract) or (0, None)
        owed = False
        if state is not None:
            checkpoints.set_aside_after(done)
            evaluations.take_away_after(workdir, done)
            owed = evaluations.is_owed(config, workdir, done)
        preview = jit_on(mesh, task.preview)
        evaluates = config.evaluate.at_end or config.evaluate.every_steps
        if done >= config.num_steps:
            if owed:
                evaluable = False
                try:
                    evaluable = survey(config.data, config.evaluate.split).evaluable
                except UserError as error:  # what is trained is trained, with its data or without
                    say(f"warning: step {done} is not evaluated: {error}", file=sys.stderr)
                if distributed.everywhere(evaluable):
                    with jax.set_mesh(mesh), out_of_memory.in_words(config, mesh):
                        evaluations.write(preview, state, config, workdir, done, owed=True)
            say(f"{workdir}: already trained to step {done} of {config.num_steps}")
            checkpoints.close()
            return state
        if state is not None:
            say(f"{workdir}: going on from step {done}")

        # Data: batch number `done` is the next one, whatever happened before. What is missing is found here, before
        # anything is compiled, and not when the first evaluation comes.
        found = survey(config.data, config.evaluate.split if evaluates else "")
        check_same_data(config.data.path, found.fingerprint)
        task.check_data(found)
        for warning in found.warnings:
            say(warning, file=sys.stderr)
        for note in found.notes:
            say(note)
        if owed and found.evaluable:
            with (
                jax.set_mesh(mesh),
                wall.spent("evaluate"),
                out_of_memory.in_words(config, mesh),
            ):
                evaluations.write(preview, state, config, workdir, done, owed=True)
        # All that was done lies on the disk, and what comes now takes longest.
        if not distributed.everywhere(not stop_asked()):
            checkpoints.close()
            say(f"{config.stage}: stopped before step {done + 1}; start the same command to go on")
            raise SystemExit(RESUME_ME)
        sources = sharding.rows_of_process(mesh, config.data.batch_size)
        loader = loading.make_loader(
            config.data,
            seed=config.seed,
            step=done,
            rows=sources,
            examples=found.examples,
        )

        try_programs(task, config, step_function, abstract, mesh, done)

        # Or make the first state.
        if state is None:
            with out_of_memory.in_words(config, mesh):
                state = first_state(task, config, shardings)
        constants = task.constants()
        everywhere = jax.tree.map(lambda _: sharding.replicated(mesh), constants)
        constants = sharding.put(constants, everywhere)
        before = run_directory.write_description(workdir, config, found.fingerprint, done, began)

        # The loop.
        sinks = metric_sinks.make_sinks(config, workdir, done) if distributed.is_main() else []
        writer = MetricWriter(workdir, done, write=distributed.is_main(), sinks=sinks)
        if writer.dropped:
            say(
                f"warning: {workdir}: no checkpoint holds what was done after step {done}; {writer.dropped} recorded "
                "steps are done again",
                file=sys.stderr,
            )
        wall.goes_on(writer.last_kept.get(GOOD_SECONDS, 0.0), before)
        efficiency = Efficiency(config, mesh.size)
        profile = ProfileWindow(config.report.profile, workdir / metric_sinks.TENSORBOARD)
        spikes = Spikes(config.report.spikes, workdir / "spikes.txt")
        pictures = config.data.batch_size * loading.targets_of_a_source(config.data)

        # What all processes have told each other since the last row with figures, and the step of that row.
        known: dict[str, float] | None = None
        told = done

        def figures(steps: int) -> dict[str, float]:
            times = wall.row(steps, pictures)
            return times | efficiency.row(times) | (known or {})

        def record(step: int) -> None:
            """Rows of the steps up to this one; the last has figures where all processes have been asked for them."""
            nonlocal known, told
            rows = writer.flush(None if known is None else lambda _: figures(step - told))
            if known is not None:
                known, told = None, step
            _refuse_endless_skipping(rows, task, config)
            if distributed.is_main():
                spikes.note(rows)
                progress.update(step, _note(rows[-1], task))

        agreement = distributed.Agreement(done)
        shared = SharedSources(mesh, config.data.batch_size, sources)
        compiled: set[frozenset[str]] = set()
        last_save = time.monotonic()
        with (
            jax.set_mesh(mesh),
            contextlib.closing(profile),
            out_of_memory.in_words(config, mesh),
        ):
            for step in range(done + 1, config.num_steps + 1):
                events = task.events(step - 1)
                with profile.step(step) as result_is:
                    with wall.spent("data"):
                        own = next(loader)
                        shared.add(own)
                        batch = sharding.put_batch(own, mesh, config.data.batch_size, sources)
                    with contextlib.nullcontext() if events in compiled else wall.spent("compile"):
                        state, metrics = step_function(state, batch, constants, events)
                    compiled.add(events)
                    result_is(metrics)
                if len(writer) >= config.log_every:
                    # The devices are at work on this step, and wait neither for what the last ones gave nor for a disk.
                    record(step - 1)
                if step > done + 1:
                    efficiency.add(events)
                else:
                    jax.block_until_ready(metrics)
                    wall.ready()
                    seconds = time.monotonic() - started
                    say(f"{config.stage}: ready to train after {seconds:.0f} s")
                    progress = Progress(config.stage, config.num_steps, step)
                writer.add(step, metrics)
                watch.moved()

                last = step == config.num_steps
                evaluating = found.evaluable and evaluations.is_asked(config, step)
                # A signal waits for the end of an evaluation, and whoever sent it may not: what is evaluated is saved.
                save = last or evaluating or _falls_on(step, config.checkpoint.every_steps)
                stopping = False
                if save or agreement.due(step):
                    asked = {"late": _late(config.checkpoint, last_save), "stop": stop_asked()}
                    worst = {"data": wall.waited_for_data(), **memory_in_use(), **shared.figures()}
                    known = agreement.greatest(step, asked | worst)
                    apart = shared.apart(known, step, loader.left_out)
                    if apart:
                        checkpoints.close()  # a save that is under way holds nothing of it
                        raise MayPass(apart)
                    wall.slowest_waited(known.pop("data"))
                    late, stopping = known.pop("late") > 0, known.pop("stop") > 0
                    save = save or late or stopping
                if save:
                    # Rows reach the disk before the checkpoint that covers them.
                    record(step)
                if stopping and not last:
                    loader.close()
                    with wall.spent("save"):
                        saved = checkpoints.finish(step, state, older_will_do=True)
                    writer.flush()  # again, where the disk did not take the last rows
                    what = "saved" if saved == step else f"saved up to step {saved}"
                    say(
                        f"{config.stage}: stopped at step {step}, {what}; start the same command to go on"
                    )
                    raise SystemExit(RESUME_ME)
                if save:
                    with wall.spent("save"):
                        checkpoints.save(step, state)
                    last_save = time.monotonic()
                if evaluating:
                    with wall.spent("evaluate"):
                        evaluations.write(preview, state, config, workdir, step)
        loader.close()
        with wall.spent("save"):
            checkpoints.finish(config.num_steps, state)
        writer.close()
        say(f"{workdir}: trained to step {config.num_steps} in {wall.summary()}")
        return state


def _mesh(config: ml_collections.ConfigDict, say: Callable[[str], None]) -> jax.sharding.Mesh:
    """The mesh, with a word about devices that the batch leaves idle."""
    if jax.process_count() > 1:
        return sharding.make_mesh(config.mesh)
    mesh = sharding.make_mesh(config.mesh, rows=config.data.batch_size // config.accumulate)
    idle = len(jax.devices()) - mesh.size
    if idle:
        say(
            f"{config.stage}: {idle} of {len(jax.devices())} devices stay idle, because config.data.batch_size="
            f"{config.data.batch_size} cannot be shared by more than {mesh.size}"
        )
    return mesh


def _watch(config: ml_collections.ConfigDict, wall: WallTime, workdir: Path) -> Watch:
    file = stacks_file(workdir, jax.process_index(), jax.process_count())
    return Watch(wall, 60 * config.report.stuck_minutes, file)


def _falls_on(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _late(config: ml_collections.ConfigDict, last_save: float) -> bool:
    return not config.every_steps and time.monotonic() - last_save > 60 * config.minutes


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
                    "parameters are unharmed in the last checkpoint: look at the data, or go on with a lower "
                    f"--config.optim.{phase.name}.learning_rate"
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
