"""Inputs of the networks: what is hidden is hidden, crops are where they are said to be, inference is plain.

Clips hold float32: tolerances on crop coordinates are a few of its roundings,
where no other reason is given.
"""

import dataclasses

import cv2
import numpy as np
import pytest

from data_pipelines import augment, face_landmarks, network_inputs, records, transforms
from data_pipelines.prepare import masks
from tests import fixtures


@pytest.fixture(scope="module")
def clip():
    return fixtures.make_clip(1, frames=6, size=96)


@pytest.fixture
def knobs():
    return augment.default_augment()


def test_p1_hides_eyes_and_mouth(clip, knobs):
    draw = augment.neutral_draw(knobs)
    inputs = network_inputs.frame_inputs(clip, 2, draw, knobs, (96, 96, 64))
    parts = {name: points[2] for name, points in clip.mask_polygons.items()}
    hidden = transforms.fill_polygons(
        [parts[n] for n in ("right_eye", "left_eye", "outer_lips")], 96
    )
    colours = inputs["pose_image"][hidden > 0]
    assert (colours == colours[0]).all()
    assert (inputs["image"][hidden > 0] != colours[0]).any()
    outside = cv2.dilate(hidden, np.ones((25, 25), np.uint8)) == 0
    np.testing.assert_array_equal(inputs["pose_image"][outside], inputs["image"][outside])


@pytest.mark.parametrize("border", ["reflect", "replicate"])
@pytest.mark.parametrize(
    "moved",
    [
        {"scale": 0.5},
        {"roll": 20.0, "scale": 0.8, "shift": (0.1, -0.5)},
        {"scale": 0.4, "shift": (0.5, 0.0), "flip": True},
    ],
)
def test_p1_hides_what_the_border_mirrors(clip, knobs, moved, border):
    """Eyes and mouth are painted blue, and a picture of a head that has moved away shows them again at its edge."""
    knobs["similarity"]["border"] = border
    draw = dataclasses.replace(
        augment.neutral_draw(knobs), frame=transforms.similarity_matrix(**moved)
    )
    parts = [clip.mask_polygons[name][2] for name in ("right_eye", "left_eye", "outer_lips")]
    picture = np.full((96, 96, 3), (200, 150, 100), np.uint8)
    picture[transforms.fill_polygons(parts, 96) > 0] = (0, 0, 255)
    seen = network_inputs.frame_inputs(clip, 2, draw, knobs, (96, 96, 64), picture=picture)
    once = transforms.fill_polygons([transforms.transform_points(draw.frame, p) for p in parts], 96)
    blue = seen["image"][..., 2] > 180
    assert blue[once > 0].mean() > 0.5
    far = cv2.dilate(once, np.ones((5, 5), np.uint8)) == 0
    assert blue[far].any() == (border == "reflect")
    # The skin has 100; of an eye of three pixels some blue bleeds beyond what is hidden of it.
    assert seen["pose_image"][..., 2].max() < 140


def test_p1_does_not_tell_a_closed_eye(clip, knobs):
    """The hidden region of an eye is nearly the same, open or shut."""
    areas = []
    for blink in (0.0, 1.0):
        _, shapes = fixtures.drawn_points(blink, 0.3, seed=0)
        shapes = {name: shape[:, :2] for name, shape in shapes.items()}
        regions = network_inputs.hidden_regions(shapes, 0.2, knobs["pose_mask"]["minimum_height"])
        areas.append(cv2.contourArea(regions[0].astype(np.float32)))
        hull = cv2.convexHull(shapes["right_eye"].astype(np.float32))
        assert areas[-1] > 1.4 * cv2.contourArea(hull)  # dilated by 20 % both ways
    assert areas[1] == pytest.approx(areas[0], rel=0.4)  # without it the ratio is 0.15


def test_p1_fill_zero_and_random_dilation(clip, knobs):
    knobs["pose_mask"]["fill"] = "zero"
    draw = augment.neutral_draw(knobs)
    black = network_inputs.frame_inputs(clip, 0, draw, knobs, (96, 96, 64))["pose_image"]
    wide = dataclasses.replace(draw, mask_dilation=0.6)
    wider = network_inputs.frame_inputs(clip, 0, wide, knobs, (96, 96, 64))["pose_image"]
    assert 0 < (black == 0).all(-1).sum() < (wider == 0).all(-1).sum()


def test_e3_crop_is_the_face_box_whatever_the_frame_does(clip, knobs):
    """Scale and shift of S1 do not reach the expression crop; E1 turns about the face centre."""
    draw = augment.neutral_draw(knobs)
    box = clip.face_boxes[0]
    matrix = network_inputs.expression_matrix(clip, 0, draw)
    centre = (box[:2] + box[2:]) / 2
    np.testing.assert_allclose(transforms.transform_points(matrix, centre), 0, atol=1e-6)
    half = np.abs(transforms.transform_points(matrix, box.reshape(2, 2))).max()
    assert half == pytest.approx(1 / 1.1, rel=1e-5)
    moved = dataclasses.replace(
        draw, frame=transforms.similarity_matrix(scale=0.8, shift=(0.2, 0.1)), rotation=30.0
    )
    turned = network_inputs.expression_matrix(clip, 0, moved)
    np.testing.assert_allclose(transforms.transform_points(turned, centre), 0, atol=1e-6)
    expected = transforms.similarity_matrix(30.0)[:, :2] @ matrix[:, :2]
    np.testing.assert_allclose(turned[:, :2], expected, atol=1e-6)


def test_masks_and_crops_can_be_left_out(clip, knobs):
    """For ablations: both encoders then see the very frame, when nothing is drawn."""
    knobs["pose_mask"]["applied"] = knobs["expression_crop"]["applied"] = False
    draw = augment.neutral_draw(knobs)
    seen = network_inputs.frame_inputs(clip, 1, draw, knobs, (48, 48, 48))
    np.testing.assert_array_equal(seen["pose_image"], seen["image"])
    np.testing.assert_array_equal(seen["expression_image"], seen["image"])
    turned = dataclasses.replace(draw, frame=transforms.similarity_matrix(scale=0.5), rotation=90.0)
    matrix = network_inputs.expression_matrix(clip, 1, turned)
    np.testing.assert_allclose(matrix, [[0, -0.5, 0], [0.5, 0, 0]], atol=1e-12)


@pytest.mark.parametrize("flip", [False, True])
def test_an_upright_crop_levels_the_eyes_whatever_the_roll(clip, knobs, flip):
    knobs["expression_crop"]["upright"] = True
    for roll, rotation in ((0.0, 0.0), (33.0, 0.0), (-40.0, 12.0)):
        frame = transforms.similarity_matrix(roll=roll, scale=0.9, flip=flip)
        draw = dataclasses.replace(augment.neutral_draw(knobs), frame=frame, rotation=rotation)
        matrix = network_inputs.expression_matrix(clip, 2, draw)
        eyes = [clip.mask_polygons[name][2].mean(0) for name in ("right_eye", "left_eye")]
        right, left = transforms.transform_points(matrix, np.stack(eyes))
        x, y = right - left if flip else left - right
        assert np.degrees(np.arctan2(y, x)) == pytest.approx(rotation, abs=1e-4)
        box = clip.face_boxes[2]
        centre = transforms.transform_points(matrix, (box[:2] + box[2:]) / 2)
        np.testing.assert_allclose(centre, 0, atol=1e-6)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("bent", [False, True])
def test_landmarks_are_where_the_expression_picture_shows_them(knobs, flip, bent):
    """A white disc is painted on one landmark at a time and looked for in the crop."""
    clip = fixtures.make_clip(3, frames=1, size=256)
    frame = transforms.similarity_matrix(roll=14, scale=0.9, shift=(0.05, -0.02), flip=flip)
    draw = dataclasses.replace(
        augment.neutral_draw(knobs), frame=frame, rotation=-20.0, jitter=np.array([0.02, -0.03])
    )
    if bent:
        field = np.random.default_rng(0).normal(0, 0.01, (6, 6, 2)).astype(np.float32)
        draw = dataclasses.replace(draw, displacement=field)
    found = network_inputs.expression_landmarks(clip, 0, draw)
    matrix = network_inputs.expression_matrix(clip, 0, draw)
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
        shown = network_inputs.expression_picture(picture, matrix, draw, knobs, 128)[..., 0]
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


def test_flip_swaps_left_and_right_blendshapes(clip, knobs):
    draw = dataclasses.replace(
        augment.neutral_draw(knobs), frame=transforms.similarity_matrix(flip=True)
    )
    uneven = clip.blendshapes.copy()
    left, right = (records.BLENDSHAPES.index(f"mouthSmile{side}") for side in ("Left", "Right"))
    uneven[0, left], uneven[0, right] = 0.8, 0.1
    jaw = records.BLENDSHAPES.index("jawOpen")
    wink = dataclasses.replace(clip, blendshapes=uneven)
    flipped = network_inputs.frame_inputs(wink, 0, draw, knobs, (32, 32, 32))["blendshapes"]
    assert flipped[left] == np.float32(0.1) and flipped[right] == np.float32(0.8)
    assert flipped[jaw] == uneven[0, jaw]


def test_component_mask_covers_the_parts_softly(clip, knobs):
    draw = augment.neutral_draw(knobs)
    mask = network_inputs.frame_inputs(clip, 0, draw, knobs, (96, 96, 64))["component_mask"]
    parts = {name: points[0] for name, points in clip.mask_polygons.items()}
    core = transforms.fill_polygons([parts["outer_lips"], parts["left_eye"]], 96)
    assert mask[core > 0].min() > 200
    far = cv2.dilate(
        transforms.fill_polygons([parts[n] for n in knobs["component_mask"]["parts"]], 96),
        np.ones((9, 9), np.uint8),
    )
    assert mask[far == 0].max() < 30
    assert 0.02 < (mask > 127).mean() < 0.2
    assert len(np.unique(mask)) > 5


def test_inference_inputs_are_training_inputs_without_chance(clip, knobs):
    first = network_inputs.inference_inputs(clip, [0, 3], 48, 40, 32)
    again = network_inputs.inference_inputs(clip, [0, 3], 48, 40, 32, knobs)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert first["image"].shape == (2, 48, 48, 3)
    assert first["pose_image"].shape == (2, 40, 40, 3)
    assert first["expression_image"].shape == (2, 32, 32, 3)
    np.testing.assert_array_equal(first["head_pose"], clip.head_pose[[0, 3]])
    knobs["expression_crop"]["gray"] = True
    gray = network_inputs.inference_inputs(clip, [0], 48, 40, 32, knobs)["expression_image"]
    assert np.ptp(gray, axis=-1).max() == 0


def test_the_face_alone_is_shown(clip, knobs):
    """Inside the oval nothing changes, outside everything is the mean of the inside; landmarks stay."""
    picture, oval = transforms.decode_frame(clip, 0), clip.mask_polygons["face_oval"][0]
    face = transforms.fill_polygons([oval], picture.shape[0]) > 0
    assert 0.05 < face.mean() < 0.9
    alone = network_inputs.face_alone(picture, oval)
    np.testing.assert_array_equal(alone[face], picture[face])
    np.testing.assert_allclose(
        alone[~face], picture[face].mean(0)[None].repeat((~face).sum(), 0), atol=0.5
    )

    draw = augment.neutral_draw(knobs)
    before = network_inputs.frame_inputs(clip, 0, draw, knobs, (48, 48, 48))
    knobs["expression_crop"]["face_alone"] = True
    after = network_inputs.frame_inputs(clip, 0, draw, knobs, (48, 48, 48))
    changed = {key for key in before if not np.array_equal(before[key], after[key])}
    assert changed == {"expression_image"}


def test_even_light_takes_brightness_and_contrast_away():
    rng = np.random.default_rng(0)
    picture = rng.normal(100, 20, (32, 32, 3)).clip(0, 255).astype(np.uint8)
    even = network_inputs.even_light(picture)
    assert even.mean() == pytest.approx(128, abs=0.5) and even.std() == pytest.approx(40, abs=0.5)
    darker = (picture * 0.5 + 10).astype(
        np.uint8
    )  # rounding of the darker picture, times its gain of 4
    np.testing.assert_allclose(network_inputs.even_light(darker), even, atol=5)
    flat = np.full((8, 8, 3), 7, np.uint8)
    np.testing.assert_array_equal(network_inputs.even_light(flat), np.full_like(flat, 128))
