"""The loop's promises, for every stage: interrupted equals uninterrupted, sharded equals one device."""

import json
import shutil
import signal
import time
from datetime import datetime
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from data_pipelines import loading
from dexportrait_jax import checkpoint, programs, run_directory, sharding
from dexportrait_jax import config as configs
from dexportrait_jax.errors import UserError
from dexportrait_jax.metrics import read_rows
from dexportrait_jax.programs import build, first_state
from dexportrait_jax.tasks import make_task
from dexportrait_jax.tasks.autoencoder import AutoencoderTask
from dexportrait_jax.train import run_train, train
from tests import fixtures
from tests.stages import STAGES, handful_of_numbers, micro


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """(dataset of drawn heads, directory of random exports)."""
    root = tmp_path_factory.mktemp("stages")
    return fixtures.make_dataset(root / "data", clips=5, frames=12, size=64), root / "exports"


@pytest.fixture
def one_device(monkeypatch):
    """Runs the loop on one of the eight devices, which is quicker where nothing is asked about the mesh."""
    make = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda config, rows: make(config, jax.devices()[:1]))


def leaves(tree):
    flat = jax.tree_util.tree_flatten_with_path(jax.device_get(tree))[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def learned(run):
    """The rows of a run without what the clock says."""
    rows = read_rows(run / "metrics.jsonl")
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows
    ]


def steps_kept():
    """Names of the compiled steps in JAX's cache of programs, the folder that JAX_COMPILATION_CACHE_DIR names."""
    folder = Path(jax.config.jax_compilation_cache_dir)
    return {path.name for path in folder.glob("jit_step_function-*-cache")}


def interrupt_in_step(monkeypatch, number):
    """SIGTERM reaches the process while batch `number` is being loaded."""
    make = loading.make_loader

    class Interrupted:
        def __init__(self, **options):
            self.inner, self.step = make(**options), options["step"]

        def __iter__(self):
            return self

        def __next__(self):
            self.step += 1
            if self.step == number:
                signal.raise_signal(signal.SIGTERM)
            return next(self.inner)

        def close(self):
            self.inner.close()

    monkeypatch.setattr(
        loading, "make_loader", lambda config, **options: Interrupted(config=config, **options)
    )


@pytest.mark.parametrize(
    ("stage", "changes"),
    [("autoencoder", {}), ("autoencoder", {"optim__autoencoder__name": "muon"})]
    + [
        pytest.param(stage, {}, marks=pytest.mark.slow)
        for stage in STAGES
        if stage != "autoencoder"
    ],
)
def test_interrupted_equals_uninterrupted_bit_for_bit(
    stage, changes, places, tmp_path, monkeypatch, one_device
):
    config = micro(stage, *places, **changes)
    whole = leaves(train(config, tmp_path / "whole"))

    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 3)
        with pytest.raises(SystemExit) as stop:
            train(config, tmp_path / "parts")
    assert stop.value.code == 75
    assert [row["step"] for row in read_rows(tmp_path / "parts" / "metrics.jsonl")] == [1, 2, 3]
    kept_in, kept = jax.config.jax_compilation_cache_dir, steps_kept()
    parts = leaves(train(config, tmp_path / "parts"))
    # The second start compiles no step: its program is where the first left it, and where JAX was told to keep it.
    assert kept and steps_kept() == kept and jax.config.jax_compilation_cache_dir == kept_in

    assert parts.keys() == whole.keys()
    different = [name for name in whole if not np.array_equal(whole[name], parts[name])]
    assert different == []
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
    changes = {"pretraining__steps": 3, "data__second_expression": True, "loss__invariance": 1.0}
    # Without the adversary, whose programs take most of the time to compile.
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
def test_pretraining_trains_the_encoders_alone(places):
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


@pytest.mark.slow
def test_frozen_groups_do_not_change_and_have_no_optimizer_state(places, tmp_path, one_device):
    config = micro("animator_video", *places, num_steps=2)
    task = make_task(config)
    _, shardings, _ = build(task, config, sharding.make_mesh(config.mesh, rows=8))
    before = leaves(first_state(task, config, shardings)["params"])
    state = train(config, tmp_path)
    after = leaves(state["params"])
    for name, value in after.items():
        moved = not np.array_equal(value, before[name])
        if not name.startswith("['temporal']"):
            assert not moved, name
    assert any(
        not np.array_equal(after[name], before[name])
        for name in after
        if name.startswith("['temporal']")
    )
    held = {path.split("']")[0] for path in leaves(state["opt"]["denoise"]["tx"]) if "mu" in path}
    count = sum(np.size(leaf) for leaf in jax.tree.leaves(state["opt"]["denoise"]["tx"]))
    temporal = sum(np.size(leaf) for leaf in jax.tree.leaves(state["params"]["temporal"]))
    assert held and count <= 2 * temporal + 2


def test_a_torn_newest_checkpoint_is_set_aside(places, tmp_path, capsys, one_device):
    config = micro("autoencoder", *places, checkpoint__every_steps=2)
    whole = leaves(train(config, tmp_path / "whole"))
    train(config, tmp_path / "torn")
    newest = tmp_path / "torn" / "checkpoints" / "6"
    for file in (newest / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:100])
    again = leaves(train(config, tmp_path / "torn"))
    assert all(np.array_equal(whole[name], again[name]) for name in whole)
    told = capsys.readouterr()
    assert "going on from step 4" in told.out
    assert "checkpoint 6 cannot be read" in told.err
    assert (tmp_path / "torn" / "unreadable_checkpoint_6").is_dir()


def test_no_readable_checkpoint_is_an_error_not_a_new_start(places, tmp_path, one_device):
    config = micro("autoencoder", *places, num_steps=2)
    train(config, tmp_path)
    for file in (tmp_path / "checkpoints").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(b"torn")
    with pytest.raises(UserError, match="none of the checkpoints"):
        train(config, tmp_path)


def test_another_config_or_stage_does_not_touch_a_run(places, tmp_path, one_device):
    config = micro("autoencoder", *places, num_steps=2)
    train(config, tmp_path)
    saved = (tmp_path / "config.json").read_text()
    with pytest.raises(UserError, match="config.loss.l1=1.0, now it is 5.0"):
        train(micro("autoencoder", *places, num_steps=2, loss__l1=5.0), tmp_path)
    with pytest.raises(UserError, match="holds a run of stage 'autoencoder'"):
        train(micro("motion", *places), tmp_path)
    assert (tmp_path / "config.json").read_text() == saved
    assert json.loads(saved)["stage"] == "autoencoder"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__path": "nowhere"}, "nowhere"),
        ({"evaluate__at_end": True, "evaluate__split": "test"}, "no split 'test'"),
        ({"mesh__data": 3}, "does not fit 8 devices"),
        ({"data__batch_size": 12, "mesh__data": 8}, "cannot be shared"),
        ({"num_steps": 0}, "config.num_steps=0 is out of range"),
        ({"accumulate": 0}, "config.accumulate=0 is out of range"),
        ({"seed": -1}, "config.seed=-1 is out of range"),
        ({"mesh__fsdp": 0}, "config.mesh.fsdp=0 is out of range"),
        ({"data__batch_size": 0}, "config.data.batch_size=0 is out of range"),
        ({"dtype": "float31"}, "not 'float31'"),
    ],
)
def test_a_start_that_fails_leaves_nothing(changes, words, places, tmp_path):
    with pytest.raises(UserError, match=words):
        train(micro("autoencoder", *places, **changes), tmp_path / "deep" / "run")
    assert list(tmp_path.iterdir()) == []


def test_what_fails_only_after_pretraining_is_said_before_it(places, tmp_path):
    changes = {"pretraining__steps": 3, "model__generator__volume_channels": 4}
    with pytest.raises(
        UserError, match="steps with adversarial, joint, r1 cannot be built"
    ) as caught:
        train(micro("motion", *places, **changes), tmp_path / "run")
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_forgotten_weights_leave_nothing_behind(places, tmp_path):
    with pytest.raises(UserError, match="config.init.image"):
        train(micro("animator_video", *places, init__image=""), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_an_address_is_no_workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="gs://bucket/run is an address"):
        run_train("configs/autoencoder.py:tiny", "gs://bucket/run", [])
    assert list(tmp_path.iterdir()) == []


def test_what_helps_a_run_on_may_change(places, tmp_path):
    config = micro("autoencoder", *places)
    (tmp_path / "config.json").write_text(json.dumps(configs.to_json(config)))
    other = micro("autoencoder", *places, loss__l1=5.0)
    run_directory.check_same_run(tmp_path, other)  # nothing was trained yet
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="config.loss.l1"):
        run_directory.check_same_run(tmp_path, other)
    free = {"optim__autoencoder__learning_rate": 1e-5, "data__path": "moved", "num_steps": 9}
    free |= {"accumulate": 2, "mesh__data": 4}
    run_directory.check_same_run(tmp_path, micro("autoencoder", *places, **free))
    for key, value in (("name", "adamw"), ("clip_norm", 0.0)):
        with pytest.raises(UserError, match=f"config.optim.autoencoder.{key}"):
            run_directory.check_same_run(
                tmp_path,
                micro("autoencoder", *places, **{f"optim__autoencoder__{key}": value}),
            )


def test_what_is_computed_twice_may_change(places, tmp_path):
    """A run that began before the motion trainer had the key, and one that now needs less memory."""
    config = micro("motion", *places)
    before = configs.to_json(config)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    for old in (before, {key: before[key] for key in before if key != "remat"}):
        (tmp_path / "config.json").write_text(json.dumps(old))
        run_directory.check_same_run(tmp_path, micro("motion", *places, remat="blocks"))


def test_the_batch_decides_how_many_devices_work(places, capsys):
    from dexportrait_jax.train import _mesh

    assert _mesh(micro("autoencoder", *places, data__batch_size=4), print).size == 4
    assert "4 of 8 devices stay idle" in capsys.readouterr().out
    halves = micro("autoencoder", *places, data__batch_size=4, accumulate=2)
    assert _mesh(halves, print).size == 2
    assert _mesh(micro("autoencoder", *places), print).size == 8


def test_one_export_may_be_named_twice(places, monkeypatch):
    from dexportrait_jax.tasks import animator

    asked = []
    monkeypatch.setattr(
        animator,
        "load_start",
        lambda config, networks, key, names: asked.append((config.init[key], list(names))) or {},
    )
    config = micro("animator_image", *places)
    with config.unlocked():
        config.init.update(motion="all", autoencoder="all", unet="all")
    make_task(config).pretrained()
    unet = ["reference", "denoiser"]
    assert asked == [("all", ["pose", "expression"]), ("all", ["autoencoder"]), ("all", unet)]

    asked.clear()
    with config.unlocked():
        config.init.update(unet="sd")
        config.model.attn2.attn2 = "clip_image"
        config.model.image_encoder.update(features=16, layers=1, heads=1)
    make_task(config).pretrained()
    assert asked[-1] == ("sd", [*unet, "image_encoder"])


def test_a_group_that_would_stay_random_is_an_error(places, monkeypatch):
    config = micro("animator_image", *places)
    task = make_task(config)
    given = task.pretrained()
    del given["expression"]
    monkeypatch.setattr(task, "pretrained", lambda: given)
    with pytest.raises(UserError, match="expression would stay random"):
        first_state(task, config, None)


def test_endless_non_finite_steps_end_the_run_with_the_phase_name(
    places, tmp_path, monkeypatch, one_device
):
    config = micro("autoencoder", *places, num_steps=30, max_skipped_in_a_row=3, log_every=5)
    make = loading.make_loader

    class Poisoned:
        def __init__(self, **options):
            self.inner = make(**options)

        def __iter__(self):
            return self

        def __next__(self):
            batch = next(self.inner)
            return batch | {
                "source_image": np.full(batch["source_image"].shape, np.nan, np.float32)
            }

        def close(self):
            self.inner.close()

    monkeypatch.setattr(
        loading, "make_loader", lambda data, **options: Poisoned(config=data, **options)
    )
    with pytest.raises(UserError, match="phase 'autoencoder' gave non-finite"):
        train(config, tmp_path)


def hungry(monkeypatch):
    """The third batch takes so long that the watch speaks."""
    make = loading.make_loader

    def starving(data, **options):
        inner = make(data, **options)

        class Hungry:
            step = 0

            def __next__(self):
                self.step += 1
                if self.step == 3:
                    time.sleep(1.5)
                return next(inner)

            def close(self):
                inner.close()

        return Hungry()

    monkeypatch.setattr(loading, "make_loader", starving)


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
        (hungry, 2, "data", "in __next__"),
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


def test_what_is_evaluated_is_saved_before(places, tmp_path, monkeypatch, one_device):
    changes = {"num_steps": 5, "evaluate__every_steps": 2, "evaluate__split": "train"}
    config = micro("autoencoder", *places, **changes)
    order, save = [], checkpoint.Checkpoints.save
    monkeypatch.setattr(
        checkpoint.Checkpoints,
        "save",
        lambda self, step, state: order.append(("save", step)) or save(self, step, state),
    )
    monkeypatch.setattr(
        AutoencoderTask, "evaluate", lambda self, *given: order.append(("evaluate", given[-1]))
    )
    train(config, tmp_path)
    assert order == [(what, step) for step in (2, 4) for what in ("save", "evaluate")] + [
        ("save", 5)
    ]


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(places, tmp_path, one_device):
    config = micro("autoencoder", *places, num_steps=2)
    train(config, tmp_path)
    records = (tmp_path / "metrics.jsonl").read_text()
    assert (tmp_path / "last_saved.txt").read_text() == "2\n"
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    with pytest.raises(UserError, match="there is no checkpoint in .*checkpoints any more"):
        train(config, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == records


def test_two_processes_cannot_train_in_one_directory(places, tmp_path):
    import fcntl

    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is training"):
            train(micro("autoencoder", *places), tmp_path)


def test_to_float_is_minus_one_to_one():
    from dexportrait_jax.tasks.pictures import to_float, to_uint8

    values = jnp.arange(256, dtype=jnp.uint8)
    assert to_float(values).min() == -1 and to_float(values).max() == 1
    np.testing.assert_array_equal(to_uint8(to_float(values)), np.arange(256))
