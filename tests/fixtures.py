"""A small dataset of drawn heads, with labels that agree with the drawing: no real people, no
detector, no model.

`make_dataset` writes it through the same records and builder code as real videos.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
from array_record.python import array_record_data_source, array_record_module

from data_pipelines import background, dataset_files, records
from data_pipelines.prepare import builder, masks, splits
from data_pipelines.prepare.clips import Naming


def head_pose(yaw=0.0, pitch=0.0, roll=0.0, scale=1.0, shift=(0.0, 0.0)) -> np.ndarray:
    """P = [sR | t] (3,4) from degrees: R = R_z(roll) R_y(yaw) R_x(pitch)."""
    y, p, r = np.deg2rad([yaw, pitch, roll])
    turn = np.array([[np.cos(r), -np.sin(r), 0], [np.sin(r), np.cos(r), 0], [0, 0, 1]])
    turn = turn @ np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    turn = turn @ np.array([[1, 0, 0], [0, np.cos(p), -np.sin(p)], [0, np.sin(p), np.cos(p)]])
    return np.concatenate([scale * turn, [[shift[0]], [shift[1]], [0]]], 1).astype(np.float32)


def _on_head(x, y) -> np.ndarray:
    """Points of the front of an ellipsoid; z into the scene, so the face is at negative z."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    depth = np.sqrt(np.clip(1 - (x / 0.42) ** 2 - (y / 0.55) ** 2, 0, None))
    return np.stack([x, y, -0.4 * depth], -1)


def _ring(centre, radii, points) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return _on_head(centre[0] + radii[0] * np.cos(angle), centre[1] + radii[1] * np.sin(angle))


def drawn_points(blink: float, jaw: float, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """478 points of a drawn head before its pose, its polygons; x < 0 is the person's right."""
    eye = 0.055 * (1 - 0.85 * blink)
    lips = 0.05 + 0.08 * jaw
    shapes = {
        "right_eye": _ring((-0.16, -0.1), (0.075, eye), 16),
        "left_eye": _ring((0.16, -0.1), (0.075, eye), 16),
        "right_brow": _ring((-0.16, -0.23), (0.1, 0.025), 10),
        "left_brow": _ring((0.16, -0.23), (0.1, 0.025), 10),
        "nose": _ring((0.0, 0.05), (0.06, 0.13), 18),
        "outer_lips": _ring((0.0, 0.29), (0.13, lips), 20),
        "inner_lips": _ring((0.0, 0.29), (0.09, 0.1 * jaw + 0.005), 20),
        "face_oval": _ring((0.0, 0.0), (0.41, 0.54), 36),
    }
    rng = np.random.default_rng(seed)
    radius, angle = np.sqrt(rng.uniform(0, 1, 478)), rng.uniform(0, 2 * np.pi, 478)
    points = _on_head(0.41 * radius * np.cos(angle), 0.54 * radius * np.sin(angle))
    for name, indices in masks.LANDMARKS_OF.items():
        points[list(indices)] = shapes[name]
    return points, shapes


def _project(points: np.ndarray, pose: np.ndarray) -> np.ndarray:
    return points @ pose[:, :3].T + pose[:, 3]


def draw(points: dict[str, np.ndarray], colours: np.ndarray, size: int) -> np.ndarray:
    """RGB picture (size, size, 3) uint8 of projected polygons (crop coordinates)."""
    big = 4 * size
    image = np.empty((big, big, 3), np.uint8)
    image[:] = np.linspace(0.6, 1.0, big)[:, None, None] * colours[0]
    parts = [("face_oval", colours[1]), ("right_brow", colours[2]), ("left_brow", colours[2])]
    parts += [("right_eye", (245, 245, 245)), ("left_eye", (245, 245, 245)), ("nose", colours[3])]
    parts += [("outer_lips", colours[4]), ("inner_lips", (60, 20, 20))]
    for name, colour in parts:
        pixels = np.round((points[name][:, :2] + 1) * big / 2 - 0.5).astype(np.int32)
        cv2.fillPoly(image, [pixels], tuple(float(part) for part in colour))
    for name in ("right_eye", "left_eye"):
        centre = (points[name][:, :2].mean(0) + 1) * big / 2
        cv2.circle(image, tuple(int(c) for c in centre), big // 60, (40, 60, 120), -1)
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)


def make_clip(
    number: int, frames: int = 12, size: int = 64, *, camera: int = 0, session: str = ""
) -> records.Clip:
    """One drawn clip: `number` gives person and expressions, `camera` turns the view."""
    rng = np.random.default_rng(number)
    colours = rng.uniform((60, 60, 60), (200, 200, 200), (5, 3))
    colours[1] = rng.uniform((170, 130, 100), (250, 210, 180))
    colours[3] = colours[1] * 0.85
    colours[4] = rng.uniform((160, 40, 60), (220, 90, 100))
    phase = rng.uniform(0, 2 * np.pi, 6)
    time = np.arange(frames) / 25.0
    wave = np.sin(2 * np.pi * time[:, None] * (0.9, 0.7, 0.5, 1.3, 1.7, 0.6) + phase)
    names = list(records.BLENDSHAPES)
    blendshapes = np.zeros((frames, len(names)), np.float32)
    jpegs, poses, landmarks, polygons = [], [], [], {name: [] for name in records.POLYGONS}
    for index in range(frames):
        blink, jaw = 0.5 + 0.5 * wave[index, 3], 0.5 + 0.5 * wave[index, 4]
        blendshapes[index, [names.index("eyeBlinkLeft"), names.index("eyeBlinkRight")]] = blink
        blendshapes[index, names.index("jawOpen")] = jaw
        pose = head_pose(
            25 * wave[index, 0] + 40 * camera,
            12 * wave[index, 1],
            12 * wave[index, 2],
            1.0 + 0.1 * wave[index, 5],
            (0.08 * wave[index, 2], 0.06 * wave[index, 0]),
        )
        points, shapes = drawn_points(blink, jaw, seed=0)
        seen = {name: _project(shape, pose) for name, shape in shapes.items()}
        bgr = draw(seen, colours, size)[..., ::-1]
        jpegs.append(cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes())
        poses.append(pose)
        landmarks.append(_project(points, pose))
        for name, shape in seen.items():
            polygons[name].append(shape[:, :2])
    landmarks = np.asarray(landmarks, np.float32)
    boxes = np.concatenate([landmarks[..., :2].min(1), landmarks[..., :2].max(1)], 1)
    clip = records.Clip(
        clip_id=f"drawn{number}-camera{camera}-000000-{frames - 1:06d}",
        identity=f"drawn{number}",
        session=session or f"drawn{number}-{camera}",
        camera=str(camera),
        source=f"drawn{number}",
        fps=25.0,
        size=size,
        frames=jpegs,
        landmarks=landmarks,
        blendshapes=blendshapes,
        head_pose=np.asarray(poses, np.float32),
        face_boxes=boxes.astype(np.float32),
        mask_polygons={name: np.asarray(shape, np.float32) for name, shape in polygons.items()},
        timestamps=time.astype(np.float32),
        crop_box=np.array([0, 0, size, size], np.float32),
        original_size=np.array([size, size], np.float32),
        settings={"drawn": True},
    )
    return background.measured(clip)


def flickering(number: int, frames: int, size: int) -> records.Clip:
    """A clip whose pictures are plain and change their brightness at random: no two windows move alike."""
    clip = make_clip(number, frames, size)
    pictures = [
        np.full((size, size, 3), gray, np.uint8)
        for gray in np.random.default_rng(number).integers(100, 150, frames)
    ]
    jpegs = [cv2.imencode(".jpg", picture)[1].tobytes() for picture in pictures]
    return background.measured(dataclasses.replace(clip, frames=jpegs, background_motion=None))


def make_dataset(
    directory: str | Path,
    clips: int = 3,
    frames: int = 12,
    size: int = 64,
    *,
    validation_clips: int = 1,
    cameras: int = 1,
) -> Path:
    """Writes a dataset of drawn heads with splits train (`clips` people) and validation; returns
    its directory.

    Args:
        cameras: views per person; views of one person share identity, session and timestamps.
    """

    def generate(first: int, count: int):
        for number in range(first, first + count):
            for camera in range(cameras):
                yield make_clip(number, frames, size, camera=camera, session=f"session{number}")

    splits = {"train": lambda: generate(0, clips)}
    if validation_clips:
        splits["validation"] = lambda: generate(clips, validation_clips)
    return builder.write_dataset(splits, directory, overwrite=True)


def remove_masks(
    directory: Path, split: str = "train", *, empty: bool = False, keep: tuple[int, ...] = ()
) -> None:
    """Rewrites a split so that its records carry no mask polygons, or empty ones, but for those of `keep`."""
    _rewrite(directory, split, b"mask_polygons/", empty=empty, keep=keep)


def make_older(directory: Path, split: str = "train") -> None:
    """Rewrites a split as it was before the motion of backgrounds was stored."""
    _rewrite(directory, split, b"background_motion")
    (directory / dataset_files.background_name(split)).unlink()


def spread(directory: Path, shards: int, split: str = "train") -> list[Path]:
    """Writes the records of a split anew in so many shards of equal numbers of records; returns the shards."""
    (whole,) = dataset_files.shards(directory)[split]
    source = array_record_data_source.ArrayRecordDataSource([whole])
    lengths = [len(part) for part in np.array_split(np.arange(len(source)), shards)]
    stem = str(whole).removesuffix("-00000-of-00001")
    paths = [Path(f"{stem}-{number:05d}-of-{shards:05d}") for number in range(shards)]
    following = iter(range(len(source)))
    for path, length in zip(paths, lengths, strict=True):
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for _ in range(length):
            writer.write(source[next(following)])
        writer.close()
    whole.unlink()
    info = json.loads((directory / dataset_files.INFO).read_text())
    for described in info["splits"]:
        if described["name"] == split:
            described["shardLengths"] = [str(length) for length in lengths]
    (directory / dataset_files.INFO).write_text(json.dumps(info))
    return paths


def _rewrite(
    directory: Path, split: str, prefix: bytes, *, empty: bool = False, keep: tuple[int, ...] = ()
) -> None:
    """Rewrites records without the features whose names begin with `prefix`, or with empty ones."""
    (shard,) = dataset_files.shards(directory)[split]
    source = array_record_data_source.ArrayRecordDataSource([shard])
    before = [source[number] for number in range(len(source))]
    writer = array_record_module.ArrayRecordWriter(str(shard), "group_size:1")
    for number, data in enumerate(before):
        writer.write(data if number in keep else _without(data, prefix, empty))
    writer.close()


def _without(record: bytes, prefix: bytes, empty: bool) -> bytes:
    entries = []
    for _, container in records._fields(memoryview(record)):
        for _, entry in records._fields(container):
            name = dict(records._fields(entry))[1]
            if not bytes(name).startswith(prefix):
                entries.append(bytes(entry))
            elif empty:
                floats = records._field(2, records._field(1, b""))
                entries.append(records._field(1, bytes(name)) + records._field(2, floats))
    return records._field(1, b"".join(records._field(1, entry) for entry in entries))


def video_of(clips, read=None):
    """A video of these clips, all of one person, session and camera; `read` gets their names as they are read."""

    def reading():
        for clip in clips:
            if read is not None:
                read.append(clip.clip_id)
            yield clip

    naming = Naming("video", clips[0].identity, clips[0].session, clips[0].camera)
    return splits.Video(naming, reading, lambda: [splits.Times.of(clip) for clip in clips])
