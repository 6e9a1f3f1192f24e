"""One training step of the motion trainer at full size: compile time, step time, memory, speed.

    python -m tests.benchmarks motion_step [--config=configs/motion.py:full] [--sources=1] [--targets=4]
        [--dtype=float32] [--steps=first,plain]

"first" is step 0, with R1 and the gradient norms of every term; "plain" is what 15 of 16 steps are. Each runs
in a process of its own, whose peak memory is the figure. Data and weights are random.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import resource
import time

import numpy as np

NUMBERS = {"first": 0, "plain": 1}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="tests.benchmarks motion_step")
    parser.add_argument("--config", default="configs/motion.py:full")
    parser.add_argument("--sources", type=int, default=1)
    parser.add_argument("--targets", type=int, default=4, help="of each source")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", default="first,plain")
    options = parser.parse_args(arguments)
    overrides = [
        f"data.batch_size={options.sources}",
        f"data.targets={options.targets}",
        f"dtype={options.dtype}",
    ]
    for step in options.steps.split(","):
        fresh = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=fresh) as pool:
            result = pool.submit(measure, options.config, overrides, NUMBERS[step]).result()
        settings = {"step": step, "batch": f"{options.sources}x{options.targets}"}
        print(json.dumps(settings | {"dtype": options.dtype} | result), flush=True)


def measure(address: str, overrides: list[str], number: int) -> dict[str, float]:
    """Compiles step ``number`` of the run and does it once."""
    import jax

    from dexportrait_jax import config as configs
    from dexportrait_jax import sharding, train
    from dexportrait_jax.tasks import make_task
    from dexportrait_jax.workload import step_work

    config = configs.load_config(address, overrides)
    task = make_task(config)
    events = task.events(number)
    mesh = sharding.make_mesh(config.mesh, rows=config.data.batch_size)
    _, shardings, step = train.build(task, config, mesh)
    state = train.first_state(task, config, shardings)
    constants = {"perceptual": task.perceptual.init(jax.random.key(1))}
    constants = jax.device_put(constants, sharding.replicated(mesh))
    batch = sharding.put_batch(random_batch(config.data), mesh, task.frames)
    with jax.set_mesh(mesh):
        started = time.perf_counter()
        compiled = step.lower(state, batch, constants, events).compile()
        compiling = time.perf_counter() - started
        started = time.perf_counter()
        _, metrics = jax.block_until_ready(compiled(state, batch, constants))
        seconds = time.perf_counter() - started
    skipped = [name for name in metrics if name.endswith("/skipped") and metrics[name]]
    if skipped:
        raise RuntimeError(f"a step that came to nothing measures nothing: {', '.join(skipped)}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # of KiB
    flops = step_work(config, events).flops
    return {
        "events": ", ".join(sorted(events)),
        "compile_seconds": round(compiling, 1),
        "step_seconds": round(seconds, 1),
        "peak_memory_gib": round(peak, 2),
        "model_tflop": round(flops / 1e12, 3),
        "gflop_per_second": round(flops / 1e9 / seconds, 1),
        "cores": len(os.sched_getaffinity(0)),
    }


def random_batch(data) -> dict[str, np.ndarray]:
    """Noise for pictures, and heads that look ahead."""
    from data_pipelines.loading import batch_shapes

    rng = np.random.default_rng(0)
    batch = {}
    for name, (shape, kind) in batch_shapes(data).items():
        if name.endswith("head_pose"):
            batch[name] = np.broadcast_to(np.eye(3, 4, dtype=kind), shape).copy()
        elif kind == "uint8":
            batch[name] = rng.integers(0, 256, shape, kind)
        else:
            batch[name] = rng.random(shape, kind)
    return batch
