"""Worker processes: one that dies costs its video, not the job; none outlives the job."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipelines.prepare import clips, crop, filters, processing
from dexportrait_jax.errors import UserError


def no_landmarker(model):
    pass


def dies_at_bert(job):
    if job.naming.name == "bert":
        os._exit(9)
    return filters.Verdict(job.path, True, frames=3)


def test_a_dying_process_costs_its_video(tmp_path, monkeypatch):
    monkeypatch.setattr(processing, "_start", no_landmarker)
    monkeypatch.setattr(processing, "_look_at", dies_at_bert)
    jobs = []
    for name in ("anna", "bert", "carl"):
        (tmp_path / name).write_text(name)
        naming = clips.Naming.of(tmp_path / name)
        jobs.append(processing.Job(str(tmp_path / name), naming, crop.Settings(), None, tmp_path))
    said = []
    verdicts = processing.process(jobs, "", 2, said.append)
    assert [verdict.kept for verdict in verdicts] == [True, False, True]
    assert verdicts[1].words() == "dropped: failed: its process died"
    assert len(said) == 3 and said[-1].startswith("3/3")


def test_a_dying_process_leaves_what_was_not_begun_to_another_pool(tmp_path, monkeypatch):
    monkeypatch.setattr(processing, "_start", no_landmarker)
    monkeypatch.setattr(processing, "_look_at", dies_at_bert)
    run, runs = processing._run, []

    def counted(jobs, *arguments):
        runs.append([job.naming.name for job in jobs])
        return run(jobs, *arguments)

    monkeypatch.setattr(processing, "_run", counted)
    jobs = []
    for name in ("anna", "bert", "carl", "dora", "emil", "fred"):
        (tmp_path / name).write_text("long" if name == "bert" else "1")  # the longest is first
        naming = clips.Naming.of(tmp_path / name)
        jobs.append(processing.Job(str(tmp_path / name), naming, crop.Settings(), None, tmp_path))
    said = []
    verdicts = processing.process(jobs, "", 1, said.append)
    assert [job.naming.name for job, v in zip(jobs, verdicts, strict=True) if not v.kept] == [
        "bert"
    ]
    assert runs == [
        [job.naming.name for job in jobs],
        ["bert"],
        ["anna", "carl", "dora", "emil", "fred"],
    ]
    assert len(said) == 6 and said[-1].startswith("6/6")


def test_a_landmarker_that_cannot_be_loaded_is_no_fault_of_the_videos(tmp_path):
    (tmp_path / "broken.task").write_text("half a file")
    jobs = []
    for name in ("anna", "bert"):
        (tmp_path / name).write_text(name)
        naming = clips.Naming.of(tmp_path / name)
        jobs.append(processing.Job(str(tmp_path / name), naming, crop.Settings(), None, tmp_path))
    said = []
    with pytest.raises(UserError, match="broken.task is not a face landmarker"):
        processing.process(jobs, str(tmp_path / "broken.task"), 2, said.append)
    assert said == []


_JOB = """
import sys, multiprocessing, time
from concurrent.futures import ProcessPoolExecutor
from tests.data_pipelines.prepare import test_processing as here
if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), here.watch)
    print(pool.submit(here.process_id).result(), flush=True)
    time.sleep(60)
"""


def watch():
    import threading

    threading.Thread(target=processing._end_with_parent, daemon=True).start()


def process_id():
    return os.getpid()


def test_workers_of_a_killed_job_end(tmp_path):
    (tmp_path / "job.py").write_text(_JOB)
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    job = subprocess.Popen(
        [sys.executable, tmp_path / "job.py"], stdout=subprocess.PIPE, text=True, env=environment
    )
    worker = int(job.stdout.readline())
    job.send_signal(signal.SIGKILL)
    job.wait()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        if _is_zombie(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    raise AssertionError("the worker lives on")


def _is_zombie(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text()
        return state.rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True
