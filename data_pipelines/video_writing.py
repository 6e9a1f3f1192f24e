"""H.264 that every browser plays, whole under its name or not there at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from data_pipelines import files
from dexportrait_jax.errors import UserError

TIME_BASE = Fraction(1, 90_000)  # of videos whose frames come at a varying rate


class VideoWriter:
    """Writes an MP4 (H.264, yuv420p, index at the front) that is there whole or not at all.

    It is written under a temporary name and renamed when the `with` block ends without error.

    Args:
        path: the file to make, ending in .mp4.
        fps: frames per second.
        metadata: container tags, such as `comment` and `title`.
        quality: x264's constant rate factor, 0 (lossless) to 51.
        overwrite: replace a file that is there.

    Raises:
        UserError: the file exists, cannot be written, or is of a size that x264 refuses.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        fps: float,
        *,
        metadata: Mapping[str, str] | None = None,
        quality: int = 18,
        overwrite: bool = False,
    ):
        self.path = Path(path)
        if self.path.suffix.lower() != ".mp4":
            raise UserError(f"{path}: videos are written as MP4; give a name that ends in .mp4")
        if self.path.exists() and not overwrite:
            raise UserError(f"{path} exists already; choose another name or pass --overwrite")
        self._rate = Fraction(fps).limit_denominator(60000)
        self._metadata = dict(metadata or {})
        self._quality = quality
        self._temporary: Path | None = None
        self._opened = ExitStack()
        self._container = None
        self._stream = None
        self._shape: tuple[int, ...] | None = None

    def __enter__(self) -> VideoWriter:
        with files.writing_to(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._temporary = self._opened.enter_context(files.temporary_beside(self.path))
        return self

    def write(self, image: np.ndarray, time: float | None = None) -> None:
        """Adds one frame, uint8 RGB (H, W, 3); odd sides are padded by one pixel.

        ``time``: when it is shown, in seconds, rising from frame to frame; without it, frames come at
        the constant rate. All frames have a time or none has.
        """
        with files.writing_to(self.path):
            if self._container is None:
                self._start(image.shape, None if time is None else TIME_BASE)
            if image.shape != self._shape or image.dtype != np.uint8:
                raise ValueError(f"frame {image.shape} {image.dtype}, expected {self._shape} uint8")
            height, width = image.shape[:2]
            image = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = frame.reformat(
                format="yuv420p",
                dst_colorspace="ITU709",
                src_color_range="JPEG",
                dst_color_range="MPEG",
            )
            if time is not None:
                frame.time_base, frame.pts = TIME_BASE, round(time / TIME_BASE)
            self._container.mux(self._stream.encode(frame))

    def _start(self, shape: tuple[int, ...], time_base: Fraction | None) -> None:
        self._shape = shape
        options = {"movflags": "+faststart"}
        self._container = av.open(os.fspath(self._temporary), "w", format="mp4", options=options)
        for key, value in self._metadata.items():
            self._container.metadata[key] = value
        stream = self._container.add_stream("libx264", rate=self._rate)
        stream.height, stream.width = shape[0] + shape[0] % 2, shape[1] + shape[1] % 2
        stream.pix_fmt = "yuv420p"
        # Without macroblock-tree: its qualities of small pictures differ from run to run, and one seed is one video.
        stream.options = {"crf": str(self._quality), "preset": "medium", "mbtree": "0"}
        context = stream.codec_context  # say which YUV it is, or players guess by the size
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        context.color_range = 1
        if time_base is not None:
            context.time_base = time_base
        try:
            context.open()
        except av.error.FFmpegError as error:
            size = f"{stream.width} x {stream.height}"
            raise UserError(
                f"{self.path}: x264 makes no video of {size} pixels ({error.strerror}); give a smaller picture"
            ) from error
        self._stream = stream

    def __exit__(self, kind, value, traceback) -> None:
        try:
            with files.writing_to(self.path):
                if self._container is not None:
                    if kind is None:
                        self._container.mux(self._stream.encode())
                    self._container.close()
                if kind is None:
                    if self._container is None:
                        raise UserError(f"{self.path}: no frame was written to the video")
                    self._temporary.replace(self.path)
        except Exception:
            if kind is None:
                raise
            # The block has failed: its error goes on and is the one to be told; the file is removed either way.
        finally:
            self._opened.close()
