"""The animator's speed: SD1.5's UNet beside diffusers, what sampling does not compute, seconds a frame.

    python -m tests.benchmarks animator [--parts=unet,sampling,frames] [--size=64] [--rounds=2] [--backward=True]

unet: ours, jitted, and diffusers' in PyTorch, the same weights and inputs on the same cores, turn by turn, each in a
    process of its own; forward, and forward with backward. The outputs are compared.
sampling: multiply-adds of a guided 35-step clip of the `full` video stage, beside doing it naively: three branches in
    every step, nothing kept from step to step, and the reference computed again, in three readings: once a step for
    all frames and branches; with the two passes of a frame that read it; with every pass, as where each call of the
    network starts from the picture. The aim of 0.4 is met in the last alone. By shape alone.
frames: seconds a frame of a clip of 32 frames at the `tiny` size, without compilation.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SIZES = {"block_channels": (320, 640, 1280, 1280), "layers_per_block": 2}
CONTEXT = (77, 768)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="tests.benchmarks animator")
    parser.add_argument("--parts", default="unet,sampling,frames")
    parser.add_argument("--size", type=int, default=64, help="of the latents, for unet")
    parser.add_argument("--rounds", type=int, default=2, help="of unet")
    parser.add_argument("--backward", default="True", choices=("True", "False"))
    options = parser.parse_args(arguments)
    parts = options.parts.split(",")
    if "unet" in parts:
        unet(options.size, options.rounds, options.backward == "True")
    if "sampling" in parts:
        _say("sampling", sampling_work())
    if "frames" in parts:
        _say("frames", seconds_a_frame())


def _say(part: str, figures: dict) -> None:
    print(json.dumps({"part": part} | figures), flush=True)


# --- the UNet ---------------------------------------------------------------------------


def unet(size: int, rounds: int, backward: bool) -> None:
    """Prints the seconds of every round, and the ratio of the best ones."""
    best: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _alone(_write_weights, folder, size)
        for _ in range(rounds):
            for measure in (_diffusers, _ours):
                name = measure.__name__.strip("_")
                found = _alone(measure, folder, backward)
                _say("unet", {"network": name, "latents": size, **found})
                for kind, seconds in found.items():
                    key = f"{name} {kind}"
                    best[key] = min(best.get(key, seconds), seconds)
        theirs, ours = (np.load(folder / f"{name}.npy") for name in ("diffusers", "ours"))
    error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if not error <= 1e-4:
        raise RuntimeError(f"the two networks differ by {error:.1e}: their times mean nothing")
    kinds = ("forward", "forward_and_backward")[: 1 + backward]
    ratios = {
        f"{kind}_ratio": round(best[f"ours {kind}"] / best[f"diffusers {kind}"], 2)
        for kind in kinds
    }
    cores = len(os.sched_getaffinity(0))
    _say("unet", {"relative_error": error, **ratios, "cores": cores})


def _alone(function, *arguments):
    fresh = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=fresh) as pool:
        return pool.submit(function, *arguments).result()


def _published():
    import diffusers

    down = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    return diffusers.UNet2DConditionModel(
        block_out_channels=SIZES["block_channels"],
        layers_per_block=SIZES["layers_per_block"],
        down_block_types=down,
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=CONTEXT[1],
        attention_head_dim=8,  # diffusers' name for the number of heads of SD1.5
    )


def _write_weights(folder: Path, size: int) -> None:
    from safetensors.torch import save_file

    from tests.published import randomise

    save_file(randomise(_published()).state_dict(), folder / "weights.safetensors")
    rng = np.random.default_rng(0)
    np.save(folder / "latents.npy", rng.normal(size=(1, size, size, 4)).astype(np.float32))
    np.save(folder / "context.npy", rng.normal(size=(1, *CONTEXT)).astype(np.float32))


def _diffusers(folder: Path, backward: bool) -> dict[str, float]:
    import torch
    from safetensors.torch import load_file

    network = _published()
    network.load_state_dict(load_file(folder / "weights.safetensors"))
    latents = torch.tensor(np.load(folder / "latents.npy")).permute(0, 3, 1, 2)
    context = torch.tensor(np.load(folder / "context.npy"))

    def forward():
        return network(latents, torch.tensor([500]), context).sample

    with torch.no_grad():
        output = forward()
        found = {"forward": _seconds(forward)}
    np.save(folder / "diffusers.npy", output.permute(0, 2, 3, 1).numpy())
    if backward:

        def forward_and_backward():
            network.zero_grad()
            forward().square().mean().backward()

        forward_and_backward()
        found["forward_and_backward"] = _seconds(forward_and_backward)
    return found


def _ours(folder: Path, backward: bool) -> dict[str, float]:
    import jax
    import jax.numpy as jnp
    from safetensors.numpy import load_file

    from dexportrait_jax.models.animator.transformer import TransformerOptions
    from dexportrait_jax.models.animator.unet import UNet
    from dexportrait_jax.state import Network
    from dexportrait_jax.weights import names

    options = TransformerOptions(heads=8, cross_attention_features=CONTEXT[1])
    network = Network(lambda rngs: UNet(**SIZES, options=options, rngs=rngs))
    params = names.from_torch(load_file(folder / "weights.safetensors"), network.abstract)
    params = jax.device_put(params)
    latents, context = (
        jnp.asarray(np.load(folder / f"{name}.npy")) for name in ("latents", "context")
    )
    timesteps = jnp.array([500])

    def predict(params):
        return network.bind(params)(latents, timesteps, context)

    forward = jax.jit(predict)
    np.save(folder / "ours.npy", np.asarray(forward(params)))
    found = {"forward": _seconds(lambda: jax.block_until_ready(forward(params)))}
    if backward:
        gradient = jax.jit(jax.value_and_grad(lambda params: jnp.mean(predict(params) ** 2)))
        jax.block_until_ready(gradient(params))
        found["forward_and_backward"] = _seconds(lambda: jax.block_until_ready(gradient(params)))
    return found


def _seconds(function, repeats: int = 3) -> float:
    """The quickest of some runs; whoever else was at work only adds."""
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        taken.append(time.perf_counter() - started)
    return round(min(taken), 2)


# --- sampling ---------------------------------------------------------------------------


def sampling_work(address: str = "configs/animator_video.py:full") -> dict[str, Any]:
    """Tera multiply-adds of one clip of a window's length, ours and naive in three readings, and the ratios."""
    import jax

    from dexportrait_jax import config as configs
    from dexportrait_jax import flops
    from dexportrait_jax.diffusion.guidance import guidance_plan
    from dexportrait_jax.models.animator.branches import branch_conditions
    from dexportrait_jax.models.animator.conditioning import Conditions
    from dexportrait_jax.tasks import build_networks

    config = configs.load_config(address)
    networks, frames = build_networks(config), config.data.frames
    params = {name: network.abstract for name, network in networks.items()}
    size, channels = config.data.image_size // 8, config.model.autoencoder.latent_channels

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, np.float32)

    latent, pose, poses = shape(1, size, size, channels), shape(1, 3, 4), shape(frames, 3, 4)
    latents = shape(frames, size, size, channels)
    expression = shape(frames, config.model.expression.latent)

    def denoiser(params):
        return networks["denoiser"].bind(params["denoiser"])

    def reference(params, latent, pose):
        return networks["reference"].bind(params["reference"])(latent, None, pose)

    def clip(bank, pose, poses):
        return Conditions(reference=bank, source_pose=pose, driving_pose=poses)

    bank = jax.eval_shape(reference, params, latent, pose)
    prepare = {
        "keys_values": lambda params, bank, pose, poses: denoiser(params).keys_values(bank),
        "residuals": lambda params, bank, pose, poses: denoiser(params).residuals(
            clip(bank, pose, poses)
        ),
    }
    made = {
        name: jax.eval_shape(function, params, bank, pose, poses)
        for name, function in prepare.items()
    }
    once = flops.count(reference, params, latent, pose).macs
    prepared = sum(
        flops.count(function, params, bank, pose, poses).macs for function in prepare.values()
    )

    def predict(branch):
        def function(params, latents, expression, given, pose, poses):
            conditions = Conditions(
                **given, source_pose=pose, driving_pose=poses, expression=expression
            )
            return denoiser(params)(
                latents,
                np.full(frames, 500),
                branch_conditions(conditions, branch),
                temporal=networks["temporal"].bind(params["temporal"]),
                frames=frames,
            )

        return function

    def pass_work(branch, given):
        return flops.count(predict(branch), params, latents, expression, given, pose, poses).macs

    sampling = config.sampling
    plan = guidance_plan(sampling.steps, scale=sampling.guidance, hold=sampling.hybrid_steps)
    branches = [branch for step in plan.steps for branch in step.branches]
    works = {branch: pass_work(branch, made) for branch in sorted(set(branches))}
    ours = once + prepared + sum(branches.count(branch) * work for branch, work in works.items())
    # A sampler that hides a condition by masking it pays for it all the same.
    unsaved = pass_work("full", {"reference": bank})
    steps = len(plan.steps)
    naive = {
        "reference once a step": steps * (3 * unsaved + once),
        "reference with the passes that read it": steps * (3 * unsaved + 2 * frames * once),
        "reference with every pass": steps * 3 * (unsaved + frames * once),
    }
    return {
        "frames": frames,
        "passes": plan.passes,
        "tera_macs": round(ours / 1e12, 1),
        "naive": {
            reading: {"tera_macs": round(macs / 1e12, 1), "ratio": round(ours / macs, 3)}
            for reading, macs in naive.items()
        },
        "giga_macs_a_frame_and_pass": {
            "null": round(works["null"] / frames / 1e9, 1),
            "full": round(works["full"] / frames / 1e9, 1),
            "naive": round(unsaved / frames / 1e9, 1),
            "reference": round(once / 1e9, 1),
        },
    }


# --- a clip -----------------------------------------------------------------------------


def seconds_a_frame(address: str = "configs/animator_video.py:tiny", frames: int = 32) -> dict:
    """Of a clip with random weights, which take as long as trained ones."""
    import jax

    from dexportrait_jax import config as configs
    from dexportrait_jax.animator_inference import AnimatorModel
    from dexportrait_jax.inference import Drive, Sampling
    from dexportrait_jax.tasks import build_networks
    from tests.published import random_like

    config = configs.load_config(address)
    networks = build_networks(config)
    params = {name: random_like(network.abstract) for name, network in networks.items()}
    model = AnimatorModel({"stage": config.stage}, config, networks, params)
    latent = config.model.expression.latent
    pose = np.eye(3, 4, dtype=np.float32)
    drive = Drive(
        pose,
        np.zeros(latent, np.float32),
        np.repeat(pose[None], frames, 0),
        np.zeros((frames, latent), np.float32),
    )
    source = np.zeros((config.data.image_size, config.data.image_size, 3), np.uint8)

    def animate():
        return sum(len(part) for part in model.animate(source, drive, Sampling()))

    animate()
    return {
        "image_size": config.data.image_size,
        "passes_a_frame": model.plan(Sampling()).passes,
        "seconds_a_frame": round(_seconds(animate, repeats=1) / frames, 3),
        "device": jax.devices()[0].platform,
    }
