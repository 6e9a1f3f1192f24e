"""Chips' figures beside JAX's own table, and the topologies that libtpu knows."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
from jax.experimental.pallas import tpu as pallas_tpu

from dexportrait_jax import chips
from dexportrait_jax.errors import UserError
from dexportrait_jax.jobs import JOBS

VERSIONS = pallas_tpu.ChipVersion
# JAX's name, and how many cores JAX sees as one device.
SAME = {
    "v4": (VERSIONS.TPU_V4, 2),
    "v5e": (VERSIONS.TPU_V5E, 1),
    "v5p": (VERSIONS.TPU_V5P, 2),
    "v6e": (VERSIONS.TPU_V6E, 1),
    "tpu7x": (VERSIONS.TPU_7X, 1),
}


@pytest.mark.parametrize("kind", chips.CHIPS)
def test_figures_are_those_of_jax(kind):
    """Two tables of the same maker: within 15 %, which is what they differ by in the bandwidth of v5p."""
    version, cores = SAME[kind]
    chip, listed = chips.CHIPS[kind], pallas_tpu.get_tpu_info_for_chip(version, cores)
    assert chip.flops == pytest.approx(cores * listed.bf16_ops_per_second, rel=0.02)
    assert chip.hbm_bytes == pytest.approx(cores * listed.mem_bw_bytes_per_second, rel=0.15)
    assert chip.hbm_gib * chips.GIB <= cores * listed.hbm_capacity_bytes


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v9:4x4", "v4, v5e, v5p, v6e, tpu7x"),
        ("v5e", "grid of 2 sides, as in v5e:4x4"),
        ("v5e:4x4x4", "grid of 2 sides"),
        ("v5p:4x4", "grid of 3 sides, as in v5p:2x2x4"),
        ("v5e:0x4", "grid of 2 sides"),
    ],
)
def test_no_such_topology(name, said):
    with pytest.raises(UserError) as caught:
        chips.topology(name)
    assert said in str(caught.value) and name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_slices_that_cannot_be():
    with pytest.raises(UserError, match="--slices=0"):
        chips.topology("v5e:4x4", 0)
    with pytest.raises(UserError, match="not published"):
        chips.topology("v4:2x2x2", 2)


PROGRAM = """
import json
from dexportrait_jax import chips
from dexportrait_jax.errors import UserError
found = {}
for name, slices in [("v4:2x2x2", 1), ("v5e:1x1", 1), ("v5e:16x16", 1), ("v5p:4x4x4", 1), ("v6e:4x4", 2),
                     ("tpu7x:2x2x1", 1)]:
    chip, devices = chips.topology(name, slices)
    found[name] = [len(devices), [getattr(device, "slice_index", 0) or 0 for device in devices]]
try:
    chips.topology("v5e:3x5")
except UserError as error:
    found["error"] = str(error)
print(json.dumps(found))
"""


def said_with_libtpu(program):
    """What a program, run with `plan`'s environment, prints last, as JSON."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install -e '.[tpu]' -c constraints.txt")
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | dict(JOBS["plan"].environment),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_devices_of_libtpu():
    found = said_with_libtpu(PROGRAM)
    assert "libtpu does not know this grid" in found.pop("error")
    assert {name: count for name, (count, _) in found.items()} == {
        "v4:2x2x2": 8,
        "v5e:1x1": 1,
        "v5e:16x16": 256,
        "v5p:4x4x4": 64,
        "v6e:4x4": 32,
        "tpu7x:2x2x1": 8,  # two devices a chip
    }
    assert found["v6e:4x4"][1] == [0] * 16 + [1] * 16


# A program that is its argument and its result, each half of what it takes.
LIMITS = """
import json
import jax
from jax.sharding import SingleDeviceSharding
from dexportrait_jax import chips, compiling

found = {}
for kind, chip in chips.CHIPS.items():
    device = chips.topology(f"{kind}:{'x'.join('1' * chip.dimensions)}")[1][0]

    def lowered(gib):
        shape = (round(gib * chips.GIB / 2 / 4096), 1024)
        given = jax.ShapeDtypeStruct(shape, "float32", sharding=SingleDeviceSharding(device))
        return jax.jit(lambda x: x + 1).lower(given)

    answers = [
        compiling.compiled(lambda: lowered(share * chip.hbm_gib), kind, "quick") for share in (0.995, 1.02)
    ]
    try:
        lowered(2 * chip.hbm_gib).compile()
    except jax.errors.JaxRuntimeError as error:
        found[kind] = answers, str(error)
print(json.dumps(found))
"""


def test_memory_of_every_chip_is_what_its_compiler_says():
    """A little less than all of it fits, a little more does not; and the message names the size that we have."""
    found = said_with_libtpu(LIMITS)
    assert list(found) == list(chips.CHIPS)
    for kind, ((less, more), message) in found.items():
        limit = chips.CHIPS[kind].hbm_gib
        said = re.search(r"exceeds available HBM \(([\d.]+)G\)|of ([\d.]+)G hbm", message)
        assert said and float(said[1] or said[2]) == limit, (kind, message)
        assert less["fits"] and less["hbm_gib_per_device"] == pytest.approx(0.995 * limit, rel=1e-3)
        assert not more["fits"]
        assert more["hbm_gib_per_device"] == pytest.approx(1.02 * limit, rel=1e-3)


# A convolution whose weights lie in quarters.
IN_PARTS = """
import json
import jax
import ml_collections
from jax.sharding import NamedSharding, PartitionSpec
from dexportrait_jax import chips, compiling, sharding
from dexportrait_jax.platforms import jit_on

_, devices = chips.topology("v5e:2x2")
sizes = {"data": 1, "fsdp": 4, "context": 1, "tensor": 1}
mesh = sharding.make_mesh(ml_collections.ConfigDict(sizes), devices)

def placed(shape, *axes):
    return jax.ShapeDtypeStruct(shape, "bfloat16", sharding=NamedSharding(mesh, PartitionSpec(*axes)))

given = placed((64, 32, 32, 256), "fsdp"), placed((3, 3, 256, 256), None, None, "fsdp")

def convolve(inputs, kernel):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(inputs, kernel, (1, 1), "SAME", dimension_numbers=layout)

ways = {"plain": jax.jit, "ours": lambda function: jit_on(mesh, function)}
print(json.dumps({
    name: compiling.compiled(lambda: jit(convolve).lower(*given), name, "quick")["collectives"]
    for name, jit in ways.items()
}))
"""


def test_weights_in_parts_are_gathered_and_not_multiplied_part_by_part():
    """Three quarters of a kernel of bfloat16 come to each device, whatever way."""
    received = 3 * 3 * 256 * 256 * 2 * 3 // 4
    found = said_with_libtpu(IN_PARTS)
    assert found["plain"] == {"collective-permute": {"count": 3, "bytes": received}}
    assert found["ours"] == {"all-gather": {"count": 1, "bytes": received}}
