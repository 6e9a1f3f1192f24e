"""Processes that make batches beside the one that trains, or draw heads: how long they live."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

# A terminal and a batch system send them to all processes of a group.
_TO_THE_GROUP = (signal.SIGTERM, signal.SIGINT)

_KILLED = re.compile(r"Worker process was terminated unexpectedly with exit code -(\d+)")
_USUALLY = {"SIGKILL": "memory was full", "SIGBUS": "/dev/shm was full"}


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """Holds SIGTERM and SIGINT back inside, also from processes started there, until they ignore them."""
    # Python starts this one with the first worker, and lets signals through again once it has.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _TO_THE_GROUP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def live_with_the_parent(*_: int) -> None:
    """Of a worker process: it ends when it is told to, or the parent is gone, and not by a signal to the whole group.

    A parent that trains needs batches until it has saved.
    """
    for sent in _TO_THE_GROUP:
        signal.signal(sent, signal.SIG_IGN)

    def wait() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def killed_by(error: RuntimeError) -> str | None:
    """The signal that killed one of Grain's workers, and what is usually its cause; None: the error is another one.

    A worker that ended by itself is another error: it would do so again.
    """
    found = _KILLED.search(str(error))
    if not found:
        return None
    number = int(found[1])
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"{name} (usually because {_USUALLY[name]})" if name in _USUALLY else name
