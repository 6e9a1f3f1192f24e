"""What a rendered clip shows, and whether the renderer would draw it the same today."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from data_pipelines import transforms
from data_pipelines.dataset import ClipDataset
from data_pipelines.records import Clip
from data_pipelines.synthetic.expression import EXPRESSION_PARAMETERS
from data_pipelines.synthetic.identity import make_identity
from data_pipelines.synthetic.render import Rendering, render
from dexportrait_jax.errors import UserError

REDRAWN = 3  # clips of a split that are drawn again
LEAST_PSNR = 30.0  # dB; what a JPEG of ours loses leaves 37 and more at 32 pixels and above


@dataclass(frozen=True)
class Truth:
    """What a rendered clip shows: the person's seed, (T, K) expressions by name, (T, 3, 4) poses, the camera."""

    seed: int
    names: tuple[str, ...]
    expression: Float[np.ndarray, "t k"]
    pose: Float[np.ndarray, "t 3 4"]
    camera: Float[np.ndarray, "3 3"]

    def render(self, expression: np.ndarray, pose: np.ndarray, size: int) -> Rendering:
        """This person with another's expression and pose, before the camera of this clip."""
        return render(make_identity(self.seed), expression, pose, size, camera=self.camera)


def truth_of(clip: Clip) -> Truth:
    """The truth that the renderer left in a clip. UserError where it is a clip of something else."""
    known = clip.settings.get("synthetic")
    if known is None:
        raise UserError(
            f"clip {clip.clip_id} is no rendered head, so its truth is not known: give --data a dataset of "
            "`dexportrait render`, or synthetic:identities=..."
        )
    expression, pose, camera = (
        np.asarray(known[name]) for name in ("expression", "pose", "camera_rotation")
    )
    names = tuple(known["expression_names"])
    return Truth(int(known["identity_seed"]), names, expression, pose, camera)


def check_same_renderer(splits: Sequence[ClipDataset]) -> None:
    """Draws the first frames of a few clips again: truths must be drawn as the dataset was, or no dB means anything.

    Raises:
        UserError: they differ from the stored ones by more than a JPEG does.
    """
    for clips in splits:
        for number in np.unique(np.linspace(0, len(clips) - 1, REDRAWN).astype(int)):
            clip = clips[int(number)]
            psnr = _redrawn_psnr(clip)
            if psnr < LEAST_PSNR:
                raise UserError(
                    f"{clips.directory} was drawn by another version of the renderer: the first frame of "
                    f"{clip.clip_id}, drawn again, has {psnr:.0f} dB of the stored one and not {LEAST_PSNR:.0f}; make "
                    "it anew with `dexportrait render --overwrite`, or evaluate with the version that drew it"
                )


def _redrawn_psnr(clip: Clip) -> float:
    truth = truth_of(clip)
    if truth.names != EXPRESSION_PARAMETERS.names:
        return 0.0  # other parameters than this renderer has
    drawn = truth.render(truth.expression[0], truth.pose[0], clip.size).image
    error = np.mean(np.square(transforms.decode_frame(clip, 0).astype(np.float64) - drawn))
    return float(10 * np.log10(255**2 / max(error, 1e-9)))
