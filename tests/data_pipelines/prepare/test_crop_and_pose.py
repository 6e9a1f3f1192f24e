"""The crop contract and the pose labels.

Clips hold float32: tolerances on pixels, degrees and crop coordinates are a few of its roundings,
where no other reason is given.
"""

import dataclasses

import numpy as np
import pytest

from data_pipelines import video
from data_pipelines.prepare import clips, crop, head_pose
from dexportrait_jax.errors import UserError
from tests import fixtures
from tests.data_pipelines.prepare import scripted

SETTINGS = crop.Settings(size=64)


def test_crop_is_a_square_of_the_promised_scale_inside_the_picture():
    boxes = np.array([[300.0, 200, 400, 320], [310, 205, 410, 325]])
    box = crop.crop_box(boxes, (1280, 720), SETTINGS)
    side = box[2] - box[0]
    assert side == box[3] - box[1]
    assert 2.0 <= side / 120 <= 2.3
    centre = (box[0] + box[2]) / 2
    assert centre == pytest.approx(355, abs=1.5)
    assert (box[1] + box[3]) / 2 < 262  # a little up, for the hair


def test_crop_is_moved_into_the_picture_where_it_fits():
    box = crop.crop_box(np.array([[0.0, 10, 100, 110]]), (640, 480), SETTINGS)
    assert box[0] == 0 and box[1] == 0 and box[2] == 215


def test_crop_holds_all_of_a_face_that_moves():
    boxes = np.stack([np.array([x, 200, x + 100, 320]) for x in np.linspace(100, 400, 20)])
    box = crop.crop_box(boxes, (1280, 720), SETTINGS)
    assert box[0] <= 100 and box[2] >= 500
    assert box[2] - box[0] == pytest.approx(400 * 1.15, abs=1)


def test_crop_is_that_of_the_usual_box():
    """One frame of nine, in which the face is found half as large again, does not make it larger: 2.15 times 100."""
    boxes = np.tile([[400.0, 300, 500, 400]], (9, 1))
    boxes[4] += (-25, -25, 25, 25)
    box = crop.crop_box(boxes, (1280, 720), SETTINGS)
    assert (box[2:] - box[:2]).tolist() == [215, 215]


def test_crop_shrinks_to_fit_but_not_below_the_minimum():
    fits = crop.crop_box(np.array([[200.0, 100, 440, 300]]), (640, 500), SETTINGS)
    assert fits[3] - fits[1] == 500  # 2.08 boxes instead of 2.15
    larger = crop.crop_box(np.array([[200.0, 50, 440, 350]]), (640, 360), SETTINGS)
    assert larger[3] - larger[1] == 600 and larger[1] < 0 and larger[3] > 360


def test_crop_larger_than_the_picture_shows_all_of_it():
    """The shift towards the hair costs no rows, and no more is black than has to be."""
    face = np.array([[200.0, 60, 360, 260]])
    box = crop.crop_box(face, (640, 360), SETTINGS)
    assert (box[1], box[3]) == (-40, 360)
    shown = crop.extract(np.full((360, 640, 3), 255, np.uint8), box, 400)
    assert (shown == 0).all((1, 2)).sum() == 400 - 360
    upright = crop.crop_box(np.array([[0.0, 240, 150, 440]]), (360, 640), SETTINGS)
    assert (upright[0], upright[2]) == (-40, 360)
    # But for the margin beneath a face at the edge.
    edge = crop.crop_box(np.array([[200.0, 174, 360, 360]]), (640, 360), SETTINGS)
    assert (edge[1], edge[3]) == (1, 373)


def test_extract_fills_outside_with_black_and_keeps_the_rest():
    image = np.random.default_rng(0).integers(1, 255, (20, 30, 3), np.uint8)
    picked = crop.extract(image, np.array([-5, 2, 15, 22]), 20)
    np.testing.assert_array_equal(picked[:18, 5:], image[2:20, :15])
    assert (picked[:, :5] == 0).all() and (picked[18:] == 0).all()
    outside = crop.extract(image, np.array([100, 100, 120, 120]), 8)
    assert outside.shape == (8, 8, 3) and (outside == 0).all()


def test_crop_coordinates_and_back():
    box = np.array([-20.0, 30, 180, 230])
    points = np.array([[-20.0, 30, 0], [180, 230, 50], [80, 130, -100]])
    np.testing.assert_allclose(crop.to_crop(points, box), [[-1, -1, 0], [1, 1, 0.5], [0, 0, -1]])
    np.testing.assert_allclose(crop.to_pixels(crop.to_crop(points, box), box), points, atol=1e-5)


@pytest.mark.parametrize("angles", [(0, 0, 0), (25, 0, 0), (0, -15, 0), (0, 0, 20), (30, 10, -12)])
def test_rotation_is_read_from_mediapipe_axes(angles):
    """R of the contract, seen through MediaPipe's y-up axes with a scale, comes back."""
    yaw, pitch, roll = angles
    pose = fixtures.head_pose(yaw, pitch, roll, 1.3)
    transform = np.eye(4)
    flip = np.diag([1.0, -1.0, -1.0])
    transform[:3, :3] = flip @ pose[:, :3] @ flip
    rotation = head_pose.rotation_from_transform(transform)
    np.testing.assert_allclose(rotation, pose[:, :3] / 1.3, atol=1e-6)
    found = head_pose.euler_degrees(np.concatenate([1.3 * rotation, np.zeros((3, 1))], 1))
    np.testing.assert_allclose(found, [pitch, yaw, roll], atol=1e-5)


def test_pose_of_a_rigid_head():
    """Labels of a head that turns, grows and moves: angles, scale ratio and shift come back."""
    head = fixtures.drawn_points(0, 0, 0)[0] + (0.0, -0.1, 0.05)
    flip = np.diag([1.0, -1.0, -1.0])
    moves = [(0, 0, 0, 1.0, (0, 0)), (20, -10, 15, 1.2, (0.2, -0.1)), (-25, 5, 0, 0.8, (0, 0.3))]
    landmarks, transforms = [], []
    for yaw, pitch, roll, scale, shift in moves:
        pose = fixtures.head_pose(yaw, pitch, roll, scale, shift)
        landmarks.append(head @ pose[:, :3].T + pose[:, 3])
        transform = np.eye(4)
        transform[:3, :3] = flip @ pose[:, :3] @ flip
        transforms.append(transform)
    found = head_pose.head_pose(np.array(landmarks), np.array(transforms))
    scales = np.cbrt(np.linalg.det(found[:, :, :3].astype(float)))
    np.testing.assert_allclose(scales / scales[0], [1.0, 1.2, 0.8], rtol=1e-6)
    # The whole P maps one fixed head onto every frame, so all relative poses are exact.
    # (depth is counted from the middle of the head, which frame 0 shows at the depth it has)
    stable = head[list(head_pose.STABLE)]
    spread = np.sqrt(np.square(stable - stable.mean(0))[:, :2].sum(-1).mean())
    depth = stable[:, 2].mean() + spread * head_pose._TO_HEAD_CENTRE[2]
    origin = np.append(found[0, :2, 3], depth)
    unit = np.linalg.solve(found[0, :, :3].astype(float), (head - origin).T)
    for points, pose in zip(landmarks, found, strict=True):
        mapped = (pose[:, :3] @ unit + pose[:, 3:]).T
        np.testing.assert_allclose(mapped[:, :2], points[:, :2], atol=1e-6)
    assert (found[:, 2, 3] == 0).all()


@pytest.mark.parametrize("place", [(0.0, 0.0), (0.35, 0.0), (-0.35, 0.1), (0.0, -0.3)])
def test_pose_does_not_depend_on_the_place_in_the_picture(place):
    """What MediaPipe would fit to a face beside the middle of the picture gives the rotation that is seen."""
    head = fixtures.drawn_points(0, 0, 0)[0]
    pose = fixtures.head_pose(15, -10, 8, 0.9, (0.1, 0.2))
    seen = head @ pose[:, :3].T + pose[:, 3]
    points = head[head_pose._FITTED_POINTS]
    weights = head_pose._FITTED_WEIGHTS[:, None]
    before_lens = points @ pose[:, :3].T
    before_lens[:, :2] += np.array(place) * before_lens[:, 2:]
    centred = before_lens - (weights * before_lens).sum(0) / weights.sum()
    left, _, right = np.linalg.svd((weights * centred).T @ (points - points.mean(0)))
    flip = np.diag([1.0, -1.0, -1.0])
    transform = np.eye(4)
    transform[:3, :3] = flip @ (left @ right) @ flip
    transform[:3, 3] = flip @ (40.0 * np.append(place, 1.0))
    found = head_pose.head_pose(seen[None], transform[None])[0]
    np.testing.assert_allclose(
        head_pose.euler_degrees(found), head_pose.euler_degrees(pose), atol=1e-4
    )


def test_a_picture_that_changes_its_size_begins_a_clip(monkeypatch):
    """As in recorded calls: the same face, in a frame that grows by a quarter and keeps its shape."""
    large = scripted.picture()
    large = np.pad(large, ((0, 40), (0, 40), (0, 0)), mode="edge")
    shown = [scripted.picture()] * 6 + [large] * 7
    frames = [video.Frame(image, number / 25) for number, image in enumerate(shown)]
    monkeypatch.setattr(video, "read_frames", lambda *_, **__: iter(frames))
    settings = dataclasses.replace(SETTINGS, min_frames=2)
    made, verdict = clips.clips_from_video("a.mp4", scripted.ScriptedLandmarker(), settings)
    small, grown = made
    assert (len(small), len(grown), verdict.cuts) == (6, 7, 1)
    assert small.original_size.tolist() == [160, 160]
    assert grown.original_size.tolist() == [200, 200]
    assert small.crop_box[2] - small.crop_box[0] <= 160 and (grown.crop_box[2:] <= 200).all()


def test_clip_from_image_is_labelled_in_its_crop():
    clip = clips.clip_from_image(scripted.picture(), scripted.ScriptedLandmarker(), SETTINGS)
    assert len(clip) == 1 and clip.size == 64
    original = crop.to_pixels(clip.landmarks[0], clip.crop_box)
    face = scripted.ScriptedLandmarker().detect(scripted.picture())[0]
    np.testing.assert_allclose(original, face.landmarks, atol=1e-4)
    np.testing.assert_allclose(head_pose.euler_degrees(clip.head_pose[0]), [5, 10, -8], atol=1e-5)
    np.testing.assert_allclose(clip.mask_polygons["nose"][0], clip.landmarks[0, list(_nose()), :2])
    assert clip.settings["face_scale"] == 2.15


def _nose():
    from data_pipelines.prepare import masks

    return masks.LANDMARKS_OF["nose"]


@pytest.mark.parametrize(
    ("faces", "mirror", "words"),
    [(0, 0.0, "no face found"), (2, 0.0, "several people"), (1, 0.06, "not a human face")],
)
def test_clip_from_image_says_why_not(faces, mirror, words):
    landmarker = scripted.ScriptedLandmarker(mirror)
    with pytest.raises(UserError, match=words):
        clips.clip_from_image(scripted.picture(faces), landmarker, SETTINGS)
