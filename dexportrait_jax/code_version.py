"""Which code this is: the commit, where there is one, and a hash of the files as they are."""

from __future__ import annotations

import functools
import hashlib
import subprocess
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_FOLDERS = ("dexportrait_jax", "data_pipelines", "configs")


@functools.cache
def code_sha256() -> str:
    """Of every Python file that a job may run, by path and content."""
    digest = hashlib.sha256()
    for folder in _FOLDERS:
        for file in sorted((_ROOT / folder).rglob("*.py")):
            digest.update(f"{file.relative_to(_ROOT)} {file.stat().st_size} ".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def commit() -> str:
    """The commit of the checkout, with "+" behind it where files were changed since; "" outside of one."""

    def git(*arguments: str) -> str:
        command = ("git", "-C", str(_ROOT), *arguments)
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if Path(git("rev-parse", "--show-toplevel") or "/").resolve() != _ROOT:
            return ""  # installed into somebody else's checkout, or into none
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.TimeoutExpired):
        return ""
