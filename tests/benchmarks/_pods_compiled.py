"""Of the benchmark `pods`, what is asked of the compiler beside the plans of the command line."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from dexportrait_jax import chips, flops, sharding
from dexportrait_jax import config as configs
from dexportrait_jax.compiling import compiled, placed
from dexportrait_jax.models.animator.unet import UNet
from dexportrait_jax.models.attention import attention_backend
from dexportrait_jax.models.convolution import convolution_backend
from dexportrait_jax.platforms import jit_on, planned_for
from dexportrait_jax.programs import abstract_state
from dexportrait_jax.state import Network, parameter_count
from dexportrait_jax.step import Outputs, Phase, init_optimizers, make_step
from dexportrait_jax.tasks import make_task


def plan_unet(images: int, remat: str, effort: str) -> dict:
    """What one step takes on each of 16 chips, with `images` of its own."""
    network = Network(lambda rngs: UNet(dtype=jnp.bfloat16, remat=remat, rngs=rngs))

    def loss(params, batch, key, step, shared, events):
        guess = network.bind(params["unet"])(batch["latents"], batch["times"], batch["text"])
        return jnp.mean((guess - batch["noise"]) ** 2), Outputs({}, {})

    phase = Phase("denoise", ("unet",), loss, optax.adamw(1e-5, weight_decay=1e-2))
    step = make_step((phase,), seed=0, ema_decay=0.0)
    params = {"unet": network.abstract}
    state = {
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "params": params,
        "opt": jax.eval_shape(lambda tree: init_optimizers((phase,), tree), params),
        "ema": {},
    }
    _, devices = chips.topology("v5e:4x4")
    axes = ml_collections.ConfigDict({"data": 1, "fsdp": 16, "context": 1, "tensor": 1})
    mesh = sharding.make_mesh(axes, devices)
    rows = 16 * images
    batch = {
        "latents": jax.ShapeDtypeStruct((rows, 64, 64, 4), jnp.float32),
        "noise": jax.ShapeDtypeStruct((rows, 64, 64, 4), jnp.float32),
        "times": jax.ShapeDtypeStruct((rows,), jnp.float32),
        "text": jax.ShapeDtypeStruct((rows, 77, 768), jnp.float32),
    }
    places = sharding.state_shardings(state, mesh)
    run = jit_on(mesh, step, out_shardings=(places, sharding.replicated(mesh)), donate_argnums=0)
    with planned_for("tpu"):
        with convolution_backend("xla"), attention_backend("plain"):
            work = flops.count(step, state, batch, {})
        on_mesh = placed(batch, sharding.batch_shardings(batch, mesh))
        with jax.set_mesh(mesh):
            found = compiled(
                lambda: run.lower(placed(state, places), on_mesh, {}),
                f"UNet, {images} images a chip, remat {remat}",
                effort,
            )
    model = work.macs - work.recomputed
    return found | {
        "params": parameter_count(network.abstract),
        "recompute_overhead": 1 + work.recomputed / model,
        "model_tflops": 2 * model / 1e12,
    }


def state_gib(address: str) -> dict[str, float]:
    """What each device has of the State, in GiB."""
    config = configs.load_config(address)
    sizes = tuple(config.mesh[axis] for axis in sharding.AXES)
    places = jax.sharding.AbstractMesh(sizes, sharding.AXES)
    state = abstract_state(make_task(config), config)
    held = jax.tree.map(
        lambda leaf, place: np.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        state,
        sharding.state_shardings(state, places),
    )
    return {"gib": float(sum(jax.tree.leaves(held))) / chips.GIB}
