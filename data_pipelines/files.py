"""Writing so that nothing half-written is ever seen; in people's words why writing failed."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from dexportrait_jax.errors import UserError

_WORDS = {
    errno.ENOSPC: ("the disk is full", "free some space or choose another folder"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another folder"),
    errno.EACCES: ("no permission to write there", "choose another folder or change its rights"),
    errno.EPERM: ("no permission to write there", "choose another folder or change its rights"),
    errno.EROFS: ("it lies on a read-only disk", "choose another folder"),
    errno.EEXIST: ("a part of that path is a file", "choose another folder"),
    errno.ENOTDIR: ("a part of that path is a file", "choose another folder"),
    errno.ENOENT: ("a folder of that path does not exist", "check the path"),
    errno.EFBIG: ("the file grew larger than the system allows", "choose another folder"),
    errno.EMFILE: ("too many files are open", "raise `ulimit -n`"),
}


def explain(error: BaseException, path: str | os.PathLike) -> UserError | None:
    """The UserError for an error met while writing below `path`; None if it is not about the file
    system.

    Libraries that write from C++ report a full disk as a RuntimeError or ValueError with the
    system's text in it.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None:
        text = str(error)
        number = next((n for n in _WORDS if os.strerror(n) in text), None)
        if number is None:
            return None
    what, remedy = _WORDS.get(number, (os.strerror(number), "choose another folder"))
    return UserError(f"cannot write {path}: {what}; {remedy}")


@contextmanager
def writing_to(path: str | os.PathLike) -> Iterator[None]:
    """Turns file system errors of the block into a one-line UserError about `path`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        explained = explain(error, path)
        if explained is None:
            raise
        raise explained from error


def check_writable(path: str | os.PathLike) -> None:
    """UserError, before any work is done, where the file or directory `path` could not be written at the end."""
    folder = Path(path).resolve().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"cannot write {path}: {folder} is a file; choose another folder")
    if not os.access(folder, os.W_OK):
        raise UserError(
            f"cannot write {path}: no permission to write in {folder}; choose another folder"
        )


def check_destination(path: str | os.PathLike, example: str) -> None:
    """UserError, before any work is done, where a finished directory could not be put at `path` at the end.

    Args:
        path: what --out names.
        example: the name of a folder to give where `path` itself cannot be replaced.
    """
    place, here = Path(path).resolve(), Path.cwd()
    fixed = {
        "the folder you are in": place == here,
        "above the folder you are in": place in here.parents,
        "a mounted disk": place.is_mount(),
    }
    for what, is_so in fixed.items():
        if is_so:
            raise UserError(
                f"--out={path} is {what}, which the finished directory cannot replace; give one below it, such as "
                f"--out={Path(path) / example}"
            )
    check_writable(path)


@contextmanager
def staged_stream(path: Path) -> Iterator[BinaryIO]:
    """A file to write piece by piece under a temporary name, renamed once the block has ended without error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def staged(path: Path, data: bytes) -> Iterator[None]:
    """Writes a file under a temporary name, and renames it once the block has ended without error."""
    with staged_stream(path) as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())  # a disk that is full says so before the block and not after it
        yield


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name, then renames it: it is there whole or not at all."""
    with staged(path, data):
        pass


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def replace_directory(temporary: Path, final: Path) -> None:
    """Puts a finished directory in place; an older one is moved aside first, removed last."""
    aside = final.with_name(f".{final.name}.replaced-{os.getpid()}")
    if final.exists():
        final.rename(aside)
    try:
        temporary.rename(final)
    except OSError:
        if aside.exists():
            aside.rename(final)
        raise
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def alone_at(out: Path) -> Iterator[None]:
    """This process alone makes `out` inside: two would spoil each other's work.

    What a killed job left of `out` itself is cleared up.

    Raises:
        UserError: it cannot be written, or another process is at it.
    """
    lock = out.with_name(f".{out.name}.lock")
    with ExitStack() as stack:
        with writing_to(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            stream = stack.enter_context(lock.open("w"))
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another job is making {out} right now; wait for it") from None
            stack.callback(lock.unlink, missing_ok=True)
            _clear_up(out)
        yield


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """The hidden folder beside `out` of what is done, for this process alone, as in `alone_at`."""
    work = out.with_name(f".{out.name}.work")
    with alone_at(out):
        with writing_to(out):
            work.mkdir(exist_ok=True)
        yield work


def clear_work_folder(out: Path) -> None:
    """Removes what a job that was killed at its very end left of its `work_folder`; another job's is left alone."""
    if out.with_name(f".{out.name}.work").exists():
        with suppress(UserError), work_folder(out) as work:
            shutil.rmtree(work, ignore_errors=True)


def _clear_up(out: Path) -> None:
    """Removes what a killed job left; what it had moved aside and not replaced is put back."""
    for aside in out.parent.glob(f".{glob.escape(out.name)}.replaced-*"):
        if out.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(out)
    for unfinished in out.parent.glob(f".{glob.escape(out.name)}.incomplete-*"):
        shutil.rmtree(unfinished)
