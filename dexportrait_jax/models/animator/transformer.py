"""The spatial transformer of SD1.5 with the places where the animator's conditions enter.

Order inside a block (method.md 4.3): self-attention with the reference tokens, warped reference residual, attention
to an outer context (attn2, optional), expression attention, feed-forward; ``ExpressionPlace`` names the others. With
no condition given it is diffusers' ``Transformer2DModel`` with one ``BasicTransformerBlock``.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import flax.struct
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dexportrait_jax.models.animator.blocks import FeedForward
from dexportrait_jax.models.animator.norms import GroupNorm, LayerNorm
from dexportrait_jax.models.attention import Attention, Backend
from dexportrait_jax.models.layers import Conv

ExpressionInjector = Literal["in_block", "xnemo"]
ExpressionPlace = Literal["before_feed_forward", "after_feed_forward", "before_text"]


@dataclasses.dataclass(frozen=True)
class TransformerOptions:
    """What the transformer blocks of one UNet are made of.

    Attributes:
        heads: attention heads at every width.
        cross_attention_features: channels of the outer context; None leaves attn2 out.
        expression_features: channels of an expression token; None leaves the expression branch out.
        expression_injector: "in_block" adds one cross-attention to every transformer block,
            "xnemo" a transformer of its own after every (ResNet, attention) pair.
        expression_heads: heads of the expression attention; None means ``heads``.
        expression_place: where the attention of "in_block" stands: right before the feed-forward or right after it,
            or before attn2, where it is as before the feed-forward if there is no attn2.
        warp_kernel: kernel of the convolution on the warped reference, 3 or 1; 0 leaves it out.
        backend: attention backend.
    """

    heads: int = 8
    cross_attention_features: int | None = 768
    expression_features: int | None = None
    expression_injector: ExpressionInjector = "in_block"
    expression_heads: int | None = None
    expression_place: ExpressionPlace = "before_feed_forward"
    warp_kernel: int = 0
    backend: Backend = "auto"


@flax.struct.dataclass
class BlockInputs:
    """What every block of a UNet is told besides the hidden state.

    Attributes:
        context: (B, n, features) tokens for attn2.
        expression: (B, n, features) expression tokens.
        reference_keep: (B,) whether the reference keys take part; None means yes.
        residual_keep: (B,) 0/1 factor of the warped residual; None means 1.
    """

    context: Array | None = None
    expression: Array | None = None
    reference_keep: Array | None = None
    residual_keep: Array | None = None


@flax.struct.dataclass
class BlockReference:
    """What one block reads from the reference UNet; either side of each pair may be given.

    Attributes:
        tokens: (S, h, w, c) features of the source, or ``keys_values`` projected from them.
        keys_values: two arrays (S, h*w, c).
        warped: (B, h, w, c) features moved to the driving pose, or ``residual`` convolved from them.
        residual: (B, h, w, c).
        token_keep: (S, h*w) 0/1, tokens left out of the attention (random masking); None keeps all.
    """

    tokens: Array | None = None
    keys_values: tuple[Array, Array] | None = None
    warped: Array | None = None
    residual: Array | None = None
    token_keep: Array | None = None


class TransformerBlock(nnx.Module):
    """diffusers' ``BasicTransformerBlock`` with warped reference and expression attention."""

    def __init__(
        self, features: int, options: TransformerOptions, *, dtype=jnp.float32, rngs: nnx.Rngs
    ):
        if options.expression_place not in get_args(ExpressionPlace):
            raise ValueError(
                f"expression place {options.expression_place!r} is none of {', '.join(get_args(ExpressionPlace))}"
            )
        build = {"dtype": dtype, "rngs": rngs}
        heads, backend = options.heads, options.backend
        self.expression_place = options.expression_place
        self.norm1 = LayerNorm(features, **build)
        self.attn1 = Attention(features, heads, backend=backend, **build)
        if options.warp_kernel == 0:
            self.warp_projection = None
        else:
            self.warp_projection = Conv(
                features,
                features,
                (options.warp_kernel, options.warp_kernel),
                padding=options.warp_kernel // 2,
                kernel_init=nnx.initializers.zeros,
                **build,
            )
        if options.cross_attention_features is None:
            self.norm2 = self.attn2 = None
        else:
            self.norm2 = LayerNorm(features, **build)
            self.attn2 = Attention(
                features,
                heads,
                context_features=options.cross_attention_features,
                backend=backend,
                **build,
            )
        if options.expression_features is None or options.expression_injector != "in_block":
            self.norm_expression = self.attn_expression = None
        else:
            self.norm_expression = LayerNorm(features, **build)
            self.attn_expression = Attention(
                features,
                options.expression_heads or heads,
                context_features=options.expression_features,
                zero_output=True,
                backend=backend,
                **build,
            )
        self.norm3 = LayerNorm(features, **build)
        self.ff = FeedForward(features, **build)

    def __call__(
        self,
        hidden: Float[Array, "batch h w c"],
        inputs: BlockInputs,
        reference: BlockReference | None = None,
    ) -> tuple[Float[Array, "batch h w c"], Float[Array, "batch h w c"]]:
        """Returns the new hidden state and norm1 of the old one (what a reference bank keeps)."""
        grid = hidden.shape
        hidden = hidden.reshape(grid[0], -1, grid[-1])
        normed = self.norm1(hidden)
        hidden = hidden + self._self_attention(normed, inputs, reference)
        if reference is not None:
            residual = self.warped_residual(reference, inputs.residual_keep)
            if residual is not None:
                hidden = hidden + residual.reshape(hidden.shape).astype(hidden.dtype)
        hidden = self._expression("before_text", hidden, inputs)
        if self.attn2 is not None:
            hidden = hidden + self.attn2(self.norm2(hidden), inputs.context)
        hidden = self._expression("before_feed_forward", hidden, inputs)
        hidden = hidden + self.ff(self.norm3(hidden))
        hidden = self._expression("after_feed_forward", hidden, inputs)
        return hidden.reshape(grid), normed.reshape(grid)

    def reference_keys_values(self, tokens: Float[Array, "sources h w c"]) -> tuple[Array, Array]:
        """Keys and values of the reference tokens; they depend on neither timestep nor target."""
        return self.attn1.keys_values(tokens.reshape(tokens.shape[0], -1, tokens.shape[-1]))

    def warped_residual(
        self, reference: BlockReference, keep: Float[Array, " batch"] | None = None
    ) -> Float[Array, "batch h w c"] | None:
        """The convolved warped reference, zero where ``keep`` is 0; None if there is none."""
        residual = reference.residual
        if residual is None and reference.warped is not None and self.warp_projection is not None:
            residual = self.warp_projection(reference.warped)
        if residual is None or keep is None:
            return residual
        return residual * keep[:, None, None, None].astype(residual.dtype)

    def _expression(self, place: ExpressionPlace, hidden: Array, inputs: BlockInputs) -> Array:
        """The expression attention added, where this is its place."""
        if self.attn_expression is None or self.expression_place != place:
            return hidden
        return hidden + self.attn_expression(self.norm_expression(hidden), inputs.expression)

    def _self_attention(
        self, normed: Array, inputs: BlockInputs, reference: BlockReference | None
    ) -> Array:
        if reference is None or (reference.tokens is None and reference.keys_values is None):
            return self.attn1(normed)
        extra = reference.keys_values
        if extra is None:
            extra = self.reference_keys_values(reference.tokens)
        keep = _key_keep(inputs.reference_keep, reference.token_keep, normed.shape[0])
        return self.attn1(normed, extra=extra, extra_keep=keep)


def _key_keep(
    sample_keep: Array | None, token_keep: Array | None, batch: int
) -> Bool[Array, "batch keys"] | Bool[Array, " batch"] | None:
    """Which reference keys take part: where no single ones are left out, whether they do (more backends take that)."""
    of_samples = None if sample_keep is None else sample_keep > 0.5
    if token_keep is None:
        return of_samples
    keep = jnp.repeat(token_keep > 0.5, batch // token_keep.shape[0], axis=0)
    return keep if of_samples is None else keep & of_samples[:, None]


class Transformer2D(nnx.Module):
    """GroupNorm, 1x1 convolution, one transformer block, 1x1 convolution, residual."""

    def __init__(
        self,
        features: int,
        options: TransformerOptions,
        *,
        groups: int = 32,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = {"dtype": dtype, "rngs": rngs}
        self.norm = GroupNorm(features, groups, epsilon=1e-6, **build)
        self.proj_in = Conv(features, features, (1, 1), **build)
        self.transformer_blocks = nnx.List([TransformerBlock(features, options, **build)])
        self.proj_out = Conv(features, features, (1, 1), **build)

    def __call__(
        self,
        hidden: Float[Array, "batch h w c"],
        inputs: BlockInputs,
        reference: BlockReference | None = None,
    ) -> tuple[Float[Array, "batch h w c"], Float[Array, "batch h w c"]]:
        """Returns the new hidden state and the bank entry of the block inside."""
        inner = self.proj_in(self.norm(hidden))
        inner, bank = self.transformer_blocks[0](inner, inputs, reference)
        return hidden + self.proj_out(inner), bank


class ExpressionTransformer(nnx.Module):
    """X-NeMo's injector: a zero-initialised transformer that reads the expression tokens twice.

    GroupNorm, linear in, two times (LayerNorm, cross-attention), LayerNorm, GEGLU feed-forward,
    linear out starting at zero, residual (method.md 4.4).
    """

    def __init__(
        self,
        features: int,
        options: TransformerOptions,
        *,
        groups: int = 32,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = {"dtype": dtype, "rngs": rngs}
        cross = {"context_features": options.expression_features, "backend": options.backend}
        heads = options.expression_heads or options.heads
        zeros = nnx.initializers.zeros
        self.norm = GroupNorm(features, groups, epsilon=1e-6, **build)
        self.proj_in = nnx.Linear(features, features, **build)
        self.norms = nnx.List([LayerNorm(features, **build) for _ in range(2)])
        self.attentions = nnx.List([Attention(features, heads, **cross, **build) for _ in range(2)])
        self.norm3 = LayerNorm(features, **build)
        self.ff = FeedForward(features, **build)
        self.proj_out = nnx.Linear(features, features, kernel_init=zeros, **build)

    def __call__(
        self, hidden: Float[Array, "batch h w c"], expression: Float[Array, "batch n features"]
    ) -> Float[Array, "batch h w c"]:
        grid = hidden.shape
        inner = self.proj_in(self.norm(hidden).reshape(grid[0], -1, grid[-1]))
        for norm, attend in zip(self.norms, self.attentions, strict=True):
            inner = inner + attend(norm(inner), expression)
        inner = inner + self.ff(self.norm3(inner))
        return hidden + self.proj_out(inner).reshape(grid)
