"""Head pose and rigid warp against plain statements and the invariants of method.md 10."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dexportrait_jax import geometry


def rotation_of(pitch, yaw, roll):
    """R_z R_y R_x from right-handed matrices about the axes, in numpy."""
    (cx, sx), (cy, sy), (cz, sz) = ((np.cos(a), np.sin(a)) for a in np.deg2rad([pitch, yaw, roll]))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def poses(seed, count, angle=25.0, shift=0.2):
    random = np.random.default_rng(seed)
    rotation = np.stack([rotation_of(*random.uniform(-angle, angle, 3)) for _ in range(count)])
    scale = random.uniform(0.8, 1.25, (count, 1, 1))
    translation = random.uniform(-shift, shift, (count, 3, 1)) * [[1], [1], [0]]
    return np.concatenate([scale * rotation, translation], axis=-1).astype(np.float32)


def lifted(pose):
    return np.concatenate([pose, np.broadcast_to([[[0, 0, 0, 1.0]]], (len(pose), 1, 4))], axis=1)


def simple(shift=(0, 0), scale=1.0, roll=0.0):
    return geometry.pose_matrix(
        geometry.euler_to_rotation(0, 0, roll)[None],
        jnp.array([[*shift, 0.0]]),
        jnp.full(1, scale),
    )


def read_trilinear(volume, points, padding):
    """One volume (D, H, W, C) read at (n, 3) points, cell by cell."""
    size = np.array(volume.shape[:3])
    output = np.zeros((len(points), volume.shape[-1]))
    for n, point in enumerate(points.astype(np.float64)):
        position = (point[::-1] + 1) * (size - 1) / 2
        if padding == "border":
            position = np.clip(position, 0, size - 1)
        base = np.floor(position).astype(int)
        for corner in np.ndindex(2, 2, 2):
            cell = base + corner
            weight = np.prod(1 - np.abs(position - cell))
            if np.all((cell >= 0) & (cell < size)):
                output[n] += weight * volume[tuple(cell)]
    return output


def test_euler_rotation_is_the_stated_product_and_inverts():
    angles = np.random.default_rng(0).uniform(-80, 80, (3, 20)).astype(np.float32)
    rotation = geometry.euler_to_rotation(*angles)
    for n in range(20):
        np.testing.assert_allclose(rotation[n], rotation_of(*angles[:, n]), atol=1e-6)
    np.testing.assert_allclose(geometry.rotation_to_euler(rotation), angles, atol=1e-3)


def test_euler_signs_in_the_image():
    """Positive roll turns the picture clockwise (y is down), yaw moves the nose (-z) to -x."""
    right, nose = jnp.array([1.0, 0, 0]), jnp.array([0, 0, -1.0])
    np.testing.assert_allclose(geometry.euler_to_rotation(0, 0, 90) @ right, [0, 1, 0], atol=1e-6)
    np.testing.assert_allclose(geometry.euler_to_rotation(0, 90, 0) @ nose, [-1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(geometry.euler_to_rotation(90, 0, 0) @ nose, [0, 1, 0], atol=1e-6)


def test_liveportrait_row_vectors_are_the_same_rotation():
    """Its x @ (R_z R_y R_x)^T equals our R x."""
    points = np.random.default_rng(0).standard_normal((5, 3))
    theirs = points @ rotation_of(10, -20, 30).T
    ours = (geometry.euler_to_rotation(10, -20, 30) @ points.T).T
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_rotation_6d():
    six = np.random.default_rng(0).standard_normal((7, 6)).astype(np.float32)
    rotation = geometry.rotation_6d(six)
    np.testing.assert_allclose(
        rotation.swapaxes(1, 2) @ rotation, np.eye(3)[None].repeat(7, 0), atol=1e-5
    )
    np.testing.assert_allclose(np.linalg.det(rotation), 1, atol=1e-5)
    np.testing.assert_allclose(
        geometry.rotation_6d(jnp.array([1.0, 0, 0, 0, 1, 0])), np.eye(3), atol=1e-6
    )
    # A rotation's own first two columns give it back.
    given = rotation_of(10, 20, 30)
    six = np.concatenate([given[:, 0], given[:, 1]]).astype(np.float32)
    np.testing.assert_allclose(geometry.rotation_6d(six), given, atol=1e-6)


def test_pose_parts_compose_and_invert():
    first, second = poses(1, 4), poses(2, 4)
    rotation, translation, scale = geometry.decompose(first)
    np.testing.assert_allclose(geometry.pose_matrix(rotation, translation, scale), first, atol=1e-6)
    np.testing.assert_allclose(np.linalg.det(rotation), 1, atol=1e-5)
    product = lifted(second) @ lifted(first)
    np.testing.assert_allclose(geometry.compose(second, first), product[:, :3], atol=1e-6)
    np.testing.assert_allclose(
        geometry.invert(first), np.linalg.inv(lifted(first))[:, :3], atol=1e-5
    )
    expected = lifted(second) @ np.linalg.inv(lifted(first))
    np.testing.assert_allclose(geometry.relative(second, first), expected[:, :3], atol=1e-5)


def test_geodesic_degrees():
    base = geometry.euler_to_rotation(10, 20, 30)
    for angle in (0.0, 5.0, 90.0, 180.0):
        turned = base @ geometry.euler_to_rotation(0, angle, 0)
        np.testing.assert_allclose(geometry.geodesic_degrees(base, turned), angle, atol=0.1)


def test_source_coordinates_are_the_closed_form():
    """p_src = s_s R_s (R_d^T (p - t_d) / s_d) + t_s."""
    source, driving = poses(1, 3), poses(2, 3)
    coordinates = geometry.source_coordinates(source, driving, (2, 3, 5))
    assert coordinates.shape == (3, 2, 3, 5, 3)
    cells = [2 * np.arange(n) / (n - 1) - 1 for n in (2, 3, 5)]
    z, y, x = np.meshgrid(*cells, indexing="ij")
    points = np.stack([x, y, z, np.ones_like(x)], axis=-1)
    for n in range(3):
        back = (lifted(source) @ np.linalg.inv(lifted(driving)))[n, :3]
        np.testing.assert_allclose(coordinates[n], points @ back.T, atol=1e-5)


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_equal_poses_leave_the_volume_alone(padding):
    pose = poses(3, 2)
    volume = np.random.default_rng(0).standard_normal((2, 4, 16, 15, 3)).astype(np.float32)
    np.testing.assert_array_equal(
        jax.jit(geometry.warp, static_argnums=3)(volume, pose, pose, padding), volume
    )


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_warp_equals_plain_trilinear_reading(padding):
    random = np.random.default_rng(0)
    volume = random.standard_normal((2, 3, 4, 5, 2)).astype(np.float32)
    points = random.uniform(-1.6, 1.6, (4, 2, 3, 4, 3)).astype(np.float32)
    points[0, 0, 0, 0] = (-1, 1, -1)
    points[0, 0, 0, 1] = (1, -1, 1)
    output = geometry.warp_volume(volume, points, padding)
    for n in range(4):  # two outputs for each volume
        expected = read_trilinear(volume[n // 2], points[n].reshape(-1, 3), padding)
        np.testing.assert_allclose(output[n].reshape(-1, 2), expected, atol=2e-5)


@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_warp_gradients_equal_finite_differences(padding):
    """By the volume and by the seven numbers (angles, translation, scale) of both poses."""
    random = np.random.default_rng(0)
    volume = random.standard_normal((2, 3, 4, 5, 2))
    weights = random.standard_normal(volume.shape)
    numbers = [random.uniform(-20, 20, (2, 3)), random.uniform(-0.2, 0.2, (2, 3)), [[0.9], [1.2]]]
    source = np.concatenate(numbers, axis=1)
    driving = source + random.uniform(-0.1, 0.1, source.shape) * [100, 100, 100, 1, 1, 1, 1]

    def pose_of(numbers):
        rotation = np.stack([rotation_of(*angles) for angles in numbers[:, :3]])
        return np.concatenate([rotation * numbers[:, 6:, None], numbers[:, 3:6, None]], axis=-1)

    def plain(volume, source, driving):
        back = (lifted(pose_of(source)) @ np.linalg.inv(lifted(pose_of(driving))))[:, :3]
        cells = [np.linspace(-1, 1, n) for n in volume.shape[1:4]]
        z, y, x = np.meshgrid(*cells, indexing="ij")
        grid = np.stack([x, y, z, np.ones_like(x)], axis=-1).reshape(-1, 4)
        read = [read_trilinear(v, grid @ b.T, padding) for v, b in zip(volume, back, strict=True)]
        return np.sum(weights.reshape(2, -1, 2) * np.stack(read))

    def ours(volume, source, driving):
        def pose(numbers):
            rotation = geometry.euler_to_rotation(*numbers[:, :3].T)
            return geometry.pose_matrix(rotation, numbers[:, 3:6], numbers[:, 6])

        return jnp.sum(weights * geometry.warp(volume, pose(source), pose(driving), padding))

    arguments = [volume, source, driving]
    gradients = jax.jit(jax.grad(ours, (0, 1, 2)))(*(a.astype(np.float32) for a in arguments))
    for which, gradient in enumerate(gradients):
        for index in random.permutation(gradient.size)[:14]:
            place = np.unravel_index(index, gradient.shape)
            values = []
            for sign in (1e-6, -1e-6):
                moved = [argument.copy() for argument in arguments]
                moved[which][place] += sign
                values.append(plain(*moved))
            expected = (values[0] - values[1]) / 2e-6
            np.testing.assert_allclose(gradient[place], expected, rtol=2e-3, atol=2e-3)


def test_warp_composes():
    """Moving A -> B and then B -> C is moving A -> C, where nothing left the volume."""
    axis = np.linspace(-1, 1, 33)
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    volume = np.exp(-4 * ((x - 0.1) ** 2 + (y + 0.2) ** 2 + z**2))[None, ..., None].astype(
        np.float32
    )
    first, second, third = (poses(seed, 1, angle=15, shift=0.1) for seed in (1, 2, 3))
    steps = geometry.warp(geometry.warp(volume, first, second), second, third)
    once = geometry.warp(volume, first, third)
    inner = (0, slice(8, 25), slice(8, 25), slice(8, 25), 0)
    np.testing.assert_allclose(steps[inner], once[inner], atol=0.04)
    assert np.abs(once[inner] - volume[inner]).max() > 0.1


@pytest.mark.parametrize("pose", [{"shift": (0.25, -0.5)}, {"scale": 1.3}, {"roll": 30.0}])
def test_motion_in_the_plane_is_the_motion_of_the_picture(pose):
    """Shift, zoom and roll of a volume constant in depth equal the same motion of a picture."""
    size = 9
    picture = np.random.default_rng(0).standard_normal((size, size, 2)).astype(np.float32)
    volume = np.broadcast_to(picture, (1, 5, size, size, 2))
    output = geometry.warp(volume, simple(), simple(**pose), "border")
    angle = np.deg2rad(pose.get("roll", 0.0))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    axis = np.linspace(-1, 1, size)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    points = (np.stack([x, y], -1) - pose.get("shift", (0, 0))) @ turn / pose.get("scale", 1.0)
    flat = np.concatenate([points.reshape(-1, 2), np.zeros((size * size, 1))], axis=-1)
    expected = read_trilinear(volume[0], flat, "border").reshape(size, size, 2)
    for depth in range(5):
        np.testing.assert_allclose(output[0, depth], expected, atol=2e-5)


def test_shift_moves_the_picture_right_and_down():
    volume = np.zeros((1, 2, 5, 5, 1), np.float32)
    volume[:, :, 1, 1] = 1
    output = geometry.warp(volume, simple(), simple(shift=(0.5, 1.0)))
    assert output[0, :, 3, 2, 0].tolist() == [1, 1]


def test_single_cell_axis_and_errors():
    volume = np.ones((1, 1, 4, 4, 2), np.float32)
    output = geometry.warp(volume, simple(), simple(shift=(0.1, 0)), "border")
    np.testing.assert_allclose(output, 1, atol=1e-6)
    with pytest.raises(ValueError, match="mirror"):
        geometry.warp(volume, simple(), simple(), "mirror")
    with pytest.raises(ValueError, match="3 outputs"):
        geometry.warp_volume(np.ones((2, 1, 4, 4, 2)), np.zeros((3, 1, 4, 4, 3)))


def test_warp_keeps_the_type_and_sums_gradients_in_float32():
    volume = jnp.ones((1, 2, 4, 4, 2), jnp.bfloat16)
    assert geometry.warp(volume, simple(), simple(shift=(0.1, 0))).dtype == jnp.bfloat16


def test_ray_map():
    pose = poses(1, 2)
    identity = np.broadcast_to(np.eye(3, 4, dtype=np.float32), (2, 3, 4))
    for kind in ("displacement", "plucker6"):
        assert not geometry.ray_map(identity, 4, 6, kind=kind).any()
    v, u = np.meshgrid((np.arange(4) + 0.5) / 2 - 1, (np.arange(6) + 0.5) / 3 - 1, indexing="ij")
    plane = np.stack([u, v, np.zeros_like(u)], axis=-1)
    for homogeneous in (True, False):
        points = np.concatenate([plane, np.full((4, 6, 1), float(homogeneous))], axis=-1)
        expected = np.einsum("bij,hwj->bhwi", pose, points) - plane
        rays = geometry.ray_map(pose, 4, 6, homogeneous)
        np.testing.assert_allclose(rays, expected, atol=1e-6)
    six = geometry.ray_map(pose, 4, 6, kind="plucker6")
    np.testing.assert_allclose(six[..., 3:], np.cross(plane[None], six[..., :3]), atol=1e-6)
    with pytest.raises(ValueError, match="rays"):
        geometry.ray_map(pose, 4, 6, kind="rays")


def test_ray_map_from_corner_to_corner():
    """Its points lie as a volume's cells do."""
    pose = np.asarray(poses(1, 2))
    u, v = np.meshgrid(np.linspace(-1, 1, 6), np.linspace(-1, 1, 4))
    plane = np.stack([u, v, np.zeros_like(u), np.ones_like(u)], axis=-1)
    expected = np.einsum("bij,hwj->bhwi", pose, plane) - plane[..., :3]
    found = geometry.ray_map(pose, 4, 6, points="corners")
    np.testing.assert_allclose(found, expected, atol=1e-6)
    with pytest.raises(ValueError, match="neither 'centres' nor 'corners'"):
        geometry.ray_map(pose, 4, 6, points="edges")
