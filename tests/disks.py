"""Disks that are small, full or read-only, for what happens to files that cannot be written."""

import contextlib
import os
import subprocess
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(path: Path, options: str):
    """A tmpfs of its own; the test is skipped where that is not allowed."""
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def resize(disk: Path, size: str) -> None:
    """Gives a small disk another size, what it holds stays."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


@contextlib.contextmanager
def full_disk(path: Path):
    """A disk with room for names and for nothing else."""
    with small_disk(path, "size=1m") as disk:
        fill(disk)
        yield disk


def fill(disk: Path) -> Path:
    """Takes what room is left, and gives the file to remove for it."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as stream:
        while True:
            stream.write(bytes(1 << 12))
            stream.flush()
    return filler


@contextlib.contextmanager
def read_only(path: Path):
    """A folder nobody can write to: by its rights, or for root, who ignores rights, by its mount."""
    if os.geteuid() != 0:
        path.mkdir(mode=0o500)
        yield path
        return
    with small_disk(path, "ro,size=64k") as disk:
        yield disk
