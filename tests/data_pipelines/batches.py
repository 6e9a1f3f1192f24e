"""Batches of a loader for tests, and how two of them are compared."""

import itertools

import numpy as np

from data_pipelines import loading


def take(config, count: int, seed: int = 0, **options) -> list[dict[str, np.ndarray]]:
    """The first `count` batches, copied: the loader uses its memory again."""
    loader = loading.make_loader(config, seed=seed, **options)
    batches = list(itertools.islice(loader, count))
    loader.close()
    return [{name: np.array(value) for name, value in batch.items()} for batch in batches]


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
