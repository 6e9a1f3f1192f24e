"""Job `evaluate`: figures and pictures of an exported model on held-out clips (method.md 8.1).

- self: the first frame of a shot drives to others of the same shot and crop, so there is a ground truth:
  PSNR, SSIM and LPIPS, each beside that of repeating the source frame; PSNR round eyes and mouth.
- cross: pose and expression of another person: APD and AED of result and driver. A grid of every
  portrait by every driver.
- disentangled: pose of A, expression of B, face of C. APD to A and AED to B should be small, to the
  other driver (the leak) large. Then expression alone and pose alone: what is not driven must stay.
- synthetic: rendered heads, where the truth is known (`evaluation/synthetic.py`).
- flicker: consecutive frames of self-reenactment (`evaluation/flicker.py`).

self and cross also say how well eyes and mouth follow the driver (`evaluation/eyes_and_mouth.py`).
APD is the mean absolute difference of pitch, yaw and roll in degrees, AED that of the blendshapes
that move. Both depend on the estimator: compare them within one table only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.dataset import ClipDataset, open_clips
from data_pipelines.records import RecordError
from dexportrait_jax import provenance
from dexportrait_jax.errors import UserError
from dexportrait_jax.evaluation import metrics
from dexportrait_jax.evaluation.estimators import (
    FaceEstimator,
    expression_distance,
    open_estimator,
    pose_distance,
)
from dexportrait_jax.evaluation.eyes_and_mouth import Track, clip_masks, following
from dexportrait_jax.evaluation.flicker import evaluate_flicker
from dexportrait_jax.evaluation.grid import make_grid
from dexportrait_jax.evaluation.results import Findings, check_replaceable, write_results
from dexportrait_jax.evaluation.runner import (
    FirstFrames,
    Frames,
    FrameValues,
    Picture,
    Runner,
    ShownRows,
    in_batches,
    one_clip_each,
)
from dexportrait_jax.evaluation.synthetic import evaluate_synthetic
from dexportrait_jax.inference import Sampling, load_model
from dexportrait_jax.metrics import Progress

PROTOCOLS = ("self", "cross", "disentangled", "synthetic", "flicker")


def run_evaluate(
    weights: str,
    data: str,
    protocol: str,
    out: str,
    split: str = "validation",
    max_frames: int = 16,
    seed: int = 0,
    steps: int | None = None,
    overwrite: bool = False,
    max_people: int | None = None,
    beside: str | None = None,
    estimator: FaceEstimator | None = None,
) -> dict[str, Any]:
    """The job `evaluate`: writes metrics.json, report.html and pictures into ``out``, returns the JSON.

    ``max_frames``: frames measured of each clip, see `Runner`. ``max_people``: measured, the first of the split;
    None: all of them. ``beside``: another export, for flicker. ``estimator``: reads pose and expression off
    pictures, by default MediaPipe. UserError for what the user can put right; an ``out`` that was there stays
    as it was then.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"--protocol={protocol}: there are {', '.join(PROTOCOLS)}")
    if max_frames < 1:
        raise UserError(f"--max_frames={max_frames}: at least 1")
    if max_people is not None and max_people < 1:
        raise UserError(f"--max_people={max_people}: at least 1")
    if beside is not None and protocol != "flicker":
        raise UserError(f"--beside is for --protocol=flicker; leave it out with {protocol}")
    check_replaceable(Path(out), overwrite)
    clips = open_clips(data, split)
    model = load_model(weights)
    runner = Runner(model, Sampling(seed=seed, steps=steps), max_frames, max_people)
    model.settings(runner.sampling)  # wrong settings are found before the first clip
    other = None
    if beside is not None:
        other = Runner(load_model(beside), runner.sampling, max_frames, max_people)
    start = time.monotonic()
    try:
        found = _measure(protocol, runner, data, clips, estimator, other)
    except RecordError as error:
        # Training leaves such a record out; a figure of the others would be another dataset's.
        # Protocols read other splits too: probes are fitted on training people, sources start their videos.
        raise UserError(f"{data} is damaged: {error}; prepare it again") from error
    about = {
        "protocol": protocol,
        "split": split,
        "stage": model.stage,
        "weights_sha256": provenance.weights_digest(model.description),
        "sampling": model.settings(runner.sampling),
        "frames": runner.frames,
        "seconds": round(time.monotonic() - start, 1),
    }
    if other is not None:
        digest = provenance.weights_digest(other.model.description)
        about |= {"beside_stage": other.model.stage, "beside_weights_sha256": digest}
    shown = ", ".join(
        f"{name} {value:.4g}" for name, value in found.values.items() if value is not None
    )
    # What took hours to measure is said before anything can go wrong with files.
    print(f"{protocol}, {len(found.items)} items, {runner.frames} frames: {shown}", flush=True)
    target = Path(out).resolve()
    result = write_results(target, about, found)
    print(f"wrote {', '.join(sorted(path.name for path in target.iterdir()))} in {out}")
    return result


def _measure(
    protocol: str,
    runner: Runner,
    data: str,
    clips: ClipDataset,
    estimator: FaceEstimator | None,
    beside: Runner | None,
) -> Findings:
    if protocol == "synthetic":
        return evaluate_synthetic(runner, open_clips(data, "train"), clips)
    if protocol == "flicker":
        return evaluate_flicker(runner, clips, beside)
    function = {
        "self": evaluate_self,
        "cross": evaluate_cross,
        "disentangled": evaluate_disentangled,
    }[protocol]
    with open_estimator(estimator) as estimate:
        return function(runner, clips, estimate)


# --- protocols ------------------------------------------------------------------------


def evaluate_self(runner: Runner, clips: ClipDataset, estimate: FaceEstimator) -> Findings:
    """PSNR, SSIM and LPIPS of held-out frames, and of the source frame in their place.

    The source is the first frame of the clip's shot in its crop (method.md 7.3), also where training
    has that part of the shot (`FirstFrames`); measured are frames of the evaluated split.
    parts_psnr: PSNR round eyes and mouth; parts_psnr_own_expression: the same with the source
    frame's expression in place of the driving frame's; expression_use_db: what the latter adds.
    Further keys: `following`.
    """
    first = FirstFrames(clips.directory)
    distance = metrics.LearnedDistance("alexnet")
    measures: dict[str, Callable] = {"psnr": metrics.psnr, "ssim": metrics.ssim, "lpips": distance}
    items, rows, tracks, pooled = [], ShownRows(), [], FrameValues()
    people = runner.people(clips)
    chosen = [number for number, name in enumerate(clips.index["identity"]) if name in people]
    progress = Progress("evaluate self", len(chosen), unit="clip")
    for done, number in enumerate(chosen):
        clip = clips[number]
        if len(clip) < 2:
            continue
        portrait = first(clip)
        source = runner.pictures(portrait, [0])
        track, own = Track(estimate), FrameValues()
        shown: list[tuple[Picture, ...]] = []
        for indices in runner.parts(len(clip)):
            truth = runner.pictures(clip, indices)
            made = runner.make(portrait, (clip, indices), (clip, indices))
            control = runner.make(portrait, (clip, indices), None)
            copy = np.repeat(source, len(indices), 0)
            for name, measure in measures.items():
                own.add(name, in_batches(measure, made, truth))
                own.add(f"{name}_copy", in_batches(measure, copy, truth))
            masks = clip_masks(clip, indices, runner.model.image_size)
            parts, own_parts = (
                metrics.masked_psnr(pictures, truth, masks) for pictures in (made, control)
            )
            own.add("parts_psnr", parts)
            own.add("parts_psnr_own_expression", own_parts)
            own.add("expression_use_db", parts - own_parts)
            track.add(clip, indices, made=made, control=control, ceiling=truth)
            shown += zip(truth, made, strict=True)
        names = {"clip": clip.clip_id, "source": portrait.clip_id}
        items.append({**names, **own.means(), **following([track])})
        pooled.pool(own)
        rows.add(source[0], shown)
        tracks.append(track)
        progress.update(done + 1)
    if not items:
        raise UserError(f"no clip of {clips.directory} ({clips.split}) has two frames to compare")
    return Findings(pooled.means() | following(tracks), items, rows.pictures)


def evaluate_cross(runner: Runner, clips: ClipDataset, estimate: FaceEstimator) -> Findings:
    """APD and AED to the driver, who is another person, beside those of repeating the source.

    Further keys: `following`; and a grid of every portrait by every driver.
    """
    people = one_clip_each(runner, clips, 2, "cross")
    items, rows, tracks, pooled = [], ShownRows(), [], FrameValues()
    progress = Progress("evaluate cross", len(people), unit="item")
    for number, source in enumerate(people):
        driver = people[(number + 1) % len(people)]
        own, track = _Distances(estimate, runner.pictures(source, [0])[0]), Track(estimate)
        for indices in runner.parts(len(driver)):
            made = runner.make(source, (driver, indices), (driver, indices))
            control = runner.make(source, (driver, indices), None)
            truth = runner.pictures(driver, indices)
            own.compare(made, pose={"apd": truth}, expression={"aed": truth})
            own.copy({"apd_copy": truth}, {"aed_copy": truth})
            track.add(driver, indices, made=made, control=control, ceiling=truth)
            own.shown += zip(truth, made, strict=True)
        names = {"source": source.clip_id, "driver": driver.clip_id}
        items.append({**names, **own.values.means(), **following([track])})
        pooled.pool(own.values)
        rows.add(own.source, own.shown)
        tracks.append(track)
        progress.update(number + 1)
    values = pooled.means() | following(tracks)
    return Findings(values, items, rows.pictures, {"grid": make_grid(runner, people)})


def evaluate_disentangled(runner: Runner, clips: ClipDataset, estimate: FaceEstimator) -> Findings:
    """Pose of A, expression of B, face of C; then each driven alone (method.md 8.1), with a grid of either.

    apd, aed: to the driver of that part. apd_leak, aed_leak: to the other driver, should stay as
    large as apd_between, aed_between, the drivers' own distance. apd_expression_only,
    aed_pose_only: change of the part that was not driven, should be near 0.
    """
    people = one_clip_each(runner, clips, 3, "disentangled")
    items, rows, pooled = [], ShownRows(), FrameValues()
    progress = Progress("evaluate disentangled", len(people), unit="item")
    for number, source in enumerate(people):
        a, b = people[(number + 1) % len(people)], people[(number + 2) % len(people)]
        own = _Distances(estimate, runner.pictures(source, [0])[0])
        for indices in runner.parts(min(len(a), len(b))):
            of_a, of_b = runner.pictures(a, indices), runner.pictures(b, indices)
            made = runner.make(source, (a, indices), (b, indices))
            own.compare(
                made,
                pose={"apd": of_a, "apd_leak": of_b},
                expression={"aed": of_b, "aed_leak": of_a},
            )
            own.compare(of_a, {"apd_between": of_b}, {"aed_between": of_b}, made_here=False)
            own.copy({"apd_copy": of_a}, {"aed_copy": of_b})
            still = np.repeat(own.source[None], len(indices), 0)
            expression_only = runner.make(source, None, (b, indices))
            own.compare(expression_only, pose={"apd_expression_only": still}, expression={})
            pose_only = runner.make(source, (a, indices), None)
            own.compare(pose_only, pose={}, expression={"aed_pose_only": still})
            own.shown += zip(of_a, of_b, made, strict=True)
        names = {"source": source.clip_id, "pose": a.clip_id, "expression": b.clip_id}
        items.append({**names, **own.values.means()})
        pooled.pool(own.values)
        rows.add(own.source, own.shown)
        progress.update(number + 1)
    grids = {
        "grid_expression_only": make_grid(runner, people, pose=False, name="expression alone"),
        "grid_pose_only": make_grid(runner, people, expression=False, name="pose alone"),
    }
    return Findings(pooled.means(), items, rows.pictures, grids)


class _Distances:
    """APD and AED of one item, frame by frame; faces_found: 1 or 0, whether a picture made shows a face.

    Distances are left out where one of the two faces is not found.
    """

    def __init__(self, estimate: FaceEstimator, source: Picture):
        self.estimate, self.source = estimate, source
        self.shown: list[tuple[Picture, ...]] = []
        self.values = FrameValues()

    def compare(
        self,
        made: Frames,
        pose: dict[str, Frames],
        expression: dict[str, Frames],
        *,
        made_here: bool = True,
    ) -> None:
        """Adds the distances of ``made`` to each of the named truths."""
        for number, picture in enumerate(made):
            result = self.estimate(picture)
            for truths, distance in ((pose, pose_distance), (expression, expression_distance)):
                for name, truth in truths.items():
                    wanted = self.estimate(truth[number])
                    known = result is not None and wanted is not None
                    self.values.add(name, [distance(result, wanted)] if known else [])
            if made_here:
                self.values.add("faces_found", [result is not None])

    def copy(self, pose: dict[str, Frames], expression: dict[str, Frames]) -> None:
        """Adds the distances of the source frame to each of the named truths."""
        count = len(next(iter((*pose.values(), *expression.values()))))
        self.compare(np.repeat(self.source[None], count, 0), pose, expression, made_here=False)
