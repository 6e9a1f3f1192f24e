"""protocols.py: what is compared with what, which frames are made, what is written and what is
refused.
"""

import json

import ml_collections
import numpy as np
import pytest

from data_pipelines.augment import default_augment
from data_pipelines.dataset import ClipDataset
from data_pipelines.prepare import builder
from data_pipelines.records import BLENDSHAPES
from dexportrait_jax.errors import UserError
from dexportrait_jax.evaluation import metrics, protocols
from dexportrait_jax.evaluation.estimators import (
    MOVING,
    Estimate,
    expression_distance,
    pose_distance,
)
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
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["metrics.json", "samples.png"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == result
    for name in ("psnr", "ssim", "lpips"):
        assert result[name] == pytest.approx(result[f"{name}_copy"])
    assert 5 < result["psnr"] < 40 and result["frames"] == 12 and len(result["items"]) == 3
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
        "train": lambda: iter([whole.part(0, 8)]),
        "validation": lambda: iter([whole.part(8, 12)]),
    }
    data = builder.write_dataset(splits, tmp_path / "data")
    result = run(data, tmp_path / "out", "self", max_frames=3)
    runner = protocols.Runner(model, Sampling(), 3)
    truth, source = runner.pictures(whole, [9, 10, 11]), runner.pictures(whole, [0])
    error = np.square((truth.astype(float) - source) / 255).mean((1, 2, 3))
    assert result["psnr_copy"] == pytest.approx(np.mean(-10 * np.log10(error)), abs=0.01)
    assert (model.drives[0].source_expression != model.drives[0].expressions).any()


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
        (8, 16, 6, [[1, 2, 3, 4, 5]]),
        (8, 3, 30, [[1, 3, 5]]),
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
    with pytest.raises(UserError, match="no evaluation"):
        run(dataset, out, "self", overwrite=True)
    (out / "thesis.txt").rename(out / "metrics.json")
    with pytest.raises(UserError, match="--overwrite"):
        run(dataset, out, "self")
    assert (out / "metrics.json").read_text() == "mine"
    assert run(dataset, out, "self", overwrite=True)["frames"] == 12
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_distances():
    first = Estimate(np.array([0.0, 179.0, 5.0]), np.array([0.5, 0.0]))
    second = Estimate(np.array([3.0, -179.0, 1.0]), np.array([0.0, 0.1]))
    assert pose_distance(first, second) == pytest.approx((3 + 2 + 4) / 3)
    assert expression_distance(first, second) == pytest.approx(0.3)
    assert MOVING.sum() == len(BLENDSHAPES) - 7
