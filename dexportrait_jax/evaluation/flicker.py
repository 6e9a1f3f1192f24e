"""Protocol `flicker`: what changes from frame to frame beyond what moves.

The first frame of a shot drives to consecutive frames of it, in the same crop. Optical flow of the true frames says
where every point goes; each result is moved along and compared with the next one, where forward and backward flow
agree (the warping error of Lai et al. 2018, "Learning Blind Video Temporal Consistency"). The flow is the true frames',
so models are compared on the same points.
"""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from data_pipelines.dataset import ClipDataset
from dexportrait_jax.errors import UserError
from dexportrait_jax.evaluation import metrics
from dexportrait_jax.evaluation.results import Findings
from dexportrait_jax.evaluation.runner import (
    FirstFrames,
    Frames,
    FrameValues,
    Runner,
    ShownRows,
    in_batches,
)
from dexportrait_jax.face_clips import enlarge
from dexportrait_jax.inference import PortraitModel
from dexportrait_jax.metrics import Progress

Flow = Float[np.ndarray, "h w 2"]
# Sundaram et al. 2010: flows there and back agree where |f + b|^2 < 0.01 (|f|^2 + |b|^2) + 0.5 pixels^2.
_RELATIVE, _ABSOLUTE = 0.01, 0.5


def evaluate_flicker(runner: Runner, clips: ClipDataset, beside: Runner | None = None) -> Findings:
    """warped_error of results, and of the true frames (warped_error_truth), which no result need be below.

    Mean absolute difference in [0, 1]. ``runner.run_frames`` consecutive frames of every clip, at the stride that
    models of clips were trained with. Blur lowers the figure too, so psnr to the true frames stands beside it.
    ``beside``: another model on the same frames, for warped_error_beside and psnr_beside. UserError where both are of
    clips at different strides, so that these are no frames of its own, or it makes pictures of another size.
    """
    models = {"": runner, **({"_beside": beside} if beside else {})}
    stride = _common_stride([one.model for one in models.values()])
    if beside is not None:
        _check_size(runner.model, beside.model)
    count = max(one.run_frames for one in models.values())
    first, people = FirstFrames(clips.directory), runner.people(clips)
    chosen = [number for number, name in enumerate(clips.index["identity"]) if name in people]
    items, rows, pooled = [], ShownRows(), FrameValues()
    progress = Progress("evaluate flicker", len(chosen), unit="clip")
    for done, number in enumerate(chosen):
        clip = clips[number]
        indices = np.arange(1, len(clip), stride)[:count]
        if len(indices) < 2:
            continue
        portrait = first(clip)
        truth = runner.pictures(clip, indices)
        flows = [_flow(later, earlier) for earlier, later in zip(truth, truth[1:], strict=False)]
        own, shown = FrameValues(), [truth]
        for name, one in models.items():
            made = one.make(portrait, (clip, indices), (clip, indices))
            own.add(f"warped_error{name}", warped_errors(made, flows))
            own.add(f"psnr{name}", in_batches(metrics.psnr, made, truth))
            shown.append(made)
        own.add("warped_error_truth", warped_errors(truth, flows))
        items.append({"clip": clip.clip_id, "source": portrait.clip_id, **own.means()})
        pooled.pool(own)
        rows.add(runner.pictures(portrait, [0])[0], list(zip(*shown, strict=True)))
        progress.update(done + 1)
    if not items:
        raise UserError(
            f"no clip of {clips.directory} ({clips.split}) has two frames beyond its first"
        )
    return Findings({**pooled.means(), "frame_stride": stride}, items, rows.pictures)


def _common_stride(models: list[PortraitModel]) -> int:
    """Frames from one to the next, as models of clips were trained; 1 where none is of clips.

    A model of single frames is at home on any: its stage never reads data.frame_stride. UserError where two differ.
    """
    strides = [one.config.data.frame_stride for one in models if one.clip_length > 1]
    if len(set(strides)) > 1:
        raise UserError(
            f"--weights were trained with data.frame_stride={strides[0]}, --beside with {strides[1]}: the farther "
            "frames are apart, the more changes, so flicker cannot be compared; give models of one stride"
        )
    return strides[0] if strides else 1


def _check_size(model: PortraitModel, other: PortraitModel) -> None:
    if model.image_size != other.image_size:
        raise UserError(
            f"--weights make pictures of {model.image_size} pixels, --beside of {other.image_size}; give models "
            "of one size"
        )


def warped_errors(
    frames: Frames, flows: list[tuple[Flow, Bool[np.ndarray, "h w"]]]
) -> Float[np.ndarray, " pairs"]:
    """Of every frame but the first: mean absolute difference in [0, 1] from the one before it, moved along.

    ``flows``: for each frame but the first, from where in the one before its pixels come, in pixels, and where
    that is known; see `_flow`. Frames of which nothing is known are left out.
    """
    errors = []
    for earlier, later, (flow, known) in zip(frames, frames[1:], flows, strict=False):
        difference = np.abs(_moved(earlier, flow).astype(np.float64) - later) / 255
        if known.any():
            errors.append(difference[known].mean())
    return np.array(errors)


def _flow(
    later: UInt8[np.ndarray, "h w 3"], earlier: UInt8[np.ndarray, "h w 3"]
) -> tuple[Flow, Bool[np.ndarray, "h w"]]:
    """From pixels of the later frame to their places in the earlier one, and where it can be trusted."""
    # Small pictures are enlarged, because the smallest patches of the flow are 8 pixels.
    grey = [cv2.cvtColor(enlarge(frame), cv2.COLOR_RGB2GRAY) for frame in (later, earlier)]
    factor = grey[0].shape[0] / later.shape[0]
    method = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    there, back = method.calc(*grey, None), method.calc(*grey[::-1], None)
    returned = _moved(back, there)
    lengths = np.square(there).sum(-1) + np.square(returned).sum(-1)
    agree = np.square(there + returned).sum(-1) < _RELATIVE * lengths + _ABSOLUTE
    height, width = agree.shape
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    x, y = columns + there[..., 0], rows + there[..., 1]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    size = (later.shape[1], later.shape[0])
    flow = cv2.resize(there, size, interpolation=cv2.INTER_AREA) / factor
    known = cv2.resize((agree & inside).astype(np.float32), size, interpolation=cv2.INTER_AREA)
    return flow, known > 0.5


def _moved(picture: np.ndarray, flow: Flow) -> np.ndarray:
    """What the picture shows at the places that the flow points to."""
    rows, columns = np.mgrid[: flow.shape[0], : flow.shape[1]].astype(np.float32)
    return cv2.remap(
        picture,
        columns + flow[..., 0],
        rows + flow[..., 1],
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
