"""Layers that several networks share: convolution and normalisation, channels last.

How a convolution is computed is decided in ``convolution``; its ``convolution_backend`` and
``convolve`` are also reached from here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from dexportrait_jax.models.convolution import convolution_backend, convolve

__all__ = ["Conv", "GroupNorm", "Normalisation", "convolution_backend", "convolve", "normalisation"]

Normalisation = Literal["group", "instance", "layer"]

_lecun_normal = nnx.initializers.lecun_normal()


class Conv(nnx.Module):
    """Convolution over any number of spatial dimensions, channels last.

    ``padding`` is "SAME", "VALID" or an integer (symmetric, as in PyTorch); ``strides`` an integer
    or one for each dimension. Kernel (*window, in / groups, out). Computes in ``dtype``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int],
        *,
        strides: int | Sequence[int] = 1,
        padding: str | int = "SAME",
        use_bias: bool = True,
        groups: int = 1,
        kernel_init: nnx.Initializer = _lecun_normal,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        window = tuple(kernel_size)
        self.strides = (strides,) * len(window) if isinstance(strides, int) else tuple(strides)
        self.padding, self.groups, self.dtype = padding, groups, dtype
        shape = (*window, in_features // groups, out_features)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(out_features)) if use_bias else None

    def __call__(
        self, inputs: Float[Array, "batch *space features_in"]
    ) -> Float[Array, "batch *space_out features_out"]:
        kernel = self.kernel[...].astype(self.dtype)
        window = kernel.shape[:-2]
        if isinstance(self.padding, int):
            pads = ((self.padding, self.padding),) * len(window)
        else:
            pads = tuple(
                lax.padtype_to_pads(inputs.shape[1:-1], window, self.strides, self.padding)
            )
        output = convolve(inputs.astype(self.dtype), kernel, self.strides, pads, self.groups)
        return output if self.bias is None else output + self.bias[...].astype(self.dtype)


class GroupNorm(nnx.Module):
    """Group normalisation over all spatial dimensions, equal to PyTorch's; statistics in float32.

    The mean is taken out before the squares are summed, which costs one more pass than the usual
    E[x^2] - E[x]^2 and loses no digits where the mean is large. About twice as fast as
    ``nnx.GroupNorm`` on a CPU.
    """

    def __init__(
        self,
        features: int,
        groups: int = 32,
        *,
        epsilon: float = 1e-5,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if features % groups:
            raise ValueError(f"{features} features cannot be split into {groups} groups")
        self.groups, self.epsilon, self.dtype = groups, epsilon, dtype
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(
        self, inputs: Float[Array, "batch *space features"]
    ) -> Float[Array, "batch *space features"]:
        batch, *space, features = inputs.shape
        inputs = inputs.astype(jnp.float32)
        over_space = tuple(range(1, inputs.ndim - 1))
        count = int(np.prod(space)) * features // self.groups

        def group_mean(values: Array) -> Array:
            sums = jnp.sum(values, axis=over_space).reshape(batch, self.groups, -1).sum(axis=-1)
            means = jnp.repeat(sums / count, features // self.groups, axis=-1)
            return means.reshape(batch, *(1 for _ in space), features)

        centred = inputs - group_mean(inputs)
        scale = lax.rsqrt(group_mean(jnp.square(centred)) + self.epsilon) * self.scale[...]
        return (centred * scale + self.bias[...]).astype(self.dtype)


def normalisation(
    kind: Normalisation, features: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
) -> GroupNorm:
    """The layer that stands where the published networks have BatchNorm (method.md 3.2).

    "group": at most 32 groups of at least 4 features; "instance": each feature by itself; "layer": all
    features together. None of them needs statistics of a batch, so training equals inference.
    """
    groups = {
        "group": math.gcd(features, min(32, max(1, features // 4))),
        "instance": features,
        "layer": 1,
    }
    if kind not in groups:
        raise ValueError(f"normalisation {kind!r} is none of {', '.join(groups)}")
    return GroupNorm(features, groups[kind], dtype=dtype, rngs=rngs)
