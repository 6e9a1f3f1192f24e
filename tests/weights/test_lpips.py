"""Published LPIPS weights: read without running anything, equal to the published package."""

import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dexportrait_jax import assets, package_index
from dexportrait_jax.errors import UserError
from dexportrait_jax.models.perceptual import PerceptualNetwork
from dexportrait_jax.state import Network
from dexportrait_jax.weights import lpips, names
from tests.golden.make_lpips import pictures

GOLDEN = Path(__file__).parents[1] / "golden" / "lpips.json"


def _distance(network, params, x, y):
    bound = Network(lambda rngs: PerceptualNetwork(network, rngs=rngs))
    return jax.jit(lambda params, x, y: bound.bind(params).lpips(x, y))(params, x, y)


@pytest.fixture(scope="module", params=["vgg16", "alexnet"])
def published(request):
    """The published weights; the test is skipped where they cannot be had."""
    try:
        return request.param, lpips.load_lpips(request.param)
    except UserError as error:
        pytest.skip(str(error))


def test_same_numbers_as_the_published_package(published):
    network, params = published
    for size, expected in json.loads(GOLDEN.read_text())["lpips"][network].items():
        x, y = pictures(0, int(size))
        np.testing.assert_allclose(_distance(network, params, x, y), expected, rtol=1e-4, atol=0)


def test_weights_fit_the_network_and_heads_are_not_negative(published):
    network, params = published
    abstract = Network(lambda rngs: PerceptualNetwork(network, rngs=rngs)).abstract
    again = names.from_torch(names.to_torch(params), abstract)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert all(params[f"lin{i}"]["model"]["1"]["kernel"].min() >= 0 for i in range(5))


def _fake_published(network):
    """A random tree in the layout of the published pickles."""
    abstract = Network(lambda rngs: PerceptualNetwork(network, rngs=rngs)).abstract
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), abstract)
    backbone, count = {}, 0
    for index, numbers in enumerate(lpips._CONVOLUTIONS[network]):
        for number in numbers:
            backbone[f"Conv_{count}"] = params["net"][f"slice{index + 1}"][str(number)]
            count += 1
    tree = {lpips._BACKBONES[network]: backbone}
    for index in range(5):
        tree[f"NetLinLayer_{index}"] = {"Conv_0": params[f"lin{index}"]["model"]["1"]}
    return tree, params


def test_cached_as_safetensors_and_rebuilt_when_damaged(tmp_path, monkeypatch):
    tree, params = _fake_published("alexnet")
    source = tmp_path / "alexnet.ckpt"
    source.write_bytes(pickle.dumps(tree))
    calls = []
    monkeypatch.setenv("DEXPORTRAIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "fetch", lambda name: calls.append(name) or source)
    cached = tmp_path / "cache" / "lpips_alexnet.safetensors"
    for expected_calls in (1, 1):
        jax.tree.map(np.testing.assert_array_equal, lpips.load_lpips("alexnet"), params)
        assert len(calls) == expected_calls
    assert [path.name for path in cached.parent.iterdir()] == [cached.name]
    data = bytearray(cached.read_bytes())
    data[-2] ^= 1
    cached.write_bytes(data)
    jax.tree.map(np.testing.assert_array_equal, lpips.load_lpips("alexnet"), params)
    assert len(calls) == 2


class _Runs:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path, protocol):
    trace, path = tmp_path / "trace", tmp_path / "weights.ckpt"
    for payload in (
        _Runs(os.system, f"touch {trace}"),
        _Runs(eval, f"open({str(trace)!r}, 'w')"),
        _Runs(np.save, str(trace), np.zeros(1)),
        _Runs(__import__, "this"),
    ):
        path.write_bytes(pickle.dumps({"AlexNet_0": payload}, protocol))
        with pytest.raises(UserError, match="refused"):
            lpips.read_arrays(path)
    assert not trace.exists() and not trace.with_suffix(".npy").exists()


def test_arrays_of_objects_are_refused(tmp_path):
    path = tmp_path / "weights.ckpt"
    path.write_bytes(pickle.dumps(np.array([_Runs(os.system, "true")], dtype=object), 2))
    with pytest.raises(UserError):
        lpips.read_arrays(path)


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps({"a": np.ones(5)}, 2)[:40]])
def test_broken_files_are_one_line(tmp_path, content):
    path = tmp_path / "weights.ckpt"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        lpips.read_arrays(path)
    assert "\n" not in str(error.value)


def test_a_file_of_the_other_network():
    with pytest.raises(UserError, match="VGG16_0"):
        lpips.from_published("vgg16", _fake_published("alexnet")[0])


@pytest.mark.slow
@pytest.mark.parametrize("network", ["vgg16", "alexnet"])
def test_against_the_published_code_itself(tmp_path, network):
    """Runs the package's own source, taken out of its archive, on other pictures."""
    package = assets.ASSETS["lpips_vgg16"].package
    archive = tmp_path / package.filename
    for index in package_index.index_urls():
        try:
            entry = package_index.find(index, package.project, package.filename)
            package_index.download(entry.url, archive, entry.sha256)
            break
        except package_index.Unavailable:
            continue
    else:
        pytest.skip("no package index in reach")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    directory = tmp_path / package.filename.removesuffix(".tar.gz")
    code = (
        "import json, sys; from tests.golden.make_lpips import pictures, published; "
        "print(json.dumps(published(sys.argv[1], sys.argv[2], *pictures(5, 80))))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(directory), network]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=300)
    assert result.returncode == 0, result.stderr
    x, y = map(jnp.asarray, pictures(5, 80))
    ours = _distance(network, lpips.load_lpips(network), x, y)
    np.testing.assert_allclose(ours, json.loads(result.stdout), rtol=1e-4, atol=0)
