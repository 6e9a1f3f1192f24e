"""A face detector made for photographs takes the drawn heads for faces and reads their pose."""

import numpy as np
import pytest

from data_pipelines.prepare.detect import Landmarker
from data_pipelines.prepare.head_pose import euler_degrees, rotation_from_transform
from data_pipelines.synthetic import poses
from data_pipelines.synthetic.expression import neutral
from data_pipelines.synthetic.identity import make_identity
from data_pipelines.synthetic.render import canonical_landmarks, render

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def landmarker(shared_data):
    with Landmarker(shared_data / "models" / "face_landmarker.task", faces=1) as found:
        yield found


def _angles(rotation):
    return euler_degrees(np.concatenate([rotation, np.zeros((3, 1))], axis=1))


def _fitted_rotation(canonical, seen):
    """The rotation that brings (N, 3) canonical points to (N, 2) seen ones, orthographically."""
    rows = np.linalg.lstsq(canonical - canonical.mean(0), seen - seen.mean(0), rcond=None)[0].T
    rows = rows / np.linalg.norm(rows, axis=1).mean()
    return poses.nearest_rotation(np.vstack([rows, np.cross(*rows)]))


def test_faces_are_found_where_they_are(landmarker):
    found, errors = 0, []
    for seed in range(50):
        seen = render(make_identity(seed), neutral(), poses.pose_matrix(), 256)
        faces = landmarker.detect(seen.image)
        if faces:
            found += 1
            points = faces[0].landmarks[:, :2] / 128 - 1
            errors.append(np.linalg.norm(points - seen.landmarks[:, :2], axis=1).mean())
    assert found >= 45
    assert np.median(errors) < 0.05  # crop coordinates: 2.5 % of the side


def _readings(landmarker, angles):
    """Medians over people of (pitch, yaw, roll): by the detector's points, and by its transform."""
    by_points, by_transform = [], []
    for seed in range(20):
        person = make_identity(seed)
        seen = render(person, neutral(), poses.pose_matrix(*angles), 256)
        for face in landmarker.detect(seen.image)[:1]:
            points = face.landmarks[:, :2] / 128 - 1
            fitted = _fitted_rotation(canonical_landmarks(person, neutral()), points)
            by_points.append(_angles(fitted))
            by_transform.append(_angles(rotation_from_transform(face.transform)))
    assert len(by_points) >= 18
    return np.median(by_points, axis=0), np.median(by_transform, axis=0)


@pytest.fixture(scope="module")
def frontal(landmarker):
    return _readings(landmarker, (0, 0, 0))


def test_frontal_is_frontal(frontal):
    """Up to 4.4 degrees of pitch, by which the detector's idea of a level head differs; yaw and roll 0.4."""
    for read in frontal:
        np.testing.assert_allclose(read, 0, atol=6)
        np.testing.assert_allclose(read[1:], 0, atol=1)


@pytest.mark.parametrize(
    ("axis", "degrees"), [(1, 30), (1, -30), (1, 50), (0, 20), (0, -20), (2, 20), (2, -30)]
)
def test_turns_are_read_as_they_are(landmarker, frontal, axis, degrees):
    """From the frontal head on: where the detector sees the points, the head was turned as drawn.

    Its own transform assumes a perspective camera and its own depths; it reads about 0.7 of the yaw of
    these orthographic pictures, but has the axis and the sign.
    """
    angles = np.eye(3)[axis] * degrees
    points, transform = (
        read - rest for read, rest in zip(_readings(landmarker, angles), frontal, strict=True)
    )
    # A detector's reading, not ours: off by up to 7.6 degrees in pitch, 6.7 at yaw 50, 1.4 in roll.
    np.testing.assert_allclose(points, angles, atol=8)
    assert 0.6 < transform[axis] / degrees < 1.05
    assert np.abs(np.delete(transform, axis)).max() < 3
