"""The job `prepare`: face videos -> a dataset, with a verdict on every video.

What is done is kept in a hidden folder beside the result until the dataset is whole; the dataset
itself appears at once.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import glob
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipelines import dataset, dataset_files, files, records
from data_pipelines.prepare import clips as clip_making
from data_pipelines.prepare import crop, filters, processing, splits
from dexportrait_jax.errors import UserError

REPORT, MADE_WITH = "drop_report.json", "prepare.json"
BETWEEN = "between training and validation"  # why frames are left out, with holdout="time"
# Of the settings, what flags say; the other constants are the version's.
ASKED = ("size", "face_scale", "minimum_scale")
VERSION = "version"  # of the clips, in MADE_WITH; datasets made before it was written there lack it


def run_prepare(
    videos: str,
    out: str | os.PathLike,
    *,
    size: int = 512,
    face_scale: float | None = None,
    holdout: str = "identity",
    holdout_fraction: float = 0.1,
    holdout_gap: int = 5,
    holdout_people: str | None = None,
    max_frames: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    landmarker_path: str | os.PathLike | None = None,
    identity: str | None = None,
    settings: crop.Settings | None = None,
) -> None:
    """Makes a dataset of face videos.

    Args:
        videos: glob pattern (`**` for any depth); several ones separated by commas, where no file
            matches the whole.
        out: directory of the dataset.
        size: side of the stored frames in pixels.
        face_scale: side of the crop in face boxes, before the clip's movement widens it; None for
            that of `settings`. Below their `minimum_scale` it lowers that as well.
        holdout: what validation keeps: "identity", some people chosen by a hash of their name (or
            named, see `holdout_people`), or "time", the end of every clip, at the same times for all
            cameras of a session.
        holdout_fraction: how much of it.
        holdout_gap: frames left out between training and validation with holdout="time".
        holdout_people: names of the people of validation, separated by commas, in place of those
            that the hash chooses.
        max_frames: frames to read of each video; None for all.
        workers: processes; None for one a core.
        overwrite: replace a dataset that is there.
        landmarker_path: `face_landmarker.task`; None for the fetched asset.
        identity: regular expression searched in each path, with groups named identity, session and
            camera, of which it needs one of the first two: without an identity, a session is a person;
            without an expression, every name of a file, in whatever folders.
        settings: further constants of crop and filters; `size` and `face_scale` override theirs.

    Raises:
        UserError: no video matches, none can be used, or the result cannot be written.
    """
    paths = _matching(videos)
    _check_flags(size, face_scale, holdout, holdout_fraction, holdout_gap, max_frames, workers)
    namings = _namings(paths, identity)
    if not identity:
        _tell_one_name(paths, namings)
    people = _people(holdout_people, holdout, {naming.identity for naming in namings})
    settings = dataclasses.replace(settings or crop.Settings(), size=size)
    if face_scale is not None:
        settings = settings.scaled(face_scale)
    made_with = {
        "videos": {
            naming.name: processing.fingerprint(path)
            for path, naming in zip(paths, namings, strict=True)
        },
        "holdout": [holdout, holdout_fraction, holdout_gap, *people],
        "max_frames": max_frames,
        "identity": identity,
        "settings": dataclasses.asdict(settings),
        VERSION: processing.VERSION,
    }
    out = Path(out).absolute()
    if _finished(out, made_with, overwrite):
        return
    files.check_destination(out, "faces")
    model = _landmarker(landmarker_path)
    started = time.monotonic()
    written: collections.Counter[str] = collections.Counter()
    with files.work_folder(out) as work:
        jobs = [
            processing.Job(os.fspath(path), naming, settings, max_frames, work)
            for path, naming in zip(paths, namings, strict=True)
        ]
        verdicts = processing.process(jobs, os.fspath(model), workers or _cores(), _say)
        kept = [job for job, verdict in zip(jobs, verdicts, strict=True) if verdict.kept]
        if kept:
            _check_sides({job.naming.identity for job in kept}, people)
            from data_pipelines.prepare import builder  # needs TFDS, which reading does not

            parts = splits.split(
                [job.video() for job in kept], holdout, holdout_fraction, holdout_gap, people
            )
            builder.write_dataset(
                {name: _counted(clips, written) for name, clips in parts.items()},
                out,
                reports={
                    REPORT: lambda: _report(verdicts, written),
                    MADE_WITH: json.dumps(made_with, indent=1),
                },
                overwrite=True,
            )
        _say_funnel(_funnel(verdicts, written))
        shutil.rmtree(work, ignore_errors=True)
    if not kept:
        first = verdicts[0]
        raise UserError(
            f"none of {len(jobs)} video(s) can be used, such as {Path(first.source).name} "
            f"({first.reason}{first.detail}); give videos of one person whose face is in view"
        )
    _say(f"{out}: {_contents(out)}, made in {time.monotonic() - started:.0f} s")
    if holdout_fraction and len(dataset_files.split_names(out)) == 1:
        why = "there is one person" if holdout == "identity" else "every clip is too short for it"
        _say(f"nothing is held out for validation: {why}")


def _check_flags(
    size, face_scale, holdout, holdout_fraction, holdout_gap, max_frames, workers
) -> None:
    if holdout not in splits.HOLDOUTS:
        raise UserError(f"--holdout is '{holdout}'; it must be {' or '.join(splits.HOLDOUTS)}")
    if not 0 <= holdout_fraction < 1:
        raise UserError(f"--holdout_fraction is {holdout_fraction}; it must be 0 or more, below 1")
    if holdout_gap < 0:
        raise UserError(f"--holdout_gap is {holdout_gap}; it must be 0 or more frames")
    if not 16 <= size <= 4096:
        raise UserError(f"--size is {size}; it must lie between 16 and 4096 pixels")
    if face_scale is not None and not 1.2 <= face_scale <= 6:
        raise UserError(f"--face_scale is {face_scale}; it must lie between 1.2 and 6 faces")
    if max_frames is not None and max_frames < 1:
        raise UserError(f"--max_frames is {max_frames}; it must be at least 1")
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}; it must be at least 1")


def _people(names: str | None, holdout: str, identities: set[str]) -> list[str]:
    """The people that `--holdout_people` names, in alphabetical order."""
    listed = clip_making.printable(names or "").split(",")
    people = sorted({name.strip() for name in listed} - {""})
    if not people:
        return []
    if holdout != "identity":
        raise UserError(
            f"--holdout_people names people, but --holdout={holdout} keeps the end of every clip; leave one out"
        )
    for name in people:
        if name not in identities:
            close = difflib.get_close_matches(name, identities, n=1) or sorted(identities)[:5]
            raise UserError(
                f"--holdout_people: there is no video of '{name}' (but of {', '.join(close)})"
            )
    _check_sides(identities, people)
    return people


def _check_sides(identities: set[str], people: list[str]) -> None:
    """Raises UserError where the named people leave nobody for one of the two sides."""
    if people and not identities & set(people):
        raise UserError(f"no video of {', '.join(people)} can be used; name other --holdout_people")
    if people and not identities - set(people):
        raise UserError(
            "--holdout_people leaves nobody to train on; name fewer, or give more videos"
        )


def _matching(pattern: str) -> list[Path]:
    pattern = str(pattern)
    # The whole first: a folder may have a comma in its name.
    found = _glob(pattern) or {path for part in pattern.split(",") for path in _glob(part.strip())}
    if not found:
        raise UserError(
            f"no video matches {pattern}; put the pattern in quotes, such as --videos='clips/*.mp4'"
        )
    return sorted(found)


def _glob(pattern: str) -> set[Path]:
    home = os.path.expanduser(pattern)  # noqa: PTH111 - unlike Path's, leaves unknown users alone
    if os.path.isfile(home):  # noqa: PTH113 - a name with brackets; unlike Path's, takes any length
        return {Path(home)}
    matches = glob.glob(home, recursive=True)  # noqa: PTH207
    return {Path(path) for path in matches if Path(path).is_file()}


def _namings(paths: list[Path], pattern: str | None) -> list[clip_making.Naming]:
    """Keys of every video; names are stems, with the folder before them where two are alike."""
    try:
        expression = re.compile(pattern) if pattern else None
    except re.error as error:
        raise UserError(f"--identity is not a regular expression: {error}") from error
    if expression and not {"identity", "session"} & expression.groupindex.keys():
        # Else one person's videos would count as several people's, and be trained on and held out.
        raise UserError(
            f"--identity={pattern} has no group named identity or session; name what tells people apart, such as "
            "'(?P<identity>id[0-9]+)/'"
        )
    shown = [Path(clip_making.printable(path)) for path in paths]
    stems = collections.Counter(path.stem for path in shown)
    namings = []
    for real, path in zip(paths, shown, strict=True):
        name = path.stem
        if stems[name] > 1:
            whole = os.fspath(real.absolute())
            digest = hashlib.sha256(whole.encode(errors="surrogateescape")).hexdigest()[:6]
            name = f"{Path(clip_making.printable(whole)).parent.name}-{path.stem}-{digest}"
        groups: Mapping[str, str | None] = {}
        if expression:
            match = expression.search(os.fspath(path))
            if not match:
                raise UserError(f"--identity={pattern} does not match {path}; correct it")
            groups = match.groupdict()
        namings.append(
            clip_making.Naming(
                name=name,
                # The cameras of a session see one person.
                identity=groups.get("identity") or groups.get("session") or path.stem,
                session=groups.get("session") or name,
                camera=groups.get("camera") or "0",
            )
        )
    return namings


def _tell_one_name(paths: list[Path], namings: list[clip_making.Naming]) -> None:
    """Says that videos of one name are taken for one person's, who may be several: id1/0001.mp4 and id2/0001.mp4."""
    counts = collections.Counter(naming.identity for naming in namings)
    alike = sum(count for count in counts.values() if count > 1)
    if alike:
        name, count = counts.most_common(1)[0]
        first = next(
            path for path, naming in zip(paths, namings, strict=True) if naming.identity == name
        )
        _say(
            f"{alike} of {len(paths)} videos have the name of another, as {first} ({count} of '{name}'): videos of one "
            "name count as one person's. Where the folder tells people apart, give "
            r"--identity='(?P<identity>[^/]+)/[^/]+$'"
        )


def _finished(out: Path, made_with: dict[str, Any], overwrite: bool) -> bool:
    """Whether the very dataset is there already; UserError where anything else is that may not be replaced."""
    if not files.already_there(out, "a dataset", dataset_files.is_dataset) or overwrite:
        return False
    try:
        before = json.loads((out / MADE_WITH).read_text())
    except (OSError, ValueError):
        raise UserError(
            f"{out} is a dataset that `prepare` did not make, or whose {MADE_WITH} is damaged; "
            "choose another --out or pass --overwrite"
        ) from None
    older = before.get(VERSION) != made_with[VERSION]
    if older and isinstance(before.get("settings"), dict):
        before["settings"] |= {
            key: value for key, value in made_with["settings"].items() if key not in ASKED
        }
    changed = [
        key for key, value in made_with.items() if key != VERSION and before.get(key) != value
    ]
    if changed:
        raise UserError(
            f"{out} is a dataset made with other {', '.join(changed)}; "
            "choose another --out or pass --overwrite"
        )
    if older:
        made = f"version {before[VERSION]}" if VERSION in before else "an older version"
        _say(
            f"{out}: already prepared, {_contents(out)}, but by {made}, whose clips may differ from those of version "
            f"{made_with[VERSION]}; it is left as it is (--overwrite makes it anew)"
        )
        return True
    # Only here: of another version, it may be of a job with --overwrite that goes on.
    files.clear_work_folder(out)
    _say(f"{out}: already prepared, {_contents(out)}; nothing to do (--overwrite makes it anew)")
    return True


def _contents(out: Path) -> str:
    parts = []
    for split in dataset_files.split_names(out):
        frames = dataset.ClipDataset(out, split).frames
        parts.append(f"{split} {len(frames)} clips, {frames.sum()} frames")
    return "; ".join(parts)


def _landmarker(path: str | os.PathLike | None) -> Path:
    if path is None:
        from dexportrait_jax import assets

        path = assets.fetch("face_landmarker")
    if not Path(path).is_file():
        raise UserError(f"no face landmarker at {path}; `dexportrait assets --fetch` gets it")
    return Path(path)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _counted(clips: splits.Clips, written: collections.Counter[str]) -> splits.Clips:
    """The same clips, which are counted in `written` as they are taken."""

    def counted() -> Iterator[records.Clip]:
        for clip in clips():
            written.update(clips=1, frames=len(clip))
            yield clip

    return counted


def _report(verdicts: list[filters.Verdict], written: collections.Counter[str]) -> str:
    videos = [verdict.as_dict() for verdict in verdicts]
    return json.dumps({"funnel": _funnel(verdicts, written), "videos": videos}, indent=1)


def _funnel(verdicts: list[filters.Verdict], written: collections.Counter[str]) -> dict[str, Any]:
    """What became of all videos and frames; `written` are the clips and frames of the dataset."""
    reasons = collections.Counter(verdict.reason for verdict in verdicts if not verdict.kept)
    kept = [verdict for verdict in verdicts if verdict.kept]
    lost: collections.Counter[str] = collections.Counter()
    for verdict in kept:
        lost.update(verdict.dropped_frames)
    between = sum(verdict.kept_frames for verdict in kept) - written["frames"]
    if between:
        lost[BETWEEN] = between
    return {
        "videos": len(verdicts),
        "videos_kept": len(kept),
        "videos_dropped": dict(reasons.most_common()),
        "frames": sum(verdict.frames for verdict in kept),
        "frames_kept": written["frames"],
        "frames_dropped": dict(lost.most_common()),
        "clips": written["clips"],
        "cuts": sum(verdict.cuts for verdict in kept),
    }


def _say_funnel(funnel: dict[str, Any]) -> None:
    _say(f"videos {funnel['videos']:7d}, kept {funnel['videos_kept']}")
    for reason, number in funnel["videos_dropped"].items():
        _say(f"       {-number:7d} {reason}")
    _say(f"frames {funnel['frames']:7d}, kept {funnel['frames_kept']} in {funnel['clips']} clips")
    for reason, number in funnel["frames_dropped"].items():
        _say(f"       {-number:7d} {reason}")


def _say(text: str) -> None:
    print(f"prepare: {clip_making.printable(text)}", flush=True)
