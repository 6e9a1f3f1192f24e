"""The job `prepare` on scripted videos: verdicts, restart, splits, errors; nothing half-written."""

import hashlib
import json
import os
import weakref
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import dataset, dataset_files, files, records
from data_pipelines.prepare import builder, clips, crop, job, processing
from data_pipelines.synthetic.dataset import run_render
from data_pipelines.video_writing import VideoWriter
from dexportrait_jax.errors import UserError
from tests.data_pipelines.prepare import scripted
from tests.data_pipelines.test_video import fail_after
from tests.disks import resize, small_disk

SETTINGS = crop.Settings(min_frames=6)


def _write(path, pictures):
    with VideoWriter(path, 25, quality=4) as writer:
        for picture in pictures:
            writer.write(picture)


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    _write(folder / "anna.mp4", [scripted.picture(shift=0.002 * n) for n in range(30)])
    _write(folder / "bert.mp4", [scripted.picture(shade=90)] * 20)
    cut = [scripted.picture()] * 10 + [scripted.picture(0)] * 3 + [scripted.picture()] * 8
    _write(folder / "carl.mp4", cut)
    _write(folder / "pair.mp4", [scripted.picture(2)] * 12)
    _write(folder / "wall.mp4", [scripted.picture(0)] * 12)
    _write(folder / "one.mp4", [scripted.picture()])
    (folder / "text.mp4").write_text("not a video")
    return folder


@pytest.fixture(autouse=True)
def landmarker(monkeypatch, tmp_path):
    """The scripted landmarker, in this process."""
    model = scripted.ScriptedLandmarker()

    def run(jobs, path, workers, tell):
        for one in jobs:
            tell(one, processing._look_at(one))
        return []

    monkeypatch.setattr(processing, "_landmarker", model)
    monkeypatch.setattr(processing, "_answers", True)
    monkeypatch.setattr(processing, "_run", run)
    (tmp_path / "model").write_text("scripted")
    return model


def _run(videos, out, *, landmarker=None, **options):
    options = {"size": 48, "settings": SETTINGS} | options
    model = landmarker or videos.parent / "model"
    job.run_prepare(f"{videos}/*.mp4", out, landmarker_path=model, **options)


def test_every_video_gets_a_verdict(videos, tmp_path, capsys):
    _run(videos, tmp_path / "out")
    report = json.loads((tmp_path / "out" / job.REPORT).read_text())
    verdicts = {v["source"].rsplit("/")[-1]: v for v in report["videos"]}
    assert {name for name, v in verdicts.items() if v["kept"]} == {
        "anna.mp4",
        "bert.mp4",
        "carl.mp4",
    }
    assert {name: v["reason"] for name, v in verdicts.items() if not v["kept"]} == {
        "pair.mp4": "several people",
        "wall.mp4": "no face found",
        "one.mp4": "too few frames",
        "text.mp4": "unreadable",
    }
    assert verdicts["carl.mp4"]["clips"] == 2
    assert verdicts["carl.mp4"]["dropped_frames"] == {"no face found": 3}
    funnel = report["funnel"]
    assert (funnel["videos"], funnel["videos_kept"], funnel["clips"]) == (7, 3, 4)
    assert funnel["frames_kept"] == 30 + 20 + 18
    said = capsys.readouterr().out
    assert "videos       7, kept 3" in said and "-1 several people" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "videos"]

    ids = {}
    for split in ("train", "validation"):
        data = dataset.ClipDataset(tmp_path / "out", split)
        for number in range(len(data)):
            clip = data[number]
            ids[clip.clip_id] = (split, clip.identity)
            assert clip.size == 48 and clip.fps == pytest.approx(25, abs=0.01)
            angles = clips.head_pose.euler_degrees(clip.head_pose)
            np.testing.assert_allclose(angles, [[5, 10, -8]] * len(clip), atol=0.01)
    assert set(ids) == {
        "anna-000000-000029", "bert-000000-000019", "carl-000000-000009", "carl-000013-000020",
    }  # fmt: skip
    assert {split for split, _ in ids.values()} == {"train", "validation"}
    assert ids["carl-000000-000009"] == ids["carl-000013-000020"]


def test_time_holdout(videos, tmp_path):
    _run(videos, tmp_path / "out", holdout="time", holdout_fraction=0.3, holdout_gap=2)
    train = dataset.ClipDataset(tmp_path / "out", "train").index
    held = dataset.ClipDataset(tmp_path / "out", "validation").index
    assert "anna-000000-000018" in train["clip_id"] and "anna-000021-000029" in held["clip_id"]
    written = sum(train["frames"]) + sum(held["frames"])
    assert written < 68
    funnel = json.loads((tmp_path / "out" / job.REPORT).read_text())["funnel"]
    assert funnel["frames_kept"] == written and funnel["frames"] == 30 + 20 + 21
    assert funnel["clips"] == len(train["frames"]) + len(held["frames"])
    assert funnel["frames_dropped"] == {"no face found": 3, job.BETWEEN: 68 - written}


def test_clips_too_short_to_hold_out_their_end(videos, tmp_path, capsys):
    """There is no validation then, which is told, and TFDS reads what there is."""
    import tensorflow_datasets as tfds

    _run(videos, tmp_path / "out", holdout="time", holdout_gap=60)
    assert dataset_files.split_names(tmp_path / "out") == ["train"]
    assert "nothing is held out for validation: every clip is too short" in capsys.readouterr().out
    source = tfds.builder_from_directory(tmp_path / "out").as_data_source(split="train")
    assert [len(clip["frames"]) for clip in source] == [30, 20, 10, 8]


def test_named_people_are_held_out(videos, tmp_path, capsys):
    _run(videos, tmp_path / "out", holdout_people="bert, carl")
    held = dataset.ClipDataset(tmp_path / "out", "validation").index["identity"]
    assert set(held) == {"bert", "carl"}
    assert set(dataset.ClipDataset(tmp_path / "out", "train").index["identity"]) == {"anna"}
    capsys.readouterr()
    _run(videos, tmp_path / "out", holdout_people="carl,bert")
    assert "already prepared" in capsys.readouterr().out
    with pytest.raises(UserError, match="made with other holdout"):
        _run(videos, tmp_path / "out", holdout_people="carl")


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        ("bart", {}, r"no video of 'bart' \(but of bert\)"),
        ("bert", {"holdout": "time"}, "--holdout=time"),
        ("anna,bert,carl,pair,wall,one,text", {}, "nobody to train on"),
        ("wall,one", {}, "no video of one, wall can be used"),  # said once they were looked at
        ("anna,bert,carl", {}, "nobody to train on"),  # the others cannot be used
    ],
)
def test_people_who_cannot_be_held_out(videos, tmp_path, names, options, words):
    with pytest.raises(UserError, match=words) as caught:
        _run(videos, tmp_path / "out", holdout_people=names, **options)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_second_run_says_it_is_done(videos, tmp_path, capsys, landmarker):
    _run(videos, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    calls = landmarker.calls
    capsys.readouterr()
    _run(videos, tmp_path / "out")
    assert "already prepared" in capsys.readouterr().out
    assert landmarker.calls == calls
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match="made with other settings"):
        _run(videos, tmp_path / "out", size=64)
    _run(videos, tmp_path / "out", size=64, overwrite=True)
    assert dataset.ClipDataset(tmp_path / "out", "train")[0].size == 64


def test_a_dataset_of_an_older_version_is_said_to_be_one(videos, tmp_path, capsys):
    _run(videos, tmp_path / "out")
    path = tmp_path / "out" / job.MADE_WITH
    made_with = json.loads(path.read_text())
    made_with["settings"]["max_cut_difference"] = 0.2  # as it was by default then
    for before, words in ((2, "by version 2"), (None, "by an older version")):
        made_with.pop(job.VERSION)
        path.write_text(json.dumps(made_with | ({job.VERSION: before} if before else {})))
        made_with = made_with | {job.VERSION: before}
        (tmp_path / ".out.work").mkdir(exist_ok=True)  # of a job with --overwrite, perhaps
        capsys.readouterr()
        _run(videos, tmp_path / "out")
        (said,) = capsys.readouterr().out.splitlines()
        assert words in said and "already prepared" in said and "--overwrite" in said
        assert (tmp_path / ".out.work").exists()
    with pytest.raises(UserError, match="made with other settings"):
        _run(videos, tmp_path / "out", size=64)
    _run(videos, tmp_path / "out", overwrite=True)
    capsys.readouterr()
    _run(videos, tmp_path / "out")
    assert "nothing to do" in capsys.readouterr().out


def test_what_a_job_killed_at_its_very_end_left_is_cleared_up(videos, tmp_path, capsys):
    _run(videos, tmp_path / "out")
    left = tmp_path / ".out.work"
    left.mkdir()
    (left / "0123.clips").write_text("as large as the dataset")
    with files.alone_at(tmp_path / "out"):  # another job is at work
        _run(videos, tmp_path / "out")
        assert left.exists()
    _run(videos, tmp_path / "out")
    assert capsys.readouterr().out.count("already prepared") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "videos"]


def test_a_lock_that_was_taken_away_after_it_was_opened_is_none(tmp_path, monkeypatch):
    """Another job could hold the file that is there now."""
    lock = files.fcntl.flock

    def the_job_before_ends_now(stream, how):
        lock(stream, how)
        (tmp_path / ".out.lock").unlink()
        (tmp_path / ".out.lock").touch()

    monkeypatch.setattr(files.fcntl, "flock", the_job_before_ends_now)
    with pytest.raises(UserError, match="another job is making"), files.alone_at(tmp_path / "out"):
        pass


def test_a_name_with_brackets_is_found(videos, tmp_path):
    (videos / "anna.mp4").rename(videos / "talk [id],1.mp4")
    job.run_prepare(
        f"{videos}/talk [id],1.mp4", tmp_path / "out", size=48, settings=SETTINGS,
        landmarker_path=tmp_path / "model",
    )  # fmt: skip
    assert dataset.ClipDataset(tmp_path / "out", "train").index["identity"] == ["talk [id],1"]


def test_names_that_are_not_utf8(videos, tmp_path, capsys):
    """Are names too, whatever the file turns out to be, and told as text that can be stored and printed."""
    old = os.fsencode(videos) + b"/old\xfc"
    os.mkdir(old)  # noqa: PTH102 - pathlib takes no bytes
    for name, new in (
        ("anna", b"%s/caf\xe8" % old),
        ("bert", b"%s/caf\xe9" % old),
        ("carl", b"%s/caf\\xe9" % old),
        ("text", b"%s/text\xff" % old),
        ("wall", "%s/wände".encode() % os.fsencode(videos)),
    ):
        (videos / f"{name}.mp4").rename(os.fsdecode(new + b".mp4"))
    _run(f"{videos}/**", tmp_path / "out", holdout_fraction=0, landmarker=tmp_path / "model")
    report = json.loads((tmp_path / "out" / job.REPORT).read_text())
    reasons = {os.fsencode(one["source"]): one["reason"] for one in report["videos"]}
    assert reasons[old + b"/text\xff.mp4"] == "unreadable"
    assert reasons[os.fsencode(videos) + "/wände.mp4".encode()] == "no face found"
    clips_there = list(dataset.ClipDataset(tmp_path / "out", "train"))
    assert len({clip.clip_id for clip in clips_there}) == len(clips_there) == 4
    assert {clip.source for clip in clips_there} == {r"caf\xe8.mp4", r"caf\xe9.mp4"}
    assert {clip.identity for clip in clips_there} == {r"caf\xe8", r"caf\xe9"}
    assert r"caf\xe8: kept" in capsys.readouterr().out
    _run(f"{videos}/**", tmp_path / "out", holdout_fraction=0, landmarker=tmp_path / "model")
    assert "already prepared" in capsys.readouterr().out
    rig = {"identity": r"(?P<identity>[^/]+)\.mp4", "holdout_people": os.fsdecode(b"caf\xe8")}
    _run(os.fsdecode(old), tmp_path / "rig", landmarker=tmp_path / "model", **rig)
    held = dataset.ClipDataset(tmp_path / "rig", "validation").index
    assert held["identity"] == [r"caf\xe8"]


def test_names_that_are_utf8_have_the_fingerprint_they_had(tmp_path):
    """Or jobs that were killed would begin anew."""
    path = tmp_path / "wände.mp4"
    path.write_bytes(b"12345")
    os.utime(path, ns=(0, 67890))
    expected = hashlib.sha256(f"{path} 5 67890".encode()).hexdigest()[:16]
    assert processing.fingerprint(path) == expected


def test_an_interrupted_run_goes_on(videos, tmp_path, capsys, landmarker, monkeypatch):
    real = clips.clips_from_video

    def stops_at_carl(path, *args, **options):
        if "carl" in str(path):
            raise KeyboardInterrupt
        return real(path, *args, **options)

    monkeypatch.setattr(clips, "clips_from_video", stops_at_carl)
    with pytest.raises(KeyboardInterrupt):
        _run(videos, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(clips, "clips_from_video", real)
    capsys.readouterr()
    calls = landmarker.calls
    _run(videos, tmp_path / "out")
    assert "going on: 2 of 7 videos are done already" in capsys.readouterr().out
    assert landmarker.calls - calls < 60  # not those of anna and bert
    whole = dataset.ClipDataset(tmp_path / "out", "train").index
    _run(videos, tmp_path / "fresh")
    assert dataset.ClipDataset(tmp_path / "fresh", "train").index == whole


def test_what_a_killed_job_left_is_cleared_up(videos, tmp_path):
    (tmp_path / ".out.incomplete-1").mkdir()
    (tmp_path / ".out.replaced-1").mkdir()
    (tmp_path / ".out.replaced-1" / dataset_files.INFO).write_text('{"name": "portrait_clips"}')
    with files.work_folder(tmp_path / "out"):
        assert (tmp_path / "out" / dataset_files.INFO).exists()
    (tmp_path / ".out.replaced-1").mkdir()
    _run(videos, tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "videos"]


def test_a_shot_of_a_dog_is_left_out_and_no_other(tmp_path):
    """However short it is: of its frames none is one of those that are asked anyway."""
    shots = [(10, 120, False), (8, 30, True), (10, 200, False), (30, 90, True)]
    pictures = [
        scripted.picture(shade=shade, dog=dog)
        for length, shade, dog in shots
        for _ in range(length)
    ]
    pictures[18] = scripted.picture(0, shade=200)  # the face comes a frame after the cut
    _write(tmp_path / "a.mp4", pictures)
    made, verdict = clips.clips_from_video(
        tmp_path / "a.mp4", scripted.ScriptedLandmarker(), crop.Settings(size=48, min_frames=6)
    )
    names = [clip.clip_id for clip in made]
    assert names == ["a-000000-000009", "a-000019-000027"] and verdict.cuts == 3
    assert verdict.dropped_frames == {"not a human face, or too unclear": 38, "no face found": 1}


def test_a_strange_video_does_not_end_the_job(videos, tmp_path, monkeypatch):
    real = clips.clips_from_video

    def fails_at_bert(path, *args, **options):
        if "bert" in str(path):
            raise ValueError("who knows")
        return real(path, *args, **options)

    monkeypatch.setattr(clips, "clips_from_video", fails_at_bert)
    _run(videos, tmp_path / "out")
    report = json.loads((tmp_path / "out" / job.REPORT).read_text())
    assert report["funnel"]["videos_dropped"]["failed"] == 1


def test_of_a_long_video_one_clip_is_in_memory(videos, tmp_path, monkeypatch):
    """Its JPEGs are cut when their clip's turn comes, and are gone when the clip is written."""
    settings = crop.Settings(size=48, min_frames=6, clip_frames=6)
    alive, most = weakref.WeakSet(), []
    make, cut_out = records.encode, clips.crop.extract

    def encode(clip):
        alive.add(clip)
        most.append(len(alive))
        return make(clip)

    cut = []
    monkeypatch.setattr(records.Clip, "__hash__", object.__hash__)
    monkeypatch.setattr(processing.records, "encode", encode)
    monkeypatch.setattr(clips.crop, "extract", lambda *a: cut.append(1) or cut_out(*a))
    made, verdict = clips.clips_from_video(
        videos / "anna.mp4", scripted.ScriptedLandmarker(), settings
    )
    assert verdict.clips == 5 and not cut
    next(made)
    assert len(cut) == 6
    naming = clips.Naming.of(videos / "anna.mp4")
    one = processing.Job(str(videos / "anna.mp4"), naming, settings, None, tmp_path)
    assert processing._look_at(one).words() == "kept 30 of 30 frames in 5 clip(s)"
    assert len(most) == 5 and max(most) <= 2
    written = list(one.clips())
    assert [len(clip) for clip in written] == [6] * 5
    np.testing.assert_allclose(np.concatenate([c.timestamps for c in written]), np.arange(30) / 25)


@pytest.mark.parametrize("holdout", ["identity", "time"])
def test_a_dataset_is_the_same_where_times_were_not_kept(videos, tmp_path, monkeypatch, holdout):
    """As by versions that kept clips alone; every clip is decoded once, or once a split."""
    decoded, plain = [], records.decode
    monkeypatch.setattr(records, "decode", lambda data: decoded.append(1) or plain(data))
    options = {"holdout": holdout, "holdout_fraction": 0.3}
    _run(videos, tmp_path / "out", **options)
    assert len(decoded) == (4 if holdout == "identity" else 8)
    index = {name: _index(tmp_path / "out", name) for name in ("train", "validation")}
    for name, found in index.items():  # as its shards have it
        read, motion = dataset.build_index(tmp_path / "out", name)
        assert read == found
        stored = np.load(tmp_path / "out" / dataset_files.background_name(name))
        np.testing.assert_array_equal(motion, stored)
    split = processing.splits.split

    def forgotten(*arguments):
        for path in (tmp_path / ".again.work").glob("*.times"):
            path.unlink()
        return split(*arguments)

    monkeypatch.setattr(processing.splits, "split", forgotten)
    _run(videos, tmp_path / "again", **options)
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def _index(out, split):
    return json.loads((out / dataset_files.index_name(split)).read_text())


def test_what_fails_half_way_leaves_a_verdict_and_no_clips(videos, tmp_path, monkeypatch):
    settings = crop.Settings(size=48, min_frames=6, clip_frames=6)
    naming = clips.Naming.of(videos / "anna.mp4")
    one = processing.Job(str(videos / "anna.mp4"), naming, settings, None, tmp_path)
    real, calls = clips.background.measured, []

    def fails_at_the_third(clip):
        calls.append(clip)
        if len(calls) == 3:
            raise ValueError("who knows")
        return real(clip)

    monkeypatch.setattr(clips.background, "measured", fails_at_the_third)
    assert processing._look_at(one).words() == "dropped: failed: ValueError: who knows"
    assert processing._done(one).reason == "failed" and list(one.clips()) == []


def test_a_full_temporary_directory_is_no_fault_of_the_video(videos, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(UserError, match="the disk is full.*TMPDIR"):
            _run(videos, tmp_path / "out")
    _run(videos, tmp_path / "out")
    report = json.loads((tmp_path / "out" / job.REPORT).read_text())
    assert report["funnel"]["videos_kept"] == 3


def _kept(out):
    """Names and lengths of a dataset's clips."""
    train, held = (dataset.ClipDataset(out, name).index for name in ("train", "validation"))
    names, frames = (train[key] + held[key] for key in ("clip_id", "frames"))
    return sorted(zip(names, frames, strict=True))


def _disk_drops_out_at(monkeypatch, videos, name, away):
    """While the video of this name is opened, until ``away`` is renamed back."""
    real = clips.clips_from_video

    def drops_out(path, *args, **options):
        if name in str(path) and videos.exists():
            videos.rename(away)
        return real(path, *args, **options)

    monkeypatch.setattr(clips, "clips_from_video", drops_out)


def test_a_disk_that_drops_out_is_no_fault_of_the_videos(videos, tmp_path, monkeypatch, capsys):
    _run(videos, tmp_path / "whole")
    capsys.readouterr()
    waited, away = [], tmp_path / "away"
    monkeypatch.setattr(processing.time, "sleep", waited.append)
    with monkeypatch.context() as patched:
        _disk_drops_out_at(patched, videos, "carl", away)
        words = r"5 of 7 video\(s\) cannot be reached any more \(first: .*carl.mp4 \(No such file"
        with pytest.raises(UserError, match=words) as caught:
            _run(videos, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert waited == list(processing.PAUSES)  # not for each of those that follow
    said = capsys.readouterr().out
    assert "carl: not done: cannot be reached any more" in said and "unreadable" not in said
    assert not (tmp_path / "out").exists()
    away.rename(videos)
    _run(videos, tmp_path / "out")
    assert "going on: 2 of 7 videos are done already" in capsys.readouterr().out
    assert _kept(tmp_path / "out") == _kept(tmp_path / "whole")
    report = json.loads((tmp_path / "out" / job.REPORT).read_text())
    assert report["funnel"]["videos_dropped"]["unreadable"] == 1  # the one that is none


def test_a_disk_that_comes_back_is_waited_for(videos, tmp_path, monkeypatch):
    _run(videos, tmp_path / "whole")
    away = tmp_path / "away"
    waited, real = [], clips.clips_from_video
    _disk_drops_out_at(monkeypatch, videos, "anna", away)

    def wait(seconds):
        waited.append(seconds)
        if len(waited) == 2:
            away.rename(videos)
            monkeypatch.setattr(clips, "clips_from_video", real)

    monkeypatch.setattr(processing.time, "sleep", wait)
    _run(videos, tmp_path / "out")
    assert waited == list(processing.PAUSES[:2])
    assert _kept(tmp_path / "out") == _kept(tmp_path / "whole")


def test_a_disk_that_fails_in_the_middle_of_a_file_cuts_no_clip(videos, tmp_path, monkeypatch):
    _run(videos, tmp_path / "whole")
    monkeypatch.setattr(processing, "PAUSES", ())
    with monkeypatch.context() as patched:
        fail_after(patched, 12, "anna")
        with pytest.raises(UserError, match=r"1 of 7 .*anna.mp4 \(Input/output error\)"):
            _run(videos, tmp_path / "out")
    _run(videos, tmp_path / "out")
    assert _kept(tmp_path / "out") == _kept(tmp_path / "whole")


def test_what_ffmpeg_does_not_tell_of_a_disk_is_asked(videos, tmp_path, monkeypatch):
    """Of an MP4 whose index cannot be read it says that it is none."""
    monkeypatch.setattr(processing, "PAUSES", ())
    real = Path.open

    def fails(path, mode="r", *args, **options):
        if path.name == "text.mp4" and mode == "rb":
            raise OSError(5, "Input/output error")
        return real(path, mode, *args, **options)

    monkeypatch.setattr(Path, "open", fails)
    with pytest.raises(UserError, match=r"1 of 7 .*text.mp4 \(Input/output error\)"):
        _run(videos, tmp_path / "out")


def test_a_file_that_is_cut_off_is_no_fault_of_the_disk(videos, tmp_path):
    data = (videos / "anna.mp4").read_bytes()
    (videos / "anna.mp4").write_bytes(data[: data.index(b"mdat") + 1500])
    _run(videos, tmp_path / "out")
    report = json.loads((tmp_path / "out" / job.REPORT).read_text())
    assert "cut off" in report["videos"][0]["damaged"] and report["videos"][0]["kept"]


def test_a_video_that_changes_after_it_was_read_costs_nothing(videos, tmp_path, monkeypatch):
    look = processing._look_at

    def then_change(one):
        verdict = look(one)
        if one.naming.name == "anna":
            os.utime(one.path, ns=(0, 0))
        elif one.naming.name == "bert":
            Path(one.path).unlink()
        return verdict

    monkeypatch.setattr(processing, "_look_at", then_change)
    _run(videos, tmp_path / "out")
    index = dataset.ClipDataset(tmp_path / "out", "train").index
    held = dataset.ClipDataset(tmp_path / "out", "validation").index
    assert {"anna", "bert", "carl"} == {*index["identity"], *held["identity"]}


def test_user_errors(videos, tmp_path):
    with pytest.raises(UserError, match="no video matches"):
        job.run_prepare(f"{videos}/*.avi", tmp_path / "out")
    with pytest.raises(UserError, match=r"none of 1 video\(s\) can be used, such as wall.mp4"):
        job.run_prepare(f"{videos}/wall.mp4", tmp_path / "out", landmarker_path=tmp_path / "model")
    for options, words in [
        ({"holdout": "people"}, "--holdout"),
        ({"holdout_fraction": 1.5}, "--holdout_fraction"),
        ({"size": 4}, "--size"),
        ({"face_scale": 0.5}, "--face_scale"),
        ({"max_frames": 0}, "--max_frames"),
        ({"identity": "("}, "--identity"),
        ({"identity": "(?P<identity>xyz)"}, "does not match"),
        ({"identity": "([a-z]+)[.]mp4"}, "no group named identity or session"),
        ({"identity": "(?P<camera>[a-z]+)[.]mp4"}, "no group named identity or session"),
        ({"landmarker_path": tmp_path / "nowhere"}, "no face landmarker"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            _run(videos, tmp_path / "out", **options) if "landmarker_path" not in options else (
                job.run_prepare(f"{videos}/*.mp4", tmp_path / "out", **options)
            )
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "videos"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="something else than a dataset"):
        _run(videos, tmp_path / "other")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "precious"


def test_a_tighter_crop(videos, tmp_path):
    _run(videos, tmp_path / "out", face_scale=1.6)
    clips = dataset.ClipDataset(tmp_path / "out", "train")
    for clip in (clips[n] for n in range(len(clips))):
        sides = clip.face_boxes[..., 2:] - clip.face_boxes[..., :2]
        # In crop coordinates the side is 2. No face here moves far enough to widen the crop.
        assert 2 / np.median(sides.max(-1)) == pytest.approx(1.6, rel=0.02)
        assert clip.settings["face_scale"] == clip.settings["minimum_scale"] == 1.6
    wide = crop.Settings(minimum_scale=1.3)
    _run(videos, tmp_path / "wide", face_scale=2.5, settings=wide)
    settings = dataset.ClipDataset(tmp_path / "wide", "train")[0].settings
    assert (settings["face_scale"], settings["minimum_scale"]) == (2.5, 1.3)


def test_identity_of_a_rig_comes_from_the_path(videos, tmp_path):
    _run(
        videos,
        tmp_path / "out",
        identity=r"(?P<session>(?P<identity>[a-z])[a-z]*)\.mp4",
        holdout_fraction=0,
    )
    index = dataset.ClipDataset(tmp_path / "out", "train").index
    assert set(index["identity"]) == {"a", "b", "c"} and "anna" in index["session"]


def test_cameras_of_a_session_show_one_person(videos, tmp_path):
    """Whose name is not given: nobody is held out in one camera's video and trained on in another's."""
    for name in ("anna", "bert"):
        (videos / name).mkdir()
        for camera in ("left", "right"):
            data = (videos / f"{name}.mp4").read_bytes()
            (videos / name / f"{camera}.mp4").write_bytes(data)
    job.run_prepare(
        f"{videos}/*/*.mp4", tmp_path / "out", size=48, settings=SETTINGS,
        landmarker_path=tmp_path / "model",
        identity=r"(?P<session>[a-z]+)/(?P<camera>[a-z]+)\.mp4",
    )  # fmt: skip
    for split in ("train", "validation"):
        index = dataset.ClipDataset(tmp_path / "out", split).index
        assert len(set(index["identity"])) == 1 and index["camera"] == ["left", "right"]


def test_videos_of_one_name_stay_apart(videos, tmp_path, capsys):
    (videos / "more").mkdir()
    (videos / "more" / "anna.mp4").write_bytes((videos / "anna.mp4").read_bytes())
    job.run_prepare(
        f"{videos}/**/anna.mp4", tmp_path / "out", size=48, settings=SETTINGS,
        landmarker_path=tmp_path / "model",
    )  # fmt: skip
    index = dataset.ClipDataset(tmp_path / "out", "train").index
    assert len(set(index["clip_id"])) == 2 and set(index["identity"]) == {"anna"}
    said = capsys.readouterr().out
    assert f"2 of 2 videos have the name of another, as {videos / 'anna.mp4'} (2 of 'anna')" in said


def test_the_pattern_that_is_told_takes_people_apart(capsys):
    """Where videos of one name are in folders of their people; where all names differ, nothing is told."""
    paths = [Path(f"faces/id{person}/{name}.mp4") for person in (1, 2) for name in ("a", "b")]
    job._tell_one_name(paths[:2], job._namings(paths[:2], None))
    assert capsys.readouterr().out == ""
    job._tell_one_name(paths, job._namings(paths, None))
    (line,) = capsys.readouterr().out.splitlines()
    pattern = line.partition("--identity='")[2].strip("'")
    people = [naming.identity for naming in job._namings(paths, pattern)]
    assert people == ["id1", "id1", "id2", "id2"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_dataset_is_left_alone(videos, tmp_path, overwrite):
    """Neither job that makes datasets replaces it, or says how it could be replaced."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg", "prepare.json", "render.json"):
        (photos / name).write_text("{}")
    options = {"overwrite": overwrite}
    for make in (
        lambda: _run(videos, photos, **options),
        lambda: run_render(photos, identities=1, frames=1, size=32, workers=1, **options),
        lambda: builder.write_dataset({}, photos, **options),
    ):
        with pytest.raises(UserError, match="something else than a dataset") as caught:
            make()
        assert "(a.jpg, b.jpg, c.jpg and 2 more)" in str(caught.value)
        assert "--overwrite" not in str(caught.value)
    assert len(list(photos.iterdir())) == 5


def test_a_dataset_of_the_other_job_is_replaced_on_request(videos, tmp_path):
    plan = {"identities": 1, "frames": 1, "size": 32, "holdout_fraction": 0.0, "workers": 1}
    run_render(tmp_path / "out", **plan)
    with pytest.raises(UserError, match="`prepare` did not make.*--overwrite"):
        _run(videos, tmp_path / "out")
    _run(videos, tmp_path / "out", overwrite=True)
    with pytest.raises(UserError, match="another dataset than this.*--overwrite"):
        run_render(tmp_path / "out", **plan)


def test_a_link_is_not_replaced(videos, tmp_path):
    _run(videos, tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    _run(videos, tmp_path / "link")  # which is there already
    with pytest.raises(UserError, match="link is a link, .* such as .*link/faces"):
        _run(videos, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()


def test_a_dataset_that_a_killed_job_had_moved_aside_is_not_replaced_unasked(
    videos, tmp_path, capsys
):
    _run(videos, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.replaced-7")
    (tmp_path / "out").mkdir()  # by whoever looked for it
    (tmp_path / ".out.replaced-6").mkdir()  # of an older one
    os.utime(tmp_path / ".out.replaced-6", (1, 1))
    _run(videos, tmp_path / "out")
    said = capsys.readouterr()
    assert "already prepared" in said.out
    assert "note: put back" in said.err and "removed .out.replaced-6" in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "videos"]


def test_two_jobs_for_one_dataset(videos, tmp_path):
    with files.work_folder(tmp_path / "out"), pytest.raises(UserError, match="another job"):
        _run(videos, tmp_path / "out")


def test_the_folder_one_is_in_cannot_be_replaced(videos, tmp_path, monkeypatch):
    """By neither job that makes a dataset."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out, message in ((".", "is the folder you are in.* such as"), ("..", "something else")):
        with pytest.raises(UserError, match=message):
            _run(videos, out, overwrite=True)
        with pytest.raises(UserError, match=message):
            run_render(out, identities=1, frames=1, size=32, workers=1, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"here", "model", "videos"}


def test_folders_that_cannot_be_written(videos, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        _run(videos, tmp_path / "file" / "out")
    with pytest.raises(UserError, match="is a file"):
        _run(videos, tmp_path / "file")
    monkeypatch.setattr(job.Path, "mkdir", lambda *a, **k: (_ for _ in ()).throw(OSError(30, "ro")))
    with pytest.raises(UserError, match="read-only disk"):
        _run(videos, tmp_path / "out")


def test_a_full_disk(videos, tmp_path):
    with small_disk(tmp_path / "disk", "size=640k") as disk:
        (disk / "filler").write_bytes(bytes(500_000))
        with pytest.raises(UserError, match="the disk is full") as caught:
            _run(videos, disk / "out")
        assert "\n" not in str(caught.value) and not (disk / "out").exists()
        resize(disk, "1m")  # room for what is kept in between, not for the dataset
        with pytest.raises(UserError, match="the disk is full"):
            _run(videos, disk / "out")
        assert sorted(path.name for path in disk.iterdir()) == [".out.work", "filler"]
        resize(disk, "8m")
        _run(videos, disk / "out")
        assert sorted(path.name for path in disk.iterdir()) == ["filler", "out"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    """Processes of two containers that share a disk may have the same number."""
    path = tmp_path / "a.json"
    with files.staged_stream(path) as one:
        one.write(b"the first")
        files.write_bytes(path, b"the second")
    assert path.read_bytes() == b"the first"
    assert {one.name for one in tmp_path.iterdir()} == {"a.json", "model"}


def test_words_of_system_errors(tmp_path):
    assert files.explain(ValueError("something else"), tmp_path) is None
    native = RuntimeError("RESOURCE_EXHAUSTED: No space left on device; writing x")
    assert "the disk is full" in str(files.explain(native, tmp_path))
    with pytest.raises(UserError, match="no permission"), files.writing_to(tmp_path):
        raise PermissionError(13, os.strerror(13))
