"""Trouble on the way: gradients that are no numbers end a run; what hangs is reported with all threads' stacks."""

import time

import numpy as np
import pytest

from dexportrait_jax import checkpoint, programs
from dexportrait_jax.errors import UserError
from dexportrait_jax.train import train
from tests.stages import every_batch, micro


def test_endless_non_finite_steps_end_the_run_with_the_phase_name(
    places, tmp_path, monkeypatch, one_device
):
    config = micro("autoencoder", *places, num_steps=30, max_skipped_in_a_row=3, log_every=5)

    def poisoned(_, batch):
        return batch | {"source_image": np.full_like(batch["source_image"], np.nan, np.float32)}

    every_batch(monkeypatch, poisoned)
    with pytest.raises(UserError, match="phase 'autoencoder' gave non-finite"):
        train(config, tmp_path)


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
    close = checkpoint.Checkpoints.close

    def answers_late(self):
        time.sleep(1.5)
        close(self)

    monkeypatch.setattr(checkpoint.Checkpoints, "close", answers_late)


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
