"""The launchers, where there is neither a cluster nor a cloud: what they start, and what they do about its end."""

import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from dexportrait_jax import chips, cli, train
from dexportrait_jax import config as configs
from launch import local_processes

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
# Below the time that a host is given to end, which is the launcher's to know.
TIMEOUT = r"--config\.checkpoint\.timeout_seconds=(\d+)"

# Slurm's, as far as the script relies on it: tasks, the end of all with the first that fails, the highest code.
SRUN = """
import os, signal, subprocess, sys, time
command = sys.argv[sys.argv.index("bash"):]
print("srun", *sys.argv[1:sys.argv.index("bash")])
codes = os.environ["CODES"].split()
tasks = [
    subprocess.Popen(
        command, start_new_session=True, env=os.environ | {"SLURM_PROCID": str(index), "CODE": code}
    )
    for index, code in enumerate(codes)
]
def end(sent):
    for task in tasks:
        if task.poll() is None:
            os.killpg(task.pid, sent)
if os.environ.get("TERM_AFTER"):
    time.sleep(float(os.environ["TERM_AFTER"]))
    end(signal.SIGTERM)
while None in [task.poll() for task in tasks]:
    if any(task.returncode for task in tasks):
        end(signal.SIGKILL)
    time.sleep(0.02)
if "oom" in " ".join(codes):
    sys.exit(253)
sys.exit(max(code if code >= 0 else 128 - code for code in (task.wait() for task in tasks)))
"""
# Ends after some seconds, with a code or by a signal. At "save" or SIGTERM it saves for half a second and ends with 75.
DEXPORTRAIT = """
import os, signal, sys, time
def save(*_):
    time.sleep(0.5)
    print("saved", flush=True)
    sys.exit(75)
seconds, _, end = os.environ["CODE"].partition(":")
signal.signal(signal.SIGTERM, save)
os.write(1, f"began {' '.join(sys.argv[1:])}\\n".encode())  # in one piece: others write there too
time.sleep(float(seconds))
if end == "save":
    save()
end = end.replace("oom", "-9")
if end.startswith("-"):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), -int(end))
sys.exit(int(end))
"""


@pytest.fixture
def sbatch(tmp_path):
    """Runs the script for tasks that end as `codes` says; gives its code and what was printed."""
    for name, code in {"srun": SRUN, "dexportrait": DEXPORTRAIT}.items():
        (tmp_path / name).write_text(f"#!{sys.executable}\n{code}")
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho scontrol $*\n")
    (tmp_path / "sleep").write_text("#!/bin/sh\nexec /bin/sleep $(($1 / 10)).$(($1 % 10))\n")
    for file in tmp_path.iterdir():
        file.chmod(0o755)

    def run(codes, **environment):
        slurm = {"SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "64", "CODES": codes}
        environment = os.environ | slurm | environment
        environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
        command = ["bash", LAUNCH / "slurm.sbatch", "train", "--workdir=a b"]
        done = subprocess.run(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        return done.returncode, done.stdout

    return run


@pytest.mark.parametrize("script", ["slurm.sbatch", "xpk.sh"])
def test_scripts_are_bash(script):
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)


def test_a_run_under_slurm_that_is_done(sbatch):
    code, said = sbatch("0:0 0.5:0")
    assert code == 0 and "scontrol" not in said
    (seconds,) = {int(found) for found in re.findall(TIMEOUT, said)}
    assert (
        said.count(f"began train --config.checkpoint.timeout_seconds={seconds} --workdir=a b\n")
        == 2
    )
    assert f"--signal=TERM@{seconds + 120}\n" in (LAUNCH / "slurm.sbatch").read_text()
    assert "srun --kill-on-bad-exit=1 --wait=0 --cpus-per-task=64\n" in said


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ("0:save 1:save", 75),  # the second still saves when the first has ended
        ("0:-9 60:0", 137),
        ("0:-15 60:0", 143),
        ("0:oom", 253),  # as srun says it
        ("0:70 0.5:-9", 137),  # it failed because the other one was killed
    ],
)
def test_stopped_or_killed_jobs_go_back_into_the_queue(sbatch, codes, code):
    found, said = sbatch(codes)
    assert found in (code, 137) and said.splitlines()[-1] == "scontrol requeue 17"
    assert said.count("saved") == codes.count("save")


def test_sigterm_to_all_tasks_is_for_the_processes(sbatch):
    code, said = sbatch("60:0 60:0", TERM_AFTER="2", SLURM_RESTART_COUNT="99")
    assert code in (75, 137) and said.count("saved") == 2
    assert said.splitlines()[-1] == "scontrol requeue 17"


@pytest.mark.parametrize("end", ["1", "2", "70", "-11"])
def test_a_task_that_fails_ends_the_others_for_good(sbatch, end):
    code, said = sbatch(f"60:0 0:{end} 60:save")
    number = end if int(end) > 0 else "139"
    assert code == 1 and f"task 1 failed with code {number}\n" in said
    assert "scontrol" not in said and "saved" not in said


def test_restarts_come_to_an_end(sbatch):
    code, said = sbatch("0:save", SLURM_RESTART_COUNT="3", RESTARTS="3")
    assert code == 75 and "scontrol" not in said
    assert "ended with code 75 after 3 restarts: not started again" in said


def test_xpk_starts_again_what_was_stopped_or_killed(tmp_path):
    """xpk adds codes that are given to its own, 42 and 127 to 255."""
    xpk = tmp_path / "xpk"
    xpk.write_text(f"#!{sys.executable}\nimport sys\nprint(*sys.argv[1:], sep='\\n')\n")
    xpk.chmod(0o755)
    environment = {"CLUSTER": "pods", "TPU": "v5litepod-16", "IMAGE": "gcr.io/my/image"}
    environment = os.environ | environment | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [LAUNCH / "xpk.sh", "motion-1", "train", "--workdir=/mnt/a b"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert said[:2] == ["workload", "create"] and "--workload=motion-1" in said
    # A process ends with the first of them when another one was killed.
    assert f"--restart-on-exit-codes={cli.FAULT},{train.RESUME_ME}" in said
    assert "--max-restarts=100" in said
    assert "--termination-grace-period-seconds=300" in said
    command = said[-1].removeprefix("--command=exec dexportrait ")
    assert int(re.search(TIMEOUT, command)[1]) < 300
    assert re.sub(f"{TIMEOUT} ", "", command) == r"train --workdir=/mnt/a\ b "


def test_a_timeout_that_is_given_to_a_launcher_stays():
    """It stands behind the launcher's."""
    flags = ["checkpoint.timeout_seconds=240", "checkpoint.timeout_seconds=100"]
    config = configs.load_config("configs/autoencoder.py:tiny", flags)
    assert config.checkpoint.timeout_seconds == 100


def test_sky_keeps_runs_and_data_in_buckets():
    """Whatever else is written there is lost with the machine; and a bucket of nobody's is no default."""
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert set(task["file_mounts"]) == {"/outputs", "/datasets"}
    for mount in task["file_mounts"].values():
        assert mount["mode"] == "MOUNT"
        assert task["envs"][mount["source"].strip("${}")] is None
    assert '--workdir="/outputs/$RUN"' in task["run"]
    assert '--config.data.path="/datasets/$DATA"' in task["run"]
    assert {75, 137, 143} == set(task["resources"]["job_recovery"]["recover_on_exit_codes"])
    assert "-c constraints.txt" in task["setup"]
    # In a Python that the package takes, whatever the image has.
    project = tomllib.loads((LAUNCH.parent / "pyproject.toml").read_text())["project"]
    version = re.search(r"uv venv .*--python (\S+) ", task["setup"])[1]
    assert version in project["requires-python"]
    activate = '. "$HOME/dexportrait/bin/activate"\n'
    assert activate in task["setup"] and task["run"].startswith(activate)


def test_jobset_starts_as_many_hosts_as_its_config_is_spread_over():
    """Wrong commands and runs that cannot go on end for good; what was stopped, killed or lost starts again."""
    job = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]
    (slices,) = job["replicatedJobs"]
    hosts = slices["template"]["spec"]
    pod = hosts["template"]["spec"]
    (container,) = pod["containers"]
    flags = dict(flag.removeprefix("--").partition("=")[::2] for flag in container["args"][1:])
    topology, count = configs.topology_of(flags["config"])
    assert container["args"][0] in cli.JOBS and flags["distributed"] == "on"
    assert slices["replicas"] == count
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology.partition(":")[2]
    chips_of_a_host = container["resources"]["limits"]["google.com/tpu"]
    assert hosts["parallelism"] * chips_of_a_host == chips.grid(topology)[1]
    assert hosts["completions"] == hosts["parallelism"] and hosts["backoffLimit"] == 0
    timeout = int(flags["config.checkpoint.timeout_seconds"])
    assert timeout < pod["terminationGracePeriodSeconds"]
    assert pod["restartPolicy"] == "Never"  # or Kubernetes takes no podFailurePolicy
    configs.load_config(flags["config"], [])
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"] == {"medium": "Memory"}  # or data workers end by SIGBUS
    (shared,) = [path for path, volume in mounts.items() if "persistentVolumeClaim" in volume]
    assert all(flags[path].startswith(f"{shared}/") for path in ("workdir", "config.data.path"))
    lost, failed = hosts["podFailurePolicy"]["rules"]
    assert lost["action"] == "Count" and "onPodConditions" in lost
    assert failed["action"] == "FailJob"
    assert failed["onExitCodes"]["containerName"] == container["name"]
    assert set(failed["onExitCodes"]["values"]) == {cli.USAGE_ERROR, cli.FAILED}
    (rule,) = job["failurePolicy"]["rules"]
    assert rule == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}


def test_the_image_holds_every_package():
    """And is made from the versions tested together."""
    lines = (LAUNCH / "docker" / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    root = LAUNCH.parent
    assert all((root / name).exists() for name in copied)
    project = tomllib.loads((root / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {pattern.rstrip("*") for pattern in packages} <= copied
    assert {project["project"]["readme"], *project["project"]["license-files"]} <= copied
    (install,) = (line for line in lines if "pip install" in line)
    assert "--constraint constraints.txt" in install
    (extras,) = (line.partition("=")[2] for line in lines if line.startswith("ARG"))
    assert extras in project["project"]["optional-dependencies"]


@pytest.fixture
def started(monkeypatch):
    """Environments of the processes that were started; each ends at SIGTERM, or by itself when it was asked twice."""
    environments = []

    class Process:
        def __init__(self, command, env):
            environments.append(env)
            self.code, self.asked = None, 0
            if len(environments) in sent:
                signal.raise_signal(signal.SIGTERM)

        def poll(self):
            self.asked += 1
            return 0 if self.code is None and self.asked > 1 else self.code

        def terminate(self):
            self.code = -signal.SIGTERM

        def wait(self, seconds):
            return self.code

    sent: list[int] = []
    monkeypatch.setattr(local_processes.subprocess, "Popen", Process)
    monkeypatch.setattr(sys, "argv", ["local_processes", "--processes=3", "--devices=2", "train"])
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    yield environments, sent
    signal.signal(signal.SIGTERM, before)


def test_local_processes_keep_the_flags_of_the_caller(started, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_one=1")
    assert local_processes.main() == 0
    flags = "--xla_one=1 --xla_force_host_platform_device_count=2"
    assert [environment["XLA_FLAGS"] for environment in started[0]] == [flags] * 3
    assert [environment["JAX_PROCESS_ID"] for environment in started[0]] == ["0", "1", "2"]


@pytest.mark.parametrize("number", [1, 3])
def test_sigterm_while_local_processes_are_started_ends_all(started, number):
    started[1].append(number)
    assert local_processes.main() == 128 + signal.SIGTERM
    assert len(started[0]) == 3


def test_one_code_says_start_me_again():
    assert local_processes.RESUME_ME == train.RESUME_ME
