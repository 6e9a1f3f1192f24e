"""Of the benchmark `pods`, what is run on this machine: steps over fake devices, and checkpoints."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path

# Sizes of data, fsdp, context, tensor.
MESHES = {
    "one device": (1, 1, 1, 1),
    "data 8": (8, 1, 1, 1),
    "fsdp 8": (1, 8, 1, 1),
    "data 2, fsdp 2, context 2": (2, 2, 2, 1),
    "data 2, fsdp 2, tensor 2": (2, 2, 1, 2),
}
STEPS = 5
SOURCES = 8


def step_seconds(stage: str, name: str) -> dict[str, float]:
    """The median of some steps of a stage at the size of the tests, on one of MESHES; weights and data are random."""
    import jax
    from ml_collections import ConfigDict

    from dexportrait_jax import sharding
    from dexportrait_jax.programs import build, first_state
    from dexportrait_jax.tasks import make_task
    from dexportrait_jax.train_checks import check_shares
    from tests.benchmarks.motion_step import random_batch
    from tests.stages import micro

    sharding.SMALLEST_SHARDED = 2**9  # networks are narrow here: little would be cut
    sizes = dict(zip(sharding.AXES, MESHES[name], strict=True))
    parts = sizes["data"] * sizes["fsdp"]
    with tempfile.TemporaryDirectory() as folder:
        changes = {"data__batch_size": SOURCES, "data__targets": 2, "model__unet__heads": 2}
        if sizes["context"] > 1:  # which shares the targets of one source at a time
            changes["accumulate"] = SOURCES // parts
        if not stage.startswith("animator"):
            del changes["model__unet__heads"]
        config = micro(stage, Path(folder), Path(folder) / "exports", **changes)
        count = sizes["data"] * sizes["fsdp"] * sizes["context"] * sizes["tensor"]
        mesh = sharding.make_mesh(ConfigDict(sizes), jax.devices()[:count])
        check_shares(config, mesh)
        task = make_task(config)
        _, shardings, step = build(task, config, mesh)
        state = first_state(task, config, shardings)
    constants = jax.device_put(task.constants(), sharding.replicated(mesh))
    events, seconds = task.events(1), []
    with jax.set_mesh(mesh):
        batch = sharding.put_batch(random_batch(config.data), mesh, SOURCES, range(SOURCES))
        for _ in range(STEPS + 1):
            started = time.perf_counter()
            state, metrics = jax.block_until_ready(step(state, batch, constants, events))
            seconds.append(time.perf_counter() - started)
    skipped = [key for key, value in metrics.items() if key.endswith("/skipped") and value]
    if skipped:
        raise RuntimeError(f"steps that came to nothing measure nothing: {', '.join(skipped)}")
    return {"seconds": statistics.median(seconds[1:]), "compile_seconds": seconds[0]}


def save_seconds(address: str, folder: str) -> dict[str, float]:
    """Seconds that the loop stands still for a save, until it is on disk, and to read it back; the second of two.

    The first save makes directories and threads; a run does that once.
    """
    import jax
    import numpy as np

    from dexportrait_jax import config as configs
    from dexportrait_jax.checkpoint import Checkpoints
    from dexportrait_jax.programs import abstract_state
    from dexportrait_jax.tasks import make_task

    config = configs.load_config(address)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract_state(make_task(config), config),
    )
    random = np.random.default_rng(0)

    def noise(leaf):
        values = random.standard_normal(leaf.shape, np.float32) * 100
        return jax.device_put(values.astype(leaf.dtype), place)

    state = jax.block_until_ready(jax.tree.map(noise, abstract))
    workdir = Path(folder)
    shutil.rmtree(workdir, ignore_errors=True)
    checkpoints = Checkpoints(workdir, keep=1)
    try:
        for step in (1, 2):
            started = time.perf_counter()
            checkpoints.save(step, state)
            pause = time.perf_counter() - started
            checkpoints.wait()
            saved = time.perf_counter() - started
        started = time.perf_counter()
        done, again = checkpoints.restore(abstract)
        jax.block_until_ready(again)
        restored = time.perf_counter() - started
        same = all(
            np.array_equal(a, b)
            for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True)
        )
        if done != 2 or not same:
            raise RuntimeError("what was read is not what was saved")
    finally:
        checkpoints.close()
        shutil.rmtree(workdir, ignore_errors=True)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    return {
        "gib": held / 2**30,
        "pause": pause,
        "saved": saved,
        "restored": restored,
        "minutes_between": configs.load_config(address.partition(":")[0]).checkpoint.minutes,
    }
