"""Linear probes and the pose gauge: what a latent tells, and how far poses are off once the gauge is settled.

A probe is a ridge regression fitted on some people and scored on others. The figures of merit are R2
against the mean of the people it is scored on; below 0 means worse than that mean, and is kept, not cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

# Strengths of the ridge, in units of the mean variance of a feature; the best one is chosen on training people.
STRENGTHS = tuple(10.0**power for power in range(-5, 3))
FOLDS = 5


@dataclass(frozen=True)
class Probe:
    """``predict`` = (features - mean) @ weights + bias."""

    mean: Float[np.ndarray, " features"]
    weights: Float[np.ndarray, "features targets"]
    bias: Float[np.ndarray, " targets"]
    strength: float

    def predict(self, features: Float[np.ndarray, "n features"]) -> Float[np.ndarray, "n targets"]:
        """The targets that the features tell."""
        return (features.astype(np.float64) - self.mean) @ self.weights + self.bias


def fit_probe(
    features: Float[np.ndarray, "n features"],
    targets: Float[np.ndarray, "n targets"],
    people: Int[np.ndarray, " n"],
) -> Probe:
    """Ridge regression; its strength is the one of STRENGTHS that predicts left-out people best.

    Args:
        people: who each row shows. Folds are made of whole people, so that a strength which merely
            remembers faces is not chosen.
    """
    names = np.unique(people)
    folds = np.searchsorted(names, people) % min(FOLDS, len(names))
    errors = np.zeros(len(STRENGTHS))
    if len(names) > 1:
        for fold in range(min(FOLDS, len(names))):
            rest = folds != fold
            for n, strength in enumerate(STRENGTHS):
                probe = _ridge(features[rest], targets[rest], strength)
                errors[n] += np.sum((probe.predict(features[~rest]) - targets[~rest]) ** 2)
    return _ridge(features, targets, STRENGTHS[int(np.argmin(errors))])


def _ridge(features, targets, strength: float) -> Probe:
    features, targets = features.astype(np.float64), targets.astype(np.float64)
    mean, bias = features.mean(0), targets.mean(0)
    centred = features - mean
    gram = centred.T @ centred
    # A latent that never moves has no variance at all: its probe then says the mean.
    unit = max(float(np.trace(gram)) / len(gram), 1e-12)
    gram[np.diag_indices_from(gram)] += strength * unit
    weights = np.linalg.solve(gram, centred.T @ (targets - bias))
    return Probe(mean, weights, bias, strength)


def r_squared(
    predicted: Float[np.ndarray, "n targets"], targets: Float[np.ndarray, "n targets"]
) -> Float[np.ndarray, " targets"]:
    """1 - squared error / variance, of each target; 0 for one that is constant."""
    variance = np.sum((targets - targets.mean(0)) ** 2, 0)
    error = np.sum((predicted - targets) ** 2, 0)
    return np.where(variance > 1e-12, 1 - error / np.maximum(variance, 1e-12), 0.0)


def identity_leak(
    features: Float[np.ndarray, "n features"], people: Int[np.ndarray, " n"]
) -> tuple[float, float]:
    """(accuracy of a linear identity probe minus chance, chance).

    The people are those it is scored on, so here every second row of a person is for fitting and the
    others for scoring: the question is whether the latent tells people apart that it knows.
    """
    order = np.argsort(people, kind="stable")
    features, people = features[order], people[order]
    names, first, label = np.unique(people, return_index=True, return_inverse=True)
    fitting = (np.arange(len(people)) - first[label]) % 2 == 0
    one_hot = np.eye(len(names))[label]
    # Folds over rows, not people: a person left out could not be recognised.
    rows = np.arange(np.count_nonzero(fitting)) // 2
    probe = fit_probe(features[fitting], one_hot[fitting], rows)
    guess = np.argmax(probe.predict(features[~fitting]), 1)
    accuracy = float(np.mean(guess == label[~fitting]))
    return accuracy - 1 / len(names), 1 / len(names)


# --- poses ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gauge:
    """The fixed G of ``P_found = P_true G`` (method.md 2): the warp cannot tell P from P G."""

    rotation: Float[np.ndarray, "3 3"]
    scale: float
    translation: Float[np.ndarray, " 3"]

    def remove(self, poses: Float[np.ndarray, "n 3 4"]) -> Float[np.ndarray, "n 3 4"]:
        """P G^-1."""
        linear = poses[:, :, :3] @ self.rotation.T / self.scale
        shift = poses[:, :, 3] - np.einsum("nij,j->ni", linear, self.translation)
        return np.concatenate([linear, shift[:, :, None]], -1)


def split_pose(
    poses: Float[np.ndarray, "n 3 4"],
) -> tuple[Float[np.ndarray, "n 3 3"], Float[np.ndarray, " n"], Float[np.ndarray, "n 3"]]:
    """Rotations, scales and translations of [sR | t]."""
    poses = poses.astype(np.float64)
    scales = np.cbrt(np.linalg.det(poses[:, :, :3]))
    return poses[:, :, :3] / scales[:, None, None], scales, poses[:, :, 3]


def fit_gauge(found: Float[np.ndarray, "n 3 4"], true: Float[np.ndarray, "n 3 4"]) -> Gauge:
    """The one G that explains ``found`` from ``true`` best: chordal mean rotation, mean log scale, mean shift.

    t_found = s_true R_true t_G + t_true, so t_G is a least-squares solution over all frames; only
    x and y count, as t_z is 0 by convention.
    """
    rotation_found, scale_found, shift_found = split_pose(found)
    rotation_true, scale_true, shift_true = split_pose(true)
    rotation = mean_rotation(np.einsum("nji,njk->nik", rotation_true, rotation_found))
    scale = float(np.exp(np.mean(np.log(scale_found / scale_true))))
    system = (scale_true[:, None, None] * rotation_true)[:, :2].reshape(-1, 3)
    wanted = (shift_found - shift_true)[:, :2].reshape(-1)
    translation = np.linalg.lstsq(system, wanted, rcond=None)[0]
    return Gauge(rotation, scale, translation)


def mean_rotation(rotations: Float[np.ndarray, "n 3 3"]) -> Float[np.ndarray, "3 3"]:
    """The rotation whose squared distances from these are least (the chordal mean)."""
    u, _, v = np.linalg.svd(rotations.sum(0))
    return u @ np.diag([1.0, 1.0, np.linalg.det(u @ v)]) @ v


def pose_errors(
    found: Float[np.ndarray, "n 3 4"], true: Float[np.ndarray, "n 3 4"]
) -> dict[str, Float[np.ndarray, " n"]]:
    """Of each frame: geodesic ``degrees``; ``scale``, |ratio - 1|; ``shift``, distance in x and y in crop units."""
    rotation_found, scale_found, shift_found = split_pose(found)
    rotation_true, scale_true, shift_true = split_pose(true)
    return {
        "degrees": angle_between(rotation_found, rotation_true),
        "scale": np.abs(scale_found / scale_true - 1),
        "shift": np.linalg.norm((shift_found - shift_true)[:, :2], axis=1),
    }


def angle_between(
    first: Float[np.ndarray, "*n 3 3"], second: Float[np.ndarray, "*n 3 3"]
) -> Float[np.ndarray, "*n"]:
    """Degrees of the rotation from the one to the other."""
    difference = np.linalg.norm(first - second, axis=(-2, -1))
    # |A - B| = 2 sqrt(2) sin(angle / 2): exact for small angles too, where arccos of the trace is not.
    return np.degrees(2 * np.arcsin(np.clip(difference / np.sqrt(8), 0, 1)))
