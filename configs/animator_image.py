"""Stage 2a: the animator's image stage (method.md 4): reference UNet and denoiser, SD1.5's sizes at `full`.

    dexportrait train --config=configs/animator_image.py:full --workdir=runs/image --config.data.path=data/faces \
        --config.init.motion=exports/motion --config.init.autoencoder=exports/autoencoder

With `--config.data.latents=data/faces-latents`, made once by `dexportrait encode`, the step need not encode pictures.

tiny: 64 px, latents 16x16x16, 2 cores, five minutes; hair, colours and head shape of the person, soft faces.
minutes: 128 px, latents of TAEF2, on encoders of `configs/motion.py:real`; 20 to 25 minutes on 2 cores. On held-out
    parts of clips it beats repeating the source, with soft faces (README). Its latents are made first by
    dexportrait encode --weights=exports/taef2 --data=data/faces --out=data/faces-latents --size=128
    and are given as --config.data.latents=data/faces-latents beside --config.init.autoencoder=exports/taef2.
synthetic: 64 px, for rendered heads on encoders of `configs/motion.py:synthetic` and an autoencoder of that name; a
    quarter of an hour on 2 cores, for ablations. Heads and people's colours are right, faces soft.
small: 256 px on one GPU. full: the paper's 512 px, batch 48 = 12 sources x 4 targets, lr 1e-5, 120k steps;
    on TPUs `full@v5e:8x8` spreads it over such a slice (see meshes.py). In both half of the targets are another
    camera's where there are several (data.cross_view; else it is 0).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common

VARIANTS = (*common.VARIANTS, "minutes", "synthetic")


def get_config(variant: str = "full") -> ConfigDict:
    """The image stage at one of VARIANTS."""
    if variant == "minutes":
        return _minutes(get_config("tiny"))
    if variant == "synthetic":
        return _synthetic(get_config("tiny"))
    tiny = variant == "tiny"
    config = common.animator("animator_image", variant)
    config.num_steps = 900 if tiny else 120_000
    config.init = ConfigDict(
        {
            "motion": "",  # export of the motion trainer: pose and expression
            "autoencoder": "",  # export of an autoencoder, or an import (vae, tiny_autoencoder)
            # Export that holds reference and denoiser to start from, or an import of SD1.5's UNet (unet), which both
            # start from. "": fresh.
            "unet": "",
            "image_encoder": "",  # import of CLIP (image_encoder), for model.attn2.attn2=clip_image
        }
    )
    config.optim = ConfigDict(
        {
            "denoise": common.adam(
                3e-3,
                decay="cosine",
                final_fraction=0.05,
                # Latents of a motion trainer of minutes vary little beside the tokens' position embedding.
                multipliers=(("denoiser/expression_tokens", 10.0),),
            )
            if tiny
            else common.adam(1e-5, name="adamw", b2=0.999, weight_decay=1e-2, warmup_steps=1000)
        }
    )
    # Where minutes count, many small steps beat few large ones.
    common.set_data(config, batch_size=2 if tiny else 12, targets=4)
    return config


def _synthetic(config: ConfigDict) -> ConfigDict:
    config.variant = "synthetic"
    common.animator_on_encoders_of_minutes(config)
    config.num_steps = 1100
    config.optim.denoise.learning_rate = 2e-3
    # Of 600 people no two steps see the same ones, and mouths are few latents.
    common.set_data(config, batch_size=4)
    config.component_weight = 4.0
    return config


def _minutes(config: ConfigDict) -> ConfigDict:
    common.animator_of_minutes(config)
    config.num_steps = 2000
    config.optim.denoise.learning_rate = 2e-3
    return config
