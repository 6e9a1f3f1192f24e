"""Sharded equals unsharded: two steps over eight devices against the same two on one, in float32."""

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
from dexportrait_jax.train import check_shares
from tests.stages import leaves, micro


def axes_of(tree):
    """The mesh axes over which some leaf lies."""
    specs = (leaf.sharding.spec for leaf in jax.tree.leaves(tree))
    parts = [part for spec in specs for part in spec if part]
    return {axis for part in parts for axis in ((part,) if isinstance(part, str) else part)}


# Two heads, for tensor to share. What each mesh has to cut of the weights stands behind it.
TWO = {"model__unet__heads": 2}
CASES = [
    ("autoencoder", (2, 2, 2, 1), {"data__targets": 2}, {"fsdp", "context"}),
    ("motion", (1, 2, 2, 2), {}, {"fsdp", "context"}),
    ("animator_image", (2, 2, 2, 1), TWO, {"fsdp", "context"}),
    ("animator_image", (2, 2, 1, 2), TWO, {"fsdp", "tensor"}),
    ("animator_image", (1, 2, 2, 2), TWO | {"accumulate": 2}, {"fsdp", "context", "tensor"}),
    ("animator_video", (2, 2, 2, 1), TWO, {"fsdp", "context"}),
    ("animator_video", (2, 2, 1, 2), TWO, {"fsdp", "tensor"}),
]


@pytest.fixture(scope="module")
def on_one_device():
    """What one device makes of a stage's batch, which is the same beside every mesh that has as many sources."""
    return {}


@pytest.mark.parametrize(
    ("stage", "sizes", "changes", "cut"),
    [
        pytest.param(*case, marks=() if case[0] == "autoencoder" else pytest.mark.slow)
        for case in CASES
    ],
)
@pytest.mark.timeout(1800)
def test_sharded_equals_one_device(stage, sizes, changes, cut, places, monkeypatch, on_one_device):
    # So narrow here that little would be spread.
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 2**9)
    mesh = dict(zip(sharding.AXES, sizes, strict=True))
    # One each at a time, so that their targets can be shared.
    sources = mesh["data"] * mesh["fsdp"] * changes.get("accumulate", 1)
    config = micro(stage, *places, data__batch_size=sources, **changes)

    def two_steps(sizes, devices):
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
        _, start, state, metrics = two_steps(dict.fromkeys(mesh, 1), jax.devices()[:1])
        on_one_device[alike] = start, leaves(state["params"]), metrics
    start, one, one_metrics = on_one_device[alike]
    task, _, sharded, many_metrics = two_steps(mesh, jax.devices())
    many = leaves(sharded["params"])
    assert axes_of(sharded["params"]) == cut
    if "tensor" in cut:
        trained = {group: sharded["params"][group] for group in task.phases[0].groups}
        assert "tensor" in axes_of(trained)
    # Relative to how far each group moved. Plain descent moves in proportion to the gradient; Adam's first steps
    # have the size of the learning rate even where the gradient is nothing but rounding.
    for group in {name.split("']")[0] for name in one}:
        names = [name for name in one if name.startswith(group + "']")]
        moved = np.sqrt(sum(np.sum((one[name] - start[name]) ** 2) for name in names))
        apart = np.sqrt(sum(np.sum((many[name] - one[name]) ** 2) for name in names))
        assert apart <= 5e-3 * moved, (group, apart, moved)
    for name, value in one_metrics.items():
        np.testing.assert_allclose(many_metrics[name], value, rtol=5e-3, atol=1e-4, err_msg=name)
