"""The choices that method.md marks [ours], as keys of configs and flags of jobs, with the values they take.

What is marked so and is no key, being no choice of a model:
2     the grid of the warp (one convention, for which equal poses are the identity) and backward reading; the pose of
      a crop, which is that of the frame because all networks are given the same crop.
3.2   cross-replica BatchNorm: the norms to choose from need no statistics of a batch.
3.8   noise in the decoder, and 3.10 path-length regularisation: left out, see configs/motion.py.
3.10  the mask is resized to each feature map; there is nothing else to do with it.
4     what is added to SD1.5 starts at zero, or the animator would not start as it.
6.1   one upright box for a clip: scale, place and roll of the head have to survive in the frames.
7.2   alpha, and one unconditional term for both: the formula that the notes print, computed once.
8     protocols are jobs of `evaluate`; 9 is what led to the three stages; 10 is how JAX is used.
Weights to start from (2, 4.7: published ones, or the stage before) are `config.init`, see tests/test_train_starts.py.
"""

from typing import Any, NamedTuple

from tests import traces

MOTION, IMAGE, VIDEO = "motion", "animator_image", "animator_video"
TEXT, PICTURE = ("model.attn2.attn2=null_text",), ("model.attn2.attn2=clip_image",)
THREE_SCALE = ("sampling.reading=three_scale",)


class Choice(NamedTuple):
    """A key, its value in `full`, other values of it, and where what they do is looked for."""

    section: str
    stage: str
    key: str
    default: Any
    others: tuple
    seen: Any
    given: tuple[str, ...] = ()  # overrides without which the key would not be asked

    def override(self, value: Any) -> str:
        return f"{self.key}={value}".replace(", ", ",")


TABLE = [
    # 2: head pose
    Choice("2", MOTION, "model.warp_padding", "zeros", ("border",), traces.motion_loss),
    Choice("2", MOTION, "model.pose.rotation_head", "euler_bins", ("6d",), traces.pose),
    Choice("2", MOTION, "model.pose.scale_limit", 2.0, (1.0,), traces.pose),
    Choice("2", MOTION, "model.pose.translation_limit", None, (1.5,), traces.pose),
    Choice("2", MOTION, "loss.pose_label.initial", 1.0, (0.0,), traces.motion_loss),
    Choice("2", MOTION, "loss.pose_label.floor", 0.0, (0.5,), traces.motion_loss),
    Choice("2", MOTION, "loss.pose_label.decay_steps", 20_000, (10_000,), traces.motion_loss),
    # 3.1 - 3.9: networks of the motion trainer
    Choice("3.1", MOTION, "data.image_size", 256, (128,), traces.batch_shapes),
    Choice("3.1", MOTION, "data.pose_size", 256, (128,), traces.batch_shapes),
    Choice(
        "3.2", MOTION, "model.appearance.norm", "group", ("instance", "layer"), traces.appearance
    ),
    Choice("3.4", MOTION, "model.expression.kind", "fan", ("fan_sa",), traces.expression),
    Choice("3.4", MOTION, "model.expression.pooling", "max", ("average",), traces.expression),
    Choice(
        "3.4", MOTION, "model.expression.norm", "group", ("instance", "layer"), traces.expression
    ),
    Choice("3.6", MOTION, "model.generator.flatten_stride", "last", ("first",), traces.generator),
    Choice("3.6", MOTION, "model.generator.norm", "group", ("instance", "layer"), traces.generator),
    Choice(
        "3.7",
        MOTION,
        "model.generator.appearance_widths",
        (32, 64, 128, 256, 128),
        ((8, 16, 32, 32),),
        traces.generator,
    ),
    Choice(
        "3.7",
        MOTION,
        "model.generator.appearance_strides",
        (2, 2, 2, 2),
        ((2, 2, 1),),
        traces.generator,
    ),
    Choice(
        "3.8",
        MOTION,
        "model.generator.down_channels",
        (512, 512, 512),
        ((48, 32),),
        traces.generator,
    ),
    Choice(
        "3.8", MOTION, "model.generator.up_channels", (512, 256, 128), ((48, 16),), traces.generator
    ),
    Choice("3.8", MOTION, "model.generator.rgb_channels", None, ((9, 7, 5, 3),), traces.generator),
    Choice("3.8", MOTION, "model.generator.injection", "modulated", ("adain",), traces.generator),
    Choice("3.8", MOTION, "model.generator.mapping_features", None, (32,), traces.generator),
    # 3.10, 3.11: losses and optimizers
    Choice("3.10", MOTION, "loss.perceptual_form", "lpips", ("features",), traces.motion_loss),
    Choice(
        "3.10",
        MOTION,
        "loss.clpips_reduction",
        "all_positions",
        ("mask_area",),
        traces.motion_loss,
    ),
    *(
        Choice("3.11", MOTION, f"optim.{phase}.{name}", value, (other,), traces.optimizer)
        for phase in ("generator", "discriminator")
        for name, value, other in (
            ("name", "adam", "muon"),
            ("learning_rate", 1e-4, 2e-4),
            ("b1", 0.5, 0.0),
            ("b2", 0.99, 0.999),
            ("clip_norm", 1.0 if phase == "generator" else 0.0, 2.0),
        )
    ),
    Choice("3.11", MOTION, "optim.discriminator.lazy_correction", True, (False,), traces.optimizer),
    Choice("3.11", MOTION, "loss.r1_every", 16, (8,), traces.motion_loss),
    Choice("3.11", MOTION, "ema_decay", 0.999, (0.9978,), traces.average),
    Choice("3.11", MOTION, "dtype", "bfloat16", ("float32",), traces.appearance),
    Choice("3.11", MOTION, "data.batch_size", 28, (14,), traces.batch_shapes),
    Choice("3.11", MOTION, "data.targets", 4, (8,), traces.batch_shapes),
    # 3.12: what is done to pictures
    *(
        Choice("3.12", MOTION, f"data.augment.{name}", value, others, "drawn")
        for name, value, others in (
            ("pose_mask.applied", True, (False,)),
            ("pose_mask.dilation_range", (0.1, 0.4), ((0.5, 0.6),)),
            ("pose_mask.fill", "mean", ("black",)),
            ("pose_colour.probability", 0.5, (0.0,)),
            ("pose_colour.blur", 0.01, (0.05,)),
            ("expression_rotation.probability", 0.8, (0.0,)),
            ("expression_rotation.degrees", 30.0, (10.0,)),
            ("view_change.probability", 0.5, (0.0, 1.0)),
            ("expression_crop.applied", True, (False,)),
            ("expression_crop.margin_range", (1.0, 1.3), ((1.5, 1.6),)),
            ("expression_crop.centre_jitter", 0.05, (0.1,)),
            ("expression_colour.probability", 0.5, (0.0,)),
            ("expression_colour.gray", 0.1, (1.0,)),
            ("expression_affine.probability", 0.5, (0.0,)),
            ("expression_affine.points", 6, (4,)),
            ("expression_affine.displacement", 0.025, (0.05,)),
            ("similarity.probability", 0.5, (0.0,)),
            ("similarity.roll", 20.0, (5.0,)),
            ("similarity.scale", (0.8, 1.25), ((0.9, 1.1),)),
            ("similarity.shift", 0.1, (0.3,)),
            ("similarity.border", "reflect", ("replicate", "black")),
            ("flip.probability", 0.5, (0.0, 1.0)),
        )
    ),
    Choice("3.12", MOTION, "loss.equivariance", 0.0, (1.0,), traces.motion_loss),
    Choice(
        "3.12",
        MOTION,
        "loss.invariance",
        0.0,
        (1.0,),
        traces.motion_loss,
        ("data.second_expression=True",),
    ),
    # 4.1 - 4.5: networks of the animator
    Choice(
        "4.1",
        IMAGE,
        "model.attn2.attn2",
        "none",
        ("null_text", "clip_image"),
        traces.denoise,
    ),
    Choice("4.1", IMAGE, "sample_latents", True, (False,), traces.animator_loss),
    Choice("4.1", IMAGE, "model.denoiser.drop_attn2", "image", ("never",), traces.denoise, PICTURE),
    Choice("4.1", IMAGE, "model.denoiser.drop_attn2", "image", ("always",), traces.denoise, TEXT),
    Choice(
        "4.2",
        IMAGE,
        "model.denoiser.raymap",
        "displacement",
        ("plucker6", "none"),
        traces.denoise,
    ),
    Choice("4.2", IMAGE, "model.denoiser.raymap_w", 1, (0,), traces.denoise),
    Choice("4.2", IMAGE, "model.denoiser.raymap_points", "centres", ("corners",), traces.denoise),
    Choice("4.2", IMAGE, "model.reference.raymap_reference", False, (True,), traces.reference),
    *(
        Choice(
            "4.2",
            IMAGE,
            f"model.reference.{name}",
            value,
            others,
            traces.reference,
            ("model.reference.raymap_reference=True",),
        )
        for name, value, others in (
            ("raymap", "displacement", ("plucker6", "none")),
            ("raymap_w", 1, (0,)),
            ("raymap_points", "centres", ("corners",)),
        )
    ),
    Choice("4.3", IMAGE, "model.denoiser.warp_kernel", 3, (1, 0), traces.denoise),
    Choice("4.3", IMAGE, "model.denoiser.warp_padding", "zeros", ("border",), traces.denoise),
    Choice(
        "4.3",
        IMAGE,
        "model.denoiser.volume_order",
        "channel_depth",
        ("depth_channel",),
        traces.denoise,
    ),
    Choice(
        "4.3",
        IMAGE,
        "model.denoiser.expression_place",
        "before_feed_forward",
        ("after_feed_forward", "before_text"),
        traces.denoise,
        TEXT,
    ),
    Choice(
        "4.4",
        IMAGE,
        "model.denoiser.expression_injector",
        "in_block",
        ("xnemo", "none"),
        traces.denoise,
    ),
    Choice("4.4", IMAGE, "model.denoiser.expression_heads", None, (4,), traces.denoise),
    Choice("4.4", IMAGE, "model.denoiser.expression_linear", True, (False,), traces.denoise),
    Choice(
        "4.4",
        IMAGE,
        "model.denoiser.expression_positions",
        "sinusoidal",
        ("none",),
        traces.denoise,
    ),
    Choice("4.5", VIDEO, "model.temporal.middle", True, (False,), traces.temporal),
    Choice("4.5", VIDEO, "model.temporal.max_frames", 32, (24,), traces.temporal),
    Choice("4.5", VIDEO, "model.temporal.norm", "clip", ("frame",), traces.temporal),
    # 4.7: training of the animator
    Choice("4.7", IMAGE, "data.batch_size", 12, (24,), traces.batch_shapes),
    Choice("4.7", IMAGE, "data.targets", 4, (2,), traces.batch_shapes),
    *(
        Choice("4.7", stage, f"optim.denoise.{name}", value, (other,), traces.optimizer)
        for stage in (IMAGE, VIDEO)
        for name, value, other in (
            ("name", "adamw", "muon"),
            ("learning_rate", 1e-5, 1e-4),
            ("b1", 0.9, 0.5),
            ("b2", 0.999, 0.99),
            ("eps", 1e-8, 1e-6),
            ("weight_decay", 1e-2, 0.0),
            ("clip_norm", 1.0, 0.0),
            ("warmup_steps", 1000, 0),
            ("decay", "constant", "cosine"),
        )
    ),
    Choice("4.7", IMAGE, "ema_decay", 0.9999, (0.999,), traces.average),
    Choice("4.7", IMAGE, "dtype", "bfloat16", ("float32",), traces.denoise),
    Choice("4.7", IMAGE, "diffusion.preset", "sd15", ("xnemo",), traces.animator_loss),
    Choice(
        "4.7",
        IMAGE,
        "diffusion.preset",
        "sd15",
        ("zero_snr",),
        traces.animator_loss,
        ("sampling.spacing=trailing",),
    ),
    Choice("4.7", IMAGE, "diffusion.beta_end", None, (0.02,), traces.animator_loss),
    Choice("4.7", IMAGE, "diffusion.prediction", None, ("v", "sample"), traces.animator_loss),
    Choice("4.7", IMAGE, "noise_offset", 0.0, (0.05,), traces.animator_loss),
    Choice("4.7", IMAGE, "min_snr_gamma", 0.0, (5.0,), traces.animator_loss),
    Choice("4.7", IMAGE, "component_weight", 0.0, (3.0,), traces.animator_loss),
    *(
        Choice("4.7", IMAGE, f"dropout.{name}", value, (other,), traces.animator_loss)
        for name, value, other in (
            ("everything", 0.1, 0.4),
            ("expression", 0.1, 0.4),
            ("pose", 0.05, 0.4),
            ("reference_tokens", 0.0, 0.3),
        )
    ),
    # 5, 6: data
    Choice("5", VIDEO, "data.calm.max_difference", 0.03, (1.0,), "restless"),
    Choice("5", VIDEO, "data.calm.candidates", 8, (1,), "restless"),
    Choice("5", MOTION, "data.cross_view", 0.5, (0.0, 1.0), "drawn"),
    Choice(
        "6.3",
        MOTION,
        "data.augment.component_mask.parts",
        ("right_eye", "left_eye", "right_brow", "left_brow", "nose", "outer_lips"),
        (("face_oval",),),
        "drawn",
    ),
    Choice("6.3", MOTION, "data.augment.component_mask.dilation", 0.012, (0.1,), "drawn"),
    Choice("6.3", MOTION, "data.augment.component_mask.blur", 0.008, (0.05,), "drawn"),
    # 7: inference
    Choice("7.1", IMAGE, "sampling.steps", 35, (12,), traces.sampling),
    Choice("7.1", IMAGE, "sampling.guidance", 2.5, (1.5,), traces.sampling),
    Choice("7.1", IMAGE, "sampling.spacing", "leading", ("trailing", "linspace"), traces.sampling),
    Choice("7.1", IMAGE, "sampling.offset", 1, (0,), traces.sampling),
    Choice("7.1", IMAGE, "sampling.eta", 0.0, (1.0,), traces.sampling),
    Choice("7.1", IMAGE, "sampling.start", "noise", ("ref_blur",), traces.sampling),
    Choice("7.2", IMAGE, "sampling.hybrid_steps", 5, (1,), traces.sampling),
    Choice("7.2", IMAGE, "sampling.reading", "hybrid", ("expression_in_both",), traces.sampling),
    Choice(
        "7.2", IMAGE, "sampling.expression_guidance", None, (2.0,), traces.sampling, THREE_SCALE
    ),
    Choice(
        "7.2", IMAGE, "sampling.expression_null", "learned", ("zero", "source"), traces.sampling
    ),
    Choice("7.2", IMAGE, "model.denoiser.expression_null", "learned", ("zero",), traces.denoise),
    Choice("7.2", IMAGE, "sampling.null_reference", "dropped", ("kept",), traces.sampling),
    Choice("7.2", IMAGE, "sampling.null_pose", "zero", ("source",), traces.sampling),
    Choice("7.2", IMAGE, "model.denoiser.drop_attn2", "image", ("never",), traces.sampling),
    Choice("7.4", VIDEO, "data.frames", 24, (3,), traces.window_sampling),
    Choice("7.4", VIDEO, "sampling.overlap", 4, (1,), traces.window_sampling),
    Choice(
        "7.4",
        VIDEO,
        "sampling.window_weights",
        "triangular",
        ("equal",),
        traces.window_sampling,
        ("sampling.overlap=3",),
    ),
    Choice("7.4", VIDEO, "sampling.window_offset", "none", ("random",), traces.window_sampling),
    Choice("7.4", VIDEO, "sampling.window_ends", "open", ("closed",), traces.window_sampling),
]

# Words that no row above tries.
NOT_TRIED = {
    "sampling.reading": {"three_scale"},  # with one scale, hybrid written otherwise
    "diffusion.preset": {None},  # what configs from before there were presets have
    "diffusion.prediction": {"epsilon"},  # that of the preset
}

# Flags of jobs: section, job, name, values it takes or None, one that it does not take.
FLAGS = [
    ("6.1", "prepare", "face_scale", None, "wide"),
    ("7.1", "animate", "steps", None, "many"),
    ("7.1", "animate", "guidance", None, "strong"),
    ("7.1", "animate", "eta", None, "some"),
    ("7.1", "animate", "start", ("noise", "ref_blur"), "blur"),
    ("7.2", "animate", "hybrid_steps", None, "some"),
    ("7.2", "animate", "expression_guidance", None, "some"),
    ("7.2", "animate", "reading", ("hybrid", "expression_in_both", "three_scale"), "both"),
    ("7.2", "animate", "expression_null", ("learned", "zero", "source"), "none"),
    ("7.2", "animate", "null_reference", ("dropped", "kept"), "none"),
    ("7.2", "animate", "null_pose", ("zero", "source"), "none"),
    ("7.3", "animate", "smooth", ("none", "gaussian", "one_euro", "kalman"), "median"),
    ("7.3", "animate", "smooth_strength", None, "strong"),
    ("7.3", "animate", "resting_frame", None, "looks as"),
    ("7.3", "animate", "paste_mask", ("face", "crop"), "oval"),
    ("7.3", "animate", "paste_dilation", None, "wide"),
    ("7.3", "animate", "paste_feather", None, "soft"),
    ("7.3", "animate", "paste_border", None, "wide"),
    ("7.4", "animate", "overlap", None, "some"),
    ("7.4", "animate", "window_offset", ("none", "random"), "some"),
    ("7.4", "animate", "window_ends", ("open", "closed"), "ring"),
    ("7.4", "animate", "window_weights", ("triangular", "equal"), "round"),
    ("7.4", "animate", "seed", None, "any"),
]
SWITCHES = [("animate", "relative_expression"), ("animate", "paste_back")]
