"""Who takes part in a collective, over which links of the grid, and how long transfers take that share them."""

from types import SimpleNamespace

import numpy as np
import pytest

from dexportrait_jax import chips
from dexportrait_jax.collectives import Grid, members, seconds_at_best
from dexportrait_jax.compiled_program import read_program


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("{{0,4,8},{1,5,9}}", [0, 4, 8]),
        ("[2,4]<=[8]", [0, 1, 2, 3]),
        ("[4,4]<=[4,2,2]T(2,1,0), dimensions={1}", [0, 4, 8, 12]),
        ("[8,2]<=[4,2,2]T(0,2,1)", [0, 2]),
        ("mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
        ("mesh['a'=2,'b'=4] {'a'}", [0, 4]),
        ("mesh['a'=2,'b'=4] {'a','b':(1)2}", [0, 2, 4, 6]),
        ("mesh['a'=2,'b'=4] {'b':(2)2}", [0, 1]),
        ("mesh['a'=2,'b'=8], device_ids=([8,2]T(1,0)) {'a'}", [0, 1]),
        ("mesh['a'=2,'b'=8], device_ids=([8,2]T(1,0)) {'b'}", [0, 2, 4, 6, 8, 10, 12, 14]),
        ("mesh['a'=4,'b'=2,'c'=2], device_ids=([4,2,2]T(0,2,1)) {'c'}", [0, 2]),
        ("all of them", None),
    ],
)
def test_members(groups, first):
    assert members(f", replica_groups={groups}, use_global_device_ids=true") == first


def grid_of(*sides, rings):
    """All places, the last coordinate the fastest."""
    return Grid(tuple(tuple(int(x) for x in place) for place in np.ndindex(*sides)), rings)


SQUARE = grid_of(16, 16, rings=(True, True))
OPEN = grid_of(4, 4, rings=(False, False))
# Two devices a chip.
PAIRS = Grid(tuple(place for place in OPEN.places for _ in range(2)), OPEN.rings)


@pytest.mark.parametrize(
    ("grid", "groups", "axes", "links"),
    [
        (SQUARE, "[16,16]<=[256]", (1,), 2),  # a row, which closes
        (SQUARE, "[16,16]<=[16,16]T(1,0)", (0,), 2),
        (SQUARE, "[64,4]<=[256]", (1,), 1),  # four chips side by side: a line
        (
            SQUARE,
            "[64,4]<=[16,4,4]T(0,2,1)",
            (1,),
            2,
        ),  # every fourth of a row: round it all the same
        (SQUARE, "[1,256]<=[256]", (0, 1), 4),
        (SQUARE, "[16,16]<=[4,4,16]T(0,1,2)", (1,), 2),
        (OPEN, "[4,4]<=[16]", (1,), 1),
        (OPEN, "[1,16]<=[16]", (0, 1), 2),  # the chip in the corner has two
        (PAIRS, "[16,2]<=[32]", (0, 1), 4),  # on one chip: its links stand for what is not known
        (PAIRS, "[4,8]<=[32]", (1,), 1),
    ],
)
def test_links(grid, groups, axes, links):
    """A gathering of 1 KiB from each: the bytes that come over each link of the worst placed device."""
    text = f"""ENTRY %main () -> f32[] {{
  %x = f32[256]{{0}} parameter(0)
  %y = f32[256]{{0}} all-gather(%x), replica_groups={groups}, dimensions={{0}}
}}
"""
    program = read_program(text, grid)
    received = 1024 * (len(members(f"replica_groups={groups}")) - 1)
    assert program.collectives["all-gather"].bytes == received
    assert program.link_bytes == {axes: received / links}


def test_sends_have_both_directions_of_their_axis():
    text = """ENTRY %main () -> f32[] {
  %x = f32[256]{0} parameter(0)
  %y = f32[256]{0} collective-permute(%x), source_target_pairs={{0,4},{4,8},{8,12},{1,1}}
  %z = f32[256]{0} collective-permute(%x), source_target_pairs={{0,5}}
}
"""
    assert read_program(text, OPEN).link_bytes == {(0,): 512.0, (0, 1): 256.0}


def test_transfers_that_share_links():
    """Those over one axis go on beside those over the other; those over both take what is left, or wait."""
    assert seconds_at_best({}, 10.0) == 0.0
    assert seconds_at_best({(0,): 100.0, (1,): 40.0}, 10.0) == 10.0
    # 100 a link of both axes beside 40 of one: 240 for two axes' links.
    assert seconds_at_best({(1,): 40.0, (0, 1): 100.0}, 10.0) == 12.0
    assert seconds_at_best({(0,): 300.0, (1,): 40.0, (0, 1): 100.0}, 10.0) == 30.0
    assert seconds_at_best({(0, 1, 2): 50.0}, 10.0) == 5.0


def devices(kind, *sides, cores=1, slices=1):
    return [
        SimpleNamespace(
            device_kind=kind, coords=(*place, 0)[:3], core_on_chip=core, slice_index=one
        )
        for one in range(slices)
        for place in np.ndindex(*sides)
        for core in range(cores)
    ]


@pytest.mark.parametrize(
    ("found", "rings", "slices"),
    [
        (devices("TPU v5 lite", 16, 16), (True, True), 1),
        (devices("TPU v5 lite", 8, 16), (False, True), 1),
        (devices("TPU v6 lite", 4, 4, slices=2), (False, False), 2),
        (devices("TPU v5", 2, 4, 4), (False, False, False), 1),
        (devices("TPU v5", 4, 4, 8), (True, True, True), 1),
        (devices("TPU7x", 4, 4, 4, cores=2), (True, True, True), 1),
    ],
)
def test_rings_of_a_slice(found, rings, slices):
    grid = chips.placement(found)
    assert (grid.rings, grid.slices, len(grid.places)) == (rings, slices, len(found))
    assert len(grid.places[0]) == len(rings)


def test_devices_without_a_place():
    assert chips.placement([SimpleNamespace(device_kind="cpu")]) is None
