"""What a run ran on: `environment.json` has an entry for each of its starts, the newest last."""

from __future__ import annotations

import datetime
import json
import os
import platform
import socket
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import dexportrait_jax
from data_pipelines.files import write_json
from dexportrait_jax import code_version

FILE = "environment.json"
_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_COMPILATION_CACHE_DIR")


def note_start(workdir: Path, step: int, began: float, anew: bool) -> float:
    """Adds this start to the others, and warns where the code is not that of the first.

    Args:
      workdir: the run's directory.
      step: steps done before.
      began: when this process began, as time.time() has it.
      anew: nothing is left of what was trained here before, and so of its starts.

    Returns:
      Seconds from the run's first start to this one; 0 where this is the first, or no earlier one says when it was.
    """
    file = workdir / FILE
    starts = ([] if anew else _starts(file)) + [_entry(step, began)]
    write_json(file, starts)
    code, now = starts[0].get("code_sha256"), starts[-1]["code_sha256"]
    if code != now:
        print(
            f"warning: {workdir} was started with other code ({_code(starts[0])}; this is {_code(starts[-1])}); what "
            "it becomes may be what neither of them alone would have made",
            file=sys.stderr,
        )
    first = next(start["started"] for start in starts if "started" in start)
    return max(0.0, began - datetime.datetime.fromisoformat(first).timestamp())


def _starts(file: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(file.read_text())
    except (
        OSError,
        ValueError,
    ):  # a run that has just begun; a description is not worth ending one for
        return []
    return found if isinstance(found, list) else [found]  # older versions kept the last alone


def _entry(step: int, began: float) -> dict[str, Any]:
    started = datetime.datetime.fromtimestamp(began, datetime.UTC)
    return {
        "started": started.isoformat(timespec="milliseconds"),
        "step": step,
        "dexportrait_jax": dexportrait_jax.__version__,
        "commit": code_version.commit(),
        "code_sha256": code_version.code_sha256(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        **{name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "platform": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "devices": len(jax.devices()),
        "processes": jax.process_count(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _code(start: dict[str, Any]) -> str:
    commit = start.get("commit") or ""
    # Between two states of the files that no commit holds, only their hashes differ.
    return f"{str(start.get('code_sha256'))[:12]}{', commit ' + commit[:12] if commit else ''}"
