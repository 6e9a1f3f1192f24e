"""The warp compiled for a TPU that is not there (compiled, not run): no scatter in the forward pass."""

import importlib.util
import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from dexportrait_jax import geometry

device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
place = SingleDeviceSharding(device)
shapes = [(2, 16, 64, 64, 32), (2, 3, 4), (2, 3, 4)]
arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for shape in shapes]
compiled = jax.jit(geometry.warp).lower(*arguments).compile()
print(compiled.as_text())
"""


def test_forward_for_v5e_holds_no_scatter():
    """At the paper's volume, two of them; the text is that of the optimised program."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed; it comes with pip install -e '.[tpu]'")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "gather" in done.stdout
    assert "scatter" not in done.stdout
