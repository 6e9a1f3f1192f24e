"""The step on a problem small enough to work out by hand: two scalars playing against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dexportrait_jax import sharding
from dexportrait_jax.step import Outputs, Phase, init_optimizers, make_step

RATE = 0.1


def push(params, batch, key, step, shared, events):
    """generator: (g - mean x)^2, d stays."""
    made = params["g"]["w"] * jnp.ones_like(batch["x"])
    return jnp.mean((made - batch["x"]) ** 2), Outputs({"made": jnp.mean(made)}, {"made": made})


def pull(params, batch, key, step, shared, events):
    """discriminator: (d - what the generator made)^2."""
    return jnp.mean((params["d"]["w"] - shared["made"]) ** 2), Outputs({}, {})


def new_state(phases, ema=()):
    params = {
        "g": {"w": jnp.float32(1.0)},
        "d": {"w": jnp.float32(0.0)},
        "frozen": {"w": jnp.float32(7.0)},
    }
    return {
        "step": jnp.int32(0),
        "params": params,
        "opt": init_optimizers(phases, params),
        "ema": {group: params[group] for group in ema},
    }


def two_phases(**second):
    return (
        Phase("generator", ("g",), push, optax.sgd(RATE)),
        Phase("discriminator", ("d",), pull, optax.sgd(RATE), **second),
    )


BATCH = {"x": jnp.array([2.0, 4.0])}


def test_two_phases_by_hand():
    phases = two_phases()
    step = jax.jit(make_step(phases, seed=0, ema_decay=0.5))
    state, metrics = step(new_state(phases, ("g",)), BATCH, {})
    # d/dg mean((g-x)^2) at g=1, mean x=3: 2*(1-3) = -4; g = 1 + .1*4 = 1.4
    assert state["params"]["g"]["w"] == pytest.approx(1.4)
    # The discriminator sees what the generator made before its update: 2*(0-1) = -2; d = .2
    assert state["params"]["d"]["w"] == pytest.approx(0.2)
    assert state["params"]["frozen"]["w"] == 7.0
    assert set(state["opt"]) == {"generator", "discriminator"}
    assert metrics["generator/loss"] == pytest.approx((1 + 9) / 2)
    assert metrics["generator/gradient_norm"] == pytest.approx(4.0)
    # The average warms up: decay min(.5, 1/10) in the first step, so .1*1 + .9*1.4
    assert state["ema"]["g"]["w"] == pytest.approx(0.1 * 1.0 + 0.9 * 1.4)


def test_a_phase_runs_when_its_event_is_on():
    phases = two_phases(when="adversarial")
    step = jax.jit(make_step(phases, seed=0, ema_decay=0.5), static_argnums=3)
    state, moved = new_state(phases), []
    for number in range(6):
        before = state["params"]["d"]["w"]
        events = frozenset({"adversarial"} if number >= 3 and number % 2 else ())
        state, metrics = step(state, BATCH, {}, events)
        moved.append(bool(state["params"]["d"]["w"] != before))
        assert ("discriminator/loss" in metrics) == moved[-1]
    assert moved == [False, False, False, True, False, True]


def test_non_finite_step_changes_nothing_but_the_count():
    phases = two_phases()
    step = jax.jit(make_step(phases, seed=0, ema_decay=0.5))
    state, _ = step(new_state(phases), BATCH, {})
    bad = {"x": jnp.array([2.0, jnp.nan])}
    after, _ = step(state, bad, {})
    assert after["params"]["g"]["w"] == state["params"]["g"]["w"]
    assert after["opt"]["generator"]["skipped"] == 1
    assert after["opt"]["generator"]["skipped_in_a_row"] == 1
    # The other phase was sound and went on.
    assert after["params"]["d"]["w"] != state["params"]["d"]["w"]
    good, _ = step(after, BATCH, {})
    assert good["opt"]["generator"]["skipped"] == 1
    assert good["opt"]["generator"]["skipped_in_a_row"] == 0


def test_an_infinite_loss_with_a_finite_gradient_changes_nothing():
    """w + mean(x): its gradient is 1, whatever x is."""

    def shifted(params, batch, key, step, shared, events):
        return params["g"]["w"] + jnp.mean(batch["x"]), Outputs({}, {})

    phases = (Phase("generator", ("g",), shifted, optax.sgd(RATE)),)
    step = jax.jit(make_step(phases, seed=0, ema_decay=0.5))
    after, metrics = step(new_state(phases), {"x": jnp.array([2.0, jnp.inf])}, {})
    assert metrics["generator/gradient_norm"] == 1 and metrics["generator/loss"] == jnp.inf
    assert after["params"]["g"]["w"] == 1.0 and after["opt"]["generator"]["skipped"] == 1


def roots(params, batch, key, step, shared, events):
    """Mean of sqrt(w - x): where an x is its weight, the loss is finite and the gradient is not."""
    return jnp.mean(jnp.sqrt(params["g"]["w"] - batch["x"])), Outputs({}, {})


def spread_over_eight_devices(state, batch):
    """A quarter of the weights and an eighth of the batch on each, as a pod has them."""
    mesh = sharding.make_mesh(ConfigDict({"data": 2, "fsdp": 4, "context": 1, "tensor": 1}))

    def place(leaf):
        spec = PartitionSpec("fsdp") if leaf.shape == (8,) else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(place, state), jax.device_put(batch, sharding.batch_shardings(batch, mesh))


@pytest.mark.parametrize(
    ("poison", "accumulate", "spread"),
    [("loss", 1, False), ("loss", 4, False), ("gradient", 1, False), ("gradient", 4, True)],
)
def test_a_poisoned_step_leaves_moments_and_counts_as_they_were(poison, accumulate, spread):
    """One number of the batch is bad: in one part of it, for one weight, on one device."""
    tx = optax.adam(optax.linear_schedule(RATE, 0.0, 100))
    phases = (Phase("descend", ("g",), roots, tx),)
    step = jax.jit(make_step(phases, seed=0, ema_decay=0.9, accumulate=accumulate))
    params = {"g": {"w": jnp.arange(8.0)}}
    state = {"step": jnp.int32(0), "params": params, "ema": params}
    state["opt"] = init_optimizers(phases, params)
    batch = {"x": -1.0 - jax.random.uniform(jax.random.key(0), (32, 8))}
    if spread:
        state, batch = spread_over_eight_devices(state, batch)
        parts = state["params"]["g"]["w"].sharding.devices_indices_map((8,)).values()
        assert len({str(part) for part in parts}) == 4
    before, _ = step(state, batch, {})
    bad = {"loss": jnp.nan, "gradient": before["params"]["g"]["w"][5]}[poison]
    after, metrics = step(before, {"x": batch["x"].at[14, 5].set(bad)}, {})
    assert bool(jnp.isfinite(metrics["descend/loss"])) == (poison == "gradient")
    assert not jnp.isfinite(metrics["descend/gradient_norm"])

    kept = [(each["params"], each["opt"]["descend"]["tx"]) for each in (before, after)]
    names = {sharding.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(kept[0])}
    assert {"0/g/w", "1/0/mu/g/w", "1/0/nu/g/w", "1/0/count", "1/1/count"} == names
    jax.tree.map(np.testing.assert_array_equal, *kept)
    assert np.all(before["opt"]["descend"]["tx"][0].mu["g"]["w"] != 0)
    assert after["opt"]["descend"]["skipped"] == after["opt"]["descend"]["skipped_in_a_row"] == 1
    # Decay of the second step: (1 + 1) / (10 + 1).
    old, weights = before["ema"]["g"]["w"], before["params"]["g"]["w"]
    np.testing.assert_allclose(
        after["ema"]["g"]["w"], 2 / 11 * old + 9 / 11 * weights, rtol=1e-6, atol=1e-6
    )
    good, _ = step(after, batch, {})
    assert good["opt"]["descend"]["tx"][0].count == 2
    moved = good["params"]["g"]["w"] - weights
    assert np.all(np.isfinite(moved)) and np.all(moved != 0)


def test_accumulation_equals_the_whole_batch():
    phases = (Phase("generator", ("g",), push, optax.adam(RATE)),)
    batch = {"x": jnp.arange(8.0)}
    results = []
    for parts in (1, 4):
        step = jax.jit(make_step(phases, seed=0, ema_decay=0.5, accumulate=parts))
        state = new_state(phases)
        for _ in range(3):
            state, metrics = step(state, batch, {})
        told = (metrics[f"generator/{name}"] for name in ("loss", "gradient_norm", "made"))
        results.append((state["params"]["g"]["w"], *told))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_hands_each_part_to_the_phase_after(parts):
    def make(params, batch, key, step, shared, events):
        made = params["g"]["w"] * batch["x"]
        return jnp.mean((made - 1.0) ** 2), Outputs({}, {"made": made})

    def judge(params, batch, key, step, shared, events):
        return jnp.mean((params["d"]["w"] * batch["x"] - shared["made"]) ** 2), Outputs({}, {})

    phases = (
        Phase("generator", ("g",), make, optax.sgd(1e-2)),
        Phase("discriminator", ("d",), judge, optax.sgd(1e-2)),
    )
    results = []
    for accumulate in (1, parts):
        step = jax.jit(make_step(phases, seed=0, ema_decay=0.5, accumulate=accumulate))
        state = new_state(phases)
        for _ in range(3):
            state, metrics = step(state, {"x": jnp.arange(8.0)}, {})
        params = state["params"]
        results.append((params["g"]["w"], params["d"]["w"], metrics["discriminator/loss"]))
    assert results[0][1] != 0
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5)


def test_randomness_is_a_function_of_seed_and_step():
    def noisy(params, batch, key, step, shared, events):
        draw = jax.random.normal(key)
        return params["g"]["w"] * draw, Outputs({"draw": draw}, {})

    phases = (Phase("generator", ("g",), noisy, optax.sgd(RATE)),)

    def draws(seed, start, count):
        step = jax.jit(make_step(phases, seed=seed, ema_decay=0.5))
        state = new_state(phases) | {"step": jnp.int32(start)}
        out = []
        for _ in range(count):
            state, metrics = step(state, BATCH, {})
            out.append(float(metrics["generator/draw"]))
        return out

    whole = draws(0, 0, 5)
    assert draws(0, 3, 2) == whole[3:]
    assert len(set(whole)) == 5
    assert draws(1, 0, 5) != whole


def test_every_phase_and_every_part_of_a_batch_draws_its_own():
    """Of parts that all drew the same, the mean of the squares would be the square of the mean."""

    def noisy(params, batch, key, step, shared, events):
        draw = jax.random.normal(key)
        return 0.0 * params["g"]["w"], Outputs({"draw": draw, "square": draw**2}, {})

    phases = tuple(Phase(name, ("g",), noisy, optax.sgd(RATE)) for name in ("one", "two"))
    for parts in (1, 2):
        step = jax.jit(make_step(phases, seed=0, ema_decay=0.5, accumulate=parts))
        _, metrics = step(new_state(phases), BATCH, {})
        assert abs(metrics["one/draw"] - metrics["two/draw"]) > 0.01
        spread = metrics["one/square"] - metrics["one/draw"] ** 2
        assert (abs(spread) > 1e-3) == (parts == 2)


def test_constants_reach_the_loss_and_are_not_trained():
    def with_constant(params, batch, key, step, shared, events):
        return (params["g"]["w"] - params["c"]["w"]) ** 2, Outputs({}, {})

    phases = (Phase("generator", ("g",), with_constant, optax.sgd(RATE)),)
    step = jax.jit(make_step(phases, seed=0, ema_decay=0.5))
    state, _ = step(new_state(phases), BATCH, {"c": {"w": jnp.float32(2.0)}})
    assert state["params"]["g"]["w"] == pytest.approx(1.0 + RATE * 2.0)
    assert "c" not in state["params"]
