"""The flags of `dexportrait animate`; `animate_jobs.py` says which go together, and reads the same from a file.

Nothing heavy is imported.
"""

from __future__ import annotations

import argparse

from dexportrait_jax import choices
from dexportrait_jax.job_flags import flag, seed


def animate(parser: argparse.ArgumentParser) -> None:
    flag(parser, "weights", "an exported model", required=True)
    flag(
        parser,
        "source",
        "the portrait: an image, or a video, of which the first usable frame is taken; of one that drives as well, the "
        "first of the shot that drives",
        default=None,
    )
    flag(
        parser,
        "out",
        "the video to write, .mp4; its record lies beside it, .mp4.json",
        default=None,
    )
    flag(
        parser,
        "jobs",
        "several videos at once: a JSON list of objects of these flags, such as "
        '[{"source": "me.jpg", "pose": {"yaw": 20}, "out": "a.mp4"}]; --weights, and what they share, beside it',
        default=None,
    )
    flag(parser, "driving", "video that gives both pose and expression", default=None)
    flag(
        parser,
        "pose",
        "video, image or JSON such as '{\"yaw\":20}' that gives the pose alone",
        default=None,
    )
    flag(parser, "expression", "video or image that gives the expression alone", default=None)
    flag(
        parser,
        "relative_pose",
        "add the driver's motion to the source's pose: all, or a comma-separated "
        "choice of rotation,translation,scale",
        nargs="?",
        const="all",
        default="",
    )
    flag(
        parser,
        "relative_expression",
        "add the driver's change of expression to the source's own",
        action="store_true",
    )
    flag(
        parser,
        "resting_frame",
        "the driver's frame, counted from 0, that relative poses and expressions are changes from: one in which its "
        "head looks as the source's does (default: the first)",
        type=int,
        default=None,
    )
    flag(
        parser,
        "smooth",
        "smoothing of the driven pose (default: %(default)s)",
        choices=choices.ANIMATE["smooth"],
        default="none",
    )
    flag(
        parser,
        "smooth_strength",
        "how much: times gaussian's sigma of 1.5 frames or kalman's variance of the observation, 3e-7, or dividing "
        "one_euro's cut-off of 1.5 Hz; above 1 is smoother (default: 1)",
        type=float,
        default=None,
    )
    flag(
        parser,
        "length",
        "when pose and expression drivers differ in length: end with the shortest, or hold the last frame of the "
        "others to the end of the longest, or to the last typed keyframe (default: %(default)s)",
        choices=choices.ANIMATE["length"],
        default="shortest",
    )
    flag(parser, "paste_back", "paste the face into the full source picture", action="store_true")
    flag(
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
        flag(parser, name, f"{help}; part of the crop's side", type=float, default=None)
    flag(
        parser,
        "side_by_side",
        "also write source, drivers and result beside each other to this .mp4",
        default=None,
    )
    flag(
        parser,
        "seed",
        "of the noise; same seed, same video (default: %(default)s)",
        type=seed,
        default=0,
    )
    flag(parser, "steps", "denoising steps (default: the config's)", type=int, default=None)
    flag(parser, "guidance", "guidance scale (default: the config's)", type=float, default=None)
    flag(
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
        flag(
            parser,
            name,
            f"{help} (default: the config's)",
            choices=choices.ANIMATE[name],
            default=None,
        )
    flag(
        parser,
        "overlap",
        "frames that two windows of a long video share (default: the config's)",
        type=int,
        default=None,
    )
    flag(
        parser,
        "expression_guidance",
        "scale of the expression with --reading=three_scale (default: --guidance)",
        type=float,
        default=None,
    )
    flag(
        parser,
        "eta",
        "noise added in every step, from 0, none, to 1, as much as DDPM (default: the config's)",
        type=float,
        default=None,
    )
    flag(
        parser,
        "max_frames",
        "frames to make (default: all of the driver's; where nothing moves, up to the last typed keyframe, or 25)",
        type=int,
        default=None,
    )
    flag(
        parser,
        "overwrite",
        "replace a video that is there, and the .json beside it",
        action="store_true",
    )
