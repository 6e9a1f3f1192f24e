"""Long videos: overlapping windows of frames whose predictions are averaged at every step (method.md 7.4).

Every window has the same length, so one compiled program serves clips of any length. The clip's latents stay on
the host, and predictions are given as soon as their last window is through: memory holds one window of them, and
where windows go round the clip's end, what the last ones share with the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from dexportrait_jax.diffusion.guidance import Branch, GuidanceStep
from dexportrait_jax.diffusion.sampler import Guided, Latents, combine

Frames = Int[np.ndarray, " length"]
Offset = Literal["none", "random"]
Ends = Literal["open", "closed"]
Weights = Literal["triangular", "equal"]


def window_frames(
    frames: int,
    length: int = 24,
    overlap: int = 4,
    *,
    ends: Ends = "open",
    random: np.random.Generator | None = None,
) -> Int[np.ndarray, "windows length"]:
    """Frame numbers of every window, in the order of their starts; two in a row share ``overlap`` frames or more.

    "open": the last window is moved back to end with the clip. "closed": the clip is a ring, and the last windows go
    on with its first frames. A clip shorter than a window repeats its last frame, so that the length never
    changes; one that fits into a window has that one window, whatever else is asked.

    Args:
        frames: frames of the clip.
        length, overlap: of the windows.
        ends: see above.
        random: moves the grid, by a number it draws. A ring is turned by 0 to ``length - 1`` frames, as X-NeMo does.
            With open ends one window more is needed, unless two come to lie on each other: first and last stay, the
            others are spread evenly and moved by less than the way from one to the next.

    Raises:
        ValueError: no frames, or an overlap that is not smaller than the window.
    """
    if frames < 1:
        raise ValueError("a clip needs at least one frame")
    if not 0 <= overlap < length:
        raise ValueError(f"overlap {overlap} must lie between 0 and below the window's {length}")
    if frames <= length:
        return np.minimum(np.arange(length), frames - 1)[None]
    stride, last = length - overlap, frames - length
    if ends == "closed":
        turned = int(random.integers(length)) if random else 0
        starts = [turned + start for start in range(0, frames, stride)]
    elif random:
        count = math.ceil(last / stride)
        moved = int(random.integers(last))  # by moved / count frames
        starts = sorted({0, *((last * (k + 1) - moved) // count for k in range(count)), last})
    else:
        starts = [*range(0, last, stride), last]
    return (np.array(starts)[:, None] + np.arange(length)) % frames


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
    offset: Offset = "none",
    ends: Ends = "open",
    weights: Weights = "triangular",
    seed: int = 0,
) -> Guided:
    """``sample``'s prediction for a whole clip from a denoise function for windows.

    Predictions of windows that share a frame are averaged.

    Args:
        denoise: ``denoise(latents (length, ...), timesteps (length,), frame numbers, branch)``.
        frames: frames of the clip.
        length, overlap: of the windows.
        offset: "random" moves the grid of windows in every step, by a number drawn from ``seed`` and the timestep.
        ends: "open", or "closed", where windows go round the clip's end; see ``window_frames``.
        weights: of a window's frames in the average.
        seed: of the offsets.
    """
    own = min(length, frames)  # a repeated last frame counts once, where it first stands
    of_frames = triangular_weights(length)[:own]
    if weights == "equal" and frames > length:  # one window alone needs no weights, but they round
        of_frames = np.ones_like(of_frames)

    def guided(
        latents: Latents, timesteps: np.ndarray, step: GuidanceStep
    ) -> Iterator[tuple[slice, Latents]]:
        random = None
        if offset == "random":
            # No two steps share a timestep. The last numbers set the stream apart from those of frames' noise.
            random = np.random.default_rng([seed, int(timesteps[0]), 0, 2])
        table = window_frames(frames, length, overlap, ends=ends, random=random)
        origin, factor = int(table[0, 0]), of_frames.reshape((-1,) + (1,) * (latents.ndim - 1))
        # Places are frames counted from the first window's start, on across a closed end.
        starts = ((table[:, 0] - origin) % frames).tolist()

        def given(first: int, prediction: Latents) -> Iterator[tuple[slice, Latents]]:
            """What is predicted from a place on, by frames: in two where the clip's end lies within."""
            frame = (origin + first) % frames
            before_end = frames - frame
            for start, part in ((frame, prediction[:before_end]), (0, prediction[before_end:])):
                if len(part):
                    yield slice(start, start + len(part)), part

        # Of the first places, those that the last windows come back to: they are held until then.
        held = max(0, starts[-1] + own - frames)
        held_sums = np.zeros((held, *latents.shape[1:]), np.float32)
        held_weights = np.zeros((held,) + (1,) * (latents.ndim - 1), np.float32)
        # Sums from place ``first`` on: those of earlier places are complete, and given away or held.
        first, sums, weight_sums = 0, held_sums[:0], held_weights[:0]
        for chosen, start, end in zip(table, starts, [*starts[1:], frames], strict=True):
            prediction = combine(denoise, step, latents[chosen], timesteps[chosen], chosen)
            more = start + own - first - len(sums)
            sums = np.concatenate([sums, np.zeros((more, *sums.shape[1:]), np.float32)])
            weight_sums = np.concatenate(
                [weight_sums, np.zeros((more, *weight_sums.shape[1:]), np.float32)]
            )
            sums[start - first :] += factor * prediction[:own]
            weight_sums[start - first :] += factor
            done = end - first
            keep = min(max(held - first, 0), done)
            held_sums[first : first + keep] = sums[:keep]
            held_weights[first : first + keep] = weight_sums[:keep]
            yield from given(first + keep, sums[keep:done] / weight_sums[keep:done])
            first, sums, weight_sums = end, sums[done:], weight_sums[done:]
        if held:
            # What is left are the places from the clip's number of frames on: the first ones once more.
            yield from given(0, (held_sums + sums) / (held_weights + weight_sums))

    return guided
