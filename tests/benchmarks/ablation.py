"""What the augmentations are for: the motion trainer with and without them on rendered heads (the paper's Table 2).

    dexportrait render --out=data/heads --identities=1500 --frames=8 --cameras=2 --size=128 --fps=1.2 \\
        --holdout_fraction=0.05
    python -m tests.benchmarks ablation --data=data/heads --out=runs/ablation [--seeds=3] [--steps=1200]
        [--regime=pictures] [--variants=full,neither]

Every run has the same steps, data and people, and goes through the command line: train, export, evaluate
--protocol=synthetic. What is done is not done again, so a broken-off benchmark goes on where it was, and two of them,
each with one of the variants, may run at once. Prints a table for the README: mean over the seeds, and the deviation of
a single one.

Regimes: `pictures` has the encoders learn from the pictures from the first step on, as the paper's do. `labels` is the
config `synthetic` as it stands: half of the steps pretrain the encoders on labels, which then hold them, so that an
encoder that could take more from what it sees hardly does.
"""

import argparse
from pathlib import Path

from tests.benchmarks import _variants

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
_ALONE = ("data.second_expression=False", "loss.invariance=0.0")


def _augment(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"data.augment.{name}" for name in names)


# The expression encoder at a tenth of the others' rate, as Muon's steps have one size, however little a gradient says:
# at the full rate the decoder, which cannot read a fresh latent, drives it to nothing. Of its labels only a tenth of
# the blendshapes' is left: with more it is held to them, whatever it sees.
_FROM_PICTURES = (
    "pretraining.steps=0",
    'optim.generator.multipliers=(("generator/decoder", 3.0), ("pose", 0.3), ("expression", 0.1))',
    "loss.blendshape_label.initial=2.0",
    "loss.blendshape_label.floor=2.0",
    "loss.landmark_label.initial=0.0",
    "loss.landmark_label.floor=0.0",
    # Two views of an instant that should agree are an augmentation of the loss, which the paper does not have.
    *_ALONE,
)
REGIMES = ("pictures", "labels")
WITHOUT_AUGMENTATION = _augment(_POSE + _EXPRESSION)
VARIANTS = {
    "full": (),
    "without pose augmentation": _augment(_POSE),
    "without expression augmentation": (*_augment(_EXPRESSION), *_ALONE),
    "neither": (*WITHOUT_AUGMENTATION, *_ALONE),
}
# Every leak stands beside what the latent is for.
COLUMNS = {
    "pose error, degrees": ("pose_error_degrees", 1),
    "expression R2": ("expression_r2", 2),
    "pose leak R2": ("pose_leak_r2", 2),
    "placement leak R2": ("placement_leak_r2", 2),
    "identity leak": ("identity_leak", 2),
    "expression in pose R2": ("expression_in_pose_r2", 2),
    "and in its error": ("expression_in_pose_error_r2", 2),
    "disentangled dB": ("disentangled_psnr", 2),
    "over the best baseline dB": ("disentangled_gain_db", 2),
    "use of the expression dB": ("expression_use_db", 2),
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="tests.benchmarks ablation")
    _variants.options(parser, VARIANTS, "full,neither")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--regime", choices=REGIMES, default="pictures")
    given = parser.parse_args(arguments)
    regime = {"pictures": _FROM_PICTURES, "labels": (f"pretraining.steps={given.steps // 2}",)}

    def measured(name: str, seed: int, place: Path) -> dict:
        overrides = (
            *regime[given.regime],
            *VARIANTS[name],
            f"data.path={given.data}",
            f"seed={seed}",
            f"num_steps={given.steps}",
            "evaluate.at_end=False",
        )
        export = _variants.train("configs/motion.py:synthetic", place, overrides)
        return _variants.evaluate(export, given.data, "synthetic")

    _variants.compare(parser, given, VARIANTS, COLUMNS, measured)
