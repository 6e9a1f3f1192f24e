"""A face detector made for photographs takes the drawn heads for faces and reads their pose."""

import numpy as np
import pytest

from data_pipelines.prepare.detect import Landmarker
from data_pipelines.prepare.head_pose import euler_degrees, rotation_from_transform
from data_pipelines.synthetic import poses
from data_pipelines.synthetic.expression import neutral
from data_pipelines.synthetic.identity import make_identity
from data_pipelines.synthetic.render import render

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def landmarker(shared_data):
    with Landmarker(shared_data / "models" / "face_landmarker.task", faces=1) as found:
        yield found


def _angles(face):
    rotation = rotation_from_transform(face.transform)
    return euler_degrees(np.concatenate([rotation, np.zeros((3, 1))], axis=1))


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


@pytest.mark.parametrize(
    ("pitch", "yaw", "roll"), [(0, 30, 0), (0, -30, 0), (15, 0, 0), (0, 0, 20)]
)
def test_angles_are_read_as_they_are(landmarker, pitch, yaw, roll):
    measured = []
    for seed in range(20):
        pose = poses.pose_matrix(pitch, yaw, roll)
        faces = landmarker.detect(render(make_identity(seed), neutral(), pose, 256).image)
        measured += [_angles(face) for face in faces[:1]]
    assert len(measured) >= 14
    np.testing.assert_allclose(np.median(measured, axis=0), [pitch, yaw, roll], atol=10)
