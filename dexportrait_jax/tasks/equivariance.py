"""Known 2D similarities of pictures, under which a pose encoder's answer is known too (method.md 3.12, last line)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float

from dexportrait_jax import geometry


def draw_similarities(
    key: Array, count: int, ranges: Mapping[str, Any]
) -> Float[Array, "count 3 4"]:
    """Similarities [s R_z | t] in crop coordinates, drawn as the augmentation S1 draws its own.

    Args:
      key: of `jax.random`.
      count: how many.
      ranges: `config.data.augment.similarity`: roll in degrees, scale from and to, shift in sides of the picture.
    """
    keys = jax.random.split(key, 3)
    roll = ranges["roll"] * jax.random.uniform(keys[0], (count,), minval=-1)
    low, high = (jnp.log(bound) for bound in ranges["scale"])
    scale = jnp.exp(jax.random.uniform(keys[1], (count,), minval=low, maxval=high))
    # A side is 2 long in crop coordinates.
    shift = 2 * ranges["shift"] * jax.random.uniform(keys[2], (count, 2), minval=-1)
    rotation = geometry.euler_to_rotation(jnp.zeros(count), jnp.zeros(count), roll)
    return geometry.pose_matrix(rotation, jnp.pad(shift, ((0, 0), (0, 1))), scale)


def move_pictures(
    pictures: Float[Array, "b h w c"], similarities: Float[Array, "b 3 4"]
) -> Float[Array, "b h w c"]:
    """Every picture under its similarity: what was at p is at s R p + t; bilinear, mirrored at the border.

    The head pose P of the picture becomes `geometry.compose(similarity, P)`.
    """
    _, height, width, _ = pictures.shape
    y, x = (2 * (jnp.arange(size) + 0.5) / size - 1 for size in (height, width))
    # Written out: a matrix product would be rounded on accelerators, by more than a pixel.
    back = geometry.invert(similarities)[:, :2, :, None, None]
    at_x, at_y = (
        back[:, row, 0] * x + back[:, row, 1] * y[:, None] + back[:, row, 3] for row in (0, 1)
    )
    places = ((at_y + 1) * height / 2 - 0.5, (at_x + 1) * width / 2 - 0.5)

    def read(channel, rows, columns):
        return map_coordinates(channel, [rows, columns], order=1, mode="mirror")

    of_channels = jax.vmap(read, (-1, None, None), -1)
    return jax.vmap(of_channels)(pictures, *places)
