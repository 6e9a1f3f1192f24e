"""Head pose P = [sR | t], what follows from two of them, and the rigid warp of a volume.

Conventions (method.md 2): p' = s R p + t on column vectors; x right, y down, z into the scene; the crop
spans [-1, 1] in x and y; R = R_z(roll) R_y(yaw) R_x(pitch), right-handed about those axes, degrees where
angles are numbers; t_z = 0. The identity is a frontal head of scale 1 in the middle of the crop.
Volume grids of n cells lie at 2 i / (n - 1) - 1 along every axis, so equal poses leave a volume as it is.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dexportrait_jax.trilinear import read_between

Pose = Float[Array, "*batch 3 4"]
Rotation = Float[Array, "*batch 3 3"]
Angle = Float[Array, "*batch"]
Padding = Literal["zeros", "border"]
RayMapPoints = Literal["centres", "corners"]

# Reading positions this close to a cell (in cells) are rounding errors of a position on the cell.
_SNAP = 1e-5


def pose_matrix(
    rotation: Rotation, translation: Float[Array, "*batch 3"], scale: Float[Array, "*batch"]
) -> Pose:
    """P = [sR | t]."""
    scaled = scale[..., None, None] * rotation
    return jnp.concatenate([scaled, translation[..., None]], axis=-1)


def decompose(pose: Pose) -> tuple[Rotation, Float[Array, "*batch 3"], Float[Array, "*batch"]]:
    """Rotation, translation and scale of P = [sR | t] with s > 0."""
    scale = jnp.sqrt(jnp.sum(pose[..., :3] ** 2, axis=(-2, -1)) / 3)
    return pose[..., :3] / scale[..., None, None], pose[..., 3], scale


def euler_to_rotation(pitch: Angle, yaw: Angle, roll: Angle) -> Rotation:
    """R = R_z(roll) R_y(yaw) R_x(pitch), angles in degrees.

    LivePortrait's matrix is the transpose of this one, for row vectors: the same rotation.
    """
    angles = [jnp.deg2rad(jnp.asarray(angle, jnp.float32)) for angle in (pitch, yaw, roll)]
    (cx, sx), (cy, sy), (cz, sz) = ((jnp.cos(angle), jnp.sin(angle)) for angle in angles)
    rows = (
        (cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx),
        (sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx),
        (-sy, cy * sx, cy * cx),
    )
    return jnp.stack([jnp.stack(jnp.broadcast_arrays(*row), axis=-1) for row in rows], axis=-2)


def rotation_to_euler(rotation: Rotation) -> tuple[Angle, Angle, Angle]:
    """Pitch, yaw and roll in degrees, yaw in [-90, 90]; the inverse of ``euler_to_rotation``."""
    cosine = jnp.hypot(rotation[..., 0, 0], rotation[..., 1, 0])
    pitch = jnp.arctan2(rotation[..., 2, 1], rotation[..., 2, 2])
    yaw = jnp.arctan2(-rotation[..., 2, 0], cosine)
    roll = jnp.arctan2(rotation[..., 1, 0], rotation[..., 0, 0])
    return jnp.rad2deg(pitch), jnp.rad2deg(yaw), jnp.rad2deg(roll)


def rotation_6d(six: Float[Array, "*batch 6"]) -> Rotation:
    """Rotation whose first two columns are the given vectors made orthonormal (Zhou et al. 2019).

    (1, 0, 0, 0, 1, 0) is the identity.
    """

    def unit(vector: Array) -> Array:
        return vector * lax.rsqrt(jnp.sum(vector**2, axis=-1, keepdims=True) + 1e-12)

    first = unit(six[..., :3])
    second = six[..., 3:] - jnp.sum(first * six[..., 3:], axis=-1, keepdims=True) * first
    second = unit(second)
    return jnp.stack([first, second, jnp.cross(first, second)], axis=-1)


def compose(second: Pose, first: Pose) -> Pose:
    """The pose that applies ``first``, then ``second``."""
    linear = _product(second[..., :3], first[..., :3])
    translation = _product(second[..., :3], first[..., 3:]) + second[..., 3:]
    return jnp.concatenate([linear, translation], axis=-1)


def invert(pose: Pose) -> Pose:
    """The pose that undoes ``pose``."""
    squared_scale = jnp.sum(pose[..., :3] ** 2, axis=(-2, -1), keepdims=True) / 3
    linear = jnp.swapaxes(pose[..., :3], -1, -2) / squared_scale
    return jnp.concatenate([linear, -_product(linear, pose[..., 3:])], axis=-1)


def relative(driving: Pose, source: Pose) -> Pose:
    """T = P_d P_s^-1: source -> canonical -> driving (method.md 2)."""
    return compose(driving, invert(source))


def geodesic_degrees(first: Rotation, second: Rotation) -> Angle:
    """Angle of the rotation between two rotations, in [0, 180]."""
    chord = jnp.sqrt(jnp.sum((first - second) ** 2, axis=(-2, -1)) / 8)
    return jnp.rad2deg(2 * jnp.arcsin(jnp.minimum(chord, 1.0)))


def source_coordinates(
    source: Float[Array, "batch 3 4"],
    driving: Float[Array, "batch 3 4"],
    shape: tuple[int, int, int],
) -> Float[Array, "batch depth height width 3"]:
    """Where each cell of the output volume reads in the source volume: T^-1 p, as (x, y, z).

    With q = P_d^-1 p the answer P_s q is written p + (P_s - P_d) q, which is p itself, to the bit,
    where the poses are equal.
    """
    depth, height, width = (_cells(n) for n in shape)
    grid = jnp.stack(jnp.broadcast_arrays(width, height[:, None], depth[:, None, None]), axis=-1)
    canonical = _apply(invert(driving), grid)
    moved = _apply(source - driving, canonical)
    return grid + moved


def warp_volume(
    volume: Float[Array, "sources depth height width channels"],
    coordinates: Float[Array, "batch out_depth out_height out_width 3"],
    padding: Padding = "zeros",
) -> Float[Array, "batch out_depth out_height out_width channels"]:
    """Trilinear reading of a volume at coordinates (x, y, z) in [-1, 1], corners aligned (method.md 2).

    Outside the volume stands zero, or with "border" its nearest cell. One source may serve several
    outputs: the batch is then sources * outputs, source-major. Positions, weights, and the gradients to
    volume and coordinates are float32; the result has the volume's type.
    """
    if padding not in ("zeros", "border"):
        raise ValueError(f"padding {padding!r} is neither 'zeros' nor 'border'")
    sources, *shape, channels = volume.shape
    batch, *out_shape = coordinates.shape[:-1]
    if batch % sources:
        raise ValueError(f"{batch} outputs cannot be shared out among {sources} volumes")
    coordinates = coordinates.astype(jnp.float32)
    cells, fractions = [], []
    # Axis by axis from the start, which on a CPU is quicker than all three at once.
    for axis, size in enumerate(shape):
        along = (coordinates[..., 2 - axis] + 1) * ((size - 1) / 2)
        along = along.reshape(sources, -1, *out_shape)
        if padding == "border":
            along = jnp.clip(along, 0, size - 1)
        fixed = lax.stop_gradient(along)
        lower, nearest = jnp.floor(fixed + _SNAP), 0.0
        if padding == "border":
            lower = jnp.minimum(lower, max(size - 2, 0))  # the last position has a cell below, too
            nearest = jnp.round(fixed - lower)
        fraction = along - lower
        near = jnp.abs(fixed - lower - nearest) < _SNAP
        cells.append(lower.astype(jnp.int32))
        fractions.append(jnp.where(near, nearest + (along - fixed), fraction))
    output = read_between(volume.astype(jnp.float32), tuple(cells), tuple(fractions))
    return output.reshape(batch, *out_shape, channels).astype(volume.dtype)


def warp(
    volume: Float[Array, "sources depth height width channels"],
    source: Float[Array, "batch 3 4"],
    driving: Float[Array, "batch 3 4"],
    padding: Padding = "zeros",
) -> Float[Array, "batch depth height width channels"]:
    """The volume of heads in pose ``source`` moved rigidly to pose ``driving`` (method.md 3.5)."""
    return warp_volume(volume, source_coordinates(source, driving, volume.shape[1:4]), padding)


def ray_map(
    pose: Float[Array, "batch 3 4"],
    height: int,
    width: int,
    homogeneous: bool = True,
    kind: Literal["displacement", "plucker6"] = "displacement",
    points: RayMapPoints = "centres",
) -> Float[Array, "batch height width features"]:
    """How the pose moves each point (u, v, 0) of the canonical plane (method.md 4.2).

    "displacement": d = P [u, v, 0, 1] - [u, v, 0], 3 features; "plucker6": d and p x d, 6 features.
    (u, v) are pixel centres in [-1, 1], or with ``points`` "corners" lie as the cells of volumes do, the first at
    -1 and the last at 1. ``homogeneous=False`` puts 0 for the 1, as printed in the paper, which drops the
    translation. All zeros at the identity pose.
    """
    if kind not in ("displacement", "plucker6"):
        raise ValueError(f"ray map {kind!r} is neither 'displacement' nor 'plucker6'")
    if points not in ("centres", "corners"):
        raise ValueError(f"ray map points {points!r} are neither 'centres' nor 'corners'")
    place = _centres if points == "centres" else _cells
    u, v = place(width), place(height)
    plane = jnp.stack(jnp.broadcast_arrays(u, v[:, None], jnp.zeros(())), axis=-1)
    # P - [I | 0] first: exact zero at the identity.
    movement = pose - jnp.eye(3, 4)
    if not homogeneous:
        movement = movement.at[..., 3].set(0)
    displacement = _apply(movement, plane)
    if kind == "displacement":
        return displacement
    moment = jnp.cross(jnp.broadcast_to(plane, displacement.shape), displacement)
    return jnp.concatenate([displacement, moment], axis=-1)


def _centres(count: int) -> Float[Array, " count"]:
    """Coordinates of the middles of an axis' pixels."""
    return 2 * (jnp.arange(count) + 0.5) / count - 1


def _cells(count: int) -> Float[Array, " count"]:
    """Coordinates of the cells of an axis; a single cell lies in the middle."""
    if count == 1:
        return jnp.zeros(1)
    return 2 * jnp.arange(count) / (count - 1) - 1


def _product(first: Array, second: Array) -> Array:
    return jnp.matmul(first, second, precision=lax.Precision.HIGHEST)


def _apply(pose: Float[Array, "batch 3 4"], points: Float[Array, "... 3"]) -> Array:
    """Each pose applied to points (..., 3) shared by all or (batch, ..., 3): (batch, ..., 3)."""
    if points.ndim == 4 or points.ndim == 3:
        points = points[None]
    inner = (1,) * (points.ndim - 2)
    rows = pose.reshape(pose.shape[0], *inner, 3, 4)
    # Written out: a matrix product would round to bfloat16 on a TPU.
    terms = (rows[..., axis] * points[..., axis : axis + 1] for axis in range(3))
    return sum(terms, rows[..., 3])
