"""Where the weights of the `full` configs go on slices, as it was: `python -m tests.golden.make_shardings`."""

import json
import re

import jax
import numpy as np
import pytest

from dexportrait_jax import sharding
from dexportrait_jax.state import parameter_count
from tests.golden import make_shardings as golden


@pytest.fixture(scope="module", params=golden.STAGES)
def stage_and_state(request):
    return request.param, golden.state_of(request.param)


def test_weights_lie_where_they_lay(stage_and_state):
    stage, state = stage_and_state
    found = golden.shardings(stage, state)
    kept = json.loads((golden.FOLDER / f"{stage}.json").read_text())
    assert found.keys() == kept.keys() and found["meshes"] == kept["meshes"]
    for part in ("cut", "cut_in_use"):
        moved = {
            name
            for name in found[part].keys() | kept[part].keys()
            if found[part].get(name) != kept[part].get(name)
        }
        assert not moved, f"{part}: {len(moved)} weights moved, such as {sorted(moved)[0]}"
        assert found[f"not_{part}"] == kept[f"not_{part}"]


def test_in_use_no_weight_lies_over_context(stage_and_state):
    """And those of small networks not over fsdp either: they are gathered once, at the start of a step."""
    stage, state = stage_and_state
    large = {
        name
        for name, tree in state["params"].items()
        if parameter_count(tree) > sharding.LARGEST_WHOLE
    }
    for where in golden.SLICES:
        mesh = golden.mesh_of(stage, where)
        stored = golden.placed(state["params"], mesh)
        for name, spec in golden.placed_in_use(state["params"], mesh).items():
            away = {"context"} if name.partition("/")[0] in large else {"context", "fsdp"}
            assert axes_of(spec) == axes_of(stored[name]) - away, (where, name)


def axes_of(spec):
    return set(re.findall(r"[a-z]+", spec))


def test_averages_and_optimizer_follow_their_weights(stage_and_state):
    stage, state = stage_and_state
    mesh = golden.mesh_of(stage, "v5e:16x16")
    weights = golden.placed(state["params"], mesh)
    averages = golden.placed(state["ema"], mesh)
    assert averages and all(weights[name] == spec for name, spec in averages.items())
    followed = 0
    for name, spec in golden.placed(state["opt"], mesh).items():
        for moment in ("/mu/", "/nu/"):
            if moment in name:
                assert weights[name.split(moment)[1]] == spec, name
                followed += 1
    assert followed > len(averages)


def test_devices_hold_a_part_of_the_state(stage_and_state):
    """Nearly nothing of it is left whole on every device."""
    stage, state = stage_and_state
    bytes_of = np.array([leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)])
    for where in golden.SLICES:
        mesh = golden.mesh_of(stage, where)
        parts = [
            np.prod([mesh.shape[axis] for axis in re.findall(r"[a-z]+", spec)])
            for spec in golden.placed(state, mesh).values()
        ]
        share = mesh.shape["fsdp"] * mesh.shape["context"]
        assert np.sum(bytes_of / parts) < 1.25 * np.sum(bytes_of) / share, where
