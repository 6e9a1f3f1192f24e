"""Sharded equals unsharded: two steps over eight devices against the same two on one, in float32."""

import math
from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from data_pipelines import loading
from dexportrait_jax import sharding
from dexportrait_jax.programs import build, first_state
from dexportrait_jax.state import QUICK
from dexportrait_jax.tasks import make_task
from dexportrait_jax.train_checks import check_shares
from tests.stages import leaves, micro


def axes_of(tree):
    """The mesh axes over which some leaf lies."""
    return _axes(leaf.sharding.spec for leaf in jax.tree.leaves(tree))


def _axes(specs):
    parts = [part for spec in specs for part in spec if part]
    return {axis for part in parts for axis in ((part,) if isinstance(part, str) else part)}


class Case(NamedTuple):
    """A stage on a mesh.

    Attributes:
      sizes: of data, fsdp, context and tensor.
      cut: the axes over which some weight lies.
      changes: of the config, for one device as well.
      spread: of the config, on the mesh alone.
      whole: weights are gathered once a step, as those of small networks are; else they are cut while in use, as
        those of the UNets at `full`.
      mark: when it is tested; each takes minutes, but for one of the autoencoder's.
    """

    stage: str
    sizes: tuple[int, int, int, int]
    cut: set[str]
    changes: dict[str, int] = {}
    spread: dict[str, str] = {}
    whole: bool = True
    mark: str = "slow"


# Two heads, for tensor to share.
TWO = {"model__unet__heads": 2}
BLOCKS = {"remat": "blocks"}
TARGETS = {"data__targets": 2}
EXHAUSTIVE = "exhaustive"
CASES = [
    Case("autoencoder", (2, 2, 2, 1), {"fsdp", "context"}, TARGETS, mark=""),
    Case("autoencoder", (1, 8, 1, 1), {"fsdp"}, TARGETS, whole=False),
    Case("motion", (1, 2, 2, 2), {"fsdp", "context"}),
    Case("motion", (1, 2, 2, 1), {"fsdp", "context"}, whole=False, mark=EXHAUSTIVE),
    Case(
        "animator_image",
        (2, 2, 2, 1),
        {"fsdp", "context"},
        TWO,
        BLOCKS,
        whole=False,
        mark=EXHAUSTIVE,
    ),
    Case(
        "animator_image",
        (1, 2, 2, 2),
        {"fsdp", "context", "tensor"},
        TWO | {"accumulate": 2},
        whole=False,
        mark=EXHAUSTIVE,
    ),
    Case("animator_video", (2, 2, 2, 1), {"fsdp", "context"}, TWO, BLOCKS, whole=False),
    Case("animator_video", (2, 2, 1, 2), {"fsdp", "tensor"}, TWO, mark=EXHAUSTIVE),
]


@pytest.fixture(scope="module")
def on_one_device():
    """What one device makes of a stage's batch, which is the same beside every mesh that has as many sources."""
    return {}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            marks=getattr(pytest.mark, case.mark) if case.mark else (),
            id="-".join([case.stage, *map(str, case.sizes), "whole" if case.whole else "cut"]),
        )
        for case in CASES
    ],
)
@pytest.mark.timeout(1800)
def test_sharded_equals_one_device(case, places, monkeypatch, on_one_device):
    # So narrow here that little would be spread.
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 2**9)
    monkeypatch.setattr(sharding, "LARGEST_WHOLE", 2**27 if case.whole else 0)
    stage, sizes, changes = case.stage, case.sizes, case.changes
    mesh = dict(zip(sharding.AXES, sizes, strict=True))
    # One each at a time, so that their targets can be shared.
    sources = mesh["data"] * mesh["fsdp"] * changes.get("accumulate", 1)

    def two_steps(sizes, **spread):
        config = micro(stage, *places, data__batch_size=sources, **changes, **spread)
        devices = jax.devices()[: math.prod(sizes.values())]
        placed = sharding.make_mesh(ConfigDict(sizes), devices)
        check_shares(config, placed)
        task = make_task(config)
        descent = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.01))
        task.phases = tuple(phase._replace(tx=descent) for phase in task.phases)
        _, shardings, step = build(task, config, placed)
        state = first_state(task, config, shardings)
        start = leaves(state["params"])
        constants = jax.device_put(task.constants(), sharding.replicated(placed))
        loader = loading.make_loader(config.data, seed=0, step=0)
        programs = {}
        with jax.set_mesh(placed):
            for number, batch in zip(range(2), loader, strict=False):
                batch = sharding.put_batch(batch, placed, sources, range(sources))
                events = task.events(number + 1)
                if events not in programs:
                    lowered = step.lower(state, batch, constants, events)
                    programs[events] = lowered.compile(compiler_options=QUICK)
                state, metrics = programs[events](state, batch, constants)
        loader.close()
        return task, start, state, leaves(metrics)

    alike = repr((stage, sources, sorted(changes.items())))
    if alike not in on_one_device:
        _, start, state, metrics = two_steps(dict.fromkeys(mesh, 1))
        on_one_device[alike] = start, leaves(state["params"] | _averages(state)), metrics
    start, one, one_metrics = on_one_device[alike]
    task, _, sharded, many_metrics = two_steps(mesh, **case.spread)
    many = leaves(sharded["params"] | _averages(sharded))
    assert axes_of(sharded["params"]) == case.cut
    trained = {group: sharded["params"][group] for group in task.phases[0].groups}
    if "tensor" in case.cut:
        assert "tensor" in axes_of(trained)
    in_use = sharding.shardings_in_use(
        trained, sharding.make_mesh(ConfigDict(mesh), jax.devices()[: math.prod(sizes)])
    )
    assert ("fsdp" in _axes(place.spec for place in jax.tree.leaves(in_use))) == (not case.whole)
    # Relative to how far each group moved. Plain descent moves in proportion to the gradient; Adam's first steps
    # have the size of the learning rate even where the gradient is nothing but rounding.
    for group in {name.split("']")[0] for name in one}:
        names = [name for name in one if name.startswith(group + "']")]
        moved = {name: np.linalg.norm(one[name] - start[_weight(name)]) for name in names}
        apart = {name: np.linalg.norm(many[name] - one[name]) for name in names}
        together = np.linalg.norm(list(moved.values()))
        assert np.linalg.norm(list(apart.values())) <= 5e-3 * together, group
        for name in names:
            # A leaf that hardly moved is known to the rounding of those beside it.
            assert apart[name] <= 2e-2 * moved[name] + 1e-3 * together, (name, apart[name])
    for name, value in one_metrics.items():
        np.testing.assert_allclose(many_metrics[name], value, rtol=5e-3, atol=1e-4, err_msg=name)


def _averages(state):
    return {f"ema of {group}": tree for group, tree in state["ema"].items()}


def _weight(name):
    return name.replace("['ema of ", "['")
