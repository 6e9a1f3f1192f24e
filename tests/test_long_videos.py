"""animate on long videos and short ones: what a frame costs in memory, from the driver's file to the result's,
and clips that fill no window.
"""

import gc
import os
import tempfile
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_pipelines import video
from data_pipelines.video_writing import VideoWriter
from dexportrait_jax import animate, pose_transfer
from dexportrait_jax.animator_inference import AnimatorModel
from dexportrait_jax.animator_windows import DenoiserPrograms
from dexportrait_jax.config import load_config
from tests.data_pipelines.prepare import scripted

LATENT = (32, 32, 4)  # 16 KiB a frame
CODE = 512  # numbers of an expression, the paper's: 2 KiB a frame
# What may stay in memory of a frame: blendshapes, box, pose, numbers and times, most of them twice for a while.
# Pictures, landmarks, codes and latents are 30 KB here and 200 KB at 512 pixels.
BYTES_A_FRAME = 1500


class Faces(animate.Faces):
    landmarker = scripted.ScriptedLandmarker()


class Animator(AnimatorModel):
    """The animator's loop over windows with networks that cost nothing."""

    fails_after = None  # frames decoded

    def __init__(self):
        config = load_config("configs/animator_video.py:tiny", ["sampling.steps=4"])
        description = {"stage": config.stage, "step": 1, "groups": {}, "crop": None}
        super().__init__(description, config, {"temporal": None}, {})
        self.decoded, self.windows = 0, set()
        self._decode = self._decoded
        self._source = lambda params, source, pose: (np.zeros((1, *LATENT), np.float32), {}, None)

    def encode(self, pose_images, expression_images):
        poses = pose_transfer.join_pose(np.eye(3), np.zeros(3), np.array(1.0))
        return np.repeat(poses[None], len(pose_images), 0), np.zeros((len(pose_images), CODE), "f4")

    def _denoiser(self, null):
        def predict(params, latents, timesteps, conditions):
            self.windows.add(len(latents))
            return 0.1 * latents

        nothing = lambda params, given: {}  # noqa: E731
        return DenoiserPrograms(nothing, nothing, predict)

    def _decoded(self, params, latents):
        self.decoded += len(latents)
        if self.fails_after is not None and self.decoded > self.fails_after:
            raise RuntimeError("the device is gone")
        return np.zeros((len(latents), 64, 64, 3), np.float32)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    cv2.imwrite(str(folder / "source.png"), scripted.picture()[..., ::-1])
    image = scripted.picture().astype(int)
    # Noise, so that the crop's JPEGs weigh what those of real pictures do.
    image[40:] += np.random.default_rng(0).integers(-40, 40, image[40:].shape)
    with VideoWriter(folder / "driver.mp4", 25) as writer:
        for _ in range(400):
            writer.write(image.astype(np.uint8))
    return folder


@pytest.fixture
def run(files, tmp_path, monkeypatch):
    """Animates so many frames; what is spilled goes to `tmp_path / "spilled"`."""
    model = Animator()
    monkeypatch.setattr(animate, "load_model", lambda weights: model)
    monkeypatch.setattr(animate, "Faces", Faces)
    (tmp_path / "spilled").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spilled"))
    flags = {"source": str(files / "source.png"), "driving": str(files / "driver.mp4")}

    def make(frames):
        out = tmp_path / "result.mp4"
        animate.run_animate("weights", out=str(out), max_frames=frames, overwrite=True, **flags)
        return out

    make.model = model
    return make


def test_memory_does_not_grow_with_the_video(run):
    def peak(frames):
        gc.collect()
        tracemalloc.start()
        run(frames)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    run(4)  # what is imported and cached once
    assert (peak(399) - peak(40)) / 359 < BYTES_A_FRAME


def test_nothing_is_left_on_disk_after_an_error(run, tmp_path):
    run.model.fails_after = 16
    with pytest.raises(RuntimeError, match="gone"):
        run(60)
    gc.collect()
    assert not list((tmp_path / "spilled").iterdir())
    assert not list(tmp_path.glob("*.mp4"))
    assert str(tmp_path / "spilled") not in Path("/proc/self/maps").read_text()
    opened = [os.path.realpath(entry.path) for entry in os.scandir("/proc/self/fd")]
    assert not [path for path in opened if str(tmp_path / "spilled") in path]


@pytest.mark.parametrize("frames", [3, 30])
def test_a_driver_shorter_than_a_window_and_a_longer_one(frames, run, capsys):
    """The denoiser sees whole windows of 8 in any case, and progress ends at its total, once."""
    path = run(frames)
    assert sum(1 for _ in video.read_frames(path)) == frames
    assert run.model.windows == {8}
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("animate ")]
    done = [int(line.split(": ")[1].split("/")[0]) for line in told]
    assert done == sorted(done) and done.count(frames) == 1
    assert done[-1] == frames and f"{frames}/{frames} frames" in told[-1]
