"""`dexportrait encode`: every frame of a dataset through a frozen autoencoder, once and not in every step.

An animator's step with `config.data.latents` is the step without it (method.md 4.1, 4.7): the posterior is cached,
and samples are drawn from it in the step, with the same keys.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8

from data_pipelines import dataset, files, latents, records
from data_pipelines.prepare import latents as writing
from dexportrait_jax import sharding
from dexportrait_jax.errors import UserError
from dexportrait_jax.metrics import Progress
from dexportrait_jax.state import Params
from dexportrait_jax.tasks import autoencoder
from dexportrait_jax.tasks.pictures import to_float
from dexportrait_jax.weights.importing import load_groups, read_description

_CACHE = 64 << 20  # bytes of read clips: each is read once


def run_encode(
    weights: str,
    data: str,
    out: str,
    *,
    size: int = 512,
    split: str = "train",
    dtype: str = "float16",
    compute: str = "float32",
    flips: bool = False,
    batch_size: int = 8,
    overwrite: bool = False,
) -> None:
    """The job `encode`: mean and log-variance of every frame of a split, on all devices of this host.

    Args:
        weights: an export that holds the group autoencoder.
        data: the dataset.
        out: directory of the latents.
        size: side of the pictures, `data.image_size` of the animator.
        split: of the dataset.
        dtype: how latents are stored.
        compute: what the autoencoder computes in.
        flips: of mirrored pictures too.
        batch_size: pictures a device.
        overwrite: replace latents that are there.

    Raises:
        UserError: no such weights or dataset, sizes that do not fit, or `out` may not or cannot be written.
    """
    for name, value in (("size", size), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    clips = dataset.open_clips(data, split, cache_bytes=_CACHE)
    latents.refuse_rendered(clips)
    options = read_description(Path(weights))["config"].get("model", {}).get("autoencoder", {})
    config = ml_collections.ConfigDict({"dtype": compute, "model": {"autoencoder": options}})
    network = autoencoder.build_networks(config)["autoencoder"]
    _, groups = load_groups(weights, {"autoencoder": network.abstract})
    params = groups["autoencoder"]

    def posterior(
        params: Params, images: UInt8[Array, "b H W 3"]
    ) -> Float[Array, "b mean_and_log_variance h w c"]:
        mean, log_variance = network.bind(params).encode(to_float(images))
        return jnp.stack([mean, log_variance], 1)

    pictures = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
    try:
        shape = jax.eval_shape(posterior, params, pictures).shape[2:]
    except ValueError as error:
        raise UserError(f"--size={size} does not suit the autoencoder: {error}") from error
    description = latents.Description(
        data=str(clips.directory),
        split=split,
        shards=clips.fingerprint(),
        clips=len(clips),
        frames=int(clips.frames.sum()),
        crop=_crop(clips),
        image_size=size,
        flips=flips,
        dtype=dtype,
        compute=compute,
        shape=tuple(shape),
        autoencoder=autoencoder.identity(options, params),
        weights=os.fspath(weights),
    )
    target = Path(out).absolute()
    total = description.frames
    gigabytes = total * description.frame_bytes / 1e9
    words = f"{total} frames of {len(clips)} clips, {description.frame_bytes} bytes a frame, {gigabytes:.3g} GB"
    if writing.finished(target, description, overwrite):
        print(
            f"encode: {target}: already there, {words}; nothing to do (--overwrite makes it anew)"
        )
        return
    files.check_destination(target, "latents")
    print(f"encode: {target}: {words}", flush=True)
    sizes = ml_collections.ConfigDict(dict.fromkeys(sharding.AXES, 1) | {"data": -1})
    mesh = sharding.make_mesh(sizes, jax.local_devices())
    rows = NamedSharding(mesh, PartitionSpec("data"))
    params = jax.device_put(params, sharding.replicated(mesh))
    compiled = jax.jit(posterior, out_shardings=rows)

    def encode(images: UInt8[np.ndarray, "b H W 3"]) -> Float[Array, "b 2 h w c"]:
        return compiled(params, jax.device_put(images, rows))

    progress = Progress("encode", total, unit="frame")
    writing.write(
        clips,
        target,
        description,
        encode,
        batch=batch_size * mesh.size,
        workers=os.cpu_count() or 1,
        tell=progress.update,
    )
    print(f"encode: {target} is whole; train with --config.data.latents={out}")


def _crop(clips: dataset.ClipDataset) -> dict | None:
    try:
        settings = clips[0].settings
    except records.RecordError:
        return None  # told when it is left out
    # What is true of a rendered clip's frames is no constant of its crop.
    return {name: value for name, value in settings.items() if name != "synthetic"}
