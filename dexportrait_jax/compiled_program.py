"""What a program compiled for TPUs does: products, memory traffic and collectives, read from its text.

XLA's `cost_analysis` takes the body of a loop once. Here a loop counts as often as it runs, which stands in the
program: its counter starts at a constant, goes up by a constant and ends at one.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

from dexportrait_jax.collectives import KINDS, Grid, goes_on, transfer
from dexportrait_jax.hlo import (
    Computation,
    Instruction,
    branches,
    called,
    dimensions,
    loop_length,
    parse,
    size,
)

# Products of queries by keys by features: logits and sum; these again, and what each gradient takes.
_SPLASH = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
# What moves nothing through memory of its own: names of values, and the ends of what a start has been charged for.
_FREE = {
    *(
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "partition-id",
    ),
    *("while", "conditional", "call", "iota", "replica-id", "opt-barrier", "add-dependency"),
}
# Passes in bfloat16 that a product of float32 takes; XLA's own cycles for 2048 x 2048 on a v5e are 2.9 and 5.7 times.
_PASSES = {"high": 3, "highest": 6}
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "SliceId", "AsyncCollectiveDone")


@dataclasses.dataclass
class Collective:
    """All collectives of one kind: how many a step, and the bytes that one device receives by them."""

    count: int = 0
    bytes: float = 0.0


@dataclasses.dataclass
class Program:
    """What one device does in one run of a compiled program.

    Attributes:
      flops: two for each multiply-add of products and convolutions, counted as `flops.py` does; with what is
        recomputed, what is padded and what several devices do alike.
      matrix_flops: the same as the matrix units are busy with them, which multiply bfloat16.
      hbm_bytes: read and written by the scheduled instructions; what stays in a core's own memory does not count.
      collectives: within a slice, by kind.
      link_bytes: of the collectives within a slice the bytes for each link, by the axes of the chips' grid that they
        have the links of; empty where it is not said where devices are.
      between_slices: bytes that one device receives from other slices.
      unknown_loops: names of loops whose length could not be read; their bodies are counted once.
      unknown_kernels: names of Pallas kernels whose products are not in `flops`, and kinds of collectives whose bytes
        are not counted, because the text does not say who takes part.
    """

    flops: float = 0.0
    matrix_flops: float = 0.0
    hbm_bytes: float = 0.0
    collectives: dict[str, Collective] = dataclasses.field(default_factory=dict)
    link_bytes: dict[tuple[int, ...], float] = dataclasses.field(default_factory=dict)
    between_slices: float = 0.0
    unknown_loops: list[str] = dataclasses.field(default_factory=list)
    unknown_kernels: list[str] = dataclasses.field(default_factory=list)


def read_program(text: str, grid: Grid | None = None) -> Program:
    """The program in `compiled.as_text()`, on devices that are so placed; ValueError where that is no text of XLA's."""
    computations, entry = parse(text)
    program = Program()
    _walk(entry, 1, computations, program, grid)
    return program


def _walk(
    name: str,
    times: int,
    computations: dict[str, Computation],
    program: Program,
    grid: Grid | None,
):
    """Adds what a scheduled computation does, `times` over."""
    body = computations[name]
    for instruction in body.values():
        kind = instruction.kind
        if kind == "while":
            length = loop_length(instruction, body, computations)
            if length is None:
                program.unknown_loops.append(instruction.name)
                length = 1
            _walk(called(instruction, "body"), times * length, computations, program, grid)
        elif kind == "call":
            _walk(called(instruction, "to_apply"), times, computations, program, grid)
        elif kind == "conditional":
            # Whichever branch is taken: the dearest is charged.
            taken = []
            for branch in branches(instruction):
                taken.append(Program())
                _walk(branch, times, computations, taken[-1], grid)
            _add(program, max(taken, key=lambda one: (one.matrix_flops, one.hbm_bytes)))
        else:
            inner = computations.get(called(instruction, "calls") or "", {})
            for product, around in ((instruction, body), *_within(inner, computations)):
                flops = times * _flops(product, around)
                program.flops += flops
                program.matrix_flops += flops * (_passes(product, around) if flops else 1)
            program.hbm_bytes += times * _traffic(instruction, body, inner)
            _communication(instruction, body, times, program, grid)
            for one in inner.values():
                if one.kind not in KINDS or not goes_on(one, inner):
                    _communication(one, inner, times, program, grid, fused=True)
            if 'custom_call_target="tpu_custom_call"' in instruction.rest:
                _kernel(instruction, body, times, program)


def _add(program: Program, other: Program) -> None:
    program.flops += other.flops
    program.matrix_flops += other.matrix_flops
    program.hbm_bytes += other.hbm_bytes
    program.between_slices += other.between_slices
    program.unknown_loops += other.unknown_loops
    program.unknown_kernels += other.unknown_kernels
    for kind, found in other.collectives.items():
        mine = program.collectives.setdefault(kind, Collective())
        mine.count, mine.bytes = mine.count + found.count, mine.bytes + found.bytes
    for axes, each in other.link_bytes.items():
        program.link_bytes[axes] = program.link_bytes.get(axes, 0.0) + each


def _communication(
    instruction: Instruction,
    around: Computation,
    times: int,
    program: Program,
    grid: Grid | None,
    fused: bool = False,
) -> None:
    if instruction.kind == "send" and "megascale" in instruction.rest:
        sent = size(around[instruction.operands[0]].shape)
        # The runtime between slices reduces: of n, each brings a part and takes a part of every other's at the least.
        slices = grid.slices if grid else 2
        program.between_slices += times * sent * 2 * (slices - 1) / slices
        return
    found = transfer(instruction, around, grid, fused)
    if found is None:
        return
    total = program.collectives.setdefault(found.kind, Collective())
    total.count += times
    if found.received is None:
        program.unknown_kernels.append(found.kind)
        return
    total.bytes += times * found.received
    if found.links:
        before = program.link_bytes.get(found.axes, 0.0)
        program.link_bytes[found.axes] = before + times * found.received / found.links


# --- products -----------------------------------------------------------------------------


def _within(computation: Computation, computations):
    """Everything in a fusion and in the fusions within it, each with what is around it."""
    for instruction in computation.values():
        yield instruction, computation
        if instruction.kind == "fusion":
            yield from _within(computations[called(instruction, "calls")], computations)


def _passes(product: Instruction, around: Computation) -> int:
    precision = re.search(r"operand_precision=\{(\w+)", product.rest)
    in_float32 = around[product.operands[0]].shape.startswith("f32")
    return _PASSES.get(precision[1], 1) if precision and in_float32 else 1


def _flops(instruction: Instruction, around: Computation) -> float:
    if instruction.kind == "dot":
        left = dimensions(around[instruction.operands[0]].shape)
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)[1]
        depth = math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
        return 2.0 * math.prod(dimensions(instruction.shape)) * depth
    if instruction.kind != "convolution":
        return 0.0
    left, kernel = (dimensions(around[name].shape) for name in instruction.operands)
    output = dimensions(instruction.shape)
    of_left, of_kernel, of_output = re.search(
        r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest
    ).groups()
    windows = _windows(instruction.rest, len(of_output) - 2)
    macs = (
        output[of_output.index("b")] * output[of_output.index("f")] * kernel[of_kernel.index("i")]
    )
    for axis, window in enumerate(windows):
        label = str(axis)
        macs *= _positions(
            left[of_left.index(label)],
            kernel[of_kernel.index(label)],
            output[of_output.index(label)],
            *window,
        )
    return 2.0 * macs


def _windows(rest: str, axes: int) -> list[tuple[int, int, int, int]]:
    """(stride, low padding, dilation of the input, dilation of the window) along every axis."""
    found = re.search(r"window=\{([^}]*)\}", rest)
    fields = dict(part.split("=") for part in found[1].split()) if found else {}

    def values(key: str, default: int) -> list[int]:
        text = fields.get(key)
        return [int(part.split("_")[0]) for part in text.split("x")] if text else [default] * axes

    keys = (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
    return list(zip(*(values(*key) for key in keys), strict=True)) if axes else []


def _positions(size, window, outputs, stride, pad, dilation, window_dilation) -> int:
    """Pairs of a window's and an output's position along one axis that are a multiplication.

    As in `flops.py`, padding counts; the zeros between the inputs of a transposed convolution do not, and neither do
    those by which XLA writes a batch of products as one convolution.
    """
    if dilation == 1:
        fewest, second, _ = sorted((size, window, outputs))
        return fewest * second
    pairs = 0
    for tap in range(window):
        offset = tap * window_dilation - pad
        for position in range(outputs):
            place, between = divmod(position * stride + offset, dilation)
            pairs += not between and 0 <= place < size
    return pairs


def _kernel(instruction: Instruction, around: Computation, times: int, program: Program) -> None:
    """JAX's splash attention, whose third to fifth operands are queries, keys and values: (b, heads, length, n)."""
    products = next((n for name, n in _SPLASH.items() if instruction.name.startswith(name)), None)
    if products is None:
        program.unknown_kernels.append(instruction.name)
        return
    queries, keys = (dimensions(around[name].shape) for name in instruction.operands[2:4])
    flops = times * products * 2.0 * math.prod(queries) * keys[-2]
    program.flops += flops
    program.matrix_flops += flops


# --- memory -------------------------------------------------------------------------------


def _traffic(instruction: Instruction, around: Computation, inner: Computation) -> float:
    """Bytes that go to and from HBM."""
    kind = instruction.kind
    if (
        kind in _FREE
        or kind.endswith("-done")
        or any(f'"{x}"' in instruction.rest for x in _FREE_CALLS)
    ):
        return 0.0
    if kind.endswith("-start"):
        return _moved(instruction)
    operands = [around[name].shape for name in instruction.operands if name in around]
    result = size(instruction.shape, hbm_only=True)
    if kind == "dynamic-update-slice":
        return 2 * size(operands[1], hbm_only=True)
    if kind in ("dynamic-slice", "slice", "gather"):
        return 2 * result
    if kind != "fusion":
        return result + sum(size(shape, hbm_only=True) for shape in operands)
    # What a collective that goes on beside products receives and sends has been charged for at its start.
    going = [one for one in inner.values() if one.kind in KINDS and goes_on(one, inner)]
    result -= sum(size(one.shape, hbm_only=True) for one in going)
    return result + _fusion_reads(operands, inner, going) - _written_in_place(inner)


def _moved(instruction: Instruction) -> float:
    """By a copy that runs beside other work: source and destination stand in its shape, with counters behind them."""
    arrays = [found[0] for found in re.finditer(r"\w+\[[\d,]+\](?:\{[^{}]*\})?", instruction.shape)]
    least = min((size(array) for array in arrays), default=0.0)
    return least * sum("S(" not in array for array in arrays)


def _fusion_reads(operands: list[str], inner: Computation, charged: Sequence[Instruction]) -> float:
    """What a fusion reads of its operands: of those that it only cuts from, the pieces; not for what is `charged`."""
    total = 0.0
    for parameter in (one for one in inner.values() if one.kind == "parameter"):
        shape = operands[int(parameter.rest)]
        if "S(" in shape:
            continue
        users = [one for one in inner.values() if parameter.name in one.operands]
        if users and all(one in charged for one in users):
            continue
        first = [one for one in users if one.operands[0] == parameter.name]
        cuts = [one for one in first if one.kind in ("dynamic-slice", "slice", "gather")]
        updated = [one for one in first if one.kind == "dynamic-update-slice"]
        if users and len(cuts) + len(updated) == len(users):
            total += sum(size(one.shape) for one in cuts)
        else:
            total += size(shape)
    return total


def _written_in_place(inner: Computation) -> float:
    """The part of a fusion's result that is there already and not written."""
    return sum(
        size(one.shape, hbm_only=True) - size(inner[one.operands[1]].shape)
        for one in inner.values()
        if one.root and one.kind == "dynamic-update-slice"
    )
