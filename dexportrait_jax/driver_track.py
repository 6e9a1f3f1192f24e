"""Pose and expression of every frame of a driver: encoded where its face is seen, bridged where not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from data_pipelines import spill
from data_pipelines.prepare.driver import Driver
from dexportrait_jax.face_clips import encode_clip
from dexportrait_jax.inference import BATCH, PortraitModel
from dexportrait_jax.pose_transfer import (
    join_pose,
    rotation_from_vector,
    rotation_vector,
    split_pose,
)


@dataclass(frozen=True)
class Track:
    """What a driver gives every frame; expressions are on disk (`spill`)."""

    poses: Float[np.ndarray, "frames 3 4"]
    expressions: Float[np.ndarray, "frames latent"]


def encode_driver(model: PortraitModel, driver: Driver, frames: int) -> Track:
    """The track of the first ``frames`` frames of a driver, by the model's own encoders."""
    # A gap at the end is bridged to the frame behind it.
    last = frames - 1 + int(np.argmax(driver.seen[frames - 1 :]))
    seen, times = driver.seen[: last + 1], driver.times[: last + 1]
    poses, expressions = encode_clip(model, driver.clip.part(0, int(seen.sum())))
    return Track(
        bridge_poses(poses, seen, times)[:frames],
        bridge_codes(expressions, seen, times)[:frames],
    )


def bridge_poses(
    poses: Float[np.ndarray, "seen 3 4"],
    seen: Bool[np.ndarray, " frames"],
    times: Float[np.ndarray, " frames"],
) -> Float[np.ndarray, "frames 3 4"]:
    """Poses of all frames from those that are seen, the first and the last of them among these.

    In a gap the rotation goes along the geodesic at even speed, t and log s along straight lines.
    Frames that are seen keep their pose bit for bit.
    """
    if seen.all():
        return poses
    before, behind, share = _neighbours(seen, times)
    rotation, translation, scale = split_pose(poses)
    turned = [
        rotation[a] @ rotation_from_vector(part * rotation_vector(rotation[a].T @ rotation[b]))
        for a, b, part in zip(before, behind, share, strict=True)
    ]
    bridged = np.empty((len(seen), 3, 4), np.float32)
    bridged[seen] = poses
    bridged[~seen] = join_pose(
        np.stack(turned),
        _between(translation, before, behind, share),
        np.exp(_between(np.log(scale), before, behind, share)),
    )
    return bridged


def bridge_codes(
    codes: Float[np.ndarray, "seen latent"],
    seen: Bool[np.ndarray, " frames"],
    times: Float[np.ndarray, " frames"],
) -> Float[np.ndarray, "frames latent"]:
    """Expression codes of all frames, along straight lines in gaps; see ``bridge_poses``."""
    if seen.all():
        return codes
    bridged = spill.zeros((len(seen), codes.shape[1]), codes.dtype)
    bridged[seen] = codes
    missing, neighbours = np.flatnonzero(~seen), _neighbours(seen, times)
    for first in range(0, len(missing), BATCH):
        part = slice(first, first + BATCH)
        bridged[missing[part]] = _between(codes, *(one[part] for one in neighbours))
    return bridged


def _neighbours(seen, times) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every frame of a gap: the seen frames about it, by number, and how far it is between them."""
    at = np.flatnonzero(seen)
    missing = np.flatnonzero(~seen)
    behind = np.searchsorted(at, missing)
    before = behind - 1
    start, end = times[at[before]], times[at[behind]]
    return before, behind, (times[missing] - start) / (end - start)


def _between(values, before, behind, share):
    share = share.reshape((-1,) + (1,) * (values.ndim - 1))
    return (1 - share) * values[before] + share * values[behind]
