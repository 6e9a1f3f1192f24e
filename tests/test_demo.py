"""The demo as a stranger runs it: from an empty folder to a report, and killed on the way."""

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipelines.prepare import job as prepare_job
from dexportrait_jax import assets, cli, demo, demo_plan
from dexportrait_jax.errors import UserError
from dexportrait_jax.jobs import JOBS
from dexportrait_jax.metrics import read_rows

TRAINED = {
    "motion": "configs/motion.py",
    "autoencoder": "configs/autoencoder.py",
    "image": "configs/animator_image.py",
    "video": "configs/animator_video.py",
}
# Steps of a demo that need not please the eye.
SHORTER = {"motion": 340, "autoencoder": 260, "image": 340, "video": 24}
# The demo whose parts train for other numbers of steps.
WITH_STEPS = """
import json, sys
from dexportrait_jax import cli, demo, demo_plan

def plan(workdir):
    parts = demo_plan.plan(workdir)
    for part in parts:
        for name, steps in json.loads(sys.argv[2]).items():
            if part.name == f"train_{name}":
                part.arguments.append(f"--config.num_steps={steps}")
    return parts

demo.plan = plan
cli.main(["demo", f"--workdir={sys.argv[1]}"])
"""


def start(workdir: Path, log: Path, steps: dict[str, int]) -> subprocess.Popen:
    """On one device as a stranger has it, not on the tests' eight."""
    return subprocess.Popen(
        [sys.executable, "-c", WITH_STEPS, str(workdir), json.dumps(steps)],
        stdout=log.open("a"),
        stderr=subprocess.STDOUT,
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
    )


@pytest.mark.parametrize(
    "shorter",
    [
        pytest.param(SHORTER, marks=[pytest.mark.slow, pytest.mark.first], id="shorter"),
        pytest.param({}, marks=pytest.mark.exhaustive, id="whole"),
    ],
)
@pytest.mark.timeout(3600)
def test_demo_killed_in_every_stage_finishes_and_reaches_its_figures(tmp_path, shorter):
    """SIGKILL in prepare, each training stage and animate, then to the end, and once more: all is done."""
    from dexportrait_jax import config as configs

    expected = {
        name: configs.load_config(f"{config}:tiny").num_steps for name, config in TRAINED.items()
    } | shorter
    workdir, log = tmp_path / "demo", tmp_path / "log.txt"
    waiting = ["prepare", *TRAINED, "animate"]

    def in_the_middle(part: str) -> bool:
        if part == "prepare":
            return any((workdir / ".data.work").glob("*.clips"))
        if part == "animate":
            return any((workdir / "clips").glob("[!.]*.mp4"))
        rows = workdir / "runs" / part / "metrics.jsonl"
        return rows.exists() and len(read_rows(rows)) >= 10

    while True:
        process = start(workdir, log, shorter)
        while process.poll() is None:
            if waiting and in_the_middle(waiting[0]):
                waiting.pop(0)
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                break
            time.sleep(0.05 if waiting and waiting[0] in ("prepare", "animate") else 0.5)
        if process.returncode != -signal.SIGKILL:
            break
    assert process.returncode == 0, log.read_text()[-3000:]
    assert not waiting

    for name, last in expected.items():
        steps = [row["step"] for row in read_rows(workdir / "runs" / name / "metrics.jsonl")]
        assert steps == list(range(1, last + 1))

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

    assert len(json.loads((workdir / "clips.json").read_text())) == 5
    again = subprocess.run(
        [sys.executable, "-m", "dexportrait_jax", "demo", f"--workdir={workdir}"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | without_network(tmp_path),
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == len(demo_plan.plan(workdir))


def without_network(tmp_path: Path) -> dict[str, str]:
    """An environment where no asset is to be had."""
    return {
        "DEXPORTRAIT_ASSETS": "",
        "DEXPORTRAIT_CACHE": str(tmp_path / "empty_cache"),
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_EXTRA_INDEX_URL": "",
        "https_proxy": "http://127.0.0.1:9",
    }


@pytest.mark.parametrize("folder", ["demo", "with a space", "relative/demo", "a,b[1]*?{c}"])
def test_the_plan_is_made_of_ordinary_commands(tmp_path, monkeypatch, folder):
    """Every part's command parses as the job it names, and finds the inputs whatever the folder is called."""
    monkeypatch.chdir(tmp_path)
    root = Path(folder) if "relative" in folder else tmp_path / folder
    (root / "inputs").mkdir(parents=True)
    (root / "inputs" / "one.mp4").touch()
    for part in demo_plan.plan(root):
        for arguments in (part.arguments, part.redo or part.arguments):
            name, *flags = arguments
            flags, _ = cli._parse(name, JOBS[name], flags)
            if name == "prepare":
                assert prepare_job._matching(flags["videos"]) == [root / "inputs" / "one.mp4"]
        assert part.command.startswith(f"dexportrait {name} ")
    jobs = demo_plan.clip_jobs(root)
    assert len(jobs) == 5
    assert len({path for job in jobs for path in demo_plan.clip_files(job)}) == 15


def test_commands_of_the_report_do_their_part_again(tmp_path):
    """Run as they are they would say that all is done: they overwrite, or train in another folder."""
    for part in demo_plan.plan(tmp_path):
        if part.name.startswith("train_"):
            again = next(text for text in part.redo if text.startswith("--workdir="))
            assert again.endswith("_again") and again not in part.arguments
        else:
            assert "--overwrite" in part.command
    assert f"--jobs={tmp_path}/clips.json" in part.command
    assert "--config=configs/motion.py:tiny" in demo_plan.plan(tmp_path)[1].command


def test_configs_are_the_projects_own():
    """A part gets its config by absolute path: not the one that lies where the demo is started."""
    arguments = demo._executed(demo_plan.plan(Path("demo"))[1].arguments)
    config = next(text for text in arguments if text.startswith("--config="))
    path = Path(config.removeprefix("--config=").removesuffix(":tiny"))
    assert path.is_absolute() and path.is_file()


def write_finished(root: Path, parts: list) -> None:
    """A demo folder where these parts are done."""
    for part in parts:
        for path in part.made:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    record = demo._Record(root / "demo.json")
    record.write("inputs", 7.0, 0.1, True)
    for part in parts:
        record.write(part.name, 1.0, 0.1, True)


@pytest.fixture
def ran(monkeypatch):
    """Parts that the demo starts, instead of starting them; the report is not written."""
    started = []

    def run(part, record):
        started.append(part)
        record.write(part.name, 1.0, 0.1, True)

    monkeypatch.setattr(demo, "_run", run)
    monkeypatch.setattr(demo.demo_report, "write", lambda root, *_: root / "report.html")
    return started


def test_a_finished_demo_needs_nothing(tmp_path, ran, monkeypatch):
    """Started again it runs no part, fetches nothing, and keeps the list of clips that the report names."""
    write_finished(tmp_path, demo_plan.plan(tmp_path))
    monkeypatch.setattr(assets, "fetch", lambda name: pytest.fail(f"fetched {name}"))
    demo.run_demo(str(tmp_path))
    assert ran == []
    assert len(json.loads((tmp_path / "clips.json").read_text())) == 5
    assert json.loads((tmp_path / "demo.json").read_text())["inputs"]["seconds"] == 7.0


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_clip_with_a_file_missing_is_made_again(tmp_path, ran, monkeypatch, lost):
    """Killed between the files of one clip, the demo makes that clip again, and no other."""
    monkeypatch.setattr(demo, "_gather_inputs", lambda folder: False)
    write_finished(tmp_path, demo_plan.plan(tmp_path))
    demo_plan.clip_files(demo_plan.clip_jobs(tmp_path)[3])[lost].unlink()
    demo.run_demo(str(tmp_path))
    assert [part.name for part in ran] == ["animate"]
    assert len(json.loads((tmp_path / "clips.json").read_text())) == 5
    missing = json.loads((tmp_path / "clips_missing.json").read_text())
    assert [Path(job["out"]).stem for job in missing] == ["expression_only"]


def test_killed_after_the_last_clip_there_is_nothing_to_animate(tmp_path, ran, monkeypatch):
    monkeypatch.setattr(demo, "_gather_inputs", lambda folder: False)
    parts = demo_plan.plan(tmp_path)
    write_finished(tmp_path, parts)
    record = demo._Record(tmp_path / "demo.json")
    record.write("animate", 3.0, 0.1, False)
    demo.run_demo(str(tmp_path))
    assert ran == []
    assert demo._Record(tmp_path / "demo.json").done(parts[-1])


def test_inputs_are_told_by_their_hash(tmp_path, monkeypatch):
    """A copy of the right size with other content is replaced; a whole one is left alone."""
    content = {"carphone": b"first", "pexels_langer": b"second", "pyfeat_single": b"third"}
    for name, data in content.items():
        (tmp_path / f"asset_{name}").write_bytes(data)
        changed = dataclasses.replace(assets.ASSETS[name], sha256=hashlib.sha256(data).hexdigest())
        monkeypatch.setitem(assets.ASSETS, name, changed)
    fetched = []

    def fetch(name):
        fetched.append(name)
        return tmp_path / f"asset_{name}"

    monkeypatch.setattr(assets, "fetch", fetch)
    monkeypatch.setattr(assets, "find", lambda name: Path(name))
    assert demo._gather_inputs(tmp_path / "inputs")
    assert set(fetched) == {"face_landmarker", "lpips_alexnet", *content}
    fetched.clear()
    assert not demo._gather_inputs(tmp_path / "inputs")
    assert fetched == ["face_landmarker", "lpips_alexnet"]
    (tmp_path / "inputs" / "carphone.mp4").write_bytes(b"frist")
    assert demo._gather_inputs(tmp_path / "inputs")
    assert (tmp_path / "inputs" / "carphone.mp4").read_bytes() == b"first"


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGTERM, demo.STOPPED), (signal.SIGINT, demo.INTERRUPTED)]
)
def test_stopped_it_ends_its_part_and_says_how_to_go_on(tmp_path, sent, code):
    """A part that saves when told to end gets the time to; the demo then says one line."""
    program = f"""
import sys, pathlib, signal, subprocess
from dexportrait_jax import cli, demo
# Started in the background of a script, this process would ignore the interrupt of a terminal.
signal.signal(signal.SIGINT, signal.default_int_handler)
part = '''
import signal, sys, time, pathlib
def save(*_):
    time.sleep(0.3)
    pathlib.Path({str(tmp_path / "saved")!r}).touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
pathlib.Path({str(tmp_path / "running")!r}).touch()
time.sleep(60)
'''
start = subprocess.Popen
demo._gather_inputs = lambda folder: False
demo.subprocess.Popen = lambda command, **how: start([sys.executable, "-c", part], **how)
cli.main(["demo", "--workdir={tmp_path / "demo"}"])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        process_group=0,
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "running").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        # As a terminal does: to the demo and to its part.
        os.killpg(process.pid, sent) if sent == signal.SIGINT else process.send_signal(sent)
        said = process.communicate(timeout=60)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert process.returncode == code, said
    assert said == "dexportrait demo: stopped; start the same command again to go on\n"
    assert (tmp_path / "saved").exists()


def test_a_part_that_failed_is_named(tmp_path):
    record = demo._Record(tmp_path / "demo.json")
    part = demo_plan.Part(
        "prepare", ["prepare", "--videos=nothing/*.mp4", f"--out={tmp_path / 'data'}"]
    )
    with pytest.raises(UserError, match="the part prepare ended with code 1"):
        demo._run(part, record)
    assert not record.done(part)
    assert json.loads((tmp_path / "demo.json").read_text())["prepare"]["done"] is False


def test_a_failing_demo_says_two_lines(tmp_path, monkeypatch, capfd):
    """The part's own, which says what is wrong, and the demo's, which says that it goes on from there."""
    monkeypatch.setattr(demo, "_gather_inputs", lambda folder: False)
    (tmp_path / "inputs").mkdir()
    assert cli.run(["demo", f"--workdir={tmp_path}"]) == 1
    first, second = capfd.readouterr().err.splitlines()
    assert first.startswith("dexportrait prepare: no video matches")
    assert second.startswith("dexportrait demo: the part prepare ended with code 1")


def test_parts_do_not_believe_the_current_directory(tmp_path, monkeypatch, capfd):
    """A folder called like a package of ours, where the demo is started, is not imported."""
    for name in ("dexportrait_jax", "data_pipelines", "configs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    record = demo._Record(tmp_path / "demo.json")
    demo._run(demo_plan.Part("help", ["prepare", "--help"]), record)
    assert "the wrong one" not in capfd.readouterr().err


@pytest.mark.parametrize("given", ["", "glibc.malloc.check=1"])
def test_parts_ask_for_large_pages(tmp_path, monkeypatch, given):
    """Unless whoever starts the demo has said something about them."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if given:
        monkeypatch.setenv("GLIBC_TUNABLES", given)
    start_process, told = subprocess.Popen, {}

    def popen(command, env, **_):
        told.update(env)
        return start_process([sys.executable, "-c", ""], env=env)

    monkeypatch.setattr(demo.subprocess, "Popen", popen)
    demo._run(demo_plan.Part("help", ["--help"]), demo._Record(tmp_path / "demo.json"))
    assert told["GLIBC_TUNABLES"] == (given or "glibc.malloc.hugetlb=1")


def test_a_damaged_record_is_told(tmp_path):
    (tmp_path / "demo.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        demo.run_demo(str(tmp_path))


def test_two_demos_in_one_folder(tmp_path):
    with demo._claimed(tmp_path), pytest.raises(UserError, match="another demo is running"):
        demo.run_demo(str(tmp_path))
