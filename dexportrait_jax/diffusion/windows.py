"""Long videos: overlapping windows of frames whose predictions are averaged at every step (method.md 7.4).

Every window has the same length, so one compiled program serves clips of any length. The clip's latents stay on
the host, and predictions are given as soon as their last window is through: memory holds one window of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from dexportrait_jax.diffusion.guidance import Branch, GuidanceStep
from dexportrait_jax.diffusion.sampler import Guided, Latents, combine

Frames = Int[np.ndarray, " length"]
Weights = Literal["triangular", "equal"]


def window_frames(
    frames: int, length: int = 24, overlap: int = 4
) -> Int[np.ndarray, "windows length"]:
    """Frame numbers of every window. The last window is moved back to end with the clip.

    A clip shorter than a window repeats its last frame, so that the length never changes.

    Raises:
        ValueError: no frames, or an overlap that is not smaller than the window.
    """
    if frames < 1:
        raise ValueError("a clip needs at least one frame")
    if not 0 <= overlap < length:
        raise ValueError(f"overlap {overlap} must lie between 0 and below the window's {length}")
    if frames <= length:
        return np.minimum(np.arange(length), frames - 1)[None]
    last = frames - length
    starts = [*range(0, last, length - overlap), last]
    return np.array(starts)[:, None] + np.arange(length)


def triangular_weights(length: int) -> Float[np.ndarray, " length"]:
    """Weights of a window's frames, largest in the middle and never zero."""
    position = np.arange(length)
    return np.minimum(position + 1, length - position).astype(np.float32)


def windowed(
    denoise: Callable[[np.ndarray, np.ndarray, Frames, Branch], np.ndarray],
    frames: int,
    *,
    length: int = 24,
    overlap: int = 4,
    weights: Weights = "triangular",
) -> Guided:
    """``sample``'s prediction for a whole clip from a denoise function for windows.

    Predictions of windows that share a frame are averaged.

    Args:
        denoise: ``denoise(latents (length, ...), timesteps (length,), frame numbers, branch)``.
        frames: frames of the clip.
        length, overlap: of the windows.
        weights: of the average, "triangular", those in the middle of their window most, or "equal" (X-NeMo).
    """
    table = window_frames(frames, length, overlap)
    equal = weights == "equal"
    of_frames = np.ones(length, np.float32) if equal else triangular_weights(length)

    def guided(
        latents: Latents, timesteps: np.ndarray, step: GuidanceStep
    ) -> Iterator[tuple[slice, Latents]]:
        # Sums from frame ``first`` on: those of earlier frames are complete and given away.
        first, sums = 0, np.zeros((0, *latents.shape[1:]), np.float32)
        weight_sums = np.zeros((0,) + (1,) * (latents.ndim - 1), np.float32)
        ends = [*(int(chosen[0]) for chosen in table[1:]), frames]
        for chosen, end in zip(table, ends, strict=True):
            prediction = combine(denoise, step, latents[chosen], timesteps[chosen], chosen)
            # A repeated last frame counts once, where it first stands.
            own, at = np.unique(chosen, return_index=True)
            factor = of_frames[at].reshape((-1,) + (1,) * (latents.ndim - 1))
            more = int(own[-1]) + 1 - first - len(sums)
            sums = np.concatenate([sums, np.zeros((more, *sums.shape[1:]), np.float32)])
            weight_sums = np.concatenate(
                [weight_sums, np.zeros((more, *weight_sums.shape[1:]), np.float32)]
            )
            sums[own - first] += factor * prediction[at]
            weight_sums[own - first] += factor
            done = end - first
            yield slice(first, end), sums[:done] / weight_sums[:done]
            first, sums, weight_sums = end, sums[done:], weight_sums[done:]

    return guided
