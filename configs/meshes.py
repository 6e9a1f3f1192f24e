"""How a batch is spread over a slice of TPUs: what the end of `configs/motion.py:full@v5e:16x16` sets.

`@v5e:16x16` is a topology as `plan --topology` names it, `@4xv5e:16x16` four such slices. It sets `mesh`, `accumulate`,
`remat` and, where the chips cannot share the config's batch, `data.batch_size`; what is given as `--config.KEY=VALUE`
stays, and a batch that is given is spread as it is.

The paper's batches are 28 sources x 4 targets, 12 x 4, and 8 clips x 24 frames; slices have powers of two of chips:

- on up to 16 chips they are shared as they are, by taking parts of a batch one after the other;
- on more, the batch is rounded up to what the chips can share: 32 sources, 16, and 8 clips. That is said;
- with more chips than pictures (of a clip: than eighths), the batch does not grow further, up to eight times as many,
  because it is no longer the paper's then. The chips go to `tensor`, which shares attention heads and feed-forward
  widths alone; the plan says how much is done more than once (`executed_overhead`). Who wants more pictures a step
  gives a larger batch: with `--config.data.batch_size=64` each of 256 chips has one picture of 64 x 4.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Collection, Iterator

from ml_collections import ConfigDict

from dexportrait_jax import chips
from dexportrait_jax.errors import UserError

MOST_FSDP = 16  # more parts of the weights save little memory and make every gathering longer
MOST_TENSOR = 8  # attention heads of SD1.5

# By the memory of a chip in GiB: pictures that it may have at once, and what the backward pass keeps of the UNets.
# Estimates, made before any of `full` was compiled; `python -m tests.benchmarks pods --parts=plans` says whether they
# hold.
_ROOM = {
    "motion": {16: (4, "none"), 32: (8, "none"), 96: (28, "none")},
    "autoencoder": {16: (1, "none"), 32: (2, "none"), 96: (8, "none")},
    "animator_image": {16: (4, "products"), 32: (8, "products"), 96: (16, "none")},
    "animator_video": {16: (6, "blocks"), 32: (12, "products"), 96: (24, "products")},
}


@dataclasses.dataclass(frozen=True)
class Spread:
    """One way to share a batch.

    Attributes:
      parts: data x fsdp; each has its own sources.
      context: devices that share the targets of a source.
      tensor: devices that share heads and widths, and do everything else alike.
      accumulate: parts of the batch taken one after the other.
      sources: of the batch.
      at_once: pictures that a device has at a time.
    """

    parts: int
    context: int
    tensor: int
    accumulate: int
    sources: int
    at_once: int


def address(text: str) -> tuple[str, int]:
    """("v5e:16x16", 4) of "4xv5e:16x16".

    Raises:
      UserError: no such chip or grid.
    """
    found = re.fullmatch(r"(?:([1-9]\d*)x)?(.*)", text)
    chips.grid(found[2])
    return found[2], int(found[1] or 1)


def set_mesh(config: ConfigDict, where: str, given: Collection[str] = ()) -> None:
    """Sets in place what spreads the config's batch over `where`; dotted keys in `given` stay as they are.

    Raises:
      UserError: no such topology, or a given batch that it cannot share.
    """
    # Imported here: it brings all that reads data, and every config's address is read with this module.
    from data_pipelines.loading import targets_of_a_source

    topology, slices = address(where)
    kind, devices = chips.grid(topology)
    room = _ROOM.get(config.stage)
    if room is None:
        raise UserError(
            f"@{where}: no mesh is known for the stage {config.stage!r}; give --config.mesh.*"
        )
    memory = min(room, key=lambda gib: abs(gib - chips.CHIPS[kind].hbm_gib))
    pictures, remat = room[memory]
    sources, total = config.data.batch_size, devices * slices
    share = functools.partial(
        spread, sources, targets_of_a_source(config.data), total, pictures, slices
    )
    found = share(exact="data.batch_size" in given)
    if found is None:
        larger = share()
        raise UserError(
            f"@{where}: config.data.batch_size={sources} cannot be shared by {total} devices"
            + (f"; choose {larger.sources}" if larger else "")
        )
    fsdp = math.gcd(found.parts // slices, MOST_FSDP)
    values = {
        "mesh.data": found.parts // fsdp,
        "mesh.fsdp": fsdp,
        "mesh.context": found.context,
        "mesh.tensor": found.tensor,
        "accumulate": found.accumulate,
        "remat": remat,
        "data.batch_size": found.sources,
    }
    for key, value in values.items():
        *group, name = key.split(".")
        node = config[group[0]] if group else config
        if key not in given and name in node:
            node[name] = value


def spread(
    sources: int, targets: int, devices: int, at_once: int, slices: int = 1, exact: bool = False
) -> Spread | None:
    """The best way to share `sources` x `targets` pictures; None where there is none.

    The least work comes first: what a larger batch adds and what is done alike by several. Of equals, the smaller
    batch, and then the fewest parts of which a device can hold `at_once` pictures.

    Args:
      exact: no larger batch.
    """
    found = [
        one
        for one in _ways(sources, targets, devices)
        if one.parts % slices == 0 and not (exact and one.sources != sources)
    ]
    return min(
        found,
        key=lambda one: (
            one.sources * one.tensor,
            one.sources,
            max(one.at_once, at_once),
            one.accumulate,
            one.context,
        ),
        default=None,
    )


def _ways(sources: int, targets: int, devices: int) -> Iterator[Spread]:
    for parts in _divisors(devices):
        for context in _divisors(math.gcd(targets, devices // parts)):
            tensor = devices // parts // context
            each = -(-sources // parts)
            # Targets are shared of one source at a time.
            for accumulate in _divisors(each) if context == 1 else [each]:
                if tensor <= MOST_TENSOR:
                    held = each // accumulate * targets // context
                    yield Spread(parts, context, tensor, accumulate, each * parts, held)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
