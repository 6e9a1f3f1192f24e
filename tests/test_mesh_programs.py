"""What a step costs on a mesh, read from the program compiled for eight fake devices: who multiplies and sends what."""

import json
import os
import subprocess
import sys

import jax
import pytest
from ml_collections import ConfigDict

from dexportrait_jax import sharding
from dexportrait_jax.compiled_program import read_program
from dexportrait_jax.compiling import placed
from dexportrait_jax.errors import UserError
from dexportrait_jax.programs import build
from dexportrait_jax.state import QUICK
from dexportrait_jax.tasks import make_task
from dexportrait_jax.train_checks import check_shares
from dexportrait_jax.workload import abstract_batch
from tests import fixtures
from tests.compiling import QUICK_FLAGS
from tests.stages import micro


def program_on(config, **sizes):
    mesh = mesh_of(**sizes)
    task = make_task(config)
    check_shares(config, mesh)
    abstract, _, step = build(task, config, mesh)
    batch = abstract_batch(config.data)
    batch = placed(batch, sharding.batch_shardings(batch, mesh))
    constants = task.abstract_constants()
    constants = placed(constants, jax.tree.map(lambda _: sharding.replicated(mesh), constants))
    with jax.set_mesh(mesh):
        lowered = step.lower(abstract, batch, constants, task.events(1))
        return read_program(lowered.compile(compiler_options=QUICK).as_text())


def mesh_of(**sizes):
    mesh = ConfigDict(dict.fromkeys(sharding.AXES, 1) | sizes)
    count = sizes.get("data", 1) * sizes.get("context", 1)
    return sharding.make_mesh(mesh, jax.devices()[:count])


@pytest.mark.slow
def test_frames_over_context_cost_the_planned_all_to_alls(tmp_path, monkeypatch):
    """Round every temporal module frames go to pixels and back, forward and in the gradient; nothing else moves."""
    # Every device has all weights here: gathering them is what fsdp costs, too.
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 2**40)
    config = micro(
        "animator_video",
        tmp_path,
        tmp_path,
        data__batch_size=2,
        data__frames=4,
        model__unet__layers_per_block=1,
    )
    alone = program_on(config, data=2)
    assert set(alone.collectives) == {"all-reduce"}  # gradients and what is recorded
    found = program_on(config, data=2, context=4)
    assert set(found.collectives) == {"all-reduce", "all-to-all"}
    # Latents are 16 x 16; levels of 16 and 32 channels, each with a module on the way down and two on the way up, and
    # one in the middle.
    modules = [16 * 16 * 16] * 3 + [8 * 8 * 32] * 4
    exchanged = found.collectives["all-to-all"]
    assert exchanged.count == 4 * len(modules)
    # A device holds one frame of one clip in float32, and gives three quarters of it away.
    assert exchanged.bytes == 4 * sum(modules) * 4 * 3 / 4
    # The reference network, which knows one source a clip, is all that several devices do alike.
    assert found.flops < 0.4 * alone.flops


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", ["animator_image", "motion"])
def test_targets_over_context(stage, tmp_path, monkeypatch):
    """The targets of one source are shared: what is done once for the source is all that is done more than once."""
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 2**40)  # as above
    config = micro(stage, tmp_path, tmp_path, data__batch_size=2, data__targets=4)
    alone, found = program_on(config, data=2), program_on(config, data=2, context=4)
    assert found.flops < 0.45 * alone.flops
    assert "all-to-all" not in found.collectives


def test_targets_of_several_sources_are_not_spread(tmp_path):
    """The compiler would gather them; and one part of the batch after another does the same without."""
    config = micro("motion", tmp_path, tmp_path, data__batch_size=6, data__targets=4)
    with pytest.raises(UserError, match="data x fsdp = 2 has 3; choose config.accumulate=3"):
        check_shares(config, mesh_of(data=2, context=4))
    config.accumulate = 3
    check_shares(config, mesh_of(data=2, context=4))
    with pytest.raises(UserError, match="targets=4 cannot be shared by mesh context = 3"):
        check_shares(config, mesh_of(data=2, context=3))


@pytest.mark.exhaustive
def test_two_processes_share_the_targets_of_a_source(tmp_path):
    """Both read it, and each has two of its four targets; what is recorded is what one process records."""
    data = fixtures.make_dataset(tmp_path / "data", clips=5, frames=12, size=64)
    job = ["train", "--config=configs/autoencoder.py:tiny", "--config.evaluate.at_end=False"]
    sizes = {
        "data.path": data,
        "data.image_size": 32,
        "model.autoencoder.block_channels": "(8,16,16)",
        "data.batch_size": 2,
        "data.targets": 4,
        "accumulate": 2,
        "num_steps": 3,
    }
    job += [f"--config.{name}={value}" for name, value in sizes.items()]
    mesh = ["--config.mesh.data=1", "--config.mesh.context=4"]
    processes = ["launch.local_processes", "--processes=2", "--devices=2", "--"]
    commands = {"one": ["dexportrait_jax", *job], "two": [*processes, *job, *mesh]}
    rows = {}
    for name, command in commands.items():
        command = [sys.executable, "-m", *command, f"--workdir={tmp_path / name}"]
        environment = os.environ | {"XLA_FLAGS": QUICK_FLAGS}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        text = (tmp_path / name / "metrics.jsonl").read_text()
        rows[name] = [json.loads(line) for line in text.splitlines()]
    assert len(rows["one"]) == len(rows["two"]) == 3
    for one, two in zip(rows["one"], rows["two"], strict=True):
        for name in ("loss", "l1", "lpips", "kl", "gradient_norm"):
            key = f"autoencoder/{name}"
            assert two[key] == pytest.approx(one[key], rel=1e-3), (one["step"], name)
