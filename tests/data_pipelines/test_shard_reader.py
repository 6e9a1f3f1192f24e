"""Records from a disk that is away for a moment, and from one that holds none."""

import pickle

import pytest
from array_record.python import array_record_module

from data_pipelines import records, shard_reader
from data_pipelines.shard_reader import ShardReader


@pytest.fixture
def paths(tmp_path):
    """Two shards of three records."""
    for shard in range(2):
        writer = array_record_module.ArrayRecordWriter(str(tmp_path / f"{shard}"), "group_size:1")
        for number in range(3):
            writer.write(f"{shard}{number}".encode())
        writer.close()
    return [tmp_path / "0", tmp_path / "1"]


@pytest.fixture
def paused(monkeypatch):
    seconds = []
    monkeypatch.setattr(shard_reader.time, "sleep", seconds.append)
    return seconds


def test_records_of_all_shards(paths, paused):
    reader = pickle.loads(pickle.dumps(ShardReader(paths)))
    assert len(reader) == 6
    assert [reader[number] for number in range(6)] == [b"00", b"01", b"02", b"10", b"11", b"12"]
    assert paused == []


@pytest.mark.parametrize("error", [OSError, RuntimeError])
@pytest.mark.parametrize("times", [1, 3])
def test_what_cannot_be_read_for_a_moment_is_read_again(paths, paused, monkeypatch, error, times):
    """With a new reader: the files of the old one may be of a mount that is gone."""
    made = []

    class Source:
        def __init__(self, paths):
            made.append(self)

        def __getitem__(self, number):
            if len(made) <= times:
                raise error("Stale file handle")
            return b"there"

    monkeypatch.setattr(shard_reader.array_record_data_source, "ArrayRecordDataSource", Source)
    assert ShardReader(paths)[4] == b"there"
    assert paused == list(shard_reader.PAUSES[:times])


def test_what_stays_unreadable_is_a_record_error_and_waited_for_once(paths, paused):
    data = bytearray(paths[1].read_bytes())
    place = data.index(b"11")
    data[place] ^= 255
    paths[1].write_bytes(data)
    reader = ShardReader(paths)
    for _ in range(2):
        with pytest.raises(records.RecordError, match="record 4 cannot be read"):
            reader[4]
        assert paused == list(shard_reader.PAUSES)
    assert reader[1] == b"01"
