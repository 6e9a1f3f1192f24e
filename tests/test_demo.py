"""The demo as a stranger runs it: from an empty folder to a report, and killed on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dexportrait_jax import demo
from dexportrait_jax.metrics import read_rows

TRAINED = {
    "motion": "configs/motion.py",
    "autoencoder": "configs/autoencoder.py",
    "image": "configs/animator_image.py",
    "video": "configs/animator_video.py",
}


def start(workdir: Path, log: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "dexportrait_jax", "demo", f"--workdir={workdir}"],
        stdout=log.open("a"),
        stderr=subprocess.STDOUT,
    )


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_demo_killed_in_every_stage_finishes_and_reaches_its_figures(tmp_path):
    """SIGKILL once in each training stage, then to the end, and once more: nothing is left to do."""
    from dexportrait_jax import config as configs

    workdir, log = tmp_path / "demo", tmp_path / "log.txt"
    waiting = list(TRAINED)
    seconds = 0.0
    while True:
        began = time.monotonic()
        process = start(workdir, log)
        while process.poll() is None:
            rows = workdir / "runs" / (waiting[0] if waiting else "") / "metrics.jsonl"
            if waiting and rows.exists() and len(read_rows(rows)) >= 10:
                waiting.pop(0)
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                break
            time.sleep(0.5)
        seconds += time.monotonic() - began
        if process.returncode != -signal.SIGKILL:
            break
    assert process.returncode == 0, log.read_text()[-3000:]
    assert not waiting

    for name, config in TRAINED.items():
        steps = [row["step"] for row in read_rows(workdir / "runs" / name / "metrics.jsonl")]
        assert steps == list(range(1, configs.load_config(f"{config}:tiny").num_steps + 1))

    summary = json.loads((workdir / "summary.json").read_text())
    for model in ("motion", "animator"):
        assert set(summary[model]) == {"psnr", "psnr_copy", "ssim", "lpips", "lpips_copy"}
    assert summary["motion"]["psnr"] >= summary["motion"]["psnr_copy"] + 2.0
    assert summary["animator"]["psnr"] > summary["animator"]["psnr_copy"]
    assert summary["peak_memory_gb"] < 6
    for path in summary["artifacts"].values():
        assert Path(path).exists(), path

    report = (workdir / "report.html").read_text()
    assert report.count("<video") >= 5
    assert (
        "http://" not in report.replace("http://www.w3.org", "") and 'src="https://' not in report
    )

    again = subprocess.run(
        [sys.executable, "-m", "dexportrait_jax", "demo", f"--workdir={workdir}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert again.returncode == 0
    assert again.stdout.count("done before") == len(demo.plan(workdir))


def test_the_plan_is_made_of_ordinary_commands(tmp_path, capsys):
    """Every part's command parses as the job it names."""
    from dexportrait_jax import cli

    for part in demo.plan(tmp_path):
        name, *flags = part.arguments
        cli._parse(name, cli.JOBS[name], flags)
        assert part.command.startswith(f"dexportrait {name} ")
    jobs = demo.clip_jobs(tmp_path)
    assert len(jobs) == 5
    assert len({job["out"] for job in jobs}) == 5


def test_a_part_that_failed_is_named(tmp_path):
    from dexportrait_jax.errors import UserError

    record = demo._Record(tmp_path / "demo.json")
    part = demo.Part("prepare", ["prepare", "--videos=nothing/*.mp4", f"--out={tmp_path / 'data'}"])
    with pytest.raises(UserError, match="the part prepare ended with code 1"):
        demo._run(part, record)
    assert not record.done(part)
    assert json.loads((tmp_path / "demo.json").read_text())["prepare"]["done"] is False
