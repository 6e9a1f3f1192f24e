"""Head poses on the host: taking them apart, handing them from driver to source, smoothing them.

Plain numpy, float64 inside: what `geometry` does for networks on the device is done here for the
few hundred poses of a clip, without compiling anything. P = [sR|t], p' = s R p + t, column vectors
(method.md 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from dexportrait_jax.errors import UserError

# Smoothing at strength 1. Variances of Kalman's are those of LivePortrait (src/utils/filter.py), whose filter is
# pykalman's: the first state is the first pose, with variance 1.
SIGMA = 1.5  # frames
REACH = 6  # sigmas
CUTOFF = 1.5  # Hz
PROCESS_VARIANCE, OBSERVATION_VARIANCE, FIRST_VARIANCE = 1e-5, 3e-7, 1.0

COMPONENTS = ("rotation", "translation", "scale")


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
    resting: Float[np.ndarray, "3 4"] | None = None,
) -> Float[np.ndarray, "frames 3 4"]:
    """The driver's pose for every frame, each component absolute or relative to its resting pose.

    ``relative`` names components of COMPONENTS; ``resting`` is by default the pose of the driver's
    first frame. Relative rotation is R_s R_0^T R_i, the source's head turned about its own axes as the
    driver's is: LivePortrait's R_i R_0^T R_s, which is written for row vectors, transposed. Relative
    scale is s_s s_i / s_0, relative translation t_s + t_i - t_0 (method.md 7.3).
    """
    unknown = sorted(set(relative) - set(COMPONENTS))
    if unknown:
        raise UserError(
            f"--relative_pose: no component {unknown[0]!r}; there are {', '.join(COMPONENTS)}"
        )
    rotation_s, translation_s, scale_s = split_pose(source)
    rotation, translation, scale = split_pose(driving)
    rotation_0, translation_0, scale_0 = split_pose(driving[0] if resting is None else resting)
    if "rotation" in relative:
        rotation = rotation_s @ rotation_0.T @ rotation
    if "translation" in relative:
        translation = translation_s + translation - translation_0
    if "scale" in relative:
        scale = scale_s * scale / scale_0
    return join_pose(rotation, translation, scale)


def relative_components(flag: bool | str | Sequence[str] | None) -> tuple[str, ...]:
    """``--relative_pose`` as components: True or "all" = all three, "rotation,scale" = these, empty
    = none.
    """
    if not flag or flag == "none":
        return ()
    if flag is True or flag == "all":
        return COMPONENTS
    return tuple(part.strip() for part in flag.split(",")) if isinstance(flag, str) else tuple(flag)


# --- smoothing ------------------------------------------------------------------------


def smooth_poses(
    poses: Float[np.ndarray, "frames 3 4"],
    kind: str,
    *,
    times: Float[np.ndarray, " frames"] | None = None,
    strength: float = 1.0,
) -> Float[np.ndarray, "frames 3 4"]:
    """Poses with less jitter, smoothed on (rotation, t, log s).

    ``kind``: "none"; "gaussian" (sigma of 1.5 frames times ``strength``; looks ahead, no lag); "one_euro" (lowest
    cut-off of 1.5 Hz divided by ``strength``; causal, follows fast turns); "kalman" (a random walk with
    LivePortrait's variances, that of the observation, 3e-7, times ``strength``; looks ahead, no lag). Above 1 is
    smoother, below 1 less, and ``strength`` is above 0. ``times``: seconds of the frames, rising, which one_euro goes
    by, at a varying rate too (default: 25 frames per second); the others go by frames.
    """
    if kind == "none" or len(poses) < 2:
        return np.asarray(poses, np.float32)
    rotation, translation, scale = split_pose(poses)
    log_scale = np.log(scale)
    if kind == "gaussian":
        return _gaussian(rotation, translation, log_scale, SIGMA * strength)
    if kind == "one_euro":
        steps = np.full(len(poses) - 1, 0.04) if times is None else np.diff(times)
        return _one_euro(rotation, translation, log_scale, steps, CUTOFF / max(strength, 1e-6))
    if kind == "kalman":
        return _kalman(rotation, translation, log_scale, OBSERVATION_VARIANCE * strength)
    raise UserError(f"--smooth={kind}: there are none, gaussian, one_euro and kalman")


def _gaussian(rotation, translation, log_scale, sigma):
    return _by_numbers(
        rotation, translation, log_scale, lambda values: gaussian_smoother(values, sigma)
    )


def gaussian_smoother(
    observed: Float[np.ndarray, "frames numbers"], sigma: float
) -> Float[np.ndarray, "frames numbers"]:
    """Means of the frames about each, weighed by a Gaussian of ``sigma`` frames; beyond the ends nothing has weight.

    Memory is that of the frames, however many: frames farther away than REACH sigmas are left out.
    """
    sigma, frames = max(sigma, 1e-6), len(observed)
    reach = math.ceil(min(frames - 1, REACH * sigma))
    total, weights = np.zeros_like(observed), np.zeros((frames, 1))
    for offset in range(-reach, reach + 1):
        weight = math.exp(-0.5 * (offset / sigma) ** 2)
        here = slice(max(0, -offset), frames - max(0, offset))
        there = slice(max(0, offset), frames - max(0, -offset))
        total[here] += weight * observed[there]
        weights[here] += weight
    return total / weights


def _by_numbers(rotation, translation, log_scale, smooth):
    """Every number of (rotation matrix, t, log s) by itself, then the nearest rotation."""
    values = np.concatenate([rotation.reshape(-1, 9), translation, log_scale[:, None]], axis=1)
    smoothed = smooth(values)
    rotation = _nearest_rotation(smoothed[:, :9].reshape(-1, 3, 3))
    return join_pose(rotation, smoothed[:, 9:12], np.exp(smoothed[:, 12]))


def _nearest_rotation(matrix: Float[np.ndarray, "n 3 3"]) -> Float[np.ndarray, "n 3 3"]:
    left, _, right = np.linalg.svd(matrix)
    sign = np.linalg.det(left @ right)
    left[..., 2] *= sign[..., None]
    return left @ right


def _kalman(rotation, translation, log_scale, observation):
    def smooth(values):
        return kalman_smoother(values, PROCESS_VARIANCE, observation)

    return _by_numbers(rotation, translation, log_scale, smooth)


def kalman_smoother(
    observed: Float[np.ndarray, "frames numbers"],
    process: float,
    observation: float,
    first: float = FIRST_VARIANCE,
) -> Float[np.ndarray, "frames numbers"]:
    """Means of a random walk given all its noisy observations, past and coming: Rauch, Tung and Striebel 1965.

    ``process`` is the variance of a step of the walk, ``observation`` that of what is observed about it. The first
    state is expected to be the first observation, with variance ``first``. All numbers have the same variances.
    """
    mean, variance = observed[0], first / (first + observation) * observation
    means, variances = [mean], [variance]
    for value in observed[1:]:  # forth: what is known from the past
        predicted = variance + process
        gain = predicted / (predicted + observation)
        mean, variance = mean + gain * (value - mean), (1 - gain) * predicted
        means.append(mean)
        variances.append(variance)
    for index in range(len(means) - 2, -1, -1):  # and back: what came after
        # The walk is expected to stay where it is, so a filtered mean predicts the next.
        gain = variances[index] / (variances[index] + process)
        means[index] = means[index] + gain * (means[index + 1] - means[index])
    return np.stack(means)


def _one_euro(rotation, translation, log_scale, steps, cutoff, beta=0.5, derivative_cutoff=1.0):
    """Casiez et al. 2012, on the vector (t, log s) and, along geodesics, on the rotation.

    ``steps``: (frames - 1,) seconds from each frame to the next.
    """

    def gain(frequency, seconds):
        rate = 2 * math.pi * frequency * seconds
        return rate / (rate + 1)

    values = np.concatenate([translation, log_scale[:, None]], axis=1)
    smooth_values, smooth_rotation = [values[0]], [rotation[0]]
    speed, angular_speed = np.zeros(values.shape[1]), 0.0
    for index, seconds in enumerate(steps, 1):
        change = values[index] - values[index - 1]
        speed += gain(derivative_cutoff, seconds) * (change / seconds - speed)
        step = gain(cutoff + beta * np.linalg.norm(speed), seconds)
        smooth_values.append(smooth_values[-1] + step * (values[index] - smooth_values[-1]))
        turn = rotation_vector(rotation[index - 1].T @ rotation[index])
        faster = np.linalg.norm(turn) / seconds - angular_speed
        angular_speed += gain(derivative_cutoff, seconds) * faster
        step = gain(cutoff + beta * angular_speed, seconds)
        lag = rotation_vector(smooth_rotation[-1].T @ rotation[index])
        smooth_rotation.append(smooth_rotation[-1] @ rotation_from_vector(step * lag))
    smooth_values = np.stack(smooth_values)
    return join_pose(np.stack(smooth_rotation), smooth_values[:, :3], np.exp(smooth_values[:, 3]))


def rotation_vector(rotation: Float[np.ndarray, "3 3"]) -> Float[np.ndarray, " 3"]:
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


def rotation_from_vector(vector: Float[np.ndarray, " 3"]) -> Float[np.ndarray, "3 3"]:
    """Rodrigues' formula: the inverse of rotation_vector."""
    angle = float(np.linalg.norm(vector))
    x, y, z = vector / angle if angle > 1e-12 else np.zeros(3)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


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
