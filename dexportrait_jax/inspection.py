"""`dexportrait inspect PATH`: a dataset, run, export, config, tensor file or video, in words.

For a dataset also in pictures: a contact sheet with the labels drawn on the frames.
"""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import dataset, dataset_files, files, latents
from dexportrait_jax.errors import UserError

Say = Callable[[str], None]

_SHEET_CLIPS, _SHEET_FRAMES, _SHEET_CELL = 8, 6, 160
_VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")


def run_inspect(path: str, out: str | None = None) -> None:
    """Job ``inspect``: print what ``path`` is and holds.

    Args:
        path: a dataset, its latents, a run, checkpoint, export, config (``file.py:variant``),
            safetensors file or video.
        out: where to write the contact sheet of a dataset (.png); must not be there yet.

    Raises UserError when it is none of these, or cannot be read.
    """
    place = Path(path)
    if _config_address(path):
        kind: Callable[..., None] = _inspect_config
        arguments: tuple[Any, ...] = (path,)
    elif not place.exists():
        raise UserError(f"there is nothing at {path}; give {_KINDS}")
    else:
        kind, arguments = _kind_of(place)
    if kind is _inspect_dataset:
        _inspect_dataset(place, print, out)
        return
    if out is not None:
        raise UserError(
            f"{path} is not a dataset: there is no contact sheet of it; leave out --out"
        )
    kind(*arguments, print)


_KINDS = "a dataset, its latents, run, checkpoint, export, config.py[:variant], .safetensors file or video"


def _config_address(path: str) -> bool:
    return re.split("[:@]", path)[0].endswith(".py")


def _kind_of(place: Path) -> tuple[Callable[..., None], tuple[Any, ...]]:
    if place.is_dir():
        if (place / "model.json").is_file():
            return _inspect_export, (place,)
        if (place / latents.DESCRIPTION).is_file():
            return _inspect_latents, (place,)
        if (place / "config.json").is_file():
            return _inspect_run, (place, None)
        if place.name == "checkpoints" and (place.parent / "config.json").is_file():
            return _inspect_run, (place.parent, None)
        if place.name.isdigit() and (place.parent.parent / "config.json").is_file():
            return _inspect_run, (place.parent.parent, int(place.name))
        if dataset_files.shards(place):
            return _inspect_dataset, (place,)
    elif place.suffix == ".safetensors":
        return _inspect_tensors, (place,)
    elif place.suffix.lower() in _VIDEOS:
        return _inspect_video, (place,)
    elif place.name == "model.json":
        return _inspect_export, (place.parent,)
    raise UserError(f"{place} is nothing this project makes or reads; give {_KINDS}")


def _inspect_config(address: str, say: Say) -> None:
    from dexportrait_jax.config import load_config, to_json

    config = load_config(address)
    say(f"config {address}: stage {config.stage}, variant {config.variant}")
    _say_training(to_json(config), say)
    _say_networks(config, say)
    _say_work(config, say)
    say("keys: " + ", ".join(sorted(config.keys())))


def _inspect_run(workdir: Path, step: int | None, say: Say) -> None:
    from dexportrait_jax.checkpoint_format import FOLDER
    from dexportrait_jax.config import from_json
    from dexportrait_jax.metrics import read_rows

    values = _read_json(workdir / "config.json")
    if "stage" not in values:
        raise UserError(f"{workdir / 'config.json'} is not a config of this project; give {_KINDS}")
    say(f"run {workdir}: stage {values['stage']}, variant {values.get('variant')}")
    _say_training(values, say)
    steps = sorted(int(p.name) for p in (workdir / FOLDER).glob("*") if p.name.isdigit())
    if step is not None and step not in steps:
        raise UserError(f"{workdir} has no checkpoint of step {step}; it has {steps or 'none'}")
    for saved in steps if step is None else [step]:
        say(f"checkpoint of step {saved}: {_size(workdir / FOLDER / str(saved))}")
    if not steps:
        say("no checkpoint yet")
    rows = read_rows(workdir / "metrics.jsonl") if (workdir / "metrics.jsonl").is_file() else []
    if rows:
        last = {key: value for key, value in rows[-1].items() if isinstance(value, int | float)}
        say(f"{len(rows)} rows of metrics; the last: " + _pairs(last))
    _say_networks(from_json(values), say)


def _inspect_export(directory: Path, say: Say) -> None:
    from dexportrait_jax.weights.importing import load_groups, read_description

    model = read_description(directory)
    average = "averaged weights (EMA)" if model.get("ema") else "weights as trained"
    say(f"export {directory}: stage {model.get('stage')}, step {model.get('step')}, {average}")
    for name, group in model["groups"].items():
        load_groups(directory, [name])  # compares the sha256
        count = group.get("parameters", 0)
        say(f"  {name}: {_millions(count)} parameters, {group['file']}, sha256 as described")
    if model.get("crop"):
        say("crop: " + _pairs(model["crop"]))
    say("made with: " + _pairs(model.get("versions", {})))


def _inspect_tensors(file: Path, say: Say) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            shapes = {}
            for key in opened.keys():  # noqa: SIM118
                tensor = opened.get_slice(key)
                shapes[key] = (tuple(tensor.get_shape()), str(tensor.get_dtype()))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read as safetensors: {error}") from error
    total = sum(int(np.prod(shape, dtype=np.int64)) for shape, _ in shapes.values())
    kinds = ", ".join(sorted({kind for _, kind in shapes.values()}))
    say(f"tensors {file}: {len(shapes)} tensors, {_millions(total)} numbers, {kinds}")
    for key, (shape, kind) in sorted(shapes.items()):
        say(f"  {key} {kind} {shape}")


def _inspect_video(file: Path, say: Say) -> None:
    from data_pipelines import video
    from dexportrait_jax import provenance

    info = video.probe(file)
    length = (
        f"{info.frames} frames, {info.frames / info.fps:.1f} s" if info.frames else "length unsaid"
    )
    say(f"video {file}: {info.width}x{info.height}, {info.fps:.2f} frames/s, {length}")
    try:
        record = provenance.read(file)
    except UserError:
        say("it carries no provenance of this project")
        return
    say("synthetic, made by this project: " + _pairs(record))


def _inspect_latents(directory: Path, say: Say) -> None:
    made = latents.read_description(directory)
    mirrored = ", mirrored ones too" if made.flips else ""
    say(f"latents {directory}: {_size(directory)}")
    say(
        f"  of {made.data}, split {made.split}: {made.clips} clips, {made.frames} frames of "
        f"{made.image_size} px{mirrored}"
    )
    say(
        f"  mean and log-variance {made.shape}, {made.dtype}, {made.frame_bytes} bytes a frame, made with "
        f"{made.weights}"
    )
    say(f"autoencoder: sha256 {made.autoencoder['sha256']}, " + _pairs(made.autoencoder["options"]))
    if made.crop:
        say("crop: " + _pairs(made.crop))


def _inspect_dataset(directory: Path, say: Say, out: str | None) -> None:
    target = None if out is None else Path(out)
    if target is not None and (target.exists() or target.suffix.lower() != ".png"):
        reason = "is there already" if target.exists() else "is not called .png"
        raise UserError(f"--out={out} {reason}; give a new name that ends in .png")
    say(f"dataset {directory}: {_size(directory)}")
    shown = []
    for split in dataset_files.split_names(directory):
        clips = dataset.ClipDataset(directory, split)
        index = clips.index
        seconds = sum(n / fps for n, fps in zip(index["frames"], index["fps"], strict=True) if fps)
        say(
            f"  {split}: {len(clips)} clips, {sum(index['frames'])} frames, {seconds:.0f} s, "
            f"{len(set(index['identity']))} people, "
            f"{len(set(zip(index['session'], index['camera'], strict=True)))} recordings; "
            f"frames of {_range(index['size'], '{:.0f}')} px at {_range(index['fps'], '{:.4g}')} "
            f"per second, {_range(index['frames'], '{:.0f}')} a clip"
        )
        shown += [(split, clips, int(i)) for i in _spread(len(clips), _SHEET_CLIPS)]
    shown = [shown[i] for i in _spread(len(shown), _SHEET_CLIPS)]
    pictures = _say_clips(shown, say)
    for report in sorted(directory.glob("*report*.json")):
        say(f"report of the preparation: {report}")
    if target is not None:
        _write_sheet(pictures, target)
        say(f"contact sheet: {target}")


def _say_clips(shown: list[tuple[str, Any, int]], say: Say) -> list[tuple[str, Any]]:
    """Reads the chosen clips, says what range of heads they show, and returns (caption, clip)."""
    from data_pipelines.prepare.head_pose import euler_degrees
    from data_pipelines.records import RecordError

    readable, damaged = [], 0
    for split, clips, number in shown:
        try:
            readable.append((f"{split} {clips.index['clip_id'][number]}", clips[number]))
        except RecordError as error:
            damaged += 1
            say(f"  DAMAGED: {split} clip {number}: {error}")
    if not readable:
        raise UserError("none of the clips looked at can be read; prepare the dataset again")
    angles = np.concatenate([euler_degrees(clip.head_pose) for _, clip in readable])
    ranges = ", ".join(
        f"{name} {_range(angles[:, i], '{:.0f}')}"
        for i, name in enumerate(("pitch", "yaw", "roll"))
    )
    say(f"in {len(readable)} clips looked at: {ranges} degrees")
    settings = collections.Counter(
        # Constants alone: what a renderer leaves there is the truth of every single frame.
        json.dumps(
            {name: value for name, value in clip.settings.items() if not isinstance(value, dict)},
            sort_keys=True,
        )
        for _, clip in readable
    )
    for text, count in settings.items():
        say(f"settings of {count} of them: " + _pairs(json.loads(text)))
    say("sources: " + ", ".join(sorted({Path(clip.source).name for _, clip in readable})))
    return readable


def _write_sheet(pictures: list[tuple[str, Any]], target: Path) -> None:
    """One row a clip, frames evenly spaced in time, mask polygons drawn on them; damaged ones are blank."""
    import cv2

    from data_pipelines.records import RecordError
    from data_pipelines.transforms import decode_frame

    cell = _SHEET_CELL
    blank = np.zeros((cell, cell, 3), np.uint8)
    rows = []
    for caption, clip in pictures:
        frames = []
        for t in _spread(len(clip), _SHEET_FRAMES):
            try:
                picture = cv2.resize(decode_frame(clip, t), (cell, cell))[..., ::-1].copy()
            except RecordError:
                frames.append(blank)
                continue
            for points in clip.mask_polygons.values():
                pixels = np.round((points[t] + 1) / 2 * cell - 0.5).astype(np.int32)
                cv2.polylines(picture, [pixels], True, (90, 220, 90), 1, cv2.LINE_AA)
            frames.append(picture)
        frames += [blank] * (_SHEET_FRAMES - len(frames))
        strip = np.full((18, cell * _SHEET_FRAMES, 3), 32, np.uint8)
        cv2.putText(
            strip, caption, (4, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (230, 230, 230), 1, cv2.LINE_AA
        )
        rows += [strip, np.hstack(frames)]
    _, encoded = cv2.imencode(".png", np.vstack(rows))
    with files.writing_to(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(target, encoded.tobytes())


def _say_training(values: dict[str, Any], say: Say) -> None:
    data = values.get("data", {})
    say(
        f"trains {values.get('num_steps')} steps of {data.get('batch_size')} sources at "
        f"{data.get('image_size')} px from {data.get('path') or 'a dataset still to be named'}, "
        f"mode {data.get('mode')}"
    )


def _say_networks(config: Any, say: Say) -> None:
    """Parameters per group by shape alone: nothing is allocated, however large the networks."""
    from dexportrait_jax.state import parameter_count
    from dexportrait_jax.tasks import build_networks

    try:
        networks = build_networks(config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # A run of an older version may lack keys; what else is known of it is still worth saying.
        say(f"this version cannot build its networks: {' '.join(str(error).split())}")
        return
    counts = {name: parameter_count(network.abstract) for name, network in networks.items()}
    for name, count in counts.items():
        say(f"  {name}: {_millions(count)} parameters")
    say(f"  together: {_millions(sum(counts.values()))}")


def _say_work(config: Any, say: Say) -> None:
    """What the first loss of a step computes for one sample, by groups that matter, the dearest first."""
    from dexportrait_jax.workload import forward_work

    work = forward_work(config)
    data = config.data
    sample = f"a clip of {data.frames} frames" if data.mode == "video" else "one target"
    say(f"one source and {sample}, forward: {_giga(2 * work.macs)}")
    for name, macs in sorted(work.by_scope.items(), key=lambda item: -item[1]):
        if macs >= work.macs / 1000:
            say(f"  {name or 'other'}: {_giga(2 * macs)}")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} holds no settings; give {_KINDS}")
    return values


def _spread(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` numbers below ``count``, evenly spaced, the first and last among them."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, wanted)).round()})


def _range(values: Any, form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _giga(flops: int) -> str:
    return f"{flops / 1e9:.3g} GFLOP" if flops < 1e12 else f"{flops / 1e12:.3g} TFLOP"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"


def _size(place: Path) -> str:
    total = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    return f"{total / 1e6:.1f} MB on disk"
