"""`dexportrait <job>`: reads the command line and calls one function a job.

Exit codes: 0 the job did its work; 1 it could not, and one line says why; 2 the command line is wrong;
70 a fault in the program (--debug shows where); 75 stopped by SIGTERM after saving, or by what may pass by itself,
such as a disk that does not answer: start the same command again; 130 interrupted; 141 whoever read the output went
away, as `head` does.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import select
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from dexportrait_jax import __version__
from dexportrait_jax.errors import RESUME_ME, MayPass, in_words, is_fault
from dexportrait_jax.jobs import JOBS, Job

USAGE_ERROR, FAILED, FAULT, INTERRUPTED, NO_READER = 2, 1, 70, 130, 141


class Parser(argparse.ArgumentParser):
    """argparse that complains in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(USAGE_ERROR)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the `dexportrait` command; ends the process with the job's exit code."""
    try:
        code = run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        code = NO_READER
        # What is still to be written goes nowhere, instead of failing once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    _leave(code)
    raise SystemExit(code)


def run(arguments: list[str]) -> int:
    """Runs one job and returns its exit code; people's errors are printed in one line.

    Raises BrokenPipeError when nobody reads the output any more.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if arguments else USAGE_ERROR
    if arguments[0] == "--version":
        print(f"dexportrait {__version__}")
        return 0
    name = arguments[0]
    if name not in JOBS:
        close = difflib.get_close_matches(name, JOBS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        print(
            f"dexportrait: there is no job {name!r}{hint} Jobs: {', '.join(JOBS)}", file=sys.stderr
        )
        return USAGE_ERROR
    job = JOBS[name]
    try:
        flags, debug = _parse(name, job, arguments[1:])
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        _silence_native_logs()
        os.environ.update(job.environment)
        module, _, function = job.function.partition(":")
        getattr(importlib.import_module(module), function)(**flags)
        return 0
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            raise
        if debug:
            traceback.print_exc()
        else:
            print(f"dexportrait {name}: {in_words(error, name)}", file=sys.stderr)
        if isinstance(error, MayPass):
            _leave_others(RESUME_ME)
            return RESUME_ME
        return FAULT if is_fault(error) else FAILED
    except KeyboardInterrupt:
        print(f"dexportrait {name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as stop:
        return int(stop.code or 0)


def _leave(code: int) -> None:
    """Where several processes train as one, they stop together, but fail apart."""
    if code in (FAILED, FAULT, INTERRUPTED, NO_READER):
        _leave_others(code)


def _leave_others(code: int) -> None:
    if "jax" in sys.modules:
        from dexportrait_jax import distributed

        distributed.end_soon(code)


def _parse(name: str, job: Job, arguments: list[str]) -> tuple[dict, bool]:
    parser = Parser(
        prog=f"dexportrait {name}",
        description=job.summary,
        epilog=f"example: {job.example}",
        allow_abbrev=False,
    )
    job.flags(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    overrides = []
    if job.takes_config:
        overrides = [
            text.removeprefix("--config.") for text in arguments if text.startswith("--config.")
        ]
        arguments = [text for text in arguments if not text.startswith("--config.")]
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        close = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
        parser.error(
            f"unknown argument {unknown[0]}" + (f"; did you mean {close[0]}?" if close else "")
        )
    flags = vars(parsed)
    debug = flags.pop("debug")
    if job.takes_config:
        flags["overrides"] = overrides
    if "distributed" in flags:
        flags["distributed_mode"] = flags.pop("distributed")
    return flags, debug


def _overview() -> str:
    lines = [
        f"dexportrait {__version__}: portrait animation with explicit pose and latent expression",
        "",
    ]
    lines += [f"  dexportrait {name:<9} {job.summary}" for name, job in JOBS.items()]
    return "\n".join([*lines, "", "Each job has --help with an example."])


def _reader_is_gone() -> bool:
    poll = select.poll()
    poll.register(1, select.POLLERR)  # file descriptor 1, whatever sys.stdout is by now
    return bool(poll.poll(0))


def _silence_native_logs() -> None:
    # Native code of MediaPipe and XLA writes lines that say nothing to the user ("Very slow compile?");
    # what really fails comes as an exception.
    os.environ.setdefault("GLOG_minloglevel", "2")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
