"""Topology of triangle meshes: grids, smooth subdivision, and normals of moving vertices.

Everything that depends on the triangles alone is worked out once; a frame only moves vertices.
Vertices are (N, 3) float32, triangles (T, 3) int, wound so that `cross(b - a, c - a)` points outwards.
"""

from __future__ import annotations

import dataclasses

import numpy as np


def grid_triangles(rows: int, columns: int, *, closed: bool = False) -> np.ndarray:
    """Triangles of a rows x columns grid of vertices (row-major); `closed` joins last and first column."""
    lower = np.arange(rows - 1)[:, None] * columns
    left = np.arange(columns if closed else columns - 1)[None, :]
    right = (left + 1) % columns
    a, b, c, d = lower + left, lower + right, lower + columns + left, lower + columns + right
    first = np.stack([a, c, b], -1).reshape(-1, 3)
    second = np.stack([b, c, d], -1).reshape(-1, 3)
    return np.concatenate([first, second])


def outward(vertices: np.ndarray, triangles: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """The triangles, all turned over if most of them face `centre`."""
    corners = vertices[triangles]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    facing = np.einsum("ij,ij->", normals, corners.mean(1) - centre)
    return triangles if facing >= 0 else triangles[:, [0, 2, 1]]


@dataclasses.dataclass(frozen=True)
class Subdivision:
    """One level of smooth interpolating subdivision: old vertices stay, every edge gets a new one.

    Attributes:
        ends: (E, 2) the edge's vertices.
        near: (E, 2) the vertices opposite the edge.
        wings: (E, 4) the vertices beyond those triangles.
        weights: (E, 3) of an end, a near and a wing vertex.
        triangles: (4T, 3) of the finer mesh.
    """

    ends: np.ndarray
    near: np.ndarray
    wings: np.ndarray
    weights: np.ndarray
    triangles: np.ndarray

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """(N, C) values at vertices -> (N + E, C), smooth."""
        ends, near, wings = self.weights[:, :1], self.weights[:, 1:2], self.weights[:, 2:]
        new = ends * (values[self.ends[:, 0]] + values[self.ends[:, 1]])
        new += near * (values[self.near[:, 0]] + values[self.near[:, 1]])
        new += wings * values[self.wings].sum(axis=1)
        return np.concatenate([values, new])

    def linear(self, values: np.ndarray) -> np.ndarray:
        """(N, C) -> (N + E, C), the mean of the two ends: for texture coordinates and weights."""
        return np.concatenate([values, values[self.ends].mean(axis=1)])


def subdivide(triangles: np.ndarray, vertices: int) -> Subdivision:
    """The subdivision of a mesh (the butterfly rule; along borders the four-point rule)."""
    edges: dict[tuple[int, int], int] = {}
    opposite: list[list[int]] = []
    for triangle in triangles.tolist():
        for at in range(3):
            a, b, c = triangle[at], triangle[(at + 1) % 3], triangle[(at + 2) % 3]
            number = edges.setdefault((min(a, b), max(a, b)), len(edges))
            if number == len(opposite):
                opposite.append([])
            opposite[number].append(c)
    border: dict[int, list[int]] = {}
    for (a, b), number in edges.items():
        if len(opposite[number]) == 1:
            border.setdefault(a, []).append(b)
            border.setdefault(b, []).append(a)

    def beyond(a: int, b: int, c: int) -> int:
        """The vertex behind edge (a, b) as seen from c; c itself mirrored is not known: c."""
        others = [v for v in opposite[edges[min(a, b), max(a, b)]] if v != c]
        return others[0] if others else c

    ends = np.array(list(edges), np.int64)
    near = np.zeros((len(edges), 2), np.int64)
    wings = np.zeros((len(edges), 4), np.int64)
    weights = np.zeros((len(edges), 3), np.float32)
    for (a, b), number in edges.items():
        found = opposite[number]
        if len(found) == 2:
            c, d = found
            near[number] = c, d
            wings[number] = beyond(a, c, b), beyond(b, c, a), beyond(a, d, b), beyond(b, d, a)
            weights[number] = 0.5, 0.125, -0.0625
        else:
            before = [v for v in border[a] if v != b] or [a]
            after = [v for v in border[b] if v != a] or [b]
            near[number] = before[0], after[0]
            weights[number] = 0.5625, -0.0625, 0.0
    finer = []
    for a, b, c in triangles.tolist():
        ab, bc, ca = (vertices + edges[min(pair), max(pair)] for pair in ((a, b), (b, c), (c, a)))
        finer += [(a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca)]
    return Subdivision(ends, near, wings, weights, np.array(finer, np.int64))


class Normals:
    """Vertex normals of a mesh whose vertices move: the mean of the triangles about each vertex."""

    def __init__(self, triangles: np.ndarray, vertices: int):
        self.triangles = triangles
        corners = triangles.T.reshape(-1)  # triangle t is at t, T + t and 2T + t
        order = np.argsort(corners, kind="stable")
        counts = np.bincount(corners, minlength=vertices)
        place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        # Missing neighbours point at one more triangle, whose normal is zero.
        self.around = np.full((vertices, min(int(counts.max()), 12)), len(triangles), np.int64)
        fits = place < self.around.shape[1]
        self.around[corners[order][fits], place[fits]] = (order % len(triangles))[fits]

    def __call__(self, vertices: np.ndarray) -> np.ndarray:
        """(N, 3) -> (N, 3) float32 unit normals."""
        a, b, c = (vertices[self.triangles[:, corner]] for corner in range(3))
        ab, ac = b - a, c - a
        faces = np.empty((len(self.triangles) + 1, 3), np.float32)
        faces[-1] = 0.0
        faces[:-1, 0] = ab[:, 1] * ac[:, 2] - ab[:, 2] * ac[:, 1]
        faces[:-1, 1] = ab[:, 2] * ac[:, 0] - ab[:, 0] * ac[:, 2]
        faces[:-1, 2] = ab[:, 0] * ac[:, 1] - ab[:, 1] * ac[:, 0]
        normals = faces[self.around].sum(axis=1)
        normals /= np.sqrt(np.einsum("ij,ij->i", normals, normals))[:, None] + 1e-9
        return normals
