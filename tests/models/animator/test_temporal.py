"""Temporal modules against AnimateDiff as diffusers has it, and their size."""

import diffusers
import jax
import numpy as np
import pytest
import torch

from dexportrait_jax.models.animator.temporal import TemporalModules
from dexportrait_jax.models.animator.transformer import BlockInputs
from dexportrait_jax.state import Network, parameter_count
from tests.models.animator.test_unet import unet_pair
from tests.published import parameters_from_torch, random_like, randomise, relative_error

CHANNELS, LAYERS, FRAMES = (16, 32, 32), 1, 3


def small_temporal(**settings):
    sizes = {"block_channels": CHANNELS, "layers_per_block": LAYERS, "groups": 8, "heads": 2}
    return Network(lambda rngs: TemporalModules(**(sizes | settings), rngs=rngs))


@pytest.mark.parametrize("middle", [True, False])
def test_video_unet_equals_diffusers(middle):
    published, network, params = unet_pair(CHANNELS, LAYERS)
    adapter = randomise(
        diffusers.MotionAdapter(
            block_out_channels=CHANNELS,
            motion_layers_per_block=LAYERS,
            motion_num_attention_heads=2,
            motion_norm_num_groups=8,
            motion_max_seq_length=32,
            use_motion_mid_block=middle,
        ),
        seed=1,
    )
    state = {k: v for k, v in adapter.state_dict().items() if not k.endswith("pos_embed.pe")}
    temporal = small_temporal(middle=middle)
    temporal_params = parameters_from_torch(temporal.abstract, state)
    video = diffusers.UNetMotionModel.from_unet2d(published, adapter).eval()

    generator = np.random.default_rng(0)
    latents = generator.normal(size=(2 * FRAMES, 16, 16, 4)).astype(np.float32)
    context = generator.normal(size=(2, 5, 24)).astype(np.float32)
    timesteps = np.array([3, 700])
    with torch.no_grad():
        clips = torch.tensor(latents).reshape(2, FRAMES, 16, 16, 4).permute(0, 4, 1, 2, 3)
        contexts = torch.tensor(np.repeat(context, FRAMES, axis=0))
        expected = video(clips, torch.tensor(timesteps), contexts).sample
        expected = expected.permute(0, 2, 3, 4, 1).reshape(latents.shape)

    @jax.jit
    def run(params, temporal_params):
        inputs = BlockInputs(context=np.repeat(context, FRAMES, axis=0))
        times = np.repeat(timesteps, FRAMES)
        modules = temporal.bind(temporal_params)
        return network.bind(params).forward(latents, times, inputs, None, modules, FRAMES)[0]

    assert relative_error(run(params, temporal_params), expected) <= 1e-4


def original(
    state: dict[str, torch.Tensor], hidden: np.ndarray, frames: int, heads: int, groups: int
):
    """AnimateDiff's motion_module.py, one ``TemporalTransformer3DModel`` of one block, said plainly.

    ``hidden``: (clips * frames, h, w, c). GroupNorm runs after "b c f h w -> (b f) c h w": on every frame alone.
    """
    functional = torch.nn.functional

    def linear(x, name):
        return functional.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def layer_norm(x, name):
        return functional.layer_norm(
            x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"]
        )

    _, height, width, channels = hidden.shape
    x = torch.tensor(hidden).permute(0, 3, 1, 2)
    x = functional.group_norm(x, groups, state["norm.weight"], state["norm.bias"], eps=1e-6)
    x = linear(x.permute(0, 2, 3, 1).reshape(len(hidden), height * width, channels), "proj_in")
    x = (
        x.reshape(-1, frames, height * width, channels)
        .transpose(1, 2)
        .reshape(-1, frames, channels)
    )
    places = torch.arange(frames)[:, None]
    rates = torch.exp(torch.arange(0, channels, 2) * (-np.log(10000.0) / channels))
    table = torch.zeros(frames, channels)
    table[:, 0::2], table[:, 1::2] = torch.sin(places * rates), torch.cos(places * rates)
    block = "transformer_blocks.0"
    for number in (1, 2):
        normed = layer_norm(x, f"{block}.norm{number}") + table
        q, k, v = (
            linear(normed, f"{block}.attn{number}.to_{one}")
            .reshape(-1, frames, heads, channels // heads)
            .transpose(1, 2)
            for one in "qkv"
        )
        scores = (q @ k.transpose(-1, -2)) * (channels // heads) ** -0.5
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
        x = x + linear(mixed, f"{block}.attn{number}.to_out.0")
    value, gate = linear(layer_norm(x, f"{block}.norm3"), f"{block}.ff.net.0.proj").chunk(2, -1)
    x = x + linear(value * functional.gelu(gate), f"{block}.ff.net.2")
    x = linear(x, "proj_out").reshape(-1, height * width, frames, channels).transpose(1, 2)
    return hidden + x.reshape(hidden.shape).numpy()


def test_norm_of_every_frame_equals_animatediffs_own_code():
    """And that over the clip is another one: frames of other brightness are seen as such."""
    heads, groups, path = 2, 8, "down_blocks.1.motion_modules.0"
    adapter = randomise(
        diffusers.MotionAdapter(
            block_out_channels=CHANNELS,
            motion_layers_per_block=LAYERS,
            motion_num_attention_heads=heads,
            motion_norm_num_groups=groups,
            motion_max_seq_length=32,
        ),
        seed=1,
    )
    state = {k: v for k, v in adapter.state_dict().items() if not k.endswith("pos_embed.pe")}
    frame, clip = small_temporal(norm="frame"), small_temporal(norm="clip")
    params = parameters_from_torch(frame.abstract, state)
    generator = np.random.default_rng(0)
    hidden = generator.normal(size=(2 * FRAMES, 4, 4, CHANNELS[1])).astype(np.float32)
    hidden *= np.linspace(0.5, 2, 2 * FRAMES, dtype=np.float32)[:, None, None, None]
    module = {k.removeprefix(f"{path}."): v for k, v in state.items() if k.startswith(f"{path}.")}
    with torch.no_grad():
        expected = original(module, hidden, FRAMES, heads, groups)
    assert relative_error(frame.bind(params).apply(path, hidden, FRAMES), expected) <= 1e-5
    assert relative_error(clip.bind(params).apply(path, hidden, FRAMES), expected) > 1e-2


@pytest.mark.slow
def test_zero_at_initialisation():
    modules = small_temporal()
    params = modules.init(jax.random.key(0))
    hidden = np.random.default_rng(0).normal(size=(6, 4, 4, 32)).astype(np.float32)
    for path in ("down_blocks.1.motion_modules.0", "mid_block.motion_modules.0"):
        np.testing.assert_array_equal(modules.bind(params).apply(path, hidden, 3), hidden)


def test_clips_do_not_touch_each_other():
    modules = small_temporal()
    params = random_like(modules.abstract)
    hidden = np.random.default_rng(0).normal(size=(6, 4, 4, 32)).astype(np.float32)
    path = "up_blocks.0.motion_modules.1"
    both = modules.bind(params).apply(path, hidden, 3)
    second = modules.bind(params).apply(path, hidden[3:], 3)
    np.testing.assert_allclose(both[3:], second, rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(modules.bind(params).apply(path, hidden, 6)) - both).max() > 1e-3


def test_as_many_frames_as_there_may_be_and_too_many():
    module = small_temporal(max_frames=4)
    params = random_like(module.abstract)

    def run(batch, frames):
        hidden = jax.ShapeDtypeStruct((batch, 2, 2, 32), np.float32)
        modules = module.bind(params)
        return jax.eval_shape(
            lambda hidden: modules.apply("mid_block.motion_modules.0", hidden, frames), hidden
        )

    assert run(8, 4).shape == (8, 2, 2, 32)
    for batch, frames in ((5, 5), (6, 4)):
        with pytest.raises(ValueError, match=f"{batch} frames in .* {frames}: .* at most 4 frames"):
            run(batch, frames)


def test_full_size():
    full = Network(lambda rngs: TemporalModules(rngs=rngs))
    assert parameter_count(full.abstract) == pytest.approx(453.2e6, rel=0.005)
    without = Network(lambda rngs: TemporalModules(middle=False, rngs=rngs))
    assert parameter_count(without.abstract) == pytest.approx(417.1e6, rel=0.005)
