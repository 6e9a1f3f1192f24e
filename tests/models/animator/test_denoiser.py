"""The denoiser with every branch: what it is at the start, what each condition does, what dropping means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dexportrait_jax import geometry
from dexportrait_jax.models.animator.branches import NullReading, branch_conditions
from dexportrait_jax.models.animator.conditioning import (
    Conditions,
    ExpressionTokens,
    random_token_keep,
    ray_maps,
    select_frames,
    warp_bank,
)
from dexportrait_jax.models.animator.denoiser import Denoiser
from dexportrait_jax.models.animator.reference import ReferenceUNet
from dexportrait_jax.models.animator.temporal import TemporalModules
from dexportrait_jax.models.animator.transformer import TransformerOptions
from dexportrait_jax.models.animator.unet import UNet
from dexportrait_jax.state import Network, parameter_count
from tests.models.animator.added_branches import (
    assert_nothing_is_added,
    assert_rays_are_not_read,
)
from tests.published import random_like

SIZES = {"block_channels": (16, 32), "layers_per_block": 1, "groups": 4}
TINY = SIZES | {"heads": 2}
SMALL = TINY | {"expression_latent": 16, "expression_tokens": (2, 8)}
SOURCES, TARGETS = 2, 2
BATCH = SOURCES * TARGETS
KEEPS = ("keep_reference", "keep_pose", "keep_expression")


def poses(count: int, seed: int) -> jnp.ndarray:
    angles = np.random.default_rng(seed).uniform(-30, 30, (3, count))
    rotation = geometry.euler_to_rotation(*jnp.asarray(angles))
    shift = jnp.stack([jnp.linspace(-0.2, 0.2, count)] * 2 + [jnp.zeros(count)], axis=-1)
    return geometry.pose_matrix(rotation, shift, jnp.linspace(0.9, 1.1, count))


class World:
    """Random networks and conditions that the tests share."""

    def __init__(self):
        generator = np.random.default_rng(0)

        def normal(*shape):
            return jnp.asarray(generator.normal(size=shape), jnp.float32)

        self.network = Network(lambda rngs: Denoiser(**SMALL, rngs=rngs))
        self.params = random_like(self.network.abstract, 1)
        self.reference = Network(lambda rngs: ReferenceUNet(**TINY, rngs=rngs))
        bank = self.reference.bind(random_like(self.reference.abstract, 2))(
            normal(SOURCES, 8, 8, 4)
        )
        self.latents, self.timesteps = normal(BATCH, 8, 8, 4), jnp.array([1, 200, 700, 953])
        self.conditions = Conditions(
            reference=bank,
            source_pose=poses(SOURCES, 3),
            driving_pose=poses(BATCH, 4),
            expression=normal(BATCH, 16),
        )
        self._run = jax.jit(lambda *a: self.network.bind(a[0])(*a[1:]))

    def __call__(self, conditions, latents=None, timesteps=None):
        """The prediction; every keep field is given, so that most tests share one program."""
        if conditions.reference is not None or conditions.keys_values is not None:
            given = {name: getattr(conditions, name) for name in KEEPS}
            everything = jnp.ones(BATCH)
            conditions = conditions.replace(
                **{name: everything if keep is None else keep for name, keep in given.items()}
            )
        latents = self.latents if latents is None else latents
        timesteps = self.timesteps if timesteps is None else timesteps
        return np.asarray(self._run(self.params, latents, timesteps, conditions))


@pytest.fixture(scope="module")
def world():
    return World()


def differ(one, other):
    """Per sample: are the two predictions different beyond rounding?"""
    return np.abs(one - other).max(axis=(1, 2, 3)) > 1e-3


# Every choice of the branches' form at once, other than the default.
OTHERWISE = {
    "volume_order": "depth_channel",
    "raymap_points": "corners",
    "expression_place": "after_feed_forward",
    "expression_linear": False,
    "expression_positions": "none",
}


@pytest.mark.parametrize(
    ("choices", "levels"),
    [
        ({"expression_injector": "in_block"}, 1),  # its transformer block is the middle's
        pytest.param(OTHERWISE, 1, marks=pytest.mark.slow),
        pytest.param({"expression_injector": "xnemo"}, 2, marks=pytest.mark.exhaustive),
    ],
    ids=["in_block", "otherwise", "xnemo"],
)
def test_added_branches_start_as_nothing(world, choices, levels):
    """Without the reference it is the plain UNet; with it, what its tokens alone make of that."""
    # Equal widths: the parameters then have few different shapes, each of which costs a compilation.
    sizes = SIZES | {"block_channels": (16,) * levels}
    blocks, units = {1: (1, 4), 2: (4, 7)}[levels]
    settings = SMALL | sizes | choices
    injector = choices.get("expression_injector", "in_block")
    network = Network(lambda rngs: Denoiser(**settings, rngs=rngs))
    options = TransformerOptions(heads=2, cross_attention_features=None)
    plain = Network(lambda rngs: UNet(**sizes, options=options, rngs=rngs))
    bare_settings = {"raymap": "none", "warp_kernel": 0, "expression_injector": "none"}
    bare = Network(lambda rngs: Denoiser(**(settings | bare_settings), rngs=rngs))
    temporal = Network(lambda rngs: TemporalModules(**sizes, heads=2, rngs=rngs))
    params = network.init(jax.random.key(0, impl="unsafe_rbg"))
    temporal_params = temporal.init(jax.random.key(1, impl="unsafe_rbg"))
    expression = {"attn_expression": blocks}
    if injector == "xnemo":
        expression = {"expression_modules": units}
    assert_nothing_is_added(params, {"warp_projection": blocks} | expression)
    assert_nothing_is_added(temporal_params, {"motion_modules": units})
    assert_rays_are_not_read(params, latent_channels=4, rays=6)

    def shared(shapes, values):
        if not isinstance(shapes, dict):
            # The new input channels lie behind the latents.
            return values[tuple(slice(n) for n in shapes.shape)]
        return {name: shared(shapes[name], values[name]) for name in shapes}

    bank = {
        path: jnp.resize(features, (*features.shape[:3], 16))
        for path, features in world.conditions.reference.items()
    }
    if levels == 1:
        middle = "mid_block.attentions.0.transformer_blocks.0"
        bank = {middle: bank["down_blocks.0.attentions.0.transformer_blocks.0"]}

    @jax.jit
    def run(params, keep):
        modules = temporal.bind(temporal_params)
        conditions = world.conditions.replace(reference=bank, keep_reference=keep)
        return network.bind(params)(
            world.latents, world.timesteps, conditions, temporal=modules, frames=TARGETS
        )

    unconditional = jax.jit(lambda p: plain.bind(p)(world.latents, world.timesteps))(
        shared(plain.abstract, params)
    )
    assert float(jnp.std(unconditional)) > 0.01
    dropped = run(params, jnp.zeros(BATCH))
    np.testing.assert_allclose(dropped, unconditional, rtol=1e-5, atol=2e-6)

    read = jax.jit(
        lambda p: bare.bind(p)(world.latents, world.timesteps, Conditions(reference=bank))
    )(shared(bare.abstract, params))
    assert differ(np.asarray(read), np.asarray(unconditional)).all()
    np.testing.assert_allclose(run(params, jnp.ones(BATCH)), read, rtol=1e-5, atol=2e-6)


def test_each_condition_matters_and_is_dropped_per_sample(world):
    everything = world(world.conditions)
    keep = jnp.array([1.0, 0.0, 1.0, 0.0])
    for name in KEEPS:
        dropped = world(world.conditions.replace(**{name: keep}))
        assert differ(dropped, everything).tolist() == [False, True, False, True], name


def test_no_keep_field_keeps_all(world):
    run = jax.jit(lambda p, c: world.network.bind(p)(world.latents, world.timesteps, c))
    ours = run(world.params, world.conditions)
    np.testing.assert_allclose(ours, world(world.conditions), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attn2", ["none", "clip_image"])
def test_dropping_everything_is_having_nothing(world, attn2):
    """What is left of the source's embedding is zeros."""
    run, given, embedding = world, world.conditions, jnp.ones((BATCH, 1, 12))
    if attn2 == "clip_image":
        settings = SMALL | {"attn2": attn2, "cross_attention_features": 12}
        network = Network(lambda rngs: Denoiser(**settings, rngs=rngs))
        params = random_like(network.abstract)
        run = jax.jit(lambda c: network.bind(params)(world.latents, world.timesteps, c))
        given = given.replace(context=embedding)
    masked = run(given.replace(**dict.fromkeys(KEEPS, jnp.zeros(BATCH))))
    np.testing.assert_allclose(masked, run(Conditions()), rtol=1e-4, atol=1e-5)
    if attn2 == "clip_image":
        zeroed = run(Conditions(context=0 * embedding))
        np.testing.assert_allclose(masked, zeroed, rtol=1e-4, atol=1e-5)
        assert differ(run(Conditions(context=embedding)), np.asarray(zeroed)).all()


def test_dropped_conditions_cannot_be_seen(world):
    keep = jnp.zeros(BATCH)
    other = world.conditions.replace(
        reference=jax.tree.map(lambda x: -x, world.conditions.reference),
        expression=-world.conditions.expression,
        driving_pose=poses(BATCH, 9),
    )
    for name in ("reference", "pose", "expression"):
        field = {"reference": "reference", "pose": "driving_pose", "expression": "expression"}[name]
        dropped = world.conditions.replace(**{f"keep_{name}": keep})
        changed = dropped.replace(**{field: getattr(other, field)})
        np.testing.assert_allclose(world(dropped), world(changed), rtol=1e-4, atol=1e-5)


def test_targets_of_a_source_are_independent(world):
    """One source with two targets equals the source repeated for each of them."""
    conditions = world.conditions.replace(
        reference=jax.tree.map(lambda x: jnp.repeat(x, TARGETS, 0), world.conditions.reference),
        source_pose=jnp.repeat(world.conditions.source_pose, TARGETS, 0),
    )
    np.testing.assert_allclose(world(world.conditions), world(conditions), rtol=1e-4, atol=1e-5)


def test_cached_conditions_give_the_same(world):
    """With neither the bank nor anything to project or to warp left for a denoising step."""
    expected = world(world.conditions)
    denoiser = world.network.bind
    keys_values = jax.jit(lambda p, bank: denoiser(p).keys_values(bank))(
        world.params, world.conditions.reference
    )
    residuals = jax.jit(lambda p, c: denoiser(p).residuals(c))(world.params, world.conditions)
    cached = world.conditions.replace(reference=None, keys_values=keys_values, residuals=residuals)
    np.testing.assert_allclose(world(cached), expected, rtol=1e-4, atol=1e-5)


def test_hidden_reference_tokens(world):
    bank = world.conditions.reference
    none = random_token_keep(jax.random.key(0), bank, 1.0)
    everything = random_token_keep(jax.random.key(0), bank, 0.0)
    some = random_token_keep(jax.random.key(0), bank, 0.3)
    assert 0.5 < float(jnp.mean(next(iter(some.values())))) < 0.9
    without_pose = world.conditions.replace(keep_pose=jnp.zeros(BATCH))
    without_reference = without_pose.replace(keep_reference=jnp.zeros(BATCH))
    hidden = world(without_pose.replace(reference_token_keep=none))
    np.testing.assert_allclose(hidden, world(without_reference), rtol=1e-4, atol=1e-5)
    shown = world(without_pose.replace(reference_token_keep=everything))
    np.testing.assert_allclose(shown, world(without_pose), rtol=1e-4, atol=1e-5)
    assert differ(world(without_pose.replace(reference_token_keep=some)), shown).all()
    # Each block hides its own tokens, and a source's are hidden from its own targets alone.
    alike = [keep for keep in some.values() if keep.shape == next(iter(some.values())).shape]
    assert len(alike) == 3 and len({np.asarray(keep).tobytes() for keep in alike}) == 3
    of_first = {path: keep.at[1:].set(True) for path, keep in some.items()}
    changed = differ(world(without_pose.replace(reference_token_keep=of_first)), shown)
    assert changed.tolist() == [True, True, False, False]


def test_frames_of_a_clip(world):
    clip = Conditions(
        reference=jax.tree.map(lambda x: x[:1], world.conditions.reference),
        source_pose=world.conditions.source_pose[:1],
        driving_pose=world.conditions.driving_pose,
        expression=world.conditions.expression,
    )
    frames = np.array([2, 0, 1, 3])
    chosen = world(select_frames(clip, frames), world.latents[frames], world.timesteps[frames])
    np.testing.assert_allclose(chosen, world(clip)[frames], rtol=1e-4, atol=1e-5)


def test_ray_maps_are_the_source_s_then_the_target_s():
    """Three features each; a checkpoint's first layer reads them in that order."""
    source, driving = poses(SOURCES, 3), poses(BATCH, 4)
    keep = jnp.array([1.0, 0.0, 1.0, 1.0])
    rays = ray_maps(source, driving, (4, 6), keep, kind="displacement", homogeneous=True)
    assert rays.shape == (BATCH, 4, 6, 6) and not rays[1].any()
    for sample in (0, 2, 3):
        one, other = source[sample // TARGETS], driving[sample]
        for pose, found in ((one, rays[sample, ..., :3]), (other, rays[sample, ..., 3:])):
            expected = geometry.ray_map(pose[None], 4, 6)[0]
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_warped_bank(world):
    bank, source = world.conditions.reference, world.conditions.source_pose
    still = warp_bank(bank, bank, source, jnp.repeat(source, TARGETS, 0), padding="zeros")
    for path, features in bank.items():
        np.testing.assert_array_equal(still[path], np.repeat(features, TARGETS, axis=0))
    # One block alone, its volume written out: channel = ch * depth + d.
    path = "down_blocks.0.attentions.0.transformer_blocks.0"
    moved = warp_bank(bank, bank, source, world.conditions.driving_pose, padding="border")[path]
    depth = bank[path].shape[1] // 2
    volume = np.stack([bank[path][..., d::depth] for d in range(depth)], axis=1)
    sources = jnp.repeat(source, TARGETS, 0)
    expected = geometry.warp(
        jnp.repeat(volume, TARGETS, 0), sources, world.conditions.driving_pose, "border"
    )
    for d in range(depth):
        np.testing.assert_allclose(moved[..., d::depth], expected[:, d], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["channel_depth", "depth_channel"])
def test_order_of_the_volume(order):
    """Of 6 x 6 x 12 features: depth 3 with 4 channels, index by the formula; then moved and put back by it."""
    features = np.random.default_rng(0).normal(size=(1, 6, 6, 12)).astype(np.float32)
    index = {
        "channel_depth": lambda channel, depth: channel * 3 + depth,
        "depth_channel": lambda channel, depth: depth * 4 + channel,
    }[order]
    volume = np.empty((1, 3, 6, 6, 4), np.float32)
    for depth in range(3):
        for channel in range(4):
            volume[0, depth, :, :, channel] = features[..., index(channel, depth)]
    source, driving = poses(1, 3), poses(1, 4)
    moved = geometry.warp(jnp.asarray(volume), source, driving)
    expected = np.empty_like(features)
    for depth in range(3):
        for channel in range(4):
            expected[..., index(channel, depth)] = moved[0, depth, :, :, channel]
    bank = {"block": jnp.asarray(features)}
    found = warp_bank(bank, bank, source, driving, padding="zeros", order=order)["block"]
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("positions", ["sinusoidal", "none"])
def test_expression_tokens(linear, positions):
    """method.md 4.4: a layer or none, 16 numbers as 2 tokens of 8, and sines and cosines of their place or none."""
    network = Network(
        lambda rngs: ExpressionTokens(16, (2, 8), linear=linear, positions=positions, rngs=rngs)
    )
    params = random_like(network.abstract)
    assert set(params) == ({"linear", "null_tokens"} if linear else {"null_tokens"})
    latent = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
    keep = jnp.array([1.0, 0.0])
    found = network.bind(params)(jnp.asarray(latent), keep, 2)
    expected = latent[0]
    if linear:
        expected = expected @ params["linear"]["kernel"] + params["linear"]["bias"]
    expected = np.stack([np.reshape(expected, (2, 8)), params["null_tokens"]])
    if positions == "sinusoidal":
        angles = np.arange(2)[:, None] / 10000 ** (np.arange(4) / 4)
        expected = expected + np.stack([np.sin(angles), np.cos(angles)], -1).reshape(2, 8)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("drop", ["image", "always", "never"])
def test_what_attn2_reads_where_the_reference_is_dropped(world, drop):
    """Zeros in the place of an image's embedding, or of the constant text, or of neither."""
    keep = jnp.array([1.0, 0.0, 1.0, 0.0])
    embedding = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, 1, 12)), jnp.float32)
    for attn2 in ("clip_image", "null_text"):
        settings = SMALL | {"attn2": attn2, "cross_attention_features": 12, "null_text_tokens": 3}
        network = Network(lambda rngs: Denoiser(**settings, drop_attn2=drop, rngs=rngs))  # noqa: B023
        params = random_like(network.abstract)
        module = network.bind(params)
        everything = world.conditions.replace(context=embedding)
        whole = embedding
        if attn2 == "null_text":
            whole = np.repeat(np.asarray(params["null_text"])[None], BATCH, 0)
        zeroed = drop == "always" or (drop == "image" and attn2 == "clip_image")
        dropped = np.where(keep[:, None, None] == 1, whole, 0.0) if zeroed else whole
        np.testing.assert_array_equal(module._context(everything, BATCH), whole)
        given = everything.replace(keep_reference=keep)
        np.testing.assert_array_equal(module._context(given, BATCH), dropped)
        # Without a reference, as in a branch of the guidance that leaves it out.
        nothing = module._context(Conditions(), BATCH)
        if attn2 == "null_text":
            np.testing.assert_array_equal(nothing, 0 * whole if zeroed else whole)
        else:
            np.testing.assert_array_equal(nothing, np.zeros((BATCH, 1, 12)))


def test_places_to_read_are_found_once_a_resolution(world, monkeypatch):
    """Four transformer blocks, three of them on the 8x8 grid and one on 4x4."""
    find, asked = geometry.source_coordinates, []

    def noted(source, driving, shape):
        asked.append(shape)
        return find(source, driving, shape)

    monkeypatch.setattr(geometry, "source_coordinates", noted)
    jax.eval_shape(
        lambda *a: world.network.bind(a[0])(*a[1:]),
        *(world.params, world.latents, world.timesteps, world.conditions),
    )
    assert len(world.conditions.reference) == 4
    assert sorted(asked) == [(2, 4, 4), (4, 8, 8)]


def test_branches_of_the_guidance(world):
    full = branch_conditions(world.conditions, "full")
    reduced = branch_conditions(world.conditions, "reduced")
    assert jax.tree.structure(full) == jax.tree.structure(reduced)
    np.testing.assert_array_equal(world(full), world(world.conditions))
    dropped = world(world.conditions.replace(keep_expression=jnp.zeros(BATCH)))
    np.testing.assert_array_equal(world(reduced), dropped)
    null = world(branch_conditions(world.conditions, "null"))
    np.testing.assert_allclose(null, world(Conditions()), rtol=1e-4, atol=1e-5)
    alone = world(branch_conditions(world.conditions, "expression"))
    bare = world.conditions.replace(keep_reference=jnp.zeros(BATCH), keep_pose=jnp.zeros(BATCH))
    np.testing.assert_allclose(alone, world(bare), rtol=1e-4, atol=1e-5)

    # The source's pose without the source: ray maps of it twice, and nothing to warp.
    still = jnp.repeat(world.conditions.source_pose, TARGETS, 0)
    nothing = dict.fromkeys(("keep_reference", "keep_expression"), jnp.zeros(BATCH))
    turned = world(branch_conditions(world.conditions, "null", NullReading(pose="source")))
    expected = world(world.conditions.replace(driving_pose=still, **nothing))
    np.testing.assert_allclose(turned, expected, rtol=1e-4, atol=1e-5)
    assert differ(turned, null).all()

    source = jnp.ones((1, 16))
    reading = NullReading(expression="source", reference="kept", pose="source")
    null = branch_conditions(world.conditions, "null", reading, source)
    expected = world.conditions.replace(expression=jnp.ones((BATCH, 16)), driving_pose=still)
    np.testing.assert_allclose(world(null), world(expected), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="source's expression"):
        branch_conditions(world.conditions, "null", reading)


@pytest.mark.parametrize(
    ("settings", "read"),
    [
        (
            {"raymap": "plucker6", "raymap_w": 0, "warp_kernel": 1, "warp_padding": "border"},
            {"driving_pose", "expression"},
        ),
        (
            {
                "raymap": "none",
                "warp_kernel": 0,
                "expression_injector": "xnemo",
                "expression_heads": 4,
            },
            {"expression"},
        ),
        (
            {"attn2": "clip_image", "cross_attention_features": 12, "expression_null": "zero"},
            {"driving_pose", "expression", "context"},
        ),
        (
            {"attn2": "null_text", "cross_attention_features": 12, "expression_injector": "none"},
            {"driving_pose", "null_text"},
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values() if isinstance(value, dict) else "")),
)
def test_every_choice_reads_what_it_should(world, settings, read):
    """One condition changed alone changes every sample, or none."""
    network = Network(lambda rngs: Denoiser(**(SMALL | settings), rngs=rngs))
    conditions = world.conditions.replace(**dict.fromkeys(KEEPS, jnp.ones(BATCH)))
    others = {"driving_pose": poses(BATCH, 9), "expression": -conditions.expression}
    if settings.get("attn2") == "clip_image":
        others["context"] = -jnp.ones((BATCH, 1, 12))
        conditions = conditions.replace(context=-others["context"])
    params = random_like(network.abstract)
    run = jax.jit(lambda p, c: network.bind(p)(world.latents, world.timesteps, c))
    full = np.asarray(run(params, conditions))
    changed = {
        name: (params, conditions.replace(**{name: other})) for name, other in others.items()
    }
    if "null_text" in params:
        changed["null_text"] = params | {"null_text": -params["null_text"]}, conditions
    moved = {name: differ(np.asarray(run(*given)), full) for name, given in changed.items()}
    assert {name: set(each.tolist()) for name, each in moved.items()} == {
        name: {name in read} for name in changed
    }
    nothing = conditions.replace(**dict.fromkeys(KEEPS, jnp.zeros(BATCH)))
    assert differ(np.asarray(run(params, nothing)), full).all()


def test_reference_with_ray_map_and_context():
    network = Network(
        lambda rngs: ReferenceUNet(
            **TINY,
            attn2="clip_image",
            cross_attention_features=12,
            raymap_reference=True,
            rngs=rngs,
        )
    )
    params, latents = random_like(network.abstract), jnp.ones((2, 8, 8, 4))
    run = jax.jit(lambda *a: network.bind(params)(*a))
    banks = [
        run(latents, jnp.full((2, 1, 12), value), poses(2, seed))
        for value, seed in ((1.0, 0), (2.0, 0), (1.0, 1))
    ]
    last = "up_blocks.1.attentions.1.transformer_blocks.0"
    assert banks[0][last].shape == (2, 8, 8, 16)
    assert np.abs(banks[0][last] - banks[1][last]).max() > 1e-3
    assert np.abs(banks[0][last] - banks[2][last]).max() > 1e-3


def count(constructor, **settings) -> float:
    network = Network(lambda rngs: constructor(**settings, rngs=rngs))
    return parameter_count(network.abstract) / 1e6


def test_full_sizes():
    """method.md 4.6, in millions."""
    assert count(ReferenceUNet) == pytest.approx(815.5, rel=0.005)
    assert count(Denoiser) == pytest.approx(952.3, rel=0.005)
    assert count(ReferenceUNet, attn2="clip_image") == pytest.approx(859.5, rel=0.005)
    assert count(Denoiser, attn2="clip_image") == pytest.approx(996.3, rel=0.005)


@pytest.mark.slow
def test_full_sizes_of_the_choices():
    assert count(Denoiser, warp_kernel=0) == pytest.approx(840.8, rel=0.005)
    injector = count(Denoiser, expression_injector="xnemo", warp_kernel=0) - count(ReferenceUNet)
    assert injector == pytest.approx(372, rel=0.005)
