"""Hard attention between two feature maps: each 3 x 3 patch of one finds the most alike patch of the other and takes what lies there.

Every place i of the query is compared with every place j of the key by the cosine of their patches, so scores are the square of the image; they
are made and reduced in chunks of query rows and never kept. Forms, equal in values and gradients to rounding:

* `shift`: products of single pixels, P[p, q] = <query_p, key_q>, and patch products as sums of them, sum_s P[i + s, j + s]: a ninth of the
  multiply-adds, and additions in their place. On a CPU half the time of `product`, whose matrix product is all of its cost;
* `product`: patches unfolded to 9 c channels and one matrix product: what a machine of matrix units prefers;
* `dense`: `product` with all scores at once and automatic differentiation throughout: the reference, and what the others are measured against.

What was found is fetched pixel by pixel: the result at p is the mean over the offsets s of value[h(p - s) + s], nine gathers that fuse into one
loop (the patches themselves would be nine times as large, and forty times slower to fetch and differentiate). The derivative rule is by hand: inputs,
scores and indices are kept, and nothing else. Reverse mode only, but for `dense`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from wavepath.ops.platform import platform

IMPLEMENTATIONS = ("auto", "shift", "product", "dense")
_CHUNK_BYTES = 16 << 20  # of one sample's scores
_MOST_ROWS = 8  # more gain nothing (the halo of two rows is then a fifth), and leave the cache
_SMALL = 1e-24


def hard_attention(
    query: Float[Array, "b h w c"],
    key: Float[Array, "b h w c"],
    value: Float[Array, "b h w c"],
    *,
    size: int = 3,
    chunk: int = 0,
    impl: str | None = None,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w 1"]]:
    """What each place of the query takes over from the value, and how well it fits.

    With q_i, k_j the patches of `size` x `size` px around i and j (zeros beyond the border), h_i = argmax_j cos(q_i, k_j), S_i = cos(q_i, k_{h_i}):
    the value's patches at h_i are laid at i, added where they overlap and divided by size^2. At the border fewer overlap, and the divisor stays.

    Args:
        query, key, value: [b, h, w, c].
        size: odd side of a patch in px.
        chunk: rows of queries whose scores are held at once; 0: chosen, 8 or as many as keep a sample's under 16 MB, and at least
            one: images wider than about 161 px exceed that with a single row. `dense` holds all. Measured on CPUs; on GPUs the choice is not.
        impl: one of `IMPLEMENTATIONS`; None is `auto`: `product` on a TPU, `shift` elsewhere.

    Returns:
        The transferred features [b, h, w, c] and the scores [b, h, w, 1] in [-1, 1], in the inputs' type; computed in float32 or wider. The choice
        h has no gradient; `query` and `key` get theirs through the scores, `value` through the features. A patch of zeros scores 0, without gradient.

    Raises:
        ValueError: an unknown form, an even size, a negative chunk.

    Source: METHODS 4.3 (Eq. 8, 9); the fold by size^2 as published with TTSR.
    """
    impl, rows = _settings(query.shape, size, chunk, impl)
    wide = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (query, key, value)]
    transferred, score = _dense(*wide, size) if impl == "dense" else _chunked(*wide, size, rows, impl)
    return transferred.astype(value.dtype), score[..., None].astype(query.dtype)


def hard_match(
    query: Float[Array, "b h w c"], key: Float[Array, "b h w c"], *, size: int = 3, chunk: int = 0, impl: str | None = None
) -> Int[Array, "b n"]:
    """h of `hard_attention`: for each place of the query, row by row, the number of the key's most alike one (any of equals), int32[b, h w]."""
    impl, rows = _settings(query.shape, size, chunk, impl)
    query, key = (lax.stop_gradient(x.astype(jnp.promote_types(x.dtype, jnp.float32))) for x in (query, key))
    if impl == "dense":
        return jnp.argmax(_all_scores(query, key, size), axis=-1).astype(jnp.int32)
    return _best(query, key, size, rows, impl)[1]


def _settings(shape: tuple[int, ...], size: int, chunk: int, impl: str | None) -> tuple[str, int]:
    """(form, rows of a chunk)."""
    impl = impl or "auto"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is unknown; choose one of {', '.join(IMPLEMENTATIONS)}")
    if size < 1 or size % 2 == 0 or chunk < 0:
        raise ValueError(f"hard attention wants an odd size and chunk >= 0, not {size} and {chunk}")
    if impl == "auto":
        impl = "product" if platform() == "tpu" else "shift"
    height, width = shape[1:3]
    fitting = _CHUNK_BYTES // (4 * width * height * width)
    return impl, min(height, chunk or max(1, min(fitting, _MOST_ROWS)))


def _offsets(size: int) -> list[tuple[int, int]]:
    return [(row, column) for row in range(size) for column in range(size)]


def _pad(x: Array, margin: int, value: float | int = 0) -> Array:
    return jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), *((0, 0),) * (x.ndim - 3)), constant_values=value)


def _unfold(x: Array, size: int) -> Array:
    """[b, h, w, size^2 c]: the patch around each place, zeros beyond the border."""
    h, w = x.shape[1:3]
    padded = _pad(x, size // 2)
    return jnp.concatenate([padded[:, row : row + h, column : column + w] for row, column in _offsets(size)], axis=-1)


def _box(x: Array, size: int) -> Array:
    """[b, h, w]: sums over the patch around each place."""
    h, w = x.shape[1:3]
    padded = _pad(x, size // 2)
    rows = sum(padded[:, row : row + h] for row in range(size))
    return sum(rows[:, :, column : column + w] for column in range(size))


def _inverse_norm(x: Array, size: int) -> Array:
    """[b, h, w]: one over the length of each patch, 0 for a patch of zeros: a large number would make its gradient explode."""
    square = _box(jnp.sum(x * x, axis=-1), size)
    return jnp.where(square > _SMALL, lax.rsqrt(jnp.maximum(square, _SMALL)), 0)


# ---- all at once: the reference


def _all_scores(query: Array, key: Array, size: int) -> Array:
    b, h, w, _ = query.shape
    q, k = (
        (_unfold(x, size) * _inverse_norm(x, size)[..., None]).reshape(b, h * w, -1) for x in (query, key)
    )
    return jnp.einsum("bic,bjc->bij", q, k, precision=lax.Precision.HIGHEST)


def _dense(query: Array, key: Array, value: Array, size: int) -> tuple[Array, Array]:
    b, h, w, c = query.shape
    scores = _all_scores(query, key, size)
    best = jnp.argmax(lax.stop_gradient(scores), axis=-1)[..., None]
    score = jnp.take_along_axis(scores, best, axis=2).reshape(b, h, w)
    patches = jnp.take_along_axis(_unfold(value, size).reshape(b, h * w, -1), best, axis=1).reshape(b, h, w, size * size, c)
    total = jnp.zeros((b, h + size - 1, w + size - 1, c), value.dtype)
    for number, (row, column) in enumerate(_offsets(size)):
        total = total.at[:, row : row + h, column : column + w].add(patches[:, :, :, number])
    margin = size // 2
    return total[:, margin : margin + h, margin : margin + w] / size**2, score


# ---- in chunks of rows


def _best(query: Array, key: Array, size: int, rows: int, impl: str) -> tuple[Array, Array]:
    """The greatest score of each query, [b, h, w], and the number of its key, int32[b, h w]."""
    b, h, w, c = query.shape
    margin, chunks = size // 2, -(-h // rows)
    norm = _inverse_norm(key, size)
    missing = chunks * rows - h  # the last chunk is filled up with rows of zeros
    if impl == "shift":
        queries = jnp.pad(query, ((0, 0), (margin, margin + missing), (margin, margin), (0, 0)))
        keys = _pad(key, margin)
        tall, wide = keys.shape[1:3]
        keys = keys.reshape(b, tall * wide, c).transpose(0, 2, 1)
    else:
        queries = jnp.pad(_unfold(query, size), ((0, 0), (0, missing), (0, 0), (0, 0)))
        keys = (_unfold(key, size) * norm[..., None]).reshape(b, h * w, -1).transpose(0, 2, 1)
    # The transposed copy is made once, not folded into the product of every chunk.
    keys = lax.optimization_barrier(keys)

    def scores(start: Array) -> Array:
        if impl == "product":
            part = lax.dynamic_slice_in_dim(queries, start, rows, axis=1).reshape(b, rows * w, -1)
            return jnp.matmul(part, keys, precision=lax.Precision.HIGHEST)
        part = lax.dynamic_slice_in_dim(queries, start, rows + 2 * margin, axis=1).reshape(b, -1, c)
        pixels = jnp.matmul(part, keys, precision=lax.Precision.HIGHEST).reshape(b, rows + 2 * margin, wide, tall, wide)
        across = sum(pixels[:, :, column : column + w, :, column : column + w] for column in range(size))
        patches = sum(across[:, row : row + rows, :, row : row + h] for row in range(size))
        return (patches * norm[:, None, None]).reshape(b, rows * w, h * w)

    value, number = lax.map(lambda start: _max_and_place(scores(start)), jnp.arange(chunks) * rows)
    value, number = (x.transpose(1, 0, 2).reshape(b, -1)[:, : h * w] for x in (value, number))
    return value.reshape(b, h, w) * _inverse_norm(query, size), number


def _max_and_place(x: Array) -> tuple[Array, Array]:
    """Maximum of the last axis and a place where it is. In one pass: `jnp.argmax` gives no value, and its care for NaN and for the first of equals
    costs a CPU nearly half as much again."""

    def greater(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        keeps = a[0] >= b[0]
        return jnp.where(keeps, a[0], b[0]), jnp.where(keeps, a[1], b[1])

    places = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    return lax.reduce((x, places), (jnp.array(-jnp.inf, x.dtype), jnp.int32(0)), greater, (x.ndim - 1,))


def _targets(best: Array, shape: tuple[int, ...], size: int) -> list[Array]:
    """For each offset s the row of the padded key that place p draws from, h(p - s) + s, int32[b, h w]; one beyond the end where p - s is outside."""
    b, h, w, _ = shape
    margin = size // 2
    wide, beyond = w + 2 * margin, (h + 2 * margin) * (w + 2 * margin)
    corner = (best // w * wide + best % w).reshape(b, h, w)
    return [
        _from(corner + (row * wide + column), row, column, size, beyond).reshape(b, h * w) for row, column in _offsets(size)
    ]


def _from(x: Array, row: int, column: int, size: int, fill: float | int = 0) -> Array:
    """[b, h, w]: at p the value at p - s, for the offset s that `row` and `column` (from the patch's corner) stand for."""
    h, w = x.shape[1:3]
    down, right = size - 1 - row, size - 1 - column
    return _pad(x, size // 2, fill)[:, down : down + h, right : right + w]


def _table(x: Array, size: int) -> Array:
    """The padded image as rows, with one row of zeros behind them."""
    return jnp.pad(_pad(x, size // 2).reshape(x.shape[0], -1, x.shape[3]), ((0, 0), (0, 1), (0, 0)))


def _fetch(table: Array, rows: Array) -> Array:
    # vmap and not one flat table: a batch that lies on several devices then stays where it is.
    return jax.vmap(lambda table, rows: table.at[rows].get(mode="promise_in_bounds"))(table, rows)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _chunked(query: Array, key: Array, value: Array, size: int, rows: int, impl: str) -> tuple[Array, Array]:
    return _forward(query, key, value, size, rows, impl)[0]


def _forward(query: Array, key: Array, value: Array, size: int, rows: int, impl: str):
    score, best = _best(query, key, size, rows, impl)
    table = _table(value, size)
    total = sum(_fetch(table, target) for target in _targets(best, value.shape, size))
    return (total.reshape(value.shape) / size**2, score), (query, key, score, best)


def _backward(size: int, rows: int, impl: str, kept: tuple[Array, ...], cotangents: tuple[Array, Array]):
    """S_i = sum_s <q_{i+s}, k_{h_i+s}> / (|q_i| |k_{h_i}|), derived by hand; with p = i + s every sum is over the offsets s at a place p."""
    query, key, score, best = kept
    by_transferred, by_score = cotangents
    b, h, w, c = query.shape
    query_norm, key_norm = _inverse_norm(query, size), _inverse_norm(key, size)
    found_norm = jnp.take_along_axis(key_norm.reshape(b, h * w), best, axis=1).reshape(b, h, w)
    weight = by_score * query_norm * found_norm
    shrink = by_score * score  # the norms' own share
    table, targets = _table(key, size), _targets(best, query.shape, size)
    weights = [_from(weight, row, column, size).reshape(b, h * w, 1) for row, column in _offsets(size)]
    to_query = sum(_fetch(table, target) * share for target, share in zip(targets, weights, strict=True)).reshape(query.shape)
    to_query = to_query - query * _box(shrink * query_norm**2, size)[..., None]

    pixels, spread = query.reshape(b, h * w, c), (by_transferred / size**2).reshape(b, h * w, c)
    add = jax.vmap(lambda total, rows, part: total.at[rows].add(part, mode="promise_in_bounds"))
    total = jnp.zeros((b, table.shape[1], 2 * c), query.dtype)
    for target, share in zip(targets, weights, strict=True):
        total = add(total, target, jnp.concatenate([pixels * share, spread], axis=-1))
    margin = size // 2
    total = total[:, :-1].reshape(b, h + 2 * margin, w + 2 * margin, 2 * c)[:, margin : margin + h, margin : margin + w]
    shrunk = add(jnp.zeros((b, h * w), key.dtype), best, shrink.reshape(b, h * w)).reshape(b, h, w) * key_norm**2
    to_key = total[..., :c] - key * _box(shrunk, size)[..., None]
    return to_query, to_key, total[..., c:]


_chunked.defvjp(_forward, _backward)
