"""Meshes for slices: every one shares its batch, and so does every command that we print."""

import dataclasses
import itertools
import math
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import meshes
from dexportrait_jax import chips, cli, sharding
from dexportrait_jax import config as configs
from dexportrait_jax.errors import UserError
from dexportrait_jax.jobs import JOBS
from dexportrait_jax.sharding import AXES
from dexportrait_jax.train_checks import check, check_shares

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("motion", "autoencoder", "animator_image", "animator_video")
SLICES = [
    f"{kind}:{grid}"
    for kind in ("v5e", "v6e")
    for grid in ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16")
]
SLICES += [
    "v5e:16x16",
    "v6e:16x16",
    "4xv5e:16x16",
    "v5p:2x2x1",
    "v5p:2x2x4",
    "v5p:2x4x4",
    "v5p:4x4x4",
    "v5p:4x4x8",
]

SEVERAL = [
    f"{slices}x{name}"
    for slices, name in (
        (2, "v5e:4x4"),
        (2, "v5e:16x16"),
        (4, "v5e:4x4"),
        (2, "v6e:8x8"),
        (2, "v5p:4x4x4"),
    )
]


def assert_shared(address, overrides=(), topology=None):
    """The config's mesh has all devices of its topology, and batch and targets can be shared by them."""
    config = configs.load_config(address, list(overrides))
    name, slices = configs.topology_of(address) or (topology, 1)
    sizes = {axis: config.mesh[axis] for axis in AXES}
    assert math.prod(sizes.values()) == chips.grid(name)[1] * slices, (address, sizes)
    assert sizes["data"] % slices == 0
    check(config)
    check_shares(config, jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes)))
    return config


@dataclasses.dataclass(frozen=True)
class Device:
    """One that stands in a grid of chips, as JAX describes it."""

    id: int
    device_kind: str
    coords: tuple[int, ...]
    core_on_chip: int
    slice_index: int
    platform: str = "tpu"


def devices_of(where):
    """Those of "2xv6e:4x8"."""
    name, slices = meshes.address(where)
    kind, _, sides = name.partition(":")
    sides = [int(side) for side in sides.split("x")]
    (device_kind, *_) = [known for known, chip in chips.DEVICE_KINDS.items() if chip == kind]
    cores = range(chips.CHIPS[kind].devices)
    # x first, as libtpu counts them.
    grid = [place[::-1] for place in itertools.product(*map(range, sides[::-1]))]
    found = itertools.product(
        range(slices), [(*place, *[0] * (3 - len(place))) for place in grid], cores
    )
    return [
        Device(number, device_kind, place, core, part)
        for number, (part, place, core) in enumerate(found)
    ]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("where", [*SLICES, *SEVERAL, "v4:4x4x4", "tpu7x:2x2x2", "tpu7x:4x4x4"])
def test_every_mesh_can_be_laid_over_its_chips(stage, where):
    """An axis may be a part of a row of chips: a config's sizes follow its batch, and not the grid."""
    devices = devices_of(where)
    config = configs.load_config(f"configs/{stage}.py:full@{where}")
    mesh = sharding.make_mesh(config.mesh, devices)
    assert dict(mesh.shape) == {axis: config.mesh[axis] for axis in AXES}
    assert sorted(device.id for device in mesh.devices.flat) == list(range(len(devices)))
    # Slices lie one after the other along data, and along nothing else.
    parts = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert np.all(parts == parts[:, :1, :1, :1]) and np.all(np.diff(parts[:, 0, 0, 0]) >= 0)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("where", SLICES)
def test_every_slice_shares_the_batch(stage, where):
    plain = configs.load_config(f"configs/{stage}.py:full")
    config = assert_shared(f"configs/{stage}.py:full@{where}")
    # 12 sources and 8 clips are less than a thousand chips can share.
    most = 4 if where == "4xv5e:16x16" else 4 / 3
    assert plain.data.batch_size <= config.data.batch_size <= most * plain.data.batch_size
    assert config.data.targets == plain.data.targets and config.data.frames == plain.data.frames


@pytest.mark.parametrize("stage", STAGES)
def test_sixteen_chips_share_the_batch_of_the_paper(stage):
    plain = configs.load_config(f"configs/{stage}.py:full")
    address = f"configs/{stage}.py:full@v5e:4x4"
    config = assert_shared(address)
    assert config.data.batch_size == plain.data.batch_size and config.mesh.tensor == 1
    assert configs.what_topology_changed(address, config) is None


def test_a_batch_that_was_rounded_up_is_said():
    address = "configs/animator_image.py:full@v5e:8x8"
    said = configs.what_topology_changed(address, configs.load_config(address))
    assert "16 sources instead of 12" in said


def test_a_batch_that_was_given_is_not_said_to_be_the_topologys():
    address, overrides = "configs/animator_image.py:full@v5e:16x16", ["data.batch_size=64"]
    config = configs.load_config(address, overrides)
    assert config.data.batch_size == 64
    assert configs.what_topology_changed(address, config, overrides) is None


def test_what_is_given_stays():
    address = "configs/animator_image.py:full@v5e:16x16"
    config = assert_shared(
        address, ["data.batch_size=64", "remat=none", "mesh.data=64", "mesh.fsdp=1"]
    )
    assert (config.data.batch_size, config.remat, config.mesh.data) == (64, "none", 64)
    assert (config.mesh.context, config.mesh.tensor, config.accumulate) == (4, 1, 1)
    with pytest.raises(UserError, match="batch_size=12 cannot be shared by 256 devices; choose 16"):
        configs.load_config(address, ["data.batch_size=12"])


@pytest.mark.parametrize(
    ("sources", "targets", "devices", "found"),
    [
        # parts, context, tensor, accumulate, sources, at once
        (28, 4, 16, (4, 4, 1, 7, 28, 1)),
        (28, 4, 32, (32, 1, 1, 1, 32, 4)),
        (12, 4, 64, (16, 4, 1, 1, 16, 1)),
        (12, 4, 256, (16, 4, 4, 1, 16, 1)),
        (8, 24, 64, (8, 8, 1, 1, 8, 3)),
        (32, 4, 8, (8, 1, 1, 4, 32, 4)),
        (5, 1, 1, (1, 1, 1, 5, 5, 1)),  # of five sources equal parts are one or all
    ],
)
def test_the_least_work_first(sources, targets, devices, found):
    assert meshes.spread(sources, targets, devices, 4) == meshes.Spread(*found)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("configs/motion.py:full@v9:4x4", "kinds of chips are v4, v5e"),
        ("configs/motion.py:full@v5e:4", "grid of 2 sides, as in v5e:4x4"),
        ("configs/motion.py:full@0xv5e:4x4", "kinds of chips"),
        ("configs/motion.py:tyni@v5e:4x4", "did you mean 'tiny'"),
    ],
)
def test_wrong_topologies(address, words):
    with pytest.raises(UserError, match=words) as caught:
        configs.load_config(address)
    assert "\n" not in str(caught.value)


def test_an_at_sign_in_a_folder_is_no_topology(tmp_path):
    folder = tmp_path / "me@home"
    folder.mkdir()
    (folder / "mine.py").write_text((ROOT / "configs" / "autoencoder.py").read_text())
    assert configs.topology_of(f"{folder}/mine.py:tiny") is None
    assert configs.load_config(f"{folder}/mine.py:tiny").variant == "tiny"
    assert_shared(f"{folder}/mine.py:full@v6e:4x4")


def commands():
    """Every `dexportrait train` and `plan` of the README, the jobs' help, the launchers and the configs."""
    files = [ROOT / "README.md", *(ROOT / "launch").iterdir(), *(ROOT / "configs").glob("*.py")]
    texts = [file.read_text() for file in files if file.is_file()]
    texts += [f"{job.example}\n" for job in JOBS.values()]
    for text in texts:
        joined = re.sub(r"\\+\n\s*#?\s*", " ", text)
        start = r"(?:dexportrait|launch/\S+(?: \S+)?) "
        yield from re.findall(start + r"((?:train|plan) --config=[^`\n]*)", joined)


def test_every_command_that_we_print_can_be_shared():
    found = list(commands())
    assert len(found) >= 10 and sum(line.startswith("plan") for line in found) >= 2
    spread = 0
    for line in found:
        if "$CONFIG" in line or " ... " in line:
            continue
        job, *arguments = shlex.split(line, comments=True)
        flags, _ = cli._parse(job, JOBS[job], arguments)
        topology = flags.get("topology")
        if topology or configs.topology_of(flags["config"]):
            assert_shared(flags["config"], flags["overrides"], topology)
            spread += 1
        else:
            assert job == "train", f"{line}: no topology"
            configs.load_config(flags["config"], flags["overrides"])
    assert spread >= 3
