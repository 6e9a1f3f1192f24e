"""Jobs of `animate`: the flags of one video, from the command line or an entry of a file, and their checks."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from data_pipelines.files import check_writable
from dexportrait_jax import choices, driving, pose_transfer, provenance
from dexportrait_jax.errors import UserError
from dexportrait_jax.face_clips import is_image
from dexportrait_jax.inference import Sampling

_PASTE_PARTS = ("paste_dilation", "paste_feather", "paste_border")
_KINDS = {name: int for name in ("seed", "steps", "hybrid_steps", "overlap", "max_frames")}
_KINDS["resting_frame"] = int
_KINDS |= {name: (int, float) for name in ("guidance", "expression_guidance", "eta")}
_KINDS |= {name: (int, float) for name in ("smooth_strength", *_PASTE_PARTS)}
_KINDS |= {name: bool for name in ("relative_expression", "paste_back", "overwrite")}  # others: str


@dataclass(frozen=True, kw_only=True)
class Job(Sampling):
    """One video to make: the flags of the command line, with those of `Sampling`."""

    source: str
    out: str
    driving: str | None = None
    pose: str | None = None
    expression: str | None = None
    relative_pose: str = ""
    relative_expression: bool = False
    resting_frame: int | None = None
    smooth: str = "none"
    smooth_strength: float | None = None
    length: str = "shortest"
    paste_back: bool = False
    paste_mask: str | None = None
    paste_dilation: float | None = None
    paste_feather: float | None = None
    paste_border: float | None = None
    side_by_side: str | None = None
    max_frames: int | None = None
    overwrite: bool = False

    @property
    def sampling(self) -> Sampling:
        return Sampling(**{knob.name: getattr(self, knob.name) for knob in fields(Sampling)})

    @property
    def paste_settings(self) -> dict[str, Any]:
        """The mask of the paste-back, "mask", and those arguments of its function that were given."""
        parts = {name.removeprefix("paste_"): getattr(self, name) for name in _PASTE_PARTS}
        given = {name: value for name, value in parts.items() if value is not None}
        return {"mask": self.paste_mask or "face", **given}

    @property
    def inputs(self) -> set[str]:
        """Files that are read."""
        given = (self.source, self.driving, self.pose, self.expression)
        return {path for path in given if path and not driving.is_typed_pose(path)}

    @property
    def outputs(self) -> list[Path]:
        """Files that are written: the videos, and the record beside the first."""
        videos = [Path(path) for path in (self.out, self.side_by_side) if path]
        return [*videos, provenance.sidecar_path(self.out)]


def read_entries(path: str, flags: dict[str, Any]) -> list[dict[str, Any]]:
    """Flags of every job of a file; those of the command line hold where a job does not say otherwise.

    UserError where the file is no list of objects; what an entry says is not looked at.
    """
    try:
        listed = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"--jobs={path} cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--jobs={path} is not JSON: {error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"--jobs={path} cannot be read: more digits of a number, or brackets in each other, than Python reads"
        ) from error
    if (
        not isinstance(listed, list)
        or not listed
        or not all(isinstance(one, dict) for one in listed)
    ):
        raise UserError(f"--jobs={path} must hold a list of objects of flags")
    common = {name: value for name, value in flags.items() if value is not None}
    return [{**common, **entry} for entry in listed]


def checked_job(entry: dict[str, Any]) -> Job:
    """The job of an entry of a file. UserError for whatever is wrong about it."""
    known = {field.name for field in fields(Job)}
    given, entry = entry, {}
    for name, value in given.items():
        value = _as_typed(name, value)
        if name in ("weights", "jobs"):
            raise UserError(
                f"{name!r} belongs on the command line: one model makes all videos of a file"
            )
        if name not in known:
            raise UserError(f"{name!r} is no flag of animate")
        wanted = _KINDS.get(name, str)
        if value is not None and (
            not isinstance(value, wanted) or (wanted is not bool and isinstance(value, bool))
        ):
            raise UserError(f"{name} cannot be {value!r}")
        entry[name] = _as_kind(name, value)
        known_values = choices.ANIMATE.get(name)
        if known_values and value is not None and value not in known_values:
            raise UserError(f"{name} cannot be {value!r}; there are {', '.join(known_values)}")
    for name in ("source", "out"):
        if not entry.get(name):
            raise UserError(f"{name!r} is missing")
    job = Job(**{name: value for name, value in entry.items() if value is not None})
    check(job)
    return job


def _as_typed(name: str, value: Any) -> Any:
    """A value of an entry as it is typed on the command line, where JSON has another way to say it."""
    if name == "pose" and isinstance(value, dict | list):
        return json.dumps(value)
    if name == "relative_pose" and isinstance(value, bool):
        return "all" if value else ""
    return value


def _as_kind(name: str, value: Any) -> Any:
    """A value of the right type that can be used: JSON has numbers and texts that nothing else takes."""
    if isinstance(value, str):
        # What the system takes for a name; of other flags, texts that it does not are none of their choices.
        try:
            usable = b"\0" not in os.fsencode(value)
        except UnicodeEncodeError:
            usable = False
        if not usable:
            raise UserError(f"{name} cannot be {value!r}: it holds what no name of a file does")
    if _KINDS.get(name) == (int, float) and value is not None:
        try:
            return float(value)
        except OverflowError:
            raise UserError(
                f"{name} cannot be {str(value)[:20]}...: it is too large a number"
            ) from None
    return value


def check(job: Job) -> None:
    """What can be known without reading a video or a network; UserError in one line."""
    for name in ("source", "driving", "expression"):
        value = getattr(job, name)
        if value and driving.is_typed_pose(value):
            raise UserError(
                f"--{name}={value!r} is no file, and poses alone can be typed, with --pose; give the path of a file"
            )
    drivers = driving.choose_drivers(job.source, job.driving, job.pose, job.expression)
    typed = driving.parse_typed_pose(drivers.pose) if drivers.pose_is_typed else []
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
    _refuse_idle_flags(job, drivers, typed)
    if job.paste_back and drivers.mode != "expression_only":
        raise UserError(
            "--paste_back puts the face back where it was, so the pose must be the source's own: "
            "give --expression alone, without --driving and --pose"
        )
    _check_numbers(job)
    for path in (job.source, drivers.pose, drivers.expression):
        if path is not None and not driving.is_typed_pose(path) and not Path(path).is_file():
            raise UserError(f"{path}: no such file")
    for path in (job.out, job.side_by_side):
        if path:
            check_output(path, job.overwrite)
    _refuse_existing(provenance.sidecar_path(job.out), job.overwrite)
    outputs = {path.resolve() for path in job.outputs}
    if len(outputs) < len(job.outputs) or outputs & {Path(path).resolve() for path in job.inputs}:
        raise UserError(f"--out={job.out}: outputs must differ from each other and from the inputs")


def check_apart(job: Job, before: dict[int, Job], others: dict[int, Job]) -> None:
    """UserError where ``job`` would write what another entry of its file writes or reads.

    ``before``: entries, by number, whose videos are made before; ``others``: all others, which are to find what they
    read as it is now.
    """
    for path in job.outputs:
        place = path.resolve()
        for number, other in before.items():
            if place in {one.resolve() for one in other.outputs}:
                raise UserError(f"{path} is what entry {number} writes; give each its own name")
        for number, other in others.items():
            if place in {Path(one).resolve() for one in other.inputs}:
                raise UserError(f"{path} is what entry {number} reads; give the video another name")


def _check_numbers(job: Job) -> None:
    """UserError for the first number that is out of its range."""
    at_least = {"steps": 1, "max_frames": 1}
    at_least |= dict.fromkeys(("hybrid_steps", "overlap", "resting_frame", "seed"), 0)
    for name, least in at_least.items():
        value = getattr(job, name)
        if value is not None and value < least:
            raise UserError(f"--{name}={value}: at least {least}")
    # Where nothing moves it is the length of the video, of which poses and latents are kept.
    longest = driving.LAST_FRAME + 1
    if job.max_frames is not None and job.max_frames > longest:
        raise UserError(f"--max_frames={job.max_frames}: at most {longest}")
    for name, least, most, words in (
        ("guidance", -math.inf, math.inf, "a finite number"),
        ("expression_guidance", 0, math.inf, "a number from 0"),
        ("eta", 0, 1, "a number from 0 to 1, as much noise as DDPM"),
    ):
        value = getattr(job, name)
        # NaN is within no bounds
        if value is not None and not (least <= value <= most and abs(value) < math.inf):
            raise UserError(f"--{name}={value:g}: {words}")
    strength = job.smooth_strength
    if strength is not None and not 0 < strength < math.inf:
        raise UserError(f"--smooth_strength={strength:g}: a number above 0, where 1 is the usual")
    for name in _PASTE_PARTS:
        value = getattr(job, name)
        if value is not None and not 0 <= value < 0.5:
            raise UserError(f"--{name}={value:g}: a part of the crop's side, from 0 to below 0.5")


def _refuse_idle_flags(job: Job, drivers: driving.Drivers, typed: list[dict[str, float]]) -> None:
    """UserError for flags that would change nothing: who gives one expects something of it.

    ``typed``: keyframes of the pose, if it is typed.
    """
    if job.driving and job.pose and job.expression:
        raise UserError(
            f"--driving={job.driving}: --pose and --expression leave nothing to it; leave out one of the three"
        )
    pose_moves = drivers.pose and not drivers.pose_is_typed and not is_image(drivers.pose)
    expression_moves = drivers.expression and not is_image(drivers.expression)
    relative = pose_transfer.relative_components(job.relative_pose)
    if relative and not drivers.pose:
        raise UserError(
            f"--relative_pose={job.relative_pose}: nothing drives the pose, which stays the source's; leave it out, or "
            "give --pose or --driving"
        )
    held = drivers.pose and not pose_moves and not drivers.pose_is_typed
    if held and set(relative) == {*pose_transfer.COMPONENTS}:
        raise UserError(
            f"--relative_pose={job.relative_pose}: the picture --pose={drivers.pose} does not move, so the pose would "
            "stay the source's; leave --relative_pose out, or name fewer components"
        )
    if job.smooth != "none" and not pose_moves:
        raise UserError(
            f"--smooth={job.smooth}: no video drives the pose, so there is nothing to smooth; leave it out, or give "
            "a video as --pose or --driving"
        )
    if job.smooth_strength is not None and job.smooth == "none":
        raise UserError(
            f"--smooth_strength={job.smooth_strength:g}: nothing is smoothed; leave it out, or say how with --smooth"
        )
    for name in ("paste_mask", *_PASTE_PARTS):
        value = getattr(job, name)
        if value is not None and not job.paste_back:
            raise UserError(
                f"--{name}={value}: nothing is pasted back; leave it out, or add --paste_back"
            )
    for name in ("paste_dilation", "paste_feather"):
        value = getattr(job, name)
        if value is not None and job.paste_mask == "crop":
            raise UserError(
                f"--{name}={value}: --paste_mask=crop has no face's outline; leave one of them out"
            )
    if job.relative_expression and not expression_moves:
        raise UserError(
            "--relative_expression: no video drives the expression, which would stay the source's; leave it out, or "
            "give a video as --expression or --driving"
        )
    if job.resting_frame is not None and not (relative and pose_moves or job.relative_expression):
        raise UserError(
            f"--resting_frame={job.resting_frame}: no change of a video is taken; leave it out, or add --relative_pose "
            "or --relative_expression"
        )
    two = (
        pose_moves and expression_moves and not driving.same_file(drivers.pose, drivers.expression)
    )
    keyframes_go_on = typed and expression_moves and driving.keyframed(typed)
    if job.length == "hold" and not two and not keyframes_go_on:
        raise UserError(
            "--length=hold: there are not two videos, nor a video and keyframes, of which one could end first; leave "
            "it out, or give a video or keyframes as --pose and another video as --expression"
        )


def check_output(path: str | Path, overwrite: bool) -> None:
    """UserError, before any work is done, where the video ``path`` could not be written at the end."""
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise UserError(f"{path}: the name of the video must end in .mp4")
    _refuse_existing(path, overwrite)
    check_writable(path)


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a directory; choose another name for the video")
    if path.exists() and not overwrite:
        raise UserError(f"{path} is there already; add --overwrite to replace it")
