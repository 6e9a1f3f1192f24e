"""`dexportrait import` of ConvNeXtV2: the numbers of transformers, memory, and files that do not fit."""

import json
import os
import pickle
import re
import shlex
import tempfile
import tracemalloc
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import save_file
from transformers import ConvNextV2Config, ConvNextV2Model

from dexportrait_jax import cli, programs, sharding
from dexportrait_jax import config as configs
from dexportrait_jax.errors import UserError
from dexportrait_jax.models.motion.pose import ConvNeXtV2, PoseEncoder
from dexportrait_jax.state import Network, filled
from dexportrait_jax.tasks import make_task
from dexportrait_jax.weights import convnextv2, published
from dexportrait_jax.weights.convnextv2 import IMAGENET, load_trunk
from dexportrait_jax.weights.exporting import export_groups
from dexportrait_jax.weights.importing import load_groups
from tests.published import randomise, relative_error

SMALL = {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32)}
TINY = {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)}

TO_TIMM = (
    (r"^embeddings\.patch_embeddings\.", "stem.0."),
    (r"^embeddings\.layernorm\.", "stem.1."),
    (r"^encoder\.stages\.(\d+)\.downsampling_layer\.", r"stages.\1.downsample."),
    (r"^encoder\.stages\.(\d+)\.layers\.", r"stages.\1.blocks."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."),
    (r"\.grn\.", ".mlp.grn."),
    (r"\.layernorm\.", ".norm."),
    (r"^layernorm\.", "head.norm."),
)


def published_config(sizes):
    return ConvNextV2Config(
        depths=list(sizes["depths"]), hidden_sizes=list(sizes["dims"]), layer_norm_eps=1e-6
    )


def published_model(sizes=SMALL):
    """transformers' model with random weights, none at a special value."""
    return randomise(ConvNextV2Model(published_config(sizes)))


def in_timm_s_names(state_dict):
    """Tensors of transformers as timm names and shapes them."""
    tensors = {}
    for key, value in state_dict.items():
        for pattern, replacement in TO_TIMM:
            key = re.sub(pattern, replacement, key)
        tensors[key] = value.reshape(-1) if ".grn." in key else value
    return tensors


def timm_tensors(model):
    """The weights as in a file of timm, with a classifier."""
    tensors = {key: value.numpy() for key, value in in_timm_s_names(model.state_dict()).items()}
    width = tensors["head.norm.weight"].size
    return tensors | {"head.fc.weight": np.ones((10, width), np.float32)}


def transformers_tensors(model, prefix=""):
    return {prefix + key: value.numpy() for key, value in model.state_dict().items()}


def written(path, tensors):
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, path)
    return path


def as_timm_file(model, folder):
    return written(folder / "timm.safetensors", timm_tensors(model))


def as_classifier_file(model, folder):
    tensors = transformers_tensors(model, "convnextv2.")
    return written(folder / "a.safetensors", tensors | {"classifier.bias": np.zeros(9, np.float32)})


def as_folder(model, folder):
    model.save_pretrained(folder / "whole")
    return folder / "whole"


def as_shards(model, folder):
    model.save_pretrained(folder / "shards", max_shard_size="20KB")
    assert len(list((folder / "shards").glob("*.safetensors"))) > 1
    return folder / "shards"


def features_error(out, model, sizes, side):
    """How far our features are from transformers', with the imported weights."""
    network = Network(lambda rngs: ConvNeXtV2(**sizes, rngs=rngs))
    _, groups = load_groups(out, {"pose": network.abstract}, stage=published.STAGE)
    image = np.random.default_rng(0).standard_normal((2, side, side, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = model(torch.tensor(image.transpose(0, 3, 1, 2))).pooler_output
    ours = jax.jit(lambda params, image: network.bind(params).features(image))(
        groups["pose"], image
    )
    return relative_error(ours, theirs)


@pytest.mark.parametrize("layout", [as_timm_file, as_classifier_file, as_folder, as_shards])
def test_import_equals_transformers(tmp_path, layout, capsys):
    model = published_model()
    source = layout(model, tmp_path)
    out = tmp_path / "export"
    assert cli.run(["import", "--kind=convnextv2", f"--source={source}", f"--out={out}"]) == 0
    assert features_error(out, model, SMALL, 64) <= 1e-4
    described = json.loads((out / "model.json").read_text())["config"]
    assert (tuple(described["depths"]), tuple(described["dims"])) == (
        SMALL["depths"],
        SMALL["dims"],
    )
    said = capsys.readouterr().out
    assert "--config.init.pose" in said
    assert ("left out" in said) == (layout in (as_timm_file, as_classifier_file))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [as_timm_file, as_folder])
def test_import_of_the_real_size(tmp_path, layout):
    """ConvNeXtV2-Tiny, 27.9 M parameters: the numbers, and memory of little more than one tensor."""
    model = published_model(TINY)
    source = layout(model, tmp_path)
    published.run_import("convnextv2", str(source), str(tmp_path / "warm"))
    tracemalloc.start()
    published.run_import("convnextv2", str(source), str(tmp_path / "export"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    group = json.loads((tmp_path / "export" / "model.json").read_text())["groups"]["pose"]
    assert group["parameters"] == pytest.approx(27.87e6, rel=5e-3)
    # The file itself is mapped, not copied: with all of it in memory this is 1.3 times the file.
    assert peak <= 0.3 * 4 * group["parameters"]
    assert features_error(tmp_path / "export", model, TINY, 224) <= 1e-4


def test_timm_names_are_timm_s():
    """Every tensor that timm's own ConvNeXtV2-Tiny has, by name and shape, has one place here, and none is over.

    The names that the other tests give a random model are ours to get wrong; these are from the package.
    """
    golden = json.loads((Path(__file__).parents[1] / "golden" / "timm_names.json").read_text())
    shapes = {key: tuple(shape) for key, shape in golden["shapes"].items()}
    classifier = {"head.fc.weight", "head.fc.bias"}
    with torch.device("meta"):
        drawn = in_timm_s_names(ConvNextV2Model(published_config(TINY)).state_dict())
    assert {key: tuple(value.shape) for key, value in drawn.items()} == {
        key: shape for key, shape in shapes.items() if key not in classifier
    }

    class Files:  # shapes are all that a plan looks at
        source = "timm"

    files = Files()
    files.shapes = shapes
    plan = convnextv2.plan(files)
    abstract, found = plan.groups["pose"]
    assert set(plan.left_out) == classifier
    assert sorted(found.values()) == sorted(shapes.keys() - classifier)
    assert found.keys() == published.shapes(abstract).keys()
    assert (plan.config["depths"], plan.config["dims"]) == (TINY["depths"], TINY["dims"])


def imported(tmp_path, model):
    out = tmp_path / "export"
    if not out.exists():
        published.run_import("convnextv2", str(as_timm_file(model, tmp_path)), str(out))
    return out


def test_pose_encoder_sees_what_the_weights_were_trained_on(tmp_path):
    """The trunk under our input, [-1, 1], gives what transformers gives for ImageNet's; heads stay."""
    model = published_model()
    network = Network(lambda rngs: PoseEncoder(**SMALL, rngs=rngs))
    fresh = network.init(jax.random.key(0))
    params = filled(load_trunk(imported(tmp_path, model), network.abstract), fresh)
    for key in ("fc_pitch", "fc_yaw", "fc_roll", "fc_t", "fc_scale"):
        jax.tree.map(np.testing.assert_array_equal, params[key], fresh[key])
    picture = np.random.default_rng(0).uniform(0, 1, (2, 64, 64, 3)).astype(np.float32)
    normalised = (picture - np.array(IMAGENET["mean"])) / np.array(IMAGENET["deviation"])
    with torch.no_grad():
        theirs = model(
            torch.tensor(normalised.transpose(0, 3, 1, 2), dtype=torch.float32)
        ).pooler_output
    heads = {name: np.asarray(params[f"fc_{name}"]["kernel"]) for name in ("t", "yaw")}
    _, raw = jax.jit(lambda params, image: network.bind(params)(image))(params, 2 * picture - 1)
    for name, kernel in heads.items():
        expected = theirs.numpy() @ kernel
        assert relative_error(np.asarray(raw[name]), expected) <= 1e-4


@pytest.mark.slow
def test_motion_trainer_starts_from_it_and_from_a_motion_export(tmp_path):
    config = configs.load_config("configs/motion.py:tiny")
    sizes = {key: config.model.pose[key] for key in ("depths", "dims")}
    out = imported(tmp_path, published_model(sizes))
    assert make_task(config).pretrained() == {}
    configs.apply_override(config, f"init.pose={out}")
    task = make_task(config)
    trunk = task.pretrained()["pose"]
    assert set(trunk) == {"downsample_layers", "stages", "norm"}

    abstract = programs.abstract_state(task, config)
    mesh = sharding.make_mesh(config.mesh, rows=config.data.batch_size)
    state = programs.first_state(task, config, sharding.state_shardings(abstract, mesh))
    started = state["params"]["pose"]
    key = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(b"pose"))
    fresh = task.networks["pose"].init(key)
    jax.tree.map(np.testing.assert_array_equal, started, filled(trunk, fresh))
    jax.tree.map(np.testing.assert_array_equal, state["ema"]["pose"], started)

    # An encoder that was trained here has our input already: taken as it is, without its heads.
    whole = jax.tree.map(np.asarray, task.networks["pose"].init(jax.random.key(3)))
    model = {"stage": "motion", "config": {}, "step": 1, "ema": True, "crop": None}
    export_groups(tmp_path / "motion", model, {"pose": whole})
    taken = load_trunk(tmp_path / "motion", task.networks["pose"].abstract)
    assert set(taken) == set(trunk)
    for key in taken:
        jax.tree.map(np.testing.assert_array_equal, taken[key], whole[key])


def test_another_size_than_the_config_is_one_line(tmp_path):
    network = Network(lambda rngs: PoseEncoder(**TINY, rngs=rngs))
    with pytest.raises(UserError, match="missing.*misshapen") as error:
        load_trunk(imported(tmp_path, published_model()), network.abstract)
    assert "\n" not in str(error.value)


@pytest.fixture
def fails(tmp_path, capsys):
    """Runs an import that must fail; returns its line and checks that nothing was written."""

    def run(source):
        before = sorted(tmp_path.iterdir())
        capsys.readouterr()
        code = cli.run(
            ["import", "--kind=convnextv2", f"--source={source}", f"--out={tmp_path / 'export'}"]
        )
        assert code == 1 and sorted(tmp_path.iterdir()) == before
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        return lines[0]

    return run


class _Runs:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_is_not_opened(tmp_path, fails):
    trace = tmp_path / "trace"
    torch.save({"a": torch.zeros(2)}, tmp_path / "weights.pth")
    (tmp_path / "weights").write_bytes(pickle.dumps(_Runs(f"touch {trace}")))
    (tmp_path / "folder").mkdir()
    torch.save({"a": torch.zeros(2)}, tmp_path / "folder" / "pytorch_model.bin")
    for name in ("weights.pth", "weights", "folder"):
        said = fails(tmp_path / name)
        assert "pickle" in said and "save_file" in said and "weights_only=True" in said
    assert not trace.exists()


@pytest.mark.parametrize("under", [None, "state_dict", "model"])
def test_the_printed_conversion_of_a_pickle_runs(under, tmp_path, fails):
    """As it is printed, on checkpoints that keep more than weights; what it makes can be imported."""
    weights = published_model().state_dict()
    checkpoint = {**weights, "epoch": 3, "name": "x"}
    if under:
        checkpoint = {"epoch": 3, under: {**weights, "note": "no tensor"}, "optimizer": {"a": 1}}
    folder = tmp_path / "it's here"
    folder.mkdir()
    torch.save(checkpoint, folder / "a.ckpt")
    said = fails(folder / "a.ckpt")
    assert "get the .safetensors of the same weights" in said and "Lightning's" in said
    python, flag, program = shlex.split(said[said.index("python -c") :])
    exec(compile(program, "printed", "exec"), {})
    made = safetensors.torch.load_file(folder / "a.safetensors")
    assert made.keys() == weights.keys()
    assert all(torch.equal(made[key], weights[key]) for key in weights)
    published.run_import("convnextv2", str(folder / "a.safetensors"), str(tmp_path / "export"))


def test_files_that_cannot_be_read(tmp_path, fails):
    whole = as_timm_file(published_model(), tmp_path).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "cut.safetensors cannot be read as safetensors" in fails(tmp_path / "cut.safetensors")
    (tmp_path / "text.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert "cannot be read" in fails(tmp_path / "text.safetensors")
    (tmp_path / "empty").mkdir()
    assert "holds no safetensors" in fails(tmp_path / "empty")
    assert "there is nothing" in fails(tmp_path / "nowhere")
    shards = as_shards(published_model(), tmp_path)
    sorted(shards.glob("*.safetensors"))[1].unlink()
    assert "missing: model-00002" in fails(shards)


def test_tensors_that_do_not_fit(tmp_path, fails):
    tensors = timm_tensors(published_model())
    other = {"features.0.weight": np.zeros((4, 3, 3, 3), np.float32)}
    assert "no ConvNeXtV2" in fails(written(tmp_path / "other.safetensors", other))
    short = {
        key: value for key, value in tensors.items() if not key.startswith("stages.1.blocks.1.")
    }
    short["stages.1.blocks.2.norm.bias"] = np.zeros(16, np.float32)
    said = fails(written(tmp_path / "short.safetensors", short))
    assert re.search(r"\d+ missing: stages\.1\.1\.", said)
    surplus = tensors | {"stages.0.blocks.0.gamma": np.ones(8, np.float32), "mean": np.ones(3)}
    said = fails(written(tmp_path / "surplus.safetensors", surplus))
    assert "2 extra: " in said and "mean" in said and "stages.0.blocks.0.gamma" in said
    narrow = tensors | {"stages.2.blocks.0.mlp.fc1.weight": np.zeros((90, 24), np.float32)}
    said = fails(written(tmp_path / "narrow.safetensors", narrow))
    assert "1 misshapen: stages.2.blocks.0.mlp.fc1.weight is (90, 24), expected (96, 24)" in said
    endless = tensors | {"stem.0.bias": np.full(8, np.nan, np.float32)}
    assert "not finite" in fails(written(tmp_path / "endless.safetensors", endless))
    whole = tensors | {"stem.0.bias": np.zeros(8, np.int32)}
    assert "type I32" in fails(written(tmp_path / "whole.safetensors", whole))


def test_all_tensors_that_do_not_fit_are_listed(tmp_path, fails, monkeypatch, capsys):
    """In a file that the line names, and with --debug."""
    kept = tempfile.mkdtemp()
    monkeypatch.setattr(tempfile, "tempdir", kept)
    tensors = timm_tensors(published_model())
    absent = [key for key in tensors if key.startswith("stages.1.blocks.0.")]
    left = {key: value for key, value in tensors.items() if key not in absent}
    left |= {f"surplus.{number}": np.zeros(2, np.float32) for number in range(9)}
    left["stem.0.bias"] = np.zeros(9, np.float32)
    source = written(tmp_path / "short.safetensors", left)
    said = fails(source)
    (path,) = re.findall(rf"All of them: ({kept}\S+\.txt)\. ", said)
    lines = Path(path).read_text().splitlines()
    assert sum(line.startswith("missing: stages.1.0.") for line in lines) == len(absent) > 6
    assert [line for line in lines if line.startswith("extra: ")] == [
        f"extra: surplus.{number}" for number in range(9)
    ]
    assert lines[-1] == "misshapen: stem.0.bias is (9,), expected (8,)"
    arguments = ["import", "--kind=convnextv2", f"--source={source}", f"--out={tmp_path / 'e'}"]
    assert cli.run([*arguments, "--debug"]) == 1
    shown = capsys.readouterr().err.splitlines()
    assert all(line in shown for line in lines)


def test_an_export_is_replaced_only_on_request(tmp_path, capsys):
    out = imported(tmp_path, published_model())
    before = (out / "model.json").read_bytes()
    arguments = ["import", "--kind=convnextv2", f"--source={tmp_path / 'timm.safetensors'}"]
    assert cli.run([*arguments, f"--out={out}"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "model.json").read_bytes() == before
    assert cli.run([*arguments, f"--out={out}", "--overwrite"]) == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_types(tmp_path, dtype):
    """16 bits stay 16 bits in the export; 64 become 32; a network gets its own type."""
    model = published_model()
    kind = getattr(torch, dtype)
    tensors = {key: value.to(kind) for key, value in model.state_dict().items()}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    published.run_import("convnextv2", str(tmp_path / "a.safetensors"), str(tmp_path / "export"))
    stored = safetensors.torch.load_file(tmp_path / "export" / "pose.safetensors")
    expected = torch.float32 if dtype == "float64" else kind
    assert {value.dtype for value in stored.values()} == {expected}
    model.load_state_dict({key: value.float() for key, value in tensors.items()})
    assert features_error(tmp_path / "export", model, SMALL, 32) <= 1e-4
