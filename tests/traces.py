"""What a config makes of the code, as values to compare: shapes, programs, draws, batches; nothing is compiled whole.

Of two configs that train or sample alike these are equal, and where a key does something they differ.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines import loading
from data_pipelines.examples import Examples
from dexportrait_jax import config as configs
from dexportrait_jax.animator_inference import AnimatorModel
from dexportrait_jax.animator_windows import DenoiserPrograms
from dexportrait_jax.inference import Drive, Sampling
from dexportrait_jax.models.animator.conditioning import Conditions
from dexportrait_jax.state import Network
from dexportrait_jax.step import make_step
from dexportrait_jax.tasks import animator, animator_networks, autoencoder, motion, motion_networks
from dexportrait_jax.workload import abstract_batch
from tests.stages import handful_of_numbers
from tests.tasks.test_animator import Stub

TINY_UNET = ("model.unet.block_channels=(16,)", "model.unet.groups=4")
POSE = np.eye(3, 4, dtype=np.float32)


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def key():
    return jax.eval_shape(lambda: jax.random.key(0))


def program(function, *arguments) -> tuple[str, list[bytes]]:
    """The text of a program and its constants; functions in it have addresses, which say nothing."""
    closed = jax.make_jaxpr(function)(*arguments)
    constants = [np.asarray(value).tobytes() for value in closed.consts]
    return re.sub(r"0x[0-9a-f]+", "", str(closed.jaxpr)), constants


def differs(one: Any, other: Any) -> bool:
    """Of nested values with arrays among them."""
    pairs = [jax.tree.flatten(value, is_leaf=lambda leaf: leaf is None) for value in (one, other)]
    if pairs[0][1] != pairs[1][1]:
        return True
    return not all(np.array_equal(a, b) for a, b in zip(pairs[0][0], pairs[1][0], strict=True))


# --- networks -------------------------------------------------------------------------


def network(stage: str, group: str, overrides) -> Network:
    """One group as the stage builds it; the others are not built."""
    unet = TINY_UNET if stage != "motion" else ()
    config = configs.load_config(f"configs/{stage}.py:tiny", [*unet, *overrides])
    with pytest.MonkeyPatch.context() as patch:
        for module in (animator_networks, motion_networks, autoencoder):
            patch.setattr(module, "Network", lambda constructor: constructor)
        return Network(_builder(stage)(config)[group])


def _builder(stage):
    return motion_networks.build_networks if stage == "motion" else animator_networks.build_networks


def forward(group: str, *inputs, call=lambda module, *inputs: module(*inputs)):
    """Shapes of a group's parameters, and its program."""

    def seen(stage, overrides):
        found = network(stage, group, overrides)
        run = program(
            lambda params, *given: call(found.bind(params), *given), found.abstract, *inputs
        )
        return str(found.abstract), run

    return seen


def denoiser(stage, overrides):
    """The denoiser of one level and a middle, its function, and shapes for it: two samples, everything given."""
    found = network(stage, "denoiser", overrides)
    features, keep = shape(1, 8, 8, 16), shape(2)
    conditions = Conditions(
        reference={"mid_block.attentions.0.transformer_blocks.0": features},
        source_pose=shape(1, 3, 4),
        driving_pose=shape(2, 3, 4),
        expression=shape(2, 64),
        context=shape(2, 1, 768) if "model.attn2.attn2=clip_image" in overrides else None,
        keep_reference=keep,
        keep_pose=keep,
        keep_expression=keep,
    )
    given = (found.abstract, shape(2, 8, 8, 16), keep, conditions)
    return found, lambda params, *rest: found.bind(params)(*rest), given


def denoise(stage, overrides):
    found, function, given = denoiser(stage, overrides)
    return str(found.abstract), program(function, *given)


pose = forward("pose", shape(1, 64, 64, 3))
expression = forward("expression", shape(1, 64, 64, 3))
appearance = forward("appearance", shape(1, 64, 64, 3))
generator = forward("generator", shape(1, 4, 32, 32, 8), shape(2, 4, 32, 32, 8), shape(2, 64))
reference = forward(
    "reference",
    shape(1, 8, 8, 16),
    shape(1, 3, 4),
    call=lambda module, latents, poses: module(latents, None, poses),
)
temporal = forward(
    "temporal",
    shape(2, 8, 8, 16),
    call=lambda module, hidden: module.apply("down_blocks.0.motion_modules.0", hidden, 2),
)


# --- losses, optimizers ---------------------------------------------------------------


def motion_loss(stage, overrides):
    """Both losses of the motion trainer around networks of one number each, at a step with all events."""
    config = configs.load_config(f"configs/{stage}.py:tiny", list(overrides))
    with pytest.MonkeyPatch.context() as patch:
        handful_of_numbers(patch)
        task = motion.MotionTask(config)
        params = {name: one.abstract for name, one in task.networks.items()}
        params["perceptual"] = task.perceptual.abstract
        batch, events = abstract_batch(config.data), frozenset({"joint", "adversarial", "r1"})

        def generator(params, batch, key, step):
            return task.generator_loss(params, batch, key, step, {}, events)[0]

        def discriminator(params, batch, key, image):
            return task.discriminator_loss(params, batch, key, 0, {"image": image}, events)[0]

        first = program(generator, params, batch, key(), shape(dtype=jnp.int32))
        second = program(discriminator, params, batch, key(), shape(2, 64, 64, 3))
        return first, second, [task.events(step) for step in range(4)]


class _Autoencoder:
    scale = 2.0

    def sample(self, mean, log_variance, key):
        return mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)


def animator_loss(stage, overrides):
    """The animator's loss around networks that compute next to nothing, from cached latents."""
    config = configs.load_config(f"configs/{stage}.py:full", list(overrides))

    def denoise(noisy, timesteps, conditions, *, temporal, frames):
        kept = (conditions.keep_reference, conditions.keep_pose, conditions.keep_expression)
        hidden = jax.tree.leaves(conditions.reference_token_keep)
        return noisy * sum(kept)[:, None, None, None] + sum(map(jnp.sum, hidden))

    stubs = {
        "pose": Stub(lambda images: (jnp.tile(jnp.eye(3, 4), (len(images), 1, 1)), None)),
        "expression": Stub(lambda images: images.mean((1, 2))),
        "autoencoder": Stub(_Autoencoder()),
        "reference": Stub(lambda latents, context, pose: {"block": latents}),
        "denoiser": Stub(denoise),
        "temporal": Stub(None),
    }
    batch = {
        f"{which}_{name}": shape(*start, *rest, dtype=kind)
        for which, start in (("source", (2,)), ("target", (2, 3)))
        for name, rest, kind in (
            ("image", (2, 2, 3), jnp.uint8),
            ("pose_image", (2, 2, 3), jnp.uint8),
            ("expression_image", (2, 2, 3), jnp.uint8),
            ("latents", (2, 8, 8, 4), jnp.float32),
            ("component_mask", (16, 16), jnp.uint8),
        )
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(animator, "build_networks", lambda config: stubs)
        task = animator.AnimatorTask(config)
    params = dict.fromkeys(stubs)
    return program(lambda *given: task.loss(params, *given, 0, {}, ())[0], batch, key())


def optimizer(stage, overrides):
    """The update of every phase's optimizer, without its networks."""
    config = configs.load_config(f"configs/{stage}.py:full", list(overrides))
    params = {"group": {"kernel": shape(4, 4), "bias": shape(4)}}
    with pytest.MonkeyPatch.context() as patch:
        for module in (motion, animator):
            patch.setattr(module, "build_networks", lambda config: {})
        patch.setattr(motion, "Network", lambda constructor: None)
        phases = (motion if stage == "motion" else animator).make(config).phases
    found = []
    for phase in phases:
        state = jax.eval_shape(phase.tx.init, params)
        found.append(program(phase.tx.update, params, state, params))
    return found


def average(stage, overrides):
    """A step of nothing but the moving average."""
    config = configs.load_config(f"configs/{stage}.py:full", list(overrides))
    step = make_step((), seed=config.seed, ema_decay=config.ema_decay)
    weights = {"group": {"kernel": shape(4)}}
    state = {"step": shape(dtype=jnp.int32), "params": weights, "opt": {}, "ema": weights}
    return program(lambda state: step(state, {"x": jnp.zeros(2)}, {}), state)


# --- sampling -------------------------------------------------------------------------


class _Noted(AnimatorModel):
    """The image stage at the paper's settings, or windows of four frames, with a denoiser that notes its inputs."""

    def __init__(self, overrides, windows: bool):
        config = configs.load_config("configs/animator_image.py:full", list(overrides))
        super().__init__({"stage": config.stage}, config, {}, {})
        if windows:
            self.networks = {"temporal": None}
        self.seen = []
        latent = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)
        self._source = lambda *arguments: (latent, {}, np.ones((1, 1, 2), np.float32))
        self._decode = lambda params, latents: latents

    def _denoiser(self, null):
        def predict(params, latents, timesteps, conditions):
            leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(conditions)]
            self.seen.append((null, timesteps, jax.tree.structure(conditions), leaves))
            return 0.1 * latents * len(self.seen) + sum(leaf.sum() for leaf in leaves)

        return DenoiserPrograms(lambda *a: {"block": ()}, lambda *a: {}, predict)


def sampling(stage, overrides, windows=False):
    """All that a denoiser is asked in the ten steps of a clip of seven frames, and the latents that come of it."""
    short = (
        "sampling.steps=10",
        "data.frames=4",
        "sampling.overlap=1",
    )  # with room to move windows
    model = _Noted((*short, *overrides), windows)
    drive = Drive(POSE, np.zeros(4, np.float32), np.stack([1.1 * POSE] * 7), np.ones((7, 4)))
    picture = np.zeros((64, 64, 3), np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dexportrait_jax.animator_inference.to_uint8", lambda latents: latents)
        made = np.concatenate(list(model.animate(picture, drive, Sampling(seed=1))))
    return [str(asked[:3]) for asked in model.seen], [asked[3] for asked in model.seen], made


def window_sampling(stage, overrides):
    return sampling(stage, overrides, windows=True)


# --- data -----------------------------------------------------------------------------


def batch_shapes(stage, overrides):
    config = configs.load_config(f"configs/{stage}.py:full", list(overrides))
    return str(loading.batch_shapes(config.data))


def examples(directory, mode="pairs"):
    """The first training examples of a dataset."""

    def seen(stage, overrides):
        small = ("data.image_size=32", "data.pose_size=32", "data.expression_size=24")
        frames = ("data.targets=2", "data.frames=4", f"data.mode={mode}", "data.source_margin=2")
        every = [f"data.augment.{name}.probability=1.0" for name in _DRAWN]
        given = [*small, *frames, *every, f"data.path={directory}", *overrides]
        config = configs.load_config(f"configs/{stage}.py:full", given)
        made = Examples(config.data, seed=1)
        return [made(number, np.random.default_rng(number)) for number in range(3)]

    return seen


_DRAWN = (
    "pose_colour",
    "expression_rotation",
    "expression_colour",
    "expression_affine",
    "similarity",
)
