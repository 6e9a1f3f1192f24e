"""One training step of the motion trainer at full size: compile time, step time, memory, speed.

    python -m tests.benchmarks motion_step [--config=configs/motion.py:full] [--sources=1] [--targets=4]
        [--dtype=float32] [--steps=plain,r1,first]

"plain" is what 15 of 16 steps are, "r1" the sixteenth, with the discriminator's penalty; "first" is step 0 of a
run, with the penalty and the gradient norm of every term. Each is compiled and done once in a process of its
own, whose peak memory is the figure. Data and weights are random.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import resource
import time

import numpy as np


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="tests.benchmarks motion_step")
    parser.add_argument("--config", default="configs/motion.py:full")
    parser.add_argument("--sources", type=int, default=1)
    parser.add_argument("--targets", type=int, default=4, help="of each source")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", default="plain,r1,first")
    options = parser.parse_args(arguments)
    overrides = [
        f"data.batch_size={options.sources}",
        f"data.targets={options.targets}",
        f"dtype={options.dtype}",
    ]
    for step in options.steps.split(","):
        fresh = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=fresh) as pool:
            result = pool.submit(measure, options.config, overrides, step).result()
        settings = {"step": step, "batch": f"{options.sources}x{options.targets}"}
        print(json.dumps(settings | {"dtype": options.dtype} | result), flush=True)


def measure(address: str, overrides: list[str], step_name: str) -> dict[str, float]:
    """Compiles one of the programs of a run and does it once."""
    import jax

    from dexportrait_jax import config as configs
    from dexportrait_jax import programs, sharding
    from dexportrait_jax.tasks import make_task
    from dexportrait_jax.workload import step_work

    config = configs.load_config(address, overrides)
    task = make_task(config)
    events = task.events({"first": 0, "plain": 1, "r1": config.loss.r1_every}[step_name])
    mesh = sharding.make_mesh(config.mesh, rows=config.data.batch_size)
    _, shardings, step = programs.build(task, config, mesh)
    state = programs.first_state(task, config, shardings)
    constants = {"perceptual": task.perceptual.init(jax.random.key(1))}
    constants = jax.device_put(constants, sharding.replicated(mesh))
    sources = config.data.batch_size
    batch = sharding.put_batch(random_batch(config.data), mesh, sources, range(sources))
    with jax.set_mesh(mesh):
        started = time.perf_counter()
        compiled = step.lower(state, batch, constants, events).compile()
        compiling = time.perf_counter() - started
        started, busy = time.perf_counter(), time.process_time()
        _, metrics = jax.block_until_ready(compiled(state, batch, constants))
        seconds, busy = time.perf_counter() - started, time.process_time() - busy
    skipped = [name for name in metrics if name.endswith("/skipped") and metrics[name]]
    if skipped:
        raise RuntimeError(f"a step that came to nothing measures nothing: {', '.join(skipped)}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # of KiB
    flops = step_work(config, events).flops
    return {
        "events": ", ".join(sorted(events)),
        "compile_seconds": round(compiling, 1),
        "step_seconds": round(seconds, 1),
        "cores_used": round(busy / seconds, 2),  # fewer than there are: others were at work
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
