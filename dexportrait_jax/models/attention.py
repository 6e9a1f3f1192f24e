"""Multi-head attention: one function with several backends, and the projection layer around it.

The backend is chosen by platform and sequence length; every backend computes the same sum as the plain one,
which is the reference in the tests. Softmax runs in float32 whatever the compute type.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from dexportrait_jax.models.partitioning import attend_in_parts
from dexportrait_jax.models.rematerialisation import ATTENTION
from dexportrait_jax.platforms import target_platform

Backend = Literal["auto", "plain", "chunked", "blocked", "cudnn", "splash"]

LONG_FROM_QUERIES = 4096  # below, the plain logits fit and are faster
CHUNK_QUERIES = 512
BLOCKED_FROM_LOGITS = 2**20  # below, a CPU keeps the logits in its cache anyway
BLOCK_LOGITS = 2**20  # the part of a head's logits that is held at a time
MASKED = -1e30  # added to the logits of keys that take no part

# Part of the key under which JAX keeps what it traced: another choice traces again.
_chosen = jax.make_user_context("auto")


@contextlib.contextmanager
def attention_backend(backend: Backend) -> Iterator[None]:
    """What "auto" means for attention traced inside the ``with`` block; "auto" is the rule of ``choose_backend``."""
    with _chosen(backend):
        yield


def attention(
    query: Float[Array, "batch queries heads features"],
    key: Float[Array, "batch keys heads features"],
    value: Float[Array, "batch keys heads features"],
    keep: Bool[Array, "batch keys"] | Int[Array, " batch"] | None = None,
    *,
    backend: Backend = "auto",
) -> Float[Array, "batch queries heads features"]:
    """Scaled dot-product attention. Keys whose ``keep`` is False take no part (one must stay).

    Where a sample's keys that take part all come before those that do not, ``keep`` may be how many they are: that
    is all that cuDNN can be told without a bias as large as the logits.

    Raises:
        ValueError: an unknown backend; "cudnn" and a ``keep`` of every key.
    """
    if backend == "auto":
        backend = _chosen.value
    if backend == "auto":
        backend = choose_backend(query, key, keep)
    return checkpoint_name(_attend(query, key, value, keep, backend), ATTENTION)


def _attend(query: Array, key: Array, value: Array, keep: Array | None, backend: Backend) -> Array:
    if backend == "cudnn":
        return cudnn(query, key, value, keep)
    if keep is not None and keep.ndim == 1:
        keep = jnp.arange(key.shape[1]) < keep[:, None]
    if backend == "plain":
        return _plain(query, key, value, keep)
    if backend == "chunked":
        return _chunked(query, key, value, keep)
    if backend == "blocked":
        keep = jnp.ones(key.shape[:2], bool) if keep is None else keep
        return attend_in_parts(_blocked, query, key, value, keep)
    if backend == "splash":
        # Imported here: it brings Pallas, which no other platform needs.
        from dexportrait_jax.models.splash import splash

        return splash(query, key, value, keep)
    raise ValueError(f"attention backend {backend!r} is none of {', '.join(get_args(Backend))}")


def choose_backend(query: Array, key: Array, keep: Array | None = None) -> Backend:
    """By the platform that the program is made for, and by what the arguments of ``attention`` are.

    CPU: blocks of one head once the logits leave the cache. GPU in half precision: cuDNN, where it can. TPU: splash
    for long sequences. Otherwise chunks of queries for long sequences, and plain attention for short ones everywhere.
    """
    batch, queries, heads, features = query.shape
    platform = target_platform()
    if platform == "cpu" and batch * heads * queries * key.shape[1] >= BLOCKED_FROM_LOGITS:
        return "blocked"
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    fits = features % 8 == 0 and features <= 128 and (keep is None or keep.ndim == 1)
    # Of odd lengths JAX has no gradient from cuDNN.
    even = queries % 2 == key.shape[1] % 2 == 0
    if platform == "gpu" and half and fits and even:
        return "cudnn"
    if queries < LONG_FROM_QUERIES:
        return "plain"
    return "splash" if platform == "tpu" else "chunked"


def cudnn(
    query: Float[Array, "batch queries heads features"],
    key: Float[Array, "batch keys heads features"],
    value: Float[Array, "batch keys heads features"],
    lengths: Int[Array, " batch"] | None = None,
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "batch queries heads features"]:
    """JAX's attention by cuDNN, to the first ``lengths`` keys of each sample; by XLA, the same for tests.

    On a mesh every device works on its part: JAX's rule for cutting up cuDNN's ties the query's dimensions alone.

    Raises:
        ValueError: ``lengths`` that are a mask. JAX makes a bias of a mask, wants one for every query, and keeps
            its gradient: 400 MB for six samples of 4096 queries and 8192 keys.
    """
    if lengths is not None and lengths.ndim > 1:
        raise ValueError("attention backend 'cudnn' takes how many keys take part, no mask of them")

    def attend(query: Array, key: Array, value: Array, lengths: Array | None = None) -> Array:
        return jax.nn.dot_product_attention(
            query, key, value, key_value_seq_lengths=lengths, implementation=implementation
        )

    of_samples = () if lengths is None else (lengths.astype(jnp.int32),)
    return attend_in_parts(attend, query, key, value, *of_samples)


def _plain(query: Array, key: Array, value: Array, keep: Array | None) -> Array:
    query = query * query.shape[-1] ** -0.5
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    if keep is not None:
        logits = logits + jnp.where(keep, 0.0, MASKED)[:, None, None, :]
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


@jax.custom_vjp
def _blocked(query: Array, key: Array, value: Array, keep: Array) -> Array:
    """One head of one sample at a time, its logits never leaving the cache; made for CPUs.

    Six times as fast as plain attention forward and twice as fast backward at 256 queries, 512 keys
    and 64 heads * samples, where plain attention streams 33 MB of logits through memory several times.
    """
    return _blocked_forward(query, key, value, keep)[0]


def _blocked_forward(query: Array, key: Array, value: Array, keep: Array):
    batch, queries, heads, features = query.shape
    chunk = _chunk_of(queries, key.shape[1])
    rows = (
        _rows(query * features**-0.5).reshape(batch * heads, -1, chunk, features),
        _rows(key),
        _rows(value),
        _bias_rows(keep, heads),
    )

    def head(row):
        query, key, value, bias = row

        def part(query):
            logits = _product(query, key.T) + bias
            largest = jnp.max(logits, axis=-1, keepdims=True)
            weights = jnp.exp(logits - largest)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            result = _product(weights.astype(value.dtype), value) / total
            return result, largest + jnp.log(total)

        return _over_chunks(part, query)

    result, log_sum = jax.lax.map(head, rows)
    output = result.astype(query.dtype).reshape(batch, heads, queries, -1).swapaxes(1, 2)
    return output, (rows, result, log_sum)


def _blocked_backward(kept, gradient: Array):
    (query, key, value, bias), result, log_sum = kept
    batch, queries, heads, features = gradient.shape
    gradient_rows = _rows(gradient).reshape(result.shape)

    def head(row):
        query, key, value, bias, result, log_sum, gradient = row

        def part(chunk):
            query, result, log_sum, gradient = chunk
            # Keys by queries: the products below then read every matrix along its rows.
            weights = jnp.exp(_product(key, query.T) + bias.T - log_sum.T)
            share = jnp.sum(gradient * result, axis=-1, keepdims=True).T
            of_logits = (weights * (_product(value, gradient.T) - share)).astype(query.dtype)
            of_value = _product(weights.astype(value.dtype), gradient)
            return _product(key.T, of_logits).T, _product(of_logits, query), of_value

        of_query, of_key, of_value = _over_chunks(part, (query, result, log_sum, gradient))
        return of_query, jnp.sum(of_key, axis=0), jnp.sum(of_value, axis=0)

    of_query, of_key, of_value = jax.lax.map(
        head, (query, key, value, bias, result, log_sum, gradient_rows)
    )

    def layout(rows, like):
        return rows.astype(like.dtype).reshape(batch, heads, -1, features).swapaxes(1, 2)

    return (
        layout(of_query * features**-0.5, query),
        layout(of_key, key),
        layout(of_value, value),
        None,
    )


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _rows(tokens: Array) -> Array:
    """(batch, tokens, heads, features) -> (batch * heads, tokens, features)."""
    batch, length, heads, features = tokens.shape
    return tokens.swapaxes(1, 2).reshape(batch * heads, length, features)


def _bias_rows(keep: Array, heads: int) -> Array:
    return repeat_rows(jnp.where(keep, 0.0, MASKED), heads)[:, None, :]


def _chunk_of(queries: int, keys: int) -> int:
    """The largest divisor of the queries whose logits stay within ``BLOCK_LOGITS``."""
    parts = range(1, queries + 1)
    return next(
        queries // n for n in parts if queries % n == 0 and queries // n * keys <= BLOCK_LOGITS
    )


def _over_chunks(part, chunks):
    """``part`` of every chunk; a single one without a loop."""
    if jax.tree.leaves(chunks)[0].shape[0] > 1:
        return jax.lax.map(part, chunks)
    return jax.tree.map(lambda leaf: leaf[None], part(jax.tree.map(lambda leaf: leaf[0], chunks)))


def _product(first: Array, second: Array) -> Array:
    return jnp.matmul(first, second, preferred_element_type=jnp.float32)


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
        extra_keep: Bool[Array, "batch extra_keys"] | Bool[Array, " batch"] | None = None,
    ) -> Float[Array, "batch queries features"]:
        """Attend to ``context`` (default: to ``hidden`` itself) and to ``extra`` keys and values.

        ``extra`` is a pair (keys, values) of shape (batch / n, extra_keys, features): each of its
        rows serves n consecutive rows of the batch. ``extra_keep`` says which of them take part, or, (batch,),
        whether they do.
        """
        key, value = self.keys_values(hidden if context is None else context)
        keep = None
        if extra is not None:
            times = hidden.shape[0] // extra[0].shape[0]
            own = key.shape[1]
            key = jnp.concatenate([key, repeat_rows(extra[0], times)], axis=1)
            value = jnp.concatenate([value, repeat_rows(extra[1], times)], axis=1)
            if extra_keep is not None and extra_keep.ndim == 1:
                keep = jnp.where(extra_keep, key.shape[1], own)
            elif extra_keep is not None:
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
