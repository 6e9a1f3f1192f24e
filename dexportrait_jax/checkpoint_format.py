"""How a checkpoint lies on disk: its names, checksums and who wrote it, and what may be wrong with one."""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import Any

import jax

import dexportrait_jax
from dexportrait_jax import code_version, sharding
from dexportrait_jax.errors import UserError

FOLDER = "checkpoints"
# Behind the step, in the name of a checkpoint that Orbax has not finished.
UNFINISHED = ".orbax-checkpoint-tmp"
# Beside the folder: the last step whose checkpoint is known to be whole, so that one knows when the folder is lost.
LAST_SAVED = "last_saved.txt"
# Of the State: to be raised when its arrays come to mean something else. Checkpoints without a number are of schema 1.
SCHEMA = 1
# In errors about bytes that were read and are not what was written. Those stay so, however long one waits.
_DAMAGE = ("DATA_LOSS", "OUT_OF_RANGE")


def newest_step(workdir: Path) -> int | None:
    """The newest committed step of a run, without opening it."""
    folder = Path(workdir) / FOLDER
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    return max(steps, default=None)


def orbax_lines_off() -> None:
    """Orbax logs every save through absl at INFO and WARNING; a run prints its own lines.

    Of a damaged checkpoint one error is raised, and a traceback for every other array is left to asyncio's log. Of a
    save that fails, too, one is raised, and every thread that had a part in it leaves its traceback at ERROR.
    """
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def arrays_with_checksums() -> None:
    """From now on Orbax writes a CRC-32C with every chunk of an array: a flipped bit is an error for who reads it.

    Without it, numbers that were damaged in place are read as if they were right: of Orbax's files only the indices
    have checksums, and Orbax (0.12.8) has no option for more. TensorStore has, as a codec that stands in an array's own
    description: any reader checks it, and arrays without it are read as before.
    """
    # Another Orbax may call it otherwise: its checkpoints are as sound as Orbax makes them, and a test says so.
    try:
        from orbax.checkpoint._src.serialization import tensorstore_utils as writes

        make = writes._build_zarr3_metadata
    except (ImportError, AttributeError):
        return
    if hasattr(make, "__wrapped__"):
        return

    @functools.wraps(make)
    def with_checksums(*arguments, **named):
        metadata = make(*arguments, **named)
        for codec in metadata["codecs"]:
            if codec["name"] == "sharding_indexed":
                # Last: of the bytes as they are stored.
                codec["configuration"]["codecs"].append({"name": "crc32c"})
        return metadata

    writes._build_zarr3_metadata = with_checksums


def written_by() -> dict[str, Any]:
    """What a checkpoint says of who wrote it."""
    return {
        "schema": SCHEMA,
        "dexportrait_jax": dexportrait_jax.__version__,
        "code_sha256": code_version.code_sha256(),
    }


def check_schema(place: Path, writer: dict[str, Any] | None) -> None:
    """UserError where another version wrote what may mean something else than here."""
    schema = (writer or {}).get("schema", 1)
    if schema != SCHEMA:
        raise UserError(
            f"{place} was written by {writer_in_words(writer)} under schema {schema}, this is "
            f"{dexportrait_jax.__version__} with schema {SCHEMA}; read it with that version"
        )


def writer_in_words(writer: dict[str, Any] | None) -> str:
    """The version that wrote a checkpoint."""
    if not writer or "dexportrait_jax" not in writer:
        return "a version before checkpoints said which"
    code = str(writer.get("code_sha256", ""))[:12]
    return f"dexportrait_jax {writer['dexportrait_jax']} (code {code})"


def differences(saved: Any, wanted: Any) -> list[str]:
    """What two trees of shapes do not have in common, a line each."""
    shapes = [
        {
            sharding.path_name(path): tuple(leaf.shape)
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        }
        for tree in (saved, wanted)
    ]
    held, asked = shapes
    lines = [f"it has no {name}" for name in sorted(asked.keys() - held.keys())]
    lines += [f"it has {name}" for name in sorted(held.keys() - asked.keys())]
    return lines + [
        f"its {name} has shape {held[name]}, not {asked[name]}"
        for name in sorted(held.keys() & asked.keys())
        if held[name] != asked[name]
    ]


def is_damage(error: BaseException | None) -> bool:
    """Whether bytes were read, and are not what was written; of some damage Orbax tells in the error's cause alone."""
    while error is not None:
        if isinstance(error, json.JSONDecodeError) or any(word in str(error) for word in _DAMAGE):
            return True
        error = error.__cause__
    return False


def first_line(error: BaseException) -> str:
    """What an error says, short."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
