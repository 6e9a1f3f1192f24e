"""TensorBoard reads what a run wrote, W&B is optional, and neither holds steps that were done again twice."""

import json
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dexportrait_jax import config as configs
from dexportrait_jax import metric_sinks
from dexportrait_jax.errors import UserError
from dexportrait_jax.metrics import MetricWriter, read_rows


def tiny(**report):
    return configs.load_config(
        "configs/autoencoder.py:tiny", [f"report.{key}={value}" for key, value in report.items()]
    )


def read(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def test_tensorboard_reads_the_rows_of_metrics_jsonl(tmp_path):
    sinks = metric_sinks.make_sinks(tiny(), tmp_path, 0)
    writer = MetricWriter(tmp_path, 0, sinks=sinks)
    writer.add(1, {"loss/total": 0.5, "loss/broken": float("nan")})
    writer.add(2, {"loss/total": 0.25})
    writer.flush(lambda steps: {"time/steps_per_second": 4.0})
    writer.close()
    seen = read(tmp_path / "tensorboard")
    assert seen["loss/total"] == [(1, 0.5), (2, 0.25)]
    assert seen["time/steps_per_second"] == [(2, 4.0)]
    assert seen["loss/broken"][0][1] != seen["loss/broken"][0][1]  # not a number, and shown so
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert {row["step"]: row["loss/total"] for row in rows} == dict(seen["loss/total"])


def test_a_restart_purges_what_is_done_again(tmp_path):
    """A run killed after step 5 goes on from its checkpoint at 3: steps 4 and 5 are there once, as done later."""
    for done, last, value in ((0, 5, 1.0), (3, 6, 2.0)):
        sinks = metric_sinks.make_sinks(tiny(), tmp_path, done)
        writer = MetricWriter(tmp_path, done, sinks=sinks)
        for step in range(done + 1, last + 1):
            writer.add(step, {"loss": value})
        writer.flush()  # and no close: it was killed
    assert read(tmp_path / "tensorboard")["loss"] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (4, 2.0),
        (5, 2.0),
        (6, 2.0),
    ]


def test_no_sink_that_was_not_asked_for(tmp_path):
    assert metric_sinks.make_sinks(tiny(tensorboard=False), tmp_path, 0) == []
    assert not list(tmp_path.iterdir())


class FakeWandb(types.ModuleType):
    """Keeps what it is told; `fails` names the call that raises as a lost network does."""

    def __init__(self, fails=""):
        super().__init__("wandb")
        self.said, self.fails = [], fails

    def _called(self, name, /, *arguments, **named):
        if name == self.fails:
            raise ConnectionError("no route\nto host")
        self.said.append((name, arguments, named))
        return self

    def init(self, **named):
        return self._called("init", **named)

    def log(self, values, step):
        return self._called("log", values, step=step)

    def finish(self):
        return self._called("finish")


def train_rows(tmp_path, done, steps):
    sinks = metric_sinks.make_sinks(tiny(tensorboard=False, wandb="faces"), tmp_path, done)
    writer = MetricWriter(tmp_path, done, sinks=sinks)
    for step in steps:
        writer.add(step, {"loss": float(step)})
    writer.close()


def test_weights_and_biases_goes_on_in_the_same_run(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train_rows(tmp_path, 0, [1, 2])
    train_rows(tmp_path, 2, [3])
    first, second = (named for name, _, named in wandb.said if name == "init")
    assert first["id"] == second["id"] and first["resume"] == "allow"
    assert first["project"] == "faces"
    assert json.dumps(first["config"])  # plain values
    logged = [(named["step"], values["loss"]) for name, (values,), named in logs(wandb)]
    assert logged == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert [name for name, _, _ in wandb.said].count("finish") == 2


def logs(wandb):
    return [said for said in wandb.said if said[0] == "log"]


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_lost_network_is_one_warning(tmp_path, monkeypatch, capsys, fails):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fails))
    train_rows(tmp_path, 0, [1, 2, 3])
    warned = capsys.readouterr().err.splitlines()
    assert len(warned) == 1 and "no route to host" in warned[0]
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 3


def test_weights_and_biases_not_installed_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        metric_sinks.check(tiny(wandb="faces").report)
