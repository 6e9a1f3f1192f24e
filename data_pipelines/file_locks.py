"""Locking a file for one process, and whether that keeps others out where the file lies."""

from __future__ import annotations

import errno
import fcntl
import os
import re
from pathlib import Path
from typing import IO, Any

# What flock says where the file system has no locks: some mounted buckets, NFS without its lock service.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
# Line by line: what is mounted, where, its type, and more.
MOUNTS = Path("/proc/mounts")
# Locks of a FUSE file system that has none of its own, such as a bucket's, the kernel keeps to the processes of this
# host, and says nothing. These have locks on their servers, or lie over disks of this host, where that is enough.
_FUSE_WITH_LOCKS = (
    "fuse.bindfs",
    "fuse.ceph-fuse",
    "fuse.encfs",
    "fuse.fuse-overlayfs",
    "fuse.glusterfs",
    "fuse.gocryptfs",
    "fuse.juicefs",
    "fuse.mergerfs",
    "fuseblk",
)


def try_lock(stream: IO[Any], path: Path) -> str:
    """Locks an open file for this process alone, for as long as it is open.

    Args:
        stream: the file.
        path: where it was opened.

    Returns:
        Why that does not keep out all other processes, to be told behind "files cannot be locked"; "" where it does.

    Raises:
        BlockingIOError: another process holds it, or took it away once this one had opened it.
        OSError: for another reason it cannot be locked.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return os.strerror(error.errno)
    kind = file_system(path)
    if kind.startswith("fuse") and kind not in _FUSE_WITH_LOCKS:
        return f"{kind} locks them for this host alone"
    try:
        if os.path.samestat(os.fstat(stream.fileno()), path.stat()):
            return ""
    except FileNotFoundError:
        pass
    raise BlockingIOError(errno.EAGAIN, f"another process has taken {path} away")


def file_system(path: Path) -> str:
    """The type of the file system that holds `path`, such as "ext4" or "fuse.gcsfuse"; "" where nothing says it."""
    try:
        lines = os.fsdecode(MOUNTS.read_bytes()).split("\n")
    except OSError:
        return ""
    place, depth, found = path.resolve(), 0, ""
    for line in filter(None, lines):
        _, mounted, kind, *_ = line.split(" ")
        # Blanks in a name are written as \040.
        mounted = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), mounted))
        # Of two at the same place, the later one hides the other.
        if len(mounted.parts) >= depth and place.is_relative_to(mounted):
            depth, found = len(mounted.parts), kind
    return found
