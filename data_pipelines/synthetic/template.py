"""The head that all people share before they are made different: face and skull as one mesh.

Control vertices 0..467 are MediaPipe's mesh points, so that landmarks are vertices of the surface that
is drawn; rings of further vertices go from the face's outline round the skull. Finer levels are smooth
subdivisions of it. Coordinates are canonical: P = [I | 0], see `face_points`.
"""

from __future__ import annotations

import functools

import cv2
import numpy as np

from data_pipelines.prepare.masks import LANDMARKS_OF
from data_pipelines.synthetic import mesh
from data_pipelines.synthetic.face_points import MEAN_FACE, MESH_POINTS

LEVELS = 3
RINGS = 9  # of the skull, behind the face's outline
MOUTH_LINE, MOUTH_CORNER = 0.281, 0.139  # y of the closed lips' line, x of their corner
UPPER_INNER_LIP = (191, 80, 81, 82, 13, 312, 311, 310, 415)
LOWER_INNER_LIP = (95, 88, 178, 87, 14, 317, 402, 318, 324)
HINGE = np.array([0.0, 0.03, -0.03])  # the jaw turns about the x axis through this point
BACK_OF_HEAD = np.array([0.0, -0.10, 0.47])
COMPONENTS = ("right_eye", "left_eye", "right_brow", "left_brow", "nose", "outer_lips")
_OVAL = np.array(LANDMARKS_OF["face_oval"])
AXIS_Z = 0.05  # of the cylinder that textures are unrolled from
SKIN_HEIGHT = 0.66  # part of the texture (from its top) that holds the skin of the head
_TOP, _BOTTOM = -0.72, 0.62  # canonical y there


def level_for(size: int) -> int:
    """How finely meshes are divided for pictures of `size` pixels."""
    return 0 if size <= 96 else 1 if size <= 320 else 2


def smooth(low: float, high: float, value: np.ndarray) -> np.ndarray:
    """0 below `low`, 1 above `high`, an S-shaped curve between."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def around(points: np.ndarray, centre, spread) -> np.ndarray:
    """(N, 3) -> (N,): a bell about `centre` with standard deviations `spread` (number or (3,))."""
    return np.exp(-0.5 * np.square((points - np.asarray(centre)) / spread).sum(-1))


def lower_side(points: np.ndarray) -> np.ndarray:
    """(468, 3) mesh points -> (468,) bool: below the line where the lips meet."""
    below = points[:, 1] > MOUTH_LINE
    below[list(UPPER_INNER_LIP)] = False
    below[list(LOWER_INNER_LIP)] = True
    return below


def _sections(z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Half width, top and bottom of the skull's cross-sections at depth z."""
    at = [-0.45, -0.35, -0.2, -0.05, 0.02, 0.12, 0.25, 0.36, 0.43, 0.47]
    width = [0.30, 0.34, 0.368, 0.38, 0.388, 0.397, 0.385, 0.31, 0.20, 0.0]
    top = [-0.39, -0.49, -0.603, -0.66, -0.67, -0.668, -0.625, -0.52, -0.38, -0.10]
    bottom = [0.55, 0.52, 0.42, 0.32, 0.26, 0.22, 0.19, 0.13, 0.06, -0.10]
    return np.interp(z, at, width), np.interp(z, at, top), np.interp(z, at, bottom)


def _skull() -> np.ndarray:
    """(RINGS - 1, 36, 3) vertices behind the outline of the face; the pole comes apart."""
    outline = MEAN_FACE[_OVAL]
    middle = -0.10
    half, top, bottom = _sections(outline[:, 2])
    vertical = np.where(outline[:, 1] < middle, middle - top, bottom - middle)
    angle = np.arctan2(outline[:, 0] / half, -(outline[:, 1] - middle) / vertical)

    def on_section(z):
        half, top, bottom = _sections(z)
        reach = np.where(np.cos(angle) > 0, middle - top, bottom - middle)
        across = np.sin(angle)
        rounder = np.sign(across) * np.abs(across) ** 0.8  # than an ellipse, above
        across = np.where(np.cos(angle) > 0, rounder, across)
        return np.stack([half * across, middle - reach * np.cos(angle), z], -1)

    rings = []
    for step in range(1, RINGS):
        part = np.sin(step / RINGS * np.pi / 2) ** 1.15
        z = outline[:, 2] + (BACK_OF_HEAD[2] - outline[:, 2]) * part
        fade = (1 - part) ** 2.2
        rings.append(on_section(z) + fade * (outline - on_section(outline[:, 2])))
    return np.stack(rings)


def _flattened() -> np.ndarray:
    """(468, 2): the face unrolled, with the mouth opened, for telling which points are neighbours."""
    points = MEAN_FACE[:MESH_POINTS]
    angle = np.arctan2(points[:, 0], -(points[:, 2] - AXIS_Z))
    opening = np.sqrt(np.clip(1 - np.square(points[:, 0] / MOUTH_CORNER), 0, 1))
    down = points[:, 1] + 0.08 * opening * lower_side(points)
    return np.stack([0.42 * angle, down], -1)


def _inside(polygon: np.ndarray, point: np.ndarray) -> bool:
    return cv2.pointPolygonTest(polygon.astype(np.float32), point.tolist(), False) > 0


def _face_triangles() -> np.ndarray:
    """Delaunay triangles of the unrolled face, with holes for eyes and mouth."""
    flat = _flattened()
    plane = cv2.Subdiv2D((-2, -2, 4, 4))
    for point in flat.tolist():
        plane.insert(point)
    corners = plane.getTriangleList().reshape(-1, 3, 2)
    corners = corners[np.abs(corners).max(axis=(1, 2)) < 1.5]
    distance = np.square(corners[:, :, None] - flat).sum(-1)
    triangles = distance.argmin(-1)
    holes = [flat[list(LANDMARKS_OF[name])] for name in ("right_eye", "left_eye", "inner_lips")]
    middles = flat[triangles].mean(1).astype(float)
    kept = [
        triangle
        for triangle, middle in zip(triangles, middles, strict=True)
        if _inside(flat[_OVAL], middle) and not any(_inside(hole, middle) for hole in holes)
    ]
    return np.array(kept)


def _on_components(triangles: np.ndarray) -> np.ndarray:
    """(F, 3) triangles of the face -> (F,) bool: within the outline of one of COMPONENTS."""
    flat = _flattened()
    outlines = [flat[list(LANDMARKS_OF[name])] for name in COMPONENTS]
    middles = flat[triangles].mean(1).astype(float)
    return np.array([any(_inside(one, middle) for one in outlines) for middle in middles])


def _smoothed(points: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """The face with its lips closed, and its chin evened out in depth: points slide there."""
    points, count = points.copy(), len(points)
    lips = list(UPPER_INNER_LIP), list(LOWER_INNER_LIP)
    points[lips[0]] = points[lips[1]] = (points[lips[0]] + points[lips[1]]) / 2
    edges = np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [2, 0]]])
    edges = np.concatenate([edges, edges[:, ::-1]])
    degree = np.bincount(edges[:, 0], minlength=count)
    inner = np.setdiff1d(np.arange(count), _OVAL)
    amount = 0.7 * smooth(0.34, 0.40, points[inner, 1])
    for _ in range(3):
        near = np.bincount(edges[:, 0], points[edges[:, 1], 2], count) / degree
        points[inner, 2] += amount * (near[inner] - points[inner, 2])
    return points


class Head:
    """Topology and constants of the head mesh.

    Attributes:
        points: (N, 3) control vertices: the face, then the skull's rings, then its pole.
        follow: (N,) 1 on the face; on the skull how much of the movement of the outline is taken over.
        leader: (N,) the mesh point whose movement that is.
        subdivisions: the steps to finer levels.
        face_triangles: (F, 3) those of the face; on every level they come first.
        components: (F,) bool, whether they belong to brows, nose or lips, or to the rim of an eye.
        triangles: per level.
        uv: per level, (N, 2) texture coordinates in [0, 1].
        occlusion: per level, (N,) how much of the surrounding light arrives, in [0, 1].
        normals: per level, a `mesh.Normals`.
    """

    def __init__(self):
        triangles = _face_triangles()
        face, skull = _smoothed(MEAN_FACE[:MESH_POINTS], triangles), _skull()
        count = len(_OVAL)
        self.points = np.concatenate([face, skull.reshape(-1, 3), BACK_OF_HEAD[None]])
        numbers = MESH_POINTS + np.arange((RINGS - 1) * count).reshape(RINGS - 1, count)
        rings = np.concatenate([_OVAL[None], numbers])
        band = rings.reshape(-1)[mesh.grid_triangles(RINGS, count, closed=True)]
        pole = len(self.points) - 1
        cap = np.stack([rings[-1], np.full(count, pole), np.roll(rings[-1], -1)], -1)
        centre = np.array([0.0, -0.05, 0.0])
        self.face_triangles = mesh.outward(self.points, triangles, centre)
        self.components = _on_components(self.face_triangles)
        behind = [mesh.outward(self.points, part, centre) for part in (band, cap)]
        triangles = np.concatenate([self.face_triangles, *behind])
        part = np.arange(1, RINGS) / RINGS
        fade = np.repeat((1 - part) ** 2, count)
        self.follow = np.concatenate([np.ones(MESH_POINTS), fade, [0.0]])
        self.leader = np.concatenate([np.arange(MESH_POINTS), np.tile(_OVAL, RINGS - 1), [10]])
        uv, occlusion = skin_coordinates(self.points), _occlusion(self.points)
        self.triangles, self.uv = [triangles], [uv.astype(np.float32)]
        self.occlusion, self.subdivisions = [occlusion.astype(np.float32)], []
        for _ in range(1, LEVELS):
            step = mesh.subdivide(self.triangles[-1], len(self.uv[-1]))
            self.subdivisions.append(step)
            self.triangles.append(step.triangles)
            self.uv.append(step.linear(self.uv[-1]))
            self.occlusion.append(step.linear(self.occlusion[-1][:, None])[:, 0])
        self.normals = [
            mesh.Normals(triangles, len(uv))
            for triangles, uv in zip(self.triangles, self.uv, strict=True)
        ]

    def refine(self, values: np.ndarray, level: int) -> np.ndarray:
        """Control values (N, C) -> those of a level's vertices."""
        for step in self.subdivisions[:level]:
            values = step(values)
        return values


@functools.cache
def head() -> Head:
    return Head()


def skin_coordinates(points: np.ndarray) -> np.ndarray:
    """(N, 3) canonical points -> (N, 2) texture coordinates: unrolled, the front wider than the back."""
    angle = np.arctan2(points[:, 0], -(points[:, 2] - AXIS_Z)) / np.pi
    across = 0.5 + 0.5 * (angle + 0.2 * np.sin(angle * np.pi))
    down = np.clip((points[:, 1] - _TOP) / (_BOTTOM - _TOP), 0, 1) * SKIN_HEIGHT
    return np.stack([across, down], -1)


def height_of(down: np.ndarray) -> np.ndarray:
    """The vertical texture coordinate of the skin -> canonical y."""
    return _TOP + down / SKIN_HEIGHT * (_BOTTOM - _TOP)


def _occlusion(points: np.ndarray) -> np.ndarray:
    """Light that arrives in hollows: eye sockets, beside the nose, under nose, lip and chin."""
    dark = np.zeros(len(points))
    for side in (-1, 1):
        dark += 0.30 * around(points, (side * 0.125, -0.13, -0.34), (0.05, 0.035, 0.08))
        dark += 0.22 * around(points, (side * 0.10, 0.13, -0.43), (0.03, 0.04, 0.06))
        dark += 0.12 * around(points, (side * 0.175, -0.175, -0.36), (0.07, 0.02, 0.08))
    dark += 0.20 * around(points, (0, 0.165, -0.46), (0.05, 0.02, 0.05))
    dark += 0.15 * around(points, (0, 0.375, -0.44), (0.06, 0.02, 0.06))
    under_chin = smooth(0.30, 0.46, points[:, 1]) * smooth(-0.33, -0.15, points[:, 2])
    return np.clip(1 - dark - 0.45 * under_chin, 0.3, 1.0)
