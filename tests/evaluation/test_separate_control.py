"""The share of a driver that a result has taken on, on pictures made for it."""

import numpy as np
import pytest

from dexportrait_jax.evaluation.separate_control import Shares


def flat(value: int, frames: int = 1) -> np.ndarray:
    return np.full((frames, 4, 4, 3), value, np.uint8)


def test_where_between_the_two():
    shares = Shares()
    for name, made in (("stays", 20), ("follows", 120), ("between", 70), ("opposite", 0)):
        shares.add(name, flat(made), flat(20), flat(120))
    expected = {"stays": 0, "follows": 1, "between": 0.5, "opposite": -0.2}
    assert shares.values() == pytest.approx(expected)


def test_only_the_mask_counts_and_large_differences_weigh_more():
    shares = Shares()
    made = flat(20)
    made[:, :2] = 120
    mask = np.zeros((1, 4, 4), np.uint8)
    mask[:, 0] = 1
    shares.add("masked", made, flat(20), flat(120), mask)
    assert shares.values()["masked"] == pytest.approx(1)
    # 100 levels followed, 50 not: squares are 4 to 1.
    shares.add("two", flat(120), flat(20), flat(120))
    shares.add("two", flat(20), flat(20), flat(70))
    assert shares.values()["two"] == pytest.approx(0.8)


def test_no_difference_is_no_figure():
    shares = Shares()
    shares.add("equal", flat(50), flat(20), flat(20))
    assert shares.values() == {"equal": None}
