"""The flags of every job of the command line but `animate`, whose are in `animate_flags.py`.

The flags of a job are the keyword arguments of its function. Nothing heavy is imported.
"""

from __future__ import annotations

import argparse

from dexportrait_jax.weights.kinds import ALIASES, KINDS


def flag(parser: argparse.ArgumentParser, name: str, help: str, **options) -> None:
    parser.add_argument(f"--{name}", help=help, **options)


def seed(text: str) -> int:
    """A whole number from 0, which is what random generators take."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0")
    return int(text)


def demo(parser: argparse.ArgumentParser) -> None:
    flag(parser, "workdir", "where everything goes (default: %(default)s)", default="runs/demo")


def assets(parser: argparse.ArgumentParser) -> None:
    flag(parser, "fetch", "fetch what is not here yet", action="store_true")


def prepare(parser: argparse.ArgumentParser) -> None:
    flag(parser, "videos", "files to read, as a glob pattern in quotes", required=True)
    flag(parser, "out", "directory of the new dataset", required=True)
    flag(
        parser,
        "size",
        "side of the square frames in pixels (default: %(default)s)",
        type=int,
        default=512,
    )
    flag(
        parser,
        "face_scale",
        "side of the crop in faces, chin to brow; heads that move widen it (default: 2.15)",
        type=float,
        default=None,
    )
    flag(
        parser,
        "holdout",
        "what validation keeps: some people, or the end of every clip (default: %(default)s)",
        choices=("identity", "time"),
        default="identity",
    )
    flag(
        parser, "holdout_fraction", "how much of it (default: %(default)s)", type=float, default=0.1
    )
    flag(
        parser,
        "holdout_gap",
        "frames left out between training and validation, with --holdout=time (default: %(default)s)",
        type=int,
        default=5,
    )
    flag(
        parser,
        "holdout_people",
        "names of the people that validation keeps, separated by commas (default: chosen by a hash of "
        "their name); without --identity a person's name is the file's, without its ending",
        default=None,
    )
    flag(
        parser,
        "identity",
        "whose video it is: a regular expression searched in each path, with groups named identity, "
        "session and camera, such as '(?P<identity>id[0-9]+)/'; a session without an identity is a person "
        "(default: each name of a file is a person, in whatever folders)",
        default=None,
    )
    flag(
        parser, "max_frames", "frames to read of each video (default: all)", type=int, default=None
    )
    flag(parser, "workers", "processes (default: one a core)", type=int, default=None)
    flag(parser, "overwrite", "replace a dataset that is there", action="store_true")


def render(parser: argparse.ArgumentParser) -> None:
    flag(parser, "out", "directory of the new dataset", required=True)
    for name, default, help in (
        ("identities", 100, "people"),
        ("clips", 1, "sessions of each person"),
        ("frames", 50, "frames of a clip"),
        ("cameras", 1, "cameras that watch each session"),
        ("size", 256, "side of the square frames in pixels"),
    ):
        flag(parser, name, f"{help} (default: %(default)s)", type=int, default=default)
    flag(parser, "fps", "frames per second (default: %(default)s)", type=float, default=25.0)
    flag(
        parser,
        "seed",
        "another seed, other people (default: %(default)s)",
        type=seed,
        default=0,
    )
    flag(
        parser,
        "holdout_fraction",
        "part of the people that validation keeps (default: %(default)s)",
        type=float,
        default=0.1,
    )
    flag(
        parser,
        "face_scale",
        "side of the crop in faces, chin to brow, as of prepare (default: %(default)s)",
        type=float,
        default=2.15,
    )
    flag(parser, "workers", "processes (default: one a core)", type=int, default=None)
    flag(parser, "overwrite", "replace a dataset that is there", action="store_true")


def measure(parser: argparse.ArgumentParser) -> None:
    flag(parser, "data", "a dataset prepared by an older version", required=True)


def encode(parser: argparse.ArgumentParser) -> None:
    flag(parser, "weights", "an export that holds the autoencoder", required=True)
    flag(parser, "data", "a prepared dataset", required=True)
    flag(parser, "out", "directory of the latents", required=True)
    flag(
        parser,
        "size",
        "side of the pictures in pixels, data.image_size of the animator (default: %(default)s)",
        type=int,
        default=512,
    )
    flag(parser, "split", "which part of the dataset (default: %(default)s)", default="train")
    flag(
        parser,
        "dtype",
        "how latents are stored (default: %(default)s)",
        choices=("float16", "float32"),
        default="float16",
    )
    flag(
        parser,
        "compute",
        "what the autoencoder computes in; bfloat16 is what `full` trains in (default: %(default)s)",
        choices=("float32", "bfloat16"),
        default="float32",
    )
    flag(
        parser,
        "flips",
        "mirrored pictures too, so that training can flip; twice the work and space",
        action="store_true",
    )
    flag(
        parser,
        "batch_size",
        "pictures that a device encodes at once (default: %(default)s)",
        type=int,
        default=8,
    )
    flag(parser, "overwrite", "replace latents that are there", action="store_true")


def inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="a dataset, its latents, a run, export, video or config")
    flag(parser, "out", "where to write a contact sheet (PNG), for datasets", default=None)


def train(parser: argparse.ArgumentParser) -> None:
    flag(
        parser,
        "config",
        "config file and variant, such as configs/motion.py:tiny, or configs/motion.py:full@v5e:16x16 for such a slice",
        required=True,
    )
    flag(parser, "workdir", "the run's directory; an existing run goes on", required=True)
    flag(
        parser,
        "distributed",
        "join other processes (default: %(default)s, if the environment names them)",
        choices=("auto", "on", "off"),
        default="auto",
    )


def plan(parser: argparse.ArgumentParser) -> None:
    flag(
        parser,
        "config",
        "configs/FILE.py:VARIANT, or configs/FILE.py:VARIANT@TOPOLOGY with the mesh for these chips",
        required=True,
    )
    flag(
        parser,
        "topology",
        "kind and grid of the chips, as v5e:16x16 or v5p:4x4x4 (default: the config's)",
        default=None,
    )
    flag(
        parser,
        "job",
        "what is planned: a step of train, or a clip of animate, on one chip (default: %(default)s)",
        choices=("train", "animate"),
        default="train",
    )
    flag(parser, "slices", "of that grid (default: the config's, or 1)", type=int, default=None)
    flag(
        parser,
        "effort",
        "of the compiler: quick is four times as fast, some per cent off in what it needs, says too much of what goes "
        "to and from memory, and goes without programs of under 1%% of the steps (default: %(default)s)",
        choices=("quick", "exact"),
        default="quick",
    )
    parser.add_argument("--json", dest="json_file", help="file to write the whole plan to")
    flag(parser, "again", "compile once more what was planned before", action="store_true")


def evaluate(parser: argparse.ArgumentParser) -> None:
    flag(parser, "weights", "an exported model", required=True)
    flag(parser, "data", "a prepared dataset", required=True)
    flag(
        parser,
        "protocol",
        "what to measure; cross and disentangled say how pose and expression follow, not whether the source's identity "
        "is kept, which is not measured on real clips",
        choices=("self", "cross", "disentangled", "synthetic", "flicker"),
        required=True,
    )
    flag(parser, "out", "directory for metrics.json and pictures", required=True)
    flag(parser, "split", "which part of the dataset (default: %(default)s)", default="validation")
    flag(
        parser,
        "max_frames",
        "frames a clip; of the video stage at least one run of its length, data.frames, where the clip has them "
        "(default: %(default)s)",
        type=int,
        default=16,
    )
    flag(
        parser,
        "max_people",
        "people, the first of the split (default: all)",
        type=int,
        default=None,
    )
    flag(
        parser,
        "beside",
        "for flicker: another export, such as that of the image stage, on the same frames",
        default=None,
    )
    flag(parser, "seed", "of the noise (default: %(default)s)", type=seed, default=0)
    flag(parser, "steps", "denoising steps (default: the config's)", type=int, default=None)
    flag(parser, "overwrite", "replace results that are there", action="store_true")


def import_(parser: argparse.ArgumentParser) -> None:
    known = [f"{name}: {kind.summary}" for name, kind in KINDS.items()]
    known += [f"{name}: the same as {kind}" for name, kind in ALIASES.items()]
    flag(parser, "kind", "; ".join(known), choices=(*KINDS, *ALIASES), required=True)
    flag(
        parser,
        "source",
        "a safetensors file, or a folder of them as transformers lays it out",
        required=True,
    )
    flag(parser, "out", "directory of the new export", required=True)
    flag(parser, "overwrite", "replace an export that is there", action="store_true")


def export(parser: argparse.ArgumentParser) -> None:
    flag(parser, "workdir", "a training run", required=True)
    flag(parser, "out", "directory of the exported model", required=True)
    flag(parser, "overwrite", "replace an export that is there", action="store_true")
