"""Who is in a result: the cosine of a face recogniser, on rendered heads, whose landmarks are known exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_pipelines.dataset import open_clips
from data_pipelines.synthetic.render import Rendering
from dexportrait_jax.evaluation import synthetic
from dexportrait_jax.evaluation.runner import Frames, Runner, one_clip_each
from dexportrait_jax.inference import PortraitModel, Sampling, load_model
from tests import mobileface

Recogniser = Callable[[np.ndarray], np.ndarray]  # aligned faces -> vectors of length 1
MAX_FRAMES = 16  # of `dexportrait evaluate`


def drawn(
    truth: synthetic.Truth, poses: np.ndarray, expressions: np.ndarray, size: int
) -> list[Rendering]:
    """The right answers: this person with these poses and expressions."""
    pairs = zip(expressions, poses, strict=True)
    return [truth.render(expression, pose, size) for expression, pose in pairs]


def vectors(recognise: Recogniser, pictures: Frames, truths: list[Rendering]) -> np.ndarray:
    """Of pictures that show, or should show, what the renderings do: aligned by the renderings' landmarks."""
    size = pictures.shape[1]
    points = [(one.landmarks[:, :2] + 1) / 2 * size for one in truths]
    pairs = zip(pictures, points, strict=True)
    return recognise(np.stack([mobileface.aligned(*pair) for pair in pairs]))


def csim(export: Path, data: str, people: int, recogniser: str) -> dict[str, float]:
    """CSIM of an export's results: the cosine with the source, on the items of `evaluate`'s protocols.

    csim: pose of A, expression of B; cross_csim: both of A. csim_truth, cross_csim_truth: the same of the renderer's
    pictures, which is what turning the head and moving the face leave of it.
    """
    return csim_of(load_model(export), data, people, mobileface.load(recogniser))


def csim_of(
    model: PortraitModel, data: str, people: int, recognise: Recogniser
) -> dict[str, float]:
    runner = Runner(model, Sampling(), MAX_FRAMES, people)
    clips = one_clip_each(runner, open_clips(data, "validation"), 3, "disentangled")
    size, found = model.image_size, {}
    for number, source in enumerate(clips):
        person = synthetic.truth_of(source)
        own = drawn(person, person.pose[:1], person.expression[:1], size)
        portrait = vectors(recognise, runner.pictures(source, [0]), own)
        a, b = (clips[(number + step) % len(clips)] for step in (1, 2))
        for name, other in (("csim", b), ("cross_csim", a)):
            for indices in runner.parts(min(len(a), len(other))):
                poses = synthetic.truth_of(a).pose[indices]
                truths = drawn(person, poses, synthetic.truth_of(other).expression[indices], size)
                made = runner.make(source, (a, indices), (other, indices))
                answers = np.stack([one.image for one in truths])
                for title, pictures in ((name, made), (f"{name}_truth", answers)):
                    cosine = (vectors(recognise, pictures, truths) * portrait).sum(-1)
                    found.setdefault(title, []).append(cosine)
    return {name: float(np.mean(np.concatenate(parts))) for name, parts in found.items()}
