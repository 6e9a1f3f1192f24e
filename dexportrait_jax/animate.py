"""Job `animate`: a portrait and its drivers in, a video out, in every mode of method.md 7.3.

    dexportrait animate --weights=exports/video --source=me.jpg --pose=a.mp4 --expression=b.mp4 \\
        --out=result.mp4

`driving` decides which driver gives what, `face_clips` makes clips of files, `inference` pictures.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from data_pipelines import video
from data_pipelines.prepare import crop
from data_pipelines.records import Clip
from dexportrait_jax import driving, paste_back, pose_transfer, provenance
from dexportrait_jax.errors import UserError
from dexportrait_jax.face_clips import Faces, encode_clip, is_image, model_inputs
from dexportrait_jax.inference import Drive, PortraitModel, Sampling, load_model
from dexportrait_jax.metrics import Progress

PANEL = 256  # smallest side of a picture in a side-by-side video
_KINDS = {name: int for name in ("seed", "steps", "hybrid_steps", "max_frames")}
_KINDS |= {"guidance": (int, float), "paste_back": bool, "overwrite": bool}  # all others: str


@dataclass(frozen=True)
class Job:
    """One video to make: the flags of the command line."""

    source: str
    out: str
    driving: str | None = None
    pose: str | None = None
    expression: str | None = None
    relative_pose: str = ""
    smooth: str = "none"
    length: str = "shortest"
    paste_back: bool = False
    side_by_side: str | None = None
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    hybrid_steps: int | None = None
    expression_null: str | None = None
    max_frames: int | None = None
    overwrite: bool = False

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            self.seed, self.steps, self.guidance, self.hybrid_steps, self.expression_null
        )


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
    picture that two jobs use is read once. Returns the videos. UserError in one line for whatever
    the user can put right.
    """
    given = {"source": source, "out": out, **flags}
    if jobs:
        chosen = _read_jobs(jobs, given, overwrite)
    else:
        for flag in ("source", "out"):
            if not given[flag]:
                raise UserError(f"animate needs --{flag} (or --jobs=FILE.json)")
        chosen = [Job(**given, overwrite=overwrite)]
    for job in chosen:
        _check(job)
    model = load_model(weights)
    for job in chosen:
        model.settings(job.sampling)
    with Faces(model) as faces:
        return [_make(model, job, faces) for job in chosen]


def _read_jobs(path: str, flags: dict[str, Any], overwrite: bool) -> list[Job]:
    """Jobs of a file; flags of the command line hold where a job does not say otherwise."""
    try:
        listed = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"--jobs={path} cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"--jobs={path} is not JSON: {error}") from error
    if (
        not isinstance(listed, list)
        or not listed
        or not all(isinstance(one, dict) for one in listed)
    ):
        raise UserError(f"--jobs={path} must hold a list of objects of flags")
    known = {field.name for field in fields(Job)}
    common = {name: value for name, value in flags.items() if value is not None}
    jobs = []
    for number, entry in enumerate(listed, 1):
        merged = {"overwrite": overwrite, **common, **entry}
        wrong = sorted(set(merged) - known) or [
            name for name in ("source", "out") if name not in merged
        ]
        if wrong:
            raise UserError(
                f"--jobs={path}, entry {number}: {wrong[0]!r} is "
                + ("no flag of animate" if wrong[0] not in known else "missing")
            )
        for name, value in merged.items():
            wanted = _KINDS.get(name, str)
            if value is not None and (
                not isinstance(value, wanted) or (wanted is int and isinstance(value, bool))
            ):
                raise UserError(f"--jobs={path}, entry {number}: {name} cannot be {value!r}")
        jobs.append(Job(**merged))
    return jobs


def _check(job: Job) -> None:
    """What can be known without reading a video or a network."""
    drivers = driving.choose_drivers(job.source, job.driving, job.pose, job.expression)
    if drivers.pose_is_typed:
        driving.parse_typed_pose(drivers.pose)
    if job.driving is not None and is_image(job.driving):
        raise UserError(
            f"--driving={job.driving} is a picture and moves nothing; give a video, or hold a "
            "picture's pose or expression with --pose or --expression"
        )
    unknown = sorted(
        set(pose_transfer.relative_components(job.relative_pose)) - {*pose_transfer.COMPONENTS}
    )
    if unknown:
        raise UserError(
            f"--relative_pose: no component {unknown[0]!r}; "
            f"there are {', '.join(pose_transfer.COMPONENTS)}"
        )
    if job.paste_back and drivers.mode != "expression_only":
        raise UserError(
            "--paste_back puts the face back where it was, so the pose must be the source's own: "
            "give --expression alone, without --driving and --pose"
        )
    for name, least in (("steps", 1), ("max_frames", 1), ("hybrid_steps", 0), ("seed", 0)):
        value = getattr(job, name)
        if value is not None and value < least:
            raise UserError(f"--{name}={value}: at least {least}")
    for path in (job.source, drivers.pose, drivers.expression):
        if path is not None and not driving.is_typed_pose(path) and not Path(path).is_file():
            raise UserError(f"{path}: no such file")
    outputs = [path for path in (job.out, job.side_by_side) if path]
    for path in outputs:
        check_output(path, job.overwrite)
    inputs = [
        Path(path).resolve() for path in (job.source, drivers.pose, drivers.expression) if path
    ]
    if len({Path(path).resolve() for path in outputs}) < len(outputs) or any(
        Path(path).resolve() in inputs for path in outputs
    ):
        raise UserError(f"--out={job.out}: outputs must differ from each other and from the inputs")


def check_output(path: str | Path, overwrite: bool) -> None:
    """UserError, before any work is done, where the video ``path`` could not be written at the end."""
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise UserError(f"{path}: the name of the video must end in .mp4")
    if path.is_dir():
        raise UserError(f"{path} is a directory; give the name of a video")
    if path.exists() and not overwrite:
        raise UserError(f"{path} is there already; add --overwrite to replace it")
    folder = path.resolve().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"cannot write {path}: {folder} is a file; choose another folder")
    if not os.access(folder, os.W_OK):
        raise UserError(
            f"cannot write {path}: no permission to write in {folder}; choose another folder"
        )


# --- making ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """One video, planned: source, drive of every frame, and drivers to show beside the result."""

    mode: str
    fps: float
    source: Clip
    full_picture: UInt8[np.ndarray, "height width 3"]
    drive: Drive
    shown: dict[str, tuple[Clip, np.ndarray]] = field(default_factory=dict)  # title -> clip, frames


def make_plan(model: PortraitModel, job: Job, faces: Faces) -> Plan:
    """Read and encode what ``job`` names, and decide pose and expression of every frame."""
    drivers = driving.choose_drivers(job.source, job.driving, job.pose, job.expression)
    source, picture = faces.portrait(job.source, job.max_frames, as_video=drivers.source_drives)
    (source_pose,), (source_expression,) = encode_clip(model, source)
    relative = pose_transfer.relative_components(job.relative_pose)

    typed = driving.parse_typed_pose(drivers.pose) if drivers.pose_is_typed else None
    clips: dict[str, tuple[Clip, float | None]] = {}
    if drivers.pose and not typed:
        clips["pose"] = faces.driver(drivers.pose, job.max_frames)
    if drivers.expression:
        clips["expression"] = faces.driver(drivers.expression, job.max_frames)
    clock = {name: (len(clip), rate) for name, (clip, rate) in clips.items()}
    frames = job.max_frames
    if typed:
        clock["typed"] = (1, None)
        last = int(typed[-1].get("frame", 0))
        if last and not any(rate for _, rate in clock.values()):
            frames = min(last + 1, frames or last + 1)
    times = driving.timeline(clock, length=job.length, frames=frames)

    encoded = {}
    for name, (clip, _) in clips.items():
        same = name == "expression" and "pose" in clips and clips["pose"][0] is clip
        needed = clip.part(0, int(times.indices[name].max()) + 1)
        encoded[name] = encoded["pose"] if same else encode_clip(model, needed)
    if typed:
        poses = driving.typed_poses(typed, source_pose, times.frames, relative)
    elif "pose" in clips:
        clip, rate = clips["pose"]
        track = pose_transfer.smooth_poses(encoded["pose"][0], job.smooth, fps=rate or 1.0)
        track = pose_transfer.transfer_pose(source_pose, track, relative)
        poses = track[times.indices["pose"]]
    else:
        poses = np.repeat(source_pose[None], times.frames, 0)
    if "expression" in clips:
        expressions = encoded["expression"][1][times.indices["expression"]]
    else:
        expressions = np.repeat(source_expression[None], times.frames, 0)

    shown = {name: (clip, times.indices[name]) for name, (clip, _) in clips.items()}
    if drivers.mode in ("self", "cross"):
        shown = {"driver": shown["pose"]}
    drive = Drive(source_pose, source_expression, poses, expressions)
    return Plan(drivers.mode, times.fps, source, picture, drive, shown)


def _make(model: PortraitModel, job: Job, faces: Faces) -> Path:
    """One video, from files to file."""
    plan = make_plan(model, job, faces)
    record = provenance.record(
        model.description,
        mode=plan.mode,
        **model.settings(job.sampling),
        frames=len(plan.drive),
        relative_pose=list(pose_transfer.relative_components(job.relative_pose)),
        smooth=job.smooth,
        pasted_back=job.paste_back,
    )
    metadata = provenance.container_metadata(record)
    source = model_inputs(model, plan.source, np.array([0]))["image"][0]
    progress = Progress(f"animate {Path(job.out).name}", len(plan.drive), unit="frame")
    total = len(plan.drive)

    def report(part: float, note: str) -> None:
        progress.update(min(total, int(part * total + 1e-6)), note)

    number = 0
    with contextlib.ExitStack() as stack:

        def writer(path: str) -> video.VideoWriter:
            options = {"metadata": metadata, "overwrite": job.overwrite}
            return stack.enter_context(video.VideoWriter(path, plan.fps, **options))

        result = writer(job.out)
        side = max(PANEL, source.shape[0])
        beside = writer(job.side_by_side) if job.side_by_side else None
        for images in model.animate(source, plan.drive, job.sampling, report):
            for image in images:
                pasted = _paste(image, plan, faces) if job.paste_back else image
                result.write(pasted)
                if beside:
                    shown = image
                    if job.paste_back:
                        shown = crop.extract(pasted, plan.source.crop_box, side)
                    beside.write(_side_by_side(source, plan, number, shown, side))
                number += 1
    provenance.write_sidecar(job.out, record)
    print(
        f"wrote {job.out}: {plan.mode.replace('_', ' ')}, {total} frames at {plan.fps:g} per second"
    )
    return Path(job.out)


def _paste(
    image: UInt8[np.ndarray, "h w 3"], plan: Plan, faces: Faces
) -> UInt8[np.ndarray, "height width 3"]:
    """The result in the full source picture, masked by the face before and after (method.md 7.3)."""
    outlines = [plan.source.landmarks[0]]
    after = faces.landmarks(image)
    if after is not None:
        outlines.append(after)
    mask = paste_back.face_mask(outlines, PANEL)
    return paste_back.paste(plan.full_picture, image, plan.source.crop_box, mask)


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
