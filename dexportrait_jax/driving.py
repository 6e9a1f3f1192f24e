"""Who drives what: the pose and the expression that every generated frame gets, in every mode.

Plain numpy on poses and indices; nothing here touches a network, a file or a video. Poses are P = [sR|t],
p' = s R p + t with column vectors (method.md 2); the modes are those of method.md 7.3.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from dexportrait_jax.errors import UserError

MODES = ("self", "cross", "disentangled", "expression_only", "pose_only")
COMPONENTS = ("rotation", "translation", "scale")
TYPED_KEYS = ("pitch", "yaw", "roll", "x", "y", "scale")


# ---------------------------------------------------------------------------------------------- modes


@dataclass(frozen=True)
class Drivers:
    """Where pose and expression come from: a path, a typed pose (JSON text), or None = the source's own."""

    mode: str
    pose: str | None
    expression: str | None

    @property
    def pose_is_typed(self) -> bool:
        return self.pose is not None and is_typed_pose(self.pose)


def choose_drivers(
    source: str, driving: str | None = None, pose: str | None = None, expression: str | None = None
) -> Drivers:
    """Mode and drivers from the flags (method.md 7.3).

    ``driving`` stands for whichever of ``pose`` and ``expression`` is not given; what is still missing
    is the source's own. A source that is its own driver is self-reenactment. UserError where nothing drives.
    """
    pose = pose or driving
    expression = expression or driving
    if pose is None and expression is None:
        raise UserError(
            "nothing drives the portrait: give --driving=VIDEO, or --pose=VIDEO|IMAGE|JSON and/or "
            "--expression=VIDEO|IMAGE"
        )
    if expression is None:
        return Drivers("pose_only", pose, None)
    if pose is None:
        return Drivers("expression_only", None, expression)
    if is_typed_pose(pose) or not _same_file(pose, expression):
        return Drivers("disentangled", pose, expression)
    return Drivers("self" if _same_file(pose, source) else "cross", pose, expression)


def _same_file(first: str, second: str) -> bool:
    return Path(first).resolve() == Path(second).resolve()


# ---------------------------------------------------------------------------------------------- poses


def split_pose(
    pose: Float[np.ndarray, "*n 3 4"],
) -> tuple[Float[np.ndarray, "*n 3 3"], Float[np.ndarray, "*n 3"], Float[np.ndarray, "*n"]]:
    """P = [sR|t] -> (R, t, s), float64, for P of a rotation with positive scale."""
    pose = np.asarray(pose, np.float64)
    scale = np.cbrt(np.linalg.det(pose[..., :3]))
    return pose[..., :3] / scale[..., None, None], pose[..., 3], scale


def join_pose(
    rotation: Float[np.ndarray, "*n 3 3"],
    translation: Float[np.ndarray, "*n 3"],
    scale: Float[np.ndarray, "*n"],
) -> Float[np.ndarray, "*n 3 4"]:
    """(R, t, s) -> P = [sR|t], float32, t_z = 0 (method.md 2)."""
    translation = np.array(translation, np.float64)
    translation[..., 2] = 0.0
    scaled = np.asarray(scale, np.float64)[..., None, None] * rotation
    return np.concatenate([scaled, translation[..., None]], axis=-1).astype(np.float32)


def transfer_pose(
    source: Float[np.ndarray, "3 4"],
    driving: Float[np.ndarray, "frames 3 4"],
    relative: Sequence[str] = (),
    reference: Float[np.ndarray, "3 4"] | None = None,
) -> Float[np.ndarray, "frames 3 4"]:
    """The pose of every frame: the driver's, each component absolute or relative to its first frame.

    ``relative`` names components of COMPONENTS; ``reference`` is the driver's resting pose (default: its
    first frame). Relative rotation is R_s R_0^T R_i, the source's head turned about its own axes as the
    driver's is: LivePortrait's R_i R_0^T R_s, which is written for row vectors, transposed. Relative
    scale is s_s s_i / s_0, relative translation t_s + t_i - t_0 (method.md 7.3).
    """
    unknown = sorted(set(relative) - set(COMPONENTS))
    if unknown:
        raise UserError(f"--relative_pose: no component {unknown[0]!r}; there are {', '.join(COMPONENTS)}")
    rotation_s, translation_s, scale_s = split_pose(source)
    rotation, translation, scale = split_pose(driving)
    rotation_0, translation_0, scale_0 = split_pose(driving[0] if reference is None else reference)
    if "rotation" in relative:
        rotation = rotation_s @ rotation_0.T @ rotation
    if "translation" in relative:
        translation = translation_s + translation - translation_0
    if "scale" in relative:
        scale = scale_s * scale / scale_0
    return join_pose(rotation, translation, scale)


def relative_components(flag: bool | str | Sequence[str] | None) -> tuple[str, ...]:
    """``--relative_pose`` as components: True or "all" = all three, "rotation,scale" = these, empty = none."""
    if not flag or flag == "none":
        return ()
    if flag is True or flag == "all":
        return COMPONENTS
    return tuple(part.strip() for part in flag.split(",")) if isinstance(flag, str) else tuple(flag)


def transfer_expression(
    source: Float[np.ndarray, "latent"], driving: Float[np.ndarray, "frames latent"], relative: bool = False
) -> Float[np.ndarray, "frames latent"]:
    """The expression code of every frame: the driver's, or e_s + (e_i - e_0) (method.md 7.3, off)."""
    return source + (driving - driving[:1]) if relative else driving


# ---------------------------------------------------------------------------------------------- smoothing


def smooth_poses(
    poses: Float[np.ndarray, "frames 3 4"], kind: str, *, fps: float = 25.0, strength: float | None = None
) -> Float[np.ndarray, "frames 3 4"]:
    """Poses with less jitter, smoothed on (rotation, t, log s).

    ``kind``: "none"; "gaussian" (``strength`` = sigma in frames, default 1.5; looks ahead, no lag);
    "one_euro" (``strength`` = lowest cut-off in Hz, default 1.5; causal, follows fast turns).
    """
    if kind == "none" or len(poses) < 2:
        return np.asarray(poses, np.float32)
    rotation, translation, scale = split_pose(poses)
    if kind == "gaussian":
        return _gaussian(rotation, translation, np.log(scale), 1.5 if strength is None else strength)
    if kind == "one_euro":
        return _one_euro(rotation, translation, np.log(scale), fps, 1.5 if strength is None else strength)
    raise UserError(f"--smoothing={kind}: there are none, gaussian and one_euro")


def _gaussian(rotation, translation, log_scale, sigma):
    offsets = np.arange(len(rotation))
    weights = np.exp(-0.5 * ((offsets[:, None] - offsets[None]) / max(sigma, 1e-6)) ** 2)
    weights /= weights.sum(axis=1, keepdims=True)
    mean = np.einsum("ij,jkl->ikl", weights, rotation)
    return join_pose(_nearest_rotation(mean), weights @ translation, np.exp(weights @ log_scale))


def _nearest_rotation(matrix: Float[np.ndarray, "n 3 3"]) -> Float[np.ndarray, "n 3 3"]:
    left, _, right = np.linalg.svd(matrix)
    sign = np.linalg.det(left @ right)
    left[..., 2] *= sign[..., None]
    return left @ right


def _one_euro(rotation, translation, log_scale, fps, cutoff, beta=0.5, derivative_cutoff=1.0):
    """Casiez et al. 2012, on the vector (t, log s) and, along geodesics, on the rotation."""

    def gain(frequency):
        rate = 2 * math.pi * frequency / fps
        return rate / (rate + 1)

    values = np.concatenate([translation, log_scale[:, None]], axis=1)
    smooth_values, smooth_rotation = [values[0]], [rotation[0]]
    speed, angular_speed = np.zeros(values.shape[1]), 0.0
    for index in range(1, len(values)):
        change = values[index] - values[index - 1]
        speed += gain(derivative_cutoff) * (change * fps - speed)
        step = gain(cutoff + beta * np.linalg.norm(speed))
        smooth_values.append(smooth_values[-1] + step * (values[index] - smooth_values[-1]))
        turn = rotation_vector(rotation[index - 1].T @ rotation[index])
        angular_speed += gain(derivative_cutoff) * (np.linalg.norm(turn) * fps - angular_speed)
        step = gain(cutoff + beta * angular_speed)
        lag = rotation_vector(smooth_rotation[-1].T @ rotation[index])
        smooth_rotation.append(smooth_rotation[-1] @ rotation_from_vector(step * lag))
    smooth_values = np.stack(smooth_values)
    return join_pose(np.stack(smooth_rotation), smooth_values[:, :3], np.exp(smooth_values[:, 3]))


def rotation_vector(rotation: Float[np.ndarray, "3 3"]) -> Float[np.ndarray, "3"]:
    """Axis times angle (radians) of a rotation, angle in [0, pi)."""
    angle = math.acos(float(np.clip((np.trace(rotation) - 1) / 2, -1, 1)))
    axis = np.array(
        [
            rotation[2, 1] - rotation[1, 2],
            rotation[0, 2] - rotation[2, 0],
            rotation[1, 0] - rotation[0, 1],
        ]
    )
    return axis / 2 if angle < 1e-7 else axis * (angle / (2 * math.sin(angle)))


def rotation_from_vector(vector: Float[np.ndarray, "3"]) -> Float[np.ndarray, "3 3"]:
    """Rodrigues' formula: the inverse of rotation_vector."""
    angle = float(np.linalg.norm(vector))
    x, y, z = vector / angle if angle > 1e-12 else np.zeros(3)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


# ---------------------------------------------------------------------------------------------- typed poses


def is_typed_pose(text: str) -> bool:
    """True for JSON written on the command line, false for a path."""
    return text.lstrip()[:1] in ("{", "[")


def parse_typed_pose(text: str) -> list[dict[str, float]]:
    """Keyframes of a typed pose: `{"yaw": 20}` or `[{"frame": 0, "yaw": -20}, {"frame": 24, "yaw": 20}]`.

    pitch, yaw, roll in degrees, x, y in crop coordinates ([-1, 1] across the crop), scale > 0, frame >= 0.
    UserError naming the key that is wrong.
    """
    example = 'e.g. --pose=\'{"yaw": 20}\' or \'[{"frame": 0, "yaw": -20}, {"frame": 24, "yaw": 20}]\''
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--pose is not JSON ({error.msg} at character {error.pos}); {example}") from None
    keyframes = value if isinstance(value, list) else [value]
    if not keyframes or not all(isinstance(keyframe, dict) and keyframe for keyframe in keyframes):
        raise UserError(f"--pose wants an object or a list of objects that each name something; {example}")
    for keyframe in keyframes:
        for key, number in keyframe.items():
            if key not in (*TYPED_KEYS, "frame"):
                raise UserError(f"--pose: no key {key!r}; there are frame, {', '.join(TYPED_KEYS)}")
            # bool is an int to Python, and NaN is a number to json
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                raise UserError(f"--pose: {key} must be a number, got {number!r}")
        if keyframe.get("scale", 1.0) <= 0 or keyframe.get("frame", 0) < 0:
            raise UserError("--pose: scale must be above 0 and frame at least 0")
        if len(keyframes) > 1 and "frame" not in keyframe:
            raise UserError(f'--pose: every keyframe of a list needs a "frame"; {example}')
    frames = [keyframe.get("frame", 0) for keyframe in keyframes]
    if sorted(set(frames)) != frames:
        raise UserError("--pose: the keyframes must be in rising order of frame, none twice")
    return keyframes


def typed_poses(
    keyframes: Sequence[dict[str, float]],
    source: Float[np.ndarray, "3 4"],
    frames: int,
    relative: Sequence[str] = (),
) -> Float[np.ndarray, "{frames} 3 4"]:
    """The poses of ``frames`` frames from keyframes.

    Each number is interpolated linearly (the scale in its logarithm) between the keyframes that name it and held
    outside them; a number that no keyframe names is the source's. Components in ``relative`` are read
    as a change of the source's pose: degrees and shifts added, scale multiplied.
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
        values = [math.log(keyframe[key]) if key == "scale" else keyframe[key] for keyframe in named]
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


def euler_rotation(pitch: float, yaw: float, roll: float) -> Float[np.ndarray, "3 3"]:
    """R_z(roll) R_y(yaw) R_x(pitch), degrees: geometry.euler_to_rotation on the host."""
    pitch, yaw, roll = np.radians([pitch, yaw, roll])
    return (
        rotation_from_vector(np.array([0, 0, roll]))
        @ rotation_from_vector(np.array([0, yaw, 0]))
        @ rotation_from_vector(np.array([pitch, 0, 0]))
    )


def euler_degrees(rotation: Float[np.ndarray, "3 3"]) -> tuple[float, float, float]:
    """(pitch, yaw, roll) in degrees of R_z(roll) R_y(yaw) R_x(pitch); yaw in [-90, 90]."""
    yaw = math.asin(float(np.clip(-rotation[2, 0], -1, 1)))
    pitch = math.atan2(rotation[2, 1], rotation[2, 2])
    roll = math.atan2(rotation[1, 0], rotation[0, 0])
    return math.degrees(pitch), math.degrees(yaw), math.degrees(roll)


# ---------------------------------------------------------------------------------------------- the clock


@dataclass(frozen=True)
class Timeline:
    """Which frame of each driver every output frame takes."""

    fps: float
    indices: dict[str, Int[np.ndarray, "frames"]]

    @property
    def frames(self) -> int:
        return len(next(iter(self.indices.values())))


def timeline(
    drivers: dict[str, tuple[int, float | None]],
    *,
    length: str = "shortest",
    frames: int | None = None,
    fps: float | None = None,
) -> Timeline:
    """One clock for drivers of different length and rate.

    ``drivers``: name -> (number of frames, frames per second), rate None for a still, which is held for ever.
    The output runs at ``fps``, by default the rate of the first moving driver (25 if there is none); each driver is
    read at the nearest earlier frame in time. ``length``: "shortest" ends with the first driver that ends, "hold"
    goes on to the longest and holds the last frame of the others. ``frames`` shortens the clip, and
    gives the length where only stills drive (default 1 second).
    """
    if length not in ("shortest", "hold"):
        raise UserError(f"--length={length}: there are shortest and hold")
    if frames is not None and frames < 1:
        raise UserError(f"--frames={frames}: at least 1")
    moving = {name: (count, rate) for name, (count, rate) in drivers.items() if rate is not None}
    fps = fps or next((rate for _, rate in moving.values()), 25.0)
    if moving:
        # the small addend: 3 frames at 30 fps last 3 / 30 s, which is 2.9999 frames in floating point
        counts = [max(1, int(count * fps / rate + 1e-6)) for count, rate in moving.values()]
        total = min(counts) if length == "shortest" else max(counts)
        total = total if frames is None else min(total, frames)
    else:
        total = frames or max(1, round(fps))
    indices = {}
    for name, (count, rate) in drivers.items():
        position = np.floor(np.arange(total) * (rate or 0.0) / fps + 1e-6).astype(np.int64)
        indices[name] = np.minimum(position, count - 1)
    return Timeline(float(fps), indices)
