"""TPUs that need not be there: what a chip can do at best, and the devices of a topology that libtpu compiles for.

Figures are Google's, per chip, from https://docs.cloud.google.com/tpu/docs/, the page of each kind (v4, v5e, v5p, v6e,
tpu7x), read on 2026-11-24. The memory that programs may use is what libtpu 0.0.42.1 says when they ask for more.
Not seen there and to be checked: what v4's links carry, the network between slices of v6e and tpu7x, and which sides
close to rings (`placement`), of which the page of v5p says that its slices are tori from 4x4x4 on.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from collections.abc import Sequence
from typing import Any

from dexportrait_jax.collectives import Grid
from dexportrait_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip, as JAX sees it: figures are of one device.

    Attributes:
      flops: multiply-adds times two, a second, in bfloat16.
      hbm_gib: memory that a program may use.
      hbm_bytes: a second, to and from that memory.
      ici_bytes: a second that one device can receive from others of its slice, over all its links, two along every
        dimension; half of what the pages call bidirectional.
      dcn_bytes: a second that one device's share of its host's network cards receives from other slices; None where
        the pages do not say.
      dimensions: of the topology's grid.
      options: what libtpu has to be told beside the grid.
      devices: that JAX sees of one chip.
    """

    flops: float
    hbm_gib: float
    hbm_bytes: float
    ici_bytes: float
    dcn_bytes: float | None
    dimensions: int
    options: tuple[tuple[str, str], ...] = ()
    devices: int = 1

    @property
    def link_bytes(self) -> float:
        """A second that one device can receive over one of its links."""
        return self.ici_bytes / (2 * self.dimensions)


CHIPS = {
    "v4": Chip(275e12, 30.75, 1.2e12, 300e9, None, 3, (("chip_config_name", "megacore"),)),
    "v5e": Chip(197e12, 15.75, 819e9, 200e9, 25e9 / 8, 2),
    "v5p": Chip(459e12, 95.74, 2765e9, 600e9, 50e9 / 8, 3),
    "v6e": Chip(918e12, 31.25, 1638e9, 400e9, 100e9 / 8, 2),
    # Two devices a chip, each with half of it.
    "tpu7x": Chip(2307e12 / 2, 94.75, 7380e9 / 2, 600e9 / 2, 100e9 / 8 / 2, 3, devices=2),
}


# What JAX calls a device of each kind: seen on topologies of libtpu 0.0.42.1, and the longer names in JAX's own list.
DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


def placement(devices: Sequence[Any]) -> Grid | None:
    """Where TPUs are, real ones or those of a topology; None of devices that tell no place, or of a kind not known.

    Sides of 16 close to rings on chips of two dimensions, and all sides of slices of 4x4x4 and its multiples on the
    others.
    """
    kind = DEVICE_KINDS.get(devices[0].device_kind)
    if kind is None or not hasattr(devices[0], "coords"):
        return None
    dimensions = CHIPS[kind].dimensions
    places = tuple(tuple(device.coords[:dimensions]) for device in devices)
    lowest, highest = ([end(axis) for axis in zip(*places, strict=True)] for end in (min, max))
    sides = [1 + high - low for low, high in zip(lowest, highest, strict=True)]
    if dimensions == 2:
        rings = tuple(side == 16 for side in sides)
    else:
        rings = (all(side % 4 == 0 for side in sides),) * dimensions
    return Grid(places, rings, len({getattr(device, "slice_index", None) for device in devices}))


def peak_flops(device_kind: str) -> float | None:
    """FLOPs a second of one device, in bfloat16; None where the kind is not known."""
    kind = DEVICE_KINDS.get(device_kind)
    return CHIPS[kind].flops if kind else None


def grid(name: str) -> tuple[str, int]:
    """The kind of chip that "v5e:4x4" names, and how many devices JAX sees of such a slice: ("v5e", 16).

    Raises:
      UserError: no such chip, or no grid of its dimensions. (Which grids exist, libtpu alone knows.)
    """
    kind, _, sides = name.partition(":")
    if kind not in CHIPS:
        raise UserError(
            f"topology {name}: the kinds of chips are {', '.join(CHIPS)}; write it as v5e:4x4, the kind and the grid"
        )
    chip = CHIPS[kind]
    if not re.fullmatch("x".join([r"[1-9]\d*"] * chip.dimensions), sides):
        example = "4x4" if chip.dimensions == 2 else "2x2x4"
        raise UserError(
            f"topology {name}: a {kind} slice is a grid of {chip.dimensions} sides, as in {kind}:{example}"
        )
    return kind, chip.devices * math.prod(int(side) for side in sides.split("x"))


def topology(name: str, slices: int = 1) -> tuple[Chip, list[Any]]:
    """The kind of chip that "v5e:4x4" names, and its devices, those of the first slice first.

    They can be compiled for and nothing else: they hold no arrays.

    Raises:
      UserError: no such chip or grid, or libtpu is not installed.
    """
    kind, _ = grid(name)
    chip = CHIPS[kind]
    if slices < 1:
        raise UserError(f"--slices={slices} is out of range; it is 1 or more")
    if slices > 1 and chip.dcn_bytes is None:
        raise UserError(
            f"--slices={slices}: how fast {kind} slices reach each other is not published; plan one slice"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "planning compiles for TPUs, which needs libtpu; install it with pip install -e '.[tpu]' -c constraints.txt"
        )
    from jax.experimental import topologies

    options = dict(chip.options) | ({"num_slices": slices} if slices > 1 else {})
    if name.partition(":")[2] in ("1x1", "1x1x1"):
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:  # jaxlib's errors are of many types here
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--topology={name}: libtpu does not know this grid ({reason})") from error
    return chip, list(found.devices)
