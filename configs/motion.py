"""Stage 1: the motion trainer (method.md 3), 256 px at `full`.

    dexportrait train --config=configs/motion.py:full --workdir=runs/motion --config.data.path=data/faces

tiny: 64 px, 2 cores, a few minutes; 2 dB and more over repeating the source on later frames of people it knows.
synthetic: rendered heads at 64 px, 2 cores, 90 minutes; encoders pretrained on labels. Its data are made first by
    dexportrait render --out=data/heads --identities=1500 --frames=8 --cameras=2 --size=128 --fps=1.2 \\
        --holdout_fraction=0.05
and measured by `dexportrait evaluate --protocol=synthetic`.
real: the networks of `synthetic` for a dozen real clips at 64 px, 2 cores; people seen in other colours, being few.
    From an export of `synthetic`, with which eyes and mouths of people held out follow the driver:
    --config.init.motion=exports/heads --config.pretraining.steps=0 --config.num_steps=1900 \\
        --config.loss.adversarial_start=1300
    or from scratch in a night, which has not been run. Its data are made by
    dexportrait prepare --videos='videos/*.mp4' --out=data/faces --size=128 --face_scale=1.6 --holdout_fraction=0.25
and measured, on the people held out, by `dexportrait evaluate` with --protocol=self and --protocol=cross.
small: `full` with a batch for one GPU. full: the paper's batch 112 = 28 sources x 4 targets, lr 1e-4, 200k steps.
    In these two half of the targets are another camera's where there are several (data.cross_view; else it is 0).
On TPUs `full@v5e:4x4` spreads it over such a slice (see meshes.py).

Left out on purpose: noise injection in the decoder, which reconstructs (method.md 3.8), and path-length
regularisation, which is for unconditional synthesis and wants a running mean beside the weights (3.10).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common

VARIANTS = (*common.VARIANTS, "synthetic", "real")


def get_config(variant: str = "full") -> ConfigDict:
    """The motion trainer at one of VARIANTS."""
    if variant == "synthetic":
        return _synthetic(get_config("tiny"))
    if variant == "real":
        return _real(get_config("synthetic"))
    tiny = variant == "tiny"
    config = common.base("motion", variant)
    config.num_steps = 620 if tiny else 200_000
    # Of appearance encoder, generator and discriminator, what the backward pass keeps: none (of it is recomputed) |
    # products | blocks (see models/rematerialisation.py).
    config.remat = "none"
    config.model = ConfigDict(common.encoders(variant) | _networks(tiny))
    config.init = ConfigDict(
        {
            # Export whose pose encoder gives its trunk to start from (`dexportrait import --kind=convnextv2`, or of a
            # motion trainer); its heads stay fresh. "": everything starts fresh.
            "pose": "",
            # Export of another motion trainer with networks of these sizes, to go on from with all groups: rendered
            # heads first and real faces then, say. "": everything starts fresh.
            "motion": "",
        }
    )
    config.loss = ConfigDict(
        {
            "perceptual": "alexnet" if tiny else "vgg16",
            # lpips (unit length, learned weights) | features: plain differences of features, as the supplement prints
            # both terms; of another size, so that the weights have to be set anew.
            "perceptual_form": "lpips",
            "perceptual_weights": "",  # of `dexportrait import --kind=lpips`; "": the published package
            "l1": 10.0,
            "lpips": 1.0,
            "clpips": 10.0 if tiny else 100.0,
            "clpips_reduction": "all_positions",  # all_positions | mask_area
            "adversarial": 0.1 if tiny else 1.0,
            "adversarial_start": 0,
            "adversarial_images": 4
            if tiny
            else 0,  # targets of a batch that the discriminator sees; 0: all
            "r1_gamma": 10.0,
            "r1_every": 1 if tiny else 16,
            # Gradient norm of every term at the picture, or at poses and latents, for setting weights; 0: never. A
            # program of its own.
            "gradient_norms_every": 0
            if tiny
            else 496,  # a multiple of r1_every: no further program
            # Beside the paper's: plain terms that help where there are minutes, not days.
            "masked_l1": 20.0 if tiny else 0.0,
            "gradient_l1": 5.0 if tiny else 0.0,
            "multiscale_l1": 5.0 if tiny else 0.0,
            # Towards the labels that every record carries; pose labels fix the gauge (method.md 2).
            "pose_label": {
                "initial": 1.0,
                "floor": 0.2 if tiny else 0.0,
                "decay_steps": 500 if tiny else 20_000,
            },
            "blendshape_label": {
                "initial": 5.0 if tiny else 0.0,
                "floor": 1.0 if tiny else 0.0,
                "decay_steps": 500 if tiny else 20_000,
            },
            # The expression encoder is a landmark network by origin; its heat maps can be told where they are.
            "landmark_label": {"initial": 0.0, "floor": 0.0, "decay_steps": 20_000},
            "landmark_maps": 68,  # the first of the heat maps; any others are free
            # Mean squared difference of latents of two pictures of one instant; wants data.second_expression.
            "invariance": 0.0,
            # P(S I) = S P(I) for known 2D similarities S of the target pictures, drawn as data.augment.similarity
            # says: distance of the poses, for one more pass of the pose encoder. 0: none.
            "equivariance": 0.0,
            # What the latents know of the person and of the head's direction, measured in the batch (see losses.py).
            "person_leak": 0.0,
            "pose_leak": 0.0,
        }
    )
    # Steps at the start that train the encoders alone, on the labels above. Included in num_steps.
    config.pretraining = ConfigDict({"steps": 0})
    if tiny:
        generator = common.adam(
            2e-3,
            decay="cosine",
            final_fraction=0.05,
            # Equalised layers hold weights of unit size: the same step moves them relatively less.
            multipliers=(("generator/decoder", 5.0),),
        )
        discriminator = common.adam(1e-3, b1=0.0, clip_norm=0.0)
    else:
        generator = common.adam(1e-4, b1=0.5, warmup_steps=1000)
        discriminator = common.adam(1e-4, b1=0.5, warmup_steps=1000, clip_norm=0.0)
    # StyleGAN2's rate and betas for a penalty that comes in every r1_every-th step alone (optim.with_lazy_penalty).
    discriminator.lazy_correction = not tiny
    # Its decay takes the steps from loss.adversarial_start on. False: as many as the generator's, so that a late start
    # leaves it above final_fraction at the end.
    discriminator.decay_ends_with_run = True
    pretraining = common.adam(2e-3)
    config.optim = ConfigDict(
        {"pretraining": pretraining, "generator": generator, "discriminator": discriminator}
    )
    batch = {"tiny": (4, 2), "small": (4, 4), "full": (28, 4)}[variant]
    common.set_data(config, **common.sizes(variant), batch_size=batch[0], targets=batch[1])
    return config


def _synthetic(config: ConfigDict) -> ConfigDict:
    """`tiny` made wider and longer, for rendered heads whose poses and expressions are to be measured."""
    config.variant = "synthetic"
    # 90 minutes are enough also where the two cores are a third slower than on a good day.
    config.num_steps = 7600
    config.ema_decay = 0.998
    config.pretraining.steps = 2500
    config.data.augment.flip.probability = 0.5
    config.data.augment.similarity.probability = 0.5
    common.minutes(config)
    common.set_data(config, batch_size=8, targets=2, second_expression=True, cache_megabytes=1024)
    config.model.generator.update(expression_gain=2.0, expression_mixing=0.1)
    config.loss.update(adversarial_start=5300, r1_every=16, invariance=8.0, landmark_maps=12)
    # Eyes and mouth are few pixels: without weight of their own the latent is not worth looking at.
    config.loss.update(l1=20.0, multiscale_l1=10.0, masked_l1=600.0, clpips=200.0)
    labels = {"decay_steps": 3000}
    # Gradients of pictures that a young decoder paints would turn the poses; the labels hold them.
    config.loss.pose_label.update(initial=20.0, floor=10.0, **labels)
    config.loss.blendshape_label.update(initial=40.0, floor=20.0, **labels)
    config.loss.landmark_label.update(initial=10.0, floor=2.0, **labels)
    # In minutes of steps Muon gets through what takes Adam three times as many.
    muon = {"name": "muon", "matrix_rms": 1.0}
    config.optim.pretraining = common.adam(
        2e-3,
        decay="cosine",
        final_fraction=0.2,
        clip_norm=0.0,
        multipliers=(("pose", 0.7),),
        **muon,
    )
    # Joint training pulls the encoders away from what they have learned: they follow slowly.
    config.optim.generator.update(
        multipliers=(("generator/decoder", 3.0), ("pose", 0.3), ("expression", 0.02)), **muon
    )
    return config


def _real(config: ConfigDict) -> ConfigDict:
    """`synthetic` for real clips: the labels are a detector's, and the people are few."""
    config.variant = "real"
    config.num_steps = 12_000
    config.pretraining.steps = 2000
    config.data.augment.colour.probability = 0.5
    return config


def _networks(tiny: bool) -> dict:
    """Appearance encoder, generator, discriminator; the full sizes are the classes' defaults (method.md 3.2-3.9)."""
    if not tiny:
        return {
            "appearance": {
                "widths": (64, 128, 256),
                "volume_depth": 16,
                "volume_channels": 32,
                "blocks": 6,
                "norm": "group",
            },
            "generator": {
                "volume_shape": (16, 64, 64),
                "volume_channels": 32,
                "flatten_stride": "last",  # last | first: a quarter of the work of halving both volumes (3.6)
                "expression_gain": 1.0,  # of the latent beside the appearance, in the style
                "expression_mixing": 0.0,  # gain of features mixed by the latent; 0: the style alone, as published
                "appearance_widths": (32, 64, 128, 256, 128),
                "appearance_strides": (2, 2, 2, 2),
                "down_channels": (512, 512, 512),
                "up_channels": (512, 256, 128),
                "rgb_channels": None,  # from coarse to fine; None doubles from 3: 96, 48, 24, 12, 6, 3
                "injection": "modulated",  # modulated | adain
                "mapping_features": None,  # width of an optional mapping MLP of the style
                "norm": "group",
            },
            "discriminator": {
                "image_size": 256,
                "widths": (128, 256, 512, 512, 512, 512, 512),
                "group": 4,
            },
            "warp_padding": "zeros",
        }
    return {
        "appearance": {
            "widths": (16, 32),
            "volume_depth": 4,
            "volume_channels": 8,
            "blocks": 2,
            "norm": "group",
        },
        "generator": {
            "volume_shape": (4, 32, 32),
            "volume_channels": 8,
            "flatten_stride": "last",
            "expression_gain": 1.0,
            "expression_mixing": 0.0,
            "appearance_widths": (8, 16, 32, 16),
            "appearance_strides": (2, 2, 2),
            "down_channels": (48, 48),
            "up_channels": (48, 24),
            "rgb_channels": None,
            "injection": "modulated",
            "mapping_features": 64,
            "norm": "group",
        },
        "discriminator": {"image_size": 64, "widths": (8, 16, 32, 64, 64), "group": 4},
        "warp_padding": "zeros",
    }
