"""What making a clip needs on a chip that is not here: the plan of `--job=animate`.

`animate` works on one chip, so it is one device of the topology that is planned for. The programs are those that
`animate` compiles; a clip is the shortest that is made as a long one is: a window of the video stage, else a batch of
frames. What it takes is the sum over its programs, each as often as it runs; its memory is that of a clip of many
windows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from dexportrait_jax import chips, flops, sharding
from dexportrait_jax.compiling import Compiler, placed
from dexportrait_jax.errors import UserError
from dexportrait_jax.inference import STAGES, ClipProgram, Sampling, model_kind, nbytes
from dexportrait_jax.models.attention import attention_backend
from dexportrait_jax.models.convolution import convolution_backend
from dexportrait_jax.plan_report import summary
from dexportrait_jax.platforms import planned_for
from dexportrait_jax.state import parameter_count


def plan_clip(
    config: ml_collections.ConfigDict,
    topology: str,
    slices: int,
    effort: str,
    name: str,
    again: bool = False,
) -> dict[str, Any]:
    """What a clip needs on one chip of a topology; keys as of a training step, a clip in its place.

    `hbm_gib_per_device` is all weights, what is kept for the clip, and the most that a program takes beside it.

    Raises:
      UserError: no such topology, several slices, or a stage that makes no clips.
    """
    if slices != 1:
        raise UserError(
            f"--slices={slices}: --job=animate works on one chip; plan it for one slice"
        )
    if config.stage not in STAGES:
        raise UserError(
            f"--job=animate: the stage {config.stage!r} makes no clips; give a config of {', '.join(STAGES)}"
        )
    chip, devices = chips.topology(topology, slices)
    axes = ml_collections.ConfigDict(dict.fromkeys(sharding.AXES, 1))
    mesh = sharding.make_mesh(axes, devices[:1])
    with planned_for("tpu"):
        kind, networks = model_kind(config)
        params = {group: network.abstract for group, network in networks.items()}
        model = kind({"stage": config.stage}, config, networks, params)
        frames, programs, kept = model.clip_programs(Sampling())
        with Compiler(effort, mesh, again) as compiler:
            asked = [_planned(program, mesh, name, compiler) for program in programs]
        found = [each() for each in asked]
    resident = (nbytes(params) + kept) / chips.GIB
    for each in found:
        if each["fits"]:  # by itself; the weights of the others are there as well
            each["hbm_gib_per_device"] += resident - each["argument_gib_per_device"]
            each["fits"] = each["hbm_gib_per_device"] <= chip.hbm_gib
    together = summary(found, chip, 1, effort)
    seconds = together["bound_step_seconds"]
    together["bound_seconds_per_frame"] = None if seconds is None else seconds / frames
    return {
        "job": "animate",
        "topology": topology,
        "devices": 1,
        "mesh": dict(mesh.shape),
        "frames": frames,
        "params": {group: parameter_count(tree) for group, tree in params.items()},
        "hbm_limit_gib": chip.hbm_gib,
        "effort": effort,
        **together,
        "programs": found,
    }


def _planned(
    program: ClipProgram, mesh: jax.sharding.Mesh, name: str, compiler: Compiler
) -> Callable[[], dict[str, Any]]:
    # As the networks define the work, without a backend's detours.
    with convolution_backend("xla"), attention_backend("plain"):
        work = flops.count(program.function.__wrapped__, *program.arguments)
    arguments = placed(
        program.arguments, jax.tree.map(lambda _: sharding.replicated(mesh), program.arguments)
    )
    counted = {
        "name": program.name,
        "share": program.times,
        "model_tflops": work.flops / 1e12,
        "rematerialised_tflops": 0.0,
    }
    with jax.set_mesh(mesh):
        lower = functools.partial(program.function.lower, *arguments)
        answer = compiler.ask(lower, f"{name}: {program.name}")
    return lambda: counted | answer.result()
