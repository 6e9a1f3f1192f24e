"""What sampling starts from, and where the source's embedding goes: by stubs, so nothing is compiled."""

import cv2
import numpy as np
import pytest

from dexportrait_jax import animator_inference
from dexportrait_jax import config as configs
from dexportrait_jax.animator_inference import AnimatorModel
from dexportrait_jax.animator_windows import DenoiserPrograms
from dexportrait_jax.diffusion.sampler import frame_noise
from dexportrait_jax.errors import UserError
from dexportrait_jax.inference import Drive, Sampling
from tests.tasks.test_animator import Stub

FRAMES, SIDE = 3, 16
POSE = np.eye(3, 4, dtype=np.float32)
PICTURE = np.full((64, 64, 3), 204, np.uint8)
LATENT = np.random.default_rng(0).normal(size=(SIDE, SIDE, 4)).astype(np.float32)
DRIVE = Drive(
    POSE,
    np.zeros(512, np.float32),
    np.repeat(POSE[None], FRAMES, 0),
    np.ones((FRAMES, 512), np.float32),
)


class Stubbed(AnimatorModel):
    """The image stage at the paper's settings with a denoiser that only notes what it is given."""

    def __init__(self, *overrides, context=None):
        config = configs.load_config("configs/animator_image.py:full", list(overrides))
        super().__init__({"stage": config.stage}, config, {}, {})
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


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_latents_that_are_no_numbers_are_told(monkeypatch, value):
    def broken(guided, schedule, plan, latents, **options):
        latents[1, 0, 0, 0] = value
        return latents

    monkeypatch.setattr(animator_inference, "sample", broken)
    with pytest.raises(UserError, match="^frame 1 cannot be shown: .* not finite") as caught:
        list(Stubbed().animate(PICTURE, DRIVE, Sampling()))
    assert "\n" not in str(caught.value)


def test_what_was_trained_stands_for_an_expression_that_is_left_out():
    """A model without learned null tokens is sampled with zeros, unless the user asks for tokens that it has not."""
    model = Stubbed("model.denoiser.expression_null=zero")
    assert model.settings(Sampling())["expression_null"] == "zero"
    assert model.settings(Sampling(expression_null="source"))["expression_null"] == "source"
    assert Stubbed().settings(Sampling())["expression_null"] == "learned"
    with pytest.raises(UserError, match="^--expression_null=learned: .*; use zero or source$"):
        model.settings(Sampling(expression_null="learned"))


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
