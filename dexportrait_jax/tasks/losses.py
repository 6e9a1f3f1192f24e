"""Losses, each a pure function of arrays, each with a value worked out by hand in the tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dexportrait_jax import geometry


def mean_absolute(
    prediction: Float[Array, "b h w c"], target: Float[Array, "b h w c"]
) -> Float[Array, ""]:
    """L1 of method.md 3.10, mean over everything."""
    return jnp.mean(jnp.abs(prediction - target))


def mean_squared(prediction: Float[Array, "b n"], target: Float[Array, "b n"]) -> Float[Array, ""]:
    """Mean squared error over everything."""
    return jnp.mean(jnp.square(prediction - target))


def masked_absolute(
    prediction: Float[Array, "b h w c"],
    target: Float[Array, "b h w c"],
    mask: Float[Array, "b h w"],
) -> Float[Array, ""]:
    """L1 where the mask (0..1) is, mean over all positions, so that its weight does not depend on the mask's area."""
    return jnp.mean(jnp.abs(prediction - target) * mask[..., None])


def gradient_absolute(
    prediction: Float[Array, "b h w c"], target: Float[Array, "b h w c"]
) -> Float[Array, ""]:
    """L1 of the differences between neighbouring pixels: edges, which plain L1 blurs."""
    error = prediction - target
    rows = jnp.mean(jnp.abs(error[:, 1:] - error[:, :-1]))
    columns = jnp.mean(jnp.abs(error[:, :, 1:] - error[:, :, :-1]))
    return rows + columns


def multiscale_absolute(
    prediction: Float[Array, "b h w c"], target: Float[Array, "b h w c"], scales: int = 3
) -> Float[Array, ""]:
    """Mean L1 over `scales` halvings of the error: structure that is off by more than a pixel."""
    error, total = prediction - target, 0.0
    for _ in range(scales):
        b, h, w, c = error.shape
        error = error.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))
        total += jnp.mean(jnp.abs(error))
    return total / scales


def generator_adversarial(fake_logits: Float[Array, " b"]) -> Float[Array, ""]:
    """Non-saturating: softplus(-D(fake)) (method.md 3.10)."""
    return jnp.mean(jax.nn.softplus(-fake_logits))


def discriminator_adversarial(
    fake_logits: Float[Array, " b"], real_logits: Float[Array, " b"]
) -> Float[Array, ""]:
    """softplus(D(fake)) + softplus(-D(real)) (method.md 3.10)."""
    return jnp.mean(jax.nn.softplus(fake_logits)) + jnp.mean(jax.nn.softplus(-real_logits))


def r1_penalty(discriminator, real: Float[Array, "b h w c"]) -> Float[Array, ""]:
    """Mean over the batch of the squared norm of dD(real)/d(real), without the factor gamma/2."""
    gradient = jax.grad(lambda images: jnp.sum(discriminator(images)))(real)
    return jnp.mean(jnp.sum(jnp.square(gradient.astype(jnp.float32)), (1, 2, 3)))


def pose_label(predicted: Float[Array, "b 3 4"], label: Float[Array, "b 3 4"]) -> Float[Array, ""]:
    """Distance of poses [sR|t]: squared Frobenius norm of R and squared error of log s and t_x, t_y.

    Fixes the gauge that relative warping leaves free (method.md 2).
    """

    def parts(pose):
        scale = jnp.cbrt(jnp.maximum(jnp.linalg.det(pose[..., :3]), 1e-9))
        return pose[..., :3] / scale[..., None, None], jnp.log(scale), pose[..., :2, 3]

    (rotation, log_scale, shift), (rotation_, log_scale_, shift_) = parts(predicted), parts(label)
    return (
        jnp.mean(jnp.sum(jnp.square(rotation - rotation_), (-2, -1)))
        + jnp.mean(jnp.square(log_scale - log_scale_))
        + jnp.mean(jnp.sum(jnp.square(shift - shift_), -1))
    )


def landmark_label(
    heat_maps: Float[Array, "b h w maps"], landmarks: Float[Array, "b points 2"]
) -> Float[Array, ""]:
    """Mean distance, per axis, of the heat maps' centres of mass from the first `maps` landmarks in [-1, 1].

    A softmax over its positions makes a map a distribution; its mean is where the network sees the
    landmark. Landmarks that the picture cuts off do not count.
    """
    _, height, width, maps = heat_maps.shape
    heat = jax.nn.softmax(heat_maps.astype(jnp.float32).reshape(-1, height * width, maps), axis=1)
    y, x = (2 * (jnp.arange(size) + 0.5) / size - 1 for size in (height, width))
    grid = jnp.stack(jnp.meshgrid(x, y), -1).reshape(-1, 2)
    # Places in bfloat16, as TPUs multiply unless told otherwise, are up to half a per cent of the picture off.
    seen = jnp.einsum("bpm,pc->bmc", heat, grid, precision=jax.lax.Precision.HIGHEST)
    wanted = landmarks[:, :maps]
    inside = jnp.all(jnp.abs(wanted) <= 1, -1, keepdims=True)
    return jnp.mean(jnp.abs(seen - wanted) * inside)


def person_leak(latents: Float[Array, "sources targets n"]) -> Float[Array, ""]:
    """Variance of the latents from person to person, mean over the latent's numbers.

    Targets of one source show one person with other expressions, targets of two sources two people. How much more
    alike the former are is the variance between people, without what chance makes of it in a small batch: 0 in the
    mean where the latent does not know the person. In the latent's units, as the invariance of two views is; a share
    of the whole variance could be lowered by adding anything else, such as the pose. Ours.
    """
    sources, targets, _ = latents.shape
    sums = jnp.sum(latents, 1)
    of_one = jnp.sum(jnp.square(sums), 0) - jnp.sum(jnp.square(latents), (0, 1))
    of_two = jnp.square(jnp.sum(sums, 0)) - jnp.sum(jnp.square(sums), 0)
    alike = of_one / (sources * targets * (targets - 1))
    other = of_two / (sources * (sources - 1) * targets**2)
    return jnp.mean(alike - other)


def pose_leak(latents: Float[Array, "b n"], poses: Float[Array, "b 3 4"]) -> Float[Array, ""]:
    """Variance of the latents that goes with where the head looks and how it leans, mean over the latent's numbers.

    Sum over the three angles of the squared covariance with the angle in units of its deviation. The square is the
    product of the covariances in the two halves of the batch, which is 0 in the mean where latent and pose have
    nothing in common; the square in one small batch never is. Only a linear relation counts. Ours.
    """
    rotation, _, _ = geometry.decompose(poses)
    angles = jnp.stack([rotation[:, 0, 2], rotation[:, 1, 2], rotation[:, 1, 0]], -1)
    angles /= jnp.sqrt(jnp.maximum(jnp.var(angles, 0), 1e-6))

    def covariance(part):
        own, seen = latents[part].astype(jnp.float32), angles[part]
        own, seen = own - jnp.mean(own, 0), seen - jnp.mean(seen, 0)
        return jnp.einsum("bn,ba->na", own, seen) / (own.shape[0] - 1)

    half = latents.shape[0] // 2
    return jnp.mean(jnp.sum(covariance(slice(half)) * covariance(slice(half, None)), -1))


def decaying_weight(
    step: Float[Array, ""] | int, initial: float, floor: float, decay_steps: int
) -> Float[Array, ""]:
    """Linear from `initial` to `floor` over `decay_steps`, then the floor."""
    left = jnp.clip(1.0 - jnp.asarray(step, jnp.float32) / max(decay_steps, 1), 0.0, 1.0)
    return floor + (initial - floor) * left


def kullback_leibler(
    mean: Float[Array, "b h w c"], log_variance: Float[Array, "b h w c"]
) -> Float[Array, ""]:
    """KL divergence of N(mean, exp(log_variance)) from N(0, 1), mean over all latent values."""
    return 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance)


def denoising_error(
    prediction: Float[Array, "b h w c"],
    target: Float[Array, "b h w c"],
    weights: Float[Array, " b"] | None = None,
    places: Float[Array, "b h w"] | None = None,
) -> Float[Array, ""]:
    """Mean squared error, each sample times its weight (min-SNR, say), and each place of it; method.md 4.7."""
    squares = jnp.square(prediction.astype(jnp.float32) - target)
    if places is not None:
        squares = squares * places[..., None]
    each = jnp.mean(squares, (1, 2, 3))
    return jnp.mean(each if weights is None else each * weights)


def gradient_norms(
    terms: Callable[[Any], Mapping[str, tuple[Any, Array]]], activations: Any
) -> dict[str, Array]:
    """gradient_norm/NAME of every (weight, value) of ``terms(activations)``: of weight times value, by the activations.

    What each loss asks of the picture, or of poses and latents, is what weights have to balance; the parameters' own
    gradients would need a backward pass through all networks for every term.
    """
    activations = jax.lax.stop_gradient(activations)

    def weighted(activations, name):
        weight, value = terms(activations)[name]
        return weight * value

    return {
        f"gradient_norm/{name}": optax.tree.norm(jax.grad(weighted)(activations, name))
        for name in jax.eval_shape(terms, activations)
    }
