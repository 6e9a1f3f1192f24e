"""A face recogniser to measure with: MobileFace of `../shared/data/models`, run from its TensorFlow.js graph.

Pictures of one person have a cosine of about .7, of two people about .05.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

SIDE = 112
# Eyes, tip of the nose, corners of the mouth: MediaPipe's numbers, and the places of ArcFace's alignment.
_POINTS = ((33, 133), (362, 263), (1,), (61,), (291,))
_PLACES = np.array(
    [[38.29, 51.70], [73.53, 51.50], [56.02, 71.74], [41.55, 92.37], [70.73, 92.20]], np.float32
)


def load(folder: str | Path) -> Callable[[np.ndarray], np.ndarray]:
    """(n, 112, 112, 3) pictures in 0..255 -> (n, 256) vectors of length 1."""
    folder = Path(folder)
    graph = json.loads((folder / "mobileface.json").read_text())
    values = _weights(graph, (folder / "mobileface.bin").read_bytes())
    nodes = [node for node in graph["modelTopology"]["node"] if node["op"] in _OPERATIONS]

    @jax.jit
    def run(pictures):
        known = {"data": pictures}
        for node in nodes:
            inputs = [known[name] if name in known else values[name] for name in node["input"]]
            known[node["name"]] = _OPERATIONS[node["op"]](node, *inputs)
        vectors = known[nodes[-1]["name"]]
        return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)

    return lambda pictures: np.asarray(run(np.asarray(pictures, np.float32)))


def aligned(picture: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """The face at SIDE, turned and scaled so that eyes, nose and mouth lie where the recogniser learned them.

    ``landmarks``: (478, 2) of MediaPipe, in pixels.
    """
    points = np.stack([landmarks[list(corners)].mean(0) for corners in _POINTS])
    move, _ = cv2.estimateAffinePartial2D(points.astype(np.float32), _PLACES, method=cv2.LMEDS)
    return cv2.warpAffine(picture, move, (SIDE, SIDE), flags=cv2.INTER_LINEAR)


def _weights(graph: dict, data: bytes) -> dict[str, np.ndarray]:
    values, start = {}, 0
    for entry in graph["weightsManifest"][0]["weights"]:
        count = int(np.prod(entry["shape"], dtype=int))
        values[entry["name"]] = np.frombuffer(data, entry["dtype"], count, start).reshape(
            entry["shape"]
        )
        start += 4 * count
    return values


def _stride(node: dict) -> tuple[int, int]:
    assert base64.b64decode(node["attr"]["padding"]["s"]) == b"VALID"
    strides = node["attr"]["strides"]["list"]["i"]
    return int(strides[1]), int(strides[2])


_LAYOUT = ("NHWC", "HWIO", "NHWC")


def _convolution(node: dict, pictures, kernel):
    return lax.conv_general_dilated(
        pictures, kernel, _stride(node), "VALID", dimension_numbers=_LAYOUT
    )


def _depthwise(node: dict, pictures, kernel):
    channels = kernel.shape[2]
    kernel = kernel.reshape(*kernel.shape[:2], 1, channels)
    return lax.conv_general_dilated(
        pictures,
        kernel,
        _stride(node),
        "VALID",
        dimension_numbers=_LAYOUT,
        feature_group_count=channels,
    )


_OPERATIONS = {
    "Sub": lambda node, a, b: a - b,
    "Mul": lambda node, a, b: a * b,
    "AddV2": lambda node, a, b: a + b,
    "Maximum": lambda node, a, b: jnp.maximum(a, b),
    "Minimum": lambda node, a, b: jnp.minimum(a, b),
    "Pad": lambda node, a, widths: jnp.pad(a, [tuple(map(int, pair)) for pair in widths]),
    "Reshape": lambda node, a, shape: a.reshape(a.shape[0], -1),
    "MatMul": lambda node, a, b: a @ b,
    "Conv2D": _convolution,
    "DepthwiseConv2dNative": _depthwise,
}
