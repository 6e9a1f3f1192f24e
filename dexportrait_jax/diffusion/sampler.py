"""DDIM sampling, equal to diffusers' ``DDIMScheduler`` step by step.

The loop runs on the host and the network is the only compiled program: a DDIM step with guidance is a weighted
sum of arrays whose weights are plain numbers. So nothing is recompiled when the number of steps, the
scale or the length of the clip changes. Latents are a numpy array that need not fit a device; it is
renewed in place, part by part, as a clip's windows come in: of a long clip nothing else is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from dexportrait_jax.diffusion.guidance import Branch, GuidancePlan, GuidanceStep
from dexportrait_jax.diffusion.schedule import NoiseSchedule

Latents = Float[np.ndarray, "batch h w c"]
Timesteps = Int[np.ndarray, " batch"]
Denoise = Callable[[Latents, Timesteps, Branch], Latents]
# The guided prediction in parts, every frame in one of them: frames, and their prediction. Once a part is
# given, the latents of its frames are not read any more.
Guided = Callable[[Latents, Timesteps, GuidanceStep], Iterator[tuple[slice, Latents]]]
Spacing = Literal["leading", "trailing", "linspace"]


def sampling_timesteps(
    schedule: NoiseSchedule, count: int, *, spacing: Spacing = "leading", offset: int = 1
) -> Int[np.ndarray, " count"]:
    """The timesteps of a run, falling. "leading" with offset 1 and 35 steps: 953, 925, ..., 1.

    ``offset`` belongs to "leading" alone. "trailing" starts at the last timestep.

    Raises:
        ValueError: more steps than the schedule has, or an unknown spacing.
    """
    total = schedule.steps
    if not 0 < count <= total:
        raise ValueError(f"{count} sampling steps: there must be 1 to {total}")
    if spacing == "leading":
        steps = np.arange(count)[::-1] * (total // count) + offset
    elif spacing == "trailing":
        # Rounding may leave arange a value just above 0 behind the last: of 61 steps it has 62.
        steps = np.round(np.arange(total, 0, -total / count)[:count]).astype(np.int64) - 1
    elif spacing == "linspace":
        steps = np.round(np.linspace(0, total - 1, count))[::-1]
    else:
        raise ValueError(f"spacing {spacing!r} is none of leading, trailing, linspace")
    return np.clip(steps, 0, total - 1).astype(np.int32)


def ddim_coefficients(
    schedule: NoiseSchedule, timestep: int, previous: int, eta: float = 0.0
) -> tuple[float, float, float]:
    """Factors of latents, prediction and fresh noise in the step from ``timestep`` to ``previous``.

    A negative ``previous`` is the end of the run. Formulas (12) and (16) of DDIM (2010.02502).
    """
    table = schedule.alphas_cumprod
    now = table[timestep]
    if previous >= 0:
        then = table[previous]
    else:
        then = 1.0 if schedule.final_alpha_one else table[0]
    deviation = eta * np.sqrt(max((1 - then) / (1 - now) * (1 - now / then), 0.0))
    signal, direction = np.sqrt(then), np.sqrt(max(1 - then - deviation**2, 0.0))
    # clean = a_x * latents + a_p * prediction, noise = b_x * latents + b_p * prediction
    if schedule.prediction == "epsilon":
        a_x, a_p, b_x, b_p = 1 / np.sqrt(now), -np.sqrt((1 - now) / now), 0.0, 1.0
    elif schedule.prediction == "sample":
        a_x, a_p, b_x, b_p = 0.0, 1.0, 1 / np.sqrt(1 - now), -np.sqrt(now / (1 - now))
    else:
        a_x, a_p, b_x, b_p = np.sqrt(now), -np.sqrt(1 - now), np.sqrt(1 - now), np.sqrt(now)
    return (
        float(signal * a_x + direction * b_x),
        float(signal * a_p + direction * b_p),
        float(deviation),
    )


def ddim_step(
    schedule: NoiseSchedule,
    prediction: Latents,
    latents: Latents,
    timestep: int,
    previous: int,
    *,
    eta: float = 0.0,
    noise: Latents | None = None,
) -> Latents:
    """One DDIM step; ``noise`` is needed when ``eta`` is above 0."""
    of_latents, of_prediction, of_noise = ddim_coefficients(schedule, timestep, previous, eta)
    result = of_latents * latents + of_prediction * prediction
    return result + of_noise * noise if of_noise else result


def combine(
    denoise: Callable[..., Latents], step: GuidanceStep, latents: Latents, *arguments
) -> Latents:
    """The guided prediction of a step: one pass a branch, each times its coefficient, float32.

    ``denoise(latents, *arguments, branch)`` -> prediction.
    """
    guided = np.zeros(latents.shape, np.float32)
    for branch, coefficient in zip(step.branches, step.coefficients, strict=True):
        guided += np.float32(coefficient) * np.asarray(denoise(latents, *arguments, branch))
    return guided


def whole(denoise: Denoise) -> Guided:
    """All frames at once: ``sample``'s prediction from a denoise function."""

    def guided(latents, timesteps, step):
        yield slice(0, len(latents)), combine(denoise, step, latents, timesteps)

    return guided


def sample(
    guided: Guided,
    schedule: NoiseSchedule,
    plan: GuidancePlan,
    latents: Latents,
    *,
    spacing: Spacing = "leading",
    offset: int = 1,
    eta: float = 0.0,
    noise: Callable[[int, slice], Latents] | None = None,
    progress: Callable[[int, float], None] | None = None,
    in_place: bool = False,
) -> Latents:
    """Denoise ``latents`` by the plan: as many DDIM steps as it has.

    Args:
        guided: the guided prediction in parts: ``whole(denoise)``, or ``windows.windowed``.
        schedule: the schedule the network was trained with.
        plan: branches and coefficients of every step.
        latents: (B, h, w, C) at the noise level of the first timestep; left as they are, unless ``in_place``.
        spacing, offset: see ``sampling_timesteps``.
        eta: 0 deterministic, 1 as stochastic as DDPM.
        noise: step number and frames -> their noise, for eta above 0.
        progress: told after every part which step it belongs to, from 0, and the share of that step
            that is done.
        in_place: the result is written over ``latents`` (float32), so that a long clip's, which may lie on
            disk, are there once.

    Raises:
        ValueError: eta above 0 without noise.
    """
    count, frames = len(plan.steps), len(latents)
    if eta > 0 and noise is None:
        raise ValueError("eta above 0 needs noise")
    timesteps = sampling_timesteps(schedule, count, spacing=spacing, offset=offset)
    stride = schedule.steps // count
    if not in_place:
        latents = np.array(latents, np.float32)
    for index, (timestep, step) in enumerate(zip(timesteps.tolist(), plan.steps, strict=True)):
        batch = np.full((frames,), timestep, np.int32)
        done = 0
        for part, prediction in guided(latents, batch, step):
            latents[part] = ddim_step(
                schedule,
                prediction,
                latents[part],
                timestep,
                timestep - stride,
                eta=eta,
                noise=noise(index, part) if eta > 0 else None,
            )
            done += part.stop - part.start
            if progress is not None:
                progress(index, done / frames)
    return latents


def frame_noise(
    seed: int,
    frames: int,
    shape: tuple[int, ...],
    *,
    first: int = 0,
    step: int = 0,
    shared: float = 0.0,
) -> Float[np.ndarray, "frames ..."]:
    """Standard normal noise of ``shape`` for each frame: a function of (seed, step, frame number) alone.

    A frame's noise does not depend on the length of the clip nor on how it is cut into windows.
    ``shared`` is the share of its variance that all frames have in common (the mixed noise of PYoCo,
    2305.10474): what noise decides then stays the same from frame to frame.
    """

    def normal(*numbers: int) -> np.ndarray:
        return np.random.default_rng([seed, step, *numbers]).standard_normal(shape, np.float32)

    noise = np.empty((frames, *shape), np.float32)
    for frame in range(frames):
        noise[frame] = normal(first + frame)
    if shared > 0.0:
        common = normal(0, 1)  # numpy takes (seed, step) and (seed, step, 0) for the same
        noise *= np.float32(np.sqrt(1 - shared))
        noise += np.float32(np.sqrt(shared)) * common
    return noise


def blurred_start(
    schedule: NoiseSchedule,
    reference: Float[np.ndarray, "h w c"],
    noise: Float[np.ndarray, "frames h w c"],
    timestep: int,
    *,
    kernel: int = 9,
    sigma: float = 18.0,
) -> Float[np.ndarray, "frames h w c"]:
    """X-NeMo's start: the blurred source latent with the noise of the first timestep (method.md 7.1).

    With "leading" spacing the first timestep still holds some signal, which pure noise lacks.
    """
    reach = min(kernel // 2, min(reference.shape[:2]) - 1)
    window = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    window /= window.sum()
    padded = np.pad(np.asarray(reference), ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    rows = np.apply_along_axis(np.convolve, 0, padded, window, mode="valid")
    blurred = np.apply_along_axis(np.convolve, 1, rows, window, mode="valid")
    share = schedule.alphas_cumprod[timestep]
    return (np.sqrt(share) * blurred + np.sqrt(1 - share) * noise).astype(np.float32)
