"""A small autoencoder for the animator, where no pretrained one is at hand.

    dexportrait train --config=configs/autoencoder.py:tiny --workdir=runs/autoencoder \
        --config.data.path=data/faces

tiny: 64 px, factor 4, 2 cores, a minute and a half; 28 dB or better on held-out frames of the people it was trained on.
synthetic: the same for rendered heads, of many people, 20 to 30 minutes on 2 cores.
small, full: SD's sizes (34.2 + 49.5 M), factor 8. `full` is a pod's job and usually not needed: SD's own
autoencoder can be used instead.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common

VARIANTS = (*common.VARIANTS, "synthetic")


def get_config(variant: str = "full") -> ConfigDict:
    """The autoencoder at one of VARIANTS."""
    if variant == "synthetic":
        return _synthetic(get_config("tiny"))
    tiny = variant == "tiny"
    config = common.base("autoencoder", variant)
    config.num_steps = 600 if tiny else 200_000
    if tiny:
        config.ema_decay = 0.98
    config.model = ConfigDict({"autoencoder": common.autoencoder(variant)})
    config.loss = ConfigDict(
        {
            "perceptual": "alexnet" if tiny else "vgg16",
            "perceptual_weights": "",  # of `dexportrait import --kind=lpips`; "": the published package
            "l1": 1.0,
            "lpips": 0.1,
            "kl": 0.0 if tiny else 1e-6,
            "moments": 0.1,
            "latent_noise": 0.3 if tiny else 0.0,  # deviation; the decoder learns to see through it
            "sample": not tiny,  # decode a sample of the posterior; its noise slows the first minutes down
        }
    )
    config.optim = ConfigDict(
        {
            "autoencoder": common.adam(5e-3, decay="cosine", final_fraction=0.05)
            if tiny
            else common.adam(1e-4, warmup_steps=1000)
        }
    )
    common.set_data(
        config,
        **common.sizes(variant, latent_diffusion=True),
        batch_size=2 if tiny else 32,
        targets=2 if tiny else 4,
    )
    return config


def _synthetic(config: ConfigDict) -> ConfigDict:
    """`tiny` for colours and faces of 600 people: 30 dB on people held out, where 1500 of its steps gave 25."""
    config.variant = "synthetic"
    config.num_steps = 4000
    config.loss.latent_noise = 0.15
    config.optim.autoencoder.learning_rate = 4e-3
    config.data.augment.similarity.probability = 0.5
    common.set_data(config, batch_size=4, targets=1)
    return config
