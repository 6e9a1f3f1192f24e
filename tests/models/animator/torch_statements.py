"""The denoiser and the reference's bank written down again, in PyTorch, from method.md 4.2 to 4.4.

The UNet is diffusers'; what its transformer blocks do is stated here for one sample at a time, whose dropped
conditions are simply not there. Parameters have our names, so that the weights of one are those of the other.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from diffusers.models.attention import BasicTransformerBlock

from tests.published import published_unet

# Of a block; the temporal module follows.
ORDER = ("self_attention", "warped_reference", "attn2", "expression", "feed_forward")


@dataclasses.dataclass(frozen=True)
class Choices:
    """What the method leaves open; as the defaults of the config.

    Attributes:
        order: of the branches in a block.
        by_depth: the features of a depth follow each other; else the depths of a channel do.
        linear, positions: of the expression tokens.
        corners: the outermost points of a ray map lie at -1 and 1.
        drops_context: with the reference.
    """

    order: tuple[str, ...] = ORDER
    by_depth: bool = False
    linear: bool = True
    positions: bool = True
    corners: bool = False
    drops_context: bool = True


DEFAULT = Choices()


@dataclasses.dataclass
class Sample:
    """What one sample is conditioned on; None where it is dropped.

    Attributes:
        reference: path of a block -> (h*w, c), the bank of its source.
        shown: path -> (h*w,), which of these tokens are not hidden.
        context: (n, features) of the picture; with the reference it goes, or not.
        poses: of source and target, (3, 4) each.
        expression: (latent,).
    """

    reference: dict[str, torch.Tensor] | None
    shown: dict[str, torch.Tensor]
    context: torch.Tensor
    poses: tuple[torch.Tensor, torch.Tensor] | None
    expression: torch.Tensor | None


class CrossAttention(torch.nn.Module):
    """Queries of ``features`` channels, keys and values from ``context`` channels, as diffusers names them."""

    def __init__(self, features: int, context: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = torch.nn.Linear(features, features, bias=False)
        self.to_k = torch.nn.Linear(context, features, bias=False)
        self.to_v = torch.nn.Linear(context, features, bias=False)
        self.to_out = torch.nn.ModuleList([torch.nn.Linear(features, features)])


class ExpressionTokens(torch.nn.Module):
    """Linear layer, reshape, sines and cosines of the position; null tokens in the place of what is dropped."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.linear = torch.nn.Linear(count * width, count * width)
        self.null_tokens = torch.nn.Parameter(torch.zeros(count, width))

    def forward(self, latent, choices):
        count, width = self.null_tokens.shape
        if latent is None:
            tokens = self.null_tokens
        else:
            tokens = (self.linear(latent) if choices.linear else latent).reshape(count, width)
        if not choices.positions:
            return tokens
        even = torch.arange(0, width, 2)
        angles = torch.arange(count)[:, None] / 10000 ** (even / width)
        positions = torch.stack([torch.sin(angles), torch.cos(angles)], -1).flatten(1)
        return tokens + positions


def denoiser(*, channels, layers, heads, groups, context, tokens) -> torch.nn.Module:
    """diffusers' UNet with six more input channels and the layers of the animator's branches."""
    unet = published_unet(
        channels, layers, heads=heads, groups=groups, context=context, in_channels=4 + 6
    )
    unet.expression_tokens = ExpressionTokens(*tokens)
    for _, block in transformer_blocks(unet):
        features = block.norm1.normalized_shape[0]
        block.warp_projection = torch.nn.Conv2d(features, features, 3, padding=1)
        block.norm_expression = torch.nn.LayerNorm(features)
        block.attn_expression = CrossAttention(features, tokens[1], heads)
    return unet


def transformer_blocks(unet) -> list[tuple[str, BasicTransformerBlock]]:
    """(path, block) of every transformer block."""
    modules = unet.named_modules()
    return [(path, module) for path, module in modules if isinstance(module, BasicTransformerBlock)]


def bank(unet, latents, context, timestep: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """path -> hidden state that enters the block, and its norm1; both (S, h*w, c). The UNet is untouched."""
    seen, hooks = {}, []
    for path, block in transformer_blocks(unet):

        def note(module, given, normed, path=path):
            seen[path] = given[0], normed

        hooks.append(block.norm1.register_forward_hook(note))
    unet(latents.permute(0, 3, 1, 2), torch.full((len(latents),), timestep), context)
    for hook in hooks:
        hook.remove()
    return seen


def predict(unet, latents, timesteps, samples: list[Sample], choices=DEFAULT) -> torch.Tensor:
    """(B, h, w, 4) -> the prediction, likewise."""
    side = latents.shape[1]
    rays = torch.stack([ray_maps(sample.poses, side, choices.corners) for sample in samples])
    tokens = [unet.expression_tokens(sample.expression, choices) for sample in samples]

    def run(hidden, path, block, **unused):
        """A block in the place of diffusers' own."""
        each = zip(hidden, samples, tokens, strict=True)
        return torch.stack([transformer_block(block, path, *one, choices) for one in each])

    for path, block in transformer_blocks(unet):
        block.forward = functools.partial(run, path=path, block=block)
    inputs = torch.cat([latents.permute(0, 3, 1, 2), rays], 1)
    nowhere_read = torch.zeros(len(latents), 1, samples[0].context.shape[-1])
    return unet(inputs, timesteps, nowhere_read).sample.permute(0, 2, 3, 1)


def transformer_block(block, path: str, hidden, sample: Sample, tokens, choices=DEFAULT):
    """(h*w, c) of one sample -> the same; every branch adds to what the one before it left (method.md 4.3)."""

    def self_attention(hidden):
        own = block.norm1(hidden)
        if sample.reference is None:
            return attend(block.attn1, own, own)
        shown = sample.reference[path][sample.shown[path]]
        return attend(block.attn1, own, torch.cat([own, shown]))

    def warped_reference(hidden):
        if sample.reference is None or sample.poses is None:
            return torch.zeros_like(hidden)
        moved = warped(sample.reference[path], *sample.poses, choices.by_depth)
        return block.warp_projection(moved[None])[0].flatten(1).T

    def attn2(hidden):
        there = sample.reference is not None or not choices.drops_context
        context = sample.context if there else torch.zeros_like(sample.context)
        return attend(block.attn2, block.norm2(hidden), context)

    def expression(hidden):
        return attend(block.attn_expression, block.norm_expression(hidden), tokens)

    def feed_forward(hidden):
        return block.ff(block.norm3(hidden))

    branches = (self_attention, warped_reference, attn2, expression, feed_forward)
    by_name = {branch.__name__: branch for branch in branches}
    for name in choices.order:
        hidden = hidden + by_name[name](hidden)
    return hidden


def attend(layer, queries, tokens):
    """(n, c) of one sample to the tokens that are there."""
    query, key, value = (
        part.unflatten(-1, (layer.heads, -1)).transpose(0, 1)
        for part in (layer.to_q(queries), layer.to_k(tokens), layer.to_v(tokens))
    )
    weights = torch.softmax(query @ key.mT / math.sqrt(query.shape[-1]), -1)
    return layer.to_out[0]((weights @ value).transpose(0, 1).flatten(1))


def warped(tokens, source, driving, by_depth=False):
    """(h*w, c) -> (c, h, w), moved from one pose to the other as a volume of depth h/2.

    Feature ch*(h/2) + d is channel ch at depth d, or ``by_depth`` d*(2c/h) + ch.
    """
    features, side = tokens.shape[1], math.isqrt(len(tokens))
    depth = side // 2
    if by_depth:
        volume = tokens.T.reshape(1, depth, features // depth, side, side).transpose(1, 2)
    else:
        volume = tokens.T.reshape(1, features // depth, depth, side, side)
    back = torch.linalg.inv(_lifted(driving) @ torch.linalg.inv(_lifted(source)))
    axes = (torch.linspace(-1, 1, count) for count in (depth, side, side))
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    points = torch.stack([x, y, z, torch.ones_like(x)], -1) @ back.T
    read = torch.nn.functional.grid_sample(volume, points[None, ..., :3], align_corners=True)
    return (read.transpose(1, 2) if by_depth else read).reshape(features, side, side)


def ray_maps(poses, side: int, corners: bool = False):
    """(6, h, w): how either pose moves the points (u, v, 0) of pixel centres; zeros without poses (method.md 4.2)."""
    if poses is None:
        return torch.zeros(6, side, side)
    places = torch.linspace(-1, 1, side) if corners else (2 * torch.arange(side) + 1) / side - 1
    v, u = torch.meshgrid(places, places, indexing="ij")
    points = torch.stack([u, v, torch.zeros_like(u), torch.ones_like(u)], -1)
    return torch.cat([(points @ pose.T - points[..., :3]).permute(2, 0, 1) for pose in poses])


def _lifted(pose):
    return torch.cat([pose, torch.tensor([[0, 0, 0, 1]], dtype=pose.dtype)])
