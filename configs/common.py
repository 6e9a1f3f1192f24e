"""What the stages' configs share: sizes of the networks, optimizers, data, mesh."""

from __future__ import annotations

from ml_collections import ConfigDict

from data_pipelines.loading import default_data

VARIANTS = ("tiny", "small", "full")


def base(stage: str, variant: str) -> ConfigDict:
    """Keys that every stage has. Batch sizes are global: they do not change with the mesh."""
    config = ConfigDict()
    config.stage = stage
    config.variant = variant
    config.seed = 0
    config.num_steps = 0
    config.dtype = (
        "float32" if variant == "tiny" else "bfloat16"
    )  # of the computation; weights are float32
    config.frozen_dtype = (
        "float32" if variant == "tiny" else "bfloat16"
    )  # of groups that are not trained
    config.accumulate = 1  # parts that a batch is cut into, one after the other
    config.ema_decay = 0.996 if variant == "tiny" else 0.999
    config.max_skipped_in_a_row = 20
    config.log_every = (
        10  # rows of metrics.jsonl (one a step) are fetched from the device this often
    )
    config.report = ConfigDict(
        {
            # Longer without a step, data or a save: all threads' stacks go to WORKDIR/stacks.txt. 0: never. Starting,
            # compiling and evaluating may take four times as long: a pod's step may take half an hour to compile.
            "stuck_minutes": 15.0,
            # A loss so many typical deviations above its recent past is written to WORKDIR/spikes.txt. 0: none is.
            "spikes": 12.0,
            # Event files for `tensorboard --logdir=WORKDIR`.
            "tensorboard": True,
            # Project of Weights & Biases to write to as well; wants `pip install wandb`. "": none.
            "wandb": "",
            # Peak of one device in TFLOP/s, for the MFU. 0: as known of TPUs; elsewhere there is none.
            "peak_tflops": 0.0,
            # `steps` steps that JAX's profiler traces into WORKDIR/tensorboard, `after` so many of this process.
            "profile": {"after": 10, "steps": 0},
        }
    )
    # On TPUs set by what follows the variant, as in `full@v5e:16x16`: see meshes.py.
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "context": 1, "tensor": 1})
    config.checkpoint = ConfigDict(
        {
            "minutes": 1.0 if variant == "tiny" else 15.0,
            "every_steps": 0,
            "keep": 2,
            # Longer than this no save takes: one process that could not write has the others wait so long for it.
            # Below the time that a host is given to end, and above what the slowest disk needs.
            "timeout_seconds": 600,
        }
    )
    config.evaluate = ConfigDict(
        {"every_steps": 0 if variant == "tiny" else 5000, "at_end": True, "split": "validation"}
    )
    config.data = ConfigDict(default_data())
    # Batches are the same for any number. An example of 512 px takes some 0.2 s of a core, and four threads, which is
    # what 0 is, share one interpreter: a pod needs processes, and more where `time/data_seconds` is not near 0.
    config.data.workers = {"small": 4, "full": 8}.get(variant, 0)
    if variant == "tiny":  # minutes of training: less variety to learn
        config.data.augment.flip.probability = 0.0
        config.data.augment.similarity.probability = 0.25
        # Figures of `tiny` and of what grows from it (synthetic, real, minutes) were measured without.
        config.data.cross_view = 0.0
    return config


def adam(learning_rate: float, **changes) -> ConfigDict:
    """Adam, or what `name` says, with warm-up and clipping; see optim.make_optimizer."""
    values = {
        "name": "adam",
        "learning_rate": learning_rate,
        "b1": 0.9,
        "b2": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "warmup_steps": 50,
        "decay": "constant",
        "final_fraction": 0.1,
        "clip_norm": 1.0,
        "matrix_rms": 0.2,  # of muon: 0.2 is about what Adam's updates have
        "multipliers": (),  # (("group/module", factor of the learning rate), ...)
    }
    unknown = set(changes) - set(values)
    if unknown:
        raise KeyError(f"optimizer keys {sorted(unknown)} do not exist")
    return ConfigDict(values | changes)


def set_data(config: ConfigDict, **changes) -> None:
    """Changes keys of config.data that exist."""
    config.data.lock()
    config.data.update(changes)
    config.data.unlock()


def sizes(variant: str, latent_diffusion: bool = False) -> dict[str, int]:
    """Pixels of the frames and of the encoders' inputs (method.md 3.1, 4)."""
    if variant == "tiny":
        return {"image_size": 64, "pose_size": 64, "expression_size": 64}
    image = 512 if latent_diffusion and variant == "full" else 256
    return {"image_size": image, "pose_size": 256, "expression_size": 224}


def encoders(variant: str) -> dict:
    """Pose encoder (ConvNeXtV2-Tiny) and expression encoder (FAN); method.md 3.3, 3.4."""
    if variant == "tiny":
        return {
            "pose": {
                "depths": (1, 1, 2, 1),
                "dims": (24, 48, 96, 128),
                "rotation_head": "euler_bins",
                "translation_limit": None,
                "scale_limit": 2.0,
                "initialisation": "fan_in",
            },
            "expression": {
                "kind": "fan",
                "image_size": 64,
                "stem": 16,
                "widths": (16, 32, 48),
                "depth": 2,
                "heat_maps": 16,
                "pictures": 1,
                "latent": 64,
                "leak": 0.2,
                "dropout": 0.0,  # the figures of everything on two cores were measured without,
                "pooling": "average",  # and with this
                "norm": "group",
            },
        }
    return {
        "pose": {
            "depths": (3, 3, 9, 3),
            "dims": (96, 192, 384, 768),
            "rotation_head": "euler_bins",  # euler_bins | 6d
            "translation_limit": None,  # None: linear; else limit * tanh
            "scale_limit": 2.0,  # of the logarithm
            "initialisation": "published",  # published | fan_in, for narrow networks
        },
        "expression": {
            "kind": "fan",  # fan | fan_sa
            "image_size": 224,
            "stem": 64,
            "widths": (128, 128, 256),
            "depth": 4,
            "heat_maps": 68,
            "pictures": 1,  # that the heat maps are gathered in before the latent
            "latent": 512,  # also what generator and denoiser expect
            "leak": 0.2,  # 0: the published ReLU, which can die in the first steps and take the latent with it
            # Of the hourglass's shortcuts, where the encoder is trained; 0: none. Published for a network that learns
            # landmarks with BatchNorm. Nobody has measured it here, under GroupNorm and a picture loss.
            "dropout": 0.5,
            "pooling": "max",  # of the hourglass: max (PD-FGC's and X-NeMo's) | average (the first FAN's)
            "norm": "group",  # of the features; group needs no statistics of the batch
        },
    }


def minutes(config: ConfigDict) -> None:
    """Encoders that learn poses and expressions on two cores, 64 px, and the pictures that they see."""
    config.model.pose.update(depths=(1, 1, 3, 1), dims=(48, 96, 128, 192), rotation_head="6d")
    config.model.expression.update(
        stem=24, widths=(24, 48, 64), heat_maps=40, pictures=8, latent=32
    )
    # Identity and pose are kept out of the latent: grey upright crops, and two views of an instant that should
    # agree. What is turned and bent beyond that hides, at 64 px, the few pixels that lips and lids move.
    config.data.augment.expression_crop.update(
        gray=True,
        upright=True,
        face_alone=True,
        even_light=True,
        margin_range=(1.0, 1.2),
        centre_jitter=0.03,
    )
    config.data.augment.expression_rotation.degrees = 10.0
    config.data.augment.expression_affine.displacement = 0.008


def autoencoder(variant: str) -> ConfigDict:
    """SD's VAE, or a small one of factor 4 whose latents have unit variance by training."""
    if variant == "tiny":
        return ConfigDict(
            {
                "kind": "vae",
                "latent_channels": 16,
                "block_channels": (16, 16, 32),
                "layers_per_block": 1,
                "groups": 8,
                "scale": 1.0,
                "middle_attention": False,
            }
        )
    return ConfigDict(
        {
            "kind": "vae",  # vae | tiny: TAESD and kin
            "latent_channels": 4,
            "block_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
            "groups": 32,
            "scale": 0.18215,
            "middle_attention": True,
        }
    )


def animator(stage: str, variant: str) -> ConfigDict:
    """What both animator stages share: all networks, diffusion, sampling (method.md 4, 7)."""
    tiny = variant == "tiny"
    config = base(stage, variant)
    config.ema_decay = 0.99 if tiny else 0.9999
    set_data(config, **sizes(variant, latent_diffusion=True))
    config.evaluate.at_end = not tiny
    config.remat = "none"  # of the two UNets with their temporal modules; see motion.py
    config.model = ConfigDict(
        encoders(variant)
        | {
            "autoencoder": autoencoder(variant),
            "unet": {
                "block_channels": (32, 64, 64) if tiny else (320, 640, 1280, 1280),
                "layers_per_block": 1 if tiny else 2,
                "heads": 1 if tiny else 8,  # few wide heads: a CPU is slow at many narrow ones
                "groups": 8 if tiny else 32,
            },
            "attn2": {
                # none | null_text (a constant, learned from zero: nothing fills it with the empty prompt) | clip_image
                "attn2": "none",
                "cross_attention_features": 768,
                "null_text_tokens": 77,
            },
            "reference": {
                "raymap_reference": False,  # give the reference UNet the source's ray map too
                "raymap": "displacement",
                "raymap_w": 1,
                "raymap_points": "centres",
            },
            "denoiser": {
                # image (zeros where the reference is dropped; a constant text stays) | always | never
                "drop_attn2": "image",
                "raymap": "displacement",  # displacement | plucker6 | none
                "raymap_w": 1,  # 0: the formula as printed, without translation
                "raymap_points": "centres",  # centres (of pixels) | corners (as the volumes' cells)
                "warp_kernel": 3,  # convolution on the warped reference: 3, 1, or 0 for none
                "warp_padding": "zeros",  # zeros | border
                # Of the reference's c features, at depth d of h/2: channel_depth (ch*(h/2) + d, LivePortrait's) |
                # depth_channel (d*(2c/h) + ch).
                "volume_order": "channel_depth",
                "expression_injector": "in_block",  # in_block | xnemo | none
                "expression_heads": None,
                # Of in_block: before_feed_forward | after_feed_forward | before_text (attn2).
                "expression_place": "before_feed_forward",
                "expression_tokens": (4, 16) if tiny else (32, 16),
                "expression_linear": True,  # a trained layer before the latent is cut into tokens
                "expression_positions": "sinusoidal",  # sinusoidal | none
                "expression_null": "learned",  # learned | zero
            },
            "temporal": {
                "max_frames": 16 if tiny else 32,
                "middle": True,
                "norm": "clip",  # clip (diffusers) | frame (AnimateDiff's own code, for its weights)
            },
            "image_encoder": {
                "image_size": 224,
                "patch_size": 14,
                "features": 1024,
                "layers": 24,
                "heads": 16,
                "feed_forward": None,  # channels inside its feed-forward layers; None: four times features
                "projection": 768,
                "activation": "quick_gelu",  # quick_gelu | gelu
            },
        }
    )
    config.diffusion = ConfigDict(
        {
            # sd15 | xnemo (betas up to .02) | zero_snr (v prediction, the last timestep is pure noise; wants
            # sampling.spacing=trailing). v learns faster in few steps.
            "preset": "zero_snr" if tiny else "sd15",
            # Of the preset, what is to be another; None: as it has it.
            "steps": None,
            "beta_start": None,
            "beta_end": None,
            "prediction": None,  # epsilon | v | sample (the clean latents)
            "zero_terminal_snr": None,
            "final_alpha_one": None,
        }
    )
    config.sample_latents = not tiny  # train on samples of the posterior, or on its mean
    # 0: every noise level weighs the same; see NoiseSchedule.min_snr_weights.
    config.min_snr_gamma = 0.0
    # Further weight of the error where brows, eyes, nose and mouth are (data.augment.component_mask): few latents,
    # which alone show an expression. 0: every place weighs the same, as published.
    config.component_weight = 0.0
    config.noise_offset = 0.0
    # Density of noise levels in training, timestep^(power - 1): above 1, more of the high ones. These are the
    # last that a network of minutes learns, and the first that sampling asks.
    config.timestep_power = 2.0 if tiny else 1.0
    config.dropout = ConfigDict(
        {"everything": 0.1, "expression": 0.1, "pose": 0.05, "reference_tokens": 0.0}
    )
    config.sampling = ConfigDict(
        {
            "steps": 8 if tiny else 35,
            "guidance": 1.5 if tiny else 2.5,
            "hybrid_steps": 1 if tiny else 5,  # S of the progressive hybrid guidance
            # learned | zero | source; learned is zero where model.denoiser.expression_null is
            "expression_null": "learned",
            "null_reference": "dropped",  # dropped | kept, in the unconditional branch
            "null_pose": "zero",  # zero | source, likewise
            "reading": "hybrid",  # hybrid | expression_in_both | three_scale
            "expression_guidance": None,  # with three_scale, a scale of its own
            "spacing": "trailing" if tiny else "leading",
            "offset": 1,
            "eta": 0.0,
            "start": "noise",  # noise | ref_blur
            # Deviation of the noise. A network of minutes lets noise through to the picture; less noise, less of it.
            "temperature": 0.5 if tiny else 1.0,
            "shared_noise": 1.0 if tiny else 0.0,  # share of it that all frames have in common
            # Windows of data.frames frames, of which two in a row share these; one less than a window at most.
            "overlap": 2 if tiny else 4,
            "window_offset": "none",  # none | random: the windows lie elsewhere in every step
            "window_ends": "open",  # open | closed: the clip's end goes on with its beginning
            "window_weights": "triangular",  # triangular | equal, of a window's frames in the average
        }
    )
    return config


def animator_of_minutes(config: ConfigDict) -> ConfigDict:
    """`tiny` grown to 128 px and to TAEF2's latents, on encoders of `minutes`."""
    config.variant = "minutes"
    animator_on_encoders_of_minutes(config)
    set_data(config, image_size=128)
    config.model.unet.update(block_channels=(64, 128, 128), groups=16)
    config.model.autoencoder = ConfigDict(
        {
            "kind": "tiny",
            "latent_channels": 32,
            "block_channels": (64, 64, 64, 64),
            "layers_per_block": 3,
            "groups": 4,
            "scale": 1.0,
            "middle_attention": True,
        }
    )
    return config


def animator_on_encoders_of_minutes(config: ConfigDict) -> ConfigDict:
    """`tiny` on encoders of `minutes` and on latents that are read."""
    minutes(config)
    # Latents are read, not encoded, so the pictures stay as they are.
    config.data.augment.similarity.probability = 0.0
    set_data(config, cache_megabytes=1024)
    config.model.denoiser.expression_tokens = (4, 8)
    # After 2000 steps of the image stage of `minutes` a scale of 1.5 cost 0.6 dB, at the same LPIPS.
    config.sampling.guidance = 1.0
    config.ema_decay = 0.998
    return config
