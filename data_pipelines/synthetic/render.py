"""(identity, expression, pose) -> picture and true labels.

The camera is orthographic: a canonical point p of the head is seen at P p exactly. Shoulders belong to
the body, which follows the head's turns only in part; light and background stay where they are.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from data_pipelines.prepare import masks
from data_pipelines.prepare.masks import LANDMARKS_OF
from data_pipelines.synthetic import expression as expressions
from data_pipelines.synthetic import parts, poses, template, textures
from data_pipelines.synthetic.face_points import MESH_POINTS, POINTS
from data_pipelines.synthetic.identity import PARTS, Identity, Model
from data_pipelines.synthetic.rasterize import rasterize

SMALLEST, LARGEST = 16, 1024
_BODY_TURN = 0.30  # part of the head's rotation that the shoulders take over
_IRIS = np.sin(np.deg2rad(21.0))  # radius of the iris, in eyeballs
_VIEWER = np.array([0.0, 0.0, -1.0])


class Rendering(NamedTuple):
    """A picture and what is true of it; n = size, coordinates are those of the crop, [-1, 1].

    Attributes:
        image: (n, n, 3) uint8 RGB.
        landmarks: (478, 3) float32 in MediaPipe's numbering, hidden ones too.
        polygons: name of `records.POLYGONS` -> (points, 2) float32.
        face_mask: (n, n) uint8, 0..255: how much of the pixel is face (hairless front of the head).
        component_mask: (n, n) uint8, 0..255: how much of it is eyes, brows, nose or mouth. Polygons know nothing of
            what hides what, both masks do.
        depth: (n, n) float32, the nearest surface's z; infinite where the background is seen.
        parts: (n, n) uint8, number in `PARTS` of what is seen.
        expression: (K,) `expression.EXPRESSION_PARAMETERS` that it was drawn with.
        pose: (3, 4) P that it was drawn with.
    """

    image: np.ndarray
    landmarks: np.ndarray
    polygons: dict[str, np.ndarray]
    face_mask: np.ndarray
    component_mask: np.ndarray
    depth: np.ndarray
    parts: np.ndarray
    expression: np.ndarray
    pose: np.ndarray


def render(
    identity: Identity,
    expression: np.ndarray,
    pose: np.ndarray,
    size: int,
    *,
    camera: np.ndarray | None = None,
) -> Rendering:
    """Draws a head.

    Args:
        identity: who.
        expression: (K,) values of `expression.EXPRESSION_PARAMETERS`.
        pose: (3, 4) P = [sR | t]: canonical head to this picture's crop coordinates.
        size: side of the picture in pixels, 64 to 512 are intended.
        camera: (3, 3) rotation from the room to this camera, where several see the same instant; body,
            light and background stay with the room. None for a camera straight in front.

    Raises:
        ValueError: a shape or size that cannot be.
    """
    expression, pose = np.asarray(expression, np.float64), np.asarray(pose, np.float64)
    if expression.shape != (expressions.COUNT,) or pose.shape != (3, 4):
        raise ValueError(f"expression {expression.shape} or pose {pose.shape} of a wrong shape")
    if not SMALLEST <= size <= LARGEST:
        raise ValueError(f"size {size} is not within {SMALLEST} and {LARGEST}")
    camera = np.eye(3) if camera is None else np.asarray(camera, np.float64)
    level = template.level_for(size)
    model = identity.model(level)
    points, vertices = posed_head(identity, model, level, expression)
    seen = _place(model, vertices, pose, camera)
    # Drawn larger and averaged, so that edges are clean.
    side = min(2 * size, max(768, size))
    shaded = _shade(identity, model, seen, camera)
    drawn = seen.copy()
    drawn[:, :2] = (seen[:, :2] + 1) * (side / 2) - 0.5
    drawn[:, 2] += model.behind
    pixels, depth, triangle, values = rasterize(drawn, model.triangles, shaded, side)
    canvas = _backdrop(identity, side, camera).reshape(-1, 3)
    colours = _textured(identity, size, values)
    shown = model.part_of[triangle]
    _glint(colours, identity, expression, pose, camera, pixels, shown, side)
    canvas[pixels] = colours
    image = _smaller(np.clip(canvas, 0, 1).reshape(side, side, 3) * 255, size)

    landmarks = landmarks_of(identity, points, expression) @ pose[:, :3].T + pose[:, 3]
    landmarks = landmarks.astype(np.float32)
    polygons = {name: one[0] for name, one in masks.polygons(landmarks[None]).items()}

    def mask(chosen: np.ndarray) -> np.ndarray:
        covered = np.zeros(side * side, np.uint8)
        covered[pixels[chosen[triangle]]] = 255
        return _smaller(covered.reshape(side, side), size)

    part_map, depth_map = np.zeros(side * side, np.uint8), np.full(side * side, np.inf, np.float32)
    part_map[pixels], depth_map[pixels] = shown, depth
    nearest = (((np.arange(size) + 0.5) * side / size).astype(int))[:, None]
    sample = nearest * side + nearest[:, 0]
    return Rendering(
        np.rint(image).astype(np.uint8),
        landmarks,
        polygons,
        mask(model.face),
        mask(model.component),
        depth_map[sample],
        part_map[sample],
        expression,
        pose,
    )


def canonical_landmarks(identity: Identity, expression: np.ndarray) -> np.ndarray:
    """(478, 3) landmarks of an expression before any pose: what P is applied to."""
    expression = np.asarray(expression, np.float64)
    points = expressions.deform(identity.control[:MESH_POINTS], expression, identity.eyes)
    return landmarks_of(identity, points, expression)


def landmarks_of(identity: Identity, points: np.ndarray, expression: np.ndarray) -> np.ndarray:
    """(468, 3) deformed mesh points, with the irises: centre, then four points of the rim."""
    result = np.empty((POINTS, 3))
    result[:MESH_POINTS] = points
    gaze = expressions.gaze_rotation(expression)
    rim = np.sqrt(1 - _IRIS**2)
    # Centre, right, top, left, bottom as seen in the picture, for both eyes.
    rim_points = [(_IRIS, 0), (0, -_IRIS), (-_IRIS, 0), (0, _IRIS)]
    looks = np.array([(0, 0, -1), *((x, y, -rim) for x, y in rim_points)])
    for eye, first in (("right_eye", 468), ("left_eye", 473)):
        ball = identity.eyes[eye]
        result[first : first + 5] = ball.centre + ball.radius * looks @ gaze.T
    return result


def posed_head(
    identity: Identity, model: Model, level: int, expression: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Deformed mesh points (468, 3) and all vertices (N, 3) of an expression, canonical."""
    head, neutral = template.head(), identity.control
    points = expressions.deform(neutral[:MESH_POINTS], expression, identity.eyes)
    moved = points - neutral[:MESH_POINTS]
    control = neutral + head.follow[:, None] * moved[head.leader]
    vertices = model.vertices.copy()
    vertices[model.pieces["skin"]] = head.refine(control.astype(np.float32), level)
    gaze = expressions.gaze_rotation(expression)
    for eye in expressions.EYES:
        place = model.pieces[eye]
        vertices[place] = identity.eyes[eye].centre + model.vertices[place] @ gaze.T
    jaw = expression[expressions.EXPRESSION_PARAMETERS.names.index("jaw_open")]
    for name in ("lower_teeth", "tongue"):
        place = model.pieces[name]
        vertices[place] = expressions.turn_jaw(model.vertices[place], 1.0, jaw)
    inner = points[list(LANDMARKS_OF["inner_lips"])]
    vertices[model.pieces["cavity"]] = parts.cavity(inner).reshape(-1, 3)
    return points, vertices


def _place(model: Model, vertices: np.ndarray, pose: np.ndarray, camera: np.ndarray) -> np.ndarray:
    """Canonical vertices -> crop coordinates (N, 3) float32, neck and body bent towards the room."""
    seen = vertices @ pose[:, :3].T.astype(np.float32) + pose[:, 3].astype(np.float32)
    scale = np.cbrt(np.linalg.det(pose[:, :3]))
    room = camera.T @ (pose[:, :3] / scale)  # the head's rotation in the room
    turned = scale * camera @ poses.part_of_rotation(room, _BODY_TURN)
    place = model.pieces["body"]
    body = vertices[place] @ turned.T.astype(np.float32) + pose[:, 3].astype(np.float32)
    seen[place] += model.follow * (body - seen[place])
    return seen


def _shade(identity: Identity, model: Model, seen: np.ndarray, camera: np.ndarray) -> np.ndarray:
    """(N, 8) float32: texture coordinates, light (3) and shine (3) at the vertices."""
    light = identity.looks.light
    normals = model.normals(seen)
    key, rim, up = ((camera @ one).astype(np.float32) for one in (light.key, light.rim, _UP))
    wrapped = np.clip((normals @ key + 0.25) / 1.25, 0, None)
    above = 0.5 + 0.5 * (normals @ up)
    behind = np.clip(normals @ rim, 0, None)
    open_to = model.occlusion
    values = np.empty((len(seen), 8), np.float32)
    values[:, :2] = model.uv
    ambient = light.ground + above[:, None] * (light.sky - light.ground)
    values[:, 2:5] = (open_to[:, None] * ambient) + (
        (wrapped * (0.35 + 0.65 * open_to))[:, None] * light.key_colour
    )
    values[:, 2:5] += (behind * open_to)[:, None] * light.rim_colour
    half = key + _VIEWER.astype(np.float32)
    half /= np.linalg.norm(half)
    shine = np.clip(normals @ half, 0, None) ** 18 * model.gloss * open_to
    grazing = (1 + np.clip(normals[:, 2], -1, 0)) ** 3 * 0.5 * model.gloss * above
    values[:, 5:8] = shine[:, None] * (2 * light.key_colour) + grazing[:, None] * light.sky
    return values


_UP = np.array([0.0, -1.0, 0.0])


def _textured(identity: Identity, size: int, values: np.ndarray) -> np.ndarray:
    """(M, 8) interpolated values -> (M, 3) colours."""
    texture = identity.texture(textures.side_for(size))
    side = texture.shape[0]
    where = values[:, :2] * side - 0.5
    rows = 4096  # OpenCV's pictures are at most 32767 wide and high: fold the list
    padded = -len(where) % rows
    folded = np.concatenate([where, np.zeros((padded, 2), np.float32)]).reshape(-1, rows, 2)
    if len(folded) == 0:
        return np.zeros((0, 3), np.float32)
    albedo = cv2.remap(texture, folded, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    albedo = albedo.reshape(-1, 3)[: len(where)]
    return albedo * values[:, 2:5] + values[:, 5:8]


def _glint(colours, identity, expression, pose, camera, pixels, shown, side) -> None:
    """The light's reflections on the wet eyeballs, in place."""
    eye = np.flatnonzero(shown == PARTS.index("eye"))
    if len(eye) == 0:
        return
    half = camera @ identity.looks.light.key + _VIEWER
    half /= np.linalg.norm(half)
    scale = np.cbrt(np.linalg.det(pose[:, :3]))
    x, y = (pixels[eye] % side + 0.5) * 2 / side - 1, (pixels[eye] // side + 0.5) * 2 / side - 1
    gaze = expressions.gaze_rotation(expression)
    for ball in identity.eyes.values():
        centre = pose[:, :3] @ (ball.centre + 0.35 * ball.radius * gaze @ _VIEWER) + pose[:, 3]
        at = centre + 0.7 * scale * ball.radius * half
        away = np.square(x - at[0]) + np.square(y - at[1])
        strength = np.clip(1.6 - away / np.square(0.105 * scale * ball.radius), 0, 1)[:, None]
        colours[eye] += strength * (0.92 - colours[eye])


def _backdrop(identity: Identity, side: int, camera: np.ndarray) -> np.ndarray:
    picture = identity.background(side)
    if np.allclose(camera, np.eye(3)):
        return picture.copy()
    shift = np.arctan2(camera[0, 2], camera[2, 2]) * side * 0.6
    down = np.arctan2(-camera[1, 2], camera[2, 2]) * side * 0.6
    move = np.array([[1, 0, shift], [0, 1, down]], np.float32)
    return cv2.warpAffine(picture, move, (side, side), borderMode=cv2.BORDER_REFLECT_101)


def _smaller(picture: np.ndarray, size: int) -> np.ndarray:
    if picture.shape[0] == size:
        return picture
    return cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA)
