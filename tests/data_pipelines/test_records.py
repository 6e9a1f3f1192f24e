"""Records: there and back, and the same bytes for TFDS."""

import dataclasses
import json
import tempfile
import tracemalloc

import numpy as np
import pytest

from data_pipelines import dataset, dataset_files, records, shard_reader
from data_pipelines.prepare import builder
from dexportrait_jax.errors import UserError
from tests import fixtures
from tests.disks import small_disk


@pytest.fixture(scope="module")
def clip():
    return fixtures.make_clip(3, frames=5, size=32)


def _assert_same(one, other):
    for field in dataclasses.fields(records.Clip):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name == "mask_polygons":
            assert a.keys() == b.keys()
            for name in a:
                np.testing.assert_array_equal(a[name], b[name])
        elif isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b, field.name


def test_encode_decode_is_the_identity(clip):
    _assert_same(records.decode(records.encode(clip)), clip)


def test_cached_clips_take_the_memory_that_is_counted(tmp_path):
    """Without the bytes of the record, which hold the same frames once more."""
    fixtures.make_dataset(tmp_path / "data", clips=5, frames=20, size=128, validation_clips=0)
    clips = dataset.ClipDataset(tmp_path / "data", "train")
    budget = 3 * len(clips._records[0]) + 1000  # three of five, alike but for their faces
    clips = dataset.ClipDataset(tmp_path / "data", "train", cache_bytes=budget)
    clips[0], clips[1]  # files are opened
    clips._forget()
    tracemalloc.start()
    for number in range(5):
        clips[number]
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(clips._cache) in (2, 3)
    assert 0.9 * clips._cached < held < 1.1 * clips._cached <= 1.1 * budget


def test_tfds_understands_our_bytes(clip):
    parsed = builder.features().deserialize_example_np(records.encode(clip))
    np.testing.assert_array_equal(parsed["landmarks"], clip.landmarks)
    np.testing.assert_array_equal(parsed["mask_polygons"]["nose"], clip.mask_polygons["nose"])
    assert list(parsed["frames"]) == clip.frames
    assert parsed["clip_id"] == clip.clip_id.encode()


def test_we_understand_tfds_bytes(clip):
    """Those of datasets that TFDS's own writer made."""
    features, flat = builder.features(), records.to_features(clip)
    nested = {name: value for name, value in flat.items() if "/" not in name}
    nested["mask_polygons"] = {name: flat[f"mask_polygons/{name}"] for name in records.POLYGONS}
    _assert_same(records.decode(features.serialize_example(features.encode_example(nested))), clip)


def test_integers_are_parsed():
    # {"n": int64 list [3, -1, 300]}, packed
    values = b"\x03" + b"\xff" * 9 + b"\x01" + b"\xac\x02"
    numbers = records._field(1, values)
    example = records._field(
        1, records._field(1, b"n") + records._field(2, records._field(3, numbers))
    )
    parsed = records.parse_example(records._field(1, example))
    assert parsed["n"].tolist() == [3, -1, 300]


@pytest.mark.parametrize("damage", ["cut", "zeros", "text", "empty", "other"])
def test_damaged_bytes_are_record_errors(clip, damage):
    data = records.encode(clip)
    broken = {
        "cut": data[: len(data) // 2],
        "zeros": bytes(len(data)),
        "text": b"hello, this is no record",
        "empty": b"",
        "other": records._field(1, records._field(1, records._field(1, b"a"))),
    }[damage]
    with pytest.raises(records.RecordError):
        records.decode(broken)


def test_masks_that_are_points_or_no_numbers_are_refused(clip):
    """Or missing: `test_survey` writes such records."""
    for value in (0.0, np.nan):
        nothing = np.full_like(clip.mask_polygons["left_eye"], value)
        polygons = clip.mask_polygons | {"left_eye": nothing}
        data = records.encode(dataclasses.replace(clip, mask_polygons=polygons))
        with pytest.raises(records.RecordError, match="no mask polygons of left_eye, by"):
            records.decode(data)


@pytest.mark.parametrize(
    "settings", ["{}", "[]", '"x"', "null", '{"size": "x"}', '{"size": null}', '{"size": Infinity}']
)
def test_settings_without_a_size_are_refused(clip, settings):
    with pytest.raises(records.RecordError, match="not a clip record: "):
        records.from_features(records.to_features(clip) | {"settings": settings})


def test_wrong_shapes_are_refused(clip):
    with pytest.raises(records.RecordError, match="landmarks"):
        records.encode(dataclasses.replace(clip, landmarks=clip.landmarks[:-1]))


def test_part_cuts_every_array(clip):
    clip = fixtures.flickering(3, 5, 32)
    part = clip.part(1, 4, "x")
    assert len(part) == 3 and part.clip_id == "x"
    _assert_same(records.decode(records.encode(part)), part)
    np.testing.assert_array_equal(part.head_pose, clip.head_pose[1:4])
    assert clip.background_motion[1] > 0 and part.background_motion[0] == 0
    np.testing.assert_array_equal(part.background_motion[1:], clip.background_motion[2:4])


def test_records_of_older_versions_lack_the_motion_of_backgrounds(clip, tmp_path):
    older = dataclasses.replace(clip, background_motion=None)
    data = records.encode(older)
    assert b"background_motion" not in data
    _assert_same(records.decode(data), older)
    assert older.part(1, 4).background_motion is None
    anew = builder.write_dataset({"train": lambda: [older]}, tmp_path / "data")
    _assert_same(dataset.ClipDataset(anew, "train")[0], clip)


def test_dataset_directory_is_read_by_tfds_and_by_us(tmp_path):
    import tensorflow_datasets as tfds

    directory = fixtures.make_dataset(tmp_path / "data", clips=3, frames=4, size=32)
    source = tfds.builder_from_directory(directory).as_data_source(split="train")
    ours = dataset.ClipDataset(directory, "train")
    assert len(source) == len(ours) == 3
    for number in range(3):
        expected = fixtures.make_clip(number, 4, 32, session=f"session{number}")
        _assert_same(ours[number], expected)
        assert source[number]["clip_id"].decode() == expected.clip_id
        np.testing.assert_array_equal(source[number]["head_pose"], expected.head_pose)
        assert list(source[number]["frames"]) == expected.frames
        np.testing.assert_array_equal(ours.background_motion(number), expected.background_motion)
    assert [clip.clip_id for clip in ours] == ours.index["clip_id"]


def test_index_is_rebuilt_when_it_is_missing(tmp_path):
    directory = fixtures.make_dataset(tmp_path / "data", clips=2, frames=4, size=32)
    index = dataset.ClipDataset(directory, "train").index
    (directory / dataset_files.index_name("train")).unlink()
    assert dataset.ClipDataset(directory, "train").index == index


def test_motion_of_another_dataset_is_an_error(tmp_path):
    directory = fixtures.make_dataset(tmp_path / "data", clips=2, frames=4, size=32)
    path = directory / dataset_files.background_name("train")
    for damage in (path.read_bytes()[:-4], b"", path.read_bytes()[:20]):
        path.write_bytes(damage)
        with pytest.raises(UserError, match=f"{path} is damaged.*dexportrait measure"):
            dataset.ClipDataset(directory, "train")


def test_errors_of_opening_a_dataset(tmp_path):
    with pytest.raises(UserError, match="no dataset at"):
        dataset.ClipDataset(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match="holds no ArrayRecord"):
        dataset.ClipDataset(tmp_path, "train")
    directory = fixtures.make_dataset(tmp_path / "data", 1, 4, 32, validation_clips=0)
    with pytest.raises(UserError, match="no split 'validation'"):
        dataset.ClipDataset(directory, "validation")


def test_a_split_of_several_shards(tmp_path, monkeypatch, capsys):
    """In the order of its clips; as TFDS says what is in it, it is read by TFDS and by us."""
    import tensorflow_datasets as tfds

    clips = [fixtures.make_clip(number, 4 + number % 3, 32) for number in range(9)]
    sizes = [len(records.encode(clip)) for clip in clips]
    monkeypatch.setattr(builder, "SHARD_BYTES", sum(sizes[:2]))  # two clips a shard, or one
    splits = {"train": lambda: clips[:7], "nobody": list, "validation": lambda: clips[7:]}
    directory = builder.write_dataset(splits, tmp_path / "data")
    assert capsys.readouterr() == ("", "")
    names = [path.name for path in dataset_files.shards(directory)["train"]]
    count = len(names)
    assert 4 <= count <= 6
    assert names == [
        f"portrait_clips-train.array_record-{number:05d}-of-{count:05d}" for number in range(count)
    ]
    info = json.loads((directory / dataset_files.INFO).read_text())
    train, validation = info["splits"]
    lengths = [int(length) for length in train["shardLengths"]]
    assert lengths == shard_reader.record_counts(dataset_files.shards(directory)["train"])
    assert set(lengths) == {1, 2} and sum(lengths) == 7
    assert int(train["numBytes"]) == sum(sizes[:7])
    assert (train["name"], validation["name"]) == ("train", "validation")
    expected = [clip.clip_id for clip in clips[:7]]
    assert [clip.clip_id for clip in dataset.ClipDataset(directory, "train")] == expected
    source = tfds.builder_from_directory(directory).as_data_source(split="train")
    assert [clip["clip_id"].decode() for clip in source] == expected
    assert [len(clip["frames"]) for clip in source] == [len(clip) for clip in clips[:7]]
    for name in ("data", "again"):
        again = builder.write_dataset(splits, tmp_path / name, overwrite=True)
        contents = {path.name: path.read_bytes() for path in directory.iterdir()}
        assert contents == {path.name: path.read_bytes() for path in again.iterdir()}


def test_a_clip_larger_than_a_shard_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "SHARD_BYTES", 1)
    directory = fixtures.make_dataset(tmp_path / "data", clips=3, frames=4, size=32)
    clips = dataset.ClipDataset(directory, "train")
    assert len(clips.paths) == len(clips) == 3
    assert [clip.identity for clip in clips] == ["drawn0", "drawn1", "drawn2"]


def test_a_split_may_be_larger_than_what_tfds_keeps_in_memory(tmp_path, monkeypatch):
    """Of the clips that are written one is in memory, however many there are."""
    from tensorflow_datasets.core import shuffle

    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1 << 16)
    clip = fixtures.make_clip(0, 20, 64)
    size = len(records.encode(clip))
    assert size > 1 << 16
    splits = {"train": lambda: (dataclasses.replace(clip) for _ in range(30))}
    builder.write_dataset(splits, tmp_path / "first")  # what is imported for it
    tracemalloc.start()
    directory = builder.write_dataset(splits, tmp_path / "data")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(dataset.ClipDataset(directory, "train")) == 30
    assert peak < 10 * size


def test_a_full_disk_among_many_shards(tmp_path, monkeypatch):
    clips = [fixtures.make_clip(number, 20, 64) for number in range(5)]
    size = len(records.encode(clips[0]))
    monkeypatch.setattr(builder, "SHARD_BYTES", 4 * size)
    taken = []

    def many():
        for number in range(1000):
            taken.append(number)
            yield clips[number % len(clips)]

    with small_disk(tmp_path / "disk", "size=4m") as disk:
        with pytest.raises(UserError, match="cannot write .*data: the disk is full") as caught:
            builder.write_dataset({"train": many}, disk / "data")
        assert "\n" not in str(caught.value) and list(disk.iterdir()) == []
    assert len(taken) < 100  # and not when all clips have been made


def test_a_dataset_without_clips_is_none(tmp_path):
    with pytest.raises(UserError, match="no clip to write to .*data;"):
        builder.write_dataset({"train": list}, tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_write_dataset_never_leaves_half_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # nor anything among temporary files

    def failing():
        yield fixtures.make_clip(0, 4, 32)
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="the disk is full"):
        builder.write_dataset({"train": failing}, tmp_path / "data")
    assert list(tmp_path.iterdir()) == []
    fixtures.make_dataset(tmp_path / "data", 1, 4, 32)
    before = sorted(path.name for path in (tmp_path / "data").iterdir())
    with pytest.raises(UserError, match="exists already"):
        builder.write_dataset({"train": lambda: [fixtures.make_clip(0, 4, 32)]}, tmp_path / "data")
    with pytest.raises(UserError, match="the disk is full"):
        builder.write_dataset({"train": failing}, tmp_path / "data", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == before
    assert len(list(tmp_path.iterdir())) == 1
