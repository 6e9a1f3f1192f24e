"""Job `animate`: a portrait and its drivers in, a video out, in every mode of method.md 7.3.

    dexportrait animate --weights=exports/video --source=me.jpg --pose=a.mp4 --expression=b.mp4 \\
        --out=result.mp4

`animate_jobs` reads and checks flags, `driving` decides which driver gives what, `face_clips` makes
clips of files, `inference` pictures.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from data_pipelines import spill
from data_pipelines.prepare import crop
from data_pipelines.prepare.driver import Driver
from data_pipelines.records import Clip
from data_pipelines.video_writing import VideoWriter
from dexportrait_jax import driver_track, driving, paste_back, pose_transfer, provenance
from dexportrait_jax.animate_jobs import Job, check, check_apart, checked_job, read_entries
from dexportrait_jax.errors import Fault, UserError, in_words, is_fault
from dexportrait_jax.face_clips import Faces, encode_clip, model_inputs
from dexportrait_jax.inference import BATCH, Drive, PortraitModel, load_model
from dexportrait_jax.metrics import Progress

PANEL = 256  # smallest side of a picture in a side-by-side video


def run_animate(
    weights: str,
    source: str | None = None,
    out: str | None = None,
    jobs: str | None = None,
    overwrite: bool = False,
    **flags: Any,
) -> list[Path]:
    """The job `animate`: one video from flags, or several from ``jobs``, a JSON list of them.

    Everything that can be wrong about the flags is found before the model is loaded; a clip or a
    picture that two jobs use is read once. A job of a file that fails is told and the others are made
    all the same; one that would write what an earlier one writes, or any other reads, fails before.
    Returns the videos. UserError in one line for whatever the user can put right, and where a job of
    a file was not done; `Fault` in its place if the program was to blame for any of them.
    """
    given = {"source": source, "out": out, "overwrite": overwrite, **flags}
    if jobs:
        return _run_file(weights, jobs, given)
    for flag in ("source", "out"):
        if not given[flag]:
            raise UserError(f"animate needs --{flag} (or --jobs=FILE.json)")
    job = Job(**given)
    check(job)
    model = load_model(weights)
    model.settings(job.sampling)
    with Faces(model) as faces:
        return [_make(model, job, faces)]


def _run_file(weights: str, path: str, flags: dict[str, Any]) -> list[Path]:
    """The jobs of a file, as far as they can be done."""
    entries = read_entries(path, flags)
    failures: list[str] = []
    faults: list[Exception] = []

    @contextlib.contextmanager
    def told(number: int) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # nobody reads what is told: the others would not be told either
            raise
        except Exception as error:
            failures.append(f"entry {number}: {in_words(error, 'animate')}")
            if is_fault(error):
                traceback.clear_frames(error.__traceback__)  # or it would keep the entry's pictures
                faults.append(error)
            if len(entries) > 1:
                print(f"dexportrait animate: {path}, {failures[-1]}", file=sys.stderr)

    checked: dict[int, Job] = {}
    for number, entry in enumerate(entries, 1):
        with told(number):
            checked[number] = checked_job(entry)
    ready: dict[int, Job] = {}
    for number, job in checked.items():
        with told(number):
            others = {other: one for other, one in checked.items() if other != number}
            check_apart(job, ready, others)
            ready[number] = job
    made = []
    if ready:
        model = load_model(weights)
        with Faces(model) as faces:
            while ready:
                faces.keep(set().union(*(job.inputs for job in ready.values())))
                number = min(ready)
                job = ready.pop(number)
                with told(number):
                    model.settings(job.sampling)
                    made.append(_make(model, job, faces))
    if failures:
        summary = f"--jobs={path}: {len(failures)} of {len(entries)} videos not made; {failures[0]}"
        if len(failures) > 1:
            summary += f" (and {len(failures) - 1} more, told above)"
        if faults:
            raise Fault(summary) from ExceptionGroup("faults in the program", faults)
        raise UserError(summary)
    return made


@dataclass(frozen=True)
class Plan:
    """One video, planned: source, drive of every frame, and drivers to show beside the result."""

    mode: str
    timeline: driving.Timeline
    source: Clip
    full_picture: UInt8[np.ndarray, "height width 3"]
    drive: Drive
    drivers: dict[str, Driver] = field(default_factory=dict)  # pose, expression: those of files

    @functools.cached_property
    def shown(self) -> dict[str, tuple[Clip, np.ndarray]]:
        """Drivers to show beside the result: title -> clip and its frame at every output frame."""
        drivers = self.drivers
        if self.mode in ("self", "cross"):
            drivers = {"driver": drivers["pose"]}
        indices = {"driver": self.timeline.indices.get("pose"), **self.timeline.indices}
        return {
            name: (driver.clip, driver.shown[indices[name]]) for name, driver in drivers.items()
        }


def make_plan(model: PortraitModel, job: Job, faces: Faces) -> Plan:
    """Read and encode what ``job`` names, and decide pose and expression of every frame."""
    chosen = driving.choose_drivers(job.source, job.driving, job.pose, job.expression)
    # A source that drives nothing is read first: it is the quickest to be refused.
    portrait = None if chosen.source_drives else faces.portrait(job.source)
    drivers = _read_drivers(job, chosen, faces)
    if portrait is None:
        (own, *_) = (
            driver
            for name, driver in drivers.items()
            if driving.same_file(getattr(chosen, name), job.source)
        )
        portrait = faces.portrait(job.source, own)
    source, picture = portrait
    (source_pose,), (source_expression,) = encode_clip(model, source)
    relative = pose_transfer.relative_components(job.relative_pose)

    typed = driving.parse_typed_pose(chosen.pose) if chosen.pose_is_typed else None
    clock = {name: None if one.still else one.times for name, one in drivers.items()}
    timeline = driving.timeline(
        clock,
        length=job.length,
        frames=job.max_frames,
        typed=driving.keyframed(typed) if typed else 0,
    )
    # Who asks for so many frames knows where they end.
    missed = driving.beyond(typed, timeline.frames) if typed else None
    if missed and timeline.frames != job.max_frames:
        print(f"note: {job.out}: {missed}", file=sys.stderr)

    rest = _resting_frames(job, relative, drivers)
    tracks: dict[str, driver_track.Track] = {}
    for name, driver in drivers.items():
        if name == "expression" and drivers.get("pose") is driver:
            tracks[name] = tracks["pose"]
        else:
            also = [rest[other] for other, one in drivers.items() if one is driver]
            needed = max(int(timeline.indices[name].max()), *also) + 1
            tracks[name] = driver_track.encode_driver(model, driver, needed)
    if typed:
        poses = driving.typed_poses(typed, source_pose, timeline.frames, relative)
    elif "pose" in tracks:
        track = tracks["pose"].poses
        track = pose_transfer.smooth_poses(
            track,
            job.smooth,
            times=drivers["pose"].times[: len(track)],
            strength=job.smooth_strength or 1.0,
        )
        track = pose_transfer.transfer_pose(source_pose, track, relative, track[rest["pose"]])
        poses = track[timeline.indices["pose"]]
    else:
        poses = np.repeat(source_pose[None], timeline.frames, 0)
    if "expression" in tracks:
        track, indices = tracks["expression"].expressions, timeline.indices["expression"]
        neutral = track[rest["expression"]] if job.relative_expression else None
        # A few at a time: codes of all frames are too much for memory where a video is long.
        expressions = spill.zeros((timeline.frames, *track.shape[1:]), track.dtype)
        for first in range(0, timeline.frames, BATCH):
            part = slice(first, first + BATCH)
            expressions[part] = driving.transfer_expression(
                source_expression, track[indices[part]], neutral
            )
    else:
        expressions = np.broadcast_to(
            source_expression, (timeline.frames, *source_expression.shape)
        )

    drive = Drive(source_pose, source_expression, poses, expressions)
    return Plan(chosen.mode, timeline, source, picture, drive, drivers)


def _resting_frames(
    job: Job, relative: Sequence[str], drivers: dict[str, Driver]
) -> dict[str, int]:
    """Of each driver the frame of which its motion is a change; 0 where none is taken."""
    frames = dict.fromkeys(drivers, 0)
    for name, taken in (("pose", relative), ("expression", job.relative_expression)):
        if name in drivers and not drivers[name].still and taken:
            frames[name] = job.resting_frame or 0
            last = len(drivers[name].times) - 1
            if frames[name] > last:
                raise UserError(
                    f"--resting_frame={job.resting_frame}: the last frame of the {name}'s driver that is used is {last}"
                )
    return frames


def _read_drivers(job: Job, chosen: driving.Drivers, faces: Faces) -> dict[str, Driver]:
    """The drivers that are files, as far as ``max_frames`` frames need them; a file that is both is one driver."""
    resting = (job.resting_frame or 0) + 1
    frames = None if job.max_frames is None else max(job.max_frames, resting)
    drivers: dict[str, Driver] = {}
    if chosen.pose and not chosen.pose_is_typed:
        drivers["pose"] = faces.driver(chosen.pose, frames)
    if not chosen.expression:
        return drivers
    pose = drivers.get("pose")
    if pose is not None and driving.same_file(chosen.pose, chosen.expression):
        drivers["expression"] = pose
    elif job.max_frames is None or pose is None or pose.still:
        drivers["expression"] = faces.driver(chosen.expression, frames)
    else:
        # It is read at the times of the pose's frames, however many of its own that takes. Whole seconds: what jobs
        # with other poses need is then the same, and read once.
        seconds = math.ceil(driving.span(pose.times, job.max_frames))
        drivers["expression"] = faces.driver(chosen.expression, resting, seconds)
    return drivers


def _make(model: PortraitModel, job: Job, faces: Faces) -> Path:
    """One video, from files to file."""
    plan = make_plan(model, job, faces)
    record = provenance.record(
        model.description,
        mode=plan.mode,
        **model.settings(job.sampling),
        frames=len(plan.drive),
        relative_pose=list(pose_transfer.relative_components(job.relative_pose)),
        relative_expression=job.relative_expression,
        resting_frame=job.resting_frame or 0,
        smooth=job.smooth,
        smooth_strength=job.smooth_strength or 1.0,
        bridged_frames={
            name: int((~driver.seen[plan.timeline.indices[name]]).sum())
            for name, driver in plan.drivers.items()
        },
        pasted_back=job.paste_back,
        paste=job.paste_settings if job.paste_back else None,
    )
    idle = model.idle_flags(job.sampling, len(plan.drive))
    if idle:
        print(f"note: {job.out}: {idle}", file=sys.stderr)
    metadata = provenance.container_metadata(record)
    source = model_inputs(model, plan.source, np.array([0]))["image"][0]
    progress = Progress(f"animate {Path(job.out).name}", len(plan.drive), unit="frame")
    total = len(plan.drive)

    def report(part: float, note: str) -> None:
        progress.update(min(total, int(part * total + 1e-6)), note)

    times = [None] * total if plan.timeline.steady else plan.timeline.times.tolist()
    number = 0
    with contextlib.ExitStack() as stack:

        def writer(path: str) -> VideoWriter:
            options = {"metadata": metadata, "overwrite": job.overwrite}
            return stack.enter_context(VideoWriter(path, plan.timeline.fps, **options))

        stack.enter_context(provenance.sidecar(job.out, record))  # leaves the stack last
        result = writer(job.out)
        side = max(PANEL, source.shape[0])
        beside = writer(job.side_by_side) if job.side_by_side else None
        for images in model.animate(source, plan.drive, job.sampling, report):
            for image in images:
                pasted = image
                if job.paste_back:
                    pasted = _paste(image, plan, faces, **job.paste_settings)
                result.write(pasted, times[number])
                if beside:
                    shown = image
                    if job.paste_back:
                        shown = crop.extract(pasted, plan.source.crop_box, side)
                    panels = _side_by_side(source, plan, number, shown, side)
                    beside.write(panels, times[number])
                number += 1
    rate = f"{plan.timeline.fps:g} per second"
    rate = rate if plan.timeline.steady else f"{rate} in the mean, at the driver's times"
    print(f"wrote {job.out}: {plan.mode.replace('_', ' ')}, {total} frames at {rate}")
    return Path(job.out)


def _paste(
    image: UInt8[np.ndarray, "h w 3"], plan: Plan, faces: Faces, mask: str = "face", **parts: float
) -> UInt8[np.ndarray, "height width 3"]:
    """The result in the full source picture (method.md 7.3), masked by the face before and after, or the whole crop.

    ``parts``: dilation, feather and border of the mask, as parts of the crop's side.
    """
    if mask == "crop":
        opacity = paste_back.crop_mask(PANEL, **parts)
    else:
        outlines = [plan.source.landmarks[0]]
        after = faces.landmarks(image)
        if after is not None:
            outlines.append(after)
        opacity = paste_back.face_mask(outlines, PANEL, **parts)
    return paste_back.paste(plan.full_picture, image, plan.source.crop_box, opacity)


def _side_by_side(
    source, plan: Plan, number: int, result, side: int
) -> UInt8[np.ndarray, "side width 3"]:
    """source | pose driver | expression driver | result, each ``side`` pixels square."""
    pictures = [source]
    for clip, indices in plan.shown.values():
        jpeg = np.frombuffer(clip.frames[indices[number]], np.uint8)
        pictures.append(cv2.imdecode(jpeg, cv2.IMREAD_COLOR)[..., ::-1])
    resized = []
    for picture in [*pictures, result]:
        method = cv2.INTER_AREA if picture.shape[0] > side else cv2.INTER_CUBIC
        resized.append(
            cv2.resize(np.ascontiguousarray(picture), (side, side), interpolation=method)
        )
    return np.concatenate(resized, axis=1)
