"""The SD1.5 UNet, equal to diffusers' ``UNet2DConditionModel``, with room for the animator's branches.

The plain network is called with latents, timesteps and a context. The reference UNet and the denoiser use
``forward``, which also takes what the branches read and gives back what a reference bank keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dexportrait_jax.models.animator.blocks import (
    Downsample,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    timestep_features,
)
from dexportrait_jax.models.animator.norms import GroupNorm
from dexportrait_jax.models.animator.transformer import (
    BlockInputs,
    BlockReference,
    ExpressionTransformer,
    Transformer2D,
    TransformerOptions,
)
from dexportrait_jax.models.layers import Conv
from dexportrait_jax.models.rematerialisation import Remat, rematerialised

Bank = dict[str, Array]

SD15_OPTIONS = TransformerOptions()


class Temporal(Protocol):
    """What a UNet asks of the temporal modules: the module that follows a unit, by its path."""

    def apply(self, path: str, hidden: Array, frames: int) -> Array: ...


class UNetBlock(nnx.Module):
    """A level of the UNet (or its middle): ResNet blocks, transformers, one change of resolution."""

    def __init__(
        self,
        resnet_channels: Sequence[tuple[int, int]],
        transformers: int,
        options: TransformerOptions,
        *,
        time_features: int,
        groups: int,
        change: str | None,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        build = {"groups": groups, "dtype": dtype, "rngs": rngs}
        channels = resnet_channels[-1][1]
        self.resnets = nnx.List(
            [
                ResnetBlock(before, after, time_features=time_features, **build)
                for before, after in resnet_channels
            ]
        )
        self.attentions = nnx.List(
            [Transformer2D(channels, options, **build) for _ in range(transformers)]
        )
        separate = options.expression_injector == "xnemo"
        if options.expression_features is None or not separate:
            places = 0
        else:
            places = 1 if change == "middle" else len(resnet_channels)
        self.expression_modules = nnx.List(
            [ExpressionTransformer(channels, options, **build) for _ in range(places)]
        )
        build = {"dtype": dtype, "rngs": rngs}
        self.downsamplers = nnx.List([Downsample(channels, **build)] if change == "down" else [])
        self.upsamplers = nnx.List([Upsample(channels, **build)] if change == "up" else [])


class UNet(nnx.Module):
    """SD1.5's UNet (method.md 4.1); the defaults are its sizes.

    Args:
        in_channels: latent channels.
        out_channels: channels of the prediction.
        block_channels: widths of the levels; every level but the last has transformers.
        layers_per_block: ResNet blocks of a down level; an up level has one more.
        options: what the transformer blocks are made of.
        extra_channels: further input channels behind the latents, whose weights start at zero.
        groups: GroupNorm groups.
        remat: what the backward pass keeps of a unit, a name of ``rematerialisation``.
        dtype: compute type; parameters and the result are float32.
    """

    def __init__(
        self,
        *,
        in_channels: int = 4,
        out_channels: int = 4,
        block_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        options: TransformerOptions = SD15_OPTIONS,
        extra_channels: int = 0,
        groups: int = 32,
        remat: Remat = "none",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        widths, levels = tuple(block_channels), len(block_channels)
        time_features = 4 * widths[0]
        common = {"time_features": time_features, "groups": groups, "dtype": dtype, "rngs": rngs}
        self.block_channels, self.layers_per_block = widths, layers_per_block
        self.remat, self.dtype = remat, dtype
        self.conv_in = Conv(
            in_channels + extra_channels,
            widths[0],
            (3, 3),
            padding=1,
            kernel_init=_zero_beyond(in_channels),
            dtype=dtype,
            rngs=rngs,
        )
        self.time_embedding = TimestepEmbedding(widths[0], time_features, dtype=dtype, rngs=rngs)

        self.down_blocks = nnx.List([])
        skips = [widths[0]]
        for level, width in enumerate(widths):
            last = level == levels - 1
            before = widths[max(level - 1, 0)]
            pairs = [(before, width)] + [(width, width)] * (layers_per_block - 1)
            change, transformers = (None, 0) if last else ("down", layers_per_block)
            self.down_blocks.append(
                UNetBlock(pairs, transformers, options, change=change, **common)
            )
            skips += [width] * (layers_per_block + (0 if last else 1))

        top = widths[-1]
        self.mid_block = UNetBlock([(top, top)] * 2, 1, options, change="middle", **common)

        self.up_blocks = nnx.List([])
        before = top
        for level, width in reversed(list(enumerate(widths))):
            pairs = []
            for _ in range(layers_per_block + 1):
                pairs.append((before + skips.pop(), width))
                before = width
            transformers = 0 if level == levels - 1 else layers_per_block + 1
            change = None if level == 0 else "up"
            self.up_blocks.append(UNetBlock(pairs, transformers, options, change=change, **common))

        self.conv_norm_out = GroupNorm(widths[0], groups, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.conv_out = Conv(widths[0], out_channels, (3, 3), padding=1, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        latents: Float[Array, "batch h w c"],
        timesteps: Float[Array, " batch"],
        context: Float[Array, "batch n features"] | None = None,
    ) -> Float[Array, "batch h w out"]:
        """The plain UNet. ``context`` is needed exactly when attn2 is there."""
        return self.forward(latents, timesteps, BlockInputs(context=context))[0]

    def forward(
        self,
        latents: Float[Array, "batch h w c"],
        timesteps: Float[Array, " batch"],
        inputs: BlockInputs,
        references: Mapping[str, BlockReference] | None = None,
        temporal: Temporal | None = None,
        frames: int = 1,
    ) -> tuple[Float[Array, "batch h w out"], Bank]:
        """Prediction and bank: norm1 of the hidden state of every transformer block, by its path."""
        references = {} if references is None else references
        features = timestep_features(timesteps, self.block_channels[0])
        time = self.time_embedding(features.astype(self.dtype))
        bank: Bank = {}

        def unit(path: str, block: UNetBlock, index: int, hidden: Array, resnet: int) -> Array:
            attention = block.attentions[index] if index < len(block.attentions) else None
            name = f"{path}.attentions.{index}.transformer_blocks.0"

            def run(hidden, time, inputs, reference):
                hidden = block.resnets[resnet](hidden, time)
                tokens = None
                if attention is not None:
                    hidden, tokens = attention(hidden, inputs, reference)
                if block.expression_modules:
                    hidden = block.expression_modules[index](hidden, inputs.expression)
                if temporal is not None:
                    with jax.named_scope("temporal"):
                        hidden = temporal.apply(f"{path}.motion_modules.{index}", hidden, frames)
                return hidden, tokens

            run = rematerialised(run, self.remat)
            hidden, tokens = run(hidden, time, inputs, references.get(name))
            if tokens is not None:
                bank[name] = tokens
            return hidden

        hidden = self.conv_in(latents.astype(self.dtype))
        skips = [hidden]
        for level, block in enumerate(self.down_blocks):
            for index in range(len(block.resnets)):
                hidden = unit(f"down_blocks.{level}", block, index, hidden, index)
                skips.append(hidden)
            if block.downsamplers:
                hidden = block.downsamplers[0](hidden)
                skips.append(hidden)

        # The middle is one ResNet block, then a (transformer, ResNet) pair in diffusers' order.
        hidden = unit("mid_block", self.mid_block, 0, hidden, 0)
        hidden = self.mid_block.resnets[1](hidden, time)

        for level, block in enumerate(self.up_blocks):
            for index in range(len(block.resnets)):
                hidden = jnp.concatenate([hidden, skips.pop()], axis=-1)
                hidden = unit(f"up_blocks.{level}", block, index, hidden, index)
            if block.upsamplers:
                hidden = block.upsamplers[0](hidden)

        hidden = self.conv_out(jax.nn.silu(self.conv_norm_out(hidden)))
        return hidden.astype(jnp.float32), bank

    def transformer_paths(self) -> list[str]:
        """Paths of the transformer blocks, in the order they run."""
        blocks = [(f"down_blocks.{i}", block) for i, block in enumerate(self.down_blocks)]
        blocks += [("mid_block", self.mid_block)]
        blocks += [(f"up_blocks.{i}", block) for i, block in enumerate(self.up_blocks)]
        return [
            f"{path}.attentions.{index}.transformer_blocks.0"
            for path, block in blocks
            for index in range(len(block.attentions))
        ]

    def transformer_block(self, path: str) -> nnx.Module:
        """The transformer block at a path of ``transformer_paths``."""
        module = self
        for name in path.split("."):
            module = module[int(name)] if name.isdigit() else getattr(module, name)
        return module


def _zero_beyond(channels: int):
    """Initialiser that leaves the weights of the inputs behind the first ``channels`` at zero."""
    base = nnx.initializers.lecun_normal()

    def initialise(key, shape, dtype=jnp.float32, **unused):
        kernel = base(key, (*shape[:-2], channels, shape[-1]), dtype)
        return jnp.pad(kernel, ((0, 0),) * (len(shape) - 2) + ((0, shape[-2] - channels), (0, 0)))

    return initialise
