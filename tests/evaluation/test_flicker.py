"""The protocol `flicker` and its warping error, on pictures that move by known amounts."""

import cv2
import numpy as np
import pytest

from data_pipelines.dataset import ClipDataset
from dexportrait_jax.errors import UserError
from dexportrait_jax.evaluation import flicker, protocols
from tests import fixtures
from tests.evaluation.test_protocols import CopyModel, dataset, model, run

__all__ = ["dataset", "model"]  # fixtures


def moving(frames: int = 5, step: float = 2.0, size: int = 128) -> np.ndarray:
    """A soft pattern that moves to the right by ``step`` pixels a frame."""
    noise = np.random.default_rng(0).uniform(0, 255, (size, 2 * size, 3)).astype(np.float32)
    wide = cv2.GaussianBlur(noise, (0, 0), 4)
    wide = (wide - wide.min()) / (wide.max() - wide.min()) * 255
    pictures = []
    for number in range(frames):
        move = np.array([[1, 0, step * number - size / 2], [0, 1, 0]], np.float32)
        pictures.append(cv2.warpAffine(wide, move, (size, size), flags=cv2.INTER_LINEAR))
    return np.rint(pictures).astype(np.uint8)


def flows_of(frames: np.ndarray) -> list:
    return [
        flicker._flow(later, earlier) for earlier, later in zip(frames, frames[1:], strict=False)
    ]


def test_flow_of_a_known_move():
    for flow, known in flows_of(moving()):
        # Where a pixel of the later frame was: two to its left.
        assert known.mean() > 0.9
        np.testing.assert_allclose(np.median(flow[known], 0), [-2, 0], atol=0.1)


def test_what_moves_is_no_flicker():
    frames = moving()
    flows = flows_of(frames)
    assert flicker.warped_errors(frames, flows).max() < 0.005
    # Standing still where everything should move is as bad as what the pattern changes over two pixels.
    still = np.repeat(frames[:1], len(frames), 0)
    expected = np.abs(frames[0, :, 2:].astype(float) - frames[0, :, :-2]).mean() / 255
    assert flicker.warped_errors(still, flows).mean() == pytest.approx(expected, rel=0.1)


def test_brightness_that_jumps_is_flicker_by_hand():
    frames = moving().astype(np.float64) * 0.5 + 50
    jumping = frames + 20 * (np.arange(len(frames)) % 2)[:, None, None, None]
    errors = flicker.warped_errors(np.rint(jumping).astype(np.uint8), flows_of(moving()))
    np.testing.assert_allclose(errors, [20 / 255] * 4, rtol=0.02)


def test_a_frame_of_which_nothing_is_known_has_no_error():
    frames = moving()
    flows = flows_of(frames)
    flows[1] = flows[1][0], np.zeros_like(flows[1][1])
    assert len(flicker.warped_errors(frames, flows)) == 3


def test_what_comes_into_view_does_not_count():
    frames = moving()
    _, known = flows_of(frames)[0]
    assert not known[:, :2].any()


def test_the_protocol(dataset, model, tmp_path):
    result = run(dataset, tmp_path / "out", "flicker", max_frames=4)
    assert result["warped_error"] > 0 and result["warped_error_truth"] > 0
    assert len(result["items"]) == 3 and result["frames"] == 12
    # Consecutive, at the stride of training, which is 2 here and only a model of clips has.
    clip = ClipDataset(dataset, "validation")[0]
    runner = flicker.Runner(model, None, 4)
    for clip_length, indices in ((1, [1, 2, 3, 4]), (4, [1, 3, 5, 7])):
        model.clip_length = clip_length
        result = run(dataset, tmp_path / str(clip_length), "flicker", max_frames=4)
        truth = runner.pictures(clip, indices)
        errors = flicker.warped_errors(truth, flows_of(truth))
        assert result["items"][0]["warped_error_truth"] == pytest.approx(errors.mean())
        assert result["frame_stride"] == indices[1] - indices[0]


def test_a_model_of_clips_makes_no_run_shorter_than_its_own(dataset, model, tmp_path, monkeypatch):
    """Of the longer one, where two stand beside each other; a clip of 12 frames has 6 at this stride."""
    model.clip_length = 5
    assert run(dataset, tmp_path / "out", "flicker", max_frames=3)["frames"] == 3 * 5
    other = Flickering(clip_length=24)
    monkeypatch.setattr(protocols, "load_model", {"weights": model, "other": other}.get)
    result = run(dataset, tmp_path / "two", "flicker", max_frames=3, beside="other")
    assert result["frames"] == 3 * 6


class Flickering(CopyModel):
    """Repeats the source, brighter in every other frame."""

    def animate(self, source, drive, sampling, report=None):
        for number in range(len(drive)):
            yield np.clip(source[None].astype(int) + 20 * (number % 2), 0, 255).astype(np.uint8)


def test_two_models_on_the_same_frames(dataset, model, tmp_path, monkeypatch, capsys):
    """An image stage beside a video stage, say, on the frames of the latter, whose stride alone counts."""
    models = {"weights": model, "other": Flickering(clip_length=4)}
    model.config.data.frame_stride = 1  # which a model of single frames never reads
    monkeypatch.setattr(protocols, "load_model", models.get)
    result = run(dataset, tmp_path / "out", "flicker", max_frames=4, beside="other")
    assert result["warped_error_beside"] > result["warped_error"] + 0.03
    assert result["frames"] == 12 and result["frame_stride"] == 2
    clip = ClipDataset(dataset, "validation")[0]
    runner = flicker.Runner(model, None, 4)
    truth, source = runner.pictures(clip, [1, 3, 5, 7]), runner.pictures(clip, [0])
    error = np.square((truth.astype(float) - source) / 255).mean((1, 2, 3))
    assert result["items"][0]["psnr"] == pytest.approx(np.mean(-10 * np.log10(error)), abs=0.01)
    said = capsys.readouterr().out
    assert f"psnr {result['psnr']:.4g}" in said and "psnr_beside" in said
    turned = {"weights": models["other"], "other": model}
    monkeypatch.setattr(protocols, "load_model", turned.get)
    other = run(dataset, tmp_path / "turned", "flicker", max_frames=4, beside="other")
    assert other["warped_error_beside"] == result["warped_error"] and other["frame_stride"] == 2
    alone = run(dataset, tmp_path / "alone", "flicker", max_frames=4)
    assert alone["warped_error"] == result["warped_error_beside"] and "psnr_beside" not in alone


def test_models_that_cannot_stand_beside_each_other(dataset, model, tmp_path, monkeypatch):
    other = Flickering(clip_length=4)
    model.clip_length = 4
    monkeypatch.setattr(protocols, "load_model", {"weights": model, "other": other}.get)
    other.config.data.frame_stride = 1
    with pytest.raises(UserError, match="frame_stride=2, --beside with 1:"):
        run(dataset, tmp_path / "out", "flicker", beside="other")
    other.config.data.frame_stride, other.image_size = 2, 32
    with pytest.raises(UserError, match="64 pixels, --beside of 32"):
        run(dataset, tmp_path / "out", "flicker", beside="other")
    with pytest.raises(UserError, match="--beside is for --protocol=flicker"):
        run(dataset, tmp_path / "out", "cross", beside="other")
    assert not (tmp_path / "out").exists()


def test_clips_too_short(model, tmp_path):
    short = fixtures.make_dataset(tmp_path / "short", clips=1, frames=2, validation_clips=1)
    with pytest.raises(UserError, match="no clip .* has two frames beyond its first"):
        run(short, tmp_path / "out", "flicker")
    assert not (tmp_path / "out").exists()
