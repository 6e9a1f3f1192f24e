"""Which of a folder's files `import` takes: always the same, told, and every one of them can be had."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from dexportrait_jax.errors import UserError
from dexportrait_jax.weights.tensor_files import TensorFiles

STEM = "diffusion_pytorch_model"
PLAIN, HALF = f"{STEM}.safetensors", f"{STEM}.fp16.safetensors"
LIVE = f"{STEM}.non_ema.safetensors"


def written(folder, *files):
    """Each file holds one tensor, whose value says which file it is: its place in the list."""
    for number, file in enumerate(files):
        save_file({"weight": np.full(2, number, np.float32)}, folder / file)


def sharded(folder, index, shards):
    """A tensor a shard."""
    keys = {f"part{number}": shard for number, shard in enumerate(shards)}
    for key, shard in keys.items():
        save_file({key: np.ones(2, np.float32)}, folder / shard)
    (folder / index).write_text(json.dumps({"weight_map": keys}))


def taken(source):
    files = TensorFiles(source)
    return [file.name for file in files.files], " ".join(files.notes)


def refused(source, **settings):
    with pytest.raises(UserError) as caught:
        TensorFiles(source, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_plain_file_is_taken_and_the_others_are_told(tmp_path):
    written(tmp_path, LIVE, HALF, PLAIN, "v1-5-pruned.safetensors")
    (name,), said = taken(tmp_path)
    assert name == PLAIN
    assert all(other in said for other in (PLAIN, LIVE, HALF, "v1-5-pruned.safetensors"))
    assert taken(tmp_path / LIVE) == ([LIVE], "")


@pytest.mark.parametrize(
    ("there", "first"),
    [
        ([HALF, LIVE], HALF),
        ([f"{STEM}.bf16.safetensors", HALF], HALF),
        ([LIVE, f"{STEM}.ema.safetensors"], f"{STEM}.ema.safetensors"),
        (["model.fp16.safetensors", "model.fp32.safetensors"], "model.fp32.safetensors"),
    ],
)
def test_without_a_plain_file_the_order_is_fixed(tmp_path, there, first):
    written(tmp_path, *there)
    files, said = taken(tmp_path)
    assert files == [first] and all(name in said for name in there)


@pytest.mark.parametrize("name", [HALF, LIVE, "model.fp16.safetensors"])
def test_a_variant_alone_is_read(tmp_path, name):
    written(tmp_path, name)
    files, said = taken(tmp_path)
    assert files == [name] and "is all there is" in said


@pytest.mark.parametrize(
    ("index", "form"),
    [
        (f"{STEM}.safetensors.index.fp16.json", STEM + "-0000{}-of-00002.fp16.safetensors"),
        (f"{STEM}.safetensors.index.fp16.json", STEM + ".fp16-0000{}-of-00002.safetensors"),
        (f"{STEM}.fp16.safetensors.index.json", STEM + ".fp16-0000{}-of-00002.safetensors"),
        ("model.safetensors.index.fp16.json", "model.fp16-0000{}-of-00002.safetensors"),
    ],
)
def test_shards_of_a_variant(tmp_path, index, form):
    """As diffusers and transformers name them, now and before."""
    shards = [form.format(number) for number in (1, 2)]
    sharded(tmp_path, index, shards)
    assert taken(tmp_path)[0] == shards
    plain = f"{index.split('.')[0]}.safetensors"
    written(tmp_path, plain)
    files, said = taken(tmp_path)
    assert files == [plain] and all(shard in said for shard in shards)
    assert taken(tmp_path / index)[0] == shards
    (tmp_path / plain).unlink()
    (tmp_path / shards[1]).unlink()
    assert f"missing: {shards[1]}" in refused(tmp_path)


def test_a_single_model_says_nothing(tmp_path):
    written(tmp_path, PLAIN)
    assert taken(tmp_path) == ([PLAIN], "")
    (tmp_path / PLAIN).rename(tmp_path / "anything.safetensors")
    assert taken(tmp_path) == (["anything.safetensors"], "")


def test_several_models_are_refused(tmp_path):
    written(tmp_path, "unet.safetensors", "vae.safetensors")
    said = refused(tmp_path)
    assert "several models: unet.safetensors, vae.safetensors; give one of them" in said
    files = [tmp_path / "unet.safetensors", tmp_path / "vae.safetensors"]
    save_file({"other": np.ones(2, np.float32)}, files[1])
    assert TensorFiles(tmp_path, several=True).files == files
    for file, name in zip(files, ("model.safetensors", PLAIN), strict=True):
        file.rename(tmp_path / name)
    assert "several models" in refused(tmp_path, several=True)


def test_shards_without_an_index_are_one_model(tmp_path):
    sharded(
        tmp_path, "unused", ["unet-00001-of-00002.safetensors", "unet-00002-of-00002.safetensors"]
    )
    (tmp_path / "unused").unlink()
    assert set(TensorFiles(tmp_path).shapes) == {"part0", "part1"}


def test_the_folders_of_a_pipeline_are_named(tmp_path):
    (tmp_path / "vae").mkdir()
    written(tmp_path / "vae", PLAIN)
    assert refused(tmp_path).endswith("give one of its folders vae")
    said = refused(tmp_path, folder="unet")  # the network that is looked for is not there
    assert "nor a folder 'unet' with any; give what does (its folders vae hold other models" in said
