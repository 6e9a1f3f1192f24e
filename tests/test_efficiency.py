"""MFU worked out by hand, memory as the system says it, and a trace of the steps that were asked for and no others."""

import types

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from dexportrait_jax import chips
from dexportrait_jax import config as configs
from dexportrait_jax.efficiency import Efficiency, ProfileWindow, memory_in_use
from dexportrait_jax.workload import step_work

PLAIN, SECOND = frozenset(), frozenset({"second"})
# 10 steps of .4 s and a second's wait for data: 5 s.
TIMES = {"time/step_seconds": 0.4, "time/data_seconds": 1.0}


def with_peak(tflops):
    return configs.load_config("configs/autoencoder.py:tiny", [f"report.peak_tflops={tflops}"])


def test_mfu_by_hand():
    """8 plain steps of 1 TFLOP and 2 of 6 in 5 s are 4 TFLOP/s; 2 devices of 8 TFLOP/s could do 16."""
    count = {PLAIN: 1e12, SECOND: 6e12}
    efficiency = Efficiency(with_peak(8.0), devices=2, count=count.__getitem__)
    for step in range(10):
        efficiency.add(SECOND if step % 5 == 0 else PLAIN)
    row = efficiency.row(TIMES)
    assert row["time/model_tflops_per_second"] == pytest.approx(4.0)
    assert row["time/mfu"] == pytest.approx(0.25)
    # The next window is its own.
    for _ in range(10):
        efficiency.add(PLAIN)
    assert efficiency.row(TIMES)["time/mfu"] == pytest.approx(0.125)


def test_no_mfu_where_the_peak_is_not_known():
    """A CPU's is not, and then no step is traced for it either."""

    def count(events):
        raise AssertionError("counted for nothing")

    efficiency = Efficiency(with_peak(0.0), devices=1, count=count)
    efficiency.add(PLAIN)
    row = efficiency.row(TIMES)
    assert not any(key.startswith("time/") for key in row)


def test_the_count_is_that_of_the_step():
    """Twice the multiplications of the step, which workload.py counts, in a step of one second."""
    config = with_peak(1.0)
    efficiency = Efficiency(config, devices=1)
    efficiency.add(PLAIN)
    row = efficiency.row({"time/step_seconds": 1.0})
    work = step_work(config, PLAIN)
    assert work.macs > 0 and work.recomputed == 0
    assert row["time/model_tflops_per_second"] == pytest.approx(2e-12 * work.macs)


def test_host_memory_is_the_most_at_one_time():
    """400 MiB that were there and are gone are still in it."""
    quiet = memory_in_use()["memory/host_gib"]
    block = bytearray(400 << 20)
    block[::4096] = b"x" * len(block[::4096])  # every page
    del block
    assert memory_in_use()["memory/host_gib"] >= quiet
    assert memory_in_use()["memory/host_gib"] >= 400 / 1024


@pytest.mark.parametrize(
    ("said", "row"),
    [
        (
            [
                {"bytes_in_use": 3 << 30, "peak_bytes_in_use": 5 << 30},
                {"bytes_in_use": 1 << 30, "peak_bytes_in_use": 13 << 29},
            ],
            {"memory/hbm_gib": 3.0, "memory/hbm_peak_gib": 6.5},
        ),
        # What is not known of one is not known of the fullest.
        ([{"bytes_in_use": 3 << 30, "peak_bytes_in_use": 5 << 30}, None], {}),
        (
            [{"bytes_in_use": 1 << 30}, {"bytes_in_use": 1 << 29, "peak_bytes_in_use": 1 << 31}],
            {"memory/hbm_gib": 1.0},
        ),
    ],
)
def test_device_memory_is_that_of_the_fullest(said, row, monkeypatch):
    devices = [types.SimpleNamespace(memory_stats=lambda stats=stats: stats) for stats in said]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    found = memory_in_use()
    assert found.pop("memory/host_gib") > 0
    assert found == row


def test_device_kinds_have_peaks():
    assert chips.peak_flops("TPU v5 lite") == chips.CHIPS["v5e"].flops == pytest.approx(197e12)
    assert chips.peak_flops("cpu") is None


def steps_in(folder):
    (trace,) = folder.glob("plugins/profile/*/*.xplane.pb")
    found = []
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for event in line.events:
                if event.name == "train":
                    found.append(dict(event.stats)["step_num"])
    return sorted(found)


def run(folder, after, steps, until):
    """Steps 101, 102, ... of a run that goes on from 100."""
    with_window = ProfileWindow(ConfigDict({"after": after, "steps": steps}), folder)
    work = jax.jit(lambda x: x @ x)
    value = jnp.eye(64)
    for step in range(101, 101 + until):
        with with_window.step(step) as result_is:
            value = work(value)
            result_is(value)
    with_window.close()


def test_the_trace_holds_the_steps_asked_for(tmp_path):
    run(tmp_path, after=3, steps=2, until=8)
    assert steps_in(tmp_path) == [104, 105]


def test_a_run_that_ends_within_the_window_keeps_its_trace(tmp_path):
    run(tmp_path, after=2, steps=9, until=4)
    assert steps_in(tmp_path) == [103, 104]


def test_no_trace_unless_asked(tmp_path):
    run(tmp_path, after=0, steps=0, until=2)
    assert not list(tmp_path.iterdir())
