"""spill.py: what lies on disk is read back, costs no memory, and is never left behind."""

import os
import resource
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import spill
from dexportrait_jax.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where it spills to."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert not list(tmp_path.iterdir())


def held_on_disk(folder: Path) -> bool:
    return str(folder) in Path("/proc/self/maps").read_text()


def test_arrays(folder):
    tracemalloc.start()
    array = spill.zeros((1000, 32, 32), np.float32)
    array[500] = 3.0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert type(array) is np.ndarray and array.sum() == 3 * 32 * 32
    assert peak < array.nbytes / 20
    assert held_on_disk(folder)
    del array
    assert not held_on_disk(folder)
    assert spill.zeros((0, 3)).shape == (0, 3)


def test_rows(folder):
    rows, wanted = spill.Rows(), np.random.default_rng(0).normal(size=(600, 4, 2))
    kept = [rows.append(row) for row in wanted]
    np.testing.assert_array_equal(np.stack(kept), wanted)
    assert kept[0].dtype == np.float64


def test_many_rows_take_few_files(folder, monkeypatch):
    """Of which a process may have 1024 open on most systems: an hour of video would be beyond that."""
    monkeypatch.setattr(spill, "CHUNK", 4)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    rows, kept = spill.Rows(), []
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 20, limits[1]))
    try:
        for number in range(4000):
            kept.append(rows.append(np.full(3, number)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    np.testing.assert_array_equal(np.stack(kept)[:, 2], np.arange(4000))
    sizes = {id(row.base): len(row.base) for row in kept}
    assert 4000 <= sum(sizes.values()) < 1.5 * 4000  # what is reserved


def test_frames_are_a_list_of_bytes(folder):
    wanted = [bytes([number]) * (number % 7) for number in range(50)]
    frames = spill.Frames()
    for data in wanted:
        frames.append(data)
    assert len(frames) == 50 and list(frames) == wanted and frames[-1] == wanted[-1]
    assert list(frames[10:30][5:-2]) == wanted[10:30][5:-2]
    assert frames[3:][0] == wanted[3]
    with pytest.raises(IndexError):
        frames[10:30][20]


def test_a_full_disk_is_told(folder, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="the disk is full"):
        spill.zeros((4, 4))
    with pytest.raises(UserError, match="the disk is full"):
        spill.Frames().append(b"jpeg")
