"""Frames of any video that FFmpeg reads, upright and in RGB, and pictures; `video_writing.py` writes."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np

from data_pipelines import high_dynamic_range
from dexportrait_jax.errors import UserError

# FFmpeg's, which PyAV gives as numbers without a name.
AVCOL_SPC_UNSPECIFIED = 2
HDR = (high_dynamic_range.PQ, high_dynamic_range.HLG)
# Pixels of a side: x264 writes no more, and from 32767 on MediaPipe ends the process.
LONGEST_SIDE = 16384
SLACK = 2  # frames that a whole file may lack at its end: edit lists and decoders drop some
# What a disk or a mount says that does not answer, or is not there any more.
AWAY = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ETIMEDOUT, errno.EHOSTDOWN}


class DiskError(UserError):
    """The disk of a video does not answer: a fault of the machine, and not of the video.

    Attributes:
        why: what the system says of it.
    """

    def __init__(self, path: str | os.PathLike, why: str):
        super().__init__(
            f"{path} cannot be read ({why}): its disk does not answer; start the same command again when it does"
        )
        self.why = why


class TooLargeError(UserError):
    """A picture with a side longer than LONGEST_SIDE."""


class Frame(NamedTuple):
    """One decoded frame: uint8 RGB (H, W, 3), upright, and its time in seconds from the first."""

    image: np.ndarray
    time: float


class VideoInfo(NamedTuple):
    """What the file says of itself; `frames` is 0 where it does not say."""

    width: int
    height: int
    fps: float
    frames: int


def probe(path: str | os.PathLike) -> VideoInfo:
    """Reads the header of a video; width and height are of the upright picture.

    Raises:
        UserError: it is missing, not a video, its first frame cannot be decoded, or is larger than LONGEST_SIDE.
        DiskError: its disk does not answer.
    """
    with _from_disk(path), _open(path) as container:
        stream = container.streams.video[0]
        try:
            frame = next(container.decode(stream), None)
            if frame is None:
                raise UserError(f"{path} holds no video frames")
            height, width = _upright(frame, stream.sample_aspect_ratio, path).shape[:2]
        except av.error.FFmpegError as error:
            if error.errno in AWAY:
                raise
            raise _undecodable(path, error) from error
        return VideoInfo(width, height, _rate(stream), stream.frames)


def read_frames(
    path: str | os.PathLike,
    *,
    max_frames: int | None = None,
    on_damage: Callable[[str], None] | None = None,
) -> Iterator[Frame]:
    """Decodes a video from its start.

    Rotation metadata and non-square pixels are honoured, alpha is dropped, grey becomes RGB, HDR
    becomes SDR, and times are those of the file, so a variable rate is told truthfully. A file that is damaged in
    the middle, or cut off, ends there, and `on_damage` is told so in words. That it is cut off is known by the
    number of frames or the duration in its header, or by a last frame that is not whole: not of a stream that was
    recorded without either (live Matroska, MPEG-TS), nor of a fragmented MP4 that ends with a fragment.

    Raises:
        UserError: it is missing, not a video, not one frame can be decoded, or one is larger than
            LONGEST_SIDE.
        DiskError: its disk does not answer, at its start or in the middle. FFmpeg tells that of most files; an MP4
            whose index it could not read is to it one that has none.
    """
    with _from_disk(path), _open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        rate, aspect = _rate(stream), stream.sample_aspect_ratio
        number, first, last, end, torn = 0, None, -1.0, 0.0, False
        try:
            for packet in container.demux(stream):
                torn = packet.is_corrupt or torn and packet.size == 0  # the one at the end is empty
                for frame in packet.decode():
                    if max_frames is not None and number >= max_frames:
                        return
                    time = frame.time if frame.time is not None else number / rate
                    first, end = time if first is None else first, max(time, end)
                    time = time - first
                    if time <= last:  # some files repeat or drop time stamps
                        time = last + 1 / rate
                    last = time
                    yield Frame(_upright(frame, aspect, path), time)
                    number += 1
        except av.error.FFmpegError as error:
            if error.errno in AWAY:  # what came so far is not all there is
                raise
            if number == 0:
                raise _undecodable(path, error) from error
            if on_damage is not None:
                on_damage(f"the file is damaged after frame {number - 1} ({error.strerror})")
        else:
            if number == 0:
                raise UserError(f"{path} holds no video frames")
            why = _cut_off(stream, number, end) or ("its last frame is not whole" if torn else "")
            if on_damage is not None and number != max_frames and why:
                on_damage(f"the file is cut off after frame {number - 1}: {why}")


def read_frame(path: str | os.PathLike, number: int) -> np.ndarray:
    """One frame of a video, counted from 0, as `read_frames` gives it.

    Raises:
        UserError: it has no such frame, or cannot be read.
    """
    for index, frame in enumerate(read_frames(path, max_frames=number + 1)):
        if index == number:
            return frame.image
    raise UserError(f"{path} has no frame {number}; was it changed while it was read?")


def is_picture(path: str | os.PathLike) -> bool:
    """Whether a file is a picture, by its first bytes, so that a video is not read whole."""
    return Path(path).is_file() and cv2.haveImageReader(os.fspath(path))


def read_image(path: str | os.PathLike) -> np.ndarray:
    """A picture file, or the first frame of a video, as uint8 RGB (H, W, 3); alpha lies on white.

    Raises:
        UserError: it is missing, neither a picture nor a video, or larger than LONGEST_SIDE.
    """
    _check_file(path)
    if not is_picture(path):
        return _first_frame(path)
    data = np.frombuffer(_read(path), np.uint8)
    try:
        picture = cv2.imdecode(data, cv2.IMREAD_COLOR)
    except cv2.error as error:  # of more pixels, by its header, than it reads
        raise UserError(
            f"{path} cannot be decoded ({error.err}); give a picture of at most {LONGEST_SIDE} pixels a side"
        ) from error
    if picture is None:
        raise _neither(path)
    _check_size(path, *picture.shape[1::-1])
    raw = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)  # the only reading that keeps alpha
    if raw is not None and raw.ndim == 3 and raw.shape[2] == 4:
        whole = np.iinfo(raw.dtype).max if raw.dtype.kind == "u" else 1.0
        raw = _turned_like(raw.astype(np.float32) / whole, picture)
        alpha = raw[..., 3:]
        picture = np.round(picture * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def _turned_like(raw: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """`raw` (h, w, 4) in [0, 1] the way up that `picture` has: OpenCV keeps alpha or heeds EXIF, not both."""
    if raw.shape[:2] == picture.shape[:2] and np.abs(raw[..., :3] * 255 - picture).max() < 2:
        return raw
    ways = [np.rot90(side, turns) for side in (raw, raw[:, ::-1]) for turns in range(4)]
    ways = [way for way in ways if way.shape[:2] == picture.shape[:2]]
    return min(ways, key=lambda way: np.abs(way[..., :3] * 255 - picture).mean())


def _first_frame(path: str | os.PathLike) -> np.ndarray:
    try:
        return next(read_frames(path, max_frames=1)).image
    except (DiskError, TooLargeError):
        raise
    except UserError as error:
        raise _neither(path) from error


def _neither(path: str | os.PathLike) -> UserError:
    return UserError(
        f"{path} is neither a picture nor a video that can be read; give a JPEG, PNG or MP4"
    )


def _read(path: str | os.PathLike) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _check_file(path: str | os.PathLike) -> None:
    if not Path(path).exists():
        raise UserError(f"there is no file {path}")
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder, not a file")


@contextmanager
def _from_disk(path: str | os.PathLike) -> Iterator[None]:
    """Turns what the system says of a disk that does not answer into a DiskError about ``path``."""
    try:
        yield
    except OSError as error:  # FFmpeg's of this kind are among them
        if error.errno not in AWAY:
            raise
        raise DiskError(path, error.strerror) from error


def _open(path: str | os.PathLike):
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no file {path}")
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a video")
    try:
        container = av.open(os.fspath(path), metadata_errors="ignore")
    except (av.error.FFmpegError, OSError, ValueError) as error:
        if getattr(error, "errno", None) in AWAY:
            raise
        what = "it is empty" if path.stat().st_size == 0 else getattr(error, "strerror", error)
        raise UserError(f"{path} is not a video that can be read ({what})") from error
    if not container.streams.video:
        container.close()
        raise UserError(f"{path} has no picture in it, only sound or data")
    return container


def _cut_off(stream, number: int, end: float) -> str:
    """What the header tells of beyond ``number`` frames, the last of them at ``end`` seconds, in words; "" if nothing.

    Where there can be an edit list it must tell of frames and of time: what the list hides is counted, but takes no
    time. Where it does not count the frames, or only those of a first fragment, time must do.
    """
    lacking = stream.frames - number
    if 0 <= lacking <= SLACK:
        return ""
    promised = _promised_end(stream, counted=lacking > 0)
    # The last frame takes its time, too.
    late = promised is not None and (promised - end) * _rate(stream) > 1 + SLACK
    if lacking > 0:
        edited = "mov" in stream.container.format.name.split(",") and promised is not None
        return "" if edited and not late else f"its header tells of {stream.frames} frames"
    return f"its header tells of {promised:.2f} seconds" if late else ""


def _promised_end(stream, counted: bool) -> float | None:
    """When the last frame ends by the header, in seconds as of frames' times; None where it does not tell."""
    if stream.duration is not None:
        # Of fragments FFmpeg tells the time where the last one ends, and not how long they take together.
        start = (stream.start_time or 0) if counted else 0
        return float((start + stream.duration) * stream.time_base)
    # Only Matroska has tags of a stream, and the duration of all beside them, which is right after a cut, too.
    tag = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))
    whole = stream.container.duration
    if whole is None:
        return None
    if tag:
        hours, minutes, seconds = map(float, tag.groups())
        return min(3600 * hours + 60 * minutes + seconds, whole / av.time_base)
    # Of several streams another may be the longest; with a bit rate it may be reckoned from the file's size.
    alone = len(stream.container.streams) == 1 and not stream.codec_context.bit_rate
    return whole / av.time_base if alone else None


def _undecodable(path: str | os.PathLike, error: av.error.FFmpegError) -> UserError:
    unknown = isinstance(error, av.error.DecoderNotFoundError)
    advice = "convert it to H.264" if unknown else "is it complete?"
    return UserError(f"{path} cannot be decoded ({error.strerror}); {advice}")


def _rate(stream) -> float:
    rate = stream.average_rate or stream.base_rate or stream.guessed_rate
    return float(rate) if rate else 25.0


def _matrix(frame: av.VideoFrame) -> str | None:
    """The colour matrix of a frame that tells none: BT.709 where it is HD, as in players; None leaves it to FFmpeg.

    FFmpeg takes all that is untagged as BT.601, which moves the reds and greens of an HD video by up to 16 of 255.
    HDR is of BT.2020, in any size.
    """
    told = frame.colorspace != AVCOL_SPC_UNSPECIFIED
    if not told and frame.color_trc in HDR:
        return "bt2020"
    return None if told or (frame.width < 1280 and frame.height <= 576) else "ITU709"


def _check_size(path: str | os.PathLike, width: int, height: int) -> None:
    if max(width, height) > LONGEST_SIDE:
        raise TooLargeError(
            f"{path} is {width} x {height} pixels; scale it down to at most {LONGEST_SIDE} a side"
        )


def _upright(frame: av.VideoFrame, aspect: Fraction | None, path: str | os.PathLike) -> np.ndarray:
    """The picture as it is meant to be seen on an SDR screen, of square pixels.

    ``aspect``: width of a stored pixel by its height, None where the file does not say. It is of the
    picture as stored: what is turned afterwards grows in height. As in players, rows stay as they are.
    """
    # Beyond four to one it is a damaged header, and no picture that anybody filmed.
    square = not aspect or not 1 / 4 <= aspect <= 4
    wanted = frame.width if square else max(1, round(frame.width * aspect))
    _check_size(path, max(wanted, frame.width), frame.height)
    hdr = frame.color_trc in HDR
    image = frame.to_ndarray(format="rgb48" if hdr else "rgb24", src_colorspace=_matrix(frame))
    if hdr:
        image = high_dynamic_range.to_srgb(image, frame.color_trc)
    if wanted != frame.width:
        method = cv2.INTER_AREA if wanted < frame.width else cv2.INTER_CUBIC
        image = cv2.resize(image, (wanted, frame.height), interpolation=method)
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image
