"""`dexportrait import --kind=lpips`: published names in several layouts, equal to the published weights."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from dexportrait_jax import config as configs
from dexportrait_jax.errors import UserError
from dexportrait_jax.models.perceptual import PerceptualNetwork
from dexportrait_jax.state import Network
from dexportrait_jax.tasks import make_task
from dexportrait_jax.weights import lpips, names
from dexportrait_jax.weights.lpips_names import load_perceptual
from dexportrait_jax.weights.published import run_import
from tests.golden.make_lpips import pictures


def tensors_of(params):
    return {key: np.asarray(value) for key, value in names.to_torch(params).items()}


def random_params(network):
    abstract = Network(lambda rngs: PerceptualNetwork(network, rngs=rngs)).abstract
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), abstract)


def split(params):
    """(torchvision's trunk with a classifier, the heads as published)."""
    trunk, heads = {}, {}
    for key, value in tensors_of(params).items():
        if key.startswith("net."):
            trunk["features." + key.split(".", 2)[2]] = value
        else:
            heads[key] = value
    return trunk | {"classifier.6.bias": np.zeros(5, np.float32)}, heads


def one_file(params, folder):
    trunk, heads = split(params)
    save_file(trunk | heads, folder / "both.safetensors")
    return folder / "both.safetensors"


def a_file_each(params, folder):
    trunk, heads = split(params)
    (folder / "parts").mkdir()
    save_file(trunk, folder / "parts" / "trunk.safetensors")
    save_file(heads, folder / "parts" / "heads.safetensors")
    return folder / "parts"


def published_module(params, folder):
    """The state dict of the whole published module: heads under two names, and its constants."""
    tensors = tensors_of(params)
    for index in range(5):
        tensors[f"lins.{index}.model.1.weight"] = tensors[f"lin{index}.model.1.weight"]
    constants = {
        f"scaling_layer.{name}": np.ones((1, 3, 1, 1), np.float32) for name in ("shift", "scale")
    }
    save_file(tensors | constants, folder / "module.safetensors")
    return folder / "module.safetensors"


def heads_in_a_list(params, folder):
    trunk, heads = split(params)
    heads = {key.replace("lin", "lins.", 1): value for key, value in heads.items()}
    save_file(trunk | heads, folder / "list.safetensors")
    return folder / "list.safetensors"


@pytest.mark.parametrize("layout", [one_file, a_file_each, published_module, heads_in_a_list])
def test_every_layout_gives_the_same_parameters(tmp_path, layout):
    params = random_params("alexnet")
    run_import("lpips", str(layout(params, tmp_path)), str(tmp_path / "export"))
    loaded = load_perceptual("alexnet", tmp_path / "export")
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize("network", ["vgg16", "alexnet"])
def test_equals_the_published_weights(tmp_path, network):
    try:
        params = lpips.load_lpips(network)
    except UserError as error:
        pytest.skip(str(error))
    run_import("lpips", str(one_file(params, tmp_path)), str(tmp_path / "export"))
    bound = Network(lambda rngs: PerceptualNetwork(network, rngs=rngs))
    distance = jax.jit(lambda params, x, y: bound.bind(params).lpips(x, y))
    loaded = load_perceptual(network, tmp_path / "export")
    x, y = pictures(0, 64)
    np.testing.assert_array_equal(distance(loaded, x, y), distance(params, x, y))


def test_losses_take_it(tmp_path):
    params = random_params("alexnet")
    run_import("lpips", str(one_file(params, tmp_path)), str(tmp_path / "export"))
    for stage in ("motion", "autoencoder"):
        config = configs.load_config(
            f"configs/{stage}.py:tiny", [f"loss.perceptual_weights={tmp_path / 'export'}"]
        )
        constants = make_task(config).constants()["perceptual"]
        jax.tree.map(np.testing.assert_array_equal, constants, params)


def failure(function, *arguments):
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_does_not_fit_is_one_line(tmp_path):
    out = tmp_path / "export"

    def fails(tensors):
        save_file(tensors, tmp_path / "a.safetensors")
        said = failure(run_import, "lpips", str(tmp_path / "a.safetensors"), str(out))
        assert not out.exists()
        return said

    trunk, heads = split(random_params("alexnet"))
    assert "5 missing: lin0.model.1.weight" in fails(trunk)
    assert "no VGG16 or AlexNet" in fails(heads)
    surplus = {"features.1.weight": np.ones(64, np.float32)}  # of a network with BatchNorm
    assert "1 extra: features.1.weight" in fails(trunk | heads | surplus)
    odd = {"features.0.weight": np.ones((64, 3, 5, 5), np.float32)}
    assert "neither VGG16 nor AlexNet" in fails(trunk | heads | odd)
    narrow = {"lin0.model.1.weight": np.ones((1, 32, 1, 1), np.float32)}
    assert "lin0.model.1.weight is (1, 32, 1, 1), expected (1, 64, 1, 1)" in fails(
        trunk | heads | narrow
    )


def test_an_import_of_the_other_network(tmp_path):
    run_import("lpips", str(one_file(random_params("alexnet"), tmp_path)), str(tmp_path / "export"))
    assert "misshapen" in failure(load_perceptual, "vgg16", tmp_path / "export")


def test_the_same_tensor_in_two_files(tmp_path):
    folder = a_file_each(random_params("alexnet"), tmp_path)
    (folder / "again.safetensors").write_bytes((folder / "heads.safetensors").read_bytes())
    assert "keep one" in failure(run_import, "lpips", str(folder), str(tmp_path / "export"))
