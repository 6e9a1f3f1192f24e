"""A dataset's files are all there and are those of its index, or it is not read."""

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from data_pipelines import dataset, dataset_files, records
from data_pipelines.dataset import ClipDataset
from dexportrait_jax.errors import UserError
from tests import fixtures


@pytest.fixture
def directory(tmp_path):
    """Eight people's clips in four shards, and one that is held out."""
    made = fixtures.make_dataset(tmp_path / "data", 8, 4, 32)
    fixtures.spread(made, 4)
    return made


def refused(directory):
    with pytest.raises(UserError) as caught:
        ClipDataset(directory, "train")
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value)
    return str(caught.value)


def test_all_shards_make_a_split(directory):
    clips = ClipDataset(directory, "train")
    assert [clip.identity for clip in clips] == [f"drawn{number}" for number in range(8)]
    assert len(ClipDataset(directory, "validation")) == 1


@pytest.mark.parametrize("index", [True, False])
def test_missing_shards_are_named(directory, index):
    """Also the last, and where the index would be made of what is there."""
    paths = dataset_files.shards(directory)["train"]
    if not index:
        (directory / dataset_files.index_name("train")).unlink()
    paths[3].unlink()
    assert f"lacks 1 of its 4 files ({paths[3].name})" in refused(directory)
    paths[1].unlink()
    assert f"lacks 2 of its 4 files ({paths[1].name}, {paths[3].name})" in refused(directory)


def test_many_missing_shards_are_counted(tmp_path):
    name = "portrait_clips-train.array_record-{:05d}-of-01000"
    (tmp_path / name.format(999)).touch()
    first = ", ".join(name.format(number) for number in range(3))
    with pytest.raises(UserError) as caught:
        dataset_files.split_names(tmp_path)
    assert f"lacks 999 of its 1000 files ({first} and 996 more)" in str(caught.value)


@pytest.mark.parametrize(
    "left",
    ["portrait_clips-train.array_record", "portrait_clips-train.array_record-00000-of-00002"],
)
def test_shards_of_several_datasets(directory, left):
    (directory / left).touch()
    said = refused(directory)
    assert "several datasets (" in said and "train.array_record-*-of-00004" in said
    assert left.replace("-00000-", "-*-") in said


def test_a_file_without_a_number_is_a_whole_split(tmp_path):
    made = fixtures.make_dataset(tmp_path / "data", 2, 4, 32)
    (shard,) = dataset_files.shards(made)["train"]
    shard.rename(made / "portrait_clips-train.array_record")
    assert [clip.identity for clip in ClipDataset(made, "train")] == ["drawn0", "drawn1"]


@pytest.mark.parametrize("says", ["nothing", "other shards"])
def test_shards_are_counted_where_the_dataset_does_not_say(directory, says):
    (directory / dataset_files.INFO).unlink()
    if says == "other shards":
        other = fixtures.make_dataset(directory.parent / "other", 7, 4, 32)
        shutil.copy(other / dataset_files.INFO, directory)
    clips = ClipDataset(directory, "train")
    assert [clip.identity for clip in clips] == [f"drawn{number}" for number in range(8)]
    shard = clips.paths[3]
    whole = shard.read_bytes()
    shard.write_bytes(clips.paths[1].read_bytes()[:1000])
    assert "cannot be read (" in refused(directory)
    index = json.loads((directory / dataset_files.index_name("train")).read_text())
    shard.write_bytes(whole)
    fewer = {name: values[:7] for name, values in index.items()}
    (directory / dataset_files.index_name("train")).write_text(json.dumps(fewer))
    (directory / dataset_files.background_name("train")).unlink()
    assert "8 records, the index has 7" in refused(directory)


def test_the_fingerprint_is_of_size_beginning_and_end_of_every_shard(directory, monkeypatch):
    """As runs have written it into `data.json`."""
    monkeypatch.setattr(dataset, "_ENDS", 100)
    clips = ClipDataset(directory, "train")
    found = clips.fingerprint()
    assert list(found) == [path.name for path in clips.paths] and len(found) == 4
    for path in clips.paths:
        data = path.read_bytes()
        told = f"{len(data)} ".encode() + data[:100] + data[-100:]
        assert found[path.name] == hashlib.sha256(told).hexdigest()
    clips.paths[2].write_bytes(data[:150])
    again = ClipDataset(directory, "train").fingerprint()
    assert [name for name in found if found[name] != again[name]] == [clips.paths[2].name]


def test_records_of_other_clips_than_the_index_says(directory):
    """Shards that changed places: clips are as long as those of the index, and other people's."""
    first, second, *_ = dataset_files.shards(directory)["train"]
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])
    clips = ClipDataset(directory, "train")
    assert clips[4].identity == "drawn4"
    with pytest.raises(
        records.RecordError, match="record 1 is of clip drawn3.*says drawn1"
    ) as caught:
        clips[1]
    assert caught.value.clip_id == clips.index["clip_id"][1]


def test_threads_decode_at_the_same_time_and_keep_a_clip_once(directory, monkeypatch):
    clips, together = ClipDataset(directory, "train"), threading.Barrier(4)
    plain = records.decode

    def decode(data):
        together.wait(10)  # for four of them
        return plain(data)

    monkeypatch.setattr(dataset.records, "decode", decode)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(clips.__getitem__, [2, 2, 2, 5], timeout=20))
    assert [clip.identity for clip in found] == ["drawn2", "drawn2", "drawn2", "drawn5"]
    assert clips._cached == sum(len(clips._records[number]) for number in (2, 5))
    assert any(clips[2] is clip for clip in found[:3])


def test_an_index_is_made_of_more_shards_than_may_be_open(tmp_path):
    """That of a new dataset, of one that lacks it, and the motion of its backgrounds."""
    made = fixtures.make_dataset(tmp_path / "data", 60, 1, 16, validation_clips=0)
    index = ClipDataset(made, "train").index
    fixtures.spread(made, 60)
    (made / dataset_files.index_name("train")).unlink()
    (made / dataset_files.background_name("train")).unlink()
    code = """
import json, os, resource, sys
from data_pipelines import dataset, measure
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30,) * 2)
measure.run_measure(sys.argv[1])
print(json.dumps(dataset.ClipDataset(sys.argv[1], "train").index))
"""
    done = subprocess.run([sys.executable, "-c", code, made], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == index


class Counted:
    """Records, and the numbers of those that were read."""

    def __init__(self, records):
        self.records, self.read = records, []

    def __getitem__(self, number):
        self.read.append(number)
        return self.records[number]


def test_clips_are_kept_while_there_is_room(directory):
    """Room for two of three: the one that was asked for longest ago goes; one stays, however large it is."""
    size = sum(len(ClipDataset(directory, "train")._records[number]) for number in range(3))
    for room, read in ((size - 1, [0, 1, 2, 1]), (0, [0, 1, 0, 2, 0, 1])):
        clips = ClipDataset(directory, "train", cache_bytes=room)
        clips._records = Counted(clips._records)
        for number in (0, 1, 0, 2, 0, 1, 1):
            assert clips[number].identity == f"drawn{number}"
        assert clips._records.read == read


def test_a_fingerprint_is_of_both_ends(directory, monkeypatch):
    """And of the size: what lies between is not read."""
    monkeypatch.setattr(dataset, "_ENDS", 16)
    clips = ClipDataset(directory, "train")
    before, shard = clips.fingerprint(), clips.paths[2]
    whole = shard.read_bytes()
    for place, told in ((0, True), (15, True), (16, False), (-17, False), (-16, True), (-1, True)):
        data = bytearray(whole)
        data[place] ^= 1
        shard.write_bytes(data)
        changed = {name for name, one in clips.fingerprint().items() if one != before[name]}
        assert changed == ({shard.name} if told else set()), place
    shard.write_bytes(whole[:100] + whole[50:])
    assert clips.fingerprint() != before
