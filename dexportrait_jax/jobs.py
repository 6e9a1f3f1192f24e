"""The jobs of the command line, in one table: what each is for, an example, its flags and its function.

Imports nothing heavy: functions are named, and imported by `cli.py` when their job runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

from dexportrait_jax import animate_flags, job_flags


class Job(NamedTuple):
    """One job: what it is for, an example, its flags, where its function lives, and what it sets in the environment."""

    summary: str
    example: str
    flags: Callable[[argparse.ArgumentParser], None]
    function: str  # "module:function"; imported only when the job runs
    takes_config: bool = False
    environment: tuple[tuple[str, str], ...] = ()  # before anything heavy is imported


JOBS = {
    "demo": Job(
        "the whole day in miniature; ends in report.html",
        "dexportrait demo",
        job_flags.demo,
        "dexportrait_jax.demo:run_demo",
    ),
    "assets": Job(
        "inputs and weights by hash, and where they may come from",
        "dexportrait assets --fetch",
        job_flags.assets,
        "dexportrait_jax.assets:run_assets",
    ),
    "prepare": Job(
        "face videos -> dataset, with a report of what was dropped",
        "dexportrait prepare --videos='videos/*.mp4' --out=data/faces --size=512",
        job_flags.prepare,
        "data_pipelines.prepare.job:run_prepare",
    ),
    "render": Job(
        "rendered heads -> dataset, whose identity, expression and pose are known exactly",
        "dexportrait render --out=data/heads --identities=200 --frames=24 --size=64",
        job_flags.render,
        "data_pipelines.synthetic.dataset:run_render",
    ),
    "measure": Job(
        "stores how much backgrounds move beside an older dataset, for the video stage",
        "dexportrait measure --data=data/faces",
        job_flags.measure,
        "data_pipelines.measure:run_measure",
    ),
    "encode": Job(
        "a dataset's latents, so that the animator need not encode its pictures in every step",
        "dexportrait encode --weights=exports/autoencoder --data=data/faces --out=data/faces-latents",
        job_flags.encode,
        "dexportrait_jax.encode:run_encode",
    ),
    "inspect": Job(
        "a dataset, run, export, video or config, said in words and pictures",
        "dexportrait inspect data/faces",
        job_flags.inspect,
        "dexportrait_jax.inspection:run_inspect",
    ),
    "train": Job(
        "one stage; every config key can be set with --config.KEY=VALUE",
        "dexportrait train --config=configs/motion.py:tiny --workdir=runs/motion --config.num_steps=500",
        job_flags.train,
        "dexportrait_jax.train:run_train",
        True,
    ),
    "plan": Job(
        "does a config fit on TPUs that are not here, what bounds it, how fast can it be; compiled, not run",
        "dexportrait plan --config=configs/animator_image.py:full@v5e:4x4 --json=plan.json",
        job_flags.plan,
        "dexportrait_jax.plan:run_plan",
        True,
        # The host compiles and its own devices, if any, are left alone. libtpu looks for a TPU host around it, which
        # takes a while on others, and says on standard error that there is none, unless it is told of one.
        (
            ("JAX_PLATFORMS", "cpu"),
            ("TPU_SKIP_MDS_QUERY", "1"),
            ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
            ("TPU_WORKER_HOSTNAMES", "localhost"),
            ("TPU_ACCELERATOR_TYPE", "v5litepod-1"),
        ),
    ),
    "animate": Job(
        "a portrait and drivers -> video",
        "dexportrait animate --weights=exports/video --source=me.jpg --pose=a.mp4 "
        "--expression=b.mp4 --out=result.mp4",
        animate_flags.animate,
        "dexportrait_jax.animate:run_animate",
    ),
    "evaluate": Job(
        "figures and pictures on held-out data",
        "dexportrait evaluate --weights=exports/video --data=data/faces --protocol=self --out=results",
        job_flags.evaluate,
        "dexportrait_jax.evaluation.protocols:run_evaluate",
    ),
    "import": Job(
        "published weights -> an export that training starts from",
        "dexportrait import --kind=convnextv2 --source=convnextv2-tiny.safetensors --out=exports/trunk",
        job_flags.import_,
        "dexportrait_jax.weights.published:run_import",
    ),
    "export": Job(
        "a run's weights as safetensors, in PyTorch's names and layout",
        "dexportrait export --workdir=runs/video --out=exports/video",
        job_flags.export,
        "dexportrait_jax.weights.exporting:run_export",
    ),
}
