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
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "context": 1, "tensor": 1})
    config.checkpoint = ConfigDict(
        {"minutes": 1.0 if variant == "tiny" else 15.0, "every_steps": 0, "keep": 2}
    )
    config.evaluate = ConfigDict(
        {"every_steps": 0 if variant == "tiny" else 5000, "split": "validation"}
    )
    config.data = ConfigDict(default_data())
    return config


def adam(learning_rate: float, **changes) -> ConfigDict:
    """Adam with warm-up and clipping; see optim.make_optimizer."""
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


def sizes(variant: str) -> dict[str, int]:
    """Pixels of the frames and of the encoders' inputs."""
    if variant == "tiny":
        return {"image_size": 64, "pose_size": 64, "expression_size": 64}
    return {"image_size": 256, "pose_size": 256, "expression_size": 224}
