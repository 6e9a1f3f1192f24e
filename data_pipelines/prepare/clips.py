"""Videos and pictures -> clips: look at every frame, find the good runs, crop them, label them."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import background, records, spill, video
from data_pipelines.prepare import crop, detect, filters, head_pose, masks
from dexportrait_jax.errors import UserError

LABELLED = 32  # frames whose labels are computed together


def printable(text: str | os.PathLike) -> str:
    r"""A path as text that can be stored and printed: bytes of it that are not UTF-8 become such as `\xe9`."""
    return os.fspath(text).encode(errors="surrogateescape").decode(errors="backslashreplace")


@dataclasses.dataclass(frozen=True)
class Naming:
    """Keys of the clips of one video, printable; without a rig, one session and one camera."""

    name: str
    identity: str
    session: str
    camera: str = "0"

    @classmethod
    def of(cls, path: str | os.PathLike) -> Naming:
        stem = Path(printable(path)).stem
        return cls(stem, stem, stem)


def clips_from_video(
    path: str | os.PathLike,
    landmarker: detect.Landmarker,
    settings: crop.Settings,
    *,
    max_frames: int | None = None,
    naming: Naming | None = None,
) -> tuple[Iterator[records.Clip], filters.Verdict]:
    """All usable clips of a video, each made when it is taken.

    The video is decoded twice: its frames do not fit into memory and the crop of a clip is known only
    once all its frames were seen. Of a long video one clip at a time is in memory, and what was seen in
    its frames is on disk (`spill`).

    Raises:
        UserError: it cannot be read as a video at all.
        spill.NoRoomError: the temporary directory is full.
    """
    naming = naming or Naming.of(path)
    damage: list[str] = []
    observations = observe(path, landmarker, settings, max_frames, damage.append, spilled=True)
    runs, verdict = filters.segments(observations, os.fspath(path), settings)
    verdict.damaged = "; ".join(damage)
    groups = [np.arange(first, last) for first, last in runs]
    clips = cut_out(path, observations, groups, naming, settings)
    return map(background.measured, clips), verdict


def cut_out(
    path: str | os.PathLike,
    observations: list[filters.Observation],
    groups: Sequence[np.ndarray],
    naming: Naming,
    settings: crop.Settings,
    *,
    spilled: bool = False,
) -> Iterator[records.Clip]:
    """A clip, cut by one box, of each group of frame numbers (n,) int; groups follow each other in time.

    ``spilled``: JPEGs, landmarks and polygons stay on disk (`spill`).
    """
    last = int(groups[-1][-1]) + 1 if groups else 0
    frames = enumerate(video.read_frames(path, max_frames=last) if last else ())
    for group in groups:
        seen = [observations[index] for index in group]
        boxes = np.stack([one.face.box for one in seen])
        box = crop.crop_box(boxes, seen[0].picture, settings)
        wanted = set(group.tolist())
        jpegs = spill.Frames() if spilled else []
        for index, frame in frames:
            if index in wanted:
                picked = crop.extract(frame.image, box, settings.size)
                jpegs.append(crop.encode_jpeg(picked, settings.jpeg_quality))
            if index == group[-1]:
                break
        clip_id = f"{naming.name}-{group[0]:06d}-{group[-1]:06d}"
        yield _clip(clip_id, naming, path, seen, jpegs, box, settings, spilled=spilled)


def clip_from_image(
    image: np.ndarray | str | os.PathLike,
    landmarker: detect.Landmarker,
    settings: crop.Settings | None = None,
) -> records.Clip:
    """A portrait as a clip of one frame: the same crop, checks and labels as for a video.

    Args:
        image: uint8 RGB (H, W, 3), or the path of a picture (or of a video: its first frame).

    Raises:
        UserError: it cannot be read, or shows no usable face; the message says why.
    """
    settings = settings or crop.Settings()
    path = "the picture" if isinstance(image, np.ndarray) else os.fspath(image)
    if not isinstance(image, np.ndarray):
        image = video.read_image(image)
    seen = _look_at_portrait(image, landmarker, settings)
    if seen.verdict:
        raise UserError(
            f"{path} cannot be used: {seen.verdict}; choose a picture of one person, face in view"
        )
    return _portrait(path, 0, image, seen, settings)


def clip_from_first_usable(
    path: str | os.PathLike,
    landmarker: detect.Landmarker,
    settings: crop.Settings | None = None,
) -> tuple[records.Clip, int, str]:
    """The first frame of a video that can be a portrait, as `clip_from_image` has it.

    Returns the clip, the frame's number, and what is wrong with the first frame, "" where that one is taken.

    Raises:
        UserError: it cannot be read, or no frame shows a usable face; the message says why.
    """
    settings = settings or crop.Settings()
    verdicts: collections.Counter[str] = collections.Counter()
    for number, frame in enumerate(video.read_frames(path)):
        seen = _look_at_portrait(frame.image, landmarker, settings)
        if not seen.verdict:
            clip = _portrait(os.fspath(path), number, frame.image, seen, settings)
            return clip, number, next(iter(verdicts), "")
        verdicts[seen.verdict] += 1
    reason, count = verdicts.most_common(1)[0]
    raise UserError(
        f"{path} cannot be used: {reason} in {count} of {verdicts.total()} frames; choose a picture or a video of one "
        "person, face in view"
    )


def _look_at_portrait(image, landmarker, settings) -> filters.Observation:
    """What is seen in a frame that has to stand alone: it must be human by itself."""
    seen = _look(image, 0.0, landmarker, settings, ask_mirror=True)
    if seen.verdict == filters.GOOD and seen.mirror_error > settings.mirror_error:
        seen = seen._replace(verdict=filters.NOT_HUMAN)
    return seen


def _portrait(path: str, number: int, image, seen, settings) -> records.Clip:
    box = crop.crop_box(seen.face.box[None], seen.picture, settings)
    jpeg = crop.encode_jpeg(crop.extract(image, box, settings.size), settings.jpeg_quality)
    naming = Naming.of(path)
    clip_id = f"{naming.name}-{number:06d}-{number:06d}"
    return _clip(clip_id, naming, path, [seen], [jpeg], box, settings)


def _look(image, time, landmarker, settings, *, ask_mirror: bool) -> filters.Observation:
    height, width = image.shape[:2]
    picture = (width, height)
    face, verdict = filters.judge(landmarker.detect(image), picture, settings)
    seen = filters.Observation(time, face, verdict, False, None, picture)
    return _asked(seen, image, landmarker) if ask_mirror else seen


def _asked(seen: filters.Observation, image, landmarker) -> filters.Observation:
    """The same with its `mirror_error`, where there is a face."""
    if seen.face is None:
        return seen
    mirrored = landmarker.detect(image[:, ::-1])
    return seen._replace(mirror_error=filters.mirror_error(seen.face, mirrored, seen.picture[0]))


def observe(
    path: str | os.PathLike,
    landmarker: detect.Landmarker,
    settings: crop.Settings,
    max_frames: int | None,
    on_damage: Callable[[str], None],
    on_frame: Callable[[int], None] | None = None,
    *,
    enough: Callable[[filters.Observation], bool] | None = None,
    spilled: bool = False,
) -> list[filters.Observation]:
    """What is seen in every frame; no frame is kept.

    ``on_frame`` is told how many frames were looked at. ``enough`` is asked about every frame, in order; the first
    that it is true of is the last one read. ``spilled``: the faces' arrays stay on disk.
    """
    observations: list[filters.Observation] = []
    on_disk = [spill.Rows() for _ in detect.Face._fields]
    thumbnail, asked = None, 0
    frames = video.read_frames(path, max_frames=max_frames, on_damage=on_damage)
    for index, frame in enumerate(frames):
        seen = _look(frame.image, frame.time, landmarker, settings, ask_mirror=False)
        now = filters.thumbnail(frame.image)
        if observations:
            difference = float(np.abs(now - thumbnail).mean())
            seen = seen._replace(cut=filters.is_cut(observations[-1], seen, difference, settings))
        if seen.cut:
            asked = index  # somebody else, perhaps
        if index >= asked and seen.face is not None:
            seen = _asked(seen, frame.image, landmarker)
            asked = index + settings.mirror_every
        if spilled and seen.face is not None:
            face = (rows.append(part) for rows, part in zip(on_disk, seen.face, strict=True))
            seen = seen._replace(face=detect.Face(*face))
        observations.append(seen)
        thumbnail = now
        if on_frame is not None:
            on_frame(index + 1)
        if enough is not None and enough(seen):
            break
    return observations


def _clip(clip_id, naming, path, seen, frames, box, settings, *, spilled=False) -> records.Clip:
    times = np.array([one.time for one in seen], np.float32)
    length = float(times[-1] - times[0])
    return records.Clip(
        clip_id=clip_id,
        identity=naming.identity,
        session=naming.session,
        camera=naming.camera,
        source=Path(printable(path)).name,
        fps=(len(seen) - 1) / length if length > 0 else 25.0,
        size=settings.size,
        frames=frames,
        blendshapes=np.stack([one.face.blendshapes for one in seen]),
        timestamps=times,
        crop_box=box.astype(np.float32),
        original_size=np.array(seen[0].picture, np.float32),
        settings=dataclasses.asdict(settings),
        **_labels(seen, box, spilled),
    )


def _labels(seen: list[filters.Observation], box: np.ndarray, spilled: bool) -> dict[str, Any]:
    """What of a clip follows from its faces' landmarks; the large ones on disk where they are ``spilled``."""
    frames, large = len(seen), spill.zeros if spilled else np.zeros
    landmarks = large((frames, *seen[0].face.landmarks.shape), np.float32)
    polygons = {
        name: large((frames, points, 2), np.float32) for name, points in records.POLYGONS.items()
    }
    poses, boxes = np.zeros((frames, 3, 4), np.float32), np.zeros((frames, 4), np.float32)
    for first in range(0, frames, LABELLED):
        part = slice(first, first + LABELLED)
        faces = [one.face for one in seen[part]]
        points = crop.to_crop(np.stack([face.landmarks for face in faces]), box)
        landmarks[part] = points
        poses[part] = head_pose.head_pose(points, np.stack([face.transform for face in faces]))
        boxes[part] = np.concatenate([points[..., :2].min(1), points[..., :2].max(1)], axis=1)
        for name, polygon in masks.polygons(points).items():
            polygons[name][part] = polygon
    return {
        "landmarks": landmarks,
        "head_pose": poses,
        "face_boxes": boxes,
        "mask_polygons": polygons,
    }
