"""XLA's compiler asked what a program needs on devices that are not there.

What it took minutes to say is kept under `~/.cache/dexportrait/programs`, by the program's own text, and with it the
text that came of it, which is read anew each time: a plan that was broken off goes on where it was, and neither code
that changes something else nor a better reading costs a compilation.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.metadata
import json
import os
import re
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from data_pipelines.files import write_bytes, write_json
from dexportrait_jax import chips
from dexportrait_jax.compiled_program import Program, read_program
from dexportrait_jax.errors import UserError
from dexportrait_jax.platforms import TPU_OPTIONS

# XLA's effort: quick finds the memory within some per cent of what it needs, in a quarter of the time. What it keeps in
# the chip's own small memory between two operations is nothing, so that more goes to and from HBM than it has to.
EFFORTS = {"quick": "O0", "exact": None}
_LEVELS = ("jax_optimization_level", "jax_memory_fitting_level")
# Of XLA's memory analysis.
_MEMORY = (
    "argument_size",
    "output_size",
    "alias_size",
    "temp_size",
    "generated_code_size",
    "peak_memory",
)


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
      mesh: what the program is for; without it what is found is not kept, and not said which links collectives have.
      again: compiles also what was compiled before.

    Returns:
      `fits`, `hbm_gib_per_device` (at the moment when most is in use, with the program; None where it does not fit
      and XLA does not say by how much), `compile_seconds`; where it fits also `buffers_gib_per_device` (all buffers
      one beside the other, with the program), `state_gib_per_device` (given back in place),
      `argument_gib_per_device` and what the program's text says: FLOPs, traffic, collectives.

    Raises:
      jax.errors.JaxRuntimeError: XLA cannot compile it, for another reason than the memory of the device.
    """
    started = time.monotonic()
    with _told(label), _effort(effort):
        program = lower()
        kept = None if mesh is None else _program_file(program, mesh, effort)
        said = None if kept is None or again else _read_said(kept)
        if said is None:
            said = _compiled(program)
            said["compile_seconds"] = round(time.monotonic() - started, 1)
            if kept:
                _keep_said(kept, said)
        else:
            print(f"{label}: compiled before, from {kept}", flush=True)
        return _figures(said, mesh)


def _compiled(lowered: Any) -> dict[str, Any]:
    """What XLA says: "message" where memory ran out, else "memory", bytes by what they are for, and "text"."""
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        # What a kernel needs of a core's own memory is no question of mesh or batch.
        if "RESOURCE_EXHAUSTED" not in str(error) or re.search(r"\b[vs]mem\b", str(error)):
            raise
        return {"message": str(error)}
    memory = program.memory_analysis()
    return {
        "memory": {name: getattr(memory, f"{name}_in_bytes", 0) for name in _MEMORY},
        "text": program.as_text(),
    }


def _figures(said: dict[str, Any], mesh: jax.sharding.Mesh | None) -> dict[str, Any]:
    """Of what `_compiled` says and how long it took."""
    seconds = {"compile_seconds": said["compile_seconds"]}
    if "message" in said:
        return {"fits": False, "hbm_gib_per_device": _needed_gib(said["message"])} | seconds
    arguments, output, alias, temporary, code, most = (said["memory"][name] for name in _MEMORY)
    buffers = arguments + output - alias + temporary
    # The peak is less where some buffers come after others, or lie in the chip's own small memory: libtpu 0.0.42.1
    # takes a step with 16.66 GiB of buffers and code on a chip of 15.75, and says 14.37 of its peak.
    peak = min(most or buffers, buffers)
    program = read_program(said["text"], mesh and chips.placement(list(mesh.devices.flat)))
    return {
        "fits": True,
        "hbm_gib_per_device": round((peak + code) / chips.GIB, 3),
        "buffers_gib_per_device": round((buffers + code) / chips.GIB, 3),
        "state_gib_per_device": round(alias / chips.GIB, 3),
        "argument_gib_per_device": round(arguments / chips.GIB, 3),
        **_work(program),
        **seconds,
    }


def _work(program: Program) -> dict[str, Any]:
    return {
        "executed_tflops_per_device": program.flops / 1e12,
        "matrix_tflops_per_device": program.matrix_flops / 1e12,
        "hbm_bytes_per_device": program.hbm_bytes,
        "between_slices_bytes_per_device": program.between_slices,
        "collectives": {
            kind: {"count": found.count, "bytes": round(found.bytes)}
            for kind, found in sorted(program.collectives.items())
        },
        # By the axes of the chips' grid, "0,1".
        "link_bytes": {
            ",".join(map(str, axes)): each for axes, each in sorted(program.link_bytes.items())
        },
        "loops_counted_once": program.unknown_loops,
        "kernels_not_counted": program.unknown_kernels,
    }


# --- what is kept -------------------------------------------------------------------------


def cache_file(folder: str, asked: Any) -> Path:
    """Where in the cache is what depends on `asked`, on the packages that compile, and on their flags."""
    versions = [package_version(name) for name in ("jax", "jaxlib", "libtpu", "flax", "optax")]
    flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    flags += [str(getattr(jax.config, name)) for name in _LEVELS]
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


def _read_said(kept: Path) -> dict[str, Any] | None:
    """What `_keep_said` wrote; None where any of it cannot be read."""
    said = read_kept(kept)
    if said is None or "message" in said:
        return said
    try:
        return said | {"text": gzip.decompress(kept.with_suffix(".hlo.gz").read_bytes()).decode()}
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return None


def _keep_said(kept: Path, said: dict[str, Any]) -> None:
    if "text" in said:
        with contextlib.suppress(OSError, UserError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(kept.with_suffix(".hlo.gz"), gzip.compress(said["text"].encode(), 3))
    write_kept(kept, {name: value for name, value in said.items() if name != "text"})


def _program_file(lowered: Any, mesh: jax.sharding.Mesh, effort: str) -> Path:
    """By the program's text, its options, XLA's levels of effort, and which device has which part of the mesh."""
    text = hashlib.sha256(lowered.as_text().encode()).hexdigest()
    devices = list(mesh.devices.flat)
    places = [
        [str(getattr(device, name, "")) for name in ("coords", "core_on_chip", "slice_index", "id")]
        for device in devices
    ]
    kinds = sorted({device.device_kind for device in devices})
    where = [dict(mesh.shape), places, kinds]
    return cache_file("programs", [text, TPU_OPTIONS, where, effort])


def placed(tree: Any, places: Any) -> Any:
    """Shapes of `tree` with the shardings of `places`."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        places,
    )


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

    def __init__(self, effort: str):
        self.level = EFFORTS[effort]

    def __enter__(self):
        self.before = {name: getattr(jax.config, name) for name in _LEVELS}
        if self.level:
            for name in _LEVELS:
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
