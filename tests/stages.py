"""The stages at sizes that compile in seconds, on drawn heads, for tests of the loop and the mesh."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from dexportrait_jax import config as configs
from dexportrait_jax.tasks import build_networks
from dexportrait_jax.weights.exporting import export_groups

STAGES = ("motion", "autoencoder", "animator_image", "animator_video")

NEEDED = (
    "motion",
    "autoencoder",
    "image",
)  # keys of config.init that an animator cannot do without


def micro(stage: str, data: Path, exports: Path, **changes) -> ConfigDict:
    """The tiny config of a stage with narrower networks; animators start from random exports."""
    config = configs.load_config(f"configs/{stage}.py:tiny")
    config.unlock()
    config.data.path = str(data)
    config.data.batch_size = 8  # one source for each of the eight devices
    config.data.targets = 1 if stage == "autoencoder" else 2
    config.num_steps = 6
    config.checkpoint.minutes = 1000.0
    config.evaluate.at_end = False
    for phase in config.optim.values():
        phase.decay, phase.warmup_steps = "constant", 2
    if "pose" in config.model:
        config.model.pose.depths = (1, 1, 1, 1)
        config.model.expression.depth = 1
    if stage == "motion":
        config.model.appearance.blocks = 1
        config.loss.adversarial_start = 0
        config.loss.r1_every = 1  # one program: each takes most of a minute to compile
        config.loss.adversarial_images = 0
    else:
        config.model.autoencoder.update(block_channels=(8, 8, 8), groups=4)
    if "unet" in config.model:
        config.model.unet.update(block_channels=(16, 32), groups=4)
        config.data.frames = 4
        for name in NEEDED:
            if name in config.init:
                config.init[name] = str(exports / name)
        _export_random(config, exports)
    for dotted, value in changes.items():
        configs.apply_override(config, f"{dotted.replace('__', '.')}={value}")
    config.lock()
    return config


def _export_random(config: ConfigDict, exports: Path) -> None:
    """Exports of random weights where `config.init` looks for them."""
    networks = build_networks(config)
    held = {
        "motion": ("pose", "expression"),
        "autoencoder": ("autoencoder",),
        "image": tuple(name for name in networks if name != "temporal"),
    }
    stages = {"motion": "motion", "autoencoder": "autoencoder", "image": "animator_image"}
    for name in NEEDED:
        if name not in config.init or (exports / name).exists():
            continue
        groups = {
            group: jax.tree.map(np.asarray, networks[group].init(jax.random.key(7)))
            for group in held[name]
        }
        model = {
            "stage": stages[name],
            "config": configs.to_json(config),
            "step": 0,
            "ema": False,
            "crop": {},
        }
        export_groups(exports / name, model, groups)
