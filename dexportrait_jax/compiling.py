"""XLA's compiler asked what a program needs on devices that are not there."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from dexportrait_jax import chips
from dexportrait_jax.compiled_program import Program, read_program

# XLA's effort: quick finds the memory within some per cent of what it needs, in a quarter of the time.
EFFORTS = {"quick": "O0", "exact": None}


def compiled(lower: Callable[[], Any], label: str, effort: str) -> dict[str, Any]:
    """One program: what it needs where it fits, and what it lacks where it does not.

    Args:
      lower: makes the jax.stages.Lowered.
      label: what is told while it compiles.
      effort: one of EFFORTS.

    Returns:
      `fits`, `hbm_gib_per_device` (at the moment when most is in use, with the program; None where it does not fit
      and XLA does not say by how much), `compile_seconds`; where it fits also `buffers_gib_per_device` (all buffers
      one beside the other, with the program), `state_gib_per_device` (given back in place),
      `argument_gib_per_device` and what the program's text says: FLOPs, traffic, collectives.
    """
    started = time.monotonic()
    with _told(label), _effort(effort):
        try:
            program = lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return {
                "fits": False,
                "hbm_gib_per_device": _needed_gib(str(error)),
                "compile_seconds": round(time.monotonic() - started, 1),
            }
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
        "compile_seconds": round(time.monotonic() - started, 1),
        **_figures(read_program(program.as_text())),
    }


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
