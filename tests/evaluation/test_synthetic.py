"""The protocol `synthetic` on models that are known: one draws the truth itself, one repeats the source."""

import functools

import numpy as np
import pytest

from data_pipelines.dataset import open_clips
from data_pipelines.prepare import builder
from data_pipelines.synthetic import poses, source
from data_pipelines.synthetic.dataset import run_render
from data_pipelines.synthetic.expression import EXPRESSION_PARAMETERS, neutral
from data_pipelines.synthetic.poses import pose_matrix
from dexportrait_jax.errors import UserError
from dexportrait_jax.evaluation import protocols, rendered_truth, synthetic
from dexportrait_jax.evaluation.eyes_and_mouth import part_masks
from dexportrait_jax.evaluation.runner import Runner
from dexportrait_jax.face_clips import model_inputs
from dexportrait_jax.inference import Sampling
from tests import fixtures
from tests.evaluation.test_protocols import CopyModel

DATA = "synthetic:identities=40,frames=4,size=64,holdout=0.25"
HELD_OUT = source.parse(DATA).split()["validation"]


class TruthfulModel(CopyModel):
    """Knows every picture of ``data``: its true pose (in a gauge) and parameters. Draws with the renderer."""

    gauge = np.eye(4)
    deaf = False  # to the expression

    def __init__(self, data=DATA, splits=("train", "validation")):
        super().__init__()
        self.known, self.faces = self.frontal(), {}
        for split in splits:
            clips = open_clips(data, split)
            for clip in (clips[number] for number in range(len(clips))):
                truth = synthetic.truth_of(clip)
                inputs = model_inputs(self, clip, np.arange(len(clip)))
                for index in range(len(clip)):
                    key = inputs["expression_image"][index].tobytes()
                    gauge = self.gauge_of(truth.seed)
                    self.known[key] = truth.pose[index] @ gauge, truth.expression[index]
                    self.faces[inputs["image"][index].tobytes()] = truth

    def frontal(self):
        known = {}
        for seed in HELD_OUT:
            still = model_inputs(self, synthetic.frontal_clip(seed, 64), [0])["expression_image"][0]
            known[still.tobytes()] = np.eye(3, 4) @ self.gauge_of(seed), neutral()
        return known

    def gauge_of(self, seed):
        return self.gauge

    def encode(self, pose_images, expression_images):
        found = [self.known[picture.tobytes()] for picture in expression_images]
        poses, expressions = (np.stack(parts) for parts in zip(*found, strict=True))
        return poses, expressions[:, ::-1] * 3 + 1  # any invertible code of them

    def animate(self, source, drive, sampling, report=None):
        truth = self.faces[source.tobytes()]
        for pose, latent in zip(drive.poses, drive.expressions, strict=True):
            latent = drive.source_expression if self.deaf else latent
            expression = ((latent - 1) / 3)[::-1]
            yield truth.render(expression, pose @ np.linalg.inv(self.gauge), 64).image[None]


def _run(monkeypatch, tmp_path, model, data=DATA):
    monkeypatch.setattr(protocols, "load_model", lambda weights: model)
    return protocols.run_evaluate("weights", data, "synthetic", str(tmp_path / "out"), max_frames=3)


def test_the_truth_gets_the_best_figures(monkeypatch, tmp_path):
    """Even in another gauge: the pose error is what is left once one gauge is taken away."""
    gauge = np.eye(4)
    turn = np.deg2rad(25)
    gauge[:3, :3] = 1.2 * np.array(
        [[np.cos(turn), 0, np.sin(turn)], [0, 1, 0], [-np.sin(turn), 0, np.cos(turn)]]
    )
    gauge[:3, 3] = 0.1, -0.05, 0.0
    monkeypatch.setattr(TruthfulModel, "gauge", gauge)
    result = _run(monkeypatch, tmp_path, TruthfulModel())
    assert result["pose_error_degrees"] < 0.01 and result["scale_error"] < 1e-3
    assert result["shift_error"] < 1e-3 and result["expression_r2"] > 0.99
    assert result["gauge_spread_degrees"] < 0.01 and result["frontal_spread_degrees"] < 0.01
    for name in EXPRESSION_PARAMETERS.names:
        assert result[f"expression_r2/{name}"] > 0.99
    # Drawn again without the JPEG in between: what that costs is all that is missing.
    assert result["self_psnr"] > 33
    assert result["cross_psnr"] > 50 and result["disentangled_psnr"] > 50
    assert result["disentangled_gain_db"] > 25 and result["expression_use_db"] > 20
    baselines = [result[f"disentangled_{name}"] for name in ("copy", "rigid", "mean")]
    assert result["disentangled_gain_db"] == pytest.approx(
        result["disentangled_psnr"] - max(baselines)
    )
    # Each driven alone: what is driven is followed, what is not stays.
    assert result["pose_only_follows_pose"] == pytest.approx(1, abs=1e-3)
    assert result["pose_only_follows_expression"] == pytest.approx(0, abs=1e-3)
    assert result["expression_only_follows_expression"] == pytest.approx(1, abs=1e-3)
    assert result["expression_only_follows_pose"] == pytest.approx(0, abs=1e-3)
    for name in ("pose_leak_r2", "placement_leak_r2", "identity_leak", "expression_in_pose_r2"):
        assert name in result
    assert (tmp_path / "out" / "samples.png").stat().st_size > 10_000
    assert len(result["items"]) == len(open_clips(DATA, "validation"))  # one each


def test_a_model_deaf_to_expressions_is_found_out(monkeypatch, tmp_path):
    monkeypatch.setattr(TruthfulModel, "deaf", True)
    result = _run(monkeypatch, tmp_path, TruthfulModel())
    assert result["expression_use_db"] == 0
    assert result["disentangled_psnr"] < 35
    assert abs(result["expression_only_follows_expression"]) < 0.05
    assert result["pose_only_follows_pose"] == pytest.approx(1, abs=1e-3)


def test_a_gauge_that_drifts_with_identity_spreads_frontal_poses():
    """Every second head is found 12 degrees aside: R of frontal faces tells, whatever the common gauge."""

    class DriftingModel(TruthfulModel):
        def __init__(self):
            self.known = self.frontal()

        def gauge_of(self, seed):
            return self.gauge if seed % 2 else self.gauge @ turned

    turned = np.eye(4)
    turned[:3, :3] = poses.rotation(0, 12, 0)
    runner, clips = Runner(DriftingModel(), Sampling(), 3), open_clips(DATA, "validation")
    # The chordal mean of turns about one axis is the direction of the mean of their unit vectors.
    angles = np.deg2rad([0 if seed % 2 else 12 for seed in HELD_OUT])
    mean = np.arctan2(np.sin(angles).mean(), np.cos(angles).mean())
    expected = np.degrees(np.abs(angles - mean).mean())
    assert expected > 3
    assert synthetic.frontal_spread(runner, clips) == pytest.approx(expected, abs=1e-4)


def test_people_that_the_probes_know_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(protocols, "load_model", lambda weights: CopyModel())
    with pytest.raises(UserError, match="split 'train' shows 10 of them") as error:
        protocols.run_evaluate(
            "weights",
            "synthetic:identities=10,frames=2,size=32,holdout=0",
            *("synthetic", str(tmp_path / "out"), "train"),
        )
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["picture", "parameters"])
def test_a_dataset_of_another_renderer_is_refused(monkeypatch, tmp_path, change):
    """Its truths would not be its pictures, and every dB wrong; JPEG alone is no such difference."""
    data = tmp_path / "heads"
    run_render(data, identities=9, frames=2, size=32, holdout_fraction=0.4, workers=1)
    splits = [open_clips(str(data), split) for split in ("train", "validation")]
    rendered_truth.check_same_renderer(splits)
    if change == "picture":  # a version that lights heads otherwise
        now = rendered_truth.render

        def darker(*arguments, **options):
            drawn = now(*arguments, **options)
            return drawn._replace(image=(drawn.image * 0.9).astype(np.uint8))

        monkeypatch.setattr(rendered_truth, "render", darker)
    else:
        other = ("mood", *EXPRESSION_PARAMETERS.names[1:])
        monkeypatch.setattr(
            rendered_truth, "EXPRESSION_PARAMETERS", EXPRESSION_PARAMETERS._replace(names=other)
        )
    with pytest.raises(UserError, match="another version of the renderer") as error:
        _run(monkeypatch, tmp_path, CopyModel(), str(data))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_repeating_the_source_gains_nothing(monkeypatch, tmp_path):
    result = _run(monkeypatch, tmp_path, CopyModel())
    for name in ("self", "cross", "disentangled"):
        assert result[f"{name}_psnr"] == pytest.approx(result[f"{name}_copy"])
    assert result["disentangled_gain_db"] <= 0 and result["expression_use_db"] == 0
    assert result["pose_error_degrees"] > 10 and result["expression_r2"] < 0.3
    assert result["pose_only_follows_pose"] == result["expression_only_follows_expression"] == 0


def test_every_frame_weighs_the_same_whoever_it_shows(monkeypatch, tmp_path):
    lengths = {}

    def cut(split):
        clips = open_clips("synthetic:identities=14,frames=6,size=64,holdout=0.3", split)
        for number in range(len(clips)):
            length = 2 + number % 5
            lengths[clips[number].clip_id] = length
            yield clips[number].part(0, length)

    splits = {split: functools.partial(cut, split) for split in ("train", "validation")}
    data = builder.write_dataset(splits, tmp_path / "heads")
    result = _run(monkeypatch, tmp_path, CopyModel(), str(data))
    items = result["items"]
    for name, drivers in (
        ("self_psnr", ("source",)),
        ("disentangled_psnr", ("pose", "expression")),
    ):
        # Three frames at most, and the source is none of them.
        weights = [min(3, *(lengths[item[key]] - 1 for key in drivers)) for item in items]
        assert len(set(weights)) > 1
        expected = np.average([item[name] for item in items], weights=weights)
        assert result[name] == pytest.approx(expected)


def test_other_videos_are_refused(monkeypatch, tmp_path):
    """As such before anything else, also where they show too few people, or people that were trained on."""
    few = fixtures.make_dataset(tmp_path / "few", clips=2, frames=4, validation_clips=2)
    clips = [fixtures.make_clip(number, 4) for number in range(3)]
    in_time = {
        "train": lambda: (clip.part(0, 2) for clip in clips),
        "validation": lambda: (clip.part(2, 4) for clip in clips),
    }
    known = builder.write_dataset(in_time, tmp_path / "known")
    for data in (few, known):
        with pytest.raises(UserError, match="no rendered head") as error:
            _run(monkeypatch, tmp_path, CopyModel(), str(data))
        assert "`dexportrait render`" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("synthetic:identities=5,frames=2,holdout=0.2", "has [12]: "),
        (
            "synthetic:identities=10,frames=1,holdout=0.4",
            "has 0, [0-9] more in clips of one frame alone: ",
        ),
    ],
)
def test_of_few_people_more_are_asked_for(monkeypatch, tmp_path, data, words):
    """And nothing that would only be refused for another reason, such as --holdout=time."""
    advice = "`dexportrait render` more --identities, or a larger --holdout_fraction"
    with pytest.raises(UserError, match=f"synthetic needs 3 people.*{words}{advice}") as error:
        _run(monkeypatch, tmp_path, CopyModel(), data)
    assert "time" not in str(error.value) and not (tmp_path / "out").exists()


def test_masks_of_eyes_and_mouth_leave_out_what_hides_them():
    """Of a head turned by 60 degrees they show eyes and mouth still, and neither background nor hair."""
    clip = open_clips(DATA, "validation")[0]
    truth = synthetic.truth_of(clip)
    turned = np.stack([pose_matrix(0, yaw) for yaw in (60, -60)])
    runner = Runner(CopyModel(), Sampling(), 3)
    expressions = np.repeat(truth.expression[:1], 2, 0)
    pictures, masks = synthetic._rendered(runner, clip, truth, expressions, turned)
    for expression, pose, picture, mask in zip(expressions, turned, pictures, masks, strict=True):
        drawn = truth.render(expression, pose, 64)
        np.testing.assert_array_equal(picture, drawn.image)
        whole = part_masks([drawn.polygons], 64)[0] > 0
        assert mask.dtype == np.uint8 and not (mask[~whole]).any()
        hidden = whole & (drawn.face_mask < 128)
        assert hidden.sum() > 0.04 * whole.sum() and not mask[hidden].any()
        assert mask[whole & (drawn.face_mask > 127)].all()


def test_a_rigid_move_follows_the_pose():
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    here, there = np.eye(3, 4), np.eye(3, 4)
    np.testing.assert_array_equal(synthetic.move_rigidly(picture, here, here), picture)
    there[0, 3] = 0.25  # 8 pixels to the right
    moved = synthetic.move_rigidly(picture, here, there)
    np.testing.assert_array_equal(moved[:, 8:], picture[:, :-8])
