"""Two processes make of a stage what one makes of it: records, weights and the pictures of an evaluation; and what
they make where one of them fails.

Stages take six minutes each, so they are exhaustive; `test_soak.py` holds two processes against one with every change.
"""

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_pipelines import loading
from data_pipelines.examples import Examples
from dexportrait_jax import checkpoint_format
from dexportrait_jax.errors import RESUME_ME
from dexportrait_jax.metrics import read_rows
from launch.local_processes import free_port
from tests import fixtures
from tests.benchmarks import soak
from tests.compiling import QUICK_FLAGS
from tests.stages import micro

STEPS = 2
# The same four devices, of one process or of two. So narrow here that little would be spread.
CONFIG = """
from pathlib import Path

from dexportrait_jax import sharding
from tests.stages import micro

sharding.SMALLEST_SHARDED = 2**9


def get_config(variant=""):
    return micro({stage!r}, Path({data!r}), Path({exports!r}), **{changes!r})
"""
CHANGES = {
    "data__batch_size": 2,
    "num_steps": STEPS,
    "log_every": 1,
    "evaluate__at_end": True,
}
# Weights cut by the border between the processes, sources on either side of it, and frames on either side.
MESHES = {
    "motion": {"mesh__data": 1, "mesh__fsdp": 2, "mesh__context": 2},
    "animator_image": {"mesh__data": 2, "mesh__context": 2},
    "animator_video": {"mesh__data": 1, "mesh__context": 4, "accumulate": 2},
}


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stage", MESHES)
def test_two_processes_equal_one(stage, places, tmp_path):
    data, exports = places
    micro(stage, data, exports)  # makes what it starts from, which two processes would at a time
    config = tmp_path / "stage.py"
    names = {"data": str(data), "exports": str(exports)}
    config.write_text(CONFIG.format(stage=stage, changes=CHANGES | MESHES[stage], **names))
    launchers = {
        "one": ("dexportrait_jax",),
        "two": ("launch.local_processes", "--processes=2", "--devices=2", "--"),
    }
    flags = {"one": "--xla_force_host_platform_device_count=4 ", "two": ""}
    for name, launcher in launchers.items():
        job = ["train", f"--config={config}", f"--workdir={tmp_path / name}"]
        environment = os.environ | {"XLA_FLAGS": flags[name] + QUICK_FLAGS}
        command = [sys.executable, "-m", *launcher, *job]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = tmp_path / "one", tmp_path / "two"
    assert_same_records(one, two)
    assert_same_pictures(one, two)
    assert_same_weights(one, two)


def assert_same_records(one, two):
    rows = [read_rows(run / "metrics.jsonl") for run in (one, two)]
    assert [len(of_run) for of_run in rows] == [STEPS, STEPS]
    for first, second in zip(*rows, strict=True):
        names = {name for name in first if not name.startswith(("time/", "memory/"))}
        assert names <= second.keys() and any(name.endswith("gradient_norm") for name in names)
        for name in names:
            assert second[name] == pytest.approx(first[name], rel=1e-3, abs=1e-6), (
                first["step"],
                name,
            )


def assert_same_pictures(one, two):
    """What the second process has of them comes to the first, which writes."""
    (first,), (second,) = ((run / "samples").glob("*.png") for run in (one, two))
    assert first.name == second.name == f"step_{STEPS:07d}.png"
    shown = [cv2.imread(str(path)).astype(int) for path in (first, second)]
    assert shown[0].shape == shown[1].shape and shown[0].std() > 10
    assert np.abs(shown[0] - shown[1]).max() <= 2


def assert_same_weights(one, two):
    """By group, relative to how far it has gone; gradients closer, as Adam's averages of them.

    Adam's first steps have the size of the rate, and the sign of what may be nothing but rounding.
    """
    start = soak.state_before_the_first_step(one)
    first, second = soak.final_state(one), soak.final_state(two)
    assert first.keys() == second.keys() == start.keys()
    averages = {name: name.partition("/mu/")[2].partition("/")[0] for name in first}
    parts = {name: "/".join(name.split("/")[:2]) for name in first}
    for groups, allowed, what in (
        (averages, 0.01, "averages of the gradient"),
        ({name: part for name, part in parts.items() if part.startswith("params/")}, 0.05, ""),
        ({name: part for name, part in parts.items() if part.startswith("ema/")}, 0.05, ""),
    ):
        assert set(groups.values()) - {""}
        for group in set(groups.values()) - {""}:
            names = [name for name, of in groups.items() if of == group]
            gone = sum(np.sum(np.square(first[name] - start[name])) for name in names)
            apart = sum(np.sum(np.square(second[name] - first[name])) for name in names)
            assert np.sqrt(apart) <= allowed * np.sqrt(gone), (what, group, apart, gone)


WEIGHTS = """
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dexportrait_jax import sharding

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))


def refuse(*_, **__):
    raise AssertionError("gathered")


multihost_utils.process_allgather = refuse
mesh = sharding.make_mesh(ConfigDict({"data": 1, "fsdp": 4, "context": 1, "tensor": 1}))
whole = {"kernel": jnp.arange(32.0).reshape(8, 4), "step": np.zeros((), np.int32)}
cut = NamedSharding(mesh, PartitionSpec("fsdp"))
placed = sharding.put(whole, {"kernel": cut, "step": sharding.replicated(mesh)})
own = [int(part.data[0, 0]) for part in placed["kernel"].addressable_shards]
print("own", own, placed["kernel"].shape, placed["step"].is_fully_replicated)
"""


WRITES = """
import errno
import resource
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from dexportrait_jax import checkpoint, sharding

number, workdir, failing, seconds, saves = int(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:])
jax.distributed.initialize(sys.argv[1], 2, number)
mesh = sharding.make_mesh(ConfigDict({"data": 1, "fsdp": 4, "context": 1, "tensor": 1}))
shardings = {"kernel": NamedSharding(mesh, PartitionSpec("fsdp")), "step": sharding.replicated(mesh)}
kernel = np.random.default_rng(0).random((1024, 256))
checkpoints = checkpoint.Checkpoints(workdir, keep=1, timeout_seconds=seconds)


def save(step):
    checkpoints.save(step, sharding.put({"kernel": kernel + step, "step": np.int32(step)}, shardings))


def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


save(2)
checkpoints.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
if number == failing:
    limit(100_000)  # its part of the kernel has ten times as much
save(4)
time.sleep(2)
if saves == 1:
    limit(resource.RLIM_INFINITY)
checkpoint.READ_AGAIN_AFTER = (0.1, 0.1)
load, loads = ocp.load, []


def stale_at_first(*arguments, **named):
    loads.append(arguments)
    if number == failing and len(loads) == 1:
        raise OSError(errno.ESTALE, "Stale file handle")
    return load(*arguments, **named)


ocp.load = stale_at_first
began = time.monotonic()
try:
    try:
        save(6)
        checkpoints.wait()
    finally:
        print("after", round(time.monotonic() - began))
    found = {name: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=shardings[name])
             for name, one in (("kernel", kernel), ("step", np.int32(0)))}
    step, state = checkpoints.restore(found)
    parts = state["kernel"].addressable_shards
    print("read", step, all((part.data == (kernel + step)[part.index]).all() for part in parts))
except Exception as error:
    print("ended by", type(error).__name__, error)
sys.stdout.flush()
jax.distributed.shutdown()
"""


SECONDS = 4


@pytest.mark.parametrize(("failing", "saves"), [(1, 1), (0, 2)])
def test_one_process_cannot_write_its_part(failing, saves, tmp_path):
    """The other waits no longer than it is told to. One save that fails is a warning, two in a row end both.

    The one checkpoint to keep is deleted once there is another. Nor can it read its part at first: both try again.
    """
    said = of_two_processes(WRITES, tmp_path, failing, SECONDS, saves)
    folder = tmp_path / "checkpoints"
    for number, (out, errors) in enumerate(said):
        (warning,) = [line for line in errors.splitlines() if line.startswith("warning: ")]
        if number == failing:
            why = f"cannot write {folder}: the file grew larger than the system allows"
        else:
            why = f"not all of {folder / '4'} was written in {SECONDS} s: another process could not write its part"
        assert warning.startswith(f"warning: checkpoint 4 was not saved ({why}")
        assert warning.endswith("; trying again at step 6")
        assert "Traceback" not in errors
        if saves == 1:
            assert "read 6 True" in out
            assert ("could not be read ([Errno 116] Stale" in errors) == (number == failing)
        else:
            assert f"ended by UserError {why.replace('/4 ', '/6 ')}" in out
        assert int(out.partition("after ")[2].split()[0]) <= saves * SECONDS + 5
    held = {"6"} if saves == 1 else {"2", "6.orbax-checkpoint-tmp"}
    assert {path.name for path in folder.iterdir()} == held


def test_first_weights_are_put_without_gathering_them():
    """A pod of hosts would hold each of them on every device as often as there are hosts."""
    said = of_two_processes(WEIGHTS)
    for (out, errors), own in zip(said, ([0, 8], [16, 24]), strict=True):
        assert f"own {own} (8, 4) True" in out, errors[-2000:]


def of_two_processes(program, *arguments):
    """What two processes of two devices say, (stdout, stderr) of each; they are given address, number, `arguments`."""
    address = f"127.0.0.1:{free_port()}"
    devices = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, address, str(number), *map(str, arguments)],
            env=os.environ | devices,
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    return [process.communicate(timeout=120) for process in processes]


OTHER_DATA = """
import os
from pathlib import Path

from tests.stages import micro


def get_config(variant=""):
    data = Path({folder!r}) / os.environ["JAX_PROCESS_ID"]
    return micro("autoencoder", data, data, data__batch_size=2, mesh__data=2)
"""


def test_processes_that_see_other_data_end_with_a_line_each(tmp_path):
    """As where a host has its own copy, which lacks what was prepared last; before anything is compiled."""
    for number, clips in enumerate((3, 2)):
        fixtures.make_dataset(tmp_path / str(number), clips, 2, 64)
    config = tmp_path / "stage.py"
    config.write_text(OTHER_DATA.format(folder=str(tmp_path)))
    launcher = [sys.executable, "-m", "launch.local_processes", "--processes=2", "--"]
    job = ["train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run([*launcher, *job], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and "ready to train" not in done.stdout
    said = [line for line in done.stderr.splitlines() if "not every process sees the same" in line]
    assert len(said) == 2
    for number, sees in enumerate(("what the main process sees", "other data than the main")):
        (line,) = [line for line in said if f"process {number} on " in line]
        assert f" sees {sees}" in line and f" in {tmp_path / str(number)}: " in line


ONE_CANNOT_READ = """
import os
from pathlib import Path

import pytest

from data_pipelines import records, shard_reader
from tests.stages import handful_of_numbers, micro

handful_of_numbers(pytest.MonkeyPatch())
read = shard_reader.ShardReader._read


def damaged_here(self, number, shard):
    if number == {number} and os.environ["JAX_PROCESS_ID"] == "1":
        raise records.RecordError("record {number} of its disk cannot be read")
    return read(self, number, shard)


shard_reader.ShardReader._read = damaged_here


def get_config(variant=""):
    return micro("motion", Path({data!r}), Path({data!r}), **{changes!r})
"""


@pytest.mark.slow
def test_what_one_process_alone_cannot_read_reaches_no_checkpoint(places, tmp_path):
    """Where both bring the same sources: it would show another clip, and weights that are one would be two."""
    data, _ = places
    changes = {"data__batch_size": 2, "num_steps": 3, "checkpoint__every_steps": 1}
    changes |= {"mesh__data": 1, "mesh__tensor": 2}
    shown = Examples(loading.default_data() | {"path": str(data)}).order(0)  # two in a step
    config = tmp_path / "stage.py"
    config.write_text(ONE_CANNOT_READ.format(number=shown[2], data=str(data), changes=changes))
    launcher = [sys.executable, "-m", "launch.local_processes", "--processes=2", "--"]
    job = ["train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run([*launcher, *job], capture_output=True, text=True)
    assert done.returncode == RESUME_ME and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert checkpoint_format.newest_step(tmp_path / "run") == 1
    said = [line for line in done.stderr.splitlines() if "source 0 of a batch up to step 2" in line]
    assert len(said) == 2
    for number, left in enumerate(("left nothing out", f"left out: record {shown[2]} is damaged")):
        assert any(f"process {number} on " in line and left in line for line in said)
