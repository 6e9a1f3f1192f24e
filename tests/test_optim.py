"""Optimizers from config: values worked out by hand."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs import common
from dexportrait_jax import sharding
from dexportrait_jax.errors import UserError
from dexportrait_jax.optim import learning_rate_schedule, make_optimizer


def _first_update(config, params, gradients):
    optimizer = make_optimizer(config, num_steps=100)
    update = jax.jit(optimizer.update)
    return jax.device_get(update(gradients, optimizer.init(params), params)[0])


def _tree(shapes: dict[str, tuple[int, ...]], seed: int):
    random = np.random.default_rng(seed)
    leaves = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {"pose": {"head": leaves}}


def test_adam_first_step_is_the_learning_rate_against_the_gradient():
    params = {"pose": {"head": {"kernel": np.ones((2, 1), np.float32)}}}
    gradients = {"pose": {"head": {"kernel": np.array([[0.5], [-3.0]], np.float32)}}}
    config = common.adam(1e-2, warmup_steps=0, clip_norm=0.0)
    update = _first_update(config, params, gradients)
    np.testing.assert_allclose(update["pose"]["head"]["kernel"], [[-0.01], [0.01]], rtol=1e-5)


def test_clipping_by_hand_in_two_steps():
    """Adam alone forgets the size of a single gradient, not which of two was the larger.

    Gradients (6, 8), of norm 10, then (0.3, 0.4), of norm 0.5. Clipped to 1 the first is (0.6, 0.8), the second stays.
    """
    given, b1, b2 = [np.array([6.0, 8.0]), np.array([0.3, 0.4])], 0.5, 0.8

    def second_update(clip_norm):
        config = common.adam(1e-2, b1=b1, b2=b2, warmup_steps=0, clip_norm=clip_norm)
        optimizer = make_optimizer(config, num_steps=100)
        # Two groups: the norm is that of both together.
        trees = [{"pose": {"a": one[0]}, "generator": {"b": one[1]}} for one in given]
        trees = jax.tree.map(np.float32, trees)
        state = optimizer.init(trees[0])
        for tree in trees:
            update, state = optimizer.update(tree, state, trees[0])
        return np.array([update["pose"]["a"], update["generator"]["b"]])

    def expected(first, second):
        mean = (b1 * (1 - b1) * first + (1 - b1) * second) / (1 - b1**2)
        square = (b2 * (1 - b2) * first**2 + (1 - b2) * second**2) / (1 - b2**2)
        return -1e-2 * mean / np.sqrt(square)

    np.testing.assert_allclose(second_update(1.0), expected(given[0] / 10, given[1]), rtol=1e-4)
    np.testing.assert_allclose(second_update(0.0), expected(*given), rtol=1e-4)


@pytest.mark.parametrize("shape", [(40, 12), (3, 3, 5, 16)])
def test_muon_moves_a_kernel_along_the_nearest_orthogonal_matrix(shape):
    params, gradients = _tree({"kernel": shape}, 0), _tree({"kernel": shape}, 1)
    config = common.adam(1e-2, name="muon", matrix_rms=0.5, warmup_steps=0, clip_norm=0.0)
    update = _first_update(config, params, gradients)["pose"]["head"]["kernel"]
    assert update.shape == shape
    matrix = update.reshape(-1, shape[-1])
    left, _, right = np.linalg.svd(
        gradients["pose"]["head"]["kernel"].reshape(matrix.shape), full_matrices=False
    )
    # In the gradient's own singular vectors the update is diagonal, and minus the same size for all of them:
    # rate * rms * sqrt(larger side). Five steps of Newton-Schulz with Muon's coefficients leave 0.7 .. 1.2.
    diagonal = -(left.T @ matrix @ right.T) / (1e-2 * 0.5 * max(matrix.shape) ** 0.5)
    assert np.all((np.diag(diagonal) > 0.65) & (np.diag(diagonal) < 1.25)), np.diag(diagonal)
    assert np.abs(diagonal - np.diag(np.diag(diagonal))).max() < 1e-3
    rms = np.sqrt(np.mean(matrix**2))
    # An orthogonal matrix has rms 1 / sqrt(larger side).
    assert 0.65 < rms / (1e-2 * 0.5) < 1.25


def test_muon_leaves_biases_and_depthwise_kernels_to_adam():
    shapes = {"bias": (7,), "kernel": (7, 7, 1, 6), "matrices": (4, 3, 3)}
    params, gradients = _tree(shapes, 0), _tree(shapes, 1)
    config = common.adam(1e-2, name="muon", b1=0.9, warmup_steps=0, clip_norm=0.0)
    update = _first_update(config, params, gradients)["pose"]["head"]
    # First step of Adam with Nesterov's momentum: 1 + b1 / (1 + b1) times the learning rate.
    for name in shapes:
        wanted = -1e-2 * (1 + 0.9 / 1.9) * np.sign(gradients["pose"]["head"][name])
        np.testing.assert_allclose(update[name], wanted, rtol=1e-3)


def test_multipliers_schedule_and_decay_hold_for_muon_too():
    shapes = {"kernel": (6, 4)}
    params, gradients = _tree(shapes, 0), _tree(shapes, 1)
    plain = common.adam(1e-2, name="muon", warmup_steps=0, clip_norm=0.0)
    base = _first_update(plain, params, gradients)["pose"]["head"]["kernel"]
    slow = common.adam(
        1e-2, name="muon", warmup_steps=4, clip_norm=0.0, multipliers=(("pose", 0.5),)
    )
    slowed = _first_update(slow, params, gradients)["pose"]["head"]["kernel"]
    np.testing.assert_allclose(slowed, base / 8, rtol=1e-5)
    decaying = common.adam(1e-2, name="muon", warmup_steps=0, clip_norm=0.0, weight_decay=0.1)
    decayed = _first_update(decaying, params, gradients)["pose"]["head"]["kernel"]
    kernel = params["pose"]["head"]["kernel"]
    np.testing.assert_allclose(decayed, base - 1e-2 * 0.1 * kernel, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
def test_three_updates_of_sharded_weights_are_those_of_whole_ones(name):
    """And all that the optimizer keeps of them; gradients are clipped by their norm over all parts."""
    shapes = {"kernel": (64, 128), "bias": (128,)}
    start = _tree(shapes, 0)
    # Of the size of 1: at Adam's eps the sign of a number that is nothing but rounding would be an update of its own.
    gradients = [
        jax.tree.map(lambda leaf: leaf + np.sign(leaf), _tree(shapes, n)) for n in (1, 2, 3)
    ]
    decay = 0.0 if name == "adam" else 0.1
    config = common.adam(1e-2, name=name, weight_decay=decay, warmup_steps=2, clip_norm=1.0)
    optimizer = make_optimizer(config, num_steps=100)

    def three(init, update, params, place):
        state = init(params)
        for given in gradients:
            updates, state = update(place(given), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    whole = jax.device_get(
        three(optimizer.init, jax.jit(optimizer.update), start, lambda tree: tree)
    )
    mesh = sharding.make_mesh(ConfigDict({"data": 1, "fsdp": 4, "context": 1, "tensor": 2}))
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh):
        patch.setattr(sharding, "SMALLEST_SHARDED", 2**9)
        places = sharding.state_shardings(start, mesh)
        state_places = sharding.state_shardings(jax.eval_shape(optimizer.init, start), mesh)
        init = jax.jit(optimizer.init, out_shardings=state_places)
        update = jax.jit(optimizer.update, out_shardings=(places, state_places))
        spread = three(
            init, update, jax.device_put(start, places), lambda tree: jax.device_put(tree, places)
        )
    cut = [leaf for leaf in jax.tree.leaves(spread) if leaf.shape == (64, 128)]
    assert len(cut) > 1 and all(not leaf.sharding.is_fully_replicated for leaf in cut)
    for found, wanted in zip(jax.tree.leaves(spread), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("warmup", "decay", "rates"),
    [
        # A tenth at the start, the whole after ten steps; then half a cosine over the hundred that are left.
        (10, "cosine", {0: 1e-3, 5: 5.5e-3, 10: 1e-2, 60: 6e-3, 110: 2e-3, 500: 2e-3}),
        (0, "cosine", {0: 1e-2, 55: 6e-3, 110: 2e-3}),
        (10, "constant", {0: 1e-3, 10: 1e-2, 110: 1e-2}),
    ],
)
def test_learning_rates_by_hand(warmup, decay, rates):
    config = common.adam(1e-2, warmup_steps=warmup, decay=decay, final_fraction=0.2)
    found = learning_rate_schedule(config, num_steps=110)
    assert {step: float(found(step)) for step in rates} == pytest.approx(rates, rel=1e-5)


def test_the_first_multiplier_that_fits_holds():
    """The module's own before the group's, also where that one is smaller; and none is 1."""
    shapes = {"kernel": (2, 3), "bias": (3,)}
    params = {"pose": {"head": _tree(shapes, 0)["pose"]["head"], "body": {"bias": np.ones(3)}}}
    gradients = jax.tree.map(np.ones_like, params)
    pairs = (("pose/head/kernel", 4.0), ("pose/head", 0.5))
    config = common.adam(1e-2, warmup_steps=0, clip_norm=0.0, multipliers=pairs)
    update = _first_update(config, params, gradients)["pose"]
    for found, factor in (
        (update["head"]["kernel"], 4.0),
        (update["head"]["bias"], 0.5),
        (update["body"]["bias"], 1.0),
    ):
        np.testing.assert_allclose(found, np.full_like(found, -1e-2 * factor), rtol=1e-4)


def test_decayed_weights_are_no_part_of_adam_s_moments():
    """Loshchilov and Hutter: rate times decay times the weight, beside the step of Adam, which is the rate."""
    params = {"pose": {"head": {"kernel": np.array([[2.0], [-4.0]], np.float32)}}}
    gradients = {"pose": {"head": {"kernel": np.array([[0.5], [3.0]], np.float32)}}}
    config = common.adam(1e-2, name="adamw", weight_decay=0.1, warmup_steps=0, clip_norm=0.0)
    update = _first_update(config, params, gradients)["pose"]["head"]["kernel"]
    np.testing.assert_allclose(update, [[-0.01 - 0.002], [-0.01 + 0.004]], rtol=1e-5)


def test_unknown_name_is_one_line():
    with pytest.raises(UserError, match="'adam', 'adamw' or 'muon', not 'sgd'"):
        make_optimizer(common.adam(1e-2, name="sgd"), 10)


def test_a_decay_that_adam_has_not_is_refused():
    with pytest.raises(
        UserError, match=r"decays no weights.*weight_decay is 0\.1; give name=adamw"
    ):
        make_optimizer(common.adam(1e-2, weight_decay=0.1), num_steps=9)


@pytest.mark.parametrize("multipliers", [("pose", 0.1), (("pose",),), ((0.1, "pose"),)])
def test_multipliers_that_are_no_pairs_are_refused(multipliers):
    with pytest.raises(UserError, match="multipliers are pairs such as"):
        make_optimizer(common.adam(1e-2, multipliers=multipliers), num_steps=9)


def test_a_multiplier_of_no_group_is_refused():
    """It would do nothing, in silence; a module may be left out by the config, and its multiplier stays."""
    params = _tree({"kernel": (2, 2)}, 0)
    make_optimizer(common.adam(1e-2, multipliers=(("pose/left_out", 0.1),)), 9).init(params)
    wrong = make_optimizer(common.adam(1e-2, multipliers=(("posse/head", 0.1),)), num_steps=9)
    with pytest.raises(UserError, match="group 'posse', but this phase trains pose; did you mean"):
        wrong.init(params)
