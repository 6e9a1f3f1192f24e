"""The layers of StyleGAN2 (Karras et al. 2020), channels last.

They follow the published definition: equalised learning rate, modulated convolution with
demodulation, blur [1, 3, 3, 1] on every change of resolution, leaky ReLU with gain sqrt 2. Parameter
names are those of the usual PyTorch port (conv, modulation, activate); its kernels carry a leading 1 and
its blur filters are buffers.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from dexportrait_jax.models.convolution import convolve

_normal = nnx.initializers.normal(1.0)
_FILTER = (0.125, 0.375, 0.375, 0.125)


def leaky_relu(inputs: Float[Array, ...]) -> Float[Array, ...]:
    """max(x, 0.2 x) * sqrt 2."""
    return jnp.where(inputs > 0, inputs, 0.2 * inputs) * 2**0.5


class FusedLeakyReLU(nnx.Module):
    """Bias, then ``leaky_relu``."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(self, inputs: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        return leaky_relu(inputs + self.bias[...].astype(inputs.dtype))


class EqualLinear(nnx.Module):
    """Linear layer with weights of unit variance, scaled by 1 / sqrt(in) when they are used.

    What it is asked to compute in float32 is float32 on TPUs too, which would multiply it in one pass of bfloat16.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: float = 0.0,
        activate: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.activate, self.dtype = activate, dtype
        self.kernel = nnx.Param(_normal(rngs.params(), (in_features, out_features), jnp.float32))
        self.bias = nnx.Param(jnp.full(out_features, bias))

    def __call__(self, inputs: Float[Array, "b in"]) -> Float[Array, "b out"]:
        kernel = self.kernel[...] / self.kernel.shape[0] ** 0.5
        precision = lax.Precision.HIGHEST if jnp.dtype(self.dtype) == jnp.float32 else None
        output = jnp.matmul(
            inputs.astype(self.dtype), kernel.astype(self.dtype), precision=precision
        )
        output = output + self.bias[...].astype(self.dtype)
        return leaky_relu(output) if self.activate else output


class EqualConv(nnx.Module):
    """Convolution with weights of unit variance, scaled by 1 / sqrt(in k^2); stride 2 blurs first."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        size: int,
        *,
        halve: bool = False,
        use_bias: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.halve, self.dtype = halve, dtype
        shape = (size, size, in_features, out_features)
        self.kernel = nnx.Param(_normal(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(out_features)) if use_bias else None

    def __call__(self, inputs: Float[Array, "b h w in"]) -> Float[Array, "b h2 w2 out"]:
        change = "down" if self.halve else "same"
        output = convolve_changing(inputs.astype(self.dtype), self.scaled_kernel(), change)
        return output if self.bias is None else output + self.bias[...].astype(self.dtype)

    def scaled_kernel(self) -> Float[Array, "k k in out"]:
        """The kernel as it is used."""
        size, _, in_features, _ = self.kernel.shape
        return (self.kernel[...] / (in_features * size**2) ** 0.5).astype(self.dtype)


class ModulatedConv(nnx.Module):
    """Convolution whose kernel is scaled by the style on its inputs and normalised on its outputs.

    ``change`` is "same", "up" (transposed, then blurred) or "down" (blurred, then strided). Scaling the
    inputs and dividing the outputs is the same sum as a kernel for each sample, at the cost of one. The
    style's scales and the demodulation are computed in float32.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        size: int,
        style_features: int,
        *,
        demodulate: bool = True,
        change: str = "same",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.demodulate, self.change, self.dtype = demodulate, change, dtype
        shape = (size, size, in_features, out_features)
        self.kernel = nnx.Param(_normal(rngs.params(), shape, jnp.float32))
        self.modulation = EqualLinear(style_features, in_features, bias=1.0, rngs=rngs)

    def __call__(
        self, inputs: Float[Array, "b h w in"], style: Float[Array, "b style"]
    ) -> Float[Array, "b h2 w2 out"]:
        size, _, in_features, _ = self.kernel.shape
        kernel = self.kernel[...] / (in_features * size**2) ** 0.5
        scales = self.modulation(style.astype(jnp.float32))
        inputs = inputs.astype(self.dtype)
        if size == 1:  # a matrix for each sample is smaller than the scaled inputs
            matrices = scales[:, :, None] * kernel[0, 0]
            output = jnp.einsum("bhwi,bio->bhwo", inputs, matrices.astype(self.dtype))
        else:
            scaled = inputs * scales[:, None, None].astype(self.dtype)
            output = convolve_changing(scaled, kernel.astype(self.dtype), self.change)
        if self.demodulate:
            squares = jnp.matmul(
                jnp.square(scales),
                jnp.square(kernel).sum(axis=(0, 1)),
                precision=lax.Precision.HIGHEST,
            )
            output = output * lax.rsqrt(squares + 1e-8)[:, None, None].astype(self.dtype)
        return output


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def blur(inputs: Float[Array, "b h w c"], low: int, high: int) -> Float[Array, "b h2 w2 c"]:
    """Filter [1, 3, 3, 1] / 8 along height and width after padding with zeros: h + low + high - 3."""
    for axis in (1, 2):
        pads = [(0, 0)] * 4
        pads[axis] = (low, high)
        padded = jnp.pad(inputs, pads)
        count = padded.shape[axis] - 3
        taps = [lax.slice_in_dim(padded, k, k + count, axis=axis) for k in range(4)]
        inputs = (taps[0] + taps[3]) * _FILTER[0] + (taps[1] + taps[2]) * _FILTER[1]
    return inputs


def _blur_forward(inputs: Array, low: int, high: int) -> tuple[Array, None]:
    return blur(inputs, low, high), None


def _blur_backward(low: int, high: int, _: None, gradient: Array) -> tuple[Array]:
    # The filter is its own mirror image, so the transpose is a blur with the complementary margins.
    return (blur(gradient, 3 - low, 3 - high),)


blur.defvjp(_blur_forward, _blur_backward)


def upsample(inputs: Float[Array, "b h w c"]) -> Float[Array, "b 2h 2w c"]:
    """Zeros put in between and filtered with [1, 3, 3, 1] / 4: weights 3/4 and 1/4, zero outside."""
    for axis in (1, 2):
        pads = [(0, 0)] * 4
        pads[axis] = (1, 1)
        padded = jnp.pad(inputs, pads)
        count = inputs.shape[axis]
        before, after = (lax.slice_in_dim(padded, k, k + count, axis=axis) for k in (0, 2))
        pair = [0.75 * inputs + 0.25 * before, 0.75 * inputs + 0.25 * after]
        shape = list(inputs.shape)
        shape[axis] *= 2
        inputs = jnp.stack(pair, axis=axis + 1).reshape(shape)
    return inputs


def convolve_changing(
    inputs: Float[Array, "b h w in"], kernel: Float[Array, "k k in out"], change: str
) -> Float[Array, "b h2 w2 out"]:
    """StyleGAN2's three convolutions: "same", "down" (halving) and "up" (doubling, 3x3 only)."""
    apply = {"same": _convolve_same, "up": _convolve_doubling, "down": _convolve_halving}
    return apply[change](inputs, kernel)


def _convolve_same(inputs: Array, kernel: Array) -> Array:
    margin = kernel.shape[0] // 2
    return convolve(inputs, kernel, (1, 1), ((margin, margin),) * 2)


def _convolve_halving(inputs: Array, kernel: Array) -> Array:
    """Blur, then a convolution of stride 2 without padding."""
    margin = (kernel.shape[0] + 1) // 2
    return convolve(blur(inputs, margin, margin), kernel, (2, 2), ((0, 0), (0, 0)))


def _convolve_doubling(inputs: Array, kernel: Array) -> Array:
    """Transposed 3x3 convolution of stride 2, then a blur of gain 4.

    Even outputs of the transposed convolution are sums of two inputs, odd ones of one: four small
    convolutions with 2x2 windows, done as one and interleaved. The last odd output is an extra zero.
    """
    features = kernel.shape[-1]
    # Window (r, c) of phase (y, x) holds kernel row (2, 0) for y = 0 and (none, 1) for y = 1; the same
    # for columns.
    rows = jnp.stack([kernel[::-2], jnp.stack([jnp.zeros_like(kernel[1]), kernel[1]])])
    empty = jnp.zeros_like(rows[:, :, 1])
    columns = [rows[:, :, ::-2], jnp.stack([empty, rows[:, :, 1]], axis=2)]
    phases = jnp.stack(columns)  # (x, y, r, c, in, out)
    phases = phases.transpose(2, 3, 4, 1, 0, 5).reshape(2, 2, -1, 4 * features)
    output = convolve(inputs, phases, (1, 1), ((1, 1), (1, 1)))
    batch, height, width, _ = output.shape
    output = output.reshape(batch, height, width, 2, 2, features).transpose(0, 1, 3, 2, 4, 5)
    return 4 * blur(output.reshape(batch, 2 * height, 2 * width, features), 1, 0)
