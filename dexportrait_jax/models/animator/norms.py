"""GroupNorm and LayerNorm with written-out gradients: the same numbers as PyTorch's with far fewer operations.

A UNet has a hundred of them; derived automatically they are a third of the time it takes to compile the
training step. Statistics are float32 and centred before they are squared.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float


class GroupNorm(nnx.Module):
    """Normalisation over all space and the channels of a group.

    Raises:
        ValueError: groups that do not divide the channels.
    """

    def __init__(
        self,
        channels: int,
        groups: int,
        *,
        epsilon: float,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        del rngs  # starts at one and zero; the argument keeps the layers' signatures alike
        if channels % groups:
            raise ValueError(f"{channels} channels do not divide into {groups} GroupNorm groups")
        self.groups, self.epsilon, self.dtype = groups, epsilon, dtype
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, hidden: Float[Array, "batch *space c"]) -> Float[Array, "batch *space c"]:
        points = hidden.reshape(hidden.shape[0], -1, hidden.shape[-1]).astype(jnp.float32)
        normed = _group_norm(points, self.scale[...], self.bias[...], self.groups, self.epsilon)
        return normed.astype(self.dtype).reshape(hidden.shape)


class LayerNorm(nnx.Module):
    """Normalisation over the channels, with PyTorch's epsilon."""

    def __init__(
        self,
        channels: int,
        *,
        epsilon: float = 1e-5,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        del rngs
        self.epsilon, self.dtype = epsilon, dtype
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, hidden: Float[Array, "... c"]) -> Float[Array, "... c"]:
        hidden = hidden.astype(jnp.float32)
        normed = _layer_norm(hidden, self.scale[...], self.bias[...], self.epsilon)
        return normed.astype(self.dtype)


def _group_mean(
    sums: Float[Array, "batch c"], groups: int, points: int
) -> Float[Array, "batch 1 c"]:
    """Sums per channel -> means per group, one for each of its channels."""
    batch, channels = sums.shape
    members = channels // groups
    means = jnp.sum(sums.reshape(batch, groups, members), axis=-1) / (points * members)
    wide = jnp.broadcast_to(means[:, :, None], (batch, groups, members))
    return wide.reshape(batch, 1, channels)


def _group_norm_forward(points: Array, scale: Array, bias: Array, groups: int, epsilon: float):
    count = points.shape[1]
    mean = _group_mean(jnp.sum(points, axis=1), groups, count)
    variance = _group_mean(jnp.sum((points - mean) ** 2, axis=1), groups, count)
    inverse = lax.rsqrt(variance + epsilon)
    normed = (points - mean) * (inverse * scale) + bias
    return normed, (points, mean, inverse, scale)


def _group_norm_backward(groups: int, epsilon: float, kept, gradient: Array):
    points, mean, inverse, scale = kept
    count = points.shape[1]
    centred = points - mean
    of_sum = jnp.sum(gradient, axis=1)
    of_product = jnp.sum(gradient * centred, axis=1)
    shift = _group_mean(scale * of_sum, groups, count)
    slope = _group_mean(scale * of_product, groups, count) * inverse**2
    of_points = inverse * (scale * gradient - shift - centred * slope)
    return of_points, jnp.sum(of_product * inverse[:, 0], axis=0), jnp.sum(of_sum, axis=0)


def _layer_norm_forward(tokens: Array, scale: Array, bias: Array, epsilon: float):
    channels = tokens.shape[-1]
    mean = jnp.sum(tokens, axis=-1, keepdims=True) / channels
    centred = tokens - mean
    variance = jnp.sum(centred**2, axis=-1, keepdims=True) / channels
    inverse = lax.rsqrt(variance + epsilon)
    normed = centred * inverse
    return normed * scale + bias, (normed, inverse, scale)


def _layer_norm_backward(epsilon: float, kept, gradient: Array):
    normed, inverse, scale = kept
    channels, leading = normed.shape[-1], tuple(range(normed.ndim - 1))
    scaled = gradient * scale
    shift = jnp.sum(scaled, axis=-1, keepdims=True) / channels
    slope = jnp.sum(scaled * normed, axis=-1, keepdims=True) / channels
    of_tokens = inverse * (scaled - shift - normed * slope)
    return of_tokens, jnp.sum(gradient * normed, axis=leading), jnp.sum(gradient, axis=leading)


def _group_norm_value(
    points: Array, scale: Array, bias: Array, groups: int, epsilon: float
) -> Array:
    return _group_norm_forward(points, scale, bias, groups, epsilon)[0]


def _layer_norm_value(tokens: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    return _layer_norm_forward(tokens, scale, bias, epsilon)[0]


_group_norm = jax.custom_vjp(_group_norm_value, nondiff_argnums=(3, 4))
_group_norm.defvjp(_group_norm_forward, _group_norm_backward)
_layer_norm = jax.custom_vjp(_layer_norm_value, nondiff_argnums=(3,))
_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)
