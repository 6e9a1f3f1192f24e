"""Records from a disk that is away for a moment, from one that holds none, and beside a shard that cannot be read."""

import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from array_record.python import array_record_module

from data_pipelines import records, shard_reader
from data_pipelines.shard_reader import ShardReader

COUNTS = [3, 3, 0, 2]


@pytest.fixture
def paths(tmp_path):
    """Four shards, of which one is empty."""
    for shard, count in enumerate(COUNTS):
        writer = array_record_module.ArrayRecordWriter(str(tmp_path / f"{shard}"), "group_size:1")
        for number in range(count):
            writer.write(f"{shard}{number}".encode())
        writer.close()
    return [tmp_path / f"{shard}" for shard in range(len(COUNTS))]


@pytest.fixture
def paused(monkeypatch):
    """Seconds that were slept, which also pass."""
    seconds = []
    monkeypatch.setattr(shard_reader.time, "sleep", seconds.append)
    monkeypatch.setattr(shard_reader.time, "monotonic", lambda: 1000.0 + sum(seconds))
    return seconds


ALL = [b"00", b"01", b"02", b"10", b"11", b"12", b"30", b"31"]


def test_records_of_all_shards(paths, paused):
    reader = pickle.loads(pickle.dumps(ShardReader(paths, COUNTS)))
    assert len(reader) == 8
    assert [reader[number] for number in range(8)] == ALL
    assert paused == []
    for number in (-1, 8):
        with pytest.raises(IndexError):
            reader[number]


def test_records_are_counted(paths, tmp_path):
    (tmp_path / "nothing").touch()
    assert shard_reader.record_counts([*paths, tmp_path / "nothing"]) == [*COUNTS, 0]
    (tmp_path / "torn").write_bytes(paths[0].read_bytes()[:1000])
    for path in (tmp_path / "torn", tmp_path / "missing"):
        with pytest.raises(shard_reader.ERRORS):
            shard_reader.record_counts([*paths, path])


@pytest.mark.parametrize("error", [OSError, RuntimeError])
@pytest.mark.parametrize("times", [1, 3])
def test_what_cannot_be_read_for_a_moment_is_read_again(paths, paused, monkeypatch, error, times):
    """With a new reader: the files of the old one may be of a mount that is gone."""
    made = []

    class Source:
        def __init__(self, paths):
            made.append(self)

        def __len__(self):
            return 3

        def __getitem__(self, number):
            if len(made) <= times:
                raise error("Stale file handle")
            return b"there"

    monkeypatch.setattr(shard_reader.array_record_data_source, "ArrayRecordDataSource", Source)
    assert ShardReader(paths, COUNTS)[4] == b"there"
    assert paused == list(shard_reader.PAUSES[:times])


def test_what_stays_unreadable_is_a_record_error_and_waited_for_once(paths, paused):
    data = bytearray(paths[1].read_bytes())
    place = data.index(b"11")
    data[place] ^= 255
    paths[1].write_bytes(data)
    reader = ShardReader(paths, COUNTS)
    for _ in range(2):
        with pytest.raises(records.RecordError, match=f"record 1 of {paths[1]} cannot be read"):
            reader[4]
        assert paused == list(shard_reader.PAUSES)
    assert reader[1] == b"01" and reader[5] == b"12"


def test_threads_read_at_the_same_time(paths, monkeypatch):
    """Of one shard too."""
    together = threading.Barrier(4)

    class Source:
        def __init__(self, paths):
            pass

        def __len__(self):
            return 3

        def __getitem__(self, place):
            together.wait(10)  # for four reads; one after the other they would never be there
            return b"there"

    monkeypatch.setattr(shard_reader.array_record_data_source, "ArrayRecordDataSource", Source)
    reader = ShardReader(paths, [3, 3, 3, 3])
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(reader.__getitem__, [0, 1, 2, 4], timeout=20)) == [b"there"] * 4


def test_a_record_that_is_waited_for_holds_up_no_other(paths, monkeypatch):
    whole, waiting, others_are_read = paths[1].read_bytes(), threading.Event(), threading.Event()
    tear(paths[1])

    def pause(seconds):
        waiting.set()
        assert others_are_read.wait(10)
        paths[1].write_bytes(whole)

    monkeypatch.setattr(shard_reader.time, "sleep", pause)
    reader = ShardReader(paths, COUNTS)
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(reader.__getitem__, 4)
        assert waiting.wait(10)
        assert [reader[number] for number in (0, 1, 2, 6, 7)] == [*ALL[:3], *ALL[6:]]
        others_are_read.set()
        assert late.result(10) == ALL[4]


def test_many_threads_read_what_one_reads(tmp_path, monkeypatch):
    """With fewer shards open than there are threads, so that they are closed while others read of them."""
    monkeypatch.setattr(shard_reader.resource, "getrlimit", lambda _: (8, 8))
    rng = np.random.default_rng(0)
    written = [rng.bytes(int(size)) for size in rng.integers(1, 100_000, 40)]
    for shard in range(4):
        writer = array_record_module.ArrayRecordWriter(str(tmp_path / f"{shard}"), "group_size:1")
        for data in written[10 * shard : 10 * shard + 10]:
            writer.write(data)
        writer.close()
    reader = ShardReader([tmp_path / f"{shard}" for shard in range(4)], [10] * 4)
    asked = rng.integers(0, 40, 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        for number, data in zip(asked, pool.map(reader.__getitem__, asked), strict=True):
            assert data == written[number]


def tear(path):
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize("read_before", [False, True])
def test_a_shard_that_cannot_be_read_takes_no_other_with_it(paths, paused, read_before):
    """It is waited for once in a while and not for every record, and read again when it is back."""
    reader = ShardReader(paths, COUNTS)
    if read_before:
        assert [reader[number] for number in range(8)] == ALL
        reader._open.clear()  # as after a read that failed
    whole = paths[1].read_bytes()
    tear(paths[1])
    for number, known in ((4, False), (4, True), (3, True), (5, True)):
        with pytest.raises(shard_reader.ShardError, match=f"{paths[1]} cannot be read") as said:
            reader[number]
        assert (said.value.path, said.value.known) == (paths[1], known)
        assert [reader[number] for number in (0, 1, 2, 6, 7)] == [*ALL[:3], *ALL[6:]]
        assert paused == list(shard_reader.PAUSES)
    paused.append(shard_reader.AGAIN)
    with pytest.raises(shard_reader.ShardError) as said:
        reader[5]
    assert not said.value.known
    paths[1].write_bytes(whole)
    with pytest.raises(shard_reader.ShardError):
        reader[5]
    paused.append(shard_reader.AGAIN)
    assert [reader[number] for number in range(8)] == ALL


def test_where_no_shard_can_be_read_every_record_is_waited_for(paths, paused):
    """Or a disk that is away for ten seconds would end a run of few shards."""
    reader = ShardReader(paths, COUNTS)
    for path in paths:
        tear(path)
    for waited, number in enumerate((0, 3, 6, 0, 3, 6), start=1):
        with pytest.raises(shard_reader.ShardError) as said:
            reader[number]
        assert not said.value.known
        assert paused == waited * list(shard_reader.PAUSES)


def test_a_shard_of_another_length_is_none_of_these(paths, paused):
    reader = ShardReader(paths, [3, 4, 0, 2])
    with pytest.raises(shard_reader.ShardError, match="it holds 3 records and not 4"):
        reader[3]
    assert reader[7] == b"30"


def test_few_files_are_open_at_a_time(paths, monkeypatch):
    monkeypatch.setattr(shard_reader.resource, "getrlimit", lambda _: (8, 8))
    reader = ShardReader(paths * 10, COUNTS * 10)

    def opened():
        files = [os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()]
        return sum(Path(file) in paths for file in files)

    for number in range(80):
        assert reader[number] == ALL[number % 8]
        assert 1 <= opened() <= 2
