"""The job `encode`, and that an animator's steps from cached latents are the steps that encode."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from data_pipelines import latents, loading
from dexportrait_jax import cli
from dexportrait_jax import config as configs
from dexportrait_jax.errors import UserError
from dexportrait_jax.state import QUICK
from dexportrait_jax.step import init_optimizers, make_step
from dexportrait_jax.tasks import autoencoder, build_networks, make_task
from dexportrait_jax.train import train
from dexportrait_jax.weights.exporting import export_groups
from dexportrait_jax.weights.importing import load_groups
from dexportrait_jax.weights.names import flatten, unflatten
from dexportrait_jax.workload import forward_work
from tests import fixtures
from tests.stages import micro

GROUPS = ("pose", "expression", "autoencoder", "reference", "denoiser", "temporal")


def encode(weights, data, out, *flags):
    return cli.run(
        ["encode", f"--weights={weights}", f"--data={data}", f"--out={out}", "--size=64", *flags]
    )


def random_params(name, abstract):
    """Parameters of the size that keeps signals alive, none of them zero, without compiling anything."""
    rng = np.random.default_rng(GROUPS.index(name))
    leaves = {}
    for path, leaf in flatten(abstract):
        spread = 0.1 if len(leaf.shape) < 2 else np.prod(leaf.shape[:-1]) ** -0.5
        values = rng.normal(path[-1] == "scale", spread, leaf.shape)
        leaves[path] = values.astype(np.float32)
    return unflatten(leaves)


class Places:
    """A dataset, exports, latents with mirrored ones (float32, and the default); configs and networks of the stages."""

    def __init__(self, root):
        self.data = fixtures.make_dataset(root / "data", clips=5, frames=8, size=64)
        self.exports, self.latents = root / "exports", root / "latents"
        for name in ("motion", "autoencoder", "image"):
            (self.exports / name).mkdir(parents=True)  # or `micro` would make them, compiling
        networks = self.networks("animator_video")
        self.params = {name: random_params(name, networks[name].abstract) for name in GROUPS}
        for name, stage, groups in (
            ("motion", "motion", GROUPS[:2]),
            ("autoencoder", "autoencoder", GROUPS[2:3]),
        ):
            values = configs.to_json(self.config("animator_image"))
            self.export(
                self.exports / name, stage, values, {group: self.params[group] for group in groups}
            )
        self.half = root / "half"
        for out, flags in ((self.latents, KEPT), (self.half, KEPT[1:])):
            assert encode(self.exports / "autoencoder", self.data, out, *flags) == 0

    @staticmethod
    def export(path, stage, config, groups):
        model = {"stage": stage, "config": config, "step": 0, "ema": False, "crop": {}}
        return export_groups(path, model, groups)

    @functools.cache  # noqa: B019 - lives as long as the module
    def plain(self, stage):
        changes = {"data__augment__similarity__probability": 0, "sample_latents": "true"}
        changes |= {"data__augment__flip__probability": 0.5, "data__batch_size": 2}
        return micro(stage, self.data, self.exports, **changes)

    def config(self, stage, **changes):
        config = ml_collections.ConfigDict(self.plain(stage).to_dict())
        for dotted, value in changes.items():
            configs.apply_override(config, f"{dotted.replace('__', '.')}={value}")
        return config

    def networks(self, stage):
        return build_networks(self.config(stage))


KEPT = ("--dtype=float32", "--flips", "--batch_size=1")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return Places(tmp_path_factory.mktemp("encode"))


def batches(config, count):
    loader = loading.make_loader(config.data, seed=config.seed)
    found = [{name: np.array(value) for name, value in next(loader).items()} for _ in range(count)]
    loader.close()
    return found


def first_batch(config):
    return batches(config, 1)[0]


class Steps:
    """A stage's own steps from the same weights, compiled for batches like the one given."""

    def __init__(self, places, stage, batch):
        task = make_task(places.config(stage))
        params = {name: places.params[name] for name in task.networks}
        self.trained = task.ema_groups
        self.state = {
            "step": jnp.zeros((), jnp.int32),
            "params": params,
            "opt": init_optimizers(task.phases, params),
            "ema": {name: params[name] for name in self.trained},
        }
        step = jax.jit(make_step(task.phases, seed=5, ema_decay=0.9), static_argnums=3)
        lowered = step.lower(self.state, batch, {}, frozenset())
        self.program = lowered.compile(compiler_options=QUICK)

    def __call__(self, batches):
        """The loss of every step, the gradient of the first, and how far the weights went in all."""
        state, losses = self.state, []
        for batch in batches:
            state, metrics = self.program(state, batch, {})
            losses.append(float(metrics["denoise/loss"]))
            if len(losses) == 1:  # Adam's mean of gradients is then that one, times a number
                gradient = optax.tree_utils.tree_get(state["opt"]["denoise"]["tx"], "mu")
        assert int(metrics["denoise/skipped"]) == 0
        before, after = (
            {name: tree["params"][name] for name in self.trained} for tree in (self.state, state)
        )
        return np.array(losses), gradient, jax.tree.map(np.subtract, after, before)


def off(ours, theirs):
    """The difference of two trees, in lengths of the second."""
    return float(optax.tree.norm(jax.tree.map(np.subtract, ours, theirs)) / optax.tree.norm(theirs))


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param("animator_image", marks=pytest.mark.exhaustive),
        pytest.param("animator_video", marks=pytest.mark.exhaustive),
    ],
)
def test_steps_from_latents_are_the_steps_that_encode(places, stage):
    """With samples of the posterior: but for another order of float32 sums, and for the rounding of 16 bits."""
    pictures, cached, half = (
        batches(places.config(stage, data__latents=path), 4)
        for path in ("", places.latents, places.half)
    )
    assert all("target_image" in batch and "target_latents" not in batch for batch in pictures)
    assert all("target_image" not in batch for batch in (*cached, *half))
    for name in ("source_latents", "target_latents"):
        assert (cached[0][name].dtype, half[0][name].dtype) == (np.float32, np.float16)
        assert any(
            np.any(one[name] != other[name]) for one, other in zip(cached, half, strict=True)
        )
    # The step begins with this, exactly; done here, it spares compiling another program.
    half = [
        {
            name: value.astype(np.float32) if value.dtype == np.float16 else value
            for name, value in batch.items()
        }
        for batch in half
    ]
    losses, gradient, moved = Steps(places, stage, pictures[0])(pictures)
    assert losses.min() > 0.1
    assert sum(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(gradient)) > 20
    steps = Steps(places, stage, cached[0])

    others, gradient_of_others, moved_others = steps(cached)
    np.testing.assert_allclose(others, losses, rtol=1e-5)
    for one, other in zip(*map(jax.tree.leaves, (gradient_of_others, gradient)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * float(np.abs(other).max()))
    # Adam divides every number of the gradient by its own size, the smallest and least certain too.
    assert off(moved_others, moved) <= 1e-3

    # float16 keeps a latent, and a log-variance, to 2^-11 of itself. Noise that is large beside it is added, so the
    # prediction and what is wanted move by about as much at most; a squared error by twice, and less in the mean,
    # because roundings of thousands of numbers are as often up as down.
    rounding = 2.0**-11
    others, gradient_of_others, moved_others = steps(half)
    np.testing.assert_allclose(others, losses, rtol=rounding)
    assert off(gradient_of_others, gradient) <= 2 * rounding
    assert off(moved_others, moved) <= 1e-2


def test_the_posterior_is_the_encoders(places):
    """Means and log-variances against the network itself, and samples of them by the same key."""
    config = places.config("animator_image")
    task, batch = make_task(config), first_batch(config)
    read = first_batch(places.config("animator_image", data__latents=places.latents))
    images = np.concatenate([batch["source_image"], batch["target_image"].reshape(-1, 64, 64, 3)])
    params = {"autoencoder": places.params["autoencoder"]}

    @jax.jit
    def everything(params, batch, images):
        network = task.networks["autoencoder"].bind(params["autoencoder"])
        samples = [task.encode(params, batch, "target", jax.random.key(key)) for key in (1, 2)]
        return jnp.stack(network.encode(images / 127.5 - 1), 1), *samples

    expected, sample, another = everything(params, batch, images)
    shape = (-1, *read["source_latents"].shape[1:])
    found = np.concatenate([read["source_latents"], read["target_latents"].reshape(shape)])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert found[:, 0].std() > 0.05 and found[:, 1].std() > 0.05
    cached = task.encode(params, read, "target", jax.random.key(1))
    np.testing.assert_allclose(cached, sample, rtol=1e-3, atol=1e-3)
    assert np.abs(cached - another).max() > 0.1


def test_a_step_without_the_encoder(places):
    work = [
        forward_work(places.config("animator_image", data__latents=path)).by_scope
        for path in ("", places.latents)
    ]
    assert work[0]["autoencoder"] > 0 and work[1].get("autoencoder", 0) == 0
    for name in ("reference", "denoiser", "pose", "expression"):
        assert work[0][name] == work[1][name]


def test_the_same_command_again_has_nothing_to_do(places, tmp_path, capfd):
    data, cached = places.data, places.latents
    weights = places.exports / "autoencoder"
    before = {path.name: path.stat().st_mtime_ns for path in cached.iterdir()}
    assert encode(weights, data, cached, *KEPT) == 0
    assert "already there, 40 frames of 5 clips, 65536 bytes a frame" in capfd.readouterr().out
    assert encode(weights, data, cached, "--compute=bfloat16") == 1
    assert "made with other flips, dtype, compute; choose another --out" in capfd.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in cached.iterdir()} == before
    assert cli.run(["inspect", str(cached)]) == 0
    said = capfd.readouterr().out
    assert "5 clips, 40 frames of 64 px, mirrored ones too" in said and "(16, 16, 16)" in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--size=63"], "--size=63 does not suit the autoencoder"),
        (["--size=0"], "--size is 0; it must be at least 1"),
        (["--weights={exports}/motion"], "it has no autoencoder"),
        (["--data=nowhere"], "no dataset at"),
        (["--data=synthetic:identities=2,frames=4,size=64"], "`dexportrait render`"),
        (["--split=test"], "no split 'test'"),
        (["--out={data}"], "holds something else than latents"),
        (["--out=."], "is the folder you are in, which the finished directory cannot replace"),
    ],
)
def test_what_cannot_be_encoded(places, tmp_path, capfd, monkeypatch, flags, words):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    data, exports = places.data, places.exports
    filled = [flag.format(exports=exports, data=data) for flag in flags]
    assert encode(exports / "autoencoder", data, tmp_path / "out", *filled) == 1
    said = capfd.readouterr().err
    assert words in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_latents_of_another_autoencoder(places, tmp_path):
    """Other weights, or the same in a network that computes something else; but not another precision of them."""
    model, groups = load_groups(places.exports / "autoencoder")
    params, options = groups["autoencoder"], model["config"]["model"]["autoencoder"]
    made = latents.read_description(places.latents).autoencoder
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert autoencoder.identity(options, half) == autoencoder.identity(options, params) == made
    assert autoencoder.identity(options | {"scale": 7.0}, params) == made
    assert autoencoder.identity(options | {"groups": 2}, params) != made

    moved = jax.tree.map(lambda leaf: leaf * 1.01, params)
    other = places.export(
        tmp_path / "other", "autoencoder", model["config"], {"autoencoder": moved}
    )
    changes = {"data__latents": places.latents, "init__autoencoder": other}
    config = places.config("animator_image", **changes)
    with pytest.raises(UserError, match="was made by another autoencoder than that of") as caught:
        make_task(config).pretrained()
    assert f"dexportrait encode --weights={other} --data={places.data}" in str(caught.value)
    assert "\n" not in str(caught.value)
    same = places.config("animator_image", data__latents=places.latents)
    assert "autoencoder" in make_task(same).pretrained()


@pytest.mark.parametrize("stage", ["motion", "autoencoder"])
def test_stages_that_learn_from_pictures_refuse_latents(places, tmp_path, stage):
    config = configs.load_config(
        f"configs/{stage}.py:tiny", [f"data.path={places.data}", f"data.latents={places.latents}"]
    )
    with pytest.raises(UserError, match=f"stage '{stage}' learns from pictures"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_keys_that_change_pictures_are_named_before_anything_is_compiled(places, tmp_path):
    changes = {"data__augment__similarity__probability": 0.25, "data__latents": places.latents}
    with pytest.raises(UserError, match="augment.similarity.probability=0, or leave"):
        train(places.config("animator_video", **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
