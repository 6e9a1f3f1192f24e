"""Layers that several networks share."""

from __future__ import annotations

from flax import nnx


class Conv(nnx.Conv):
    """Convolution over any number of spatial dimensions, channels last.

    ``padding`` is "SAME", "VALID" or an integer (symmetric, as in PyTorch).
    """
