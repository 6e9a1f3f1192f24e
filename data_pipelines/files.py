"""Writing so that nothing half-written is ever seen; in people's words why writing failed."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from data_pipelines.file_locks import try_lock
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


def already_there(out: Path, what: str, is_one: Callable[[Path], bool]) -> bool:
    """Whether `out` holds a finished directory of ours, which `--overwrite` may replace.

    What a killed job left of it is cleared up before it is looked at, see `alone_at`.

    Args:
        out: what --out names.
        what: what it should be, with its article, such as "a dataset".
        is_one: whether a directory is one.

    Returns:
        False where there is nothing, or an empty folder.

    Raises:
        UserError: anything else is there. It is somebody's, and never replaced.
    """
    place = out.resolve()  # what is written; `gone/../out` is not there as long as `gone` is not
    if any(_left_by_killed_jobs(place)):
        with suppress(UserError), alone_at(place):  # another job's is left alone
            pass
    if place.exists() and not place.is_dir():
        raise UserError(f"{out} is a file and not a folder; choose another --out")
    with writing_to(out):
        names = sorted(path.name for path in place.iterdir()) if place.is_dir() else []
        if names and not is_one(place):
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            raise UserError(
                f"{out} holds something else than {what} ({listed}), which is left as it is; give an empty or new --out"
            )
    return bool(names)


def check_destination(path: str | os.PathLike, example: str) -> None:
    """UserError, before any work is done, where a finished directory could not be put at `path` at the end.

    Args:
        path: what --out names.
        example: the name of a folder to give where `path` itself cannot be replaced.
    """
    place, here = Path(path).resolve(), Path.cwd()
    fixed = {
        "a link": Path(path).is_symlink(),
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


def hidden_name(path: Path, kind: str) -> Path:
    """A name beside `path` that no other process takes, on this host or on another that shares the disk."""
    return path.with_name(f".{path.name}.{kind}-{secrets.token_hex(4)}")


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """An empty file under a hidden name beside `path`, for a library that writes by name; removed after the block.

    Such files of `path` that nobody holds any more, because their process was killed, are removed first. Where files
    cannot be locked they stay: they may be another process's.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.tmp-*"):
        with suppress(OSError), left.open("rb") as stream:
            if not try_lock(stream, left):
                left.unlink()
                _note(f"note: removed {left.name}, which a killed job had left beside {path}")
    while True:
        temporary = hidden_name(path, "tmp")
        with temporary.open("xb") as stream:
            with suppress(OSError):
                fcntl.flock(stream, fcntl.LOCK_EX)
            if not temporary.exists():  # taken for an abandoned one before it was locked
                continue
            try:
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)
            return


@contextmanager
def staged_stream(path: Path) -> Iterator[BinaryIO]:
    """A file to write piece by piece under a temporary name, renamed once the block has ended without error."""
    temporary = hidden_name(path, "tmp")
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
    """Puts a finished directory in place; an older one is moved aside first, removed last.

    A process that is killed in between leaves it aside, where `alone_at` finds it.
    """
    aside = hidden_name(final, "replaced")
    if final.exists():
        final.rename(aside)
    try:
        temporary.rename(final)
    except OSError:
        if aside.exists():
            aside.rename(final)
        raise
    if aside.exists():
        # Under another name first, or half of it could be taken for one to be put back.
        removed = hidden_name(final, "incomplete")
        aside.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


@contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """A folder to fill, by this process alone, that takes the place of `out` once the block has ended without error.

    Until then what is at `out` stays as it is; after an error nothing else is left.

    Raises:
        UserError: it cannot be written, or another process is at it.
    """
    temporary = hidden_name(out, "incomplete")
    with alone_at(out), writing_to(out):
        try:
            temporary.mkdir()
            yield temporary
            for file in temporary.iterdir():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
            replace_directory(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def alone_at(out: Path) -> Iterator[None]:
    """This process alone makes `out` inside: two would spoil each other's work.

    What a killed job left of `out` itself is cleared up, and told on stderr: what it had moved aside and not replaced
    is put back. Where files cannot be locked that is a warning, and nothing is cleared up: it may be another job's.

    Raises:
        UserError: it cannot be written, or another process is at it.
    """
    lock = out.with_name(f".{out.name}.lock")
    with ExitStack() as stack:
        with writing_to(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            stream = stack.enter_context(lock.open("w"))
            try:
                unlocked = try_lock(stream, lock)
            except BlockingIOError:
                raise UserError(f"another job is making {out} right now; wait for it") from None
            if unlocked:
                _note(
                    f"warning: {out} lies where files cannot be locked ({unlocked}); nothing keeps a second job from "
                    "making it too"
                )
            stack.callback(lock.unlink, missing_ok=True)
            if not unlocked:
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


def _left_by_killed_jobs(out: Path) -> Iterator[Path]:
    for kind in ("replaced", "incomplete"):
        yield from out.parent.glob(f".{glob.escape(out.name)}.{kind}-*")


def _clear_up(out: Path) -> None:
    """Removes what a killed job left; what it had moved aside and not replaced is put back."""
    # The newest first: it is the one to put back.
    left = sorted(_left_by_killed_jobs(out), key=lambda path: path.lstat().st_mtime, reverse=True)
    for path in left:
        if ".replaced-" in path.name.removeprefix(f".{out.name}") and _empty(out):
            if out.exists():
                out.rmdir()
            path.rename(out)
            _note(f"note: put back {out}, which a killed job had moved aside to replace it")
        else:
            remove = Path.unlink if path.is_symlink() else shutil.rmtree
            remove(path)
            _note(f"note: removed {path.name}, which a killed job had left beside {out}")


def _empty(place: Path) -> bool:
    return not place.exists() or (place.is_dir() and not any(place.iterdir()))


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
