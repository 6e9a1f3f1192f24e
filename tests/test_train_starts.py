"""What may start, and what is refused before anything is made: other configs, sizes that do not fit, lost weights."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dexportrait_jax import config as configs
from dexportrait_jax import run_directory
from dexportrait_jax.errors import UserError
from dexportrait_jax.programs import first_state
from dexportrait_jax.tasks import animator, make_task, motion
from dexportrait_jax.train import RESUME_ME, _mesh, run_train, train
from tests.stages import handful_of_numbers, micro

ROOT = Path(__file__).resolve().parents[1]


def test_another_config_or_stage_does_not_touch_a_run(places, tmp_path, monkeypatch, one_device):
    handful_of_numbers(monkeypatch)
    config = micro("motion", *places, num_steps=2)
    train(config, tmp_path)
    saved = (tmp_path / "config.json").read_text()
    with pytest.raises(UserError, match=r"config.loss.l1=\d+.0, now it is 5.5"):
        train(micro("motion", *places, num_steps=2, loss__l1=5.5), tmp_path)
    with pytest.raises(UserError, match="holds a run of stage 'motion'"):
        train(micro("autoencoder", *places), tmp_path)
    assert (tmp_path / "config.json").read_text() == saved
    assert json.loads(saved)["stage"] == "motion"


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
        ({"seed": 2**32}, "config.seed=4294967296 is out of range"),
        ({"max_skipped_in_a_row": 0}, "config.max_skipped_in_a_row=0 is out of range"),
        ({"checkpoint__keep": 0}, "config.checkpoint.keep=0 is out of range"),
        ({"checkpoint__every_steps": -1}, "config.checkpoint.every_steps=-1 is out of range"),
        ({"checkpoint__minutes": -1}, "config.checkpoint.minutes=-1.0 is out of range"),
        ({"report__stuck_minutes": -1}, "config.report.stuck_minutes=-1.0 is out of range"),
        ({"mesh__fsdp": 0}, "config.mesh.fsdp=0 is out of range"),
        ({"data__batch_size": 0}, "config.data.batch_size=0 is out of range"),
        ({"dtype": "float31"}, "not 'float31'"),
        ({"dtype": "float16"}, "config.dtype is one of float32, bfloat16, not 'float16'"),
        (
            {"loss__perceptual": "vgg19"},
            "config.loss.perceptual is one of vgg16, alexnet, not 'vgg19'",
        ),
        ({"data__augment__similarity__border": "reflct"}, "did you mean 'reflect'"),
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model__expression__widths": "(3,3,3)"},
            "config.model does not fit together: .*division",
        ),
        (
            {"data__pose_size": 7},
            "steps with pretraining cannot be built: .* and config.data do not fit",
        ),
    ],
)
def test_sizes_that_do_not_fit_the_first_step_are_no_fault(changes, words, places, tmp_path):
    changes = {"pretraining__steps": 3, **changes}
    with pytest.raises(UserError, match=words):
        train(micro("motion", *places, **changes), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_step_is_traced_once(places, tmp_path, monkeypatch, one_device):
    """By shape and for its program alike; of a large network that takes a while."""
    handful_of_numbers(monkeypatch)
    traced, loss = [], motion.MotionTask.generator_loss
    monkeypatch.setattr(
        motion.MotionTask,
        "generator_loss",
        lambda *given: traced.append(given) or loss(*given),
    )
    train(micro("motion", *places, num_steps=2), tmp_path / "run")
    assert len(traced) == 1


def test_forgotten_weights_leave_nothing_behind(places, tmp_path):
    with pytest.raises(UserError, match="config.init.image"):
        train(micro("animator_video", *places, init__image=""), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


JOINED = """
import os, signal
from pathlib import Path
from dexportrait_jax import train

def told(config, overrides):
    os.kill(os.getpid(), signal.SIGTERM)

train.configs.load_config = told
train.configs.what_topology_changed = lambda *_: None
train.train = lambda settings, workdir, stop_asked: print("asked to stop:", stop_asked())
train.run_train("config", "run", [], "on")
"""


def test_sigterm_right_after_the_processes_joined_is_kept(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COORDINATOR_ADDRESS": address}
    environment |= {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}
    command = [sys.executable, "-c", JOINED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "asked to stop: True\n"


def test_sigterm_before_the_loop_stops_before_the_longest_part(
    places, tmp_path, monkeypatch, capsys, one_device
):
    config = micro("autoencoder", *places)

    def told(*_):
        signal.raise_signal(signal.SIGTERM)
        return config

    monkeypatch.setattr(configs, "load_config", told)
    monkeypatch.setattr("dexportrait_jax.train.try_programs", None)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        run_train("configs/autoencoder.py:tiny", str(tmp_path / "run"), [], "off")
    assert stopped.value.code == RESUME_ME
    assert "autoencoder: stopped before step 1; start the same" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before and list(tmp_path.iterdir()) == []


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
    assert _mesh(micro("autoencoder", *places, data__batch_size=4), print).size == 4
    assert "4 of 8 devices stay idle" in capsys.readouterr().out
    halves = micro("autoencoder", *places, data__batch_size=4, accumulate=2)
    assert _mesh(halves, print).size == 2
    assert _mesh(micro("autoencoder", *places), print).size == 8


def test_one_export_may_be_named_twice(places, monkeypatch):
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


def test_two_processes_cannot_train_in_one_directory(places, tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory, "LOCK_SECONDS", 0.0)
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is training"):
            train(micro("autoencoder", *places), tmp_path)
