"""The one record schema: a clip of one face, cropped, with its labels <-> bytes.

A record is a serialized `tf.train.Example`, so TFDS (`tfds.builder_from_directory`) and any other reader of that
format can use it. Training must not import TensorFlow or TFDS, and a record of 300 frames must not cost a Python loop
over half a million floats, so this module reads and writes the wire format itself: packed floats become arrays at
once, and JPEG frames stay bytes until somebody wants them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LANDMARKS = 478
_BLENDSHAPES = """
    _neutral browDownLeft browDownRight browInnerUp browOuterUpLeft browOuterUpRight cheekPuff
    cheekSquintLeft cheekSquintRight eyeBlinkLeft eyeBlinkRight eyeLookDownLeft eyeLookDownRight
    eyeLookInLeft eyeLookInRight eyeLookOutLeft eyeLookOutRight eyeLookUpLeft eyeLookUpRight
    eyeSquintLeft eyeSquintRight eyeWideLeft eyeWideRight jawForward jawLeft jawOpen jawRight
    mouthClose mouthDimpleLeft mouthDimpleRight mouthFrownLeft mouthFrownRight mouthFunnel
    mouthLeft mouthLowerDownLeft mouthLowerDownRight mouthPressLeft mouthPressRight mouthPucker
    mouthRight mouthRollLower mouthRollUpper mouthShrugLower mouthShrugUpper mouthSmileLeft
    mouthSmileRight mouthStretchLeft mouthStretchRight mouthUpperUpLeft mouthUpperUpRight
    noseSneerLeft noseSneerRight
"""
BLENDSHAPES = tuple(_BLENDSHAPES.split())

# Points per named polygon; "left" and "right" are the person's own. Every polygon is closed and in
# drawing order.
POLYGONS: dict[str, int] = {
    "right_eye": 16,
    "left_eye": 16,
    "right_brow": 10,
    "left_brow": 10,
    "nose": 18,
    "outer_lips": 20,
    "inner_lips": 20,
    "face_oval": 36,
}

# name -> shape of one clip's tensor, T = number of frames (None here).
_TENSORS: dict[str, tuple[int | None, ...]] = {
    "fps": (),
    "landmarks": (None, LANDMARKS, 3),
    "blendshapes": (None, len(BLENDSHAPES)),
    "head_pose": (None, 3, 4),
    "face_boxes": (None, 4),
    "timestamps": (None,),
    "crop_box": (4,),
    "original_size": (2,),
} | {f"mask_polygons/{name}": (None, points, 2) for name, points in POLYGONS.items()}
# Tensors that records made by older versions lack.
_LATER: dict[str, tuple[int | None, ...]] = {"background_motion": (None,)}
_TEXTS = ("clip_id", "identity", "session", "camera", "source", "settings")


class RecordError(ValueError):
    """Bytes that are not a clip record.

    Attributes:
        clip_id: which clip's they are; "" where it is not known.
    """

    def __init__(self, text: str, clip_id: str = ""):
        super().__init__(text)
        self.clip_id = clip_id


@dataclasses.dataclass
class Clip:
    """One person in one fixed square crop, T frames.

    Crop coordinates are in [-1, 1], x right, y down, z into the scene, x = 2 * (column + 0.5) /
    size - 1.

    Attributes:
        clip_id: unique in a dataset; `video-first-last` with frame numbers of the video.
        identity: who it is; the splits are made by it.
        session: frames of two clips with the same identity, session and timestamp show the same
            instant.
        camera: which camera of a rig; "0" for ordinary video.
        source: the file the clip came from.
        fps: frames per second.
        size: side of the stored frames in pixels.
        frames: T JPEG files, RGB, size x size.
        landmarks: (T, 478, 3) float32, crop coordinates (z in the same unit as x).
        blendshapes: (T, 52) float32 in [0, 1], in the order of `BLENDSHAPES`.
        head_pose: (T, 3, 4) float32, P = [sR | t], a pseudo label (method.md 2).
        face_boxes: (T, 4) float32, x0 y0 x1 y1 in crop coordinates.
        mask_polygons: name of `POLYGONS` -> (T, points, 2) float32, crop coordinates.
        timestamps: (T,) float32, seconds.
        crop_box: (4,) float32, x0 y0 x1 y1 of the crop in pixels of the original (may reach beyond
            it).
        original_size: (2,) float32, width and height of the original in pixels.
        settings: constants of the crop and of the preparation.
        background_motion: (T,) float32 in [0, 1], how much the background moves from the frame before to
            this one, 0 for the first; see `background.motion`. None in records of older versions.
    """

    clip_id: str
    identity: str
    session: str
    camera: str
    source: str
    fps: float
    size: int
    frames: Sequence[bytes]
    landmarks: np.ndarray
    blendshapes: np.ndarray
    head_pose: np.ndarray
    face_boxes: np.ndarray
    mask_polygons: dict[str, np.ndarray]
    timestamps: np.ndarray
    crop_box: np.ndarray
    original_size: np.ndarray
    settings: dict[str, Any]
    background_motion: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.frames)

    def part(self, first: int, last: int, clip_id: str | None = None) -> Clip:
        """The frames first .. last-1 as a clip of their own (arrays are views where they can be)."""
        cut = slice(first, last)
        motion = self.background_motion
        if motion is not None:
            motion = motion[cut].copy()
            motion[:1] = 0.0  # there is no frame before it any more
        return dataclasses.replace(
            self,
            clip_id=clip_id or self.clip_id,
            frames=self.frames[cut],
            landmarks=self.landmarks[cut],
            blendshapes=self.blendshapes[cut],
            head_pose=self.head_pose[cut],
            face_boxes=self.face_boxes[cut],
            mask_polygons={name: points[cut] for name, points in self.mask_polygons.items()},
            timestamps=self.timestamps[cut],
            background_motion=motion,
        )


def to_features(clip: Clip) -> dict[str, Any]:
    """The clip as a flat dict of str, list of bytes and float32 arrays; every shape is checked."""
    features: dict[str, Any] = {name: getattr(clip, name) for name in _TEXTS if name != "settings"}
    features["settings"] = json.dumps(clip.settings | {"size": clip.size}, sort_keys=True)
    features["frames"] = list(clip.frames)
    later = {name: shape for name, shape in _LATER.items() if getattr(clip, name) is not None}
    for name, shape in (_TENSORS | later).items():
        value = clip.mask_polygons[name.split("/")[1]] if "/" in name else getattr(clip, name)
        array = np.asarray(value, np.float32)
        expected = tuple(len(clip) if side is None else side for side in shape)
        if array.shape != expected:
            raise RecordError(
                f"clip {clip.clip_id}: {name} has shape {array.shape}, expected {expected}"
            )
        features[name] = array
    return features


def from_features(features: Mapping[str, Any]) -> Clip:
    """Inverse of `to_features`; also takes the flattened dict TFDS hands back.

    Raises:
        RecordError: something is missing, of another shape, or a mask polygon is a point or no number.
    """
    try:
        texts = {name: _text(features[name]) for name in _TEXTS}
        settings = json.loads(texts.pop("settings"))
        size = settings["size"]
        if not isinstance(size, int):
            raise ValueError(f"settings.size is {size!r}")
        frames = list(features["frames"])
        _check_masks(features)
        arrays = {}
        later = {name: shape for name, shape in _LATER.items() if name in features}
        for name, shape in (_TENSORS | later).items():
            expected = tuple(len(frames) if side is None else side for side in shape)
            arrays[name] = np.asarray(features[name], np.float32).reshape(expected)
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(f"not a clip record: {error}") from error
    polygons = {name: arrays.pop(f"mask_polygons/{name}") for name in POLYGONS}
    fps = float(arrays.pop("fps"))
    del settings["size"]
    return Clip(
        **texts,
        fps=fps,
        size=size,
        frames=frames,
        mask_polygons=polygons,
        settings=settings,
        **arrays,
    )


def _check_masks(features: Mapping[str, Any]) -> None:
    """Refuses polygons that are missing, or a point or no number in the first frame.

    It stands for all frames: looking at every one would nearly double the time of reading.
    """
    empty = []
    for name, points in POLYGONS.items():
        flat = np.asarray(features.get(f"mask_polygons/{name}", ()), np.float32).reshape(-1, 2)
        if not (flat.size and (np.ptp(flat[:points], axis=0) > 0).any()):
            empty.append(name)
    if empty:
        raise ValueError(
            f"no mask polygons of {', '.join(empty)}, by which eyes and mouth are hidden from the pose encoder"
        )


def encode(clip: Clip) -> bytes:
    """Clip -> serialized tf.train.Example."""
    entries = []
    for name, value in sorted(to_features(clip).items()):
        if isinstance(value, np.ndarray):
            packed = _field(1, np.ascontiguousarray(value, "<f4").tobytes())
            feature = _field(2, packed)
        else:
            items = value if isinstance(value, list) else [value.encode()]
            feature = _field(1, b"".join(_field(1, bytes(item)) for item in items))
        entries.append(_field(1, _field(1, name.encode()) + _field(2, feature)))
    return _field(1, b"".join(entries))


def decode(data: bytes) -> Clip:
    """Serialized tf.train.Example -> Clip.

    Raises:
        RecordError: the bytes are not a clip record.
    """
    return from_features(parse_example(data))


def parse_example(data: bytes) -> dict[str, Any]:
    """tf.train.Example -> {name: list of bytes | float32 array | int64 array}."""
    features: dict[str, Any] = {}
    try:
        view = memoryview(data)
        for number, container in _fields(view):
            if number != 1:
                continue
            for _, entry in _fields(container):
                pair = dict(_fields(entry))
                features[bytes(pair[1]).decode()] = _feature(pair.get(2, memoryview(b"")))
    except (IndexError, KeyError, ValueError, TypeError) as error:
        raise RecordError(f"not a clip record: damaged bytes ({error})") from error
    if not features:
        raise RecordError("not a clip record: no features in it")
    return features


def _text(value: Any) -> str:
    if isinstance(value, list):
        (value,) = value
    return value.decode() if isinstance(value, bytes) else str(value)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _read_varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("number too long")


def _fields(view: memoryview):
    """Yields (field number, content) of a message; content of numbers is their raw bytes."""
    at, end = 0, len(view)
    while at < end:
        tag, at = _read_varint(view, at)
        kind = tag & 7
        if kind == 2:
            length, at = _read_varint(view, at)
        elif kind == 5:
            length = 4
        elif kind == 1:
            length = 8
        elif kind == 0:
            start = at
            _, at = _read_varint(view, at)
            length, at = at - start, start
        else:
            raise ValueError(f"wire type {kind}")
        if at + length > end:
            raise ValueError("cut short")
        yield tag >> 3, view[at : at + length]
        at += length


def _feature(view: memoryview) -> list[bytes] | np.ndarray:
    for number, content in _fields(view):
        if number == 1:
            return [bytes(item) for _, item in _fields(content)]
        chunks = [item for _, item in _fields(content)]
        if number == 2:
            # Copied: a view would keep the bytes of the whole record beside the frames that are cut out of them.
            return np.frombuffer(b"".join(chunks), "<f4")
        if number == 3:
            values = []
            for chunk in chunks:
                at = 0
                while at < len(chunk):
                    value, at = _read_varint(chunk, at)
                    values.append(value - (1 << 64) if value >> 63 else value)
            return np.asarray(values, np.int64)
    return []
