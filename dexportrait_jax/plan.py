"""Does a config fit on a pod, what bounds it, and how fast can it be at best? Asked before the pod is paid for.

    dexportrait plan --config=configs/animator_video.py:full@v5e:16x16 --json=plan.json

Compiles the step that `train` would run, for devices that are not there. Memory is what the compiler says, and so is
whether it fits. Compute, memory and network are bounds: what the program moves and multiplies at the chips' best rates.
Nothing is run.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections

from data_pipelines import latents, loading
from data_pipelines.files import write_json
from dexportrait_jax import chips, sharding
from dexportrait_jax import config as configs
from dexportrait_jax.code_version import code_sha256
from dexportrait_jax.compiling import Compiler, placed
from dexportrait_jax.errors import UserError
from dexportrait_jax.plan_advice import advice
from dexportrait_jax.plan_cache import cache_file, package_version, read_kept, write_kept
from dexportrait_jax.plan_clip import plan_clip
from dexportrait_jax.plan_report import EVALUATION, in_words, summary
from dexportrait_jax.platforms import jit_on, planned_for
from dexportrait_jax.programs import build
from dexportrait_jax.state import parameter_count
from dexportrait_jax.tasks import make_task
from dexportrait_jax.tasks.pictures import shown_data
from dexportrait_jax.train_checks import check, check_shares
from dexportrait_jax.workload import abstract_batch, step_work

RARE = 0.01  # of the steps


def run_plan(
    config: str,
    overrides: list[str],
    topology: str | None = None,
    job: str = "train",
    slices: int | None = None,
    effort: str = "quick",
    json_file: str | None = None,
    again: bool = False,
) -> None:
    """The job `plan`; prints the plan and, with `json_file`, writes it."""
    topology, slices = _where(config, topology, slices)
    settings = configs.load_config(config, overrides)
    if job == "train" and _refused(settings, overrides, topology, slices):
        config = f"{config}@{f'{slices}x' if slices > 1 else ''}{topology}"
        settings = configs.load_config(config, overrides)
        print(
            f"its batch cannot be shared as it is; planned and to be trained as --config={config}"
        )
    changed = configs.what_topology_changed(config, settings, overrides)
    if changed:
        print(changed)
    name = f"{config} on {f'{slices} x ' if slices > 1 else ''}{topology}"
    kept = _cache_file(settings, job, topology, slices, effort)
    found = None if again else read_kept(kept)
    if found:
        print(f"{name}: planned before, from {kept} (--again compiles once more)")
    else:
        make = {"train": plan, "animate": plan_clip}[job]
        found = make(settings, topology, slices, effort, name, again) | {
            "versions": {
                package: package_version(package) for package in ("jax", "jaxlib", "libtpu")
            },
            "compiled_not_run": True,
        }
    print(in_words(found), flush=True)
    if json_file:
        write_json(Path(json_file), found)
    write_kept(kept, found)  # last: what took minutes has been said by now


def _where(config: str, topology: str | None, slices: int | None) -> tuple[str, int]:
    """What is planned for: what the flags say, else what the config's address says."""
    named = configs.topology_of(config)
    if topology is None and named is None:
        raise UserError(
            f"--topology is missing; give one, as v5e:16x16, or a config that is spread over it: {config}@v5e:16x16"
        )
    asked = (topology or named[0], slices or (named[1] if named and not topology else 1))
    if named and asked != named:
        raise UserError(
            f"--config={config} is spread over another topology than --topology={asked[0]} --slices={asked[1]}; "
            "leave out one of them"
        )
    return asked


def _refused(config, overrides: list[str], topology: str, slices: int) -> bool:
    """Whether a config that leaves the mesh open cannot be shared by all devices of a topology."""
    if config.mesh.data != -1 or any(override.startswith("mesh.") for override in overrides):
        return False
    devices = chips.grid(topology)[1] * slices
    everywhere = jax.sharding.AbstractMesh((devices, 1, 1, 1), sharding.AXES)
    try:
        check_shares(config, everywhere)
    except UserError:
        return True
    return False


def plan(
    config: ml_collections.ConfigDict,
    topology: str,
    slices: int,
    effort: str,
    name: str,
    again: bool = False,
) -> dict[str, Any]:
    """What a training step of `config` needs on a topology, as `--json` writes it.

    Raises:
      UserError: no such topology, or a mesh or batch that does not fit its number of devices.
    """
    check(config)
    chip, devices = chips.topology(topology, slices)
    # A pod's hosts each bring their part of the batch: as in training on it, no device may stay idle.
    mesh = sharding.make_mesh(config.mesh, devices)
    with planned_for("tpu"):
        task = make_task(config)
        check_shares(config, mesh)
        programs = _event_sets(task, config)
        rare = {} if effort == "exact" else _rare(programs)
        programs = {events: share for events, share in programs.items() if events not in rare}
        with Compiler(effort, mesh, again) as compiler:
            asked = [_step(task, config, mesh, events, name, compiler) for events in programs]
            evaluates = config.evaluate.at_end or config.evaluate.every_steps
            evaluation = _evaluation(task, config, mesh, name, compiler) if evaluates else None
        shares = [share / sum(programs.values()) for share in programs.values()]
        found = [each() | {"share": share} for each, share in zip(asked, shares, strict=True)]
        if evaluation and all(program["fits"] for program in found):
            beside = max(program["argument_gib_per_device"] for program in found)
            needs = evaluation()
            if needs["fits"]:  # by itself; optimizer state and constants are there as well
                needs["hbm_gib_per_device"] += beside - needs["argument_gib_per_device"]
                needs["fits"] = needs["hbm_gib_per_device"] <= chip.hbm_gib
            found.append(needs)
    together = summary(found, chip, mesh.size, effort)
    return {
        "job": "train",
        "topology": topology,
        "slices": slices,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "batch": {
            "sources": config.data.batch_size,
            "targets": loading.targets_of_a_source(config.data),
            "accumulate": config.accumulate,
        },
        "params": {
            group: parameter_count(network.abstract) for group, network in task.networks.items()
        },
        "tensor_cuts": _cut_by_tensor(task, mesh),
        "hbm_limit_gib": chip.hbm_gib,
        "effort": effort,
        **together,
        "left_out": [{"events": sorted(events), "share": share} for events, share in rare.items()],
        "advice": [] if together["fits"] else advice(config, dict(mesh.shape), slices),
        "programs": found,
    }


def _cut_by_tensor(task, mesh) -> float:
    """The share of the weights that the axis `tensor` cuts."""
    cut = total = 0
    for network in task.networks.values():
        places = sharding.state_shardings(network.abstract, mesh)
        for leaf, place in zip(
            jax.tree.leaves(network.abstract), jax.tree.leaves(places), strict=True
        ):
            total += leaf.size
            cut += leaf.size * ("tensor" in place.spec)
    return round(cut / total, 3)


def _event_sets(task, config) -> dict[frozenset[str], float]:
    """The different programs of a run, and the share of its steps that each is."""
    counted = collections.Counter(task.events(step) for step in range(config.num_steps))
    return {events: times / config.num_steps for events, times in counted.most_common()}


def _rare(programs: dict[frozenset[str], float]) -> dict[frozenset[str], float]:
    """The programs that a quick plan goes without: each takes minutes to compile, and hardly a step is of it."""
    return {events: share for events, share in programs.items() if share < RARE}


def _step(
    task, config, mesh, events: frozenset[str], name: str, compiler: Compiler
) -> Callable[[], dict[str, Any]]:
    """One program of the run: what will say what it needs where it fits, and what it lacks where it does not."""
    abstract, _, step = build(task, config, mesh)
    batch = abstract_batch(config.data)
    batch = placed(batch, sharding.batch_shardings(batch, mesh))
    constants = task.abstract_constants()
    constants = placed(constants, jax.tree.map(lambda _: sharding.replicated(mesh), constants))
    work = step_work(config, events)
    counted: dict[str, Any] = {
        "events": sorted(events),
        "model_tflops": (work.macs - work.recomputed) * 2 / 1e12,
        "rematerialised_tflops": work.recomputed * 2 / 1e12,
    }
    label = f"{name}: {', '.join(sorted(events)) or 'step'}"
    with jax.set_mesh(mesh):
        answer = compiler.ask(lambda: step.lower(abstract, batch, constants, events), label)
    return lambda: counted | answer.result()


def _evaluation(task, config, mesh, name: str, compiler: Compiler) -> Callable[[], dict[str, Any]]:
    """The program that makes samples between steps, and is part of none."""
    abstract, _, _ = build(task, config, mesh)
    batch = abstract_batch(shown_data(config.data))
    batch = placed(batch, jax.tree.map(lambda _: sharding.replicated(mesh), batch))
    params = abstract["params"] | abstract["ema"]
    with jax.set_mesh(mesh):
        lower = functools.partial(jit_on(mesh, task.preview).lower, params, batch)
        answer = compiler.ask(lower, f"{name}: evaluation")
    unpaid = {"share": 0.0, "model_tflops": 0.0, "rematerialised_tflops": 0.0}
    return lambda: {"events": [EVALUATION], **unpaid, **answer.result()}


def _cache_file(config, job: str, topology: str, slices: int, effort: str) -> Path:
    """Named by everything that the plan depends on: of latents that a step reads, also by what they are."""
    read = job == "train" and config.data.get("latents")
    made = latents.read_description(config.data.latents) if read else None
    depends = [config.to_json(), job, topology, slices, effort, str(made), code_sha256()]
    return cache_file("plans", depends)
