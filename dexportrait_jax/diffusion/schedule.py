"""Noise schedules: how much noise a timestep means, what the network is asked for, how a loss is weighted.

A schedule is a small frozen object; its tables are numpy, so it may be closed over or be a static argument.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dexportrait_jax.choices import nearest
from dexportrait_jax.errors import UserError

Prediction = Literal["epsilon", "v", "sample"]


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """Scaled-linear betas of Stable Diffusion (method.md 4.7); the defaults are SD1.5's.

    Attributes:
        steps: number of training timesteps.
        beta_start, beta_end: ends of the schedule; its square root is linear in between.
        prediction: what the network predicts: "epsilon" (the noise), "v", or "sample" (the clean latents, as
            2511.13720 has it for networks that are too narrow to carry noise).
        zero_terminal_snr: rescale so that the last timestep is pure noise (Lin et al. 2305.08891);
            not with "epsilon".
        final_alpha_one: DDIM's last step goes to alpha_bar 1 instead of alpha_bar of timestep 0.

    Raises:
        ValueError: zero terminal SNR with epsilon prediction, or an unknown prediction.
    """

    steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction: Prediction = "epsilon"
    zero_terminal_snr: bool = False
    final_alpha_one: bool = False

    def __post_init__(self):
        if self.prediction not in get_args(Prediction):
            raise ValueError(
                f"prediction {self.prediction!r} is none of {', '.join(get_args(Prediction))}"
            )
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError(
                "zero_terminal_snr leaves no signal to tell noise from: use 'v' or 'sample'"
            )

    @functools.cached_property
    def alphas_cumprod(self) -> Float[np.ndarray, " steps"]:
        """alpha_bar of every timestep, float64."""
        betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.steps) ** 2
        cumulative = np.cumprod(1.0 - betas)
        if not self.zero_terminal_snr:
            return cumulative
        root = np.sqrt(cumulative)
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        return root**2

    def signal_and_noise(
        self, timesteps: Int[Array, " batch"], like: Float[Array, "batch ..."]
    ) -> tuple[Array, Array]:
        """sqrt(alpha_bar) and sqrt(1 - alpha_bar), shaped to multiply ``like``."""
        shape = (-1,) + (1,) * (like.ndim - 1)
        table = np.sqrt(np.stack([self.alphas_cumprod, 1 - self.alphas_cumprod]))
        chosen = jnp.asarray(table, jnp.float32)[:, timesteps]
        return chosen[0].reshape(shape), chosen[1].reshape(shape)

    def add_noise(
        self,
        latents: Float[Array, "batch ..."],
        noise: Float[Array, "batch ..."],
        timesteps: Int[Array, " batch"],
    ) -> Float[Array, "batch ..."]:
        """Latents with the noise of their timesteps."""
        signal, amount = self.signal_and_noise(timesteps, latents)
        return signal * latents + amount * noise

    def target(
        self,
        latents: Float[Array, "batch ..."],
        noise: Float[Array, "batch ..."],
        timesteps: Int[Array, " batch"],
    ) -> Float[Array, "batch ..."]:
        """What the network should predict."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return latents
        signal, amount = self.signal_and_noise(timesteps, latents)
        return signal * noise - amount * latents

    def clean(
        self,
        prediction: Float[Array, "batch ..."],
        noisy: Float[Array, "batch ..."],
        timesteps: Int[Array, " batch"],
    ) -> Float[Array, "batch ..."]:
        """The clean latents that a prediction implies."""
        if self.prediction == "sample":
            return prediction
        signal, amount = self.signal_and_noise(timesteps, noisy)
        if self.prediction == "epsilon":
            return (noisy - amount * prediction) / signal
        return signal * noisy - amount * prediction

    def snr(self, timesteps: Int[Array, " batch"]) -> Float[Array, " batch"]:
        """Signal-to-noise ratio alpha_bar / (1 - alpha_bar)."""
        ratio = self.alphas_cumprod / (1 - self.alphas_cumprod)
        return jnp.asarray(ratio, jnp.float32)[timesteps]

    def min_snr_weights(
        self, timesteps: Int[Array, " batch"], gamma: float = 5.0
    ) -> Float[Array, " batch"]:
        """Loss weights min(snr, gamma) / snr, or / (snr + 1) for v, or / 1 for the sample (Hang et al. 2303.09556).

        That is 0 where there is no signal, and the last timestep of a schedule with zero terminal SNR, from which
        sampling has to start, would never learn. Such a schedule takes Moore-AnimateAnyone's form (method.md 4.7):
        min(snr + 1, gamma) over the same, which is 1 there.
        """
        snr = self.snr(timesteps)
        # How much an error of the clean latents counts; an error of noise or v is that many times smaller.
        of_clean = jnp.minimum(snr + 1 if self.zero_terminal_snr else snr, gamma)
        return of_clean / {"epsilon": snr, "v": snr + 1, "sample": 1.0}[self.prediction]


SCHEDULES = {
    "sd15": NoiseSchedule(),
    # Its released scheduler leaves DDIM's last step as diffusers has it; SD1.5's says set_alpha_to_one=False.
    "xnemo": NoiseSchedule(beta_end=0.02, final_alpha_one=True),
    "zero_snr": NoiseSchedule(prediction="v", zero_terminal_snr=True),
}


def noise_schedule(diffusion: Mapping[str, Any]) -> NoiseSchedule:
    """The schedule of ``config.diffusion``: its preset, changed in the keys that are not None.

    Configs of exports made before there were presets give every key.

    Raises:
        UserError: an unknown preset, or keys that do not go together.
    """
    changes = {name: value for name, value in diffusion.items() if value is not None}
    preset = changes.pop("preset", "sd15")
    if preset not in SCHEDULES:
        raise UserError(
            f"config.diffusion.preset is one of {', '.join(SCHEDULES)}, not {preset!r}{nearest(preset, SCHEDULES)}"
        )
    try:
        return dataclasses.replace(SCHEDULES[preset], **changes)
    except ValueError as error:
        raise UserError(f"config.diffusion: {error}") from error


def training_noise(
    key: Array, shape: tuple[int, ...], offset: float = 0.0, frames: int = 1
) -> Float[Array, "batch ..."]:
    """Gaussian noise, plus ``offset`` times one Gaussian number per sample and channel (noise offset).

    A sample is ``frames`` rows of the batch: a clip's offset is that of all its frames, as in Moore-AnimateAnyone's
    second stage, or the temporal modules would learn to take flicker away.
    """
    pixels, channels = jax.random.split(key)
    noise = jax.random.normal(pixels, shape)
    if offset == 0.0:
        return noise
    common = (shape[0] // frames,) + (1,) * (len(shape) - 2) + (shape[-1],)
    shift = jax.random.normal(channels, common)
    return noise + offset * jnp.repeat(shift, frames, axis=0)
