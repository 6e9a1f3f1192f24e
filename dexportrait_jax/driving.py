"""Who drives what: the pose and the expression that every generated frame gets, in every mode.

Plain numpy on poses and indices; nothing here touches a network or reads a file. Poses are P =
[sR|t], p' = s R p + t with column vectors (method.md 2); the modes are those of method.md 7.3.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from dexportrait_jax.errors import UserError
from dexportrait_jax.pose_transfer import euler_degrees, euler_rotation, join_pose, split_pose

MODES = ("self", "cross", "disentangled", "expression_only", "pose_only")
PANELS = {  # what stands side by side in `animate --side_by_side`, for captions
    "self": ("source", "driver", "result"),
    "cross": ("source", "driver", "result"),
    "disentangled": ("source", "pose", "expression", "result"),
    "expression_only": ("source", "expression", "result"),
    "pose_only": ("source", "pose", "result"),
}
# What can be typed of a pose, from and to: far beyond what shows a face, and well within what can be computed.
TYPED_RANGES = {
    "pitch": (-3600, 3600),
    "yaw": (-3600, 3600),
    "roll": (-3600, 3600),
    "x": (-100, 100),
    "y": (-100, 100),
    "scale": (0.01, 100),
}
TYPED_KEYS = tuple(TYPED_RANGES)
LAST_FRAME = 1_000_000  # that can be typed: eleven hours


# --- modes ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Drivers:
    """Where pose and expression come from: a path, a typed pose (JSON), or None = the source's own.

    ``source_drives``: the source is a driver too, so all its frames must be cut by one box.
    """

    mode: str
    pose: str | None
    expression: str | None
    source_drives: bool = False

    @property
    def pose_is_typed(self) -> bool:
        return self.pose is not None and is_typed_pose(self.pose)


def choose_drivers(
    source: str, driving: str | None = None, pose: str | None = None, expression: str | None = None
) -> Drivers:
    """Mode and drivers from the flags (method.md 7.3).

    ``driving`` stands for whichever of ``pose`` and ``expression`` is not given; what is still
    missing is the source's own. A source that is its own driver is self-reenactment. UserError
    where nothing drives.
    """
    pose = pose or driving
    expression = expression or driving
    if pose is None and expression is None:
        raise UserError(
            "nothing drives the portrait: give --driving=VIDEO, or --pose=VIDEO|IMAGE|JSON and/or "
            "--expression=VIDEO|IMAGE"
        )
    source_drives = any(
        same_file(driver, source)
        for driver in (pose, expression)
        if driver and not is_typed_pose(driver)
    )
    if expression is None:
        return Drivers("pose_only", pose, None, source_drives)
    if pose is None:
        return Drivers("expression_only", None, expression, source_drives)
    if is_typed_pose(pose) or not same_file(pose, expression):
        return Drivers("disentangled", pose, expression, source_drives)
    return Drivers("self" if source_drives else "cross", pose, expression, source_drives)


def same_file(first: str, second: str) -> bool:
    """Whether two paths lead to one place."""
    return Path(first).resolve() == Path(second).resolve()


def transfer_expression(
    source: Float[np.ndarray, " latent"],
    driving: Float[np.ndarray, "frames latent"],
    neutral: Float[np.ndarray, " latent"] | None = None,
) -> Float[np.ndarray, "frames latent"]:
    """The expression code of every frame: the driver's, or e_s + (e_i - e_0) (method.md 7.3, off).

    ``neutral``: e_0, the driver's code that stands for the source's own; None: the driver's codes as they are.
    """
    return driving if neutral is None else source + (driving - neutral)


# --- typed poses ----------------------------------------------------------------------


def is_typed_pose(text: str) -> bool:
    """True for JSON written on the command line, false for a path; a file may be called as JSON begins."""
    # os.path and not Path, which raises OSError at keyframes that are longer than a name can be.
    return text.lstrip()[:1] in ("{", "[") and not os.path.isfile(text)  # noqa: PTH113


def parse_typed_pose(text: str) -> list[dict[str, float]]:
    """Keyframes of a typed pose: one object such as `{"yaw": 20}`, or a list with "frame" in each.

    pitch, yaw, roll in degrees, x, y in crop coordinates ([-1, 1] across the crop), scale a factor, all within
    TYPED_RANGES; frame from 0 to LAST_FRAME. UserError naming the key that is wrong.
    """
    example = (
        'e.g. --pose=\'{"yaw": 20}\' or \'[{"frame": 0, "yaw": -20}, {"frame": 24, "yaw": 20}]\''
    )
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # or more digits or brackets than Python reads
        what = (
            f"{error.msg} at character {error.pos}"
            if isinstance(error, json.JSONDecodeError)
            else "nothing that can be read"
        )
        raise UserError(f"--pose is neither a file nor JSON ({what}); {example}") from None
    keyframes = value if isinstance(value, list) else [value]
    if not keyframes or not all(isinstance(keyframe, dict) and keyframe for keyframe in keyframes):
        raise UserError(
            f"--pose wants an object or a list of objects that each name something; {example}"
        )
    for keyframe in keyframes:
        for key, number in keyframe.items():
            if key not in (*TYPED_KEYS, "frame"):
                raise UserError(f"--pose: no key {key!r}; there are frame, {', '.join(TYPED_KEYS)}")
            least, most = TYPED_RANGES.get(key, (0, LAST_FRAME))
            # bool is an int to Python, and NaN, which is neither below nor above anything, a number to json
            if (
                isinstance(number, bool)
                or not isinstance(number, int | float)
                or not least <= number <= most
            ):
                raise UserError(
                    f"--pose: {key} must be a number from {least} to {most}, got {str(number)[:40]!r}"
                )
        if len(keyframes) > 1 and "frame" not in keyframe:
            raise UserError(f'--pose: every keyframe of a list needs a "frame"; {example}')
    frames = [keyframe.get("frame", 0) for keyframe in keyframes]
    if sorted(set(frames)) != frames:
        raise UserError("--pose: the keyframes must be in rising order of frame, none twice")
    return keyframes


def keyframed(keyframes: Sequence[dict[str, float]]) -> int:
    """Frames up to the last keyframe, that one with them; 0 where it is frame 0, as of a pose that stands still."""
    last = int(keyframes[-1].get("frame", 0))
    return last + 1 if last else 0


def beyond(keyframes: Sequence[dict[str, float]], frames: int) -> str | None:
    """What to tell where ``frames`` frames end before the last keyframe; None where they reach all of them."""
    numbers = [int(keyframe.get("frame", 0)) for keyframe in keyframes]
    missed = next((number for number in numbers if number >= frames), None)
    if missed is None:
        return None
    return (
        f"keyframes from frame {missed} on are not reached: the video has {frames} frames, as many as its driver; "
        "--length=hold goes on to the last keyframe, with the driver's last frame held"
    )


def typed_poses(
    keyframes: Sequence[dict[str, float]],
    source: Float[np.ndarray, "3 4"],
    frames: int,
    relative: Sequence[str] = (),
) -> Float[np.ndarray, "{frames} 3 4"]:
    """The poses of ``frames`` frames from keyframes.

    Each number is interpolated linearly (the scale in its logarithm) between the keyframes that
    name it and held outside them; a number that no keyframe names is the source's. Components in
    ``relative`` are read as a change of the source's pose: degrees and shifts added, scale
    multiplied.
    """
    rotation, translation, scale = split_pose(source)
    own = dict(zip(("pitch", "yaw", "roll"), euler_degrees(rotation), strict=True))
    own |= {"x": translation[0], "y": translation[1], "scale": math.log(scale)}
    times = np.arange(frames)
    tracks = {}
    for key in TYPED_KEYS:
        named = [keyframe for keyframe in keyframes if key in keyframe]
        if not named:
            tracks[key] = np.full(frames, own[key])
            continue
        values = [
            math.log(keyframe[key]) if key == "scale" else keyframe[key] for keyframe in named
        ]
        tracks[key] = np.interp(times, [keyframe.get("frame", 0) for keyframe in named], values)
        component = {"x": "translation", "y": "translation", "scale": "scale"}.get(key, "rotation")
        if component in relative:
            tracks[key] = tracks[key] + own[key]
    turned = np.stack(
        [
            euler_rotation(*angles)
            for angles in zip(tracks["pitch"], tracks["yaw"], tracks["roll"], strict=True)
        ]
    )
    shift = np.stack([tracks["x"], tracks["y"], np.zeros(frames)], axis=1)
    return join_pose(turned, shift, np.exp(tracks["scale"]))


# --- the clock ------------------------------------------------------------------------


STILL_FPS = 25.0  # of a result that no video drives
SLACK = 0.1  # of a frame's time: files round their times


@dataclass(frozen=True)
class Timeline:
    """When every output frame is shown, and which frame of each driver it takes.

    Attributes:
        fps: frames per second, in the mean.
        times: seconds from the first frame.
        indices: name of a driver -> its frame numbers.
    """

    fps: float
    times: Float[np.ndarray, " frames"]
    indices: dict[str, Int[np.ndarray, " frames"]]

    @property
    def frames(self) -> int:
        return len(self.times)

    @property
    def steady(self) -> bool:
        """Whether the rate is constant, but for the rounding of a file's times."""
        return bool((np.abs(self.times * self.fps - np.arange(self.frames)) < SLACK).all())


def timeline(
    drivers: dict[str, Float[np.ndarray, " n"] | None],
    *,
    length: str = "shortest",
    frames: int | None = None,
    typed: int = 0,
) -> Timeline:
    """One clock for drivers of different length and rate.

    ``drivers``: name -> seconds of its frames from 0, or None for a still, which is held for ever. The
    output has the frames and times of the first moving driver, also where its rate varies (25 per
    second if none moves), and takes that one's frames one by one, as it does of another with the very same
    times; each of the others is read at the nearest earlier frame in time.
    ``length``: "shortest" ends with the first driver that ends, "hold" goes on to the longest, at the
    mean rate, and holds the last frame of the others. ``typed``: frames that a pose is typed for
    (`keyframed`), to which "hold" goes on as well. ``frames`` shortens the clip, and gives the
    length where nothing moves (default: ``typed``, or 1 second).
    """
    if length not in ("shortest", "hold"):
        raise UserError(f"--length={length}: there are shortest and hold")
    if frames is not None and frames < 1:
        raise UserError(f"--frames={frames}: at least 1")
    moving = {name: np.asarray(times) for name, times in drivers.items() if times is not None}
    if moving:
        clock = times = next(iter(moving.values()))
        fps, slack = _rate(clock), _slack(clock)
        # A frame lasts as long as one does in the mean, so n of them at r per second last n / r.
        ends = [other[-1] + 1 / _rate(other) for other in moving.values()]
        if length == "shortest":
            times = times[times < max(min(ends) - slack, slack)]
        else:
            more = max(int((max(ends) - ends[0]) * fps + SLACK), typed - len(times))
            times = np.concatenate([times, times[-1] + np.arange(1, more + 1) / fps])
        times = times[:frames]
    else:
        fps = STILL_FPS
        times = np.arange(frames or typed or round(fps)) / fps
    indices = {}
    for name, own in drivers.items():
        if own is None:
            indices[name] = np.zeros(len(times), np.int64)
        elif np.array_equal(own, clock):
            indices[name] = np.minimum(np.arange(len(times)), len(own) - 1)
        else:
            indices[name] = np.searchsorted(own, times + _slack(own), side="right") - 1
    return Timeline(float(fps), times, indices)


def span(times: Float[np.ndarray, " n"], frames: int) -> float:
    """Seconds that another driver has to last so that ``timeline`` can give it to ``frames`` frames of this clock.

    Where the clock has fewer, they go on at its mean rate, as with "hold".
    """
    frame = 1 / _rate(times)
    return float(times[min(frames, len(times)) - 1]) + (max(0, frames - len(times)) + 1) * frame


def _rate(times: Float[np.ndarray, " n"]) -> float:
    return (len(times) - 1) / float(times[-1])


def _slack(times: Float[np.ndarray, " n"]) -> float:
    """Seconds that times may be off by. Of the median step: where frames come in bursts, the mean one holds many."""
    return SLACK * float(np.median(np.diff(times)))
