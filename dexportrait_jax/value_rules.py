"""Kinds and ranges that a value may be held to, in words and as a test: what `config_values.py` makes its table of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a key's values are.

    Attributes:
      kind: for people, as in "expected int".
      is_kind: whether a value is of it.
      range: for people, as in "it is 1 or more"; "": all of the kind.
      contains: whether a value of the kind lies in it.
      words: all that there are, of a choice.
    """

    kind: str
    is_kind: Callable[[Any], bool]
    range: str = ""
    contains: Callable[[Any], bool] = lambda value: True
    words: tuple[Any, ...] = ()


def _bounds(
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> tuple[str, Callable[[float], bool]]:
    """Words for a range, and whether a finite number lies in it."""
    said = []
    if above is not None:
        said.append(f"above {above:g}")
    if least is not None:
        said.append(f"{least:g} or more")
    if below is not None:
        said.append(f"below {below:g}")
    if most is not None:
        said.append(f"{most:g} or less")

    def contains(value: float) -> bool:
        return (
            math.isfinite(value)
            and (above is None or value > above)
            and (least is None or value >= least)
            and (below is None or value < below)
            and (most is None or value <= most)
        )

    return " and ".join(said) or "finite", contains


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def whole(least: int, bits: int = 31) -> Rule:
    """A whole number of so many bits: those that a device counts in have 31."""
    said = f"{least} or more, below 2^{bits}"
    return Rule("int", is_int, said, lambda value: least <= value < 2**bits)


def real(**bounds: float) -> Rule:
    """A finite number between `least` or `above` and `most` or `below`."""
    return Rule("float", is_number, *_bounds(**bounds))


def several(rule: Rule, least: int = 1, exactly: int | None = None) -> Rule:
    """A tuple of so many values, each as `rule` has it."""
    said = f"{least} or more values" if exactly is None else f"{exactly} values"

    def contains(value: tuple) -> bool:
        enough = len(value) >= least if exactly is None else len(value) == exactly
        return enough and all(map(rule.contains, value))

    return Rule(
        f"tuple of {rule.kind}",
        lambda value: isinstance(value, tuple | list) and all(map(rule.is_kind, value)),
        said + (f", each {rule.range}" if rule.range else ""),
        contains,
    )


def interval(**bounds: float) -> Rule:
    """Two numbers, from the smaller to the larger."""
    pair = several(real(**bounds), exactly=2)
    return dataclasses.replace(
        pair,
        range=f"{pair.range}, the smaller first",
        contains=lambda value: pair.contains(value) and value[0] <= value[1],
    )


def or_none(rule: Rule) -> Rule:
    """That, or None."""
    return Rule(
        f"{rule.kind} or None",
        lambda value: value is None or rule.is_kind(value),
        rule.range,
        lambda value: value is None or rule.contains(value),
    )


def one_of(*words: Any) -> Rule:
    """One of these words or numbers, and None where it is among them."""
    kinds = {type(word) for word in words}
    names = " or ".join(sorted(kind.__name__ for kind in kinds - {type(None)}))
    return Rule(
        names + (" or None" if None in words else ""),
        lambda value: type(value) in kinds,
        "",
        lambda value: value in words,
        words,
    )


def is_multiplier(value: Any) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) == 2
        and isinstance(value[0], str)
        and is_number(value[1])
    )
