"""What processes say of the sources that they share, with processes that are made up."""

import numpy as np
import pytest

from dexportrait_jax import sharding
from dexportrait_jax.shared_sources import SharedSources


@pytest.fixture
def hosts(monkeypatch):
    """Three hosts, of which each two share one of the sources 1 to 3: what they agree on, after these batches."""
    monkeypatch.setattr(sharding, "rows_of_several_processes", lambda mesh, sources: [1, 2, 3])
    made = [SharedSources(None, 4, rows) for rows in ([0, 1, 2], [2, 3], [1, 3])]

    def agree(*batches):
        for host, batch in zip(made, batches, strict=True):
            host.add(batch)
        figures = [host.figures() for host in made]
        return made[1], {
            name: float(max(np.float32(of_one[name]) for of_one in figures)) for name in figures[0]
        }

    return agree


def batch(rows, step=0, other=None):
    """Every row in many bytes, with one of them another at the source `other`."""
    rng = np.random.default_rng(step)
    whole = {
        "target_image": rng.integers(0, 256, (4, 2, 64, 64, 3), np.uint8),
        "source_head_pose": rng.normal(size=(4, 3, 4)).astype(np.float32),
    }
    if other is not None:
        whole["source_head_pose"][other, 2, 1] += 0.01
    return {name: value[rows] for name, value in whole.items()}


def test_the_same_sources_are_the_same_whoever_brings_them(hosts):
    for step in range(3):
        asking, known = hosts(batch([0, 1, 2], step, 0), batch([2, 3], step), batch([1, 3], step))
        known["late"] = 1.0
        assert asking.apart(known, step, list) == ""
        assert known == {"late": 1.0}


def test_once_apart_they_stay_so(hosts):
    hosts(batch([0, 1, 2]), batch([2, 3]), batch([1, 3], other=3))
    asking, known = hosts(batch([0, 1, 2], 1), batch([2, 3], 1), batch([1, 3], 1))
    said = asking.apart(dict(known), 2, list)
    assert (
        said.startswith("source 3 of a batch up to step 2 was not") and "left nothing out" in said
    )
    said = asking.apart(known, 2, lambda: ["record 5 is damaged", "record 17 is damaged"])
    assert "left out: record 17 is damaged, and 1 before it. No checkpoint" in said


def test_pictures_are_looked_at(hosts):
    darker = batch([1, 3])
    darker["target_image"] = darker["target_image"] // 2
    asking, known = hosts(batch([0, 1, 2]), batch([2, 3]), darker)
    assert asking.apart(known, 1, list).startswith("source 1 ")
