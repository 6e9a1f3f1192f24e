"""XLA's compiler asked what a program needs on devices that are not there.

What it took minutes to say is kept under `~/.cache/dexportrait/programs`, by the program's own text, and with it the
text that came of it, which is read anew each time: a plan that was broken off goes on where it was, and neither code
that changes something else nor a better reading costs a compilation.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax

from dexportrait_jax import chips
from dexportrait_jax.compiled_program import Program, read_program
from dexportrait_jax.plan_cache import LEVELS, cache_file, keep_said, read_said
from dexportrait_jax.platforms import TPU_OPTIONS

# XLA's effort: quick finds the memory within some per cent of what it needs, in a quarter of the time. What it keeps in
# the chip's own small memory between two operations is nothing, so that more goes to and from HBM than it has to.
EFFORTS = {"quick": "O0", "exact": None}
# Of the host's memory while it compiles, by the megabyte of the program's text: .85 (motion) to 1.4 (a UNet's step).
COMPILER_GIB_PER_MB = 1.4
# Of XLA's memory analysis.
_MEMORY = (
    "argument_size",
    "output_size",
    "alias_size",
    "temp_size",
    "generated_code_size",
    "peak_memory",
)


class Compiler:
    """Asks of programs what they need; two are compiled beside each other where memory is enough for both.

        with Compiler("quick", mesh) as compiler:
            answers = [compiler.ask(lower, label) for lower, label in programs]
        found = [answer.result() for answer in answers]

    Args:
      effort: one of EFFORTS.
      mesh: what the programs are for; without it what is found is not kept, and not said which links collectives have.
      again: compiles also what was compiled before.
    """

    def __init__(self, effort: str, mesh: jax.sharding.Mesh | None = None, again: bool = False):
        self.effort, self.mesh, self.again = effort, mesh, again
        self.pool = ThreadPoolExecutor(max_workers=2)
        self.room = _available_gib()
        self.needs: dict[Future, float] = {}  # of what is under way

    def __enter__(self) -> Compiler:
        self.levels = _effort(self.effort)
        self.levels.__enter__()
        return self

    def __exit__(self, kind, *_) -> None:
        self.pool.shutdown(cancel_futures=kind is not None)
        self.levels.__exit__()

    def ask(self, lower: Callable[[], Any], label: str) -> Future:
        """Starts one program, when there is room for it.

        Args:
          lower: makes the jax.stages.Lowered; it is called here and now.
          label: what is told while it compiles.

        Returns:
          What will be `fits`, `hbm_gib_per_device` (at the moment when most is in use, with the program; None where
          it does not fit and XLA does not say by how much), `compile_seconds`; where it fits also
          `buffers_gib_per_device` (all buffers one beside the other, with the program), `state_gib_per_device` (given
          back in place), `argument_gib_per_device` and what the program's text says: FLOPs, traffic, collectives. Or
          the error with which XLA cannot compile it, for another reason than the memory of the device.
        """
        started = time.monotonic()
        program = lower()
        text = program.as_text()
        seconds = time.monotonic() - started
        kept = None if self.mesh is None else _program_file(text, self.mesh, self.effort)
        said = None if kept is None or self.again else read_said(kept)
        if said is not None:
            print(f"{label}: compiled before, from {kept}", flush=True)
            return self.pool.submit(_figures, said, self.mesh)
        need = COMPILER_GIB_PER_MB * len(text) / 1e6
        while self.needs and sum(self.needs.values()) + need > self.room:
            ended, _ = wait(self.needs, return_when=FIRST_COMPLETED)
            for answer in ended:
                del self.needs[answer]
        answer = self.pool.submit(self._answer, program, kept, label, seconds)
        self.needs[answer] = need
        return answer

    def _answer(self, program: Any, kept: Path | None, label: str, before: float) -> dict[str, Any]:
        started = time.monotonic()
        with _told(label):
            said = _compiled(program)
        said["compile_seconds"] = round(before + time.monotonic() - started, 1)
        if kept:
            keep_said(kept, said)
        return _figures(said, self.mesh)


def compiled(
    lower: Callable[[], Any],
    label: str,
    effort: str,
    mesh: jax.sharding.Mesh | None = None,
    again: bool = False,
) -> dict[str, Any]:
    """One program: what `Compiler.ask` says of it."""
    with Compiler(effort, mesh, again) as compiler:
        return compiler.ask(lower, label).result()


def _available_gib() -> float:
    """Of the host's memory; 0 where nothing says it."""
    try:
        said = Path("/proc/meminfo").read_text()
    except OSError:
        return 0.0
    found = re.search(r"MemAvailable: *(\d+) kB", said)
    return int(found[1]) / 2**20 if found else 0.0


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


def _program_file(text: str, mesh: jax.sharding.Mesh, effort: str) -> Path:
    """By the program's text, its options, XLA's levels of effort, and which device has which part of the mesh."""
    text = hashlib.sha256(text.encode()).hexdigest()
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
        self.before = {name: getattr(jax.config, name) for name in LEVELS}
        if self.level:
            for name in LEVELS:
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
