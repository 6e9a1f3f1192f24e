"""Exports come back exactly, and whatever does not fit is one line."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from dexportrait_jax.errors import UserError
from dexportrait_jax.weights.exporting import export_groups
from dexportrait_jax.weights.importing import load_groups
from tests.weights.test_exporting import MODEL, _groups


@pytest.fixture
def export(tmp_path):
    return export_groups(tmp_path / "export", MODEL, _groups())


def _abstract(groups):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), groups)


def _same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("with_networks", [True, False])
def test_round_trip_is_exact(export, with_networks):
    groups = _groups()
    model, loaded = load_groups(export, _abstract(groups) if with_networks else None)
    assert model["step"] == 7
    _same(groups, loaded)


def test_only_what_is_wanted_is_read(export):
    (export / "encoder.safetensors").write_bytes(b"not looked at")
    _, loaded = load_groups(export, ["decoder"], stage=("animator_image", "motion"))
    _same({"decoder": _groups()["decoder"]}, loaded)


def _failure(*arguments, **keywords):
    with pytest.raises(UserError) as error:
        load_groups(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_corrupted_file(export):
    file = export / "encoder.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    assert "corrupted" in _failure(export)


def test_missing_file(export):
    (export / "decoder.safetensors").unlink()
    assert "decoder.safetensors" in _failure(export)


def test_another_stage(export):
    message = _failure(export, stage="animator_video")
    assert "'motion'" in message and "'animator_video'" in message


def test_another_width_names_the_shapes(export):
    message = _failure(export, {"encoder": _abstract(_groups(width=6)["encoder"])})
    assert "conv.weight is (4, 2, 3, 3), expected (6, 2, 3, 3)" in message


def test_group_that_is_not_there(export):
    message = _failure(export, ["denoiser"])
    assert "no denoiser" in message and "decoder, encoder" in message


def test_not_an_export(tmp_path, export):
    nothing = _failure(tmp_path / "nowhere")
    assert "model.json" in nothing and "dexportrait import --kind=" in nothing
    (export / "model.json").write_text("{")
    assert "model.json" in _failure(export)
    (export / "model.json").write_text(json.dumps({"format": "something else"}))
    assert "something else" in _failure(export)


def test_a_description_cannot_lead_out_of_the_directory(export, tmp_path):
    model = json.loads((export / "model.json").read_text())
    (export / "decoder.safetensors").rename(tmp_path / "decoder.safetensors")
    model["groups"]["decoder"]["file"] = "../decoder.safetensors"
    (export / "model.json").write_text(json.dumps(model))
    assert "missing" in _failure(export, ["decoder"])


# A job alone in a process, which says how many KiB more than before it held at most. Tensors are drawn beforehand.
# VmHWM and not ru_maxrss: the latter is handed on through fork and exec, so it is at least what the tests hold.
_MEASURED = """
import pathlib, re, sys
import numpy as np
from dexportrait_jax.weights import exporting, importing

def held(which):
    return int(re.search(which + r":\\s*(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])

def layer():
    return {"kernel": np.ones((3, 3, 256, 1024), np.float32), "bias": np.zeros(1024, np.float32)}

job, directory = sys.argv[1:]
if job == "export":
    groups = {"group": {str(number): layer() for number in range(16)}}
    start = held("VmRSS")
    model = {"stage": "motion", "config": {}, "step": 0, "ema": False, "crop": None}
    exporting.export_groups(directory, model, groups)
else:
    start = held("VmRSS")
    importing.load_groups(directory)
print(held("VmHWM") - start)
"""


def _held(job, directory):
    """MB."""
    command = [sys.executable, "-c", _MEASURED, job, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout) * 1024 / 1e6


@pytest.mark.xdist_group("memory")
def test_exporting_and_loading_hold_one_tensor_more_than_the_weights(tmp_path):
    """151 MB in 16 kernels, each turned round on its way; everything of the process counted."""
    megabytes = 16 * 9 * 256 * 1024 * 4 / 1e6
    assert _held("export", tmp_path / "export") < 0.3 * megabytes
    assert _held("load", tmp_path / "export") < 1.3 * megabytes
