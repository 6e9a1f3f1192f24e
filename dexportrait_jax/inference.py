"""An exported model made ready to animate: its encoders, and what all kinds of models share.

`load_model(directory)` returns a `PortraitModel`; which kind is decided by the stage of the export.
Everything compiled runs on batches of a fixed size, so no clip compiles anything that another clip
has not.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Float, UInt8

from data_pipelines.augment import default_augment
from dexportrait_jax.errors import UserError
from dexportrait_jax.state import Network
from dexportrait_jax.tasks.pictures import to_float, to_uint8
from dexportrait_jax.weights.importing import load_groups, read_description

BATCH = 8  # frames that go through a network together
STAGES = ("motion", "animator_image", "animator_video")


@dataclass(frozen=True)
class Sampling:
    """How to sample; what is None is taken from the model's config."""

    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    hybrid_steps: int | None = None
    expression_guidance: float | None = None
    reading: str | None = None
    expression_null: str | None = None
    null_reference: str | None = None
    null_pose: str | None = None
    start: str | None = None
    eta: float | None = None
    overlap: int | None = None
    window_offset: str | None = None
    window_ends: str | None = None
    window_weights: str | None = None


@dataclass(frozen=True)
class Drive:
    """The source's own pose and expression, and those of every frame to make."""

    source_pose: Float[np.ndarray, "3 4"]
    source_expression: Float[np.ndarray, " latent"]
    poses: Float[np.ndarray, "frames 3 4"]
    expressions: Float[np.ndarray, "frames latent"]

    def __len__(self) -> int:
        return len(self.poses)


class ClipProgram(NamedTuple):
    """Something compiled that a clip of `frames` runs so many `times`; arguments may be shapes alone."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    times: int


class PortraitModel(abc.ABC):
    """Encoders of pose and expression, and a way from a source and a Drive to pictures.

    Args:
      description: of the export.
      config: the run's.
      networks: those of `groups`.
      params: their weights on the device; shapes will do for `clip_programs`.
    """

    groups: tuple[str, ...] = ("pose", "expression")

    def __init__(
        self,
        description: dict[str, Any],
        config: ml_collections.ConfigDict,
        networks: dict[str, Network],
        params: dict[str, Any],
    ):
        self.description, self.config, self.networks = description, config, networks
        self.params = params
        data = config.data
        self.image_size, self.pose_size = data.image_size, data.pose_size
        self.expression_size = data.expression_size
        # An export may be older than some knob; defaults of new ones are what was before them.
        augment = ml_collections.ConfigDict(default_augment())
        augment.update(data.augment)
        self.augment = augment.to_dict()
        self._encode = jax.jit(self._encode_batch)

    @property
    def stage(self) -> str:
        return self.description["stage"]

    @property
    def clip_length(self) -> int:
        """Consecutive frames that the model makes together; 1 where each frame stands alone."""
        return 1

    def settings(self, sampling: Sampling) -> dict[str, Any]:
        """What decides the result beside the weights, for the provenance; "steps" among it.

        UserError for settings that this model cannot follow.
        """
        return {"steps": None, "seed": sampling.seed}

    def idle_flags(self, sampling: Sampling, frames: int) -> str | None:
        """What to tell of flags that change nothing about a clip of so many frames; None where there are none."""
        del sampling, frames
        return None

    def encode(
        self,
        pose_images: UInt8[np.ndarray, "n hp hp 3"],
        expression_images: UInt8[np.ndarray, "n he he 3"],
    ) -> tuple[Float[np.ndarray, "n 3 4"], Float[np.ndarray, "n latent"]]:
        """Pose and expression of every picture by the model's own frozen encoders."""
        poses, expressions = [], []
        for first in range(0, len(pose_images), BATCH):
            part = slice(first, first + BATCH)
            count = len(pose_images[part])
            pose, expression = self._encode(
                self.params,
                padded(pose_images[part], BATCH),
                padded(expression_images[part], BATCH),
            )
            poses.append(np.asarray(pose, np.float32)[:count])
            expressions.append(np.asarray(expression, np.float32)[:count])
        return np.concatenate(poses), np.concatenate(expressions)

    @abc.abstractmethod
    def clip_programs(self, sampling: Sampling) -> tuple[int, list[ClipProgram], int]:
        """The shortest clip that is made as a long one is: its frames, what it runs, and the bytes kept for it."""

    def _encode_program(self, frames: int) -> tuple[ClipProgram, jax.ShapeDtypeStruct]:
        """The encoders for a source and so many frames, and the shape of a batch of expressions."""
        images = (
            jax.ShapeDtypeStruct((BATCH, size, size, 3), jnp.uint8)
            for size in (self.pose_size, self.expression_size)
        )
        arguments = (self.params, *images)
        times = 1 + math.ceil(frames / BATCH)
        expressions = jax.eval_shape(self._encode, *arguments)[1]
        return ClipProgram("encode", self._encode, arguments, times), expressions

    def _encode_batch(self, params, pose_images, expression_images):
        poses, _ = self.networks["pose"].bind(params["pose"])(to_float(pose_images))
        expression = self.networks["expression"].bind(params["expression"])
        return poses, expression(to_float(expression_images))

    @abc.abstractmethod
    def animate(
        self,
        source: UInt8[np.ndarray, "h w 3"],
        drive: Drive,
        sampling: Sampling,
        report: Callable[[float, str], None] = lambda part, note: None,
    ) -> Iterator[UInt8[np.ndarray, "n h w 3"]]:
        """The frames of ``drive`` in order, in groups of any size.

        ``report(part, note)`` is told how much of the work is done, from 0 to 1.
        """


class MotionModel(PortraitModel):
    """The motion trainer's own pictures: one pass a frame (method.md 3.1)."""

    groups = ("appearance", "pose", "expression", "generator")

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._reenact = jax.jit(self._reenact_batch)

    def settings(self, sampling):
        for name, value in dataclasses.asdict(sampling).items():
            if name != "seed" and value is not None:
                raise UserError(
                    f"--{name} is for the animator: an export of the motion trainer makes each frame "
                    "in one pass; leave it out, or give an export of an animator stage"
                )
        return super().settings(sampling)

    def _reenact_batch(self, params, source, source_pose, poses, expressions):
        from dexportrait_jax.tasks.motion_networks import reenact

        return reenact(
            self.networks,
            params,
            to_float(source),
            source_pose,
            poses,
            expressions,
            self.config.model.warp_padding,
        )

    def clip_programs(self, sampling):
        encode, expressions = self._encode_program(BATCH)
        size = self.image_size
        source = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
        pose, poses = (jax.ShapeDtypeStruct((n, 3, 4), jnp.float32) for n in (1, BATCH))
        arguments = (self.params, source, pose, poses, expressions)
        return BATCH, [encode, ClipProgram("reenact", self._reenact, arguments, 1)], 0

    def animate(self, source, drive, sampling, report=lambda part, note: None):
        for first in range(0, len(drive), BATCH):
            part = slice(first, first + BATCH)
            count = len(drive.poses[part])
            images = self._reenact(
                self.params,
                source[None],
                drive.source_pose[None],
                padded(drive.poses[part], BATCH),
                padded(drive.expressions[part], BATCH),
            )
            report((first + count) / len(drive), "")
            # Cut on the host: on the device every number of frames would be a program of its own.
            yield to_uint8(np.asarray(images)[:count])


def padded(array: np.ndarray, size: int) -> np.ndarray:
    """``array`` with its last row repeated until it has ``size`` rows."""
    lacking = size - len(array)
    return array if lacking == 0 else np.concatenate([array, np.repeat(array[-1:], lacking, 0)])


def load_model(weights: str | Path) -> PortraitModel:
    """The model in an export directory.

    UserError when it is no export, one of a stage that makes no pictures of people, or damaged.
    """
    directory = Path(weights)
    if not directory.is_dir():
        raise UserError(
            f"--weights={weights}: no such directory; "
            "make an export with `dexportrait export --workdir=RUN --out=DIR`"
        )
    description = read_description(directory)
    stage = description.get("stage")
    if stage not in STAGES:
        raise UserError(
            f"--weights={weights} is an export of stage {stage!r}, which cannot animate; "
            f"give an export of {', '.join(STAGES)}"
        )
    config = ml_collections.ConfigDict(description["config"])
    kind, networks = model_kind(config)
    abstract = {name: network.abstract for name, network in networks.items()}
    description, params = load_groups(directory, abstract, stage=stage)
    return kind(description, config, networks, jax.tree.map(jnp.asarray, params))


def model_kind(
    config: ml_collections.ConfigDict,
) -> tuple[type[PortraitModel], dict[str, Network]]:
    """The class that animates with a stage's weights, and its networks."""
    if config.stage == "motion":
        from dexportrait_jax.tasks import motion

        kind, networks = MotionModel, motion.build_networks(config)
    else:
        from dexportrait_jax.animator_inference import AnimatorModel
        from dexportrait_jax.tasks import animator

        kind, networks = AnimatorModel, animator.build_networks(config)
    return kind, {name: networks[name] for name in kind.groups if name in networks}


def nbytes(tree: Any) -> int:
    """Of all arrays, or shapes, in a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
