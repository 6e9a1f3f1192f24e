"""Augmentation: pictures, polygons and labels move together, and inference is training's plain case.

Clips hold float32: tolerances on crop coordinates are a few of its roundings,
where no other reason is given.
"""

import dataclasses

import cv2
import numpy as np
import pytest

from data_pipelines import augment, face_landmarks, records
from data_pipelines.prepare import masks
from tests import fixtures

SIMILARITIES = [
    {},
    {"flip": True},
    {"roll": 20.0},
    {"scale": 0.8},
    {"shift": (0.15, -0.1)},
    {"roll": -17.0, "scale": 1.2, "shift": (-0.1, 0.05), "flip": True},
]


@pytest.fixture(scope="module")
def clip():
    return fixtures.make_clip(1, frames=6, size=96)


@pytest.fixture
def knobs():
    return augment.default_augment()


def _project(points, pose):
    return (points @ pose[:, :3].T + pose[:, 3])[:, :2]


@pytest.mark.parametrize("options", SIMILARITIES)
def test_head_pose_follows_the_picture(options):
    """Re-derived: the moved projection of a head is the projection of the head by the moved pose."""
    matrix = augment.similarity_matrix(**options)
    head = np.random.default_rng(0).normal(size=(50, 3))
    pose = fixtures.head_pose(25, -12, 9, 1.1, (0.1, -0.2))
    moved = augment.transform_head_pose(matrix, pose)
    mirrored = head * (-1, 1, 1) if options.get("flip") else head
    expected = augment.transform_points(matrix, _project(head, pose))
    np.testing.assert_allclose(_project(mirrored, moved), expected, atol=1e-6)
    rotation = moved[:, :3] / np.cbrt(np.linalg.det(moved[:, :3]))
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-6)
    assert np.linalg.det(rotation) > 0 and moved[2, 3] == 0


def test_head_pose_by_angles():
    pose = fixtures.head_pose(yaw=20, pitch=10, roll=5, scale=1.0, shift=(0.2, 0.1))
    flipped = augment.transform_head_pose(augment.similarity_matrix(flip=True), pose)
    np.testing.assert_allclose(
        flipped, fixtures.head_pose(-20, 10, -5, 1.0, (-0.2, 0.1)), atol=1e-6
    )
    rolled = augment.transform_head_pose(augment.similarity_matrix(roll=12, scale=0.9), pose)
    np.testing.assert_allclose(rolled[:, :3], fixtures.head_pose(20, 10, 17, 0.9)[:, :3], atol=1e-6)


@pytest.mark.parametrize("options", SIMILARITIES)
def test_pictures_and_polygons_move_together(options):
    """A drawn blob ends where its polygon says."""
    size, matrix = 128, augment.similarity_matrix(**options)
    square = np.array([(0.1, -0.3), (0.4, -0.3), (0.4, 0.1), (0.1, 0.1)])
    picture = np.repeat(augment.fill_polygons([square], size)[..., None], 3, axis=-1)
    moved = augment.sample_picture(picture, matrix, 96, "black")[..., 0] / 255
    expected = augment.fill_polygons([augment.transform_points(matrix, square)], 96) / 255
    assert np.minimum(moved, expected).sum() / np.maximum(moved, expected).sum() > 0.85


@pytest.mark.parametrize("size", [96, 40])
@pytest.mark.parametrize("options", SIMILARITIES)
def test_a_point_of_the_picture_goes_where_the_matrix_says(options, size):
    """To a twentieth of a pixel: a shift of half a pixel would be a different crop contract."""
    matrix, place = augment.similarity_matrix(**options), np.array([0.15, -0.2])
    grid = (np.arange(128) + 0.5) / 64 - 1
    blob = np.exp(-((grid[None] - place[0]) ** 2 + (grid[:, None] - place[1]) ** 2) / 0.02)
    picture = np.repeat(np.round(255 * blob).astype(np.uint8)[..., None], 3, axis=-1)
    moved = augment.sample_picture(picture, matrix, size, "black")[..., 0].astype(float)
    rows, columns = np.mgrid[:size, :size]
    found = np.array([(moved * axis).sum() / moved.sum() for axis in (columns, rows)])
    expected = (augment.transform_points(matrix, place) + 1) * size / 2 - 0.5
    np.testing.assert_allclose(found, expected, atol=0.05)


def test_no_transformation_is_the_picture_itself(clip):
    picture = augment.decode_frame(clip, 0)
    same = augment.sample_picture(picture, augment.similarity_matrix(), clip.size)
    np.testing.assert_array_equal(same, picture)
    smaller = augment.sample_picture(picture, augment.similarity_matrix(), 32)
    expected = cv2.resize(picture, (32, 32), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(smaller, expected)


def test_reduction_averages_instead_of_skipping():
    checks = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    small = augment.sample_picture(
        np.stack([checks] * 3, -1), augment.similarity_matrix(roll=7), 32
    )
    assert np.abs(small[8:-8, 8:-8].astype(int) - 127).max() <= 20


def test_p1_hides_eyes_and_mouth(clip, knobs):
    draw = augment.neutral_draw(knobs)
    inputs = augment.frame_inputs(clip, 2, draw, knobs, (96, 96, 64))
    parts = {name: points[2] for name, points in clip.mask_polygons.items()}
    hidden = augment.fill_polygons([parts[n] for n in ("right_eye", "left_eye", "outer_lips")], 96)
    colours = inputs["pose_image"][hidden > 0]
    assert (colours == colours[0]).all()
    assert (inputs["image"][hidden > 0] != colours[0]).any()
    outside = cv2.dilate(hidden, np.ones((25, 25), np.uint8)) == 0
    np.testing.assert_array_equal(inputs["pose_image"][outside], inputs["image"][outside])


def test_p1_does_not_tell_a_closed_eye(clip, knobs):
    """The hidden region of an eye is nearly the same, open or shut."""
    areas = []
    for blink in (0.0, 1.0):
        _, shapes = fixtures.drawn_points(blink, 0.3, seed=0)
        shapes = {name: shape[:, :2] for name, shape in shapes.items()}
        regions = augment.hidden_regions(shapes, 0.2, knobs["pose_mask"]["minimum_height"])
        areas.append(cv2.contourArea(regions[0].astype(np.float32)))
        hull = cv2.convexHull(shapes["right_eye"].astype(np.float32))
        assert areas[-1] > 1.4 * cv2.contourArea(hull)  # dilated by 20 % both ways
    assert areas[1] == pytest.approx(areas[0], rel=0.4)  # without it the ratio is 0.15


def test_p1_fill_zero_and_random_dilation(clip, knobs):
    knobs["pose_mask"]["fill"] = "zero"
    draw = augment.neutral_draw(knobs)
    black = augment.frame_inputs(clip, 0, draw, knobs, (96, 96, 64))["pose_image"]
    wide = dataclasses.replace(draw, mask_dilation=0.6)
    wider = augment.frame_inputs(clip, 0, wide, knobs, (96, 96, 64))["pose_image"]
    assert 0 < (black == 0).all(-1).sum() < (wider == 0).all(-1).sum()


def test_e3_crop_is_the_face_box_whatever_the_frame_does(clip, knobs):
    """Scale and shift of S1 do not reach the expression crop; E1 turns about the face centre."""
    draw = augment.neutral_draw(knobs)
    box = clip.face_boxes[0]
    matrix = augment.expression_matrix(box, draw)
    centre = (box[:2] + box[2:]) / 2
    np.testing.assert_allclose(augment.transform_points(matrix, centre), 0, atol=1e-6)
    half = np.abs(augment.transform_points(matrix, box.reshape(2, 2))).max()
    assert half == pytest.approx(1 / 1.1, rel=1e-5)
    moved = dataclasses.replace(
        draw, frame=augment.similarity_matrix(scale=0.8, shift=(0.2, 0.1)), rotation=30.0
    )
    turned = augment.expression_matrix(box, moved)
    np.testing.assert_allclose(augment.transform_points(turned, centre), 0, atol=1e-6)
    expected = augment.similarity_matrix(30.0)[:, :2] @ matrix[:, :2]
    np.testing.assert_allclose(turned[:, :2], expected, atol=1e-6)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("bent", [False, True])
def test_landmarks_are_where_the_expression_picture_shows_them(knobs, flip, bent):
    """A white disc is painted on one landmark at a time and looked for in the crop."""
    clip = fixtures.make_clip(3, frames=1, size=256)
    frame = augment.similarity_matrix(roll=14, scale=0.9, shift=(0.05, -0.02), flip=flip)
    draw = dataclasses.replace(
        augment.neutral_draw(knobs), frame=frame, rotation=-20.0, jitter=np.array([0.02, -0.03])
    )
    if bent:
        field = np.random.default_rng(0).normal(0, 0.01, (6, 6, 2)).astype(np.float32)
        draw = dataclasses.replace(draw, displacement=field)
    found = augment.expression_landmarks(clip, 0, draw)
    assert found.shape == (68, 2)
    whole = np.abs(found).max(-1) < 0.9  # else the border cuts the disc
    assert whole.sum() > 50
    for place, number in enumerate(face_landmarks.FAN_LANDMARKS):
        if not whole[place]:
            continue
        if flip:
            number = face_landmarks.FAN_LANDMARKS[face_landmarks.MIRRORED_PLACES[place]]
        x, y = (clip.landmarks[0, number, :2] + 1) * 128 - 0.5
        picture = np.zeros((256, 256, 3), np.uint8)
        cv2.circle(picture, (round(x * 16), round(y * 16)), 4 * 16, (255,) * 3, -1, shift=4)
        shown = augment.expression_picture(picture, clip.face_boxes[0], draw, knobs, 128)[..., 0]
        rows, columns = np.indices(shown.shape)
        weight = shown / shown.sum()
        centre = (np.array([(columns * weight).sum(), (rows * weight).sum()]) + 0.5) / 64 - 1
        # A pixel of 128 is 0.016; the field of a bend is followed to first order.
        np.testing.assert_allclose(found[place], centre, atol=0.016 if bent else 0.006)


def test_landmarks_mirror_in_pairs():
    places = face_landmarks.MIRRORED_PLACES
    assert len(set(face_landmarks.FAN_LANDMARKS)) == 68
    np.testing.assert_array_equal(places[places], np.arange(68))
    numbers = np.array(face_landmarks.FAN_LANDMARKS)
    for left, right in (("left_eye", "right_eye"), ("left_brow", "right_brow")):
        mirrored = set(numbers[places][np.isin(numbers, masks.LANDMARKS_OF[left])])
        assert mirrored and mirrored <= set(masks.LANDMARKS_OF[right])


def test_colour_matrix():
    picture = np.random.default_rng(0).integers(30, 220, (8, 8, 3), np.uint8)
    same = cv2.transform(picture, augment.colour_matrix(1, 1, 1, 0))
    np.testing.assert_array_equal(same, picture)
    gray = cv2.transform(picture, augment.colour_matrix(1, 1, 0, 0))
    assert np.ptp(gray, axis=-1).max() == 0
    thirds = cv2.transform(picture, augment.colour_matrix(1, 1, 1, 1 / 3))
    assert np.abs(thirds.astype(int) - picture[..., [2, 0, 1]]).max() <= 1
    brighter = cv2.transform(picture, augment.colour_matrix(1.1, 1, 1, 0))
    np.testing.assert_allclose(brighter, picture * 1.1, atol=0.51)


def test_flip_swaps_left_and_right_blendshapes(clip, knobs):
    draw = dataclasses.replace(
        augment.neutral_draw(knobs), frame=augment.similarity_matrix(flip=True)
    )
    uneven = clip.blendshapes.copy()
    left, right = (records.BLENDSHAPES.index(f"mouthSmile{side}") for side in ("Left", "Right"))
    uneven[0, left], uneven[0, right] = 0.8, 0.1
    jaw = records.BLENDSHAPES.index("jawOpen")
    wink = dataclasses.replace(clip, blendshapes=uneven)
    flipped = augment.frame_inputs(wink, 0, draw, knobs, (32, 32, 32))["blendshapes"]
    assert flipped[left] == np.float32(0.1) and flipped[right] == np.float32(0.8)
    assert flipped[jaw] == uneven[0, jaw]


def test_component_mask_covers_the_parts_softly(clip, knobs):
    draw = augment.neutral_draw(knobs)
    mask = augment.frame_inputs(clip, 0, draw, knobs, (96, 96, 64))["component_mask"]
    parts = {name: points[0] for name, points in clip.mask_polygons.items()}
    core = augment.fill_polygons([parts["outer_lips"], parts["left_eye"]], 96)
    assert mask[core > 0].min() > 200
    far = cv2.dilate(
        augment.fill_polygons([parts[n] for n in knobs["component_mask"]["parts"]], 96),
        np.ones((9, 9), np.uint8),
    )
    assert mask[far == 0].max() < 30
    assert 0.02 < (mask > 127).mean() < 0.2
    assert len(np.unique(mask)) > 5


def test_every_random_operator_does_something_and_zero_probability_nothing(clip, knobs):
    rng = np.random.default_rng(0)
    sizes = (48, 48, 48)
    plain = augment.frame_inputs(clip, 1, augment.neutral_draw(knobs), knobs, sizes)
    for name in (
        "similarity",
        "pose_colour",
        "expression_rotation",
        "expression_colour",
        "expression_affine",
    ):
        only = augment.default_augment()
        for other in only.values():
            if "probability" in other:
                other["probability"] = 0.0
        only["pose_mask"].update(dilation_range=(0.2, 0.2), fill_jitter=0.0)
        only["expression_crop"].update(margin_range=(1.1, 1.1), centre_jitter=0.0)
        quiet = augment.frame_inputs(clip, 1, augment.random_draw(rng, only, False), only, sizes)
        for key in plain:
            np.testing.assert_array_equal(quiet[key], plain[key])
        only[name]["probability"] = 1.0
        loud = augment.frame_inputs(clip, 1, augment.random_draw(rng, only, False), only, sizes)
        changed = {key for key in plain if not np.array_equal(loud[key], plain[key])}
        expected = {
            "similarity": {
                "image",
                "pose_image",
                "component_mask",
                "head_pose",
                "expression_image",
                "expression_landmarks",
            },
            "pose_colour": {"pose_image"},
            "expression_colour": {"expression_image"},
        }.get(name, {"expression_image", "expression_landmarks"})
        assert changed == expected, name


def test_inference_inputs_are_training_inputs_without_chance(clip, knobs):
    first = augment.inference_inputs(clip, [0, 3], 48, 40, 32)
    again = augment.inference_inputs(clip, [0, 3], 48, 40, 32, knobs)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert first["image"].shape == (2, 48, 48, 3)
    assert first["pose_image"].shape == (2, 40, 40, 3)
    assert first["expression_image"].shape == (2, 32, 32, 3)
    np.testing.assert_array_equal(first["head_pose"], clip.head_pose[[0, 3]])
    knobs["expression_crop"]["gray"] = True
    gray = augment.inference_inputs(clip, [0], 48, 40, 32, knobs)["expression_image"]
    assert np.ptp(gray, axis=-1).max() == 0


def test_broken_pictures_are_record_errors(clip):
    for data in (b"", b"\xff\xd8 no jpeg \xff\xd9", clip.frames[0][:200], clip.frames[0][:-300]):
        broken = dataclasses.replace(clip, frames=[data])
        with pytest.raises(records.RecordError, match="frame 0"):
            augment.decode_frame(broken, 0)
