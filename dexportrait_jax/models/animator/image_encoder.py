"""CLIP's image encoder, equal to transformers' ``CLIPVisionModelWithProjection``; the defaults are ViT-L/14."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dexportrait_jax.models.animator.norms import LayerNorm
from dexportrait_jax.models.attention import attention
from dexportrait_jax.models.layers import Conv

# What CLIP subtracts and divides by, for images in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


class Embeddings(nnx.Module):
    """Patches, a class token in front, learned positions."""

    def __init__(
        self, image_size: int, patch: int, features: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        tokens = (image_size // patch) ** 2 + 1
        self.class_embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (features,)))
        self.patch_embedding = Conv(
            3,
            features,
            (patch, patch),
            strides=patch,
            padding=0,
            use_bias=False,
            dtype=dtype,
            rngs=rngs,
        )
        self.position_embedding = nnx.Embed(tokens, features, dtype=dtype, rngs=rngs)

    def __call__(self, images: Float[Array, "batch H W 3"]) -> Float[Array, "batch tokens c"]:
        patches = self.patch_embedding(images)
        batch, features = patches.shape[0], patches.shape[-1]
        first = jnp.broadcast_to(self.class_embedding[...], (batch, 1, features))
        tokens = [first.astype(patches.dtype), patches.reshape(batch, -1, features)]
        return jnp.concatenate(tokens, axis=1) + self.position_embedding.embedding[...]


class SelfAttention(nnx.Module):
    """Multi-head self-attention with biases everywhere."""

    def __init__(self, features: int, heads: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.heads = heads
        self.q_proj = nnx.Linear(features, features, dtype=dtype, rngs=rngs)
        self.k_proj = nnx.Linear(features, features, dtype=dtype, rngs=rngs)
        self.v_proj = nnx.Linear(features, features, dtype=dtype, rngs=rngs)
        self.out_proj = nnx.Linear(features, features, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: Float[Array, "batch tokens c"]) -> Float[Array, "batch tokens c"]:
        split = (*hidden.shape[:2], self.heads, -1)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        result = attention(*(project(hidden).reshape(split) for project in projections))
        return self.out_proj(result.reshape(hidden.shape))


class MLP(nnx.Module):
    """Two linear layers, `inner` channels between them."""

    def __init__(
        self, features: int, inner: int, activation: str, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.activation = activation
        self.fc1 = nnx.Linear(features, inner, dtype=dtype, rngs=rngs)
        self.fc2 = nnx.Linear(inner, features, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: Float[Array, "batch tokens c"]) -> Float[Array, "batch tokens c"]:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(hidden)))


class EncoderLayer(nnx.Module):
    """Pre-norm transformer layer."""

    def __init__(
        self,
        features: int,
        heads: int,
        feed_forward: int,
        activation: str,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        build = {"dtype": dtype, "rngs": rngs}
        self.layer_norm1 = LayerNorm(features, **build)
        self.self_attn = SelfAttention(features, heads, **build)
        self.layer_norm2 = LayerNorm(features, **build)
        self.mlp = MLP(features, feed_forward, activation, **build)

    def __call__(self, hidden: Float[Array, "batch tokens c"]) -> Float[Array, "batch tokens c"]:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        return hidden + self.mlp(self.layer_norm2(hidden))


class Encoder(nnx.Module):
    """The layers, under the name the published keys have."""

    def __init__(self, layers: int, *args, **settings):
        self.layers = nnx.List([EncoderLayer(*args, **settings) for _ in range(layers)])

    def __call__(self, hidden: Float[Array, "batch tokens c"]) -> Float[Array, "batch tokens c"]:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class VisionModel(nnx.Module):
    """Images -> the normalised class token."""

    def __init__(
        self,
        image_size: int,
        patch: int,
        features: int,
        layers: int,
        heads: int,
        feed_forward: int,
        activation: str,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        build = {"dtype": dtype, "rngs": rngs}
        self.embeddings = Embeddings(image_size, patch, features, **build)
        self.pre_layrnorm = LayerNorm(features, **build)  # spelled so in the published keys
        self.encoder = Encoder(layers, features, heads, feed_forward, activation, **build)
        self.post_layernorm = LayerNorm(features, **build)

    def __call__(self, images: Float[Array, "batch H W 3"]) -> Float[Array, "batch c"]:
        hidden = self.encoder(self.pre_layrnorm(self.embeddings(images)))
        return self.post_layernorm(hidden[:, 0])


class ImageEncoder(nnx.Module):
    """Images in [-1, 1] -> one embedding, the context of attn2 in the mode "clip_image".

    Args:
        image_size: height and width of the images; the caller resizes.
        patch_size, features, layers, heads: sizes of the transformer.
        feed_forward: channels inside the feed-forward layers; None: four times features. open_clip's ViT-g (1408
            features) has 6144, its ViT-bigG (1664) 8192.
        projection: size of the embedding.
        activation: "quick_gelu" (OpenAI's weights) or "gelu".
        dtype: compute type.
    """

    def __init__(
        self,
        *,
        image_size: int = 224,
        patch_size: int = 14,
        features: int = 1024,
        layers: int = 24,
        heads: int = 16,
        feed_forward: int | None = None,
        projection: int = 768,
        activation: Literal["quick_gelu", "gelu"] = "quick_gelu",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.image_size, self.dtype = image_size, dtype
        self.vision_model = VisionModel(
            image_size,
            patch_size,
            features,
            layers,
            heads,
            feed_forward or 4 * features,
            activation,
            dtype=dtype,
            rngs=rngs,
        )
        self.visual_projection = nnx.Linear(
            features, projection, use_bias=False, dtype=dtype, rngs=rngs
        )

    def __call__(self, images: Float[Array, "batch H W 3"]) -> Float[Array, "batch projection"]:
        """The projected embedding, float32.

        Raises:
            ValueError: images of another size.
        """
        if images.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(
                f"images of {images.shape[1]}x{images.shape[2]}: this encoder takes "
                f"{self.image_size}x{self.image_size}"
            )
        normalised = ((images + 1) / 2 - jnp.array(MEAN)) / jnp.array(DEVIATION)
        embedding = self.visual_projection(self.vision_model(normalised.astype(self.dtype)))
        return embedding.astype(jnp.float32)
