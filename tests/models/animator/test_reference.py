"""What the denoiser makes of a reference, against its statement in PyTorch: bank, attention, warp, drops."""

import functools

import jax
import numpy as np
import pytest
import torch

from dexportrait_jax.models.animator.conditioning import Conditions
from dexportrait_jax.models.animator.denoiser import Denoiser
from dexportrait_jax.models.animator.reference import ReferenceUNet
from dexportrait_jax.state import QUICK, Network
from tests.models.animator import torch_statements as stated
from tests.models.animator.test_denoiser import poses
from tests.published import parameters_from_torch, published_unet, randomise, relative_error

CHANNELS, LAYERS, HEADS, GROUPS, CONTEXT, TOKENS = (16, 32), 1, 2, 4, 12, (2, 8)
SOURCES, TARGETS, SIDE = 2, 4, 8
BATCH = SOURCES * TARGETS
TOLERANCE = 1e-5  # relative; in float32 the two agree to 5e-7
SIZES = {"heads": HEADS, "groups": GROUPS}
OURS = SIZES | {
    "block_channels": CHANNELS,
    "layers_per_block": LAYERS,
    "attn2": "clip_image",  # of several tokens here: of a single one, attn2 would not mind its place
    "cross_attention_features": CONTEXT,
}


class World:
    """Two UNets of random weights, ours and PyTorch's, and eight samples with every combination of drops."""

    def __init__(self):
        generator = np.random.default_rng(0)

        def normal(*shape):
            return generator.normal(size=shape).astype(np.float32)

        self.reference = loud(published_unet(CHANNELS, LAYERS, context=CONTEXT, **SIZES), seed=1)
        self.denoiser = loud(
            stated.denoiser(
                channels=CHANNELS, layers=LAYERS, context=CONTEXT, tokens=TOKENS, **SIZES
            ),
            seed=2,
        )
        self.sources, self.context = normal(SOURCES, SIDE, SIDE, 4), normal(SOURCES, 3, CONTEXT)
        self.latents, self.timesteps = normal(BATCH, SIDE, SIDE, 4), np.arange(1, 953, 119)
        self.source_poses, self.poses = (np.asarray(poses(n, n)) for n in (SOURCES, BATCH))
        self.expressions = normal(BATCH, TOKENS[0] * TOKENS[1])
        # Reference, pose, expression: the bits of the sample's number.
        self.keep = np.float32([[number >> bit & 1 for number in range(BATCH)] for bit in range(3)])
        self.shown = {
            path: generator.random(tokens.shape[:2]) < 0.6
            for path, tokens in self.stated_bank().items()
        }

    @functools.cached_property
    def our_bank(self):
        network = Network(lambda rngs: ReferenceUNet(**OURS, rngs=rngs))
        params = parameters_from_torch(network.abstract, self.reference.state_dict())
        return quickly(lambda *a: network.bind(a[0])(*a[1:]), params, self.sources, self.context)

    def our_prediction(self, state=None, **choices):
        network = Network(
            lambda rngs: Denoiser(
                **OURS,
                expression_latent=self.expressions.shape[1],
                expression_tokens=TOKENS,
                **choices,
                rngs=rngs,
            )
        )
        params = parameters_from_torch(network.abstract, state or self.denoiser.state_dict())
        keep_reference, keep_pose, keep_expression = self.keep
        conditions = Conditions(
            reference=self.our_bank,
            source_pose=self.source_poses,
            driving_pose=self.poses,
            expression=self.expressions,
            context=np.repeat(self.context, TARGETS, 0),
            keep_reference=keep_reference,
            keep_pose=keep_pose,
            keep_expression=keep_expression,
            reference_token_keep=self.shown,
        )
        given = (params, self.latents, self.timesteps, conditions)
        return np.asarray(quickly(lambda *a: network.bind(a[0])(*a[1:]), *given))

    @torch.no_grad()
    def stated_bank(self, timestep=0, normed=True):
        given = torch.tensor(self.sources), torch.tensor(self.context)
        seen = stated.bank(self.reference, *given, timestep)
        return {path: pair[int(normed)] for path, pair in seen.items()}

    @torch.no_grad()
    def stated_prediction(self, bank, choices=stated.DEFAULT):
        samples = []
        for number, (reference, pose, expression) in enumerate(self.keep.T):
            source = number // TARGETS
            pair = self.source_poses[source], self.poses[number]
            samples.append(
                stated.Sample(
                    {path: tokens[source] for path, tokens in bank.items()} if reference else None,
                    {path: torch.tensor(shown[source]) for path, shown in self.shown.items()},
                    torch.tensor(self.context[source]),
                    tuple(map(torch.tensor, pair)) if pose else None,
                    torch.tensor(self.expressions[number]) if expression else None,
                )
            )
        given = torch.tensor(self.latents), torch.tensor(self.timesteps)
        return stated.predict(self.denoiser, *given, samples, choices).numpy()


def loud(unet, seed):
    """Random weights, in the transformer blocks so large that no branch drowns in what goes past it."""
    randomise(unet, seed)
    with torch.no_grad():
        for _, block in stated.transformer_blocks(unet):
            for parameter in block.parameters():
                parameter *= 3 if parameter.ndim > 1 else 1
    return unet


def quickly(function, *arguments):
    return jax.jit(function).lower(*arguments).compile(compiler_options=QUICK)(*arguments)


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def prediction(world):
    return world.our_prediction()


def errors(ours, theirs):
    """Of every sample, relative to its own values."""
    return np.array([*map(relative_error, ours, theirs)])


def worst(ours, theirs):
    return errors(ours, theirs).max()


def test_bank_is_norm1_of_the_plain_unet_at_timestep_0(world):
    """Hooked out of diffusers' UNet; hidden states that are not normed, or of another timestep, would be seen."""
    ours, theirs = world.our_bank, world.stated_bank()
    assert ours.keys() == theirs.keys() and len(ours) == 4
    others = (world.stated_bank(normed=False), world.stated_bank(timestep=1))
    for path, tokens in ours.items():
        flat = tokens.reshape(SOURCES, -1, tokens.shape[-1])
        assert worst(flat, theirs[path]) <= TOLERANCE
        for other in others:
            assert worst(flat, other[path]) > 1e-3


def test_denoiser_is_what_the_method_says(world, prediction):
    """Eight samples at once: every combination of reference, pose and expression, each kept or dropped."""
    assert worst(prediction, world.stated_prediction(world.stated_bank())) <= TOLERANCE


@pytest.mark.parametrize("place", range(len(stated.ORDER) - 1))
def test_no_two_branches_may_change_places(world, prediction, place):
    order = list(stated.ORDER)
    order[place : place + 2] = order[place + 1], order[place]
    other = stated.Choices(order=tuple(order))
    assert worst(prediction, world.stated_prediction(world.stated_bank(), other)) > 1e-2


def test_denoiser_is_what_the_method_leaves_open(world):
    """Every choice taken the other way, by one program; each alone back at the default would be seen."""
    *others, expression, feed_forward = stated.ORDER
    otherwise = {
        "order": (*others, feed_forward, expression),
        "by_depth": True,
        "linear": False,
        "positions": False,
        "corners": True,
        "drops_context": False,
    }
    state = world.denoiser.state_dict()
    ours = world.our_prediction(
        {name: value for name, value in state.items() if "expression_tokens.linear" not in name},
        expression_place="after_feed_forward",
        volume_order="depth_channel",
        expression_linear=False,
        expression_positions="none",
        raymap_points="corners",
        drop_attn2="never",
    )
    bank = world.stated_bank()
    assert worst(ours, world.stated_prediction(bank, stated.Choices(**otherwise))) <= TOLERANCE
    for name in otherwise:
        kept = {key: value for key, value in otherwise.items() if key != name}
        error = worst(ours, world.stated_prediction(bank, stated.Choices(**kept)))
        assert error > 1e-3, (name, error)


def test_other_banks_would_be_seen(world, prediction):
    """Hidden states that are not normed, and those of another source, wherever the reference is kept."""
    bank, kept = world.stated_bank(), world.keep[0] == 1
    swapped = {path: tokens.flip(0) for path, tokens in bank.items()}
    for other in (world.stated_bank(normed=False), swapped):
        error = errors(prediction, world.stated_prediction(other))
        assert np.all(error[kept] > 1e-2) and np.all(error[~kept] <= TOLERANCE)
    assert np.sum(kept) == BATCH / 2


def test_hidden_tokens_count(world, prediction, monkeypatch):
    """Shown in one block to one source: its samples with a reference change, and no others."""
    path = next(iter(world.shown))
    everything = world.shown[path].copy()
    everything[1] = True
    monkeypatch.setitem(world.shown, path, everything)
    error = errors(prediction, world.stated_prediction(world.stated_bank()))
    changed = (world.keep[0] == 1) & (np.arange(BATCH) // TARGETS == 1)
    assert np.all(error[changed] > 1e-3) and np.all(error[~changed] <= TOLERANCE)
