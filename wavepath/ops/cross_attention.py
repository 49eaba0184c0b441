"""Attention of one feature map over another, in memory that does not grow with the square of the image.

softmax(q k^T / sqrt(d)) v with a single head. At a crop of 512 px maps of 128 x 128 make 16,384 x 16,384 scores, 1 GiB in float32 and several of
them for a gradient; at 1024 px sixteen times that. Forms, equal in values and gradients to rounding:

* `chunked`: a block of queries at a time, whose scores never leave it and are made again in the backward pass. (A derivative rule by hand, which
  keeps the logarithm of each query's sum, took the same time and memory on a CPU at 4,096 and 8,192 places of width 256.);
* `dense`: all scores at once: the reference, and what small maps take.

`auto` is `dense` as long as a sample's scores fit in one block.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

IMPLEMENTATIONS = ("auto", "chunked", "dense")
_CHUNK_BYTES = 16 << 20  # of one sample's scores: a few of them stay near the cache of a CPU


def cross_attention(
    query: Float[Array, "b h w d"],
    key: Float[Array, "b i j d"],
    value: Float[Array, "b i j e"],
    *,
    chunk: int = 0,
    impl: str | None = None,
) -> Float[Array, "b h w e"]:
    """What each place of `query` collects from all places of `value`, weighted by softmax(q k^T / sqrt(d)) over the places of `key`.

    Args:
        query: [b, h, w, d].
        key, value: [b, i, j, d] and [b, i, j, e]; their size may differ from the query's.
        chunk: queries whose scores are held at once; 0: chosen, so that a sample's stay under 16 MB. `dense` holds all.
        impl: one of `IMPLEMENTATIONS`; None is `auto`.

    Returns:
        [b, h, w, e] in the value's type; scores and softmax in float32 or wider, products of the inputs' type.

    Raises:
        ValueError: an unknown form, a negative chunk.

    Source: METHODS 3.3 (cross-attention fusion).
    """
    impl = impl or "auto"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}")
    if chunk < 0:
        raise ValueError(f"chunk={chunk} is a number of queries; give 0 (chosen) or more")
    b, h, w, d = query.shape
    q, k, v = query.reshape(b, h * w, d), key.reshape(b, -1, d), value.reshape(b, -1, value.shape[-1])
    rows = chunk_of(h * w, k.shape[1], chunk)
    if impl == "dense" or (impl == "auto" and rows == h * w):
        out = _dense(q, k, v)
    else:
        out = _chunked(q, k, v, rows)
    return out.reshape(b, h, w, -1).astype(value.dtype)


def chunk_of(queries: int, keys: int, chunk: int = 0) -> int:
    """Queries in a chunk: at most `chunk`, or (0) as many as 16 MB of float32 scores allow, spread evenly."""
    most = min(queries, chunk or max(1, _CHUNK_BYTES // (4 * keys)))
    return -(-queries // -(-queries // most))


def _wide(*arrays: Array) -> jnp.dtype:
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def _scaled(query: Array) -> Array:
    return query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)


def _dense(query: Array, key: Array, value: Array) -> Array:
    scores = jnp.einsum("bnd,bmd->bnm", _scaled(query), key, preferred_element_type=_wide(query, key))
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bnm,bme->bne", weights, value, preferred_element_type=_wide(value))


def _blocks(x: Array, rows: int) -> Array:
    """[b, n, d] to [blocks, b, rows, d], the last filled up with zeros."""
    b, n, d = x.shape
    blocks = -(-n // rows)
    return jnp.pad(x, ((0, 0), (0, blocks * rows - n), (0, 0))).reshape(b, blocks, rows, d).transpose(1, 0, 2, 3)


def _chunked(query: Array, key: Array, value: Array, rows: int) -> Array:
    wide = _wide(query, key, value)
    # A copy made once: folded into the products of every block it would bring a CPU's slow layouts back. Both wide, though the products are not: the
    # blocks' gradients add up in this type.
    turned, values = lax.optimization_barrier(key.transpose(0, 2, 1)).astype(wide), value.astype(wide)

    @jax.checkpoint
    def block(q: Array) -> Array:
        scores = jnp.matmul(q, turned.astype(q.dtype), preferred_element_type=wide)
        weights = jnp.exp(scores - lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        # Dividing the output costs a pass over [rows, e] where dividing the weights costs one over [rows, keys].
        out = jnp.matmul(weights.astype(value.dtype), values.astype(value.dtype), preferred_element_type=wide)
        return out / weights.sum(axis=-1, keepdims=True)

    out = lax.map(block, _blocks(_scaled(query), rows))
    return out.transpose(1, 0, 2, 3).reshape(query.shape[0], -1, value.shape[-1])[:, : query.shape[1]]
