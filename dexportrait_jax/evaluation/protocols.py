"""Job `evaluate`: figures and pictures of an exported model on held-out clips (method.md 8.1).

- self: the first frame of a video drives to others of the same video, so there is a ground truth:
  PSNR, SSIM and LPIPS, each beside that of repeating the source frame.
- cross: pose and expression of another person: APD and AED of result and driver.
- disentangled: pose of A, expression of B, face of C. APD to A and AED to B should be small, to the
  other driver (the leak) large. Then expression alone and pose alone: what is not driven must stay.
- synthetic: rendered heads, where the truth is known (`evaluation/synthetic.py`).

APD is the mean absolute difference of pitch, yaw and roll in degrees, AED that of the blendshapes
that move. Both depend on the estimator: compare them within one table only.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.dataset import ClipDataset, open_clips, split_names
from data_pipelines.files import replace_directory, writing_to
from data_pipelines.records import Clip
from dexportrait_jax import provenance
from dexportrait_jax.errors import UserError
from dexportrait_jax.evaluation import metrics
from dexportrait_jax.evaluation.estimators import (
    Estimate,
    FaceEstimator,
    expression_distance,
    open_estimator,
    pose_distance,
)
from dexportrait_jax.evaluation.report import sample_grid, write_png
from dexportrait_jax.evaluation.runner import (
    Findings,
    Frames,
    Picture,
    Runner,
    in_batches,
    mean,
    one_clip_each,
    row,
)
from dexportrait_jax.evaluation.synthetic import evaluate_synthetic
from dexportrait_jax.inference import Sampling, load_model
from dexportrait_jax.metrics import Progress

PROTOCOLS = ("self", "cross", "disentangled", "synthetic")
RESULT = "metrics.json"
SHOWN_ROWS = 6


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
    estimator: FaceEstimator | None = None,
) -> dict[str, Any]:
    """The job `evaluate`: writes ``out``/metrics.json and samples.png, returns the JSON.

    ``max_frames``: frames made of each clip. ``estimator``: reads pose and expression off pictures,
    by default MediaPipe. UserError for what the user can put right; an ``out`` that was there stays
    as it was then.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"--protocol={protocol}: there are {', '.join(PROTOCOLS)}")
    if max_frames < 1:
        raise UserError(f"--max_frames={max_frames}: at least 1")
    target = Path(out)
    _check_replaceable(target, overwrite)
    clips = open_clips(data, split)
    model = load_model(weights)
    runner = Runner(model, Sampling(seed=seed, steps=steps), max_frames)
    model.settings(runner.sampling)  # wrong settings are found before the first clip
    start = time.monotonic()
    if protocol == "self":
        found = evaluate_self(runner, clips)
    elif protocol == "synthetic":
        found = evaluate_synthetic(runner, open_clips(data, "train"), clips)
    else:
        with open_estimator(estimator) as estimate:
            function = evaluate_cross if protocol == "cross" else evaluate_disentangled
            found = function(runner, clips, estimate)
    result = {
        "protocol": protocol,
        "split": split,
        "stage": model.stage,
        "weights_sha256": provenance.weights_digest(model.description),
        "sampling": model.settings(runner.sampling),
        "frames": runner.frames,
        "seconds": round(time.monotonic() - start, 1),
        **found.values,
        "items": found.items,
    }
    _write(target, result, found.rows)
    shown = ", ".join(
        f"{name} {value:.4g}" for name, value in found.values.items() if value is not None
    )
    print(f"{protocol}, {len(found.items)} items, {runner.frames} frames: {shown}")
    print(f"wrote {target / RESULT} and {target / 'samples.png'}")
    return result


# --- protocols ------------------------------------------------------------------------


def evaluate_self(runner: Runner, clips: ClipDataset) -> Findings:
    """PSNR, SSIM and LPIPS of held-out frames, and of the source frame in their place.

    The source is the first frame of the video that a clip was cut from (method.md 7.3), in
    whichever split that frame is; the frames that are measured are those of the evaluated split.
    """
    first = _FirstFrames(clips.directory)
    distance = metrics.LearnedDistance("alexnet")
    measures: dict[str, Callable] = {"psnr": metrics.psnr, "ssim": metrics.ssim, "lpips": distance}
    collected: dict[str, list[np.ndarray]] = {}
    items, rows = [], []
    progress = Progress("evaluate self", len(clips), unit="clip")
    for number in range(len(clips)):
        clip = clips[number]
        if len(clip) < 2:
            continue
        portrait = first(clip)
        source = runner.pictures(portrait, [0])
        own: dict[str, list[np.ndarray]] = {}
        shown: list[tuple[Picture, ...]] = []
        for indices in runner.parts(len(clip)):
            truth = runner.pictures(clip, indices)
            made = runner.make(portrait, (clip, indices), (clip, indices))
            copy = np.repeat(source, len(indices), 0)
            for name, measure in measures.items():
                own.setdefault(name, []).append(in_batches(measure, made, truth))
                own.setdefault(f"{name}_copy", []).append(in_batches(measure, copy, truth))
            shown += zip(truth, made, strict=True)
        joined = {name: np.concatenate(parts) for name, parts in own.items()}
        for name, values in joined.items():
            collected.setdefault(name, []).append(values)
        names = {"clip": clip.clip_id, "source": portrait.clip_id}
        items.append({**names, **{name: mean(part) for name, part in joined.items()}})
        rows.append(row(source[0], shown))
        progress.update(number + 1)
    if not items:
        raise UserError(f"no clip of {clips.directory} ({clips.split}) has two frames to compare")
    values = {name: mean(np.concatenate(parts)) for name, parts in collected.items()}
    return Findings(values, items, rows)


def evaluate_cross(runner: Runner, clips: ClipDataset, estimate: FaceEstimator) -> Findings:
    """APD and AED to the driver, who is another person, beside those of repeating the source."""
    people = one_clip_each(clips, 2, "cross")
    items, rows = [], []
    progress = Progress("evaluate cross", len(people), unit="item")
    for number, source in enumerate(people):
        driver = people[(number + 1) % len(people)]
        own = _Distances(estimate, runner.pictures(source, [0])[0])
        for indices in runner.parts(len(driver)):
            made = runner.make(source, (driver, indices), (driver, indices))
            truth = runner.pictures(driver, indices)
            own.compare(made, pose={"apd": truth}, expression={"aed": truth})
            own.copy({"apd_copy": truth}, {"aed_copy": truth})
            own.shown += zip(truth, made, strict=True)
        items.append({"source": source.clip_id, "driver": driver.clip_id, **own.means()})
        rows.append(row(own.source, own.shown))
        progress.update(number + 1)
    return Findings(_means(items), items, rows)


def evaluate_disentangled(runner: Runner, clips: ClipDataset, estimate: FaceEstimator) -> Findings:
    """Pose of A, expression of B, face of C; then each driven alone (method.md 8.1).

    apd, aed: to the driver of that part. apd_leak, aed_leak: to the other driver, should stay as
    large as apd_between, aed_between, the drivers' own distance. apd_expression_only,
    aed_pose_only: change of the part that was not driven, should be near 0.
    """
    people = one_clip_each(clips, 3, "disentangled")
    items, rows = [], []
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
        items.append({**names, **own.means()})
        rows.append(row(own.source, own.shown))
        progress.update(number + 1)
    return Findings(_means(items), items, rows)


class _FirstFrames:
    """The first frame of the video of a clip, found over all splits of a dataset.

    Where the end of every video was held out, the beginning of a held-out clip is a moment before
    the frames to be measured, and repeating it would be hard to beat and prove nothing.
    """

    def __init__(self, directory: Path):
        self._first: dict[tuple, tuple[float, ClipDataset, int]] = {}
        for split in split_names(directory):
            clips = ClipDataset(directory, split)
            columns = [clips.index[name] for name in ("identity", "session", "camera", "start")]
            for number, (*video, start) in enumerate(zip(*columns, strict=True)):
                known = self._first.get(tuple(video))
                if known is None or start < known[0]:
                    self._first[tuple(video)] = start, clips, number

    def __call__(self, clip: Clip) -> Clip:
        _, clips, number = self._first[clip.identity, clip.session, clip.camera]
        return clips[number].part(0, 1)


class _Distances:
    """APD and AED of one item, frame by frame; pictures without a face count as not detected."""

    def __init__(self, estimate: FaceEstimator, source: Picture):
        self.estimate, self.source = estimate, source
        self.shown: list[tuple[Picture, ...]] = []
        self._values: dict[str, list[float]] = {}
        self._known: dict[bytes, Estimate | None] = {}
        self._made = self._found = 0

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
            result = self._read(picture)
            self._made += made_here
            self._found += made_here and result is not None
            for truths, distance in ((pose, pose_distance), (expression, expression_distance)):
                for name, truth in truths.items():
                    wanted = self._read(truth[number])
                    values = self._values.setdefault(name, [])
                    if result is not None and wanted is not None:
                        values.append(distance(result, wanted))

    def copy(self, pose: dict[str, Frames], expression: dict[str, Frames]) -> None:
        """Adds the distances of the source frame to each of the named truths."""
        count = len(next(iter((*pose.values(), *expression.values()))))
        self.compare(np.repeat(self.source[None], count, 0), pose, expression, made_here=False)

    def means(self) -> dict[str, float | None]:
        """Mean of each distance (None: no face found), and the share of pictures with a face."""
        means = {name: mean(np.array(values)) for name, values in self._values.items()}
        return {**means, "faces_found": self._found / max(1, self._made)}

    def _read(self, picture: Picture) -> Estimate | None:
        key = picture.tobytes()
        if key not in self._known:
            self._known[key] = self.estimate(picture)
        return self._known[key]


def _means(items: list[dict[str, Any]]) -> dict[str, float | None]:
    names = [name for name, value in items[0].items() if not isinstance(value, str)]
    kept = {name: [item[name] for item in items if item[name] is not None] for name in names}
    return {name: mean(np.array(values)) for name, values in kept.items()}


# --- writing --------------------------------------------------------------------------


def _check_replaceable(out: Path, overwrite: bool) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"--out={out} is there and is not a directory; give another")
    if out.exists() and any(out.iterdir()):
        if not (out / RESULT).is_file():
            raise UserError(
                f"--out={out} holds something that is no evaluation; give a new directory"
            )
        if not overwrite:
            raise UserError(
                f"--out={out} holds an evaluation already; add --overwrite to replace it"
            )


def _write(out: Path, result: dict[str, Any], rows: list[list[Picture]]) -> None:
    with writing_to(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            (temporary / RESULT).write_text(json.dumps(result, indent=2) + "\n")
            write_png(temporary / "samples.png", sample_grid(rows[:SHOWN_ROWS]))
            temporary.chmod(0o755)
            replace_directory(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
