"""StyleGAN2's discriminator (method.md 3.9), with the names of the usual PyTorch port."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dexportrait_jax.models.motion.stylegan import EqualConv, EqualLinear, FusedLeakyReLU
from dexportrait_jax.models.rematerialisation import Remat, rematerialised


def _layer(
    in_features: int, out_features: int, size: int, *, halve: bool = False, **build
) -> nnx.Dict:
    """Convolution and activation, numbered as in the port, where place 0 of a halving one blurs."""
    first = int(halve)
    conv = EqualConv(in_features, out_features, size, halve=halve, **build)
    activation = FusedLeakyReLU(out_features, rngs=build["rngs"])
    return nnx.Dict({str(first): conv, str(first + 1): activation})


def _run(layer: nnx.Dict, inputs: Array) -> Array:
    for key in sorted(layer):
        inputs = layer[key](inputs)
    return inputs


class DiscriminatorBlock(nnx.Module):
    """Two 3x3 convolutions, the second halving, and a halving 1x1 shortcut."""

    def __init__(self, in_features: int, out_features: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        build = {"dtype": dtype, "rngs": rngs}
        self.conv1 = _layer(in_features, in_features, 3, **build)
        self.conv2 = _layer(in_features, out_features, 3, halve=True, **build)
        self.skip = nnx.Dict({"1": EqualConv(in_features, out_features, 1, halve=True, **build)})

    def __call__(self, inputs: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        hidden = _run(self.conv2, _run(self.conv1, inputs))
        return (hidden + _run(self.skip, inputs)) * 0.5**0.5


class Discriminator(nnx.Module):
    """Image (B, S, S, 3) in [-1, 1] -> logits (B,) float32, large for real images.

    ``widths``: features at S, S/2, ... down to 4; there must be log2(S) - 1 of them. ``head_features``:
    width of the last convolution and of the hidden linear layer (default: the last of ``widths``). ``remat``: what
    the backward pass keeps of a block, a name of ``rematerialisation``.
    """

    def __init__(
        self,
        *,
        image_size: int = 256,
        widths: Sequence[int] = (128, 256, 512, 512, 512, 512, 512),
        head_features: int | None = None,
        group: int = 4,
        remat: Remat = "none",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if 4 * 2 ** (len(widths) - 1) != image_size:
            raise ValueError(
                f"{len(widths)} widths lead from 4 to {4 * 2 ** (len(widths) - 1)} pixels, "
                f"not to image_size {image_size}"
            )
        build = {"dtype": dtype, "rngs": rngs}
        self.group, self.remat = group, remat
        blocks = [_layer(3, widths[0], 1, **build)]
        pairs = zip(widths[:-1], widths[1:], strict=True)
        blocks += [DiscriminatorBlock(a, b, **build) for a, b in pairs]
        self.convs = nnx.List(blocks)
        head = head_features or widths[-1]
        self.final_conv = _layer(widths[-1] + 1, head, 3, **build)
        self.final_linear = nnx.List(
            [
                EqualLinear(head * 16, head, activate=True, dtype=dtype, rngs=rngs),
                EqualLinear(head, 1, rngs=rngs),
            ]
        )

    def __call__(self, image: Float[Array, "b s s 3"]) -> Float[Array, " b"]:
        hidden = _run(self.convs[0], image)
        for block in list(self.convs)[1:]:
            hidden = rematerialised(block, self.remat)(hidden)
        hidden = _run(self.final_conv, _with_deviation(hidden, self.group))
        # Features before positions, as PyTorch flattens, so that exported weights mean the same.
        hidden = hidden.transpose(0, 3, 1, 2).reshape(hidden.shape[0], -1)
        for layer in self.final_linear:
            hidden = layer(hidden)
        return hidden[:, 0].astype(jnp.float32)


def _with_deviation(inputs: Float[Array, "b h w c"], group: int) -> Float[Array, "b h w c1"]:
    """Adds a feature: the deviation inside groups of samples, averaged over all else.

    Sample i is in one group with i + B/g, i + 2B/g, ...; g is the largest divisor of B up to ``group``.
    """
    batch, height, width, _ = inputs.shape
    group = max(n for n in range(1, group + 1) if batch % n == 0)
    grouped = inputs.astype(jnp.float32).reshape(group, batch // group, height, width, -1)
    deviation = jnp.sqrt(grouped.var(axis=0) + 1e-8).mean(axis=(1, 2, 3))
    deviation = jnp.tile(deviation, group)[:, None, None, None].astype(inputs.dtype)
    column = jnp.broadcast_to(deviation, (batch, height, width, 1))
    return jnp.concatenate([inputs, column], axis=-1)
