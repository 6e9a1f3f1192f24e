"""Long videos: overlapping windows of frames whose predictions are averaged at every step (method.md 7.4).

Every window has the same length, so one compiled program serves clips of any length; the clip's latents stay on
the host, so device memory does not grow with it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from dexportrait_jax.diffusion.guidance import Branch
from dexportrait_jax.diffusion.sampler import Denoise

Frames = Int[np.ndarray, " length"]


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


def rotated_window_frames(
    frames: int, length: int, overlap: int, shift: int
) -> Int[np.ndarray, "windows length"]:
    """X-NeMo's scheme: windows on a closed loop, all shifted by ``shift`` frames, anew in every step."""
    if frames <= length:
        return window_frames(frames, length, overlap)
    starts = np.arange(0, frames, length - overlap) + shift
    return (starts[:, None] + np.arange(length)) % frames


def triangular_weights(length: int) -> Float[np.ndarray, " length"]:
    """Weights of a window's frames, largest in the middle and never zero."""
    position = np.arange(length)
    return np.minimum(position + 1, length - position).astype(np.float32)


def windowed(
    denoise: Callable[[np.ndarray, np.ndarray, Branch, Frames], np.ndarray],
    frames: int,
    *,
    length: int = 24,
    overlap: int = 4,
    weights: Float[np.ndarray, " length"] | None = None,
    rotate: Callable[[int], int] | None = None,
) -> Denoise:
    """A denoise function for a whole clip from one for windows.

    Args:
        denoise: ``denoise(latents (length, ...), timesteps (length,), branch, frame numbers)``.
        frames: frames of the clip.
        length, overlap: of the windows.
        weights: of a window's frames in the average; None means triangular.
        rotate: timestep -> shift of X-NeMo's rotating windows; None keeps the windows in place. It must
            give the same shift whenever it is asked for the same timestep.
    """
    weights = triangular_weights(length) if weights is None else np.asarray(weights, np.float32)

    def denoise_clip(latents, timesteps, branch):
        if rotate is None:
            table = window_frames(frames, length, overlap)
        else:
            table = rotated_window_frames(frames, length, overlap, rotate(int(timesteps[0])))
        latents = np.asarray(latents)
        total = np.zeros(latents.shape, np.float32)
        weight_sum = np.zeros((frames,) + (1,) * (latents.ndim - 1), np.float32)
        for chosen in table:
            prediction = denoise(latents[chosen], timesteps[chosen], branch, chosen)
            # A repeated last frame counts once, where it first stands.
            _, first = np.unique(chosen, return_index=True)
            factor = weights[first].reshape((-1,) + (1,) * (latents.ndim - 1))
            total[chosen[first]] += factor * np.asarray(prediction, np.float32)[first]
            weight_sum[chosen[first]] += factor
        return total / weight_sum

    return denoise_clip
