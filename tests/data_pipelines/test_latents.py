"""Latents in place of pictures: the right frame's, mirrored where the sample is, and errors for what does not fit.

The encoder is arithmetic: its mean is the picture itself, shrunk, and its log-variance the picture's negative.
"""

import dataclasses
import json
import shutil

import cv2
import numpy as np
import pytest

from data_pipelines import dataset, dataset_files, latents, loading, shard_reader
from data_pipelines.prepare import builder
from data_pipelines.prepare import latents as writing
from data_pipelines.survey import survey
from dexportrait_jax.errors import UserError
from tests import fixtures
from tests.data_pipelines.batches import assert_same

SIZE = 32


def encode(pictures):
    small = pictures[:, ::4, ::4].astype(np.float32) / 256
    return np.stack([small, -small], 1)


def make(directory, out, *, flips=True, dtype="float32", encoder=encode, clips=None, **changes):
    clips = clips or dataset.ClipDataset(directory, "train")
    description = latents.Description(
        data=str(directory),
        split="train",
        shards=clips.fingerprint(),
        clips=len(clips),
        frames=int(clips.frames.sum()),
        crop=None,
        image_size=SIZE,
        flips=flips,
        dtype=dtype,
        compute="float32",
        shape=(8, 8, 3),
        autoencoder={},
        weights="",
    )
    description = dataclasses.replace(description, **changes)
    writing.write(clips, out, description, encoder, batch=7, workers=2, tell=lambda done: None)
    return out


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return fixtures.make_dataset(tmp_path_factory.mktemp("latents") / "data", 4, 10, 48)


@pytest.fixture(scope="module")
def made(directory, tmp_path_factory):
    return make(directory, tmp_path_factory.mktemp("made") / "latents")


def config(directory, **changes):
    values = loading.default_data() | {"path": str(directory), "batch_size": 4, "targets": 2}
    values |= {"image_size": SIZE, "pose_size": SIZE, "expression_size": 16}
    for name in ("similarity", "colour"):
        values["augment"][name]["probability"] = 0.0
    return values | changes


def take(values, count, **options):
    loader = loading.make_loader(values, seed=3, **options)
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return [{name: np.array(value) for name, value in batch.items()} for batch in batches]


@pytest.mark.parametrize(
    ("mode", "workers"), [("pairs", 0), pytest.param("video", 2, marks=pytest.mark.slow)]
)
def test_a_batch_holds_the_latents_of_its_pictures(directory, made, mode, workers):
    """Half of the samples are mirrored; hosts and workers change nothing."""
    values = config(directory, mode=mode, frames=3)
    cached = values | {"latents": str(made), "workers": workers}
    expected, found = take(values, 4), take(cached, 4)
    for one, other in zip(expected, found, strict=True):
        for which in ("source", "target"):
            pictures = one[f"{which}_image"]
            flat = encode(pictures.reshape(-1, SIZE, SIZE, 3))
            given = other.pop(f"{which}_latents")
            assert given.dtype == np.float32
            np.testing.assert_array_equal(given.reshape(flat.shape), flat)
        del one["target_image"]
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    shapes = {name: (value.shape, value.dtype.name) for name, value in take(cached, 1)[0].items()}
    assert loading.batch_shapes(cached) == shapes
    (host,) = take(cached, 1, step=2, rows=[2, 3])
    whole = take(cached, 1, step=2)[0]
    np.testing.assert_array_equal(host["target_latents"], whole["target_latents"][2:])


def test_what_was_opened_to_look_at_the_data_is_not_opened_again_to_read_them(
    directory, made, monkeypatch
):
    """A large dataset is tens of thousands of files; batches are those of a loader that opens them itself."""
    values = config(directory, latents=str(made), cross_view=0.5)
    expected = take(values, 2, step=5)
    opened = []
    for owner, name in [
        (dataset.ClipDataset, "_read_index"),
        (dataset, "_digest_of_ends"),
        (shard_reader, "_record_count"),
    ]:
        plain = getattr(owner, name)

        def counted(given, plain=plain, name=name):
            opened.append(name)
            return plain(given)

        monkeypatch.setattr(owner, name, counted)
    found = survey(values)
    for one, other in zip(expected, take(values, 2, step=5, examples=found.examples), strict=True):
        assert_same(one, other)
    assert sorted(opened) == ["_digest_of_ends", "_read_index", "_record_count"]
    assert found.fingerprint == found.examples.clips.fingerprint()


@pytest.mark.parametrize("mode", ["pairs", "video"])
def test_latents_of_other_cameras_are_looked_up(tmp_path, mode):
    """Every target's (a video's source's) latents are of the clip that shows it, which has other frames and length."""
    splits = {
        "train": lambda: [
            fixtures.make_clip(
                number, 6 + 2 * camera, 48, camera=camera, session=f"session{number}"
            )
            for number in range(2)
            for camera in range(3)
        ]
    }
    data = builder.write_dataset(splits, tmp_path / "data")
    values = config(data, mode=mode, frames=3, cross_view=1.0)
    cached = values | {"latents": str(make(data, tmp_path / "latents"))}
    for one, other in zip(take(values, 3), take(cached, 3), strict=True):
        for which in ("source", "target"):
            flat = encode(one[f"{which}_image"].reshape(-1, SIZE, SIZE, 3))
            np.testing.assert_array_equal(other[f"{which}_latents"].reshape(flat.shape), flat)
            np.testing.assert_array_equal(one[f"{which}_head_pose"], other[f"{which}_head_pose"])


def test_mirrored_pictures_have_latents_of_their_own(directory, made):
    clips = dataset.ClipDataset(directory, "train")
    read = latents.Latents(config(directory, latents=str(made)), clips)
    plain, mirrored = read(2, 5, False), read(2, 5, True)
    assert np.abs(plain - mirrored).max() > 0.1
    picture = cv2.imdecode(np.frombuffer(clips[2].frames[5], np.uint8), cv2.IMREAD_COLOR)
    small = cv2.resize(picture[..., ::-1], (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    np.testing.assert_allclose(plain[0], small[::4, ::4] / 256, atol=2 / 256)
    np.testing.assert_allclose(mirrored[0], small[:, ::-1][::4, ::4] / 256, atol=2 / 256)


def test_half_precision_is_half_the_bytes(directory, made, tmp_path):
    half = make(directory, tmp_path / "half", dtype="float16", flips=False)
    values = config(directory)
    values["augment"]["flip"]["probability"] = 0.0
    exact = take(values | {"latents": str(made)}, 1)[0]["target_latents"]
    found = take(values | {"latents": str(half)}, 1)[0]["target_latents"]
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, exact, rtol=2**-11)
    sizes = [latents.read_description(path).frame_bytes for path in (made, half)]
    assert sizes == [2 * 2 * 8 * 8 * 3 * 4, 2 * 8 * 8 * 3 * 2]


def test_evaluation_shows_pictures(directory, made):
    values = config(directory, latents=str(made))
    (batch,) = loading.evaluation_batches(values, "validation", 1)
    assert "target_image" in batch and "target_latents" not in batch


def test_an_ended_job_goes_on_with_the_next_shard(tmp_path, monkeypatch):
    """Two shards; the second fails at first. The first is not encoded again, and the result is the same."""
    whole = fixtures.make_dataset(tmp_path / "data", 3, 10, 48)
    other = fixtures.make_dataset(tmp_path / "other", 2, 6, 48)
    (first,), (second,) = (dataset_files.shards(path)["train"] for path in (whole, other))
    stem = first.name.partition(".array_record")[0]
    shutil.copy(second, whole / f"{stem}.array_record-00001-of-00002")
    first.rename(whole / f"{stem}.array_record-00000-of-00002")
    (whole / dataset_files.index_name("train")).unlink()
    (whole / dataset_files.background_name("train")).unlink()
    expected = make(whole, tmp_path / "expected")
    seen = []

    def failing(pictures, after=10):
        seen.append(len(pictures))
        if len(seen) > after:
            raise OSError(28, "No space left on device")
        return encode(pictures)

    out = tmp_path / "out"
    with pytest.raises(UserError, match="the disk is full"):
        make(whole, out, encoder=failing)
    assert not out.exists() and len(seen) == 11  # 60 pictures of the first shard in batches of 7
    seen.clear()
    make(whole, out, encoder=lambda pictures: failing(pictures, 99))
    assert len(seen) == 4
    names = [latents.shard_name(number, 2) for number in range(2)]
    assert sorted(path.name for path in out.iterdir()) == [*names, latents.DESCRIPTION]
    for name in names:
        assert (out / name).read_bytes() == (expected / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "expected", "other", "out"]
    batch = take(config(whole, latents=str(out)), 1)[0]
    pictures = take(config(whole), 1)[0]["source_image"]
    np.testing.assert_array_equal(batch["source_latents"], encode(pictures))

    # What was begun for other latents is begun anew.
    with pytest.raises(UserError, match="the disk is full"):
        make(whole, tmp_path / "third", encoder=lambda pictures: failing(pictures, len(seen)))
    seen.clear()
    third = make(whole, tmp_path / "third", encoder=lambda p: failing(p, 99), dtype="float16")
    assert len(seen) == 13 and (third / names[0]).stat().st_size < (out / names[0]).stat().st_size


def test_damaged_frames_have_no_latents_and_are_replaced(tmp_path, capfd):
    def clips():
        for number in range(3):
            clip = fixtures.make_clip(number, 6, 32)
            if number == 1:
                frames = [frame[: len(frame) // 2] for frame in clip.frames]
                clip = dataclasses.replace(clip, frames=frames)
            yield clip

    directory = builder.write_dataset({"train": clips}, tmp_path / "data")
    out = make(directory, tmp_path / "latents")
    assert "frame 3 is not a whole picture; its latents are left out" in capfd.readouterr().err
    for one, other in zip(
        take(config(directory), 4), take(config(directory, latents=str(out)), 4), strict=True
    ):
        np.testing.assert_array_equal(encode(one["source_image"]), other["source_latents"])


def test_a_torn_shard_is_said_in_one_line(tmp_path):
    directory = fixtures.make_dataset(tmp_path / "data", 2, 6, 32, validation_clips=0)
    (shard,) = dataset_files.shards(directory)["train"]
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(
        UserError, match="cannot be read.*prepare it again with --overwrite"
    ) as caught:
        make(directory, tmp_path / "latents")
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def one_line(values, *words):
    with pytest.raises(UserError) as caught:
        loading.make_loader(values, seed=0)
    said = str(caught.value)
    assert "\n" not in said
    for word in words:
        assert word in said, said


def test_latents_that_do_not_fit(directory, made, tmp_path):
    values = config(directory, latents=str(made))
    one_line(values | {"image_size": 64}, "--config.data.image_size=32", "--size=64")
    one_line(values | {"latents": str(tmp_path)}, "holds no latents.json", "dexportrait encode")
    one_line(values | {"split": "validation"}, "of split 'train'", "--split=validation")
    one_line(values | {"path": "synthetic:identities=2,frames=6,size=32"}, "`dexportrait render`")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / latents.DESCRIPTION).write_text('{"format": "something"}')
    one_line(values | {"latents": str(tmp_path / "bad")}, "cannot be read", "--overwrite")

    changed = config(directory, latents=str(made))
    changed["augment"]["similarity"]["probability"] = 0.5
    changed["augment"]["colour"]["probability"] = 0.5
    changed["augment"]["similarity"]["border"] = "black"
    one_line(
        changed,
        "--config.data.augment.similarity.probability=0 --config.data.augment.colour.probability=0 "
        "--config.data.augment.similarity.border=reflect",
    )
    plain = make(directory, tmp_path / "plain", flips=False)
    one_line(
        config(directory, latents=str(plain)),
        "--config.data.augment.flip.probability=0",
        "encode again with --flips",
    )


def test_another_or_changed_dataset(directory, made, tmp_path):
    values = config(directory, latents=str(made))
    fewer = fixtures.make_dataset(tmp_path / "fewer", 3, 10, 48)
    one_line(
        values | {"path": str(fewer)},
        "(4 clips, 40 frames of",
        "here 3 clips, 30 frames",
        "encode again with --overwrite",
    )
    # The same clips in other pixels.
    clips = [fixtures.make_clip(number, 10, 64, session=f"session{number}") for number in range(4)]
    other = builder.write_dataset({"train": lambda: clips}, tmp_path / "crop")
    one_line(values | {"path": str(other)}, "before it was changed")

    moved = shutil.copytree(directory, tmp_path / "moved")
    assert "source_latents" in take(values | {"path": str(moved)}, 1)[0]

    torn = shutil.copytree(made, tmp_path / "torn")
    text = json.loads((torn / latents.DESCRIPTION).read_text()) | {"flips": False}
    (torn / latents.DESCRIPTION).write_text(json.dumps(text))
    values["augment"]["flip"]["probability"] = 0.0
    one_line(values | {"latents": str(torn)}, "holds 80 latents", "says 40")
    (torn / latents.shard_name(0, 1)).unlink()
    one_line(values | {"latents": str(torn)}, "cannot be read")


def test_what_is_there_is_kept(directory, made, tmp_path):
    before = latents.read_description(made)
    assert writing.finished(made, dataclasses.replace(before, weights="moved"), overwrite=False)
    assert not writing.finished(made, before, overwrite=True)
    assert not writing.finished(tmp_path / "new", before, overwrite=False)
    with pytest.raises(UserError, match="made with other image_size, dtype; choose another --out"):
        other = dataclasses.replace(before, dtype="float16", image_size=64)
        writing.finished(made, other, overwrite=False)
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="something else than latents"):
        writing.finished(tmp_path, before, overwrite=True)
