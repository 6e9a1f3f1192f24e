"""Where a run's rows go beside metrics.jsonl: TensorBoard's event files, and Weights & Biases for those who use it.

A sink gets rows that have come from the device already, in the main process alone, so that it never makes a step wait
for another. What is written is never read again by the run; metrics.jsonl stays the record.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import time
import uuid
from pathlib import Path
from typing import Any, Protocol

import ml_collections
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from data_pipelines.files import writing_to
from dexportrait_jax import config as configs
from dexportrait_jax.errors import UserError
from dexportrait_jax.growing_file import GrowingFile

TENSORBOARD = "tensorboard"  # in the run's directory
WANDB_ID = "wandb_id.txt"


class Sink(Protocol):
    """What a MetricWriter hands its rows to."""

    def row(self, step: int, values: dict[str, float]) -> None:
        """Takes the figures of a finished step; steps come in order, each once."""

    def flush(self) -> None:
        """Lets others see what was taken."""

    def close(self) -> None:
        """Ends the record."""


def check(report: ml_collections.ConfigDict) -> None:
    """UserError where a sink that is asked for is not installed."""
    if report.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"config.report.wandb={report.wandb!r} needs the package wandb; pip install wandb, or leave it out"
        )


def make_sinks(config: ml_collections.ConfigDict, workdir: Path, resume_step: int) -> list[Sink]:
    """The sinks that ``config.report`` asks for; rows after `resume_step` are to come."""
    sinks: list[Sink] = []
    if config.report.tensorboard:
        sinks.append(TensorBoard(workdir / TENSORBOARD, resume_step))
    if config.report.wandb:
        sinks.append(WeightsAndBiases(config, workdir))
    return sinks


class TensorBoard:
    """Scalars for `tensorboard --logdir=WORKDIR`, in a new event file for every start of the run.

    The file begins by saying at which step the run goes on: TensorBoard then forgets what earlier files say of later
    steps. It is written in the thread that asks and not in one behind it, so that a full disk is an error of `flush`.
    """

    def __init__(self, folder: Path, resume_step: int):
        # TensorBoard takes files in the order of their names; two starts within a second differ in the rest.
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / name
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = GrowingFile(self._path)
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=resume_step + 1, session_log=start))
        self.flush()

    def row(self, step: int, values: dict[str, float]) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    def flush(self) -> None:
        with writing_to(self._path):
            self._file.flush()

    def close(self) -> None:
        with writing_to(self._path):
            self._file.close()

    def _write(self, event: Event) -> None:
        self._records.write(event.SerializeToString())


class WeightsAndBiases:
    """One run there for one run here: its id stays in the run's directory, and a restart goes on in it.

    Steps that are done again after a restart keep the figures they had first. Whatever fails after the start, a
    network say, ends this record with a word and not the training.
    """

    def __init__(self, config: ml_collections.ConfigDict, workdir: Path):
        import wandb

        file = workdir / WANDB_ID
        if not file.exists():
            file.write_text(uuid.uuid4().hex[:16])
        self._run: Any = None
        try:
            self._run = wandb.init(
                project=config.report.wandb,
                id=file.read_text().strip(),
                name=workdir.resolve().name,
                dir=str(workdir),
                config=configs.to_json(config),
                resume="allow",
            )
        except Exception as error:  # it raises many kinds, and none is worth a training
            self._give_up(error)

    def row(self, step: int, values: dict[str, float]) -> None:
        self._ask("log", values, step=step)

    def flush(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        self._ask("finish")

    def _ask(self, method: str, *arguments: Any, **named: Any) -> None:
        if self._run is None:
            return
        try:
            getattr(self._run, method)(*arguments, **named)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        print(
            f"warning: Weights & Biases gets no more of this run's rows ({reason}); metrics.jsonl has them all",
            file=sys.stderr,
        )
