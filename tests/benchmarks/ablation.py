"""What the augmentations are for: the motion trainer with and without them on rendered heads (the paper's Table 2).

    dexportrait render --out=data/heads --identities=1500 --frames=8 --cameras=2 --size=128 --fps=1.2
    python -m tests.benchmarks ablation --data=data/heads --out=runs/ablation [--seeds=3] [--steps=3000]
        [--pretraining=1500] [--variants=full,neither]

Every run has the same steps, data and people, and goes through the command line: train, export, evaluate
--protocol=synthetic. What is done is not done again, so a broken-off benchmark goes on where it was. Prints a table
for the README: mean over the seeds, and the deviation of a single one.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

_POSE = ("pose_mask.applied=False", "pose_colour.probability=0.0")
_EXPRESSION = (
    "expression_crop.applied=False",
    "expression_crop.gray=False",
    "expression_crop.face_alone=False",
    "expression_crop.even_light=False",
    "expression_rotation.probability=0.0",
    "view_change.probability=0.0",
    "expression_colour.probability=0.0",
    "expression_affine.probability=0.0",
)
# The second view of an instant is a change of view too.
_ALONE = ("data.second_expression=False",)


def _augment(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"data.augment.{name}" for name in names)


VARIANTS = {
    "full": (),
    "without pose augmentation": _augment(_POSE),
    "without expression augmentation": (*_augment(_EXPRESSION), *_ALONE),
    "neither": (*_augment(_POSE + _EXPRESSION), *_ALONE),
}
# Column title -> (key of metrics.json, digits). Every leak stands beside what the latent is for.
COLUMNS = {
    "pose error, degrees": ("pose_error_degrees", 1),
    "expression R2": ("expression_r2", 2),
    "pose leak R2": ("pose_leak_r2", 2),
    "placement leak R2": ("placement_leak_r2", 2),
    "identity leak": ("identity_leak", 2),
    "expression in pose R2": ("expression_in_pose_r2", 2),
    "disentangled dB": ("disentangled_psnr", 2),
    "over the best baseline dB": ("disentangled_gain_db", 2),
    "use of the expression dB": ("expression_use_db", 2),
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="tests.benchmarks ablation")
    parser.add_argument("--data", required=True, help="a dataset of `dexportrait render`")
    parser.add_argument("--out", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--pretraining", type=int, default=1500, help="of the steps")
    parser.add_argument("--variants", default="full,neither", help=", ".join(VARIANTS))
    options = parser.parse_args(arguments)
    chosen = options.variants.split(",")
    unknown = set(chosen) - set(VARIANTS)
    if unknown:
        parser.error(
            f"there is no variant {', '.join(sorted(unknown))}, only {', '.join(VARIANTS)}"
        )
    found: dict[str, list[dict]] = {name: [] for name in chosen}
    # Seed by seed, so that a benchmark that is broken off has compared whole seeds.
    for seed in range(options.seeds):
        for name in chosen:
            found[name].append(_measured(options, name, seed))
            print(table(found), flush=True)


def _measured(options: argparse.Namespace, name: str, seed: int) -> dict:
    """metrics.json of one run, made where it is not there yet."""
    place = Path(options.out) / f"{name.replace(' ', '_')}-{seed}"
    written = place / "metrics" / "metrics.json"
    if not written.exists():
        overrides = (
            *VARIANTS[name],
            f"data.path={options.data}",
            f"seed={seed}",
            f"num_steps={options.steps}",
            f"pretraining.steps={options.pretraining}",
            "evaluate.at_end=False",
        )
        run, export = f"--workdir={place / 'run'}", place / "export"
        config = [f"--config.{override}" for override in overrides]
        _job("train", "--config=configs/motion.py:synthetic", run, *config)
        _job("export", run, f"--out={export}", "--overwrite")
        _job(
            "evaluate",
            f"--weights={export}",
            f"--data={options.data}",
            "--protocol=synthetic",
            f"--out={written.parent}",
        )
    return json.loads(written.read_text())


def _job(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dexportrait_jax", *arguments], check=True)


def table(found: dict[str, list[dict]]) -> str:
    """Markdown, one row a variant."""
    lines = [
        f"| {' | '.join(['', *COLUMNS])} |",
        f"|{'---|' * (len(COLUMNS) + 1)}",
    ]
    for name, results in found.items():
        if not results:
            continue
        cells = []
        for key, digits in COLUMNS.values():
            values = np.array([result[key] for result in results])
            spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.{digits}f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
