"""What the README tells people to type: jobs, flags, config keys and benchmarks that are there."""

import re
import shlex
from pathlib import Path

import pytest

from dexportrait_jax import cli
from dexportrait_jax.config import load_config
from dexportrait_jax.jobs import JOBS
from tests.benchmarks.__main__ import NAMES

README = Path("README.md").read_text()
BLOCKS = "\n".join(re.findall(r"^```\n(.*?)^```", README, re.DOTALL | re.MULTILINE))
LINES = BLOCKS.replace("\\\n", " ").splitlines()
COMMANDS = [line for line in LINES if line.startswith("dexportrait ") and "..." not in line]


@pytest.mark.parametrize("command", COMMANDS)
def test_jobs_flags_and_keys(command):
    """`[--flag]` may be given or not; here it is."""
    _, name, *words = shlex.split(command.replace("[", "").replace("]", ""), comments=True)
    flags, _ = cli._parse(name, JOBS[name], words)
    if flags.get("overrides"):
        load_config(flags["config"], flags["overrides"])


def test_every_benchmark_is_named_and_each_name_is_one():
    named = set(re.findall(r"tests\.benchmarks (\w+)", README))
    assert named <= set(NAMES)
    assert {"animator", "animator_ablation", "profile_identity", "ablation"} <= named
    assert len(COMMANDS) > 30
