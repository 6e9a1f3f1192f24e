"""The one kind of error that is meant for people rather than for a debugger, and every kind in their words."""

from __future__ import annotations

RESUME_ME = 75  # EX_TEMPFAIL: the launcher should start the same command again

# Which extra of pyproject.toml brings a package that is not there.
EXTRAS = {
    "mediapipe": "prepare",
    "tensorflow_datasets": "prepare",
    "psutil": "demo",
    "torch": "torch",
    "optuna": "sweep",
}


class UserError(Exception):
    """Something the user can put right: one line that says what is wrong, where, and what to do.

    The command line prints the message without a traceback and ends with a non-zero code.
    """


class MayPass(UserError):
    """What may have passed by itself when the same command is started again, as its exit code asks for."""


class Fault(Exception):
    """What a fault in the program left undone, in one line; the fault is its cause."""


def is_fault(error: Exception) -> bool:
    """Whether the program is to blame: for all but what the user or the machine can put right."""
    return not isinstance(error, UserError | OSError | ImportError)


def in_words(error: Exception, job: str) -> str:
    """What is told of an error that ended the job of this name, or a part of it: one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UserError | Fault):
        return text
    if isinstance(error, OSError) and error.errno == 28:
        return f"the disk is full ({error.filename or 'while writing'}); free some space and run it again"
    if isinstance(error, OSError):
        return text
    if isinstance(error, ModuleNotFoundError) and error.name:
        extra = "demo" if job == "demo" else EXTRAS.get(error.name.partition(".")[0])
        wanted = f"'.[{extra}]'" if extra else "."
        return f"package {error.name!r} is missing; install it with pip install -e {wanted}"
    if isinstance(error, ImportError):
        return f"a package is damaged or lacks a system library: {text}"
    return f"fault in the program: {type(error).__name__}: {text[:300]} (--debug shows where)"
