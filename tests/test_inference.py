"""inference.py and animator_inference.py: exports of every stage animate, and nothing depends on a
clip's length.
"""

import dataclasses
import gc
import json
import os
import subprocess
import sys
import tracemalloc

import jax
import numpy as np
import pytest

from data_pipelines.video import read_frames
from dexportrait_jax import animator_windows, pose_transfer
from dexportrait_jax.animator_windows import DenoiserPrograms
from dexportrait_jax.config import load_config
from dexportrait_jax.diffusion import windows
from dexportrait_jax.diffusion.guidance import guidance_plan
from dexportrait_jax.diffusion.sampler import frame_noise, sample, whole
from dexportrait_jax.errors import UserError
from dexportrait_jax.inference import Drive, Sampling, load_model, nbytes
from dexportrait_jax.models.animator.branches import NullReading, branch_conditions
from dexportrait_jax.models.animator.conditioning import Conditions
from dexportrait_jax.tasks import animator, autoencoder, motion
from dexportrait_jax.tasks.pictures import to_float, to_uint8
from dexportrait_jax.weights.exporting import export_groups
from tests.compiling import QUICK_FLAGS

SMALL = [
    "model.unet.block_channels=(16, 32)",
    "model.unet.groups=4",
    "model.unet.heads=2",
    "model.autoencoder.block_channels=(8, 8, 8)",
    "model.autoencoder.groups=4",
    "data.frames=4",
    "sampling.steps=4",
    "sampling.hybrid_steps=1",
    "sampling.shared_noise=0.5",
    "sampling.temperature=0.7",
]
IMAGE_ENCODER = {
    "image_size": 16,
    "patch_size": 8,
    "features": 8,
    "layers": 1,
    "heads": 1,
    "projection": 12,
}
# Smaller still, where nothing is asked about the networks themselves.
SMALLEST = [
    "model.unet.layers_per_block=1",
    "model.pose.depths=(1, 1, 1, 1)",
    "model.expression.depth=1",
]
TEXT_ATTENTION = ["model.attn2.cross_attention_features=12", "model.attn2.null_text_tokens=3"]
# The stages, and the image stage with what else SD1.5's text attention may read.
STAGES = {
    "motion": ("configs/motion.py:tiny", motion, []),
    "animator_image": ("configs/animator_image.py:tiny", animator, SMALL),
    "animator_video": ("configs/animator_video.py:tiny", animator, SMALL),
    "clip_image": (
        "configs/animator_image.py:tiny",
        animator,
        [
            *SMALL,
            *TEXT_ATTENTION,
            "model.attn2.attn2=clip_image",
            *(f"model.image_encoder.{name}={value}" for name, value in IMAGE_ENCODER.items()),
        ],
    ),
    "null_text": (
        "configs/animator_image.py:tiny",
        animator,
        [*SMALL, *TEXT_ATTENTION, "model.attn2.attn2=null_text"],
    ),
}


def random_params(abstract):
    """Numbers of a plausible size everywhere, so that no branch is silent; far quicker than to
    initialise.
    """
    random = np.random.default_rng(0)

    def fill(path, leaf):
        values = random.standard_normal(leaf.shape, np.float32)
        if path[-1].key == "scale":
            return 1 + 0.05 * values
        fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 400.0
        return values / np.sqrt(fan_in)

    return jax.tree_util.tree_map_with_path(fill, abstract)


def export(folder, stage, overrides=()):
    """A small model with random weights as an export."""
    address, task, own = STAGES[stage]
    config = load_config(address, [*own, *overrides])
    networks = task.build_networks(config)
    groups = {name: random_params(network.abstract) for name, network in networks.items()}
    model = {"stage": config.stage, "config": config.to_dict(), "step": 0, "ema": False}
    return export_groups(folder / stage, model | {"crop": None}, groups)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    loaded = {}

    def get(stage):
        if stage not in loaded:
            loaded[stage] = load_model(export(tmp_path_factory.mktemp("export"), stage))
        return loaded[stage]

    return get


# Those of pictures are windows of one frame, and one of them is enough for a test that runs often.
MARKS = {
    "animator_image": pytest.mark.exhaustive,
    "clip_image": pytest.mark.exhaustive,
    "null_text": pytest.mark.exhaustive,
}


@pytest.fixture(params=[pytest.param(stage, marks=MARKS.get(stage, ())) for stage in STAGES])
def model(request, models):
    return models(request.param)


@pytest.fixture
def video_model(models):
    return models("animator_video")


POSE = np.eye(3, 4, dtype=np.float32)
SOURCE_FLOAT = np.zeros((8, 64, 64, 3), np.float32)
SOURCE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def make_drive(model, frames, degrees=3.0):
    turns = [pose_transfer.euler_rotation(0, degrees * i, 0) for i in range(frames)]
    poses = pose_transfer.join_pose(np.stack(turns), np.zeros((frames, 3)), np.ones(frames))
    latent = model.encode(SOURCE[None], SOURCE[None])[1].shape[1]
    codes = np.random.default_rng(1).standard_normal((99, latent)).astype(np.float32)
    return Drive(poses[0], codes[0], poses, codes[:frames])


def pictures(model, frames, sampling=Sampling(), source=SOURCE):  # noqa: B008 - frozen
    return np.concatenate(list(model.animate(source, make_drive(model, frames), sampling)))


def test_every_stage_animates_the_same_way_twice(model):
    first, again = pictures(model, 3), pictures(model, 3)
    assert first.shape == (3, 64, 64, 3) and first.dtype == np.uint8
    assert (first == again).all() and first.std() > 1
    assert (first[0] != first[2]).any()  # the drive does something
    if model.stage != "motion":
        assert (pictures(model, 3, Sampling(seed=1)) != first).any()


def test_encoders_take_any_number_of_pictures(model):
    images = np.random.default_rng(2).integers(0, 256, (11, 64, 64, 3), dtype=np.uint8)
    poses, codes = model.encode(images, images)
    assert poses.shape == (11, 3, 4) and len(codes) == 11
    alone = model.encode(images[9:10], images[9:10])
    np.testing.assert_allclose(alone[0][0], poses[9], atol=1e-5)
    np.testing.assert_allclose(alone[1][0], codes[9], atol=1e-4)


def test_length_compiles_nothing_and_short_clips_begin_long_ones(model):
    pictures(model, 3)
    before = compiled(model)
    long, short = pictures(model, 11), pictures(model, 2)
    assert len(long) == 11 and compiled(model) == before
    if model.stage != "animator_video":  # there a window sees its neighbours
        assert np.abs(long[:2].astype(int) - short).max() <= 1


def compiled(model):
    jitted = [model._encode]
    if model.stage == "motion":
        jitted.append(model._reenact)
    else:
        jitted += [model._source, model._decode, *model._denoiser("learned")]
    return [function._cache_size() for function in jitted]


def test_another_clip_and_source_compile_nothing(model, programs):
    """Neither the networks nor so much as a slice: lengths, source, seed and batch remainders differ."""
    jax.jit(lambda x: x + 1)(np.zeros(7))
    assert len(programs) == 1  # it hears
    pictures(model, 3)
    programs.clear()
    assert len(pictures(model, 13, Sampling(seed=5), SOURCE[::-1])) == 13
    pictures(model, 2)
    if model.stage == "animator_video":  # windows lie elsewhere in every step
        moving = Sampling(overlap=1, window_offset="random", window_ends="closed")
        assert len(pictures(model, 13, moving)) == 13
    assert programs == []


class Counted:
    """A program, and how often it ran."""

    def __init__(self, program):
        self.program, self.runs = program, 0

    def __call__(self, *arguments):
        self.runs += 1
        return self.program(*arguments)


def test_passes_of_the_denoiser(video_model, monkeypatch):
    """The paper's 35 steps: 74 passes a window, one of the reference UNet and of its projections.

    6 frames are 2 windows of 4 that overlap by 2; the warped features of each are made once.
    """
    model = video_model
    counted = [Counted(program) for program in model._denoiser("learned")]
    source = Counted(model._source)
    monkeypatch.setattr(model, "_source", source)
    monkeypatch.setitem(model._denoisers, False, DenoiserPrograms(*counted))
    paper = Sampling(steps=35, guidance=2.5, hybrid_steps=5)
    for frames, count in ((2, 1), (6, 2)):
        for one in (source, *counted):
            one.runs = 0
        pictures(model, frames, paper)
        assert source.runs == 1
        assert [one.runs for one in counted] == [1, count, 74 * count]


@pytest.mark.parametrize(
    ("overlap", "weights", "seam"),
    [(2, None, False), (0, None, True), (2, [1e-6, 1, 1, 1e-6], True)],
    ids=["as it is", "no overlap", "no blending"],
)
def test_long_clips_have_no_seam(overlap, weights, seam, video_model, monkeypatch):
    """Where windows begin, frames change as they do elsewhere; without overlap or blending they do not.

    A head that turns evenly, in noise that all frames have in common: what changes from frame to frame is
    the pose and the place in the window, which this random model minds very much.
    """
    frames, length = 16, 4
    drive = make_drive(video_model, frames, degrees=1.0)
    drive = dataclasses.replace(drive, expressions=np.repeat(drive.expressions[:1], frames, 0))
    config = video_model.config.copy_and_resolve_references()
    config.unlock()
    config.sampling.update(overlap=overlap, shared_noise=1.0)
    monkeypatch.setattr(video_model, "config", config)
    if weights:
        monkeypatch.setattr(windows, "triangular_weights", lambda length: np.float32(weights))
    made = video_model.animate(SOURCE, drive, Sampling(steps=4, guidance=1.0))
    change = np.abs(np.diff(np.concatenate(list(made)).astype(float), axis=0)).mean((1, 2, 3))
    # change[i] is from frame i to the next; without blending a window's first frame is still the one before's.
    starts = windows.window_frames(frames, length, overlap)[1:, 0]
    seams = starts if weights else starts - 1
    inside = np.setdiff1d(np.arange(1, frames - 2), seams)
    ratio = change[seams].mean() / change[inside].mean()
    assert ratio > 2.2 if seam else ratio < 1.7


def test_what_does_not_fit_is_made_anew_in_every_step_and_no_more(video_model, monkeypatch):
    """A clip too long for the memory of warped features: one warp a window and step, same pictures."""
    model, sampling = video_model, Sampling(steps=4, guidance=2.5, hybrid_steps=1)
    kept = pictures(model, 6, sampling)
    keys_values, residuals, predict = model._denoiser("learned")
    keys_values, residuals = Counted(keys_values), Counted(residuals)
    monkeypatch.setitem(model._denoisers, False, DenoiserPrograms(keys_values, residuals, predict))
    monkeypatch.setattr(animator_windows, "WINDOW_CACHE_BYTES", 0)
    np.testing.assert_array_equal(pictures(model, 6, sampling), kept)
    assert (keys_values.runs, residuals.runs) == (1, 2 * 4)


def test_projections_are_not_made_again_in_a_pass(video_model, monkeypatch):
    """What the denoiser is given holds no features of the reference that it could project or warp."""
    seen = []

    def noted(params, latents, timesteps, conditions):
        seen.append(conditions)
        return latents

    programs = video_model._denoiser("learned")
    monkeypatch.setitem(video_model._denoisers, False, programs._replace(predict=noted))
    pictures(video_model, 2)
    assert all(conditions.reference is None for conditions in seen)
    with_reference = [one for one in seen if one.keys_values is not None]
    assert 0 < len(with_reference) < len(seen)
    assert all(one.residuals is not None for one in with_reference)


READINGS = [
    {"reading": "expression_in_both"},
    {"reading": "three_scale", "expression_guidance": 4.0},
    {"expression_null": "source"},
    {"expression_null": "zero"},
    {"null_reference": "kept"},
    {"null_reference": "kept", "null_pose": "source"},
    {"null_pose": "source"},
    {"eta": 1.0},
]


ALONE = [{"null_reference": "kept"}, {"null_pose": "source"}]
# Those that decide which branch is given the embedding of the source.
OF_THE_EMBEDDING = [
    {"reading": "expression_in_both"},
    {"null_reference": "kept"},
    {"null_reference": "kept", "null_pose": "source"},
]


@pytest.mark.parametrize(
    ("stage", "reading"),
    [
        # The nulls of reference and pose alone are half of what they are together.
        pytest.param("animator_video", reading, marks=pytest.mark.slow if reading in ALONE else ())
        for reading in READINGS
    ]
    + [
        pytest.param("clip_image", reading, marks=pytest.mark.exhaustive)
        for reading in OF_THE_EMBEDDING
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_every_reading_is_what_its_branches_say(models, stage, reading):
    """A flag reaches the denoiser: one window's prediction by hand, from nothing cached, is the sampler's."""
    model = models(stage)
    frames = model.window
    # Three steps: twice without the expression, once with it.
    sampling = Sampling(steps=3, guidance=2.0, hybrid_steps=1, **reading)
    settings, plan = model.settings(sampling), model.plan(sampling)
    drive = make_drive(model, frames)
    latent, bank, context = model._source(model.params, SOURCE[None], drive.source_pose[None])
    null = settings["expression_null"]
    full = Conditions(
        reference=bank,
        source_pose=drive.source_pose[None],
        driving_pose=drive.poses,
        expression=drive.expressions,
        context=None if context is None else np.repeat(context, frames, 0),
    )
    choice = NullReading(
        "source" if null == "source" else "null",
        settings["null_reference"],
        settings["null_pose"],
    )
    own = np.repeat(drive.source_expression[None], frames, 0)
    programs = model._denoiser(null)

    def predict(latents, timesteps, branch):
        conditions = branch_conditions(full, branch, choice, own)
        return programs.predict(model.params, latents, timesteps, conditions)

    def noise(step, part):
        return 0.7 * frame_noise(0, frames, latent.shape[1:], step=step + 1, shared=0.5)

    wanted = sample(
        whole(predict),
        model.schedule,
        plan,
        noise(-1, slice(0, frames)),
        spacing=settings["spacing"],
        eta=settings["eta"],
        noise=noise,
    )
    made = []
    decode, model._decode = model._decode, lambda params, z: made.append(z[:frames]) or SOURCE_FLOAT
    try:
        list(model.animate(SOURCE, drive, sampling))
    finally:
        model._decode = decode
    # float32 through a network of random weights: a cached product is summed in another order
    np.testing.assert_allclose(made[0], wanted, rtol=1e-3, atol=1e-3)
    plain = Sampling(steps=3, guidance=2.0, hybrid_steps=1)
    assert model.settings(plain) != settings
    if stage == "clip_image":  # and the embedding is no decoration
        timesteps = np.full(frames, 300, np.int32)
        prediction = predict(wanted, timesteps, "full")
        full = full.replace(context=-full.context)
        other = predict(wanted, timesteps, "full")
        assert np.abs(np.asarray(prediction - other)).max((1, 2, 3)).min() > 0.01


def test_animator_equals_the_plain_sampler(video_model):
    """One window: the same pictures as DDIM over the whole clip, nothing cached, nothing cut.

    Guidance 1 needs no unconditional branch, which spares compiling it.
    """
    model, frames = video_model, 4
    drive = make_drive(model, frames)
    params, networks = model.params, model.networks
    latent, bank, _ = model._source(params, SOURCE[None], drive.source_pose[None])
    full = Conditions(
        reference=bank,
        source_pose=drive.source_pose[None],
        driving_pose=drive.poses,
        expression=drive.expressions,
    )

    @jax.jit
    def predict(latents, timesteps, conditions):
        temporal = networks["temporal"].bind(params["temporal"])
        network = networks["denoiser"].bind(params["denoiser"])
        return network(latents, timesteps, conditions, temporal=temporal, frames=frames)

    latents = sample(
        whole(lambda z, t, branch: predict(z, t, branch_conditions(full, branch))),
        model.schedule,
        guidance_plan(4, scale=1.0, hold=1),
        0.7 * frame_noise(0, frames, latent.shape[1:], shared=0.5),
        spacing=model.config.sampling.spacing,
    )
    decoder = networks["autoencoder"].bind(params["autoencoder"])
    wanted = to_uint8(decoder.decode(latents / decoder.scale))
    made = pictures(model, frames, Sampling(guidance=1.0))
    assert np.abs(made.astype(int) - wanted).max() <= 1
    mean = networks["autoencoder"].bind(params["autoencoder"]).encode(to_float(SOURCE[None]))[0]
    np.testing.assert_allclose(latent, mean * decoder.scale, atol=1e-4)


@pytest.mark.slow
def test_memory_of_a_clip_does_not_grow_with_it(video_model, monkeypatch):
    """The host's, of whatever numpy and Python hold, and the devices': no more of a clip than of a window is there."""
    model, most, window = video_model, [], []
    programs = model._denoiser("learned")

    def predict(params, *arguments):
        result = programs.predict(params, *arguments)
        most.append(sum(array.nbytes for array in jax.live_arrays()))
        return result

    def residuals(*arguments):
        result = programs.residuals(*arguments)
        window.append(nbytes(result))
        return result

    def peaks(frames):
        drive, count = make_drive(model, frames), 0
        list(model.animate(SOURCE, make_drive(model, 4), sampling))
        gc.collect()
        most.clear()
        before = sum(array.nbytes for array in jax.live_arrays())
        tracemalloc.start()
        for images in model.animate(SOURCE, drive, sampling):
            count += len(images)
        host = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == frames
        return host, max(most) - before

    sampling = Sampling(steps=2, hybrid_steps=1)
    monkeypatch.setitem(
        model._denoisers, False, programs._replace(predict=predict, residuals=residuals)
    )
    list(model.animate(SOURCE, make_drive(model, 4), sampling))
    # Room for the warped features of two windows, where a clip of twelve frames has five.
    monkeypatch.setattr(animator_windows, "WINDOW_CACHE_BYTES", 2 * window[0])
    (short, short_device), (long, long_device) = peaks(12), peaks(72)
    latents = np.prod(model._source(model.params, SOURCE[None], POSE[None])[0].shape[1:]) * 4
    assert (long - short) / 60 < latents / 4  # numbers of frames, windows and noise
    assert long_device - short_device < window[0]


def test_sampling_settings(video_model, models):
    with pytest.raises(UserError, match="--guidance is for the animator"):
        models("motion").settings(Sampling(guidance=2.0))
    model = video_model
    settings = model.settings(Sampling(seed=2, guidance=3.0))
    given = {
        "seed": 2,
        "steps": 4,
        "guidance": 3.0,
        "hybrid_steps": 1,
        "expression_null": "learned",
    }
    # And everything else of the config: start noise, spacing, eta, ...
    assert settings == {**model.config.sampling.to_dict(), **given}
    assert {"temperature", "shared_noise", "spacing", "eta"} < set(settings)
    assert model.settings(Sampling(steps=12))["hybrid_steps"] == 3  # S keeps its share
    with pytest.raises(UserError, match="hybrid_steps"):
        model.plan(Sampling(hybrid_steps=3))
    with pytest.raises(UserError, match="--steps"):
        model.plan(Sampling(steps=5000))
    with pytest.raises(UserError, match="needs --reading=three_scale"):
        model.plan(Sampling(expression_guidance=2.0))


def test_other_exports_are_refused(tmp_path):
    config = load_config("configs/autoencoder.py:tiny")
    params = {
        "autoencoder": autoencoder.build_networks(config)["autoencoder"].init(jax.random.key(0))
    }
    model = {
        "stage": config.stage,
        "config": config.to_dict(),
        "step": 0,
        "ema": False,
        "crop": None,
    }
    with pytest.raises(UserError, match="cannot animate"):
        load_model(export_groups(tmp_path / "autoencoder", model, params))
    with pytest.raises(UserError, match="no such directory"):
        load_model(tmp_path / "nothing")


@pytest.mark.parametrize("stage", ["motion", "animator_video"])
def test_weights_of_another_width_are_refused(tmp_path, stage):
    """A description that does not belong to the file of weights beside it."""
    place = export(tmp_path, stage)
    description = place / "model.json"
    described = json.loads(description.read_text())
    model = described["config"]["model"]
    if stage == "motion":
        model["pose"]["dims"] = [2 * width for width in model["pose"]["dims"]]
    else:
        model["unet"]["block_channels"] = [32, 32]
    description.write_text(json.dumps(described))
    with pytest.raises(UserError, match="shape") as caught:
        load_model(place)
    assert "\n" not in str(caught.value)


def test_an_export_older_than_a_knob_is_read(tmp_path):
    """Knobs that came later have the default that was true before them."""
    place = export(tmp_path, "motion")
    description = place / "model.json"
    described = json.loads(description.read_text())
    del described["config"]["data"]["augment"]["expression_crop"]["upright"]
    description.write_text(json.dumps(described))
    assert load_model(place).augment["expression_crop"]["upright"] is False


def test_an_export_trained_in_a_type_of_before_is_read(tmp_path):
    """No run begins or goes on in float16; what one has made still animates."""
    assert load_model(export(tmp_path, "motion", ["dtype=float16"])).config.dtype == "float16"


@pytest.mark.slow
def test_two_processes_make_the_same_video(tmp_path, shared_data):
    """Same seed, same video, bit for bit, from the command line with real files."""
    weights = export(tmp_path, "animator_video")
    clip, still = shared_data / "clips" / "carphone.mp4", shared_data / "stills" / "astronaut.png"

    def started(name):
        flags = [f"--weights={weights}", f"--source={still}", f"--driving={clip}"]
        flags += [f"--out={tmp_path / name}", "--seed=3", "--max_frames=3", "--steps=2"]
        command = [sys.executable, "-m", "dexportrait_jax", "animate", *flags]
        return subprocess.Popen(command, env=os.environ | {"XLA_FLAGS": QUICK_FLAGS})

    running = [started("a.mp4"), started("b.mp4")]
    assert [process.wait() for process in running] == [0, 0]
    a, b = (
        np.stack([frame.image for frame in read_frames(tmp_path / name)])
        for name in ("a.mp4", "b.mp4")
    )
    assert len(a) == 3 and (a == b).all() and (a[0] != a[2]).any()
