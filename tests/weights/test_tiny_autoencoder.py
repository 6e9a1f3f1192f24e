"""TAESD and TAEF2: diffusers' numbers, the middle blocks against a plain statement, real faces with real weights."""

import json
import shlex

import diffusers
import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from data_pipelines.prepare import crop, detect
from data_pipelines.video import read_frames
from dexportrait_jax import cli
from dexportrait_jax.errors import UserError
from dexportrait_jax.models.animator.tiny_autoencoder import TinyAutoencoder
from dexportrait_jax.state import Network
from dexportrait_jax.tasks.animator import AnimatorTask
from dexportrait_jax.weights.importing import load_groups
from tests.published import randomise, relative_error
from tests.stages import micro

SIZES = {"block_channels": (8, 8, 8), "layers_per_block": 2, "latent_channels": 5}


def drawn():
    return randomise(
        diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            latent_channels=5,
            num_encoder_blocks=(1, 2, 2),
            num_decoder_blocks=(2, 2, 1),
        )
    )


@pytest.fixture(scope="module")
def published():
    return drawn()


def as_folder(model, folder):
    model.save_pretrained(folder / "tiny")
    return folder / "tiny"


def as_two_files(model, folder):
    """In its own project the decoder's first place is the bending of latents, which has no weights."""
    for half, shift in (("encoder", 0), ("decoder", 1)):
        tensors = {}
        for key, value in model.state_dict().items():
            if key.startswith(f"{half}.layers."):
                number, _, rest = key.removeprefix(f"{half}.layers.").partition(".")
                tensors[f"{int(number) + shift}.{rest}"] = value.numpy()
        save_file(tensors, folder / f"taesd_{half}.safetensors")
    return folder


def as_one_file(model, folder):
    model.save_pretrained(folder / "one")
    return (folder / "one" / "diffusion_pytorch_model.safetensors").rename(
        folder / "my_autoencoder.safetensors"
    )


def imported(source, out):
    arguments = ["--kind=tiny_autoencoder", f"--source={source}", f"--out={out}"]
    assert cli.run(["import", *arguments]) == 0
    return json.loads((out / "model.json").read_text())["config"]["model"]["autoencoder"]


def loaded(out, **sizes):
    network = Network(lambda rngs: TinyAutoencoder(**sizes, rngs=rngs))
    return network, load_groups(out, {"autoencoder": network.abstract})[1]["autoencoder"]


@pytest.mark.parametrize("layout", [as_folder, as_two_files, as_one_file])
def test_equals_diffusers(tmp_path, published, layout):
    told = imported(layout(published, tmp_path), tmp_path / "out")
    assert {name: told[name] for name in ("kind", "latent_channels", "layers_per_block")} == {
        "kind": "tiny",
        "latent_channels": 5,
        "layers_per_block": 2,
    }
    assert told["block_channels"] == [8, 8, 8] and not told["middle_attention"]
    network, params = loaded(tmp_path / "out", **SIZES, middle_attention=False)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 12, 3)).astype(np.float32)

    @jax.jit
    def run(params, images):
        latents, log_variance = network.bind(params).encode(images)
        return latents, log_variance, network.bind(params).decode(latents)

    latents, log_variance, decoded = run(params, images)
    with torch.no_grad():
        expected = published.encode(torch.tensor(images).permute(0, 3, 1, 2)).latents
        expected_images = published.decode(expected).sample
    assert latents.shape == (2, 4, 3, 5)
    assert relative_error(latents, expected.permute(0, 2, 3, 1)) <= 1e-4
    assert relative_error(decoded, expected_images.permute(0, 2, 3, 1)) <= 1e-4
    key = jax.random.key(0)
    np.testing.assert_array_equal(network.bind(params).sample(latents, log_variance, key), latents)


@pytest.mark.parametrize(
    ("beside", "scale"),
    [
        ({"_class_name": "AutoencoderKL", "scaling_factor": 0.18215}, 1.0),
        ({"_class_name": "AutoencoderTiny", "scaling_factor": 0.5}, 0.5),
        ({"scaling_factor": 0.5}, 0.5),
    ],
)
def test_the_scale_of_a_large_autoencoder_is_not_taken(tmp_path, published, beside, scale):
    """Both are put into one folder; the tiny one gives latents that have the large one's scale already."""
    source = as_one_file(published, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(beside))
    assert imported(source, tmp_path / "out")["scale"] == scale


class MiddleBlock(torch.nn.Module):
    """The published block of TAEF2's lowest level, as its project states it."""

    def __init__(self, width, groups):
        super().__init__()
        nn = torch.nn

        def conv():
            return nn.Conv2d(width, width, 3, padding=1)

        self.conv = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU(), conv())
        wide = 4 * width
        self.pool = nn.Sequential(
            nn.Conv2d(width, wide, 1, bias=False),
            nn.GroupNorm(groups, wide),
            nn.ReLU(),
            nn.Conv2d(wide, width, 1, bias=False),
        )

    def forward(self, x):
        x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


def test_middle_block_equals_its_statement():
    from flax import nnx

    from dexportrait_jax.models.animator.tiny_autoencoder import TinyBlock
    from tests.published import parameters_from_torch

    block = randomise(MiddleBlock(6, 3))
    network = Network(lambda rngs: TinyBlock(6, pooled=True, groups=3, dtype=np.float32, rngs=rngs))
    assert issubclass(TinyBlock, nnx.Module)
    params = parameters_from_torch(network.abstract, block.state_dict())
    inputs = np.random.default_rng(1).normal(size=(2, 5, 4, 6)).astype(np.float32)
    with torch.no_grad():
        expected = block(torch.tensor(inputs).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert relative_error(network.bind(params)(inputs), expected) <= 1e-4


def test_a_half_alone_is_one_line(tmp_path, published, capsys):
    as_two_files(published, tmp_path)
    (tmp_path / "taesd_decoder.safetensors").unlink()
    arguments = ["--kind=tiny_autoencoder", f"--source={tmp_path}", f"--out={tmp_path / 'out'}"]
    assert cli.run(["import", *arguments]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "holds no decoder" in said


@pytest.mark.slow
def test_real_weights_keep_real_faces(tmp_path, shared_data):
    """36 dB and more on crops of the faces of real clips, as `prepare` makes them, at 256 px."""
    for half in ("encoder", "decoder"):
        weights = torch.load(
            shared_data / "models" / f"taef2_{half}.pth", weights_only=True, map_location="cpu"
        )
        tensors = {key: value.numpy() for key, value in weights.items()}
        save_file(tensors, tmp_path / f"taef2_{half}.safetensors")
    told = imported(tmp_path, tmp_path / "out")
    assert (told["latent_channels"], told["middle_attention"]) == (32, True)
    network, params = loaded(tmp_path / "out")
    clips = sorted((shared_data / "clips").glob("*.mp4"))
    settings, faces = crop.Settings(), []
    with detect.Landmarker(shared_data / "models" / "face_landmarker.task") as landmarker:
        for clip in clips:
            image = next(iter(read_frames(clip))).image
            found = landmarker.detect(image)
            box = crop.crop_box(found[0].box[None], image.shape[1::-1], settings)
            faces.append(crop.extract(image, box, 256))
    assert len(faces) >= 10
    faces = np.stack(faces)

    @jax.jit
    def run(params, images):
        latents = network.bind(params).encode(images)[0]
        return latents, network.bind(params).decode(latents)

    images = faces.astype(np.float32) / 127.5 - 1
    latents, decoded = run(params, images)
    assert latents.shape == (len(clips), 32, 32, 32)
    found = np.clip(np.round((np.asarray(decoded) + 1) * 127.5), 0, 255)
    error = np.mean((found - faces.astype(np.float64)) ** 2, axis=(1, 2, 3))
    assert np.mean(10 * np.log10(255**2 / error)) >= 36


def test_an_animator_is_told_what_to_give(tmp_path, published):
    """The overrides of the error are those that make it start."""
    imported(as_folder(published, tmp_path), tmp_path / "out")
    changes = {"init__autoencoder": tmp_path / "out"}
    with pytest.raises(UserError, match="give: ") as caught:
        AnimatorTask(micro("animator_image", "data", tmp_path / "exports", **changes)).pretrained()
    assert "\n" not in str(caught.value)
    told = [
        word.removeprefix("--config.") for word in shlex.split(str(caught.value).split("give: ")[1])
    ]
    assert "model.autoencoder.kind=tiny" in told
    changes |= {key.replace(".", "__"): value for key, value in (word.split("=") for word in told)}
    task = AnimatorTask(micro("animator_image", "data", tmp_path / "more", **changes))
    assert task.pretrained()["autoencoder"]["decoder"]["layers"]["0"]["kernel"].shape[2] == 5
