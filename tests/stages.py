"""The stages at sizes that compile in seconds, on drawn heads, for tests of the loop and the mesh."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from data_pipelines import loading
from dexportrait_jax import config as configs
from dexportrait_jax.programs import build
from dexportrait_jax.state import QUICK, Network
from dexportrait_jax.tasks import build_networks, motion
from dexportrait_jax.tasks.motion_networks import LabelHeads
from dexportrait_jax.weights.exporting import export_groups

STAGES = ("motion", "autoencoder", "animator_image", "animator_video")

NEEDED = (
    "motion",
    "autoencoder",
    "image",
)  # keys of config.init that an animator cannot do without


def micro(stage: str, data: Path, exports: Path, **changes) -> ConfigDict:
    """The tiny config of a stage with narrower networks; animators start from random exports."""
    config = configs.load_config(f"configs/{stage}.py:tiny")
    config.unlock()
    config.data.path = str(data)
    config.data.batch_size = 8  # one source for each of the eight devices
    config.data.targets = 1 if stage == "autoencoder" else 2
    config.num_steps = 6
    config.checkpoint.minutes = 1000.0
    config.evaluate.at_end = False
    for phase in config.optim.values():
        phase.decay, phase.warmup_steps = "constant", 2
    if "pose" in config.model:
        config.model.pose.depths = (1, 1, 1, 1)
        config.model.expression.depth = 1
    if stage == "motion":
        config.model.appearance.blocks = 1
        config.loss.adversarial_start = 0
        config.loss.r1_every = 1  # one program: each takes most of a minute to compile
        config.loss.adversarial_images = 0
    else:
        config.model.autoencoder.update(block_channels=(8, 8, 8), groups=4)
    if "unet" in config.model:
        config.model.unet.update(block_channels=(16, 32), groups=4)
        config.data.frames = 4
        for name in NEEDED:
            if name in config.init:
                config.init[name] = str(exports / name)
    for dotted, value in changes.items():
        configs.apply_override(config, f"{dotted.replace('__', '.')}={value}")
    if "unet" in config.model:
        _export_random(config, exports)  # of networks as the changes have them: others are refused
    config.lock()
    return config


def _export_random(config: ConfigDict, exports: Path) -> None:
    """Exports of random weights at `exports`, unless there are some."""
    networks = build_networks(config)
    held = {
        "motion": ("pose", "expression"),
        "autoencoder": ("autoencoder",),
        "image": tuple(name for name in networks if name != "temporal"),
    }
    stages = {"motion": "motion", "autoencoder": "autoencoder", "image": "animator_image"}
    for name in NEEDED:
        if name not in config.init or (exports / name).exists():
            continue
        groups = {group: random_weights(networks[group], seed=7) for group in held[name]}
        model = {
            "stage": stages[name],
            "config": configs.to_json(config),
            "step": 0,
            "ema": False,
            "crop": {},
        }
        export_groups(exports / name, model, groups)


def random_weights(network: Network, seed: int) -> dict:
    """Weights of about unit gain where it is zero at a start, too; drawn without compiling anything."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("scale", "bias"):
            return np.full(leaf.shape, float(name == "scale"), leaf.dtype)
        inputs = max(1, np.prod(leaf.shape[:-1]))
        return rng.normal(0.0, inputs**-0.5, leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, network.abstract)


def leaves(tree) -> dict[str, np.ndarray]:
    """Path -> value, on the host."""
    flat = jax.tree_util.tree_flatten_with_path(jax.device_get(tree))[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def every_batch(monkeypatch, seen: Callable[[int, dict], dict]) -> None:
    """What the loop is given for step `number`, counted from 1, is `seen(number, batch)`."""
    make = loading.make_loader

    class Loader:
        def __init__(self, **options):
            self.inner, self.step = make(**options), options["step"]
            self.left_out = self.inner.left_out

        def __iter__(self):
            return self

        def __next__(self):
            self.step += 1
            return seen(self.step, next(self.inner))

        def close(self):
            self.inner.close()

    monkeypatch.setattr(
        loading, "make_loader", lambda config, **options: Loader(config=config, **options)
    )


def interrupt_in_step(monkeypatch, number: int) -> None:
    """SIGTERM reaches the process while batch `number` is being loaded."""

    def seen(step, batch):
        if step == number:
            signal.raise_signal(signal.SIGTERM)
        return batch

    every_batch(monkeypatch, seen)


def quick_steps(monkeypatch) -> None:
    """The loop's steps are compiled without optimisation: where they are few, that costs a quarter."""

    def quick(task, config, mesh):
        abstract, shardings, step = build(task, config, mesh)
        programs = {}

        def run(state, batch, constants, events):
            if events not in programs:
                lowered = step.lower(state, batch, constants, events)
                programs[events] = lowered.compile(compiler_options=QUICK)
            return programs[events](state, batch, constants)

        run.eval_shape = step.eval_shape
        return abstract, shardings, run

    monkeypatch.setattr("dexportrait_jax.train.build", quick)


class _Weight(nnx.Module):
    """One number, and what it does to pictures: a network of every group that compiles in no time."""

    def __init__(self, rngs: nnx.Rngs):
        self.weight = nnx.Param(0.5 + 0.1 * jax.random.normal(rngs.params(), (1,)))

    def brightness(self, image):
        return self.weight[...] * jnp.mean(image, (1, 2, 3))[:, None]


class _Pose(_Weight):
    def __call__(self, image):
        pose = jnp.broadcast_to(jnp.eye(3, 4), (len(image), 3, 4))
        return pose.at[:, 0, 3].add(self.brightness(image)[:, 0]), {}


class _Expression(_Weight):
    def __call__(self, image, key=None):
        return self.latent(self.heat_maps(image, key))

    def heat_maps(self, image, key=None):
        return jnp.broadcast_to(self.brightness(image)[:, :, None, None], (len(image), 4, 4, 68))

    def latent(self, heat_maps):
        return jnp.mean(heat_maps, (1, 2))[:, :1]


class _Appearance(_Weight):
    def __call__(self, image):
        cells = self.brightness(image)[:, :, None, None, None]
        return jnp.broadcast_to(cells, (len(image), 2, 2, 2, 1))


class _Generator(_Weight):
    def __call__(self, volume, warped, expression):
        grey = self.weight[...] * (expression + jnp.mean(warped, (1, 2, 3)))
        return jnp.broadcast_to(grey[:, :, None, None], (len(warped), 64, 64, 3))


class _Discriminator(_Weight):
    def __call__(self, image):
        return jnp.tanh(self.brightness(image)[:, 0])


class _Perceptual(_Weight):
    def features(self, image, unit_length):
        return [image]

    def distance_maps(self, fx, fy):
        return [self.weight[...] * jnp.sum(jnp.square(fx[0] - fy[0]), -1)]


def handful_of_numbers(monkeypatch) -> None:
    """Motion trainers get networks of one number each: what is tested is what happens when, not what is learned."""
    modules = {
        "pose": _Pose,
        "expression": _Expression,
        "appearance": _Appearance,
        "generator": _Generator,
        "discriminator": _Discriminator,
        "label_heads": lambda rngs: LabelHeads(1, rngs=rngs),
    }
    networks = {name: Network(module) for name, module in modules.items()}
    monkeypatch.setattr(motion, "build_networks", lambda config: networks)
    monkeypatch.setattr(motion, "PerceptualNetwork", lambda network, rngs: _Perceptual(rngs))
    weights = {"weight": np.ones(1, np.float32)}
    monkeypatch.setattr(motion, "load_perceptual", lambda network, path: weights)
