"""The collectives of a compiled program: who takes part, what each device receives, and over which links it comes.

Chips lie on a grid, with a link to each neighbour along every axis. A collective among devices that differ along one
axis has that axis's links alone: two for each device where the devices go round a ring, one for the device at the end
of a line.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dexportrait_jax.hlo import Computation, Instruction, size

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where the devices of a program are, in its own order.

    Attributes:
      places: coordinates of each within its slice.
      rings: for every axis whether the links of the last device lead to the first.
      slices: how many there are.
    """

    places: tuple[tuple[int, ...], ...]
    rings: tuple[bool, ...]
    slices: int = 1


class Transfer(NamedTuple):
    """One collective of one device.

    Attributes:
      kind: one of KINDS.
      received: bytes; None where the text does not say who takes part.
      axes: of the grid, along which the devices that take part differ; all of them where that is not known.
      links: that it comes in by, over all these axes.
    """

    kind: str
    received: float | None
    axes: tuple[int, ...]
    links: int


def transfer(
    instruction: Instruction, around: Computation, grid: Grid | None, fused: bool = False
) -> Transfer | None:
    """What an instruction receives from other devices of its slice; None where it is no collective.

    Args:
      around: the computation in which it stands.
      grid: where the devices are; without it no axes and links are told.
      fused: that computation is a fusion's.
    """
    kind = instruction.kind.removesuffix("-start")
    if kind not in KINDS:
        return None
    sent = sum(size(around[name].shape) for name in instruction.operands if name in around)
    if kind == "collective-permute":
        pairs = _pairs(instruction.rest)
        return Transfer(kind, sent, *_of_pairs(pairs, grid))
    group = members(instruction.rest)
    if group is None:
        return Transfer(kind, None, (), 0)
    if fused and kind == "all-reduce" and _keeps_a_part(instruction, around):
        kind = "reduce-scatter"
    others = len(group) - 1
    share = sent * others / len(group)
    received = {"all-gather": sent * others, "all-reduce": 2 * share}.get(kind, share)
    return Transfer(kind, received, *_of_group(group, grid))


def goes_on(instruction: Instruction, around: Computation) -> bool:
    """Of a collective in a fusion: one that runs beside products appears in several, and all but the first go on."""
    flag = re.search(r'"async_collective_fusion_config":\{"flag_start":"(-?\d+)"', instruction.rest)
    ends = any("AsyncCollectiveDone" in one.rest for one in around.values())
    return ends or (flag is not None and int(flag[1]) >= 0)


def _keeps_a_part(instruction: Instruction, around: Computation) -> bool:
    """Libtpu's form of a reduce-scatter: a fusion of an all-reduce and the cut of the device's own part."""
    return any(
        one.root and one.kind == "dynamic-slice" and one.operands[0] == instruction.name
        for one in around.values()
    )


def members(rest: str) -> list[int] | None:
    """The devices of the first group of `replica_groups`; None where it is written in a way not known here.

    Listed, "{{0,1},{2,3}}"; by a count, "[2,4]<=[4,2]T(1,0)"; or by the axes of a mesh, "mesh['a'=2,'b'=4] {'b'}", of
    parts of them, "{'b':(1)2}", and of devices in another order, "device_ids=([4,2]T(1,0))".
    """
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    if listed:
        return [int(device) for device in listed[1].split(",")]
    counted = re.search(r"replica_groups=(\[\d+,\d+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest)
    if counted:
        return _ordered(counted[2]).reshape(_integers(counted[1]))[0].tolist()
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\(([^)]*(?:\([^)]*\))?)\))? ?\{([^}]*)\}",
        rest,
    )
    if not named:
        return None
    sizes = {axis: int(many) for axis, many in re.findall(r"('\w+')=(\d+)", named[1])}
    order = _ordered(named[2]) if named[2] else np.arange(math.prod(sizes.values()))
    taken = {
        axis: (int(before or 1), int(part or sizes[axis]))
        for axis, before, part in re.findall(r"('\w+')(?::\((\d+)\)(\d+))?", named[3])
    }
    # Every axis as (what lies before the part, the part, what lies behind it): the group is the parts alone.
    shape, chosen = [], []
    for axis, many in sizes.items():
        before, part = taken.get(axis, (many, 1))
        shape += [before, part, many // (before * part)]
        chosen += [0, slice(None), 0]
    return order.reshape(shape)[tuple(chosen)].reshape(-1).tolist()


def _ordered(text: str) -> np.ndarray:
    """ "[4,2]T(1,0)": the numbers from 0 on of these sizes, transposed so."""
    sizes, _, turned = text.partition("T")
    numbers = np.arange(math.prod(_integers(sizes))).reshape(_integers(sizes))
    return numbers.transpose(_integers(turned)) if turned else numbers


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _pairs(rest: str) -> list[tuple[int, int]]:
    listed = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", rest)
    found = re.findall(r"\{(\d+),(\d+)\}", listed[1]) if listed else []
    return [(int(source), int(target)) for source, target in found]


def _of_group(group: Sequence[int], grid: Grid | None) -> tuple[tuple[int, ...], int]:
    """The axes along which its devices differ, and over how many links the worst placed of them receives."""
    if grid is None:
        return (), 0
    places = np.asarray([grid.places[device] for device in group])
    axes = tuple(axis for axis in range(places.shape[1]) if len(set(places[:, axis])) > 1)
    if not axes:  # on one chip
        return _all(grid)
    return axes, sum(1 + _goes_round(places[:, axis], axis, grid) for axis in axes)


def _goes_round(coordinates: np.ndarray, axis: int, grid: Grid) -> bool:
    """Whether devices at these coordinates lie evenly round the whole of an axis that closes."""
    side = 1 + max(place[axis] for place in grid.places)
    steps = np.diff(np.unique(coordinates), append=coordinates.min() + side)
    return grid.rings[axis] and len(set(steps)) == 1


def _of_pairs(pairs: Sequence[tuple[int, int]], grid: Grid | None) -> tuple[tuple[int, ...], int]:
    """As `_of_group`, of sends; both directions, since another send can go the other way at the same time."""
    if grid is None:
        return (), 0
    places = np.asarray(grid.places)
    differing = {
        int(axis)
        for source, target in pairs
        for axis in np.flatnonzero(places[source] != places[target])
    }
    return (tuple(sorted(differing)), 2 * len(differing)) if differing else _all(grid)


def _all(grid: Grid) -> tuple[tuple[int, ...], int]:
    axes = tuple(range(len(grid.rings)))
    return axes, 2 * len(axes)


def seconds_at_best(link_bytes: dict[tuple[int, ...], float], link_rate: float) -> float:
    """How long transfers take that share the links of a grid, if all of them go on at once.

    Those that have only the links of some axes need these for all of their bytes, whatever else goes over others.

    Args:
      link_bytes: bytes for each link, by the axes that they may go over.
      link_rate: bytes a second that one link brings.
    """
    axes = sorted({axis for some in link_bytes for axis in some})
    longest = 0.0
    for chosen in range(1, 2 ** len(axes)):
        inside = {axis for place, axis in enumerate(axes) if chosen >> place & 1}
        # A transfer over two of three axes would have a third more links if the third were free.
        needed = sum(
            each * len(some) / len(inside)
            for some, each in link_bytes.items()
            if inside.issuperset(some)
        )
        longest = max(longest, needed)
    return longest / link_rate
