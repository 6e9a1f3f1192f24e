"""What ray map, warped reference and augmentation are for: the animator without each on rendered heads (Table 2).

    dexportrait render --out=data/heads --identities=1500 --frames=8 --cameras=2 --size=128 --fps=1.2 \\
        --holdout_fraction=0.05
    dexportrait encode --weights=exports/taef2 --data=data/heads --out=data/heads-latents --size=128
    python -m tests.benchmarks animator_ablation --data=data/heads --latents=data/heads-latents \\
        --autoencoder=exports/taef2 --motion=exports/heads --motion_without=runs/ablation/neither-0/export \\
        --out=runs/animator_ablation [--seeds=3] [--steps=1000] [--people=24] [--variants=...]

Every run has the same steps, data and people, and goes through the command line: train the image stage, export, and
evaluate: --protocol=cross and disentangled, where MediaPipe reads poses and expressions off the results, for the
columns of Table 2, and synthetic for the truth. CSIM is the cosine of source and result by the recogniser of
`../shared/data/models` (`_identity.py`). `without augmentation` has encoders that were trained without it;
`--motion_without`, and `--motion`, may name several exports, one a seed, with commas between them. What is done is
not done again. Prints a table for the README: mean over the seeds, and the deviation of a single one.
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
    parser.add_argument("--motion", required=True, help="exports of configs/motion.py:synthetic")
    parser.add_argument("--motion_without", required=True, help="trained without augmentation")
    parser.add_argument("--recogniser", default="../shared/data/models")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--people", type=int, default=24, help="held out, that are measured")
    given = parser.parse_args(arguments)
    encoders = {}
    for flag in ("motion", "motion_without"):
        named = encoders[flag] = getattr(given, flag).split(",")
        if len(named) not in (1, given.seeds):
            parser.error(
                f"--{flag} names {len(named)} exports: give one, or one a seed ({given.seeds})"
            )

    def measured(name: str, seed: int, place: Path) -> dict:
        exports = encoders["motion_without" if name == "without augmentation" else "motion"]
        overrides = (
            *VARIANTS[name],
            f"data.path={given.data}",
            f"data.latents={given.latents}",
            f"init.autoencoder={given.autoencoder}",
            f"init.motion={exports[seed % len(exports)]}",
            f"seed={seed}",
            f"num_steps={given.steps}",
        )
        export = _variants.train("configs/animator_image.py:minutes", place, overrides)
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
