"""How often processes ask each other, and what they then know, with a second process that is made up."""

import os

import jax
import numpy as np
import pytest

from dexportrait_jax import distributed
from dexportrait_jax.distributed import Agreement


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(distributed.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def other(monkeypatch):
    """What the other process says: its seconds a step, then its figures."""
    said = [0.0, 0.0, 0.0]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        distributed.multihost_utils,
        "process_allgather",
        lambda mine: np.stack([mine, np.array(said, np.float32)]),
    )
    return said


def asked(agreement, clock, steps, seconds):
    """The steps after which all ask, where a step takes so long here."""
    found = []
    for step in steps:
        clock[0] += seconds
        if agreement.due(step):
            agreement.greatest(step, {"stop": False, "data": 1.0})
            found.append(step)
    return found


def test_a_signal_waits_ten_seconds_however_short_steps_are(clock, other):
    agreement = Agreement(100)
    # The first takes a minute, to compile; the next tells how long steps are.
    assert asked(agreement, clock, [101], 60.0) == [101]
    assert asked(agreement, clock, range(102, 150), 0.5) == [102, 122, 142]
    # The slowest decides, so that all ask after the same steps.
    other[0] = 2.0
    assert asked(agreement, clock, range(150, 190), 0.5) == [162, 167, 172, 177, 182, 187]
    assert asked(agreement, clock, range(190, 195), 30.0) == [192, 193, 194]


def test_the_worst_of_all_processes(clock, other):
    other[1:] = [1.0, 3.5]
    assert Agreement(0).greatest(1, {"stop": False, "data": 4.25}) == {"stop": 1.0, "data": 4.25}
    assert Agreement(0).greatest(1, {"stop": False, "data": 0.0}) == {"stop": 1.0, "data": 3.5}


@pytest.fixture
def joined(monkeypatch):
    """What JAX was told when this process joined the others."""
    told = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *given, **named: told.append((given, named))
    )
    for name in [name for name in os.environ if name.startswith(("SLURM", "JAX_CO", "CUDA"))]:
        monkeypatch.delenv(name)
    yield told
    assert len(told) == 1


SEES_ALL = {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}


@pytest.mark.parametrize(
    ("tasks", "sees", "gpus"),
    [
        ("4", SEES_ALL, list(range(8))),  # a process a node
        ("4", {"SLURM_GPUS_ON_NODE": "8"}, list(range(8))),
        ("4", SEES_ALL | {"CUDA_VISIBLE_DEVICES": "2,3"}, [0, 1]),
        ("32", SEES_ALL, None),  # a process a GPU: JAX's own choice is right
        ("32", SEES_ALL | {"CUDA_VISIBLE_DEVICES": "3"}, [0]),  # which sees no other
        ("4", SEES_ALL | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, None),
        ("4", {}, None),  # no GPUs
    ],
)
def test_gpus_of_a_process_under_slurm(tasks, sees, gpus, joined, monkeypatch):
    step = {"SLURM_STEP_NODELIST": "node[1-4]", "SLURM_STEP_NUM_NODES": "4", "SLURM_LOCALID": "0"}
    for name, value in (step | {"SLURM_NTASKS": tasks} | sees).items():
        monkeypatch.setenv(name, value)
    distributed.initialize()
    assert joined == [((), {"local_device_ids": gpus})]


def test_a_named_coordinator_is_not_looked_for(joined, monkeypatch):
    """In a Slurm job, too."""
    ours = {"COORDINATOR_ADDRESS": "node1:12355", "NUM_PROCESSES": "2", "PROCESS_ID": "1"}
    for name, value in ours.items():
        monkeypatch.setenv(f"JAX_{name}", value)
    monkeypatch.setenv("SLURM_LOCALID", "0")
    distributed.initialize()
    assert joined == [(("node1:12355", 2, 1), {"cluster_detection_method": "deactivate"})]


@pytest.mark.parametrize(("slices", "joins"), [(None, False), ("1", False), ("2", True)])
def test_a_tpu_host_is_on_its_own_unless_there_are_several_slices(slices, joins, monkeypatch):
    told = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **named: told.append(named))
    for name in [name for name in os.environ if name.startswith(("SLURM", "JAX_CO", "CO"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    if slices:
        monkeypatch.setenv("MEGASCALE_NUM_SLICES", slices)
    distributed.initialize()
    assert bool(told) == joins


@pytest.mark.parametrize("mine", [[], [3], [2, 4], [1, 2, 3, 4]])
@pytest.mark.parametrize("main", [[], [2, 4, 60_000_000]])
def test_the_main_process_says_which_numbers(main, mine, other, monkeypatch):
    """However many this one has: what is broadcast has the same shape in both."""
    said = [np.array(len(main), np.int32), np.array(main, np.int32)]

    def broadcast(value):
        answer = said.pop(0)
        assert (value.shape, value.dtype) == (answer.shape, answer.dtype)
        return answer

    monkeypatch.setattr(distributed.multihost_utils, "broadcast_one_to_all", broadcast)
    assert distributed.from_main(mine) == main


def test_alone_one_always_knows():
    agreement = Agreement(0)
    assert all(agreement.due(step) for step in (1, 2, 3))
    assert agreement.greatest(1, {"stop": True, "data": 0.5}) == {"stop": True, "data": 0.5}
    assert agreement.due(2)
    assert distributed.from_main([2, 4]) == [2, 4]
