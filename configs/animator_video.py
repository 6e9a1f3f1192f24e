"""Stage 2b: the animator's temporal modules on clips; everything else is frozen (method.md 4.5, 4.7).

    dexportrait train --config=configs/animator_video.py:full --workdir=runs/video --config.data.path=data/faces \
        --config.init.image=exports/image

Windows with calm backgrounds are chosen by `data.calm`; how many pass is said at the start.

tiny: clips of 8 frames at 64 px, 2 cores, about a minute.
minutes: the same at 128 px, on an export of `configs/animator_image.py:minutes`; six minutes.
small: clips of 16 frames at 256 px on one GPU. full: batch 8 clips of 24 frames at 512 px, lr 1e-5, 80k steps;
    on TPUs `full@v5e:8x8` spreads it over such a slice (see meshes.py).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common

VARIANTS = (*common.VARIANTS, "minutes")


def get_config(variant: str = "full") -> ConfigDict:
    """The temporal stage at one of VARIANTS."""
    if variant == "minutes":
        return _minutes(get_config("tiny"))
    tiny = variant == "tiny"
    config = common.animator("animator_video", variant)
    config.num_steps = 40 if tiny else 80_000
    config.init = ConfigDict(
        {
            "image": "",  # export of the image stage: everything but the temporal modules
            "unet": "",  # export that holds reference and denoiser to use instead
            "temporal": "",  # import of AnimateDiff (motion_modules), or export, to start from. "": fresh
        }
    )
    config.optim = ConfigDict(
        {
            "denoise": common.adam(1e-3, warmup_steps=10)
            if tiny
            else common.adam(1e-5, name="adamw", b2=0.999, weight_decay=1e-2, warmup_steps=1000)
        }
    )
    frames = {"tiny": 8, "small": 16, "full": 24}[variant]
    common.set_data(config, mode="video", batch_size=2 if tiny else 8, frames=frames)
    return config


def _minutes(config: ConfigDict) -> ConfigDict:
    common.animator_of_minutes(config)
    config.num_steps = 300
    return config
