"""One frame of a clip -> the pictures and labels the networks see (method.md 3.12 and 6).

Every picture is resampled once, straight from the stored frame: all geometric operators (flip,
similarity, in-plane rotation, crop) are composed into one 2x3 matrix in crop coordinates first. A
`Draw` holds the random choices of one sample, so that a clip can use one draw for all its frames;
`neutral_draw` is what validation and inference use: same masks, same crops, nothing random.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from data_pipelines import face_landmarks, records

_BORDERS = {
    "reflect": cv2.BORDER_REFLECT_101,
    "replicate": cv2.BORDER_REPLICATE,
    "black": cv2.BORDER_CONSTANT,
}
_LUMA = np.array([0.299, 0.587, 0.114])
_MIRRORED_BLENDSHAPES = np.array(
    [
        records.BLENDSHAPES.index(
            name.replace("Left", "#").replace("Right", "Left").replace("#", "Right")
        )
        for name in records.BLENDSHAPES
    ]
)


def default_augment() -> dict[str, Any]:
    """Every magnitude of method.md 3.12, a plain nested dict. Lengths are fractions of a side."""
    return {
        # S2 and S1: whole frames. The border is what shows where a frame is moved away.
        "flip": {"probability": 0.5},
        "similarity": {
            "probability": 0.5,
            "roll": 20.0,
            "scale": (0.8, 1.25),
            "shift": 0.1,
            "border": "reflect",
        },
        # P1: eyes and mouth hidden from the pose encoder, always. `minimum_height` (of the width)
        # keeps the shape of the mask from telling a closed eye from an open one.
        "pose_mask": {
            "dilation": 0.2,
            "dilation_range": (0.1, 0.4),
            "minimum_height": 0.55,
            "fill": "mean",
            "fill_jitter": 0.15,
        },
        # P2.
        "pose_colour": {
            "probability": 0.5,
            "brightness": 0.3,
            "contrast": 0.3,
            "saturation": 0.3,
            "hue": 0.05,
            "gray": 0.0,
            "blur": 0.01,
        },
        # E1, E2, E3, E4: the expression encoder's picture.
        "expression_rotation": {"probability": 0.8, "degrees": 30.0},
        "view_change": {"probability": 0.5},
        "expression_crop": {
            "margin": 1.1,
            "margin_range": (1.0, 1.3),
            "centre_jitter": 0.05,
            "gray": False,
        },
        "expression_colour": {
            "probability": 0.5,
            "brightness": 0.4,
            "contrast": 0.4,
            "saturation": 0.4,
            "hue": 0.1,
            "gray": 0.1,
            "blur": 0.0,
        },
        "expression_affine": {"probability": 0.5, "points": 6, "displacement": 0.025},
        # The component mask of the losses (method.md 6.3), not random.
        "component_mask": {
            "parts": ("right_eye", "left_eye", "right_brow", "left_brow", "nose", "outer_lips"),
            "dilation": 0.012,
            "blur": 0.008,
        },
    }


@dataclasses.dataclass(frozen=True)
class Draw:
    """The random choices of one sample.

    Attributes:
        frame: (2, 3) flip and similarity, stored-frame coordinates -> output coordinates.
        mask_dilation: of the eye and mouth masks, fraction of their size.
        mask_tint: (3,) added to the fill colour, 0..255.
        pose_colour, expression_colour: (3, 4) colour matrices, or None.
        pose_blur: sigma as a fraction of the side.
        rotation: degrees, of the expression crop, on top of the frame's.
        margin: side of the expression crop as a multiple of the face box.
        jitter: (2,) shift of its centre as a fraction of its side.
        displacement: (points, points, 2) of the piecewise affine map, fractions of the side.
        other_view: take the expression picture from another camera where there is one.
    """

    frame: np.ndarray
    mask_dilation: float
    mask_tint: np.ndarray
    pose_colour: np.ndarray | None
    pose_blur: float
    rotation: float
    margin: float
    jitter: np.ndarray
    expression_colour: np.ndarray | None
    displacement: np.ndarray | None
    other_view: bool


def neutral_draw(augment: Mapping[str, Any]) -> Draw:
    """No randomness: the frame as it is, the standard mask and the standard crop."""
    return Draw(
        frame=similarity_matrix(),
        mask_dilation=augment["pose_mask"]["dilation"],
        mask_tint=np.zeros(3),
        pose_colour=None,
        pose_blur=0.0,
        rotation=0.0,
        margin=augment["expression_crop"]["margin"],
        jitter=np.zeros(2),
        expression_colour=None,
        displacement=None,
        other_view=False,
    )


def random_draw(rng: np.random.Generator, augment: Mapping[str, Any], flip: bool) -> Draw:
    """Draws S1, P1, P2, E1-E4 of one picture; the flip S2 is the whole sample's and given."""
    similarity, mask = augment["similarity"], augment["pose_mask"]
    crop, affine = augment["expression_crop"], augment["expression_affine"]
    moved = rng.random() < similarity["probability"]
    roll = rng.uniform(-1, 1) * similarity["roll"]
    low, high = similarity["scale"]
    scale = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    shift = rng.uniform(-1, 1, 2) * similarity["shift"] * 2  # a side is 2 long in crop coordinates
    frame = similarity_matrix(roll, scale, shift, flip) if moved else similarity_matrix(flip=flip)
    tint = rng.uniform(-1, 1, 3) * mask["fill_jitter"] * 255
    dilation = rng.uniform(*mask["dilation_range"])
    pose_colour, pose_blur = _draw_colour(rng, augment["pose_colour"])
    turned = rng.random() < augment["expression_rotation"]["probability"]
    rotation = rng.uniform(-1, 1) * augment["expression_rotation"]["degrees"] * turned
    margin, jitter = rng.uniform(*crop["margin_range"]), rng.uniform(-1, 1, 2)
    expression_colour, _ = _draw_colour(rng, augment["expression_colour"])
    bent = rng.random() < affine["probability"]
    bend = rng.normal(0, affine["displacement"], (affine["points"], affine["points"], 2))
    return Draw(
        frame=frame,
        mask_dilation=dilation,
        mask_tint=tint,
        pose_colour=pose_colour,
        pose_blur=pose_blur,
        rotation=rotation,
        margin=margin,
        jitter=jitter * crop["centre_jitter"],
        expression_colour=expression_colour,
        displacement=bend.astype(np.float32) if bent else None,
        other_view=bool(rng.random() < augment["view_change"]["probability"]),
    )


def _draw_colour(rng: np.random.Generator, knobs: Mapping[str, Any]):
    applied = rng.random() < knobs["probability"]
    brightness, contrast, saturation, hue = (
        rng.uniform(-knobs[name], knobs[name])
        for name in ("brightness", "contrast", "saturation", "hue")
    )
    gray = rng.random() < knobs["gray"]
    blur = rng.uniform(0, knobs["blur"])
    if not applied:
        return None, 0.0
    matrix = colour_matrix(1 + brightness, 1 + contrast, 0.0 if gray else 1 + saturation, hue)
    return matrix, blur


def similarity_matrix(
    roll: float = 0.0, scale: float = 1.0, shift: Sequence[float] = (0.0, 0.0), flip: bool = False
) -> np.ndarray:
    """(2, 3) matrix: mirror x if asked, then scale, turn by `roll` degrees (clockwise), shift."""
    angle = np.deg2rad(roll)
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    if flip:
        turn = turn @ np.diag([-1.0, 1.0])
    return np.concatenate([turn, np.asarray(shift, float)[:, None]], axis=1)


def colour_matrix(brightness: float, contrast: float, saturation: float, hue: float) -> np.ndarray:
    """(3, 4) matrix on RGB 0..255: factors around 1; hue in turns; contrast is about mid gray.

    Hue is a rotation about the gray axis, so the whole jitter is one matrix product per pixel.
    """
    angle = 2 * np.pi * hue
    axis = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    rotation = axis + np.cos(angle) * (np.eye(3) - axis) + np.sin(angle) * cross
    desaturate = saturation * np.eye(3) + (1 - saturation) * np.tile(_LUMA, (3, 1))
    linear = brightness * contrast * desaturate @ rotation
    offset = brightness * (1 - contrast) * 127.5
    return np.concatenate([linear, np.full((3, 1), offset)], axis=1)


_GRAY = colour_matrix(1.0, 1.0, 0.0, 0.0)


def transform_points(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(2, 3) matrix on (..., 2) points."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def transform_head_pose(matrix: np.ndarray, head_pose: np.ndarray) -> np.ndarray:
    """P of the transformed picture: exact for P = [sR | t] and a 2D similarity, also a mirroring.

    A point R p + t of the head goes to A (s R p + t) + b. A flip F of the picture is the picture of
    the mirrored head, whose own coordinates are mirrored too: s' R' = A s R F, a rotation again.

    Args:
        matrix: (2, 3), in crop coordinates.
        head_pose: (..., 3, 4).
    """
    linear = matrix[:, :2]
    mirrored = np.linalg.det(linear) < 0
    scale = np.sqrt(abs(np.linalg.det(linear)))
    lifted = np.diag([0.0, 0.0, scale])
    lifted[:2, :2] = linear
    turned = lifted @ head_pose[..., :3]
    if mirrored:
        turned = turned @ np.diag([-1.0, 1.0, 1.0])
    shift = head_pose[..., 3] @ lifted.T + np.append(matrix[:, 2], 0.0)
    return np.concatenate([turned, shift[..., None]], axis=-1).astype(np.float32)


def decode_frame(clip: records.Clip, index: int) -> np.ndarray:
    """Frame `index` as (size, size, 3) uint8 RGB.

    Raises:
        records.RecordError: it is not a whole JPEG of the right size.
    """
    data = clip.frames[index]
    picture = None
    if data[:2] == b"\xff\xd8" and data[-2:] == b"\xff\xd9":
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if picture is None or picture.shape[:2] != (clip.size, clip.size):
        raise records.RecordError(f"clip {clip.clip_id}: frame {index} is not a whole picture")
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def sample_picture(
    picture: np.ndarray,
    matrix: np.ndarray,
    size: int,
    border: str = "reflect",
    displacement: np.ndarray | None = None,
) -> np.ndarray:
    """Resamples a square picture once.

    Args:
        picture: (n, n, 3) uint8.
        matrix: (2, 3), crop coordinates of `picture` -> crop coordinates of the result.
        size: side of the result.
        border: what lies outside: "reflect", "replicate" or "black".
        displacement: (k, k, 2) coarse field of shifts, fractions of the result's side.
    """
    (a, b, shift_x), (c, d, shift_y) = matrix.tolist()
    determinant = a * d - b * c
    zoom = abs(determinant) ** 0.5 * size / picture.shape[0]
    if zoom < 0.75:  # bilinear reading would skip pixels: average them first
        smaller = max(8, round(picture.shape[0] * zoom))
        picture = cv2.resize(picture, (smaller, smaller), interpolation=cv2.INTER_AREA)
    # Pixel of the result -> its coordinates -> coordinates in the picture -> its pixel there. Written
    # out: on small pictures four matrix products would cost as much as the resampling.
    side = picture.shape[0]
    inverse = np.array([[d, -b], [-c, a]]) * (side / size / determinant)
    middle = -np.array([d * shift_x - b * shift_y, a * shift_y - c * shift_x]) / determinant
    start = (middle + 1) * side / 2 - 0.5 + inverse @ ((1 - size) / 2, (1 - size) / 2)
    lookup = np.concatenate([inverse, start[:, None]], axis=1)
    mode = _BORDERS[border]
    if displacement is None:
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(picture, lookup, (size, size), flags=flags, borderMode=mode)
    field = cv2.resize(displacement * size, (size, size), interpolation=cv2.INTER_LINEAR)
    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    grid = np.stack([columns, rows], axis=-1) + field
    where = (grid @ lookup[:, :2].T + lookup[:, 2]).astype(np.float32)
    return cv2.remap(picture, where, None, cv2.INTER_LINEAR, borderMode=mode)


def fill_polygons(polygons: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Union of closed polygons in crop coordinates as a (size, size) uint8 mask, 0 or 255."""
    mask = np.zeros((size, size), np.uint8)
    for points in polygons:
        pixels = ((points + 1) * size / 2 - 0.5) * 16
        cv2.fillPoly(mask, [np.round(pixels).astype(np.int32)], 255, shift=4)
    return mask


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
        half = (
            len(points) // 2
        )  # the corners of an eye or a mouth are opposite points of its polygon
        corners = points[[0, half]]
        middle, along = corners.mean(0), (corners[1] - corners[0]) / 2
        across = np.array([-along[1], along[0]]) * minimum_height
        ellipse = middle + np.cos(angles)[:, None] * along + np.sin(angles)[:, None] * across
        hull = cv2.convexHull(np.concatenate([points, ellipse]).astype(np.float32))[:, 0]
        centre = hull.mean(0)
        regions.append(centre + (hull - centre) * (1 + dilation))
    return regions


def expression_matrix(box: np.ndarray, draw: Draw) -> np.ndarray:
    """(2, 3) matrix from frame coordinates to those of the expression crop (E1, E3).

    The crop is a square about the centre of the face box. It takes over roll and flip of the frame
    but neither its scale nor its shift.
    """
    centre = (box[:2] + box[2:]) / 2
    half = max(box[2] - box[0], box[3] - box[1]) / 2 * draw.margin
    linear = draw.frame[:, :2] / np.sqrt(abs(np.linalg.det(draw.frame[:, :2])))
    linear = similarity_matrix(draw.rotation)[:, :2] @ linear / max(half, 1e-3)
    return np.concatenate([linear, (2 * draw.jitter - linear @ centre)[:, None]], axis=1)


def pose_picture(
    moved_picture: np.ndarray, polygons: Mapping[str, np.ndarray], draw: Draw, augment
) -> np.ndarray:
    """The pose encoder's input (n, n, 3) uint8: eyes and mouth hidden (P1), colours (P2).

    Args:
        moved_picture: (n, n, 3), the frame after its similarity.
        polygons: of the stored frame.
    """
    knobs, size, result = augment["pose_mask"], moved_picture.shape[0], moved_picture.copy()
    if draw.pose_blur * size > 0.2:
        result = cv2.GaussianBlur(result, (0, 0), draw.pose_blur * size)
    if draw.pose_colour is not None:
        result = cv2.transform(result, draw.pose_colour)
    moved = {
        name: transform_points(draw.frame, polygons[name])
        for name in ("right_eye", "left_eye", "outer_lips", "face_oval")
    }
    regions = hidden_regions(moved, draw.mask_dilation, knobs["minimum_height"])
    hidden = fill_polygons(regions, size)
    fill = np.zeros(3)
    if knobs["fill"] == "mean":
        face = fill_polygons([moved["face_oval"]], size)
        fill = np.asarray(cv2.mean(result, mask=face & ~hidden)[:3])
    result[hidden > 0] = np.clip(fill + draw.mask_tint, 0, 255).astype(np.uint8)
    return result


def expression_picture(
    picture: np.ndarray, box: np.ndarray, draw: Draw, augment, size: int
) -> np.ndarray:
    """The expression encoder's input (size, size, 3) uint8: E1, E3, E4."""
    border = augment["similarity"]["border"]
    matrix = expression_matrix(box, draw)
    result = sample_picture(picture, matrix, size, border, draw.displacement)
    if draw.expression_colour is not None:
        result = cv2.transform(result, draw.expression_colour)
    if augment["expression_crop"]["gray"]:
        result = cv2.transform(result, _GRAY)
    return result


def expression_landmarks(clip: records.Clip, index: int, draw: Draw) -> np.ndarray:
    """(68, 2) float32: the landmarks of a face alignment network, where `expression_picture` shows them.

    In crop coordinates of that picture; points that it cuts off lie outside [-1, 1].
    """
    matrix = expression_matrix(clip.face_boxes[index], draw)
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
    """(size, size) uint8, 255 on eyes, brows, nose and mouth, with a soft edge (method.md 6.3)."""
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


def frame_inputs(
    clip: records.Clip,
    index: int,
    draw: Draw,
    augment: Mapping[str, Any],
    sizes: tuple[int, int, int],
    *,
    picture: np.ndarray | None = None,
    expression_from: tuple[records.Clip, int] | None = None,
    second: tuple[Draw, tuple[records.Clip, int] | None] | None = None,
) -> dict[str, np.ndarray]:
    """Everything the networks see of one frame, under one draw.

    Args:
        sizes: sides of the image, the pose image and the expression image.
        picture: the decoded frame, if it is at hand.
        expression_from: another camera's clip and frame of the same instant (E2).
        second: draw and camera of another expression picture of this instant, where one is wanted.

    Returns:
        image, pose_image, expression_image (n, n, 3) uint8; component_mask (n, n) uint8;
        head_pose (3, 4) float32; blendshapes (52,) float32; expression_landmarks (68, 2) float32 in
        crop coordinates of the expression picture; and with `second` second_expression_image.
    """
    if picture is None:
        picture = decode_frame(clip, index)
    polygons = {name: points[index] for name, points in clip.mask_polygons.items()}
    image_size, pose_size, expression_size = sizes
    border = augment["similarity"]["border"]
    image = sample_picture(picture, draw.frame, image_size, border)
    for_pose = image
    if pose_size != image_size:
        for_pose = sample_picture(picture, draw.frame, pose_size, border)

    def expression(drawn: Draw, elsewhere: tuple[records.Clip, int] | None) -> np.ndarray:
        other, at = elsewhere or (clip, index)
        seen = decode_frame(other, at) if elsewhere else picture
        return expression_picture(seen, other.face_boxes[at], drawn, augment, expression_size)

    blendshapes = clip.blendshapes[index]
    if np.linalg.det(draw.frame[:, :2]) < 0:
        blendshapes = blendshapes[_MIRRORED_BLENDSHAPES]
    inputs = {
        "image": image,
        "pose_image": pose_picture(for_pose, polygons, draw, augment),
        "expression_image": expression(draw, expression_from),
        "component_mask": component_mask(polygons, draw, augment, image_size),
        "head_pose": transform_head_pose(draw.frame, clip.head_pose[index]),
        "blendshapes": np.ascontiguousarray(blendshapes, np.float32),
        "expression_landmarks": expression_landmarks(*(expression_from or (clip, index)), draw),
    }
    if second is not None:
        inputs["second_expression_image"] = expression(*second)
    return inputs


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
