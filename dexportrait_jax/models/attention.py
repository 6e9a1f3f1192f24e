"""Multi-head attention: one function with several backends, and the projection layer around it.

The backend is chosen by platform and sequence length; every backend computes the same sum as the plain one,
which is the reference in the tests. Softmax runs in float32 whatever the compute type.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

Backend = Literal["auto", "plain", "chunked", "cudnn"]

CHUNKED_FROM_QUERIES = 4096  # below, the plain logits fit and are faster
CHUNK_QUERIES = 512


def attention(
    query: Float[Array, "batch queries heads features"],
    key: Float[Array, "batch keys heads features"],
    value: Float[Array, "batch keys heads features"],
    keep: Bool[Array, "batch keys"] | None = None,
    *,
    backend: Backend = "auto",
) -> Float[Array, "batch queries heads features"]:
    """Scaled dot-product attention. Keys whose ``keep`` is False take no part (one must stay).

    Raises:
        ValueError: an unknown backend.
    """
    if backend == "auto":
        backend = choose_backend(query)
    if backend == "plain":
        return _plain(query, key, value, keep)
    if backend == "chunked":
        return _chunked(query, key, value, keep)
    if backend == "cudnn":
        mask = None if keep is None else keep[:, None, None, :]
        return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")
    raise ValueError(f"attention backend {backend!r} is none of auto, plain, chunked, cudnn")


def choose_backend(query: Array) -> Backend:
    """cuDNN on a GPU in half precision, query chunks for long sequences, plain otherwise."""
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    features = query.shape[-1]
    long = query.shape[1] >= CHUNKED_FROM_QUERIES
    if jax.default_backend() == "gpu" and half and features % 8 == 0 and features <= 128:
        return "cudnn"
    return "chunked" if long else "plain"


def _plain(query: Array, key: Array, value: Array, keep: Array | None) -> Array:
    query = query * query.shape[-1] ** -0.5
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    if keep is not None:
        logits = jnp.where(keep[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def _chunked(query: Array, key: Array, value: Array, keep: Array | None) -> Array:
    """One chunk of queries at a time; the logits are recomputed in the backward pass."""
    batch, queries, heads, features = query.shape
    padding = -queries % CHUNK_QUERIES
    padded = jnp.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0)))
    chunks = padded.reshape(batch, -1, CHUNK_QUERIES, heads, features).swapaxes(0, 1)
    result = jax.lax.map(jax.checkpoint(lambda chunk: _plain(chunk, key, value, keep)), chunks)
    return result.swapaxes(0, 1).reshape(batch, queries + padding, heads, features)[:, :queries]


class Attention(nnx.Module):
    """Query, key, value and output projections with the names of diffusers' ``Attention``.

    Queries have ``features`` channels, keys and values come from ``context_features`` channels
    (default: the same). ``zero_output`` starts the output projection at zero, so that a residual
    branch begins as the identity.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        context_features: int | None = None,
        input_bias: bool = False,
        zero_output: bool = False,
        backend: Backend = "auto",
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if features % heads:
            raise ValueError(f"{features} channels do not divide into {heads} attention heads")
        context_features = features if context_features is None else context_features
        output_init = {"kernel_init": nnx.initializers.zeros} if zero_output else {}
        self.heads, self.backend = heads, backend
        self.to_q = nnx.Linear(features, features, use_bias=input_bias, dtype=dtype, rngs=rngs)
        self.to_k = nnx.Linear(
            context_features, features, use_bias=input_bias, dtype=dtype, rngs=rngs
        )
        self.to_v = nnx.Linear(
            context_features, features, use_bias=input_bias, dtype=dtype, rngs=rngs
        )
        self.to_out = nnx.List(
            [nnx.Linear(features, features, dtype=dtype, rngs=rngs, **output_init)]
        )

    def keys_values(
        self, context: Float[Array, "batch keys context"]
    ) -> tuple[Float[Array, "batch keys features"], Float[Array, "batch keys features"]]:
        """Projected keys and values of a context, to be kept and handed back as ``extra``."""
        return self.to_k(context), self.to_v(context)

    def __call__(
        self,
        hidden: Float[Array, "batch queries features"],
        context: Float[Array, "batch keys context"] | None = None,
        *,
        extra: tuple[Array, Array] | None = None,
        extra_keep: Bool[Array, "batch extra_keys"] | None = None,
    ) -> Float[Array, "batch queries features"]:
        """Attend to ``context`` (default: to ``hidden`` itself) and to ``extra`` keys and values.

        ``extra`` is a pair (keys, values) of shape (batch / n, extra_keys, features): each of its
        rows serves n consecutive rows of the batch. ``extra_keep`` says which of them take part.
        """
        key, value = self.keys_values(hidden if context is None else context)
        keep = None
        if extra is not None:
            times = hidden.shape[0] // extra[0].shape[0]
            own = key.shape[1]
            key = jnp.concatenate([key, repeat_rows(extra[0], times)], axis=1)
            value = jnp.concatenate([value, repeat_rows(extra[1], times)], axis=1)
            if extra_keep is not None:
                keep = jnp.pad(extra_keep, ((0, 0), (own, 0)), constant_values=True)
        result = attention(
            self._split(self.to_q(hidden)),
            self._split(key),
            self._split(value),
            keep,
            backend=self.backend,
        )
        return self.to_out[0](result.reshape(hidden.shape))

    def _split(self, tokens: Array) -> Array:
        return tokens.reshape(*tokens.shape[:-1], self.heads, -1)


def repeat_rows(rows: Float[Array, "rows ..."], times: int) -> Float[Array, "rows_times ..."]:
    """Each row ``times`` times in succession (source-major order)."""
    if times == 1:
        return rows
    wide = jnp.broadcast_to(rows[:, None], (rows.shape[0], times, *rows.shape[1:]))
    return wide.reshape(-1, *rows.shape[1:])
