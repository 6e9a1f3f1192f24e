"""protocols.py: what is compared with what, which frames are made, what is written and what is
refused.
"""

import dataclasses
import json
import weakref
from pathlib import Path

import cv2
import ml_collections
import numpy as np
import pytest

from data_pipelines import files
from data_pipelines.augment import default_augment
from data_pipelines.dataset import ClipDataset
from data_pipelines.prepare import builder
from data_pipelines.prepare.splits import split
from data_pipelines.records import BLENDSHAPES
from dexportrait_jax import cli
from dexportrait_jax.errors import UserError
from dexportrait_jax.evaluation import metrics, protocols
from dexportrait_jax.evaluation.estimators import (
    MOVING,
    Estimate,
    expression_distance,
    openings,
    pose_distance,
)
from dexportrait_jax.evaluation.eyes_and_mouth import clip_masks
from dexportrait_jax.evaluation.runner import SHOWN_ROWS, FirstFrames, one_clip_each
from dexportrait_jax.face_clips import model_inputs
from dexportrait_jax.inference import Sampling
from tests import fixtures


class CopyModel:
    """Repeats the source frame, whatever drives it."""

    stage = "motion"
    image_size = pose_size = expression_size = 64
    augment = default_augment()
    description = {"stage": "motion", "groups": {"generator": {"sha256": "ab"}}}

    def __init__(self, clip_length=1):
        self.clip_length = clip_length
        self.config = ml_collections.ConfigDict({"data": {"frame_stride": 2}})
        self.drives = []

    def settings(self, sampling):
        return {"steps": None, "seed": sampling.seed}

    def encode(self, pose_images, expression_images):
        poses = np.repeat(np.eye(3, 4, dtype=np.float32)[None], len(pose_images), 0)
        return poses, expression_images.mean((1, 2)).astype(np.float32)

    def animate(self, source, drive, sampling, report=None):
        self.drives.append(drive)
        for _ in range(len(drive)):
            yield source[None]


def mean_colour(picture):
    red, green, blue = picture.mean((0, 1))
    return Estimate(np.array([red, green, blue]), np.array([red / 255, blue / 255]))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "faces"
    return fixtures.make_dataset(path, clips=1, frames=12, validation_clips=3)


@pytest.fixture
def model(monkeypatch):
    made = CopyModel()
    monkeypatch.setattr(protocols, "load_model", lambda weights: made)
    distance = lambda x, y, *, data_range: np.abs(x.astype(float) - y).mean((1, 2, 3))  # noqa: E731
    monkeypatch.setattr(metrics, "LearnedDistance", lambda name: distance)
    return made


def run(dataset, out, protocol, **options):
    options = {"max_frames": 4, "estimator": mean_colour, **options}
    return protocols.run_evaluate("weights", str(dataset), protocol, str(out), **options)


def test_self_of_a_copy_equals_the_copy(dataset, model, tmp_path):
    result = run(dataset, tmp_path / "out", "self")
    made = ["metrics.json", "report.html", "samples.png"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == made
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == result
    for name in ("psnr", "ssim", "lpips"):
        assert result[name] == pytest.approx(result[f"{name}_copy"])
    # 3 clips, 4 frames of each, once with the driver's expression and once with the source's.
    assert 5 < result["psnr"] < 40 and result["frames"] == 24 and len(result["items"]) == 3
    assert result["expression_use_db"] == 0 and result["parts_psnr"] < 40
    clip = ClipDataset(dataset, "validation")[0]
    runner = protocols.Runner(model, Sampling(), 4)
    truth, source = runner.pictures(clip, [1, 4, 8, 11]), runner.pictures(clip, [0])
    error = np.square((truth.astype(float) - source) / 255).mean((1, 2, 3))
    assert result["items"][0]["psnr_copy"] == pytest.approx(
        np.mean(-10 * np.log10(error)), abs=0.01
    )


def test_the_source_is_the_first_frame_of_the_video(model, tmp_path):
    """Also where that frame is in another split."""
    whole = fixtures.make_clip(5, 12, session="video")
    splits = {
        "train": lambda: iter([whole.part(0, 8, "video-000000-000007")]),
        "validation": lambda: iter([whole.part(8, 12, "video-000008-000011")]),
    }
    data = builder.write_dataset(splits, tmp_path / "data")
    result = run(data, tmp_path / "out", "self", max_frames=3)
    runner = protocols.Runner(model, Sampling(), 3)
    truth, source = runner.pictures(whole, [9, 10, 11]), runner.pictures(whole, [0])
    error = np.square((truth.astype(float) - source) / 255).mean((1, 2, 3))
    assert result["psnr_copy"] == pytest.approx(np.mean(-10 * np.log10(error)), abs=0.01)
    assert (model.drives[0].source_expression != model.drives[0].expressions).any()


@pytest.mark.parametrize("protocol", ["self", "flicker"])
def test_the_source_has_the_crop_of_what_it_drives_to(model, tmp_path, protocol):
    """The part of its shot that training has, if it has that crop; else the clip's own first frame."""
    whole = fixtures.make_clip(5, 24, session="video")
    model.config.data.frame_stride = 1

    def cut(first, last, shift):
        clip = whole.part(first, last, f"video-{first:06d}-{last - 1:06d}")
        return dataclasses.replace(clip, crop_box=clip.crop_box + np.float32(shift))

    splits = {
        "train": lambda: iter([cut(0, 4, 0), cut(8, 12, 5)]),
        "validation": lambda: iter([cut(4, 8, 7), cut(12, 16, 5), cut(16, 20, 7), cut(20, 24, 9)]),
    }
    data = builder.write_dataset(splits, tmp_path / "data")
    result = run(data, tmp_path / "out", protocol, max_frames=3)
    # The clip from 16 on has the crop of the one from 4 on, and may well be another shot.
    sources = {item["clip"]: item["source"] for item in result["items"]}
    assert {clip[6:12]: source[6:12] for clip, source in sources.items()} == {
        "000004": "000004",
        "000012": "000008",
        "000016": "000016",
        "000020": "000020",
    }
    # A clip that is its own source is driven to its other frames alone.
    runner = protocols.Runner(model, Sampling(), 3)
    driven = model_inputs(model, whole, np.arange(21, 24))
    own = next(item for item in result["items"] if item["clip"] == "video-000020-000023")
    pictures = np.repeat(runner.pictures(whole, [20]), 3, 0)
    psnr = np.asarray(metrics.psnr(pictures, driven["image"], data_range=255))
    assert own["psnr"] == pytest.approx(psnr.mean(), abs=1e-3)
    _, expressions = model.encode(driven["pose_image"], driven["expression_image"])
    np.testing.assert_allclose(
        model.drives[-1 if protocol == "flicker" else -2].expressions, expressions
    )


@pytest.mark.parametrize("holdout", ["identity", "time"])
def test_no_source_is_of_another_shot(tmp_path, holdout):
    """Videos that were cropped before, with cuts: all clips have one crop, whatever is held out."""
    videos = {
        name: [
            dataclasses.replace(
                fixtures.make_clip(10 * person + shot, 40),
                clip_id=f"{name}-{40 * shot:06d}-{40 * shot + 39:06d}",
                identity=name,
                session=name,
                timestamps=np.arange(40 * shot, 40 * shot + 40, dtype=np.float32) / 25,
            )
            for shot in range(3)
        ]
        for person, name in enumerate(("anna", "bert", "two-words"))
    }
    parts = split([fixtures.video_of(clips) for clips in videos.values()], holdout, 0.3, 5)
    data = builder.write_dataset(parts, tmp_path / "data")
    first = FirstFrames(data)
    for name in ("train", "validation"):
        clips = ClipDataset(data, name)
        for clip in (clips[number] for number in range(len(clips))):
            source = first(clip)
            taken, begin = (int(one.clip_id.split("-")[-2]) for one in (source, clip))
            assert taken // 40 == begin // 40 and len(source) == 1
            # Held out in time, the other part of the shot gives it, which is far from what is measured.
            elsewhere = holdout == "time" and name == "validation"
            assert begin - taken > 20 if elsewhere else begin == taken
            assert source.frames[0] == videos[clip.identity][begin // 40].frames[taken % 40]


def test_self_and_flicker_of_heads_that_are_drawn_while_they_are_read(model, tmp_path):
    data = "synthetic:identities=4,frames=6,size=64,holdout=0.5"
    result = run(data, tmp_path / "self", "self")
    assert len(result["items"]) > 0 and result["psnr"] == pytest.approx(result["psnr_copy"])
    assert run(data, tmp_path / "flicker", "flicker")["frames"] > 0


def test_cross_and_disentangled_of_a_copy(dataset, model, tmp_path):
    result = run(dataset, tmp_path / "cross", "cross")
    assert result["apd"] == pytest.approx(result["apd_copy"]) and result["apd"] > 1
    assert result["faces_found"] == 1.0
    sources = [item["source"] for item in result["items"]]
    assert [item["driver"] for item in result["items"]] == sources[1:] + sources[:1]

    model.drives.clear()
    result = run(dataset, tmp_path / "dis", "disentangled")
    assert result["apd_expression_only"] == result["aed_pose_only"] == 0.0
    assert result["apd"] == pytest.approx(result["apd_copy"])
    assert result["apd_between"] > 1 and result["apd_leak"] > 0
    item = result["items"][0]
    assert len({item["source"], item["pose"], item["expression"]}) == 3
    both, expression_only, pose_only = model.drives[:3]
    np.testing.assert_array_equal(both.expressions, expression_only.expressions)
    assert (pose_only.expressions == both.source_expression).all()


def test_fewer_people(dataset, model, tmp_path):
    """The first of the split, with all clips of theirs."""
    people = list(dict.fromkeys(ClipDataset(dataset, "validation").index["identity"]))
    assert len(people) == 3
    result = run(dataset, tmp_path / "self", "self", max_people=2)
    measured = [item["clip"] for item in result["items"]]
    assert len(measured) == 2
    assert all(clip.startswith(name) for clip, name in zip(measured, people[:2], strict=True))
    result = run(dataset, tmp_path / "cross", "cross", max_people=2)
    first, second = result["items"]
    assert (first["source"], first["driver"]) == (second["driver"], second["source"])
    with pytest.raises(UserError, match="--max_people=2: --protocol=disentangled needs 3"):
        run(dataset, tmp_path / "out", "disentangled", max_people=2)
    with pytest.raises(UserError, match="--max_people=0: at least 1"):
        run(dataset, tmp_path / "out", "self", max_people=0)


@pytest.mark.parametrize("protocol", protocols.PROTOCOLS)
def test_pictures_are_kept_of_what_is_shown_alone(model, tmp_path, monkeypatch, protocol):
    """Of more items than a page shows, and copied: a view keeps all frames of its clip."""
    if protocol == "synthetic":
        data = "synthetic:identities=20,frames=3,size=64,holdout=0.4"
    else:
        data = fixtures.make_dataset(tmp_path / "data", clips=1, frames=4, validation_clips=7)
    kept = []
    write = protocols.write_results

    def keeping(out, about, found):
        kept.append(found)
        return write(out, about, found)

    monkeypatch.setattr(protocols, "write_results", keeping)
    run(data, tmp_path / "out", protocol)
    (found,) = kept
    assert len(found.items) >= 7 and len(found.rows) == SHOWN_ROWS
    assert all(picture.base is None for row in found.rows for picture in row)


def test_clips_of_people_are_read_when_they_are_asked_for(dataset, model, monkeypatch):
    alive = []
    get = ClipDataset.__getitem__

    def reading(clips, number):
        clip = get(clips, number)
        alive.append(weakref.ref(clip))
        return clip

    monkeypatch.setattr(ClipDataset, "__getitem__", reading)
    clips = ClipDataset(dataset, "validation", cache_bytes=1)  # keeps the last clip alone
    people = one_clip_each(protocols.Runner(model, Sampling(), 4), clips, 3, "cross")
    assert len(people) == 3 and not alive
    names = []
    for clip in people:
        names.append(clip.identity)
        assert sum(one() is not None for one in alive) <= 2  # the one before goes with the name
    assert names == clips.index["identity"]
    assert [clip.identity for clip in people[1:]] == names[1:]


class TruthfulModel(CopyModel):
    """Gives the very frame that an expression belongs to; who deafens it gives the source's."""

    deaf = False

    def __init__(self, dataset):
        super().__init__()
        self.pictures, self.openings = {}, {}
        clips = ClipDataset(dataset, "validation")
        for clip in (clips[number] for number in range(len(clips))):
            inputs = model_inputs(self, clip, np.arange(len(clip)))
            _, latents = self.encode(inputs["pose_image"], inputs["expression_image"])
            opened = openings(clip.mask_polygons)
            for index, picture in enumerate(inputs["image"]):
                self.pictures[latents[index].tobytes()] = picture
                self.openings[picture.tobytes()] = opened[index]

    def animate(self, source, drive, sampling, report=None):
        for latent in drive.expressions:
            yield self.pictures[(drive.source_expression if self.deaf else latent).tobytes()][None]

    def read(self, picture):
        return Estimate(np.zeros(3), np.zeros(2), self.openings[picture.tobytes()])


@pytest.mark.parametrize("protocol", ["self", "cross"])
def test_eyes_and_mouth_of_the_truth(dataset, tmp_path, monkeypatch, model, protocol):
    """The driving frame itself follows it as far as it goes; the source's expression gives the source's picture."""
    truthful = TruthfulModel(dataset)
    monkeypatch.setattr(protocols, "load_model", lambda weights: truthful)
    result = run(dataset, tmp_path / "out", protocol, estimator=truthful.read, max_frames=8)
    for part in ("mouth", "eyes"):
        for name in ("r", "slope", "r_ceiling", "slope_ceiling"):
            assert result[f"{part}_{name}"] == pytest.approx(1)
        assert result[f"{part}_r_control"] == 0
    assert result["faces_found"] == result["faces_found_control"] == 1
    if protocol == "self":
        assert result["psnr"] == result["parts_psnr"] == 100
        # Without the driver's expression this model repeats the source.
        clip = ClipDataset(dataset, "validation")[0]
        runner = protocols.Runner(truthful, Sampling(), 8)
        (indices,) = runner.parts(len(clip))
        copies = np.repeat(runner.pictures(clip, [0]), len(indices), 0)
        masks = clip_masks(clip, indices, 64)
        copied = metrics.masked_psnr(copies, runner.pictures(clip, indices), masks)
        item = result["items"][0]
        assert item["parts_psnr_own_expression"] == pytest.approx(copied.mean())
        assert item["expression_use_db"] == pytest.approx(100 - copied.mean())
        assert copied.mean() < 30

    monkeypatch.setattr(TruthfulModel, "deaf", True)
    result = run(dataset, tmp_path / "deaf", protocol, estimator=truthful.read)
    assert result["mouth_r"] == result["eyes_r"] == result["mouth_slope"] == 0
    assert result["mouth_r_ceiling"] == pytest.approx(1)
    assert result.get("expression_use_db", 0) == 0


def test_grids_and_the_page(dataset, model, tmp_path):
    """Every cell of a copy is its row's portrait; page and metrics.json say which clips and frames are shown."""
    for protocol, names in (
        ("cross", ["grid"]),
        ("disentangled", ["grid_expression_only", "grid_pose_only"]),
    ):
        out = tmp_path / protocol
        result = run(dataset, out, protocol)
        page = (out / "report.html").read_text()
        assert list(result["grids"]) == names and page.count("data:image/png") == len(names) + 1
        for name in names:
            grid = cv2.imread(str(out / f"{name}.png"))
            assert grid.shape == (3 * 132 + 138, 6 * 132 + 138, 3)
            for row in range(3):
                top = 142 + 132 * row
                portrait = grid[top + 4 : top + 124, 4:124]
                cell = grid[top + 4 : top + 124, 142 + 132 + 4 : 142 + 132 + 124]
                np.testing.assert_array_equal(cell, portrait)
            frames = result["grids"][name]["drivers"]
            assert len(frames) == 6 and all(0 < one["frame"] < 12 for one in frames)
            assert f"{frames[0]['clip']} frame {frames[0]['frame']}" in page
        for name, value in result.items():
            if isinstance(value, float) and name != "seconds":
                assert f"<th>{name}</th><td>{value:.3g}</td>" in page
    assert "driver&#x27;s expression" not in page  # the drivers' table is that of self and cross


@pytest.mark.parametrize("protocol", ["self", "cross", "disentangled", "flicker"])
def test_every_frame_weighs_the_same_whatever_clip_it_is_of(model, tmp_path, protocol):
    lengths = {f"drawn{number}": length for number, length in enumerate((3, 6, 12, 4))}
    model.config.data.frame_stride = 1

    def clips():
        return (
            fixtures.make_clip(number, length) for number, length in enumerate(lengths.values())
        )

    data = builder.write_dataset({"train": clips, "validation": clips}, tmp_path / "data")
    result = run(data, tmp_path / "out", protocol, max_frames=99)
    drivers = {"self": ("clip",), "cross": ("driver",), "flicker": ("clip",)}

    def frames(item, least):
        names = [item[key] for key in drivers.get(protocol, ("pose", "expression"))]
        return min(lengths[name.split("-")[0]] for name in names) - least

    measured = {
        name: np.array([item[name] for item in result["items"]])
        for name in result["items"][0]
        if name.startswith(
            ("psnr", "ssim", "lpips", "parts", "apd", "aed", "faces_found", "warped")
        )
    }
    assert len(measured) > 2
    for name, values in measured.items():
        # The source is no frame that is measured; to a warping error belong two.
        weights = [frames(item, 2 if "warped" in name else 1) for item in result["items"]]
        assert result[name] == pytest.approx(np.average(values, weights=weights)), name
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Means over all frames" in page


def test_pictures_without_a_face_are_counted_not_measured(dataset, model, tmp_path):
    result = run(dataset, tmp_path / "cross", "cross", estimator=lambda picture: None)
    assert result["apd"] is None and result["aed"] is None and result["faces_found"] == 0.0


@pytest.mark.parametrize(
    ("clip_length", "max_frames", "frames", "expected"),
    [
        (1, 4, 12, [[1, 4, 8, 11]]),
        (1, 99, 4, [[1, 2, 3]]),
        (4, 8, 30, [[1, 3, 5, 7], [23, 25, 27, 29]]),
        (4, 4, 12, [[1, 3, 5, 7]]),
        (4, 4, 8, [[1, 3, 5, 7]]),  # just room for the stride
        (4, 4, 7, [[1, 2, 3, 4]]),
        (8, 16, 6, [[1, 2, 3, 4, 5]]),
        (8, 3, 30, [[1, 3, 5, 7, 9, 11, 13, 15]]),  # never shorter than the model's own clips
        (24, 16, 60, [list(range(1, 49, 2))]),
    ],
)
def test_which_frames_are_made(clip_length, max_frames, frames, expected):
    runner = protocols.Runner(CopyModel(clip_length), Sampling(), max_frames)
    assert [part.tolist() for part in runner.parts(frames)] == expected


def test_refusals(dataset, model, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="disentangled needs 3 people"):
        run(
            fixtures.make_dataset(tmp_path / "few", clips=1, validation_clips=2),
            out,
            "disentangled",
        )
    with pytest.raises(UserError, match="self, cross"):
        run(dataset, out, "other")
    with pytest.raises(UserError, match="split"):
        run(dataset, out, "self", split="nothing")
    assert not out.exists()
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="something else than an evaluation"):
        run(dataset, out, "self", overwrite=True)
    (out / "thesis.txt").rename(out / "metrics.json")
    with pytest.raises(UserError, match="something else than an evaluation"):
        run(dataset, out, "self", overwrite=True)  # other programs write one too
    (out / "report.html").write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        run(dataset, out, "self")
    assert (out / "metrics.json").read_text() == "mine"
    assert run(dataset, out, "self", overwrite=True)["frames"] == 24
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_an_out_that_cannot_be_written_is_found_before_measuring(
    dataset, model, tmp_path, monkeypatch
):
    """Also the folder one is in: replaced, it would be gone from under whoever stands there."""
    (tmp_path / "file").write_text("mine")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    for out, message in (
        (tmp_path / "file" / "below", "file is a file; choose another folder"),
        (".", "--out=. is the folder you are in.* such as --out=evaluation"),
        (here, "is the folder you are in"),
        ("new/..", "is the folder you are in"),
        ("..", "something else than an evaluation"),
        (tmp_path / "new" / ".." / "mine", "something else than an evaluation"),
    ):
        with pytest.raises(UserError, match=message) as error:
            run(dataset, out, "self", overwrite=True)
        assert "\n" not in str(error.value)
    with monkeypatch.context() as patched:
        patched.setattr(files.os, "access", lambda path, mode: False)
        with pytest.raises(UserError, match="no permission to write in"):
            run(dataset, tmp_path / "out", "self")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "is_mount", lambda path: path.name == "disk")
        (tmp_path / "disk").mkdir()
        with pytest.raises(UserError, match="disk is a mounted disk.*disk/evaluation"):
            run(dataset, tmp_path / "disk", "self")
    assert model.drives == [] and not any(here.iterdir())
    run(dataset, "below/../out", "self")
    assert (here / "out" / "metrics.json").is_file()


def test_figures_are_said_before_they_are_written(dataset, model, tmp_path, monkeypatch, capsys):
    def full(*arguments):
        assert "self, 3 items, 24 frames: psnr " in capsys.readouterr().out
        raise UserError("cannot write out: the disk is full; free some space")

    monkeypatch.setattr(protocols, "write_results", full)
    with pytest.raises(UserError, match="disk is full"):
        run(dataset, tmp_path / "out", "self")


@pytest.mark.parametrize("protocol", protocols.PROTOCOLS)
def test_the_command_line_knows_every_protocol(protocol):
    flags = ["--weights=w", "--data=d", f"--protocol={protocol}", "--out=o"]
    assert cli._parse("evaluate", cli.JOBS["evaluate"], flags)[0]["protocol"] == protocol


def test_help_says_that_identity_is_not_measured(capsys):
    assert cli.run(["evaluate", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "not whether the source's identity is kept, which is not measured on real clips" in said


def test_distances():
    first = Estimate(np.array([0.0, 179.0, 5.0]), np.array([0.5, 0.0]))
    second = Estimate(np.array([3.0, -179.0, 1.0]), np.array([0.0, 0.1]))
    assert pose_distance(first, second) == pytest.approx((3 + 2 + 4) / 3)
    assert expression_distance(first, second) == pytest.approx(0.3)
    assert MOVING.sum() == len(BLENDSHAPES) - 7


def test_a_damaged_frame_is_one_line_and_leaves_nothing(model, tmp_path):
    """Figures of the other clips would not be figures of this dataset."""
    whole, torn = (fixtures.make_clip(number, 6, 64) for number in range(2))
    torn = dataclasses.replace(torn, frames=[*torn.frames[:4], b"no jpeg", *torn.frames[5:]])
    splits = {name: lambda: [whole, torn] for name in ("train", "validation")}
    data = builder.write_dataset(splits, tmp_path / "data")
    with pytest.raises(UserError, match=f"data is damaged: clip {torn.clip_id}: frame 4"):
        run(data, tmp_path / "out", "self")
    assert not (tmp_path / "out").exists()
