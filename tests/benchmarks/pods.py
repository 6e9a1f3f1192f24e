"""What a pod would do, and what its parts cost here: the tables of the README.

    python -m tests.benchmarks pods [--parts=plans,scaling,unet,sharded,save] [--out=runs/pods] [--stages=motion,...]

plans: every stage on v5e-256 and v5p-64 (32 chips), and the smallest slice of each kind that holds it, found upwards.
scaling: the bound of a step from 16 to 1024 chips of v5e, several slices above 256. The batch is the paper's as long as
    it has a picture for every chip (of a clip: three frames), and grows with the chips beyond. Steps alone, without
    the program that makes samples between them.
unet: the training step of SD1.5's UNet alone, beside MaxDiffusion's under the same compiler.
sharded: the time of a step on this CPU over eight fake devices against one.
save: seconds to save and to restore a State of random numbers, and how long the loop stands still for it.

The first three are compiled, not run. What is done lies in --out and is not done again; remove its file for that. Each
part in processes of its own: plans take minutes to an hour, so ask for one part at a time on a small machine.
"""

import argparse
import concurrent.futures
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from configs import meshes
from data_pipelines.files import write_json
from dexportrait_jax import chips, choices
from dexportrait_jax import config as configs
from dexportrait_jax.cli import Parser
from dexportrait_jax.errors import UserError
from dexportrait_jax.jobs import JOBS

STAGES = ("motion", "animator_image", "animator_video")
LARGE = ("v5e:16x16", "v5p:2x4x4")
UPWARDS = {
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}
SCALES = ("v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16", "2xv5e:16x16", "4xv5e:16x16")
# Chips that one source, or one clip, can keep busy.
CHIPS_OF_A_SOURCE = {"motion": 4, "animator_image": 4, "animator_video": 8}
VERSIONS = ("jax", "libtpu", "flax", "optax", "orbax-checkpoint")


def main(arguments: list[str]) -> None:
    parts = {"plans": plans, "scaling": scaling, "unet": unet, "sharded": sharded, "save": save}
    parser = Parser(prog="tests.benchmarks pods")
    parser.add_argument("--parts", default=",".join(parts), help=", ".join(parts))
    parser.add_argument("--out", type=Path, default=Path("runs/pods"))
    parser.add_argument("--stages", default="", help="those alone (default: all of a part)")
    parser.add_argument("--effort", default="quick", choices=("quick", "exact"))
    parser.add_argument("--images", default="4,16", help="of `unet`, on a chip")
    parser.add_argument("--remat", default="none,products,blocks", help="of `unet`")
    parser.add_argument("--topologies", default="", help="of `plans` and `scaling`, those alone")
    parser.add_argument("--save_variant", default="tiny", help="of the configs that `save` saves")
    options = parser.parse_args(arguments)
    chosen = options.parts.split(",")
    _refuse_unknown(parser, "parts", chosen, list(parts))
    _check(parser, options, chosen)
    options.out.mkdir(parents=True, exist_ok=True)
    _refuse_other_versions(parser, options.out)
    for part in chosen:
        options.dates = set()  # on which what a part tells was measured
        parts[part](options)


# --- compiled, not run --------------------------------------------------------------------


def plans(options) -> None:
    """Large slices first, then the smallest that fits."""
    rows = []
    for stage in _stages(options):
        wanted = options.topologies.split(",") if options.topologies else LARGE
        rows += [(stage, where, _plan(stage, where, options)) for where in wanted]
        for kind, grids in UPWARDS.items() if not options.topologies else ():
            for grid in grids:
                where = f"{kind}:{grid}"
                if _state_gib(stage, where, options) > chips.CHIPS[kind].hbm_gib:
                    continue  # its State alone is too much
                found = _plan(stage, where, options)
                if found["fits"]:
                    rows.append((stage, where, found | {"smallest": True}))
                    break
        _table(
            "Plans: full on slices, compiled, not run", PLAN_COLUMNS, map(_plan_row, rows), options
        )


def scaling(options) -> None:
    """Steps of as many pictures as there are chips, or of the paper's batch where that is more."""
    wanted = options.topologies.split(",") if options.topologies else SCALES
    for stage in _stages(options):
        rows = []
        for where in wanted:
            config = configs.load_config(f"configs/{stage}.py:full@{where}")
            sources = _devices(where) // CHIPS_OF_A_SOURCE[stage]
            larger = sources > config.data.batch_size
            overrides = ["evaluate.at_end=False", "evaluate.every_steps=0"]
            overrides += [f"data.batch_size={sources}"] if larger else []
            rows.append((stage, where, _plan(stage, where, options, overrides)))
        _table(
            f"Bound of {stage}:full, compiled, not run", PLAN_COLUMNS, map(_plan_row, rows), options
        )


PLAN_COLUMNS = (
    *(
        "stage",
        "slice",
        "chips",
        "batch",
        "mesh d,f,c,t",
        "remat",
        "GiB",
        "compute ms",
        "memory ms",
    ),
    *("network ms", "step ms", "pictures/s", "MFU", "recomputed", "executed", "compile s"),
)


def _plan_row(row) -> list[str]:
    stage, where, found = row
    batch, mesh = found["batch"], found["mesh"]
    parts = f" / {batch['accumulate']}" if batch["accumulate"] > 1 else ""
    needed = found["hbm_gib_per_device"]
    cells = [
        stage,
        where + (" (smallest)" if found.get("smallest") else ""),
        str(found["devices"]),
        f"{batch['sources']} x {batch['targets']}{parts}",
        ",".join(str(mesh[axis]) for axis in ("data", "fsdp", "context", "tensor")),
        found["remat"],
        f"{'?' if needed is None else f'{needed:.2f}'} of {found['hbm_limit_gib']:.2f}",
    ]
    if not found["fits"]:
        return [*cells, "does not fit", *[""] * 7, f"{found['compile_seconds']:.0f}"]
    seconds = found["bound_step_seconds"]
    bounds = {name: f"{1e3 * each:.0f}" for name, each in found["bound_seconds"].items()}
    if found["effort"] == "quick":  # too much there, and not counted
        bounds["memory"] = f"({bounds['memory']})"
    return [
        *cells,
        *(bounds[name] for name in ("compute", "memory", "network")),
        f"{1e3 * seconds:.0f}",
        f"{batch['sources'] * batch['targets'] / seconds:.0f}",
        f"{found['bound_mfu']:.1%}",
        f"{found['recompute_overhead']:.2f}",
        f"{found['executed_overhead']:.2f}",
        f"{found['compile_seconds']:.0f}",
    ]


def _plan(stage: str, where: str, options, overrides: list[str] = ()) -> dict:
    """A plan by the command line, kept under --out."""
    address = f"configs/{stage}.py:full@{where}"
    name = "-".join([stage, where.replace(":", "_"), *overrides, options.effort])
    file = options.out / f"plan-{name}.json"
    if not file.exists():
        flags = [f"--config.{override}" for override in overrides]
        job = [
            "plan",
            f"--config={address}",
            *flags,
            f"--effort={options.effort}",
            f"--json={file}",
        ]
        subprocess.run([sys.executable, "-m", "dexportrait_jax", *job], check=True)
    config = configs.load_config(address, list(overrides))
    return _read(file, options) | {"remat": config.get("remat", "none")}


def unet(options) -> None:
    """Our UNet's step at the setting at which MaxDiffusion's was compiled."""
    from tests.benchmarks._pods_compiled import plan_unet

    rows = [
        ["MaxDiffusion", "4", "", "fsdp 16", "14.06", "", "985 (exact)"],
        ["MaxDiffusion", "4", "", "data 16", "does not fit", "", ""],
        ["MaxDiffusion", "1", "", "data 16", "13.67", "", "487 (exact)"],
    ]
    for images in map(int, options.images.split(",")):
        for remat in options.remat.split(","):
            file = options.out / f"unet-{images}-{remat}-{options.effort}.json"
            found = _kept(file, options, plan_unet, images, remat, options.effort)
            needed = found["hbm_gib_per_device"]
            said = "?" if needed is None else f"{needed:.2f}"
            rows.append(
                ["ours", str(images), remat, "fsdp 16"]
                + [said if found["fits"] else f"does not fit ({said})"]
                + [f"{found['recompute_overhead']:.3f}"]
                + [f"{found['compile_seconds']:.0f} ({options.effort})"]
            )
            titles = (
                "",
                "images a chip",
                "remat",
                "mesh",
                "GiB of 15.75",
                "recomputed",
                "compile s",
            )
            title = "SD1.5's UNet, one training step, v5e:4x4: 859.5 M, AdamW, float32 weights, bfloat16, 64x64"
            _table(f"{title}; compiled, not run", titles, rows, options)


def _state_gib(stage: str, where: str, options) -> float:
    """What a device has of the State: more than its memory needs no compiling."""
    from tests.benchmarks._pods_compiled import state_gib

    file = options.out / f"state-{stage}-{where.replace(':', '_')}.json"
    return _kept(file, options, state_gib, f"configs/{stage}.py:full@{where}")["gib"]


# --- run here -----------------------------------------------------------------------------


def sharded(options) -> None:
    """Eight fake devices share the cores that one has: what is more is what sharding costs a CPU."""
    from tests.benchmarks._pods_here import MESHES, step_seconds

    rows = []
    for stage in _stages(options, ("autoencoder", *STAGES)):
        found = {}
        for name in MESHES:
            file = options.out / f"sharded-{stage}-{name.replace(' ', '_')}.json"
            found[name] = _kept(file, options, step_seconds, stage, name)
        alone = found["one device"]
        rows += [
            [stage, name, f"{each['seconds']:.3f}", f"{each['seconds'] / alone['seconds']:.2f}"]
            + [f"{each['compile_seconds']:.0f}"]
            for name, each in found.items()
        ]
        titles = ("stage, micro", "mesh", "seconds a step", "of one device's", "compile s")
        _table("A step here, 8 sources, float32, eight fake devices", titles, rows, options)


def save(options) -> None:
    """The State of a config, filled with random numbers that do not compress."""
    from tests.benchmarks._pods_here import save_seconds

    rows = []
    for stage in _stages(options, ("autoencoder", *STAGES)):
        address = f"configs/{stage}.py:{options.save_variant}"
        file = options.out / f"save-{stage}-{options.save_variant}.json"
        found = _kept(file, options, save_seconds, address, str(options.out / "checkpoints"))
        between = 60 * found["minutes_between"]
        rows.append(
            [f"{stage}:{options.save_variant}", f"{found['gib']:.3f}"]
            + [f"{found[name]:.2f}" for name in ("pause", "saved", "restored")]
            + [f"{found['pause'] / between:.3%} of {between / 60:.0f} min"]
        )
        titles = (
            "",
            "GiB",
            "pause s",
            "saved after s",
            "restored s",
            "pause, of the time between saves",
        )
        _table("Checkpoints on this disk, one process", titles, rows, options)


# --- what the parts share -----------------------------------------------------------------


def _check(parser: argparse.ArgumentParser, options, parts: list[str]) -> None:
    """Ends in one line where a list of a flag holds what there is not: parts take minutes, and tell what they know."""
    # How the autoencoder's batch would grow with the chips is not said.
    known = STAGES if "scaling" in parts else ("autoencoder", *STAGES)
    _refuse_unknown(parser, "stages", options.stages.split(",") if options.stages else [], known)
    _refuse_unknown(parser, "remat", options.remat.split(","), choices.ANIMATOR["remat"])
    for images in options.images.split(","):
        if not images.isdecimal() or int(images) < 1:
            parser.error(f"--images={options.images}: {images!r} is no whole number from 1")
    for where in options.topologies.split(",") if options.topologies else ():
        try:
            meshes.address(where)
        except UserError as error:
            parser.error(f"--topologies={options.topologies}: {error}")


def _refuse_unknown(parser, flag: str, given: list[str], known: Sequence[str]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        parser.error(
            f"--{flag}: there is no {unknown[0]!r}, only {', '.join(known)}{choices.nearest(unknown[0], known)}"
        )


def _stages(options, known: tuple[str, ...] = STAGES) -> list[str]:
    return options.stages.split(",") if options.stages else list(known)


def _devices(where: str) -> int:
    topology, slices = meshes.address(where)
    return chips.grid(topology)[1] * slices


def _kept(file: Path, options, measured: Callable, *arguments) -> dict:
    """What `measured` gives, in a process of its own whose CPU plays eight devices, once for each file."""
    if not file.exists():
        devices = "--xla_force_host_platform_device_count=8"
        before = dict(os.environ)
        os.environ.update(dict(JOBS["plan"].environment) | {"XLA_FLAGS": devices})
        try:
            fresh = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=fresh) as pool:
                found = pool.submit(measured, *arguments).result()
        finally:
            os.environ.clear()
            os.environ.update(before)
        write_json(file, found)
    return _read(file, options)


def _read(file: Path, options) -> dict:
    options.dates.add(datetime.date.fromtimestamp(file.stat().st_mtime).isoformat())
    return json.loads(file.read_text())


def _refuse_other_versions(parser: argparse.ArgumentParser, out: Path) -> None:
    """Figures of two compilers do not belong into one table."""
    file = out / "versions.json"
    versions = {name: _version(name) for name in VERSIONS}
    if file.exists() and json.loads(file.read_text()) != versions:
        parser.error(f"{out} holds figures of other versions ({file}); give another --out")
    write_json(file, versions)


def _table(title: str, titles, rows, options) -> None:
    dates = sorted(options.dates)
    versions = ", ".join(f"{name} {_version(name)}" for name in VERSIONS)
    print(f"\n{title} ({' to '.join(sorted({dates[0], dates[-1]}))}, {versions})\n")
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    sys.stdout.flush()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
