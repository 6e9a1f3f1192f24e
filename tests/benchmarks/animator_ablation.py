"""What ray map, warped reference and augmentation are for: the animator without each on rendered heads (Table 2).

    dexportrait render --out=data/tight --identities=600 --frames=8 --cameras=2 --size=128 --fps=1.2 \\
        --holdout_fraction=0.05 --face_scale=1.6
    dexportrait train --config=configs/autoencoder.py:synthetic --workdir=runs/autoencoder \\
        --config.data.path=data/tight
    dexportrait export --workdir=runs/autoencoder --out=exports/autoencoder
    dexportrait encode --weights=exports/autoencoder --data=data/tight --out=data/tight-latents --size=64
    python -m tests.benchmarks animator_ablation --data=data/tight --latents=data/tight-latents \\
        --autoencoder=exports/autoencoder --out=runs/animator_ablation [--seeds=3] [--steps=1100] [--people=16]
        [--encoder_steps=1400] [--variants=...]

Every run has the same steps, data and people, and goes through the command line: train the image stage, export, and
evaluate: --protocol=cross and disentangled, where MediaPipe reads poses and expressions off the results, for the
columns of Table 2, and synthetic for the truth. CSIM is the cosine of source and result by the recogniser of
`../shared/data/models` (`_identity.py`). Pose and expression encoders are trained first, on the labels alone, once with
and once without augmentation, for all seeds. What is done is not done again; once there are encoders, two of these with
other variants may run at once. Prints a table for the README: mean over the seeds, and the deviation of a single one.
"""

import argparse
from pathlib import Path

from tests.benchmarks import _identity, _variants, ablation

VARIANTS = {
    "full": (),
    "without ray map": ("model.denoiser.raymap=none",),
    "without warping": ("model.denoiser.warp_kernel=0",),
    "without augmentation": ablation.WITHOUT_AUGMENTATION,
}
COLUMNS = {
    # Table 2's, in its order; its APD is in radians.
    "cross CSIM": ("cross_csim", 3),
    "cross AED": ("cross_aed", 4),
    "cross APD, degrees": ("cross_apd", 2),
    "dis. CSIM": ("csim", 3),
    "dis. AED": ("aed", 4),
    "dis. APD, degrees": ("apd", 2),
    # What its estimators can say at most, and the truth.
    "faces found": ("faces_found", 2),
    "dis. CSIM of the truth": ("csim_truth", 3),
    "disentangled dB": ("disentangled_psnr", 2),
    "pose alone: pose follows (1)": ("pose_only_follows_pose", 2),
    "and expression (0)": ("pose_only_follows_expression", 2),
    "expression alone: expression follows (1)": ("expression_only_follows_expression", 2),
    "and pose (0)": ("expression_only_follows_pose", 2),
    "use of the expression dB": ("expression_use_db", 2),
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="tests.benchmarks animator_ablation")
    _variants.options(parser, VARIANTS, ",".join(VARIANTS))
    parser.add_argument("--latents", required=True, help="of the data, by `dexportrait encode`")
    parser.add_argument("--autoencoder", required=True, help="that made them")
    parser.add_argument("--recogniser", default="../shared/data/models")
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--people", type=int, default=16, help="held out, that are measured")
    parser.add_argument("--encoder_steps", type=int, default=1400)
    given = parser.parse_args(arguments)

    def measured(name: str, seed: int, place: Path) -> dict:
        augmented = "neither" if name == "without augmentation" else "full"
        overrides = (
            *VARIANTS[name],
            f"data.path={given.data}",
            f"data.latents={given.latents}",
            f"init.autoencoder={given.autoencoder}",
            f"init.motion={_encoders(given, augmented)}",
            f"seed={seed}",
            f"num_steps={given.steps}",
        )
        export = _variants.train("configs/animator_image.py:synthetic", place, overrides)
        people = f"--max_people={given.people}"
        # All protocols draw their items alike: the person, the next one's pose, the expression of the one after.
        found = _variants.evaluate(export, given.data, "disentangled", people)
        found |= _variants.evaluate(export, given.data, "synthetic", people)
        crossed = _variants.evaluate(export, given.data, "cross", people)
        found |= {f"cross_{key}": crossed[key] for key in ("apd", "aed")}
        return found | _variants.kept(
            place / "identity.json",
            lambda: _identity.csim(export, given.data, given.people, given.recogniser),
        )

    _variants.compare(parser, given, VARIANTS, COLUMNS, measured)


def _encoders(given: argparse.Namespace, augmented: str) -> Path:
    """Export of pose and expression encoders that have seen labels, and no picture of a decoder."""
    overrides = (
        *ablation.VARIANTS[augmented],
        f"data.path={given.data}",
        f"num_steps={given.encoder_steps}",
        f"pretraining.steps={given.encoder_steps}",
        "evaluate.at_end=False",
    )
    place = Path(given.out) / f"encoders_{augmented}"
    return _variants.train("configs/motion.py:synthetic", place, overrides)
