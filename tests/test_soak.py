"""Two processes equal one, and killed they equal the run left alone."""

import shutil
import signal

import jax
import numpy as np
import pytest

from dexportrait_jax import config as configs
from dexportrait_jax import sharding
from dexportrait_jax.train import train
from tests import fixtures
from tests.benchmarks import soak
from tests.benchmarks.soak import Kill

STEPS = 12


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_processes_killed_and_damaged_equal_one_left_alone(tmp_path, monkeypatch):
    """Two take over from one at step 3, are killed three times and stopped once, and end as two left alone, to the bit.

    One process ends there too, but for rounding: its program is compiled for two devices of its own. The comparison
    restores what two processes saved in one, on another mesh.
    """
    data = fixtures.make_dataset(tmp_path / "data", clips=5, frames=12, size=64)
    settings = (*soak.SETTINGS, f"data.path={data}", f"num_steps={STEPS}", "checkpoint.keep=9")
    make = sharding.make_mesh
    devices = jax.devices()[: soak.PROCESSES]
    monkeypatch.setattr(sharding, "make_mesh", lambda config, rows: make(config, devices))
    one, alone, two = tmp_path / "one", tmp_path / "alone", tmp_path / "two"
    train(configs.load_config("configs/autoencoder.py:tiny", list(settings)), one)
    monkeypatch.undo()
    for workdir in (alone, two):
        shutil.copytree(one, workdir)
        for step in (6, 9, 12):
            shutil.rmtree(workdir / "checkpoints" / str(step))
    soak.left_alone(soak.command(alone, data, STEPS), tmp_path)
    assert "going on from step 3" in (tmp_path / "left_alone.log").read_text()
    assert_same_but_for_rounding(soak.final_state(one), soak.final_state(alone))

    kills = [
        Kill("save"),
        Kill("steps", "process 1", "torn", 0.9),
        Kill("start", damage="deleted"),
        Kill("steps", part=0.1, sent=signal.SIGTERM),
    ]
    lives = soak.killed(soak.command(two, data, STEPS), tmp_path, kills)
    assert soak.compare(alone, two) == []
    assert lives[0].went_on_from == 3 and lives[0].done_again == STEPS - 3
    codes = [life.code for life in lives]
    assert codes[0] == codes[2] == -signal.SIGKILL and codes[3:] == [75, 0]
    assert codes[1] not in (0, 75)  # 137, or what the other one ended with
    assert lives[-1].done_again == 0  # what was saved at SIGTERM is the last step
    assert (
        "no checkpoint holds what was done after step 3" in (tmp_path / "life_00.log").read_text()
    )


def assert_same_but_for_rounding(one, other):
    """Every weight that has a gradient. A bias before a normalisation has none, and Adam follows its rounding."""
    learned = 0
    for name, moment in one.items():
        weight = name.partition("/mu/")[2]
        if not weight or np.abs(moment).max() < 1e-8:
            continue
        learned += 1
        for tree in ("params", "ema"):
            pair = (state[f"{tree}/{weight}"] for state in (other, one))
            np.testing.assert_allclose(*pair, rtol=1e-5, atol=1e-6, err_msg=name)
    assert learned > 0.9 * sum(name.startswith("params/") for name in one)
