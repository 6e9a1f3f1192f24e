"""XLA's compiler asked what a program needs on devices that are not there.

What it took minutes to say is kept under `~/.cache/dexportrait/programs`, by the program's own text: a plan that was
broken off goes on where it was, and code that changes something else costs nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import inspect
import json
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from data_pipelines.files import write_json
from dexportrait_jax import chips, compiled_program, hlo
from dexportrait_jax.compiled_program import Program, read_program
from dexportrait_jax.errors import UserError
from dexportrait_jax.platforms import TPU_OPTIONS

# XLA's effort: quick finds the memory within some per cent of what it needs, in a quarter of the time.
EFFORTS = {"quick": "O0", "exact": None}


def compiled(
    lower: Callable[[], Any],
    label: str,
    effort: str,
    mesh: jax.sharding.Mesh | None = None,
    again: bool = False,
) -> dict[str, Any]:
    """One program: what it needs where it fits, and what it lacks where it does not.

    Args:
      lower: makes the jax.stages.Lowered.
      label: what is told while it compiles.
      effort: one of EFFORTS.
      mesh: what the program is for; without it what is found is not kept.
      again: compiles also what was compiled before.

    Returns:
      `fits`, `hbm_gib_per_device` (at the moment when most is in use, with the program; None where it does not fit
      and XLA does not say by how much), `compile_seconds`; where it fits also `buffers_gib_per_device` (all buffers
      one beside the other, with the program), `state_gib_per_device` (given back in place),
      `argument_gib_per_device` and what the program's text says: FLOPs, traffic, collectives.
    """
    started = time.monotonic()
    with _told(label), _effort(effort):
        program = lower()
        kept = None if mesh is None else _program_file(program, mesh, effort)
        found = None if kept is None or again else read_kept(kept)
        if found is None:
            found = _compiled(program)
            found["compile_seconds"] = round(time.monotonic() - started, 1)
            if kept:
                write_kept(kept, found)
        else:
            print(f"{label}: compiled before, from {kept}", flush=True)
    return found


def _compiled(lowered: Any) -> dict[str, Any]:
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"fits": False, "hbm_gib_per_device": _needed_gib(str(error))}
    memory = program.memory_analysis()
    buffers = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    code = memory.generated_code_size_in_bytes
    # The peak is less where some buffers come after others, or lie in the chip's own small memory: libtpu 0.0.42.1
    # takes a step with 16.66 GiB of buffers and code on a chip of 15.75, and says 14.37 of its peak.
    peak = min(getattr(memory, "peak_memory_in_bytes", 0) or buffers, buffers)
    return {
        "fits": True,
        "hbm_gib_per_device": round((peak + code) / chips.GIB, 3),
        "buffers_gib_per_device": round((buffers + code) / chips.GIB, 3),
        "state_gib_per_device": round(memory.alias_size_in_bytes / chips.GIB, 3),
        "argument_gib_per_device": round(memory.argument_size_in_bytes / chips.GIB, 3),
        **_figures(read_program(program.as_text())),
    }


# --- what is kept -------------------------------------------------------------------------


def cache_file(folder: str, asked: Any) -> Path:
    """Where in the cache is what depends on `asked`, on the packages that compile, and on their flags."""
    versions = [package_version(name) for name in ("jax", "jaxlib", "libtpu", "flax", "optax")]
    flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    name = hashlib.sha256(json.dumps([asked, versions, flags]).encode()).hexdigest()[:24]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "dexportrait" / folder / f"{name}.json"


def package_version(package: str) -> str:
    """As installed, or "absent"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def read_kept(kept: Path) -> dict[str, Any] | None:
    """What `write_kept` wrote; None where there is nothing that can be read."""
    try:
        return json.loads(kept.read_text())
    except (OSError, ValueError):
        return None


def write_kept(kept: Path, found: dict[str, Any]) -> None:
    """Not worth failing for: it can be found again."""
    with contextlib.suppress(OSError, UserError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, found)


def _program_file(lowered: Any, mesh: jax.sharding.Mesh, effort: str) -> Path:
    """By the program's text and options, by which device has which part of the mesh, and by what reads the result."""
    text = hashlib.sha256(lowered.as_text().encode()).hexdigest()
    places = [str(getattr(device, "coords", device)) for device in mesh.devices.flat]
    slices = [getattr(device, "slice_index", 0) for device in mesh.devices.flat]
    kinds = sorted({device.device_kind for device in mesh.devices.flat})
    readers = [inspect.getsource(module) for module in (hlo, compiled_program)]
    where = [dict(mesh.shape), places, slices, kinds]
    return cache_file("programs", [text, TPU_OPTIONS, where, effort, readers])


def placed(tree: Any, places: Any) -> Any:
    """Shapes of `tree` with the shardings of `places`."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        places,
    )


def _figures(program: Program) -> dict[str, Any]:
    return {
        "executed_tflops_per_device": program.flops / 1e12,
        "hbm_bytes_per_device": program.hbm_bytes,
        "between_slices_bytes_per_device": program.between_slices,
        "collectives": {
            kind: {"count": found.count, "bytes": round(found.bytes)}
            for kind, found in sorted(program.collectives.items())
        },
        "loops_counted_once": program.unknown_loops,
        "kernels_not_counted": program.unknown_kernels,
    }


def _needed_gib(message: str) -> float | None:
    """What a program needs, in the words of XLA that are known; None in others."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of", message) or re.search(
        r"total memory required .*?\(([\d.]+)([KMGT])\)", message
    )
    return (
        float(found[1]) * 2.0 ** {"K": -20, "M": -10, "G": 0, "T": 10}[found[2]] if found else None
    )


class _effort:
    """XLA's effort inside, as it was afterwards."""

    _NAMES = ("jax_optimization_level", "jax_memory_fitting_level")

    def __init__(self, effort: str):
        self.level = EFFORTS[effort]

    def __enter__(self):
        self.before = {name: getattr(jax.config, name) for name in self._NAMES}
        if self.level:
            for name in self._NAMES:
                jax.config.update(name, self.level)

    def __exit__(self, *_):
        for name, value in self.before.items():
            jax.config.update(name, value)


class _told:
    """A line every half minute while the compiler, which says nothing, is at work."""

    def __init__(self, label: str, every: float = 30.0):
        self.label, self.every = label, every
        self.done = threading.Event()

    def __enter__(self):
        self.started = time.monotonic()
        self.thread = threading.Thread(target=self._tell, daemon=True)
        print(f"{self.label}: compiling", flush=True)
        self.thread.start()

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()

    def _tell(self):
        while not self.done.wait(self.every):
            print(f"{self.label}: compiling, {time.monotonic() - self.started:.0f} s", flush=True)
