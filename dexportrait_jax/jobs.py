"""The jobs of the command line, in one table: what each is for, an example, its flags and its function.

The flags of a job are the keyword arguments of its function. Imports nothing heavy: functions are named, and
imported by `cli.py` when their job runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

from dexportrait_jax import choices
from dexportrait_jax.weights.kinds import ALIASES, KINDS


class Job(NamedTuple):
    """One job: what it is for, an example, its flags, where its function lives, and what it sets in the environment."""

    summary: str
    example: str
    flags: Callable[[argparse.ArgumentParser], None]
    function: str  # "module:function"; imported only when the job runs
    takes_config: bool = False
    environment: tuple[tuple[str, str], ...] = ()  # before anything heavy is imported


def _flag(parser: argparse.ArgumentParser, name: str, help: str, **options) -> None:
    parser.add_argument(f"--{name}", help=help, **options)


def _seed(text: str) -> int:
    """A whole number from 0, which is what random generators take."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0")
    return int(text)


def _demo(parser):
    _flag(parser, "workdir", "where everything goes (default: %(default)s)", default="runs/demo")


def _assets(parser):
    _flag(parser, "fetch", "fetch what is not here yet", action="store_true")


def _prepare(parser):
    _flag(parser, "videos", "files to read, as a glob pattern in quotes", required=True)
    _flag(parser, "out", "directory of the new dataset", required=True)
    _flag(
        parser,
        "size",
        "side of the square frames in pixels (default: %(default)s)",
        type=int,
        default=512,
    )
    _flag(
        parser,
        "face_scale",
        "side of the crop in faces, chin to brow; heads that move widen it (default: 2.15)",
        type=float,
        default=None,
    )
    _flag(
        parser,
        "holdout",
        "what validation keeps: some people, or the end of every clip (default: %(default)s)",
        choices=("identity", "time"),
        default="identity",
    )
    _flag(
        parser, "holdout_fraction", "how much of it (default: %(default)s)", type=float, default=0.1
    )
    _flag(
        parser,
        "holdout_gap",
        "frames left out between training and validation, with --holdout=time (default: %(default)s)",
        type=int,
        default=5,
    )
    _flag(
        parser,
        "holdout_people",
        "names of the people that validation keeps, separated by commas (default: chosen by a hash of "
        "their name); without --identity a person's name is the file's, without its ending",
        default=None,
    )
    _flag(
        parser,
        "identity",
        "whose video it is: a regular expression searched in each path, with groups named identity, "
        "session and camera, such as '(?P<identity>id[0-9]+)/' (default: each video is a person)",
        default=None,
    )
    _flag(
        parser, "max_frames", "frames to read of each video (default: all)", type=int, default=None
    )
    _flag(parser, "workers", "processes (default: one a core)", type=int, default=None)
    _flag(parser, "overwrite", "replace a dataset that is there", action="store_true")


def _render(parser):
    _flag(parser, "out", "directory of the new dataset", required=True)
    for name, default, help in (
        ("identities", 100, "people"),
        ("clips", 1, "sessions of each person"),
        ("frames", 50, "frames of a clip"),
        ("cameras", 1, "cameras that watch each session"),
        ("size", 256, "side of the square frames in pixels"),
    ):
        _flag(parser, name, f"{help} (default: %(default)s)", type=int, default=default)
    _flag(parser, "fps", "frames per second (default: %(default)s)", type=float, default=25.0)
    _flag(
        parser,
        "seed",
        "another seed, other people (default: %(default)s)",
        type=_seed,
        default=0,
    )
    _flag(
        parser,
        "holdout_fraction",
        "part of the people that validation keeps (default: %(default)s)",
        type=float,
        default=0.1,
    )
    _flag(parser, "workers", "processes (default: one a core)", type=int, default=None)
    _flag(parser, "overwrite", "replace a dataset that is there", action="store_true")


def _measure(parser):
    _flag(parser, "data", "a dataset prepared by an older version", required=True)


def _encode(parser):
    _flag(parser, "weights", "an export that holds the autoencoder", required=True)
    _flag(parser, "data", "a prepared dataset", required=True)
    _flag(parser, "out", "directory of the latents", required=True)
    _flag(
        parser,
        "size",
        "side of the pictures in pixels, data.image_size of the animator (default: %(default)s)",
        type=int,
        default=512,
    )
    _flag(parser, "split", "which part of the dataset (default: %(default)s)", default="train")
    _flag(
        parser,
        "dtype",
        "how latents are stored (default: %(default)s)",
        choices=("float16", "float32"),
        default="float16",
    )
    _flag(
        parser,
        "compute",
        "what the autoencoder computes in; bfloat16 is what `full` trains in (default: %(default)s)",
        choices=("float32", "bfloat16"),
        default="float32",
    )
    _flag(
        parser,
        "flips",
        "mirrored pictures too, so that training can flip; twice the work and space",
        action="store_true",
    )
    _flag(
        parser,
        "batch_size",
        "pictures that a device encodes at once (default: %(default)s)",
        type=int,
        default=8,
    )
    _flag(parser, "overwrite", "replace latents that are there", action="store_true")


def _inspect(parser):
    parser.add_argument("path", help="a dataset, its latents, a run, export, video or config")
    _flag(parser, "out", "where to write a contact sheet (PNG), for datasets", default=None)


def _train(parser):
    _flag(
        parser,
        "config",
        "config file and variant, such as configs/motion.py:tiny, or configs/motion.py:full@v5e:16x16 for such a slice",
        required=True,
    )
    _flag(parser, "workdir", "the run's directory; an existing run goes on", required=True)
    _flag(
        parser,
        "distributed",
        "join other processes (default: %(default)s, if the environment names them)",
        choices=("auto", "on", "off"),
        default="auto",
    )


def _plan(parser):
    _flag(
        parser,
        "config",
        "configs/FILE.py:VARIANT, or configs/FILE.py:VARIANT@TOPOLOGY with the mesh for these chips",
        required=True,
    )
    _flag(
        parser,
        "topology",
        "kind and grid of the chips, as v5e:16x16 or v5p:4x4x4 (default: the config's)",
        default=None,
    )
    _flag(
        parser,
        "job",
        "what is planned: a step of train, or a clip of animate, on one chip (default: %(default)s)",
        choices=("train", "animate"),
        default="train",
    )
    _flag(parser, "slices", "of that grid (default: the config's, or 1)", type=int, default=None)
    _flag(
        parser,
        "effort",
        "of the compiler: quick is four times as fast and some per cent off (default: %(default)s)",
        choices=("quick", "exact"),
        default="quick",
    )
    parser.add_argument("--json", dest="json_file", help="file to write the whole plan to")
    _flag(parser, "again", "compile once more what was planned before", action="store_true")


def _animate(parser):
    _flag(parser, "weights", "an exported model", required=True)
    _flag(
        parser,
        "source",
        "the portrait: an image, or a video whose first frame is taken",
        default=None,
    )
    _flag(parser, "out", "the video to write, .mp4", default=None)
    _flag(
        parser,
        "jobs",
        "several videos at once: a JSON list of objects of these flags",
        default=None,
    )
    _flag(parser, "driving", "video that gives both pose and expression", default=None)
    _flag(
        parser,
        "pose",
        "video, image or JSON such as '{\"yaw\":20}' that gives the pose alone",
        default=None,
    )
    _flag(parser, "expression", "video or image that gives the expression alone", default=None)
    _flag(
        parser,
        "relative_pose",
        "add the driver's motion to the source's pose: all, or a comma-separated "
        "choice of rotation,translation,scale",
        nargs="?",
        const="all",
        default="",
    )
    _flag(
        parser,
        "relative_expression",
        "add the driver's change of expression, from its first frame, to the source's own",
        action="store_true",
    )
    _flag(
        parser,
        "smooth",
        "smoothing of the driven pose (default: %(default)s)",
        choices=choices.ANIMATE["smooth"],
        default="none",
    )
    _flag(
        parser,
        "smooth_strength",
        "how much: times gaussian's sigma of 1.5 frames or kalman's variance of the observation, 3e-7, or dividing "
        "one_euro's cut-off of 1.5 Hz; above 1 is smoother (default: 1)",
        type=float,
        default=None,
    )
    _flag(
        parser,
        "length",
        "when pose and expression drivers differ in length: end with the shortest, or hold "
        "the last frame (default: %(default)s)",
        choices=choices.ANIMATE["length"],
        default="shortest",
    )
    _flag(parser, "paste_back", "paste the face into the full source picture", action="store_true")
    _flag(
        parser,
        "paste_mask",
        "what of the result --paste_back shows: the face, or the whole crop (default: face)",
        choices=choices.ANIMATE["paste_mask"],
        default=None,
    )
    for name, help in (
        ("paste_dilation", "how far the mask reaches beyond the face (default: 0.05)"),
        ("paste_feather", "sigma of the blur of the mask's edge (default: 0.03)"),
        (
            "paste_border",
            "how far from the crop's edge the mask is full (default: 0.04 for the face, 0.1 for the crop)",
        ),
    ):
        _flag(parser, name, f"{help}; part of the crop's side", type=float, default=None)
    _flag(
        parser,
        "side_by_side",
        "also write source, drivers and result beside each other to this .mp4",
        default=None,
    )
    _flag(
        parser,
        "seed",
        "of the noise; same seed, same video (default: %(default)s)",
        type=_seed,
        default=0,
    )
    _flag(parser, "steps", "denoising steps (default: the config's)", type=int, default=None)
    _flag(parser, "guidance", "guidance scale (default: the config's)", type=float, default=None)
    _flag(
        parser,
        "hybrid_steps",
        "steps S of the progressive guidance (default: the config's)",
        type=int,
        default=None,
    )
    for name, help in (
        ("reading", "how the guidance with and without expression are mixed"),
        ("expression_null", "what 'without expression' means"),
        ("null_reference", "the reference's tokens in the unconditional branch"),
        ("null_pose", "the pose in the unconditional branch"),
        ("start", "what sampling starts from: noise, or the blurred source with noise"),
        (
            "window_offset",
            "where the windows of a long video lie: random is elsewhere in every step",
        ),
        (
            "window_ends",
            "whether a long video's end goes on with its beginning (closed), as for a loop",
        ),
        ("window_weights", "weights of a window's frames where windows are averaged"),
    ):
        _flag(
            parser,
            name,
            f"{help} (default: the config's)",
            choices=choices.ANIMATE[name],
            default=None,
        )
    _flag(
        parser,
        "overlap",
        "frames that two windows of a long video share (default: the config's)",
        type=int,
        default=None,
    )
    _flag(
        parser,
        "expression_guidance",
        "scale of the expression with --reading=three_scale (default: --guidance)",
        type=float,
        default=None,
    )
    _flag(
        parser,
        "eta",
        "noise added in every step: 0 none, 1 as much as DDPM (default: the config's)",
        type=float,
        default=None,
    )
    _flag(
        parser,
        "max_frames",
        "frames to make (default: all of the driver's)",
        type=int,
        default=None,
    )
    _flag(parser, "overwrite", "replace a video that is there", action="store_true")


def _evaluate(parser):
    _flag(parser, "weights", "an exported model", required=True)
    _flag(parser, "data", "a prepared dataset", required=True)
    _flag(
        parser,
        "protocol",
        "what to measure",
        choices=("self", "cross", "disentangled", "synthetic", "flicker"),
        required=True,
    )
    _flag(parser, "out", "directory for metrics.json and pictures", required=True)
    _flag(parser, "split", "which part of the dataset (default: %(default)s)", default="validation")
    _flag(parser, "max_frames", "frames a clip (default: %(default)s)", type=int, default=16)
    _flag(
        parser,
        "max_people",
        "people, the first of the split (default: all)",
        type=int,
        default=None,
    )
    _flag(
        parser,
        "beside",
        "for flicker: another export, such as that of the image stage, on the same frames",
        default=None,
    )
    _flag(parser, "seed", "of the noise (default: %(default)s)", type=_seed, default=0)
    _flag(parser, "steps", "denoising steps (default: the config's)", type=int, default=None)
    _flag(parser, "overwrite", "replace results that are there", action="store_true")


def _import(parser):
    known = [f"{name}: {kind.summary}" for name, kind in KINDS.items()]
    known += [f"{name}: the same as {kind}" for name, kind in ALIASES.items()]
    _flag(parser, "kind", "; ".join(known), choices=(*KINDS, *ALIASES), required=True)
    _flag(
        parser,
        "source",
        "a safetensors file, or a folder of them as transformers lays it out",
        required=True,
    )
    _flag(parser, "out", "directory of the new export", required=True)
    _flag(parser, "overwrite", "replace an export that is there", action="store_true")


def _export(parser):
    _flag(parser, "workdir", "a training run", required=True)
    _flag(parser, "out", "directory of the exported model", required=True)
    _flag(parser, "overwrite", "replace an export that is there", action="store_true")


JOBS = {
    "demo": Job(
        "the whole day in miniature; ends in report.html",
        "dexportrait demo",
        _demo,
        "dexportrait_jax.demo:run_demo",
    ),
    "assets": Job(
        "inputs and weights by hash, and where they may come from",
        "dexportrait assets --fetch",
        _assets,
        "dexportrait_jax.assets:run_assets",
    ),
    "prepare": Job(
        "face videos -> dataset, with a report of what was dropped",
        "dexportrait prepare --videos='videos/*.mp4' --out=data/faces --size=512",
        _prepare,
        "data_pipelines.prepare.job:run_prepare",
    ),
    "render": Job(
        "rendered heads -> dataset, whose identity, expression and pose are known exactly",
        "dexportrait render --out=data/heads --identities=200 --frames=24 --size=64",
        _render,
        "data_pipelines.synthetic.dataset:run_render",
    ),
    "measure": Job(
        "stores how much backgrounds move beside an older dataset, for the video stage",
        "dexportrait measure --data=data/faces",
        _measure,
        "data_pipelines.measure:run_measure",
    ),
    "encode": Job(
        "a dataset's latents, so that the animator need not encode its pictures in every step",
        "dexportrait encode --weights=exports/autoencoder --data=data/faces --out=data/faces-latents",
        _encode,
        "dexportrait_jax.encode:run_encode",
    ),
    "inspect": Job(
        "a dataset, run, export, video or config, said in words and pictures",
        "dexportrait inspect data/faces",
        _inspect,
        "dexportrait_jax.inspection:run_inspect",
    ),
    "train": Job(
        "one stage; every config key can be set with --config.KEY=VALUE",
        "dexportrait train --config=configs/motion.py:tiny --workdir=runs/motion --config.num_steps=500",
        _train,
        "dexportrait_jax.train:run_train",
        True,
    ),
    "plan": Job(
        "does a config fit on TPUs that are not here, what bounds it, how fast can it be; compiled, not run",
        "dexportrait plan --config=configs/animator_image.py:full@v5e:4x4 --json=plan.json",
        _plan,
        "dexportrait_jax.plan:run_plan",
        True,
        # The host compiles and its own devices, if any, are left alone. libtpu looks for a TPU host around it, which
        # takes a while on others, and says on standard error that there is none, unless it is told of one.
        (
            ("JAX_PLATFORMS", "cpu"),
            ("TPU_SKIP_MDS_QUERY", "1"),
            ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
            ("TPU_WORKER_HOSTNAMES", "localhost"),
            ("TPU_ACCELERATOR_TYPE", "v5litepod-1"),
        ),
    ),
    "animate": Job(
        "a portrait and drivers -> video",
        "dexportrait animate --weights=exports/video --source=me.jpg --pose=a.mp4 "
        "--expression=b.mp4 --out=result.mp4",
        _animate,
        "dexportrait_jax.animate:run_animate",
    ),
    "evaluate": Job(
        "figures and pictures on held-out data",
        "dexportrait evaluate --weights=exports/video --data=data/faces --protocol=self --out=results",
        _evaluate,
        "dexportrait_jax.evaluation.protocols:run_evaluate",
    ),
    "import": Job(
        "published weights -> an export that training starts from",
        "dexportrait import --kind=convnextv2 --source=convnextv2-tiny.safetensors --out=exports/trunk",
        _import,
        "dexportrait_jax.weights.published:run_import",
    ),
    "export": Job(
        "a run's weights as safetensors, in PyTorch's names and layout",
        "dexportrait export --workdir=runs/video --out=exports/video",
        _export,
        "dexportrait_jax.weights.exporting:run_export",
    ),
}
