"""What ray map, warped reference and augmentation are for: the animator without each on rendered heads (Table 2).

    dexportrait render --out=data/heads --identities=1500 --frames=8 --cameras=2 --size=128 --fps=1.2
    dexportrait encode --weights=exports/taef2 --data=data/heads --out=data/heads-latents --size=128
    python -m tests.benchmarks animator_ablation --data=data/heads --latents=data/heads-latents \\
        --autoencoder=exports/taef2 --motion=exports/heads --motion_without=runs/ablation/neither-0/export \\
        --out=runs/animator_ablation [--seeds=3] [--steps=1000] [--people=24] [--variants=...]

Every run has the same steps, data and people, and goes through the command line: train the image stage, export,
evaluate --protocol=synthetic, for the truth, and --protocol=disentangled, where MediaPipe reads poses and expressions
off the results. `without augmentation` has encoders that were trained without it. What is done is not done again.
Prints a table for the README: mean over the seeds, and the deviation of a single one.
"""

import argparse
from pathlib import Path

from tests.benchmarks import _variants, ablation

VARIANTS = {
    "full": (),
    "without ray map": ("model.denoiser.raymap=none",),
    "without warping": ("model.denoiser.warp_kernel=0",),
    "without augmentation": ablation.VARIANTS["neither"],
}
COLUMNS = {
    "disentangled dB": ("disentangled_psnr", 2),
    "APD, degrees": ("apd", 2),
    "AED": ("aed", 4),
    "faces found": ("faces_found", 2),
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
    parser.add_argument("--motion", required=True, help="an export of configs/motion.py:synthetic")
    parser.add_argument("--motion_without", required=True, help="one trained without augmentation")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--people", type=int, default=24, help="held out, that are measured")
    given = parser.parse_args(arguments)

    def measured(name: str, seed: int, place: Path) -> dict:
        without = name == "without augmentation"
        overrides = (
            *VARIANTS[name],
            f"data.path={given.data}",
            f"data.latents={given.latents}",
            f"init.autoencoder={given.autoencoder}",
            f"init.motion={given.motion_without if without else given.motion}",
            f"seed={seed}",
            f"num_steps={given.steps}",
        )
        export = _variants.train("configs/animator_image.py:minutes", place, overrides)
        people = f"--max_people={given.people}"
        found = _variants.evaluate(export, given.data, "synthetic", people)
        # Both protocols draw their items alike: the person, the next one's pose, the expression of the one after.
        return _variants.evaluate(export, given.data, "disentangled", people) | found

    _variants.compare(parser, given, VARIANTS, COLUMNS, measured)
