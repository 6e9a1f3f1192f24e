"""Does progressive hybrid guidance keep the person where the source is in profile (method.md 7.2, the paper's Fig. 5)?

    python -m tests.benchmarks profile_identity --weights=exports/image --data=data/heads [--people=24] [--yaw=35] \\
        [--steps=35] [--guidance=2.5] [--hybrid_steps=5]

Rendered heads, people held out: a source turned by `--yaw` degrees or more, driven by another person's frontal frames,
with S = `--hybrid_steps` and with S = 0, both sampled as method.md 7.2 says and not as the export's config, which for
training of minutes has 8 steps, S = 1 and no guidance. Identity is the cosine of a face recogniser
(`../shared/data/models`) between the result and the renderer's picture of that person with that pose and expression,
both aligned by the true landmarks; beside it what other people's true pictures have, and the PSNR.
"""

import argparse
import json

import numpy as np

from data_pipelines.dataset import open_clips
from dexportrait_jax.errors import UserError
from dexportrait_jax.evaluation import metrics, synthetic
from dexportrait_jax.evaluation.disentanglement import pose_angles
from dexportrait_jax.evaluation.runner import Runner, in_batches
from dexportrait_jax.inference import Sampling, load_model
from tests import mobileface
from tests.benchmarks import _identity

FRONTAL, FRAMES = 15.0, 4  # degrees of yaw, and frames a driver gives


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="tests.benchmarks profile_identity")
    parser.add_argument("--weights", required=True, help="an export of an animator")
    parser.add_argument("--data", required=True, help="a dataset of `dexportrait render`")
    parser.add_argument("--recogniser", default="../shared/data/models")
    parser.add_argument("--people", type=int, default=24)
    parser.add_argument("--yaw", type=float, default=35.0)
    parser.add_argument("--steps", type=int, default=35, help="N of method 7.2")
    parser.add_argument("--guidance", type=float, default=2.5, help="w of method 7.2")
    parser.add_argument("--hybrid_steps", type=int, default=5, help="S of method 7.2, beside S = 0")
    given = parser.parse_args(arguments)
    print(json.dumps(measure(given), indent=2))


def samplings(given: argparse.Namespace) -> dict[str, Sampling]:
    """Those that are compared: they differ in S alone. UserError where that is no comparison."""
    if given.hybrid_steps < 1:
        raise UserError(
            f"--hybrid_steps={given.hybrid_steps} is compared with S = 0; give 1 or more"
        )
    return {
        f"S = {hold}": Sampling(steps=given.steps, guidance=given.guidance, hybrid_steps=hold)
        for hold in (0, given.hybrid_steps)
    }


def measure(given: argparse.Namespace) -> dict[str, float]:
    """Mean identity and PSNR for both S, the identity of other people, and how it was sampled.

    UserError where the data has not two people who are seen both turned and from the front, or 2 S is more than the
    steps.
    """
    model, clips = load_model(given.weights), open_clips(given.data, "validation")
    recognise = mobileface.load(given.recogniser)
    compared = samplings(given)
    for sampling in compared.values():
        model.settings(sampling)
    runners = {name: Runner(model, sampling, FRAMES) for name, sampling in compared.items()}
    sources, drivers = _turned(clips, given.yaw), _turned(clips, -FRONTAL)
    people = [person for person in sources if person in drivers][: given.people]
    found: dict[str, list[np.ndarray]] = {}
    truths = []
    if len(people) < 2:
        raise UserError(
            f"{given.data}: {len(people)} people of its validation split have both a frame turned by {given.yaw:g} "
            f"degrees or more and one within {FRONTAL:g}; two are needed: render more heads, or lower --yaw"
        )
    for place, person in enumerate(people):
        number, frames = sources[person]
        portrait = clips[number].part(frames[0], frames[0] + 1)
        number, frames = drivers[people[(place + 1) % len(people)]]
        driver, frames = clips[number], frames[:FRAMES]
        wanted = synthetic.truth_of(driver)
        drawn = _identity.drawn(
            synthetic.truth_of(portrait),
            wanted.pose[frames],
            wanted.expression[frames],
            model.image_size,
        )
        true = np.stack([one.image for one in drawn])
        truths.append(_identity.vectors(recognise, true, drawn))
        for name, runner in runners.items():
            made = runner.make(portrait, (driver, frames), (driver, frames))
            cosine = (_identity.vectors(recognise, made, drawn) * truths[-1]).sum(-1)
            found.setdefault(f"identity, {name}", []).append(cosine)
            found.setdefault(f"PSNR, {name}", []).append(in_batches(metrics.psnr, made, true))
    others = [
        (one[: len(other)] * other[: len(one)]).sum(-1)
        for one, other in zip(truths, truths[1:], strict=False)
    ]
    values = {name: float(np.mean(np.concatenate(parts))) for name, parts in found.items()}
    return {
        "people": len(people),
        "steps": given.steps,
        "guidance": given.guidance,
        "hybrid_steps": given.hybrid_steps,
        **{name: round(value, 3) for name, value in values.items()},
        "identity of another person": round(float(np.mean(np.concatenate(others))), 3),
    }


def _turned(clips, yaw: float) -> dict[str, tuple[int, np.ndarray]]:
    """Person -> (clip, its frames) with at least ``yaw`` degrees, or at most -``yaw`` where that is negative."""
    chosen: dict[str, tuple[int, np.ndarray]] = {}
    for number, person in enumerate(clips.index["identity"]):
        if person not in chosen:
            angles = np.abs(pose_angles(synthetic.truth_of(clips[number]).pose)[:, 1])
            frames = np.flatnonzero(angles >= yaw if yaw > 0 else angles <= -yaw)
            if len(frames):
                chosen[person] = number, frames
    return chosen
