"""What sampling starts from, how clips are cut into windows, and where the source's embedding goes.

By stubs, so nothing is compiled.
"""

import dataclasses

import cv2
import numpy as np
import pytest

from dexportrait_jax import animator_inference, animator_windows
from dexportrait_jax import config as configs
from dexportrait_jax.animator_inference import AnimatorModel
from dexportrait_jax.animator_windows import ClipWindows, DenoiserPrograms, null_reading
from dexportrait_jax.diffusion.sampler import frame_noise
from dexportrait_jax.diffusion.windows import window_frames
from dexportrait_jax.errors import UserError
from dexportrait_jax.inference import Drive, Sampling
from dexportrait_jax.models.animator.branches import NullReading
from tests.tasks.test_animator import Stub

FRAMES, SIDE = 3, 16
POSE = np.eye(3, 4, dtype=np.float32)
PICTURE = np.full((64, 64, 3), 204, np.uint8)
LATENT = np.random.default_rng(0).normal(size=(SIDE, SIDE, 4)).astype(np.float32)


def drive_of(frames):
    poses, expressions = np.repeat(POSE[None], frames, 0), np.ones((frames, 512), np.float32)
    return Drive(POSE, np.zeros(512, np.float32), poses, expressions)


DRIVE = drive_of(FRAMES)


class Stubbed(AnimatorModel):
    """A stage at the paper's settings with a denoiser that only notes what it is given."""

    def __init__(self, *overrides, context=None, stage="image"):
        config = configs.load_config(f"configs/animator_{stage}.py:full", list(overrides))
        networks = {"temporal": None} if stage == "video" else {}
        super().__init__({"stage": config.stage}, config, networks, {})
        self.seen = []
        self._source = lambda *arguments: (LATENT[None], {}, context)
        self._decode = lambda params, latents: np.zeros((len(latents), 8, 8, 3), np.float32)

    def _denoiser(self, null):
        def predict(params, latents, timesteps, conditions):
            self.seen.append(conditions)
            return np.zeros_like(latents)

        return DenoiserPrograms(lambda *a: {"block": ()}, lambda *a: {}, predict)


@pytest.mark.parametrize("start", ["noise", "ref_blur"])
@pytest.mark.parametrize("by_flag", [True, False])
def test_start_of_sampling(monkeypatch, start, by_flag):
    """X-NeMo's: the latent blurred (kernel 9, sigma 18), with the noise of timestep 953 (method.md 7.1)."""
    overrides = ["diffusion.preset=xnemo", "sampling.temperature=0.9"]
    given = Sampling(seed=4, start=start if by_flag else None)
    model = Stubbed(*overrides, *([] if by_flag else [f"sampling.start={start}"]))
    begun = []
    monkeypatch.setattr(
        animator_inference,
        "sample",
        lambda guided, schedule, plan, latents, **options: begun.append(latents) or latents,
    )
    list(model.animate(PICTURE, DRIVE, given))
    expected = 0.9 * frame_noise(4, FRAMES, LATENT.shape)
    if start == "ref_blur":
        share = np.cumprod(1 - np.linspace(0.00085**0.5, 0.02**0.5, 1000) ** 2)[953]
        blurred = cv2.GaussianBlur(LATENT, (9, 9), 18.0, borderType=cv2.BORDER_REFLECT_101)
        expected = np.sqrt(share) * blurred + np.sqrt(1 - share) * expected
        assert np.sqrt(share) * np.abs(blurred).max() > 1e-3  # not hidden by rounding
    np.testing.assert_allclose(begun[0], expected, rtol=1e-5, atol=1e-5)
    assert model.settings(given)["start"] == start


def test_noise_of_a_clip_longer_than_a_batch(monkeypatch):
    """Every frame has its own, at the start and in every stochastic step, which is no step of the start's."""
    asked = {}

    def noted(guided, schedule, plan, latents, **options):
        asked.update(options, start=latents.copy())
        return latents

    monkeypatch.setattr(animator_inference, "sample", noted)
    model = Stubbed("sampling.temperature=0.9", "sampling.shared_noise=0")
    list(model.animate(PICTURE, drive_of(11), Sampling(seed=4, start="noise", eta=1.0)))
    for step in range(3):
        wanted = 0.9 * frame_noise(4, 11, LATENT.shape, step=step)
        found = asked["start"] if step == 0 else asked["noise"](step - 1, slice(0, 11))
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    np.testing.assert_array_equal(asked["noise"](1, slice(8, 11)), found[8:])


def test_the_blurred_start_is_of_the_first_timestep(monkeypatch):
    """Which offset and number of steps decide: 34 * (1000 // 35) + 0, and 9 * 100 + 1."""
    begun = []
    monkeypatch.setattr(
        animator_inference,
        "blurred_start",
        lambda schedule, source, noise, timestep: begun.append(timestep) or noise,
    )
    monkeypatch.setattr(animator_inference, "sample", lambda *given, **options: given[3])
    for override, given in (("sampling.offset=0", Sampling()), ("seed=0", Sampling(steps=10))):
        list(Stubbed("sampling.start=ref_blur", override).animate(PICTURE, DRIVE, given))
    assert begun == [952, 901]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("frame", [1, 9])
def test_latents_that_are_no_numbers_are_told(monkeypatch, value, frame):
    """In the first batch of frames that is decoded, and in the second."""

    def broken(guided, schedule, plan, latents, **options):
        latents[frame, 0, 0, 0] = value
        return latents

    monkeypatch.setattr(animator_inference, "sample", broken)
    match = f"^frame {frame} cannot be shown: .* not finite"
    with pytest.raises(UserError, match=match) as caught:
        list(Stubbed().animate(PICTURE, drive_of(11), Sampling()))
    assert "\n" not in str(caught.value)


def test_steps_that_are_just_possible():
    """S keeps its share, 5 of 35, of other numbers of steps, to the nearest; half of the steps, and all there are."""
    model = Stubbed()
    shares = [
        model.settings(Sampling(steps=steps))["hybrid_steps"] for steps in (3, 24, 25, 35, 70)
    ]
    assert shares == [0, 3, 4, 5, 10]
    assert len(model.plan(Sampling(steps=10, hybrid_steps=5)).steps) == 10
    assert len(model.plan(Sampling(steps=1000)).steps) == 1000
    with pytest.raises(UserError, match="^--steps=1001: "):
        model.plan(Sampling(steps=1001))


def test_what_was_trained_stands_for_an_expression_that_is_left_out():
    """A model without learned null tokens is sampled with zeros, unless the user asks for tokens that it has not."""
    model = Stubbed("model.denoiser.expression_null=zero")
    assert model.settings(Sampling())["expression_null"] == "zero"
    assert model.settings(Sampling(expression_null="source"))["expression_null"] == "source"
    assert Stubbed().settings(Sampling())["expression_null"] == "learned"
    with pytest.raises(UserError, match="^--expression_null=learned: .*; use zero or source$"):
        model.settings(Sampling(expression_null="learned"))


@pytest.mark.parametrize("steps", [0, -5, 1001])
def test_steps_that_cannot_be_are_refused_by_their_own_name(steps):
    """And not in the name of S, which follows them."""
    with pytest.raises(UserError, match=f"^--steps={steps}: from 1 to 1000$"):
        Stubbed().settings(Sampling(steps=steps))


@pytest.mark.parametrize(("steps", "held"), [(7, 3), (8, 4), (1, 0)])
def test_steps_alone_are_never_too_few_for_the_guidance(steps, held):
    """S is half of the config's steps, which is 3.5 of 7: 4 would be more than half."""
    model = Stubbed("sampling.steps=10", "sampling.hybrid_steps=5")
    assert model.settings(Sampling(steps=steps))["hybrid_steps"] == held


@pytest.mark.parametrize("reference", ["dropped", "kept"])
def test_embedding_of_the_source_is_given_where_the_reference_is(reference):
    """In the mode clip_image: every branch but the unconditional one, unless that keeps its reference."""
    context = np.arange(6, dtype=np.float32).reshape(1, 1, 6)
    model = Stubbed(context=context)
    list(model.animate(PICTURE, DRIVE, Sampling(steps=1, hybrid_steps=0, null_reference=reference)))
    null, full = model.seen
    assert np.all(null.keep_expression == 0) and np.all(full.keep_expression == 1)
    np.testing.assert_array_equal(full.context, np.repeat(context, len(full.context), 0))
    if reference == "dropped":
        assert null.context is None
    else:
        np.testing.assert_array_equal(null.context, full.context)


def test_embedding_is_given_without_the_reference_where_training_never_dropped_it():
    context = np.arange(6, dtype=np.float32).reshape(1, 1, 6)
    for drop, given in (("image", False), ("always", False), ("never", True)):
        model = Stubbed(f"model.denoiser.drop_attn2={drop}", context=context)
        list(model.animate(PICTURE, DRIVE, Sampling(steps=1, hybrid_steps=0)))
        null, full = model.seen
        assert null.keys_values is None and (null.context is not None) == given, drop
        np.testing.assert_array_equal(full.context, np.repeat(context, len(full.context), 0))


def test_what_config_sampling_says_of_a_branch_without_conditions():
    settings = {"expression_null": "learned", "null_reference": "dropped", "null_pose": "zero"}
    assert null_reading(settings, "image") == NullReading()
    for key, value, reading in (
        ("expression_null", "zero", NullReading()),  # as the denoiser is built
        ("expression_null", "source", NullReading(expression="source")),
        ("null_reference", "kept", NullReading(reference="kept")),
        ("null_pose", "source", NullReading(pose="source")),
    ):
        assert null_reading(settings | {key: value}, "always") == reading
    assert null_reading(settings, "never") == NullReading(context="kept")


def test_embedding_is_of_the_source(monkeypatch):
    """The reference reads it as one token, of the picture at the encoder's size."""
    model, asked = Stubbed(), {}

    class Autoencoder:
        scale = 0.5

        def encode(self, images):
            return images[:, ::8, ::8], None

    class Encoder:
        image_size = 24

        def __call__(self, images):
            asked["picture"] = images
            return images.mean((1, 2))

    model.networks = {
        "autoencoder": Stub(Autoencoder()),
        "image_encoder": Stub(Encoder()),
        "reference": Stub(lambda *given: asked.update(reference=given) or {}),
    }
    params = dict.fromkeys(model.networks)
    latent, _, context = model._encode_source(params, PICTURE[None], POSE[None])
    np.testing.assert_allclose(latent, np.full((1, 8, 8, 3), 0.5 * 0.6), atol=1e-6)
    assert asked["picture"].shape == (1, 24, 24, 3)
    np.testing.assert_allclose(context, np.full((1, 1, 3), 0.6), atol=1e-5)
    for given, wanted in zip(asked["reference"], (latent, context, POSE[None]), strict=True):
        np.testing.assert_array_equal(given, wanted)


GRID = {"overlap": 6, "window_offset": "random", "window_ends": "closed", "window_weights": "equal"}


@pytest.mark.parametrize("by_flag", [True, False])
def test_windows_are_those_of_flags_and_config(monkeypatch, by_flag):
    asked = []

    def noted(predict, frames, **grid):
        asked.append((frames, grid))
        return lambda latents, timesteps, step: iter(())

    monkeypatch.setattr(animator_inference, "windowed", noted)
    overrides = [] if by_flag else [f"sampling.{name}={value}" for name, value in GRID.items()]
    model = Stubbed(*overrides, stage="video")
    given = Sampling(seed=4, steps=2, hybrid_steps=0, **(GRID if by_flag else {}))
    list(model.animate(PICTURE, DRIVE, given))
    grid = {"overlap": 6, "offset": "random", "ends": "closed", "weights": "equal"}
    assert asked == [(FRAMES, {"length": 24, "seed": 4, **grid})]
    assert GRID.items() <= model.settings(given).items()


def test_flags_of_windows_that_a_short_clip_does_not_have():
    model = Stubbed(stage="video")
    said = model.idle_flags(Sampling(overlap=2, window_ends="closed"), 24)
    assert (
        said == "--overlap, --window_ends had no effect: the video's 24 frames fit one window of 24"
    )
    assert model.idle_flags(Sampling(overlap=2), 25) is None
    assert model.idle_flags(Sampling(steps=3), 24) is None


def test_windows_of_an_export_from_before_the_keys(monkeypatch):
    model = Stubbed(stage="video")
    model.config.unlock()
    for name in GRID:
        if name != "overlap":
            del model.config.sampling[name]
    settings = model.settings(Sampling())
    assert [settings[name] for name in GRID] == [4, "none", "open", "triangular"]
    assert model.settings(Sampling(**GRID))["window_ends"] == "closed"


@pytest.mark.parametrize(
    ("stage", "flags", "message"),
    [
        ("video", {"overlap": 24}, "^--overlap=24: windows of this model have 24 .* 0 to 23$"),
        ("video", {"overlap": 99}, "^--overlap=99: "),
        ("image", {"overlap": 2}, "^--overlap is for the video stage: "),
        ("image", {"window_ends": "closed"}, "^--window_ends is for the video stage: "),
        ("image", {"window_offset": "none"}, "^--window_offset is for the video stage: "),
        ("image", {"window_weights": "equal"}, "^--window_weights is for the video stage: "),
    ],
)
def test_windows_that_cannot_be_are_refused(stage, flags, message):
    model = Stubbed(stage=stage)
    with pytest.raises(UserError, match=message) as caught:
        model.settings(Sampling(**flags))
    assert "\n" not in str(caught.value)
    assert Stubbed(stage="video").settings(Sampling(overlap=23))["overlap"] == 23


def test_overlap_of_a_config_is_that_of_its_windows():
    """An older export may ask for more than its windows have, which is cut to what fits; a config says what fits."""
    model = Stubbed("data.frames=3", "sampling.overlap=9", stage="video")
    list(model.animate(PICTURE, drive_of(5), Sampling(steps=1, hybrid_steps=0, guidance=1.0)))
    assert [len(conditions.expression) for conditions in model.seen] == [3, 3, 3]


@pytest.mark.parametrize("moving", [False, True])
def test_features_of_windows_that_move_are_kept_for_their_step(moving):
    """Otherwise all that do not come again would be kept, up to the limit."""
    made = []

    def residuals(params, conditions):
        made.append(conditions.driving_pose)
        return {"block": np.zeros(4, np.float32)}

    programs = DenoiserPrograms(lambda *given: {}, residuals, lambda *given: given[1])
    windows = ClipWindows({}, programs, drive_of(60), {}, None, NullReading(), moving=moving)
    for seed in range(4):
        table = window_frames(60, random=np.random.default_rng(seed) if moving else None)
        for frames in table:
            for branch in ("reduced", "full"):
                windows.predict(np.zeros((24, 1)), np.zeros(24), frames, branch)
    assert len(windows._kept) == (1 if moving else 3)
    assert len(made) == (4 * 4 if moving else 3)


def test_no_more_features_of_windows_are_kept_than_there_is_room_for(monkeypatch):
    """Of three windows of 16 bytes two, where there is room for 40; the third is made anew each time."""
    made = []

    def residuals(params, conditions):
        made.append(conditions)
        return {"block": np.zeros(4, np.float32)}

    monkeypatch.setattr(animator_windows, "WINDOW_CACHE_BYTES", 40)
    programs = DenoiserPrograms(lambda *given: {}, residuals, lambda *given: given[1])
    windows = ClipWindows({}, programs, drive_of(60), {}, None, NullReading())
    for _ in range(4):
        for frames in window_frames(60):
            windows.predict(np.zeros((24, 1)), np.zeros(24), frames, "full")
    assert len(windows._kept) == 2 and len(made) == 2 + 4


@pytest.mark.parametrize("moving", [False, True])
def test_features_without_the_driver_s_pose_are_made_once_for_all_windows(moving):
    """The unconditional branch that keeps reference and source's pose reads none of the other branches'."""
    made = []

    def residuals(params, conditions):
        made.append(np.asarray(conditions.driving_pose))
        return {"block": made[-1]}

    still = drive_of(60)
    drive = dataclasses.replace(still, poses=still.poses * np.linspace(0.9, 1.1, 60)[:, None, None])
    programs = DenoiserPrograms(lambda *given: {}, residuals, lambda *given: given[-1])
    reading = NullReading(reference="kept", pose="source")
    windows = ClipWindows({}, programs, drive, {}, None, reading, moving=moving)
    for seed in range(3):
        table = window_frames(60, random=np.random.default_rng(seed) if moving else None)
        for frames in table:
            for branch, poses in (("full", drive.poses[frames]), ("null", still.poses[frames])):
                seen = windows.predict(np.zeros((24, 1)), np.zeros(24), frames, branch)
                np.testing.assert_array_equal(seen.residuals["block"], poses)
                np.testing.assert_array_equal(seen.driving_pose, poses)
    assert sum(bool((poses == still.poses[:24]).all()) for poses in made) == 1
