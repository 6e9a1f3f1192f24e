"""A person: shape and looks drawn from a seed, and the meshes and textures made from them once.

`make_identity` is cheap; a mesh is made at the first picture of a resolution and kept.
"""

from __future__ import annotations

import functools
import threading
from typing import NamedTuple

import numpy as np

from data_pipelines.prepare.masks import LANDMARKS_OF
from data_pipelines.synthetic import expression, hair, looks, mesh, parts, shape, template, textures
from data_pipelines.synthetic.face_points import MESH_POINTS

# What a pixel may show; 0 is the background.
PARTS = ("background", "skin", "eye", "mouth", "teeth", "tongue", "ear", "hair", "body")
_KEPT = 24  # identities that `make_identity` remembers: some megabytes each


def name_of(seed: int) -> str:
    """The name of a person, for records and splits."""
    return f"head{int(seed):07d}"


class Model(NamedTuple):
    """One person's mesh at one level: all parts as one list of vertices.

    Attributes:
        vertices: (N, 3) neutral, canonical; control vertices come from `Identity.control`.
        pieces: name -> slice of its vertices.
        triangles: (T, 3). `part_of`: (T,) number in `PARTS`. `face`: (T,) bool, of the face itself.
            `component`: (T,) bool, of eyes, brows, nose or mouth.
        uv: (N, 2). `occlusion`: (N,). `gloss`: (N,). `behind`: (N,) added to depth.
        normals: of all vertices.
        follow: (body vertices,) how much they follow the body and not the head.
    """

    vertices: np.ndarray
    pieces: dict[str, slice]
    triangles: np.ndarray
    part_of: np.ndarray
    face: np.ndarray
    component: np.ndarray
    uv: np.ndarray
    occlusion: np.ndarray
    gloss: np.ndarray
    behind: np.ndarray
    normals: mesh.Normals
    follow: np.ndarray


class Identity:
    """A person.

    Attributes:
        seed: the person is a function of it.
        name: for records and splits.
        shape: strengths of `shape.STRENGTHS`.
        looks: colours, hair, clothes, background, light.
        control: (N, 3) neutral control vertices of the head, the first 468 are the mesh points.
        eyes: the eyeballs.
    """

    def __init__(self, seed: int):
        self.seed, self.name = int(seed), name_of(seed)
        rng = np.random.default_rng((self.seed, 3))
        self.shape = shape.sample_shape(rng)
        self.looks = looks.sample_looks(rng, self.shape)
        self.body = (rng.uniform(0.85, 1.12), rng.uniform(0.82, 1.12), rng.uniform(0.012, 0.05))
        self.ears = (rng.uniform(0.85, 1.15), rng.uniform(-0.15, 0.5))
        head = template.head()
        self.control = head.points + shape.displacement(head.points, self.shape)
        for eye in expression.EYES:
            self.control[:MESH_POINTS] = expression.fit_lids(self.control[:MESH_POINTS], eye)
        points = self.control[:MESH_POINTS]
        self.eyes = {eye: expression.eye_of(points, eye) for eye in expression.EYES}
        self._models: dict[int, Model] = {}
        self._pictures: dict[tuple[str, int], np.ndarray] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> int:
        return self.seed

    def __setstate__(self, seed: int) -> None:
        self.__init__(seed)

    def model(self, level: int) -> Model:
        """The mesh at a level, made once."""
        with self._lock:
            if level not in self._models:
                self._models[level] = _make_model(self, level)
            return self._models[level]

    def texture(self, side: int) -> np.ndarray:
        """(side, side, 3) float32, painted once."""
        return self._picture("texture", side, textures.paint)

    def background(self, side: int) -> np.ndarray:
        """(side, side, 3) float32, painted once."""
        return self._picture("background", side, textures.background)

    def _picture(self, kind: str, side: int, make) -> np.ndarray:
        with self._lock:
            if (kind, side) not in self._pictures:
                self._pictures[kind, side] = make(self.looks, side)
            return self._pictures[kind, side]


@functools.lru_cache(_KEPT)
def make_identity(seed: int) -> Identity:
    """The person of a seed (a whole number from 0); the last ones made are remembered."""
    return Identity(seed)


def _make_model(person: Identity, level: int) -> Model:
    head, points = template.head(), person.control[:MESH_POINTS]
    face_triangles = len(template.head().face_triangles) * 4**level
    made: dict[str, tuple[str, parts.Piece]] = {}
    skin = parts.Piece(
        head.refine(person.control, level),
        head.triangles[level],
        head.uv[level],
        head.occlusion[level],
    )
    made["skin"] = "skin", skin
    for eye in expression.EYES:
        made[eye] = "eye", parts.eyeball(person.eyes[eye].radius, level)
    inner = points[list(LANDMARKS_OF["inner_lips"])]
    made["cavity"] = "mouth", parts.cavity_piece(inner)
    made["upper_teeth"] = "teeth", parts.teeth(points[13], level, True)
    made["lower_teeth"] = "teeth", parts.teeth(points[14], level, False)
    made["tongue"] = "tongue", parts.tongue(points[14], level)
    for name, side in (("right_ear", -1), ("left_ear", 1)):
        made[name] = "ear", _deformed(parts.ear(side, *person.ears, level), person)
    grown = hair.hair(person.looks.hair, level)
    if grown is not None:
        made["hair"] = "hair", _deformed(grown, person)
    made["body"] = "body", parts.body(*person.body, level)
    pieces, start = {}, 0
    for name, (_, piece) in made.items():
        pieces[name] = slice(start, start + len(piece.vertices))
        start += len(piece.vertices)
    whole = hair.join([piece for _, piece in made.values()])
    counts = [len(piece.triangles) for _, piece in made.values()]
    part_of = np.repeat([PARTS.index(part) for part, _ in made.values()], counts)
    face = part_of == PARTS.index("skin")
    face[face_triangles:] = False
    component = np.zeros_like(face)
    component[:face_triangles] = np.repeat(head.components, 4**level)  # children lie side by side
    inner_parts = np.isin(
        part_of, [PARTS.index(part) for part in ("eye", "mouth", "teeth", "tongue")]
    )
    face |= inner_parts
    component |= inner_parts
    shine = {"skin": person.looks.gloss, "ear": 0.05, "eye": 0.10, "teeth": 0.25, "tongue": 0.2}
    shine |= {"mouth": 0.0, "hair": 0.16, "body": 0.03}
    gloss = np.zeros(start, np.float32)
    behind = np.zeros(start, np.float32)
    for name, (part, _) in made.items():
        gloss[pieces[name]] = shine[part]
        # A little farther away than they are: thin lids and lips must never be pierced.
        behind[pieces[name]] = 0.004 if part == "eye" else 0.0
    body = made["body"][1].vertices
    vertices = whole.vertices.astype(np.float32)
    return Model(
        vertices,
        pieces,
        whole.triangles,
        part_of.astype(np.uint8),
        face,
        component,
        whole.uv.astype(np.float32),
        whole.occlusion.astype(np.float32),
        gloss,
        behind,
        mesh.Normals(whole.triangles, len(vertices)),
        parts.body_follow(body).astype(np.float32)[:, None],
    )


def _deformed(piece: parts.Piece, person: Identity) -> parts.Piece:
    moved = piece.vertices + shape.displacement(piece.vertices, person.shape)
    return piece._replace(vertices=moved)
