"""The files that a dataset directory has, by their names: shards as TFDS names them, and what is known of all clips."""

from __future__ import annotations

import json
import re
from pathlib import Path

from dexportrait_jax.errors import UserError

INFO, NAME = "dataset_info.json", "portrait_clips"  # where TFDS says what a dataset is, and ours
_SHARD = re.compile(
    r"(?P<stem>.+-(?P<split>[A-Za-z0-9_]+)\.array_record)(-(?P<number>\d+)-of-(?P<count>\d+))?"
)


def index_name(split: str) -> str:
    return f"clip_index-{split}.json"


def background_name(split: str) -> str:
    return f"background_motion-{split}.npy"


def shard_name(split: str, number: int, count: int) -> str:
    """As TFDS names the ArrayRecord file with this number, from 0, of the `count` of a split."""
    return f"{NAME}-{split}.array_record-{number:05d}-of-{count:05d}"


def shards(directory: str | Path) -> dict[str, list[Path]]:
    """split -> its ArrayRecord files, in order.

    Raises:
        UserError: some of those that their names tell of are not there, and records would have other numbers than in
            the index; or they are of several datasets.
    """
    found: dict[str, list[re.Match]] = {}
    for path in sorted(Path(directory).iterdir()):
        if match := _SHARD.fullmatch(path.name):
            found.setdefault(match["split"], []).append(match)
    for of_split in found.values():
        _check_complete(directory, of_split)
    return {
        split: [Path(directory) / match[0] for match in of_split]
        for split, of_split in found.items()
    }


def _check_complete(directory: str | Path, of_split: list[re.Match]) -> None:
    first, split = of_split[0], f"split '{of_split[0]['split']}' of {directory}"
    several = {(match["stem"], match["count"]) for match in of_split}
    if len(several) > 1:
        kinds = sorted(f"{stem}-*-of-{count}" if count else stem for stem, count in several)
        raise UserError(
            f"{split} has files of several datasets ({', '.join(kinds)}); remove those that are left of another, or "
            "prepare it again with --overwrite"
        )
    if first["count"] is None:
        return
    there = {int(match["number"]) for match in of_split}
    missing = [number for number in range(int(first["count"])) if number not in there]
    if missing:
        digits = len(first["number"])
        names = [
            f"{first['stem']}-{number:0{digits}d}-of-{first['count']}" for number in missing[:3]
        ]
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"{split} lacks {len(missing)} of its {int(first['count'])} files ({', '.join(names)}{more}); copy it "
            "whole, or prepare it again with --overwrite"
        )


def split_names(directory: str | Path) -> list[str]:
    return list(shards(directory))


def is_dataset(directory: Path) -> bool:
    """Whether a folder is a dataset that `prepare`, `render` or `builder.write_dataset` made."""
    try:
        return json.loads((directory / INFO).read_text())["name"] == NAME
    except (OSError, ValueError, KeyError, TypeError):
        return False
