"""Protocol `synthetic`: rendered heads, where "pose of A, expression of B, person C" has a right answer.

The encoders are measured by gauge and probes (`disentanglement.py`); the pictures against what the renderer makes
of the same three. Baselines of the last: repeating the source, moving the source as a flat card by the true
relative pose, and the mean picture of the training people. Then pose and expression are driven alone, see
`separate_control.py`.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from jaxtyping import Float

from data_pipelines import transforms
from data_pipelines.dataset import ClipDataset
from data_pipelines.prepare import crop
from data_pipelines.records import Clip
from data_pipelines.synthetic.expression import neutral
from data_pipelines.synthetic.poses import pose_matrix, scale_in_crop
from data_pipelines.synthetic.source import drawn_clip
from dexportrait_jax.errors import UserError
from dexportrait_jax.evaluation import metrics, probes
from dexportrait_jax.evaluation.disentanglement import Encoded, encoder_figures
from dexportrait_jax.evaluation.eyes_and_mouth import part_masks
from dexportrait_jax.evaluation.grid import make_grid
from dexportrait_jax.evaluation.rendered_truth import Truth, check_same_renderer, truth_of
from dexportrait_jax.evaluation.results import Findings
from dexportrait_jax.evaluation.runner import (
    Frames,
    FrameValues,
    Picture,
    Runner,
    ShownRows,
    in_batches,
    one_clip_each,
)
from dexportrait_jax.evaluation.separate_control import Shares
from dexportrait_jax.face_clips import encode_clip
from dexportrait_jax.metrics import Progress

TRAINING_FRAMES = 3000  # that gauge and probes are fitted on
FRAMES_A_CLIP = 12  # that are encoded for them
FRONTAL_PEOPLE = 100  # held-out people that are looked at frontally, at most
# In time nothing can be held out here: probes are fitted on other people than they are scored on.
MORE_HEADS = "`dexportrait render` more --identities, or a larger --holdout_fraction, with --frames of 2 or more"


def evaluate_synthetic(runner: Runner, training: ClipDataset, clips: ClipDataset) -> Findings:
    """Figures of encoders and pictures on held-out people; one item for each of them.

    Keys beside those of `encoder_figures`: frontal_spread_degrees; expression_r2/NAME of every parameter;
    self_psnr, cross_psnr, disentangled_psnr and *_copy (repeating the source); disentangled_rigid, disentangled_mean,
    disentangled_gain_db over the best of the three baselines; expression_use_db, PSNR round eyes and
    mouth with B's latent over the same with the source's. pose_only_follows_pose and
    expression_only_follows_expression, which should be 1, and pose_only_follows_expression and
    expression_only_follows_pose, which should be 0: of the whole picture and round eyes and mouth.
    UserError where these are no rendered heads, fewer than three people, or people that training showed.
    """
    truth_of(clips[0])  # of other videos nothing else is worth asking for
    people = one_clip_each(runner, clips, 3, "synthetic", MORE_HEADS)
    known = set(training.index["identity"]) & set(clips.index["identity"])
    if known:
        raise UserError(
            f"--protocol=synthetic: gauge and probes are fitted on people of split '{training.split}' and scored on "
            f"others, but split '{clips.split}' shows {len(known)} of them too; give a split of held-out people, as "
            "without --split"
        )
    check_same_renderer((training, clips))
    truths = [truth_of(clip) for clip in people]
    mean_picture = _mean_picture(runner, training)
    figures, parameters = encoder_figures(
        encode(runner, training, TRAINING_FRAMES),
        encode(runner, clips, TRAINING_FRAMES),
        truths[0].names,
    )
    figures["frontal_spread_degrees"] = frontal_spread(runner, clips)
    items, rows, shares, pooled = [], ShownRows(), Shares(), FrameValues()
    progress = Progress("evaluate synthetic", len(people), unit="person")
    for number, source in enumerate(people):
        a, b = ((number + step) % len(people) for step in (1, 2))
        clip_a, clip_b = people[a], people[b]
        own, shown = _item(
            runner,
            source,
            clip_a,
            clip_b,
            truths[number],
            truths[a],
            truths[b],
            mean_picture,
            shares,
        )
        names = {"source": source.clip_id, "pose": clip_a.clip_id, "expression": clip_b.clip_id}
        items.append({**names, **own.means()})
        pooled.pool(own)
        rows.add(runner.pictures(source, [0])[0], shown)
        progress.update(number + 1)
    means = pooled.means()
    best = max(means[f"disentangled_{name}"] for name in ("copy", "rigid", "mean"))
    means["disentangled_gain_db"] = means["disentangled_psnr"] - best
    means["expression_use_db"] = means["parts_psnr"] - means["parts_psnr_own_expression"]
    figures |= {f"expression_r2/{name}": value for name, value in parameters.items()}
    return Findings(
        means | shares.values() | figures, items, rows.pictures, {"grid": make_grid(runner, people)}
    )


def frontal_spread(runner: Runner, clips: ClipDataset) -> float:
    """Mean angle in degrees of people's poses from their mean, where all look straight ahead without expression.

    The test of method.md 2: P of frontal neutral pictures of many people should agree in R, whatever it is.
    """
    first = dict(zip(reversed(clips.index["identity"]), reversed(range(len(clips))), strict=True))
    found = []
    for number in list(first.values())[:FRONTAL_PEOPLE]:
        clip = clips[number]
        still = frontal_clip(truth_of(clip).seed, clip.size, clip.settings["face_scale"])
        found.append(encode_clip(runner.model, still)[0])
    rotations, _, _ = probes.split_pose(np.concatenate(found))
    return float(probes.angle_between(rotations, probes.mean_rotation(rotations)).mean())


def frontal_clip(seed: int, size: int, face_scale: float = crop.Settings.face_scale) -> Clip:
    """One frame of a person with P = [sI | 0] and no expression; s = 1 in the standard crop."""
    front = pose_matrix(scale=scale_in_crop(face_scale))
    return drawn_clip(seed, neutral()[None], front[None], size=size, face_scale=face_scale)


def encode(runner: Runner, clips: ClipDataset, frames: int) -> Encoded:
    """What the encoders say of at most ``frames`` frames, evenly over clips and within them."""
    count = max(1, min(len(clips), frames // FRAMES_A_CLIP))
    chosen = np.unique(np.linspace(0, len(clips) - 1, count).astype(int))
    identities = list(dict.fromkeys(clips.index["identity"]))
    parts: dict[str, list[np.ndarray]] = {}
    progress = Progress(f"encode {clips.split}", len(chosen), unit="clip")
    for done, number in enumerate(chosen):
        clip = clips[int(number)]
        known = truth_of(clip)
        indices = np.unique(np.linspace(0, len(clip) - 1, FRAMES_A_CLIP).astype(int))
        poses, latents = encode_clip(runner.model, clip, indices)
        person = np.full(len(indices), identities.index(clip.identity))
        values = (person, poses, latents, known.pose[indices], known.expression[indices])
        for name, value in zip(Encoded.__dataclass_fields__, values, strict=True):
            parts.setdefault(name, []).append(np.asarray(value))
        progress.update(done + 1)
    return Encoded(**{name: np.concatenate(values) for name, values in parts.items()})


def _item(
    runner: Runner,
    source: Clip,
    clip_a: Clip,
    clip_b: Clip,
    truth: Truth,
    a: Truth,
    b: Truth,
    mean_picture: Picture,
    shares: Shares,
) -> tuple[FrameValues, list[tuple[Picture, ...]]]:
    """PSNR and pictures: the source driven by itself, by A, by pose of A with expression of B, and by either alone."""
    first = runner.pictures(source, [0])[0]
    psnr = FrameValues()
    shown: list[tuple[Picture, ...]] = []

    def measure(name: str, made: Frames, wanted: Frames) -> None:
        psnr.add(name, in_batches(metrics.psnr, made, wanted))

    for indices in runner.parts(len(source)):
        wanted = runner.pictures(source, indices)
        measure("self_psnr", runner.make(source, (source, indices), (source, indices)), wanted)
        measure("self_copy", np.repeat(first[None], len(wanted), 0), wanted)
    for indices in runner.parts(min(len(clip_a), len(clip_b))):
        still = np.repeat(first[None], len(indices), 0)
        own_pose = np.repeat(truth.pose[:1], len(indices), 0)
        own_expression = np.repeat(truth.expression[:1], len(indices), 0)

        def drawn(expressions, poses) -> tuple[Frames, Frames]:
            return _rendered(runner, source, truth, expressions, poses)

        like_a, parts_like_a = drawn(a.expression[indices], a.pose[indices])
        measure("cross_psnr", runner.make(source, (clip_a, indices), (clip_a, indices)), like_a)
        measure("cross_copy", still, like_a)

        wanted, parts = drawn(b.expression[indices], a.pose[indices])
        made = runner.make(source, (clip_a, indices), (clip_b, indices))
        measure("disentangled_psnr", made, wanted)
        measure("disentangled_copy", still, wanted)
        moved = np.stack([move_rigidly(first, truth.pose[0], a.pose[index]) for index in indices])
        measure("disentangled_rigid", moved, wanted)
        measure("disentangled_mean", np.repeat(mean_picture[None], len(wanted), 0), wanted)
        own = runner.make(source, (clip_a, indices), None)
        psnr.add("parts_psnr", metrics.masked_psnr(made, wanted, parts))
        psnr.add("parts_psnr_own_expression", metrics.masked_psnr(own, wanted, parts))
        only_pose, own_parts = drawn(own_expression, a.pose[indices])
        shares.add("pose_only_follows_pose", own, still, only_pose)
        shares.add("pose_only_follows_expression", own, only_pose, like_a, own_parts | parts_like_a)
        made_expression = runner.make(source, None, (clip_b, indices))
        only_expression, parts = drawn(b.expression[indices], own_pose)
        _, still_parts = drawn(own_expression[:1], own_pose[:1])
        shares.add(
            "expression_only_follows_expression",
            made_expression,
            still,
            only_expression,
            parts | still_parts,
        )
        like_b, _ = drawn(b.expression[indices], b.pose[indices])
        shares.add("expression_only_follows_pose", made_expression, only_expression, like_b)
        drivers = (runner.pictures(clip, indices) for clip in (clip_a, clip_b))
        shown += zip(*drivers, made, wanted, strict=True)
    return psnr, shown


def _rendered(
    runner: Runner, source: Clip, truth: Truth, expressions: np.ndarray, poses: np.ndarray
) -> tuple[Frames, Frames]:
    """The true pictures, and masks (n, h, w) of eyes and mouth in them, where the face is seen there."""
    size, pictures, polygons, seen = runner.model.image_size, [], [], []
    for expression, pose in zip(expressions, poses, strict=True):
        drawn = truth.render(expression, pose, source.size)
        # Resampled as the model's inputs are, so that nothing but the model makes a difference.
        pictures.append(
            transforms.sample_picture(drawn.image, transforms.similarity_matrix(), size)
        )
        polygons.append(drawn.polygons)
        seen.append(cv2.resize(drawn.face_mask, (size, size), interpolation=cv2.INTER_AREA) > 127)
    # Of a head turned by 60 degrees an eighth of the polygons' masks is background or hair, which no expression moves.
    return np.stack(pictures), part_masks(polygons, size) * np.stack(seen)


def move_rigidly(
    picture: Picture, source_pose: Float[np.ndarray, "3 4"], pose: Float[np.ndarray, "3 4"]
) -> Picture:
    """The picture as a flat card that faces the viewer at R = I, moved from one pose to another."""
    here, there = (np.vstack([one[:2][:, [0, 1, 3]], [0, 0, 1]]) for one in (source_pose, pose))
    return transforms.sample_picture(picture, (there @ np.linalg.inv(here))[:2], picture.shape[0])


def _mean_picture(runner: Runner, clips: ClipDataset, count: int = 256) -> Picture:
    """The mean of many training pictures: the best that knows nothing of anything."""
    total: Any = 0.0
    chosen = np.linspace(0, len(clips) - 1, min(count, len(clips))).astype(int)
    for place, number in enumerate(chosen):
        clip = clips[int(number)]
        total = total + runner.pictures(clip, [place % len(clip)])[0].astype(np.float64)
    return np.rint(total / len(chosen)).astype(np.uint8)
