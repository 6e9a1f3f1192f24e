"""What a run promises: interrupted equals uninterrupted, what is frozen stays, and nothing saved is lost."""

import contextlib
import json
import math
import shutil
import time
import types
from datetime import datetime

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from data_pipelines import loading
from dexportrait_jax import checkpoint, checkpoint_format, evaluations, sharding
from dexportrait_jax.errors import UserError
from dexportrait_jax.metrics import read_rows
from dexportrait_jax.programs import abstract_state, build, first_state
from dexportrait_jax.tasks import make_task
from dexportrait_jax.train import train
from tests.stages import handful_of_numbers, interrupt_in_step, leaves, micro, quick_steps

EXHAUSTIVE = pytest.mark.exhaustive


def learned(run):
    """The rows of a run without what the clock says."""
    rows = read_rows(run / "metrics.jsonl")
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows
    ]


@contextlib.contextmanager
def programs_from_the_cache():
    """Of the programs compiled inside: a "hit" for each that came from JAX's cache, a "miss" for each put there."""
    seen = []

    def listen(event, **_):
        kind = event.removeprefix("/jax/compilation_cache/cache_")
        if kind in ("hits", "misses"):
            seen.append({"hits": "hit", "misses": "miss"}[kind])

    jax.monitoring.register_event_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_listener(listen)


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("handful of numbers", {}),
        pytest.param("autoencoder", {}, marks=pytest.mark.slow),
        pytest.param("autoencoder", {"optim__autoencoder__name": "muon"}, marks=EXHAUSTIVE),
        pytest.param("motion", {}, marks=pytest.mark.slow),
        pytest.param("animator_image", {}, marks=EXHAUSTIVE),
        pytest.param("animator_video", {}, marks=EXHAUSTIVE),
    ],
)
def test_interrupted_equals_uninterrupted_bit_for_bit(
    stage, changes, places, tmp_path, monkeypatch, one_device
):
    if stage == "handful of numbers":
        handful_of_numbers(monkeypatch)
        stage = "motion"
    config = micro(stage, *places, **changes)
    whole = leaves(train(config, tmp_path / "whole"))

    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 3)
        with pytest.raises(SystemExit) as stop:
            train(config, tmp_path / "parts")
    assert stop.value.code == 75
    assert [row["step"] for row in read_rows(tmp_path / "parts" / "metrics.jsonl")] == [1, 2, 3]
    kept_in = jax.config.jax_compilation_cache_dir
    with programs_from_the_cache() as seen:
        parts = leaves(train(config, tmp_path / "parts"))
    # The second start compiles no step: its program is where the first left it, and where JAX was told to keep it.
    assert seen and set(seen) == {"hit"} and jax.config.jax_compilation_cache_dir == kept_in

    assert parts.keys() == whole.keys()
    different = [name for name in whole if not np.array_equal(whole[name], parts[name])]
    assert different == []
    if stage == "animator_video":
        assert_trained(config, whole, "temporal")
    rows = [learned(tmp_path / run) for run in ("whole", "parts")]
    assert rows[0] == rows[1]
    timed = read_rows(tmp_path / "whole" / "metrics.jsonl")[-1]
    assert 0 < timed["time/goodput"] < 1 and timed["time/step_seconds"] > 0
    assert {"time/data_seconds", "memory/host_gib"} <= timed.keys()
    starts = json.loads((tmp_path / "parts" / "environment.json").read_text())
    assert [start["step"] for start in starts] == [0, 3]
    third, final = (read_rows(tmp_path / "parts" / "metrics.jsonl")[at] for at in (2, -1))
    seconds = [row["time/good_seconds"] / row["time/goodput"] for row in (third, final)]
    # Of both starts and the time between: in all more than the second took by itself.
    began = [datetime.fromisoformat(start["started"]).timestamp() for start in starts]
    assert 0 < third["time/good_seconds"] < final["time/good_seconds"]
    assert seconds[0] < began[1] - began[0] < seconds[1]
    assert [row["step"] for row in rows[0]] == list(range(1, config.num_steps + 1))


@pytest.mark.parametrize(
    ("stage", "changes", "meshes"),
    [
        pytest.param(
            *("autoencoder", {}, [(1, 4, 1, 1), (1, 1, 1, 1)]),
            marks=pytest.mark.slow,
            id="autoencoder",
        ),
        pytest.param(
            *("animator_image", {"model__unet__layers_per_block": 1}, [(1, 4, 1, 1)]),
            marks=EXHAUSTIVE,
            id="animator_image",
        ),
    ],
)
def test_a_run_goes_on_with_other_devices(stage, changes, meshes, places, tmp_path, monkeypatch):
    """Begun on data 2, fsdp 2, context 2: what four devices of fsdp make of the rest, or one, is what these make."""
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 2**9)  # so narrow that little would be spread
    quick_steps(monkeypatch)
    make = sharding.make_mesh
    changes = changes | {"data__batch_size": 4, "data__targets": 2, "num_steps": 5}
    changes |= {"checkpoint__every_steps": 2, "checkpoint__keep": 3}

    def trained(run, sizes):
        mesh = {f"mesh__{axis}": size for axis, size in zip(sharding.AXES, sizes, strict=True)}
        devices = jax.devices()[: math.prod(sizes)]
        monkeypatch.setattr(sharding, "make_mesh", lambda config, rows: make(config, devices))
        state = train(micro(stage, *places, **changes, **mesh), tmp_path / run)
        cut = [leaf for leaf in jax.tree.leaves(state) if not leaf.sharding.is_fully_replicated]
        assert bool(cut) == (len(devices) > 1)
        return learned(tmp_path / run)

    whole = trained("whole", (2, 2, 2, 1))
    assert [row["step"] for row in whole] == [1, 2, 3, 4, 5]
    for sizes in meshes:
        run = tmp_path / f"on {math.prod(sizes)}"
        shutil.copytree(tmp_path / "whole", run)
        for later in (4, 5):  # as if it had been killed in its fourth step
            shutil.rmtree(run / "checkpoints" / str(later))
        rows = trained(run.name, sizes)
        starts = json.loads((run / "environment.json").read_text())
        assert [start["step"] for start in starts] == [0, 2]
        for row, other in zip(rows, whole, strict=True):
            assert row.keys() == other.keys()
            for name, value in other.items():
                assert row[name] == pytest.approx(value, rel=1e-4), (row["step"], name)


def assert_trained(config, after, group):
    """Of what a run starts with, this group alone has moved."""
    task = make_task(config)
    _, shardings, _ = build(task, config, sharding.make_mesh(config.mesh, rows=8))
    before = leaves(first_state(task, config, shardings)["params"])
    moved = {
        name.split("'")[3]
        for name in after
        if name.startswith("['params']")
        and not np.array_equal(after[name], before[name.removeprefix("['params']")])
    }
    assert moved == {group}


@pytest.mark.slow
def test_a_lazy_penalty_goes_on_where_it_was(places, tmp_path, monkeypatch, one_device):
    """The adversary from the second step on, its penalty in every third step of it, with networks of a few numbers.

    Stopped between two penalties and right before one, the run is the same, bit for bit.
    """
    handful_of_numbers(monkeypatch)
    config = micro("motion", *places, loss__adversarial_start=1, loss__r1_every=3)
    whole = leaves(train(config, tmp_path / "whole"))
    for number in (3, 4):
        with monkeypatch.context() as patch:
            interrupt_in_step(patch, number)
            with pytest.raises(SystemExit):
                train(config, tmp_path / "parts")
        assert len(learned(tmp_path / "parts")) == number
    parts = leaves(train(config, tmp_path / "parts"))
    assert parts.keys() == whole.keys() and "['ema']['generator']['weight']" in whole
    assert [name for name in whole if not np.array_equal(whole[name], parts[name])] == []
    rows = learned(tmp_path / "parts")
    assert rows == learned(tmp_path / "whole")
    assert [row["step"] for row in rows if "generator/adversarial" in row] == [2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "discriminator/loss" in row] == [2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "discriminator/r1" in row] == [2, 5]
    assert all(row["discriminator/r1"] > 0 for row in rows if "discriminator/r1" in row)


@pytest.mark.slow
def test_pretraining_interrupted_equals_uninterrupted(places, tmp_path, monkeypatch, one_device):
    """Three steps of labels alone, then all losses; killed in each half, the run is the same."""
    handful_of_numbers(monkeypatch)
    changes = {"pretraining__steps": 3, "data__second_expression": True, "loss__invariance": 1.0}
    changes |= {"loss__landmark_label__initial": 1.0, "loss__adversarial": 0.0}
    config = micro("motion", *places, **changes)
    whole = leaves(train(config, tmp_path / "whole"))
    for number in (2, 5):
        with monkeypatch.context() as patch:
            interrupt_in_step(patch, number)
            with pytest.raises(SystemExit):
                train(config, tmp_path / "parts")
    parts = leaves(train(config, tmp_path / "parts"))
    assert [name for name in whole if not np.array_equal(whole[name], parts[name])] == []
    rows = learned(tmp_path / "parts")
    assert rows == learned(tmp_path / "whole")
    terms = {"pose_label", "blendshape_label", "landmark_label", "invariance"}
    for row in rows:
        early = row["step"] <= 3
        assert {f"pretraining/{name}" in row for name in terms} == {early}
        assert {f"generator/{name}" in row for name in (*terms, "l1")} == {not early}
        assert "discriminator/loss" not in row


@pytest.mark.slow
def test_pretraining_trains_the_encoders_alone(places, monkeypatch):
    handful_of_numbers(monkeypatch)
    config = micro("motion", *places, pretraining__steps=2)
    task = make_task(config)
    assert task.events(0) == task.events(1) == {"pretraining"}
    assert task.events(2) == {"joint", "adversarial", "r1"}
    task.config.loss.gradient_norms_every = 4
    assert "gradient_norms" in task.events(6) and "gradient_norms" not in task.events(7)
    placed = sharding.make_mesh(ConfigDict(dict.fromkeys(config.mesh, 1)), jax.devices()[:1])
    _, shardings, step = build(task, config, placed)
    state = first_state(task, config, shardings)
    start = leaves(state["params"])
    loader = loading.make_loader(config.data, seed=0, step=0)
    with jax.set_mesh(placed):
        batch = sharding.put_batch(next(loader), placed, 8, range(8))
        constants = jax.device_put(task.constants(), sharding.replicated(placed))
        state, metrics = step(state, batch, constants, task.events(0))
    loader.close()
    end = leaves(state["params"])
    moved = {name.split("'")[1] for name in end if not np.array_equal(start[name], end[name])}
    assert moved == {"pose", "expression", "label_heads"}
    assert float(metrics["pretraining/loss"]) > 0 and "generator/loss" not in metrics


def test_frozen_groups_have_no_optimizer_state(places):
    config = micro("animator_video", *places)
    task = make_task(config)
    state = abstract_state(task, config)
    held = leaf_count(state["opt"]["denoise"]["tx"])
    temporal = leaf_count(state["params"]["temporal"])
    assert 2 * temporal <= held <= 2 * temporal + 2  # both moments, and counts


def leaf_count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_a_torn_newest_checkpoint_is_set_aside(places, tmp_path, capsys, monkeypatch, one_device):
    monkeypatch.setattr(checkpoint, "READ_AGAIN_AFTER", (0.0, 0.0))
    handful_of_numbers(monkeypatch)
    config = micro("motion", *places, checkpoint__every_steps=2)
    whole = leaves(train(config, tmp_path / "whole"))
    train(config, tmp_path / "torn")
    newest = tmp_path / "torn" / "checkpoints" / "6"
    for file in (newest / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    again = leaves(train(config, tmp_path / "torn"))
    assert all(np.array_equal(whole[name], again[name]) for name in whole)
    told = capsys.readouterr()
    assert "going on from step 4" in told.out
    assert "checkpoint 6 cannot be read" in told.err
    assert (tmp_path / "torn" / "unreadable_checkpoint_6").is_dir()


def test_no_readable_checkpoint_is_an_error_not_a_new_start(
    places, tmp_path, monkeypatch, one_device
):
    monkeypatch.setattr(checkpoint, "READ_AGAIN_AFTER", (0.0, 0.0))
    handful_of_numbers(monkeypatch)
    config = micro("motion", *places, num_steps=2)
    train(config, tmp_path)
    for file in (tmp_path / "checkpoints").rglob("*"):
        if file.is_file():
            file.write_bytes(b"torn")
    with pytest.raises(UserError, match="none of the checkpoints"):
        train(config, tmp_path)


def test_what_is_evaluated_is_saved_before(places, tmp_path, monkeypatch, one_device):
    changes = {"num_steps": 5, "evaluate__every_steps": 2, "evaluate__split": "train"}
    handful_of_numbers(monkeypatch)
    config = micro("motion", *places, **changes)
    order, save = [], checkpoint.Checkpoints.save
    monkeypatch.setattr(
        checkpoint.Checkpoints,
        "save",
        lambda self, step, state: order.append(("save", step)) or save(self, step, state),
    )
    monkeypatch.setattr(
        "dexportrait_jax.evaluations.write_samples",
        lambda preview, state, config, path: order.append(("evaluate", int(path.stem[-7:]))),
    )
    train(config, tmp_path)
    assert order[:4] == [(what, step) for step in (2, 4) for what in ("save", "evaluate")]
    assert set(order[4:]) == {("save", 5)}  # asked for again, it is waited for


@pytest.mark.parametrize("ended_in", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_an_evaluation_that_was_cut_short_is_made_first(
    places, tmp_path, monkeypatch, capsys, one_device, ended_in
):
    """Of a run in the middle and of one that has made its last step: no step is made again, and none more."""
    handful_of_numbers(monkeypatch)
    config = micro("motion", *places, **EVALUATED)
    whole = leaves(train(config, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        cut_short(patch, ended_in)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "parts")
    capsys.readouterr()
    parts = leaves(train(config, tmp_path / "parts"))
    assert f"evaluating step {ended_in}, which was cut short" in capsys.readouterr().out
    assert [name for name in whole if not np.array_equal(whole[name], parts[name])] == []
    assert learned(tmp_path / "parts") == learned(tmp_path / "whole")
    made = [
        {path.name: path.read_bytes() for path in (tmp_path / run / "samples").iterdir()}
        for run in ("whole", "parts")
    ]
    assert made[0] == made[1] and len(made[0]) == 2


def test_an_evaluation_that_never_ends_stops_no_run(
    places, tmp_path, monkeypatch, capsys, one_device
):
    """It is left out after three attempts; a run at its end needs neither it nor its data to say that it is."""
    handful_of_numbers(monkeypatch)
    config = micro("motion", *places, **EVALUATED)
    with monkeypatch.context() as patch:
        cut_short(patch, 2)
        for _ in range(4):
            with pytest.raises(KeyboardInterrupt):
                train(config, tmp_path)
        assert checkpoint_format.newest_step(tmp_path) == 2
        train(config, tmp_path)
    assert "step 2 was cut short 4 times and is left out" in capsys.readouterr().err
    samples = tmp_path / "samples"
    assert [path.name for path in samples.glob("*.png")] == ["step_0000004.png"]
    # A picture of a step that is made again belongs to a checkpoint that is lost.
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    with monkeypatch.context() as patch:
        cut_short(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path)
        assert not list(samples.glob("*.png"))

    def gone(*_):
        raise UserError("there is no dataset")

    monkeypatch.setattr("dexportrait_jax.train.survey", gone)
    train(config, tmp_path)
    told = capsys.readouterr()
    assert "warning: step 4 is not evaluated: there is no dataset" in told.err
    assert "already trained to step 4 of 4" in told.out

    # Nor where another host has no data: a picture takes all of them.
    here_alone, asked = object(), []
    monkeypatch.setattr(
        "dexportrait_jax.train.survey", lambda *_: types.SimpleNamespace(evaluable=here_alone)
    )
    monkeypatch.setattr(
        "dexportrait_jax.distributed.everywhere", lambda holds: asked.append(holds) or holds is True
    )
    with monkeypatch.context() as patch:
        cut_short(patch, 4)
        train(config, tmp_path)
    assert here_alone in asked


EVALUATED = {"num_steps": 4, "evaluate__every_steps": 2, "evaluate__split": "train"}


def cut_short(monkeypatch, step):
    """The evaluation of a step ends in what a user does to a job that hangs."""
    write = evaluations.write_samples

    def write_samples(preview, state, config, path):
        if path.stem.endswith(str(step)):
            while not (path.parents[1] / "checkpoints" / str(step)).is_dir():
                time.sleep(0.01)  # it is written in the background
            raise KeyboardInterrupt
        write(preview, state, config, path)

    monkeypatch.setattr(evaluations, "write_samples", write_samples)


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(
    places, tmp_path, monkeypatch, one_device
):
    handful_of_numbers(monkeypatch)
    config = micro("motion", *places, num_steps=2)
    train(config, tmp_path)
    records = (tmp_path / "metrics.jsonl").read_text()
    assert (tmp_path / "last_saved.txt").read_text() == "2\n"
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    with pytest.raises(UserError, match="there is no checkpoint in .*checkpoints any more"):
        train(config, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == records
