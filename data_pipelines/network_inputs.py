"""One frame of a clip -> the pictures and labels the networks see (method.md 3.12 and 6).

Every picture is resampled once, straight from the stored frame: all geometric operators (flip,
similarity, in-plane rotation, crop) are composed into one 2x3 matrix in crop coordinates first.
What is random about them was decided before, in the `augment.Draw`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from data_pipelines import face_landmarks, records
from data_pipelines.augment import Draw, default_augment, neutral_draw
from data_pipelines.transforms import (
    colour_matrix,
    decode_frame,
    fill_polygons,
    sample_picture,
    shown_copies,
    similarity_matrix,
    transform_head_pose,
    transform_points,
)

_GRAY = colour_matrix(1.0, 1.0, 0.0, 0.0)
_MIRRORED_BLENDSHAPES = np.array(
    [
        records.BLENDSHAPES.index(
            name.replace("Left", "#").replace("Right", "Left").replace("#", "Right")
        )
        for name in records.BLENDSHAPES
    ]
)


def frame_inputs(
    clip: records.Clip,
    index: int,
    draw: Draw,
    augment: Mapping[str, Any],
    sizes: tuple[int, int, int],
    *,
    picture: np.ndarray | None = None,
    with_image: bool = True,
    expression_from: tuple[records.Clip, int] | None = None,
    second: tuple[Draw, tuple[records.Clip, int] | None] | None = None,
) -> dict[str, np.ndarray]:
    """Everything the networks see of one frame, under one draw.

    Args:
        sizes: sides of the image, the pose image and the expression image.
        picture: the decoded frame, if it is at hand.
        with_image: whether `image` is wanted.
        expression_from: another camera's clip and frame of the same instant (E2).
        second: draw and camera of another expression picture of this instant, where one is wanted.

    Returns:
        image, pose_image, expression_image (n, n, 3) uint8; component_mask (n, n) uint8;
        head_pose (3, 4) float32; blendshapes (52,) float32; expression_landmarks (68, 2) float32 in
        crop coordinates of the expression picture; and with `second` second_expression_image.
    """
    picture = _coloured(decode_frame(clip, index) if picture is None else picture, draw)
    polygons = {name: points[index] for name, points in clip.mask_polygons.items()}
    image_size, pose_size, expression_size = sizes
    border = augment["similarity"]["border"]
    for_pose = sample_picture(picture, draw.frame, pose_size, border)

    def expression(drawn: Draw, elsewhere: tuple[records.Clip, int] | None) -> np.ndarray:
        other, at = elsewhere or (clip, index)
        seen = _coloured(decode_frame(other, at), draw) if elsewhere else picture
        if augment["expression_crop"]["face_alone"]:
            seen = face_alone(seen, other.mask_polygons["face_oval"][at])
        matrix = expression_matrix(other, at, drawn)
        return expression_picture(seen, matrix, drawn, augment, expression_size)

    blendshapes = clip.blendshapes[index]
    if np.linalg.det(draw.frame[:, :2]) < 0:
        blendshapes = blendshapes[_MIRRORED_BLENDSHAPES]
    inputs = {
        "pose_image": pose_picture(for_pose, polygons, picture.shape[0], draw, augment),
        "expression_image": expression(draw, expression_from),
        "component_mask": component_mask(polygons, draw, augment, image_size),
        "head_pose": transform_head_pose(draw.frame, clip.head_pose[index]),
        "blendshapes": np.ascontiguousarray(blendshapes, np.float32),
        "expression_landmarks": expression_landmarks(*(expression_from or (clip, index)), draw),
    }
    if with_image and pose_size == image_size:
        inputs["image"] = for_pose
    elif with_image:
        inputs["image"] = sample_picture(picture, draw.frame, image_size, border)
    if second is not None:
        inputs["second_expression_image"] = expression(*second)
    return inputs


def _coloured(picture: np.ndarray, draw: Draw) -> np.ndarray:
    colour = draw.sample.colour
    return picture if colour is None else cv2.transform(picture, colour)


def inference_inputs(
    clip: records.Clip,
    indices: Sequence[int],
    image_size: int,
    pose_size: int,
    expression_size: int,
    augment: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """The deterministic inputs of animate and evaluate: the masks and crops of training.

    Args:
        augment: the model's `config.data.augment`; the defaults without it.

    Returns:
        image (n, H, W, 3), pose_image, expression_image uint8; head_pose (n, 3, 4) float32;
        and component_mask (n, H, W) uint8, blendshapes (n, 52) float32 for measuring.
    """
    augment = default_augment() if augment is None else augment
    draw = neutral_draw(augment)
    sizes = (image_size, pose_size, expression_size)
    parts = [frame_inputs(clip, int(index), draw, augment, sizes) for index in indices]
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}


def pose_picture(
    moved_picture: np.ndarray, polygons: Mapping[str, np.ndarray], side: int, draw: Draw, augment
) -> np.ndarray:
    """The pose encoder's input (n, n, 3) uint8: eyes and mouth hidden (P1), mirrored ones too, colours (P2).

    Args:
        moved_picture: (n, n, 3), the frame after its similarity.
        polygons: of the stored frame.
        side: of the stored frame in pixels.
    """
    knobs, size, result = augment["pose_mask"], moved_picture.shape[0], moved_picture.copy()
    if draw.pose_blur * size > 0.2:
        result = cv2.GaussianBlur(result, (0, 0), draw.pose_blur * size)
    if draw.pose_colour is not None:
        result = cv2.transform(result, draw.pose_colour)
    if not knobs["applied"]:
        return result
    own, *mirrored = shown_copies(draw.frame, side, size, augment["similarity"]["border"])
    parts = ("right_eye", "left_eye", "outer_lips")
    moved = {name: transform_points(own, polygons[name]) for name in parts}
    regions = hidden_regions(moved, draw.mask_dilation, knobs["minimum_height"])
    if mirrored:  # a copy's regions are the copies of the regions, most of which lie outside
        matrices = np.stack(mirrored)
        starts = np.cumsum([0, *map(len, regions)])
        unmoved = (np.concatenate(regions) - own[:, 2]) @ np.linalg.inv(own[:, :2]).T
        copies = unmoved @ matrices[:, :, :2].swapaxes(1, 2) + matrices[:, None, :, 2]
        least = np.minimum.reduceat(copies, starts[:-1], axis=1)
        most = np.maximum.reduceat(copies, starts[:-1], axis=1)
        for copy, region in np.argwhere(((least < 1) & (most > -1)).all(-1)):
            regions.append(copies[copy, starts[region] : starts[region + 1]])
    hidden = fill_polygons(regions, size)
    fill = np.zeros(3)
    if knobs["fill"] == "mean":
        face = fill_polygons([transform_points(draw.frame, polygons["face_oval"])], size)
        fill = np.asarray(cv2.mean(result, mask=face & ~hidden)[:3])
    result[hidden > 0] = np.clip(fill + draw.mask_tint, 0, 255).astype(np.uint8)
    return result


def hidden_regions(
    polygons: Mapping[str, np.ndarray], dilation: float, minimum_height: float
) -> list[np.ndarray]:
    """Convex regions that hide both eyes and the mouth (P1): name -> (points, 2) of one frame.

    Each is the hull of the part and of an ellipse along its corners, so that its outline does not
    give away a closed eye, dilated about its centre.
    """
    regions = []
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    for name in ("right_eye", "left_eye", "outer_lips"):
        points = polygons[name].astype(np.float64)
        # The corners of an eye or a mouth are opposite points of its polygon.
        half = len(points) // 2
        corners = points[[0, half]]
        middle, along = corners.mean(0), (corners[1] - corners[0]) / 2
        across = np.array([-along[1], along[0]]) * minimum_height
        ellipse = middle + np.cos(angles)[:, None] * along + np.sin(angles)[:, None] * across
        hull = cv2.convexHull(np.concatenate([points, ellipse]).astype(np.float32))[:, 0]
        centre = hull.mean(0)
        regions.append(centre + (hull - centre) * (1 + dilation))
    return regions


def face_alone(picture: np.ndarray, oval: np.ndarray) -> np.ndarray:
    """A stored frame in which everything outside the oval (points, 2) of the face is the face's mean colour."""
    face = fill_polygons([oval], picture.shape[0])
    result = np.empty_like(picture)
    result[:] = np.round(cv2.mean(picture, mask=face)[:3])
    return cv2.copyTo(picture, face, result)


def expression_picture(
    picture: np.ndarray, matrix: np.ndarray, draw: Draw, augment, size: int
) -> np.ndarray:
    """The expression encoder's input (size, size, 3) uint8: E1, E3, E4; `matrix` is `expression_matrix`."""
    border = augment["similarity"]["border"]
    result = sample_picture(picture, matrix, size, border, draw.displacement)
    if draw.expression_colour is not None:
        result = cv2.transform(result, draw.expression_colour)
    if augment["expression_crop"]["gray"]:
        result = cv2.transform(result, _GRAY)
    if augment["expression_crop"]["even_light"]:
        result = even_light(result)
    return result


def even_light(picture: np.ndarray) -> np.ndarray:
    """uint8 picture of any channels, made to have mean 128 and deviation 40, before the clip to 0..255."""
    mean, deviation = picture.mean(), picture.std()
    gain = 40.0 / max(deviation, 4.0)  # a picture of nothing stays one
    return np.clip((picture - mean) * gain + 128.5, 0, 255).astype(np.uint8)


def expression_matrix(clip: records.Clip, index: int, draw: Draw) -> np.ndarray:
    """(2, 3) matrix from frame coordinates to those of the expression crop (E1, E3).

    The crop is a square about the centre of the face box. It takes over roll and flip of the frame
    but neither its scale nor its shift. An `upright` one does not take over the roll either: the line from eye to
    eye is level before E1 turns it. Without a crop, E1 turns the frame about its centre.
    """
    if not draw.cropped:
        return similarity_matrix(draw.rotation)[:, :2] @ draw.frame
    box = clip.face_boxes[index]
    centre = (box[:2] + box[2:]) / 2
    half = max(box[2] - box[0], box[3] - box[1]) / 2 * draw.margin
    linear = draw.frame[:, :2] / np.sqrt(abs(np.linalg.det(draw.frame[:, :2])))
    turn = draw.rotation
    if draw.upright:
        right, left = (clip.mask_polygons[eye][index].mean(0) for eye in ("right_eye", "left_eye"))
        along = linear @ (left - right)
        if (
            np.linalg.det(linear) < 0
        ):  # mirrored, the person's right eye is where a left one would be
            along = -along
        turn -= np.degrees(np.arctan2(along[1], along[0]))
    linear = similarity_matrix(turn)[:, :2] @ linear / max(half, 1e-3)
    return np.concatenate([linear, (2 * draw.jitter - linear @ centre)[:, None]], axis=1)


def expression_landmarks(clip: records.Clip, index: int, draw: Draw) -> np.ndarray:
    """(68, 2) float32: the landmarks of a face alignment network, where `expression_picture` shows them.

    In crop coordinates of that picture; points that it cuts off lie outside [-1, 1].
    """
    matrix = expression_matrix(clip, index, draw)
    mirrored = bool(np.linalg.det(matrix[:, :2]) < 0)
    points = face_landmarks.fan_landmarks(clip.landmarks[index], mirrored)
    points = transform_points(matrix, points.astype(np.float64))
    if draw.displacement is not None:
        # The picture shows at q what was at q + field(q); fields are smooth, so q = p - field(p) nearly.
        where = ((points[None] + 1) * draw.displacement.shape[0] / 2 - 0.5).astype(np.float32)
        field = cv2.remap(
            draw.displacement, where, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        points = points - 2 * field[0]  # a side is 2 long
    return points.astype(np.float32)


def component_mask(
    polygons: Mapping[str, np.ndarray], draw: Draw, augment, size: int
) -> np.ndarray:
    """(size, size) uint8, 255 on eyes, brows, nose and mouth, with a soft edge (method.md 6.3).

    Not on what the border mirrors: losses weigh by it, and that is nobody's face.
    """
    knobs = augment["component_mask"]
    mask = fill_polygons(
        [transform_points(draw.frame, polygons[name]) for name in knobs["parts"]], size
    )
    radius = round(knobs["dilation"] * size)
    if radius:
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
        mask = cv2.dilate(mask, kernel)
    if knobs["blur"] * size > 0.2:
        mask = cv2.GaussianBlur(mask, (0, 0), knobs["blur"] * size)
    return mask
