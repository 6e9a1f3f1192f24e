"""Portraits and drivers from files, cropped and encoded exactly as the training data were."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Collection
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float, Int, UInt8

from data_pipelines import spill, video
from data_pipelines.network_inputs import inference_inputs
from data_pipelines.prepare.clips import clip_from_first_usable, clip_from_image
from data_pipelines.prepare.crop import Settings
from data_pipelines.prepare.detect import Landmarker
from data_pipelines.prepare.driver import Driver, driver_from_video
from data_pipelines.records import Clip
from dexportrait_jax import assets
from dexportrait_jax.errors import UserError
from dexportrait_jax.inference import BATCH, PortraitModel
from dexportrait_jax.metrics import Progress

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
# Pictures are enlarged to this side before a face is looked for: small ones are missed.
SMALLEST = 256


class Faces:
    """Pictures and videos as clips in the training data's crop; each file is read once.

    ``model`` gives the crop's constants: those in its export, and frames of its own size.
    """

    def __init__(self, model: PortraitModel):
        stored = model.description.get("crop") or {}
        known = {field.name for field in dataclasses.fields(Settings)}
        given = {name: value for name, value in stored.items() if name in known}
        self.settings = Settings(**{"size": model.image_size, **given})
        self._stack = contextlib.ExitStack()
        self._landmarker: Landmarker | None = None
        self._pictures: dict[str, Clip] = {}
        # Of videos that are portraits: the frame that is taken, where it is not the first.
        self._numbers: dict[str, int] = {}
        self._videos: dict[tuple[str, int | None, float], Driver] = {}

    def __enter__(self) -> Faces:
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    @property
    def landmarker(self) -> Landmarker:
        """The face landmarker, started when it is first needed."""
        if self._landmarker is None:
            path = assets.fetch("face_landmarker", say=lambda text: None)
            self._landmarker = self._stack.enter_context(Landmarker(path))
        return self._landmarker

    def driver(self, path: str, max_frames: int | None = None, seconds: float = 0.0) -> Driver:
        """A video as a driver; a picture is one that stands still.

        ``max_frames``, ``seconds``: how many of its frames are needed, and for how long, None for all it has. Frames
        that show no usable face, and what else is left out of a video, are told on stderr.
        """
        if is_image(path):
            return Driver.steady(self._picture(path))
        driver = self._video(path, max_frames, seconds)
        if driver.still:
            raise UserError(
                f"{path} has only one usable frame, which moves nothing; give a longer video, or save "
                "the frame as a picture for --pose or --expression"
            )
        return driver

    def portrait(
        self, path: str, driver: Driver | None = None
    ) -> tuple[Clip, UInt8[np.ndarray, "h w 3"]]:
        """The source as a clip of one frame, and the full picture it was cut from.

        Of a video the first frame with a usable face is taken, and told on stderr where the video begins otherwise.
        ``driver``: the source as its own driver; of a video the first frame of that clip, cut by the box of the whole
        clip.
        """
        if driver is not None and not is_image(path):
            return driver.clip.part(0, 1), video.read_frame(path, driver.first)
        clip, number = self._picture(path), self._numbers.get(path, 0)
        return clip, video.read_frame(path, number) if number else video.read_image(path)

    def landmarks(self, image: UInt8[np.ndarray, "n n 3"]) -> Float[np.ndarray, "478 3"] | None:
        """Face points of a generated picture in its own coordinates [-1, 1]; None without a face."""
        enlarged = enlarge(image)
        found = self.landmarker.detect(enlarged)
        return found[0].landmarks * (2 / enlarged.shape[0]) - (1, 1, 0) if found else None

    def keep(self, paths: Collection[str]) -> None:
        """Forgets all files but these: what no job is left for need not stay in memory."""
        self._pictures = {path: clip for path, clip in self._pictures.items() if path in paths}
        self._videos = {key: driver for key, driver in self._videos.items() if key[0] in paths}

    def _picture(self, path: str) -> Clip:
        if path in self._pictures:
            return self._pictures[path]
        if is_image(path) or video.is_picture(path):
            clip = clip_from_image(path, self.landmarker, self.settings)
        else:
            clip, number, why = clip_from_first_usable(path, self.landmarker, self.settings)
            if number:
                self._numbers[path] = number
                print(
                    f"note: {path} begins with {why}; the portrait is its frame {number}",
                    file=sys.stderr,
                )
        self._pictures[path] = clip
        return clip

    def _video(self, path: str, max_frames: int | None, seconds: float) -> Driver:
        key = (path, max_frames, seconds)
        if key not in self._videos:
            # What the header says: 0 where it does not, and perhaps less than there are.
            progress = Progress(f"read {Path(path).name}", video.probe(path).frames, unit="frame")
            looked = 0

            def on_frame(number: int) -> None:
                nonlocal looked
                looked = number
                progress.update(number)

            driver = driver_from_video(
                path,
                self.landmarker,
                self.settings,
                # One more: a gap behind the last is bridged to it, and a frame alone moves nothing.
                max_frames=None if max_frames is None else max_frames + 1,
                seconds=seconds,
                on_frame=on_frame,
            )
            if looked != progress.total:  # enough of it, or all: the line ends with that
                progress.total = looked
                progress.update(looked)
            if driver.left_out:
                print(f"warning: {path}: {driver.left_out}", file=sys.stderr)
            self._videos[key] = driver
        return self._videos[key]


def is_image(path: str | Path) -> bool:
    """Whether a file is taken for a still picture: by its name, as every other tool does."""
    return Path(path).suffix.lower() in IMAGES


def enlarge(image: UInt8[np.ndarray, "n n 3"]) -> UInt8[np.ndarray, "m m 3"]:
    """A square picture at SMALLEST pixels or more."""
    if image.shape[0] >= SMALLEST:
        return image
    return cv2.resize(image, (SMALLEST, SMALLEST), interpolation=cv2.INTER_CUBIC)


def encode_clip(
    model: PortraitModel, clip: Clip, indices: Int[np.ndarray, " n"] | None = None
) -> tuple[Float[np.ndarray, "n 3 4"], Float[np.ndarray, "n latent"]]:
    """Pose and expression of frames of a clip (all), with one batch of pictures in memory; expressions are on disk."""
    poses, expressions = [], None
    indices = np.arange(len(clip)) if indices is None else indices
    for first in range(0, len(indices), BATCH):
        images = model_inputs(model, clip, indices[first : first + BATCH])
        pose, expression = model.encode(images["pose_image"], images["expression_image"])
        poses.append(pose)
        if expressions is None:
            expressions = spill.zeros((len(indices), *expression.shape[1:]), expression.dtype)
        expressions[first : first + BATCH] = expression
    return np.concatenate(poses), expressions


def model_inputs(model: PortraitModel, clip: Clip, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Frames of a clip as the model's encoders want them: same masking and crop as in training."""
    return inference_inputs(
        clip, indices, model.image_size, model.pose_size, model.expression_size, model.augment
    )
