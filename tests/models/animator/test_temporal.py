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


def test_too_many_frames():
    modules = small_temporal(max_frames=4)
    with pytest.raises(ValueError, match="at most 4 frames"):
        modules.bind(random_like(modules.abstract)).apply(
            "mid_block.motion_modules.0", np.zeros((5, 2, 2, 32)), 5
        )


def test_full_size():
    full = Network(lambda rngs: TemporalModules(rngs=rngs))
    assert parameter_count(full.abstract) == pytest.approx(453.2e6, rel=0.005)
    without = Network(lambda rngs: TemporalModules(middle=False, rngs=rngs))
    assert parameter_count(without.abstract) == pytest.approx(417.1e6, rel=0.005)
