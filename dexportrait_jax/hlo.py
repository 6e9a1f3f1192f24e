"""The text of a compiled program, taken apart: computations, instructions, shapes, and how often loops run."""

from __future__ import annotations

import dataclasses
import math
import re

_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1.0),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2.0),
    **dict.fromkeys(("f32", "s32", "u32"), 4.0),
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 8.0),
    **dict.fromkeys(("s4", "u4"), 0.5),
}
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_HEAD = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s*(ROOT )?%([\w.\-]+) = (.*)$")
_BRACKET = re.compile(r"[()]")
_NAME = re.compile(r"%([\w.\-]+)")

Computation = dict[str, "Instruction"]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    kind: str
    operands: tuple[str, ...]
    rest: str  # attributes, and what stood between the brackets of a constant
    root: bool


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of `compiled.as_text()` by name, and the name of the one that is run.

    Raises:
      ValueError: that is no text of XLA's.
    """
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    entry = None
    for line in text.splitlines():
        if current is None:
            head = _HEAD.match(line)
            if head:
                current = computations.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
        elif line.rstrip() == "}":
            # Attributes of kernels go over several lines, some of which begin so, and go on.
            current = None
        else:
            found = _LINE.match(line)
            if found:
                instruction = _instruction(found[2], found[3], bool(found[1]))
                current[instruction.name] = instruction
    if entry is None:
        raise ValueError("the text has no ENTRY computation; give what compiled.as_text() says")
    return computations, entry


def _instruction(name: str, text: str, root: bool) -> Instruction:
    shape_end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    shape, text = text[:shape_end], text[shape_end:].lstrip()
    opening = text.index("(")
    closing = _closing(text, opening)
    inside = text[opening + 1 : closing - 1]
    kind = text[:opening]
    rest = text[closing:]
    if kind in ("constant", "parameter"):
        return Instruction(name, shape, kind, (), inside, root)
    return Instruction(name, shape, kind, tuple(_NAME.findall(inside)), rest, root)


def _closing(text: str, start: int) -> int:
    """The position behind the bracket that closes the one at `start`."""
    depth = 0
    for bracket in _BRACKET.finditer(text, start):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            return bracket.end()
    raise ValueError(f"a bracket is not closed: {text[start : start + 60]}")


def called(instruction: Instruction, key: str) -> str | None:
    """The computation that stands under this key of an instruction's attributes."""
    found = re.search(rf"\b{key}=%([\w.\-]+)", instruction.rest)
    return found[1] if found else None


def branches(instruction: Instruction) -> list[str]:
    """The computations of a conditional."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
    if listed:
        return _NAME.findall(listed[1])
    return re.findall(r"(?:true|false)_computation=%([\w.\-]+)", instruction.rest)


def dimensions(shape: str) -> tuple[int, ...]:
    """Of the first array in a shape."""
    found = _ARRAY.search(shape)
    return tuple(int(size) for size in found[2].split(",") if size) if found else ()


def size(shape: str, hbm_only: bool = False) -> float:
    """Bytes of the arrays in a shape; with `hbm_only` not those in memory of the core's own, S(n)."""
    return sum(
        math.prod(int(size) for size in sizes.split(",") if size) * _BYTES.get(kind, 0.0)
        for kind, sizes, layout in _ARRAY.findall(shape)
        if not (hbm_only and "S(" in layout)
    )


def loop_length(
    loop: Instruction, around: Computation, computations: dict[str, Computation]
) -> int | None:
    """How often a loop's body runs; None where the program does not say."""
    condition = computations[called(loop, "condition")]
    body = computations[called(loop, "body")]
    test = next(one for one in condition.values() if one.root)
    if test.kind != "compare" or "direction=LT" not in test.rest:
        return None
    counter, end = (condition.get(name) for name in test.operands)
    index = re.search(r"index=(\d+)", counter.rest) if counter.kind == "get-tuple-element" else None
    last = _constant(end, condition)
    if index is None or last is None:
        return None
    place = int(index[1])
    start = around.get(loop.operands[0])
    first = _constant(around.get(start.operands[place]), around) if start.kind == "tuple" else None
    result = next(one for one in body.values() if one.root)
    step = body.get(result.operands[place]) if result.kind == "tuple" else None
    if step is not None and step.kind == "add":
        found = [_constant(body.get(name), body) for name in step.operands]
        advance = next((value for value in found if value is not None), None)
    else:
        advance = None
    if first is None or not advance:
        return None
    return max(0, math.ceil((last - first) / advance))


def _constant(instruction: Instruction | None, around: Computation) -> int | None:
    while instruction is not None and instruction.kind in ("copy", "bitcast"):
        instruction = around.get(instruction.operands[0])
    if instruction is None or instruction.kind != "constant":
        return None
    return int(instruction.rest) if re.fullmatch(r"-?\d+", instruction.rest) else None
