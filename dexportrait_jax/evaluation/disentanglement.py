"""What pose and expression encoders know, and what they know of each other, where the truth is known.

Gauge and probes are fitted on training people and scored on held-out ones. Every leak is to be read beside the
R2 of what the latent is for: a latent that says nothing leaks nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from dexportrait_jax.evaluation import probes
from dexportrait_jax.geometry import rotation_to_euler


@dataclass(frozen=True)
class Encoded:
    """Frames with what the encoders say of them and with the truth.

    Attributes:
        people: number of the person that each frame shows.
        poses: P as the pose encoder finds it, (n, 3, 4).
        latents: expression latents, (n, L).
        true_poses: P of the renderer, (n, 3, 4).
        parameters: true expression parameters, (n, K).
    """

    people: Int[np.ndarray, " n"]
    poses: Float[np.ndarray, "n 3 4"]
    latents: Float[np.ndarray, "n latent"]
    true_poses: Float[np.ndarray, "n 3 4"]
    parameters: Float[np.ndarray, "n parameters"]


def encoder_figures(
    training: Encoded, held_out: Encoded, parameter_names: tuple[str, ...]
) -> tuple[dict[str, float], dict[str, float]]:
    """Figures of the encoders, and R2 of every expression parameter.

    Returns:
        pose_error_degrees (mean geodesic error after one gauge fitted on training people),
        gauge_spread_degrees (how far the gauges of single people are from it), scale_error
        (mean |ratio - 1|), shift_error (mean distance, crop units), expression_r2 (latent to
        parameters, mean over all but gaze), gaze_r2, pose_leak_r2 (latent to pitch, yaw and roll),
        placement_leak_r2 (latent to log scale and shift), identity_leak, expression_in_pose_r2 (found
        pose to parameters, mean over all but gaze: hardly above 0 where poses vary much more than expressions turn
        them), expression_in_pose_error_r2 (the same of what the found pose has beside the true one, which sees
        that); and name -> R2.
    """
    gauge = probes.fit_gauge(training.poses, training.true_poses)

    def in_error(of: Encoded):
        return pose_error_features(gauge.remove(of.poses), of.true_poses)

    errors = probes.pose_errors(gauge.remove(held_out.poses), held_out.true_poses)

    def read(features, targets):
        probe = probes.fit_probe(features(training), targets(training), training.people)
        return probes.r_squared(probe.predict(features(held_out)), targets(held_out))

    latents, parameters = lambda of: of.latents, lambda of: of.parameters
    of_parameters = read(latents, parameters)
    in_pose = read(lambda of: pose_features(of.poses), parameters)
    in_pose_error = read(in_error, parameters)
    gaze = np.array(["gaze" in name for name in parameter_names])
    angles = read(latents, lambda of: pose_angles(of.true_poses))
    leak, chance = probes.identity_leak(held_out.latents, held_out.people)
    figures = {
        "pose_error_degrees": errors["degrees"].mean(),
        "gauge_spread_degrees": gauge_spread(held_out, gauge),
        "scale_error": errors["scale"].mean(),
        "shift_error": errors["shift"].mean(),
        "expression_r2": of_parameters[~gaze].mean(),
        "gaze_r2": of_parameters[gaze].mean() if gaze.any() else 0.0,
        "pose_leak_r2": angles.mean(),
        "pitch_leak_r2": angles[0],
        "yaw_leak_r2": angles[1],
        "roll_leak_r2": angles[2],
        "placement_leak_r2": read(latents, lambda of: placement(of.true_poses)).mean(),
        "identity_leak": leak,
        "identity_chance": chance,
        "expression_in_pose_r2": in_pose[~gaze].mean(),
        "expression_in_pose_error_r2": in_pose_error[~gaze].mean(),
    }
    each = dict(zip(parameter_names, map(float, of_parameters), strict=True))
    return {name: float(value) for name, value in figures.items()}, each


def gauge_spread(encoded: Encoded, gauge: probes.Gauge) -> float:
    """Mean angle in degrees from the one gauge to those fitted on each person's frames alone.

    Pairs in training show one person, so nothing in them keeps a gauge from drifting from person to person; pose
    taken from one person and given to another is off by just that (method.md 2).
    """
    angles = []
    for person in np.unique(encoded.people):
        own = encoded.people == person
        turned = probes.fit_gauge(encoded.poses[own], encoded.true_poses[own]).rotation
        angles.append(probes.angle_between(turned, gauge.rotation))
    return float(np.mean(angles))


def pose_angles(poses: Float[np.ndarray, "n 3 4"]) -> Float[np.ndarray, "n 3"]:
    """Pitch, yaw and roll in degrees."""
    rotation, _, _ = probes.split_pose(poses)
    return np.stack([np.asarray(angle) for angle in rotation_to_euler(rotation)], -1)


def placement(poses: Float[np.ndarray, "n 3 4"]) -> Float[np.ndarray, "n 3"]:
    """Log scale, and shift in x and y."""
    _, scale, shift = probes.split_pose(poses)
    return np.concatenate([np.log(scale)[:, None], shift[:, :2]], -1)


def pose_features(poses: Float[np.ndarray, "n 3 4"]) -> Float[np.ndarray, "n 12"]:
    """All that a linear probe may use of a pose: rotation matrix and placement, each of unit order."""
    rotation, _, _ = probes.split_pose(poses)
    return np.concatenate([rotation.reshape(len(poses), 9), placement(poses)], -1)


def pose_error_features(
    found: Float[np.ndarray, "n 3 4"], true: Float[np.ndarray, "n 3 4"]
) -> Float[np.ndarray, "n 6"]:
    """What the found pose has beside the true one, in the head's own frame: its turn, and its placement's difference.

    The turn is the axis times the sine of the angle.
    """
    turned, _, _ = probes.split_pose(found)
    straight, _, _ = probes.split_pose(true)
    beside = straight.transpose(0, 2, 1) @ turned
    crossed = (beside - beside.transpose(0, 2, 1)) / 2
    turn = np.stack([crossed[:, 2, 1], crossed[:, 0, 2], crossed[:, 1, 0]], -1)
    return np.concatenate([turn, placement(found) - placement(true)], -1)
