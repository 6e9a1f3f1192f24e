"""Trouble on the way: gradients that are no numbers end a run; what hangs is reported with all threads' stacks.

And what a run writes beside weights, of which a loss that jumps is one.
"""

import errno
import functools
import time

import jax
import numpy as np
import pytest

from dexportrait_jax import checkpoint, cli, distributed, programs
from dexportrait_jax.errors import MayPass, UserError
from dexportrait_jax.metrics import MetricWriter, read_rows
from dexportrait_jax.spikes import Spikes
from dexportrait_jax.train import RESUME_ME, train
from tests.stages import every_batch, handful_of_numbers, interrupt_in_step, micro
from tests.test_efficiency import steps_in
from tests.test_metric_sinks import read as read_tensorboard


def test_endless_non_finite_steps_end_the_run_with_the_phase_name(
    places, tmp_path, monkeypatch, one_device
):
    handful_of_numbers(monkeypatch)
    config = micro("motion", *places, num_steps=30, max_skipped_in_a_row=3, log_every=5)

    def poisoned(_, batch):
        return batch | {"source_image": np.full_like(batch["source_image"], np.nan, np.float32)}

    every_batch(monkeypatch, poisoned)
    with pytest.raises(UserError, match="phase 'generator' gave non-finite"):
        train(config, tmp_path)


def test_figures_trace_and_spikes_of_a_run(places, tmp_path, monkeypatch, one_device):
    """The rows say how well the device was used, TensorBoard has the same rows, and one loss of five jumps."""
    changes = {"report__peak_tflops": 1.0, "report__profile__steps": 1, "report__profile__after": 1}
    config = micro("autoencoder", *places, num_steps=5, log_every=2, **changes)
    monkeypatch.setattr("dexportrait_jax.efficiency._model_flops", lambda config, events: 3e9)
    # Of spikes it speaks from half its window on: at the fifth step alone.
    monkeypatch.setattr("dexportrait_jax.train.Spikes", functools.partial(Spikes, window=8))

    def dazzling(number, batch):
        image = batch["source_image"].astype(np.float32)
        return batch | {"source_image": 100.0 * image if number == 5 else image}

    every_batch(monkeypatch, dazzling)
    train(config, tmp_path)

    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "time/mfu" in row] == [2, 4, 5]
    figures = rows[3]
    seconds = 2 * figures["time/step_seconds"] + figures["time/data_seconds"]
    assert figures["time/model_tflops_per_second"] == pytest.approx(2 * 3e9 / seconds / 1e12)
    # Of one device that could do one TFLOP a second.
    assert figures["time/mfu"] == figures["time/model_tflops_per_second"]
    # All three are written with seven digits.
    most = 2 * config.data.batch_size / seconds * (1 + 1e-6)
    assert 0 < figures["time/pictures_per_second"] <= most
    assert 0 < figures["time/goodput"] < 1

    assert steps_in(tmp_path / "tensorboard") == [2]
    spikes = (tmp_path / "spikes.txt").read_text().splitlines()
    assert len(spikes) == 1 and spikes[0].startswith("step 5: autoencoder/loss")
    names = {name for row in rows for name in row} - {"step"}
    assert read_tensorboard(tmp_path / "tensorboard") == {
        name: [(row["step"], float(np.float32(row[name]))) for row in rows if name in row]
        for name in names
    }


def test_rows_are_fetched_while_the_next_step_is_under_way(
    places, tmp_path, monkeypatch, one_device
):
    """And several processes, which wait for each other to ask, ask when it is time and not for every row."""
    handful_of_numbers(monkeypatch)
    config = micro("motion", *places, num_steps=7, log_every=2)
    happened, make, flush = [], programs.build, MetricWriter.flush

    def building(*given):
        abstract, shardings, step_function = make(*given)

        def step(*given):
            happened.append("step")
            return step_function(*given)

        return abstract, shardings, step

    def noted(self, *given):
        rows = flush(self, *given)
        happened.extend([[row["step"] for row in rows]] if rows else [])
        return rows

    class EveryThird(distributed.Agreement):
        def due(self, step):
            return step % 3 == 0

        def greatest(self, step, figures):
            happened.append(f"asked after {step}")
            return super().greatest(step, figures)

    monkeypatch.setattr("dexportrait_jax.train.try_programs", lambda *_: None)
    monkeypatch.setattr("dexportrait_jax.train.build", building)
    monkeypatch.setattr(MetricWriter, "flush", noted)
    monkeypatch.setattr(distributed, "Agreement", EveryThird)
    train(config, tmp_path)
    assert happened == [
        *["step", "step", "step", [1, 2], "asked after 3"],
        *["step", "step", [3, 4], "step", "asked after 6"],
        *["step", [5, 6], "asked after 7", [7]],
    ]
    # Of all four steps since the start, where nobody was asked for the first two alone.
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "time/goodput" in row] == [4, 6, 7]
    figures, sources = rows[3], config.data.batch_size * config.data.targets
    seconds = sum(v for k, v in figures.items() if k.startswith("time/") and k.endswith("_seconds"))
    seconds += 2 * figures["time/step_seconds"] - figures["time/good_seconds"]  # three were timed
    assert figures["time/pictures_per_second"] == pytest.approx(4 * sources / seconds, rel=1e-4)


def hungry(monkeypatch):
    """The third batch takes so long that the watch speaks."""

    def starving(number, batch):
        if number == 3:
            time.sleep(1.5)
        return batch

    every_batch(monkeypatch, starving)


def hanging(monkeypatch):
    """The third step takes so long, as a collective does that waits for a lost host."""
    make = programs.build

    def building(*arguments):
        abstract, shardings, step_function = make(*arguments)
        steps = []

        def waits_for_a_lost_host(*given):
            steps.append(given)
            if len(steps) == 3:
                time.sleep(1.5)
            return step_function(*given)

        return abstract, shardings, waits_for_a_lost_host

    monkeypatch.setattr("dexportrait_jax.train.build", building)
    monkeypatch.setattr("dexportrait_jax.train.try_programs", lambda *_: None)


def slow_to_save(monkeypatch):
    """The last save of three steps is not on disk for so long."""
    finish = checkpoint.Checkpoints.finish

    def answers_late(self, *given):
        time.sleep(1.5)
        finish(self, *given)

    monkeypatch.setattr(checkpoint.Checkpoints, "finish", answers_late)


@pytest.mark.parametrize(
    ("stuck", "steps", "place", "frame"),
    [
        (hungry, 2, "data", "in starving"),
        (hanging, 2, "a step", "in waits_for_a_lost_host"),
        (slow_to_save, 3, "save", "in answers_late"),
    ],
)
def test_what_hangs_is_reported_with_all_stacks(
    stuck, steps, place, frame, places, tmp_path, monkeypatch, one_device, capsys
):
    config = micro("autoencoder", *places, num_steps=3, report__stuck_minutes=0.5 / 60)
    stuck(monkeypatch)
    train(config, tmp_path)
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if f"after {steps} steps" in line]
    assert said and f"it is at: {place};" in said[-1] and "stacks.txt" in said[-1]
    stacks = (tmp_path / "stacks.txt").read_text().split(f"after {steps} steps")[-1]
    assert frame in stacks and "Thread" in stacks


@pytest.mark.parametrize(("older", "code"), [(True, RESUME_ME), (False, None)])
def test_a_run_that_is_stopped_and_cannot_save_goes_on_from_an_older_checkpoint(
    older, code, places, tmp_path, monkeypatch, one_device, capsys
):
    """Launchers take code 1 as final; where there is nothing to go on from, it is."""
    handful_of_numbers(monkeypatch)
    config = micro("motion", *places, num_steps=5, checkpoint__every_steps=2 if older else 0)
    interrupt_in_step(monkeypatch, 3)
    begin = checkpoint.Checkpoints._begin

    def unreliable(self, step, state):
        if step == 3:
            raise OSError(errno.EIO, "Input/output error")
        begin(self, step, state)

    monkeypatch.setattr(checkpoint.Checkpoints, "_begin", unreliable)
    with pytest.raises(SystemExit if older else UserError) as stop:
        train(config, tmp_path)
    assert getattr(stop.value, "code", None) == code
    said = capsys.readouterr()
    assert said.err.count("checkpoint 3 was not saved (cannot write ") == 1
    assert ("stopped at step 3, saved up to step 2; start" in said.out) == older


def test_a_disk_of_data_that_does_not_answer_ends_with_the_code_to_start_again(
    places, tmp_path, monkeypatch, one_device, capsys
):
    """Other processes, if there are any, are not waited for: they do not know."""
    handful_of_numbers(monkeypatch)
    config = micro("motion", *places)
    monkeypatch.setattr("dexportrait_jax.config.load_config", lambda *_: config)

    def away(number, batch):
        raise MayPass("no answer")

    every_batch(monkeypatch, away)
    left = []
    monkeypatch.setattr("dexportrait_jax.distributed.end_soon", left.append)
    assert cli.run(["train", "--config=motion.py", f"--workdir={tmp_path}"]) == RESUME_ME
    assert left == [RESUME_ME]
    assert capsys.readouterr().err.splitlines()[-1] == "dexportrait train: no answer"


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        (
            "RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes.\nAllocator: bfc",
            UserError,
            r"too little memory for motion on 1 of them \(RESOURCE_EXHAUSTED: .*\); less need --config.*accumulate=2",
        ),
        ("INTERNAL: something", jax.errors.JaxRuntimeError, "INTERNAL"),
    ],
)
@pytest.mark.parametrize("place", ["step", "preview"])
def test_too_little_memory_is_no_fault_in_the_program(
    said, error, words, place, places, tmp_path, monkeypatch, one_device
):
    """Launchers start a fault again and again; this one would come every time."""
    handful_of_numbers(monkeypatch)
    config = micro("motion", *places, num_steps=2, evaluate__at_end=True, evaluate__split="train")
    make = programs.build

    def exhausted(*_):
        raise jax.errors.JaxRuntimeError(said)

    if place == "step":
        monkeypatch.setattr("dexportrait_jax.train.try_programs", lambda *_: None)
        monkeypatch.setattr(
            "dexportrait_jax.train.build", lambda *given: (*make(*given)[:2], exhausted)
        )
    else:
        monkeypatch.setattr("dexportrait_jax.evaluations.write_samples", exhausted)
    with pytest.raises(error, match=words) as ended:
        train(config, tmp_path)
    if error is UserError:
        assert "\n" not in str(ended.value)
