"""Answers of XLA's compiler that took minutes to get, under `~/.cache/dexportrait`."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.metadata
import json
import os
import zlib
from pathlib import Path
from typing import Any

import jax

from data_pipelines.files import write_bytes, write_json
from dexportrait_jax.errors import UserError

LEVELS = ("jax_optimization_level", "jax_memory_fitting_level")  # of XLA's effort


def cache_file(folder: str, asked: Any) -> Path:
    """Where in the cache is what depends on `asked`, on the packages that compile, and on their flags."""
    versions = [package_version(name) for name in ("jax", "jaxlib", "libtpu", "flax", "optax")]
    flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    flags += [str(getattr(jax.config, name)) for name in LEVELS]
    name = hashlib.sha256(json.dumps([asked, versions, flags]).encode()).hexdigest()[:24]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "dexportrait" / folder / f"{name}.json"


def package_version(package: str) -> str:
    """As installed, or "absent"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def read_kept(kept: Path) -> dict[str, Any] | None:
    """What `write_kept` wrote; None where there is nothing that can be read."""
    try:
        return json.loads(kept.read_text())
    except (OSError, ValueError):
        return None


def write_kept(kept: Path, found: dict[str, Any]) -> None:
    """Not worth failing for: it can be found again."""
    with contextlib.suppress(OSError, UserError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, found)


def read_said(kept: Path) -> dict[str, Any] | None:
    """What `keep_said` wrote; None where any of it cannot be read."""
    said = read_kept(kept)
    if said is None or "message" in said:
        return said
    try:
        return said | {"text": gzip.decompress(kept.with_suffix(".hlo.gz").read_bytes()).decode()}
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return None


def keep_said(kept: Path, said: dict[str, Any]) -> None:
    if "text" in said:
        with contextlib.suppress(OSError, UserError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(kept.with_suffix(".hlo.gz"), gzip.compress(said["text"].encode(), 3))
    write_kept(kept, {name: value for name, value in said.items() if name != "text"})
