"""The composed losses of the motion trainer on stub networks, against values by hand, and when each is asked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from dexportrait_jax import config as configs
from dexportrait_jax import optim
from dexportrait_jax.errors import UserError
from dexportrait_jax.platforms import planned_for
from dexportrait_jax.state import QUICK
from dexportrait_jax.tasks import build_networks, motion
from dexportrait_jax.tasks.motion import MotionTask
from tests.published import random_like
from tests.stages import handful_of_numbers

LATENT, SIDE = 52, 8
IMAGE = 2 * SIDE * SIDE * 3  # numbers in the pictures of both targets


class Stub:
    """In a Network's place: whatever its parameters, it is this module."""

    def __init__(self, module):
        self.module = module

    def bind(self, params):
        del params
        return self.module


class Expression:
    """Latents of ones, and of zeros for a second view; keeps the keys that it is given."""

    def __init__(self):
        self.keys = []

    def heat_maps(self, crops, key=None):
        self.keys.append(key)
        return jnp.zeros((len(crops), 4, 4, 68))

    def latent(self, heat_maps):
        return jnp.ones((len(heat_maps), LATENT))

    def __call__(self, crops, key=None):
        self.keys.append(key)
        return jnp.zeros((len(crops), LATENT))


class Perceptual:
    """The picture itself is the only feature map; LPIPS of it the sum over channels of squared differences."""

    def features(self, image, unit_length):
        # Told apart from plain features by another size.
        return [image if unit_length else 10 * image]

    def distance_maps(self, fx, fy):
        return [jnp.sum(jnp.square(fx[0] - fy[0]), -1)]


def encode_pose(image):
    """A head of scale 1, frontal, always at (.3, .4)."""
    pose = jnp.array([[1, 0, 0, 0.3], [0, 1, 0, 0.4], [0, 0, 1, 0]], jnp.float32)
    return jnp.broadcast_to(pose, (len(image), 3, 4)), {}


def stub_task(*overrides, variant="full"):
    """The task of a config without its networks: one grey picture for whatever is asked."""
    task = MotionTask.__new__(MotionTask)
    task.config = configs.load_config(f"configs/motion.py:{variant}", list(overrides))
    modules = {
        "pose": encode_pose,
        "expression": Expression(),
        "appearance": lambda image: jnp.zeros((len(image), 2, 2, 2, 1)),
        "generator": lambda volume, warped, expression: jnp.full((len(warped), SIDE, SIDE, 3), 0.5),
        "discriminator": lambda image: jnp.mean(image, (1, 2, 3)),
        "label_heads": lambda latent: 2 * latent,
    }
    task.networks = {name: Stub(module) for name, module in modules.items()}
    task.exact_discriminator = task.networks["discriminator"]
    task.perceptual = Stub(Perceptual())
    return task


PARAMS = dict.fromkeys((*motion.TRAINED, "discriminator", "label_heads", "perceptual"))


def make_batch(second=False):
    """One source, two white targets whose right half is masked; heads in the middle, no blendshape up."""
    frontal = np.eye(3, 4, dtype=np.float32)
    white = np.full((1, 2, SIDE, SIDE, 3), 255, np.uint8)
    mask = np.zeros((1, 2, SIDE, SIDE), np.uint8)
    mask[..., SIDE // 2 :] = 255
    batch = {
        "source_image": white[:, 0],
        "source_pose_image": white[:, 0],
        "source_head_pose": frontal[None],
        "target_image": white,
        "target_pose_image": white,
        "target_expression_image": white,
        "target_component_mask": mask,
        "target_head_pose": np.tile(frontal, (1, 2, 1, 1)),
        "target_blendshapes": np.zeros((1, 2, 52), np.float32),
        "target_expression_landmarks": np.full((1, 2, 68, 2), 0.5, np.float32),
    }
    if second:
        batch["target_second_expression_image"] = white
    return jax.tree.map(jnp.asarray, batch)


def evaluated(loss, batch, step, shared, events):
    """(value, metrics, shared) of a loss as one program; eagerly, each of its operations would be compiled alone."""

    @jax.jit
    def run(batch, shared):
        return loss(PARAMS, batch, jax.random.key(0), step, shared, frozenset(events))

    program = run.lower(batch, shared).compile(compiler_options=QUICK)
    value, outputs = program(batch, shared)
    return float(value), jax.tree.map(float, outputs.metrics), outputs.shared


def generator_loss(task, *events, step=0, second=False):
    return evaluated(task.generator_loss, make_batch(second), step, {}, events)


def softplus(x):
    return np.log1p(np.exp(x))


def test_weights_of_full_are_the_published_ones():
    """method.md 3.10 and the invariants of 10."""
    loss = configs.load_config("configs/motion.py:full").loss
    assert (loss.l1, loss.lpips, loss.clpips, loss.adversarial) == (10, 1, 100, 1)
    assert (loss.r1_gamma, loss.r1_every, loss.adversarial_start) == (10, 16, 0)
    assert (loss.perceptual, loss.perceptual_form) == ("vgg16", "lpips")
    assert loss.clpips_reduction == "all_positions"
    others = ("masked_l1", "gradient_l1", "multiscale_l1", "invariance", "equivariance")
    assert [loss[name] for name in (*others, "person_leak", "pose_leak")] == [0] * 7


def test_generator_loss_by_hand():
    """Grey (.5) for white (1): L1 .5, LPIPS 3 * .25, half of it masked, the discriminator says .5."""
    task = stub_task()
    value, metrics, shared = generator_loss(task, "joint", "adversarial", step=5000)
    assert metrics == pytest.approx(
        {
            "l1": 0.5,
            "lpips": 0.75,
            "clpips": 0.375,
            "adversarial": softplus(-0.5),
            "masked_l1": 0.25,
            # Compiled without fusion emitters, neighbours of one value come out a rounding apart (2.4e-7).
            "gradient_l1": pytest.approx(0, abs=1e-6),
            "multiscale_l1": 0.5,
            "pose_label": 0.25,  # .3^2 + .4^2
            "blendshape_label": 4,
            "landmark_label": 0.5,
        }
    )
    # A quarter of the way down from 1 to 0 in 20 000 steps.
    picture = 10 * 0.5 + 0.75 + 100 * 0.375 + softplus(-0.5)
    assert value == pytest.approx(picture + 0.75 * 0.25)
    assert shared["image"].shape == (2, SIDE, SIDE, 3)

    before, metrics, _ = generator_loss(task, "joint", step=5000)
    assert before == pytest.approx(value - softplus(-0.5)) and "adversarial" not in metrics
    # The labels' weights count the steps of joint training.
    late, *_ = generator_loss(stub_task("pretraining.steps=4000"), "joint", step=9000)
    assert late == pytest.approx(before)


def test_every_optional_term_has_its_weight():
    weights = {"masked_l1": 2.0, "gradient_l1": 3.0, "multiscale_l1": 5.0, "invariance": 7.0}
    task = stub_task(*(f"loss.{name}={weight}" for name, weight in weights.items()))
    value, metrics, _ = generator_loss(task, "joint", second=True)
    assert metrics["invariance"] == 1
    published = 10 * 0.5 + 0.75 + 100 * 0.375 + 0.25
    assert value == pytest.approx(published + 2 * 0.25 + 3 * 0 + 5 * 0.5 + 7 * 1)
    assert (
        metrics["blendshape_label"] == 2
    )  # the second view's latent, 0, reads the label: half of 4


def test_label_loss_by_hand():
    """Pretraining is on labels alone, with the weights of the first joint step."""
    task = stub_task("pretraining.steps=9", "loss.landmark_label.initial=8.0")
    value, metrics, _ = evaluated(task.label_loss, make_batch(), 5, {}, {"pretraining"})
    assert value == pytest.approx(1 * 0.25 + 0 * 4 + 8 * 0.5)
    assert set(metrics) == {"pose_label", "blendshape_label", "landmark_label"}


def discriminator_loss(task, *events):
    shared = {"image": jnp.full((task.judged(2), SIDE, SIDE, 3), 0.5)}
    return evaluated(task.discriminator_loss, make_batch(), 0, shared, events)[:2]


def test_discriminator_loss_by_hand():
    """D is the mean of a picture's 192 numbers: its gradient is 1/192 each, the squared norm 1/192."""
    plain, metrics = discriminator_loss(stub_task(), "joint", "adversarial")
    assert plain == pytest.approx(softplus(0.5) + softplus(-1.0))
    assert metrics == pytest.approx({"fake": 0.5, "real": 1.0})
    value, metrics = discriminator_loss(stub_task(), "joint", "adversarial", "r1")
    assert metrics["r1"] == pytest.approx(1 / 192)
    assert value - plain == pytest.approx(10 / 2 * 16 / 192, rel=1e-5)
    assert discriminator_loss(stub_task("loss.adversarial_images=1"), "joint")[0] == plain


@pytest.mark.parametrize(("images", "parts", "seen"), [(4, 1, 4), (4, 2, 2), (4, 4, 1), (0, 4, 8)])
def test_the_discriminator_sees_as_many_of_a_batch_in_any_parts(images, parts, seen):
    task = stub_task(f"loss.adversarial_images={images}", f"accumulate={parts}")
    assert task.judged(8) == seen


def test_the_penalty_is_computed_in_float32():
    """Whatever the networks compute in; logits of bfloat16 stay what they are."""

    def penalty(dtype):
        address = "configs/motion.py:tiny"
        task = MotionTask(
            configs.load_config(address, [f"dtype={dtype}", "model.discriminator.group=2"])
        )
        params = {"discriminator": random_like(task.networks["discriminator"].abstract)}
        side = task.config.data.image_size
        images = np.random.default_rng(0).integers(0, 256, (1, 2, side, side, 3), np.uint8)
        shared = {"image": jnp.zeros((2, side, side, 3))}

        @jax.jit
        def run(images):
            batch = {"target_image": images}
            return task.discriminator_loss(params, batch, None, 0, shared, {"r1"})[1].metrics

        return run.lower(images).compile(compiler_options=QUICK)(images)

    exact, narrow = penalty("float32"), penalty("bfloat16")
    assert float(exact["r1"]) > 0
    np.testing.assert_allclose(narrow["r1"], exact["r1"], rtol=1e-5)
    assert abs(narrow["real"] - exact["real"]) > 1e-5 * abs(exact["real"])


@pytest.mark.parametrize("platform", ["tpu", "cpu"])
def test_accelerators_multiply_the_penalty_in_float32(platform):
    """Of float32 arrays a TPU multiplies one pass of bfloat16, a GPU TF32, where nothing else is asked for."""
    config = configs.load_config("configs/motion.py:tiny", ["dtype=bfloat16"])
    task = MotionTask(config)
    side = config.data.image_size
    shared = {"image": jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)}
    batch = {"target_image": jax.ShapeDtypeStruct((1, 2, side, side, 3), jnp.uint8)}

    def gradient(params, batch, shared, events):
        def loss(params):
            return task.discriminator_loss(
                {"discriminator": params}, batch, None, 0, shared, events
            )[0]

        return jax.grad(loss)(params)

    def precisions(events):
        given = (task.networks["discriminator"].abstract, batch, shared)
        with planned_for(platform):
            traced = jax.make_jaxpr(functools.partial(gradient, events=events))(*given)
        found = [eqn for eqn in equations(traced.jaxpr) if "precision" in eqn.params]
        names = {eqn.primitive.name for eqn in found}
        assert names == {"conv_general_dilated", "dot_general"}
        return [(eqn.invars[0].aval.dtype, eqn.params["precision"]) for eqn in found]

    without, with_penalty = precisions(frozenset()), precisions(frozenset({"r1"}))
    # Each product of it, of the gradients of its gradients too; the other loss has the logits' layer alone in float32.
    for found in (without, with_penalty):
        exact = {(jnp.dtype("float32"), (jax.lax.Precision.HIGHEST,) * 2)}
        assert set(found) == exact | {(jnp.dtype("bfloat16"), None)}
    narrow = [sum(precision is None for _, precision in found) for found in (without, with_penalty)]
    assert narrow[0] == narrow[1] > len(without) / 2


def equations(jaxpr):
    """All of a program, with those of the programs inside."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_gradient_norms_by_hand():
    """Of every term that the metrics name, times its weight: by the picture, or by poses and latents."""
    task = stub_task(
        "loss.blendshape_label.initial=3.0", "loss.invariance=5.0", "loss.equivariance=1.0"
    )
    events = ("joint", "adversarial", "gradient_norms")
    value, metrics, _ = generator_loss(task, *events, step=0, second=True)
    names = {name for name in metrics if not name.startswith("gradient_norm/")}
    assert {f"gradient_norm/{name}" for name in names} == metrics.keys() - names
    norms = {name: metrics[f"gradient_norm/{name}"] for name in names}
    assert norms["l1"] == pytest.approx(10 / IMAGE**0.5)
    # LPIPS: per number 2 * .5, over 2 * 64 positions; masked, half of them.
    assert norms["lpips"] == pytest.approx(IMAGE**0.5 / 128)
    assert norms["clpips"] == pytest.approx(100 * (IMAGE / 2) ** 0.5 / 128)
    # softplus(-D) of two pictures, D the mean of 192 numbers.
    slope = 1 / (1 + np.exp(0.5)) / 2
    assert norms["adversarial"] == pytest.approx(slope * (2 / 192) ** 0.5, rel=1e-5)
    assert norms["masked_l1"] == 0
    # Three poses, each a third of the label: 2/3 (.3, .4), of length 1/3.
    assert norms["pose_label"] == pytest.approx(3**0.5 / 3, rel=1e-5)
    # Mean of (2 z)^2 over 2 * 52 numbers, half of the label: 4 z / 104 at z = 1, and 0 at the second view's 0.
    assert norms["blendshape_label"] == pytest.approx(3 * 4 / 104**0.5, rel=1e-5)
    # Mean of (z - z')^2: 2 / 104 by each of both latents.
    assert norms["invariance"] == pytest.approx(5 * 2 / 104 * 208**0.5, rel=1e-5)
    without, *_ = generator_loss(task, *events[:2], step=0, second=True)
    assert value == without


def test_equivariance_by_hand():
    """Pictures grown by e, and an encoder that sees nothing: log scales are 1 apart, shifts (e - 1) (.3, .4)."""
    ranges = ("roll=0.0", f"scale=({np.e}, {np.e})", "shift=0.0")
    task = stub_task("loss.equivariance=7.0", *(f"data.augment.similarity.{one}" for one in ranges))
    value, metrics, _ = evaluated(task.label_loss, make_batch(), 0, {}, {"pretraining"})
    expected = 1 + (np.e - 1) ** 2 * 0.25
    assert metrics["equivariance"] == pytest.approx(expected, rel=1e-5)
    assert value == pytest.approx(0.25 + 7 * expected, rel=1e-5)


def test_plain_features_as_the_supplement_prints_them():
    """Features 5 and 10: the root of the mean square is 5, and 5 sqrt(1/2) under a mask of half the picture."""
    _, metrics, _ = generator_loss(stub_task("loss.perceptual_form=features"), "joint")
    assert metrics["lpips"] == pytest.approx(5)
    assert metrics["clpips"] == pytest.approx(5 * 0.5**0.5)
    with pytest.raises(UserError, match="one of lpips, features, not 'vgg'"):
        MotionTask(configs.load_config("configs/motion.py:tiny", ["loss.perceptual_form=vgg"]))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("loss.invariance=8.0", "config.data.second_expression=True"),
        ("loss.r1_every=0", "config.loss.r1_every=0 is out of range"),
        # Of 28 sources with 4 targets, 14 in each part and none alone.
        ("loss.person_leak=1.0 accumulate=28", "in each of the config.accumulate=28 parts"),
        ("loss.adversarial_images=6 accumulate=4", "shared by its config.accumulate=4 parts"),
        ("loss.pose_leak=1.0 data.targets=3 accumulate=28", "28 parts of a batch, not 3; give"),
    ],
)
def test_losses_that_cannot_be_computed_are_refused(override, said):
    address = "configs/motion.py:full" if "accumulate" in override else "configs/motion.py:tiny"
    with pytest.raises(UserError, match=said):
        MotionTask(configs.load_config(address, override.split()))


def test_the_decay_of_a_discriminator_that_starts_late_ends_with_the_run(monkeypatch):
    """Its optimizer counts its own steps: 60 in all, 20 of pretraining, 10 of the generator alone, 30 of both."""
    handful_of_numbers(monkeypatch)
    lengths = {}

    def make_optimizer(config, num_steps):
        lengths[config.final_fraction] = optim.learning_rate_schedule(config, num_steps)
        return optim.make_optimizer(config, num_steps)

    monkeypatch.setattr(motion, "make_optimizer", make_optimizer)
    rate = [
        f"optim.discriminator.{key}"
        for key in ("decay=cosine", "final_fraction=0.25", "warmup_steps=3")
    ]
    steps = ["num_steps=60", "pretraining.steps=20", "loss.adversarial_start=10"]
    given = [*rate, *steps, "optim.discriminator.learning_rate=1.0"]
    task = MotionTask(configs.load_config("configs/motion.py:tiny", given))
    judged = sum("adversarial" in task.events(step) for step in range(60))
    assert judged == 30
    assert float(lengths[0.25](judged)) == pytest.approx(0.25)
    assert float(lengths[0.25](judged - 5)) > 0.26
    # As runs had it that were started before.
    before = "optim.discriminator.decay_ends_with_run=False"
    MotionTask(configs.load_config("configs/motion.py:tiny", [*given, before]))
    assert float(lengths[0.25](40)) == pytest.approx(0.25)
    assert float(lengths[0.25](judged)) > 0.3


def test_without_a_weight_the_penalty_is_not_computed():
    assert "r1" in stub_task(variant="tiny").events(0)
    assert "r1" not in stub_task("loss.r1_gamma=0.0", variant="tiny").events(0)


def test_dropout_of_the_expression_encoder_in_training_alone():
    for overrides, drops in (
        (("pretraining.steps=4",), True),
        (("model.expression.dropout=0.0",), False),
    ):
        task = stub_task(*overrides)
        given = task.networks["expression"].module.keys
        for loss, events in ((task.generator_loss, {"joint"}), (task.label_loss, {"pretraining"})):
            arguments = (PARAMS, make_batch(True), jax.random.key(0), 0, {})
            jax.eval_shape(functools.partial(loss, events=events), *arguments)
        assert len(given) == 4 and all((key is not None) == drops for key in given)
        assert len(set(map(id, given))) == (4 if drops else 1)
        given.clear()
        jax.eval_shape(task._encode, PARAMS, make_batch(True))
        assert given == [None]
    published = {"tiny": 0, "synthetic": 0, "real": 0, "small": 0.5, "full": 0.5}
    for variant, dropout in published.items():
        config = configs.load_config(f"configs/motion.py:{variant}")
        assert config.model.expression.dropout == dropout


def test_choices_of_the_networks_are_keys():
    overrides = ("generator.rgb_channels=(9,7,5,3)", "generator.flatten_stride=first")
    config = configs.load_config(
        "configs/motion.py:tiny",
        [f"model.{one}" for one in (*overrides, "expression.dropout=0.25")],
    )
    networks = build_networks(config)
    to_rgbs = networks["generator"].abstract["decoder"]["to_rgbs"]
    assert [to_rgbs[str(level)]["bias"].shape for level in range(4)] == [(9,), (7,), (5,), (3,)]
    assert networks["expression"].bind(networks["expression"].abstract).m0.dropout == 0.25


def test_the_discriminator_s_optimizer_knows_of_the_lazy_penalty(monkeypatch):
    monkeypatch.setattr(motion, "build_networks", lambda config: {})
    monkeypatch.setattr(motion, "Network", lambda constructor: None)
    monkeypatch.setattr(motion, "make_optimizer", lambda config, num_steps: config)

    def settings(*overrides, variant="full"):
        task = MotionTask(configs.load_config(f"configs/motion.py:{variant}", list(overrides)))
        settings = {phase.name: phase.tx for phase in task.phases}
        assert settings["generator"] == task.config.optim.generator
        return [settings["discriminator"][name] for name in ("learning_rate", "b1", "b2")]

    c = 16 / 17
    assert settings() == pytest.approx([1e-4 * c, 0.5**c, 0.99**c])
    assert settings("loss.r1_every=3")[0] == pytest.approx(0.75e-4)
    assert settings("optim.discriminator.lazy_correction=False") == [1e-4, 0.5, 0.99]
    # What was measured was measured without.
    assert settings(variant="tiny") == settings(variant="synthetic") == [1e-3, 0.0, 0.99]


def test_events_of_forty_steps():
    """Five of pretraining; the adversary from the fourth joint one on, its penalty in every fourth of these."""
    changes = {
        "pretraining.steps": 5,
        "loss.adversarial_start": 3,
        "loss.r1_every": 4,
        "loss.gradient_norms_every": 6,
    }
    task = stub_task(*(f"{key}={value}" for key, value in changes.items()))
    events = [task.events(step) for step in range(40)]

    def steps_with(name):
        return [step for step, happening in enumerate(events) if name in happening]

    assert events[:5] == [{"pretraining"}] * 5
    assert steps_with("pretraining") == list(range(5))
    assert steps_with("joint") == list(range(5, 40))
    assert steps_with("adversarial") == list(range(8, 40))
    assert steps_with("r1") == [8, 12, 16, 20, 24, 28, 32, 36]
    assert steps_with("gradient_norms") == [5, 11, 17, 23, 29, 35]
    known = {"pretraining", "joint", "adversarial", "r1", "gradient_norms"}
    assert set().union(*events) == known
    task = stub_task(*(f"{key}={value}" for key, value in changes.items()), "loss.adversarial=0.0")
    assert set().union(*map(task.events, range(40))) == known - {"adversarial", "r1"}
