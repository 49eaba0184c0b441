"""Formulations of the co-occurrence matrix, all equal to rounding: `scatter`, `matmul` and `scan`. `wavepath.ops.glcm` chooses among them.

With M the memberships of the pixels and M' those of their neighbours, the matrix is M^T M'. `matmul` says just that and keeps M, a row of
`levels` for each pixel. `scan` does so for a few image rows at a time and recomputes them for the gradient. `scatter` uses that a pixel touches
`count` levels, so a pair of pixels adds one small window to the matrix; the transpose of that is a gather of windows.
"""

import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from wavepath.ops.glcm_membership import GlcmError, Membership, dense, windowed

Offsets = tuple[tuple[int, int], ...]

# Bytes of memberships that one block of `scan` may hold.
_SCAN_BYTES = 16 * 2**20
_HIGHEST = lax.Precision.HIGHEST


def check_offsets(offsets: Sequence, height: int, width: int) -> Offsets:
    """Offsets as a tuple of (drow, dcol); raises GlcmError where one is no pair or leaves no pair of pixels in the image."""
    try:
        pairs = tuple((operator.index(drow), operator.index(dcol)) for drow, dcol in offsets)
    except (TypeError, ValueError) as error:
        remedy = "such as ((0, 1), (1, 0)); see offsets_from for angles"
        raise GlcmError(f"offsets={offsets!r} must be pairs of whole numbers (drow, dcol), {remedy}") from error
    if not pairs:
        raise GlcmError("offsets is empty: name at least one (drow, dcol), such as ((0, 1),)")
    for drow, dcol in pairs:
        if abs(drow) >= height or abs(dcol) >= width:
            raise GlcmError(f"offset ({drow}, {dcol}) leaves no pair of pixels in an image of {height} x {width}; use a smaller distance")
    return pairs


def pair_counts(offsets: Offsets, height: int, width: int) -> tuple[int, ...]:
    """Pairs of pixels at each offset."""
    return tuple((height - abs(drow)) * (width - abs(dcol)) for drow, dcol in offsets)


def pair(a: Array, offset: tuple[int, int], axis: int = 1) -> tuple[Array, Array]:
    """The pixels that have a neighbour at the offset, and those neighbours; `axis` is the rows' axis, the columns' follows."""
    lead = (slice(None),) * axis

    def part(d: int, size: int) -> tuple[slice, slice]:
        return slice(max(0, -d), size - max(0, d)), slice(max(0, d), size + min(0, d))

    rows, cols = part(offset[0], a.shape[axis]), part(offset[1], a.shape[axis + 1])
    return a[(*lead, rows[0], cols[0])], a[(*lead, rows[1], cols[1])]


def windows(v: Float[Array, "b h w"], m: Membership, offsets: Offsets, mask: Array | None = None) -> tuple[Array, Array]:
    """Every pair of pixels as a window of a matrix: the products of memberships [p, n, n], and where each begins [p, 3].

    The first index counts matrices, `b * len(offsets)` of them, images first.
    """
    start, weights = windowed(v, m)
    if mask is not None:
        weights = weights * mask[..., None].astype(weights.dtype)
    batch, values, places = v.shape[0], [], []
    for number, offset in enumerate(offsets):
        (row, col), (one, other) = pair(start, offset), pair(weights, offset)
        matrix = jnp.arange(batch, dtype=jnp.int32)[:, None, None] * len(offsets) + number
        places.append(jnp.stack([jnp.broadcast_to(matrix, row.shape), row, col], -1).reshape(-1, 3))
        values.append((one[..., :, None] * other[..., None, :]).reshape(-1, m.count, m.count))
    return jnp.concatenate(values), jnp.concatenate(places)


_ADD = lax.ScatterDimensionNumbers(update_window_dims=(1, 2), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 1, 2))
_TAKE = lax.GatherDimensionNumbers(offset_dims=(1, 2), collapsed_slice_dims=(0,), start_index_map=(0, 1, 2))
_INSIDE = lax.GatherScatterMode.PROMISE_IN_BOUNDS  # windowed() keeps every window inside its matrix


def add_windows(values: Array, places: Array, matrices: int, levels: int) -> Float[Array, "m l l"]:
    """Matrices as the sum of windows."""
    return lax.scatter_add(jnp.zeros((matrices, levels, levels), values.dtype), places, values, _ADD, mode=_INSIDE)


def take_windows(matrices: Float[Array, "m l l"], places: Array, count: int) -> Float[Array, "p n n"]:
    """The windows of matrices at the places given."""
    return lax.gather(matrices, places, _TAKE, (1, count, count), mode=_INSIDE)


def scatter(v: Float[Array, "b h w"], m: Membership, offsets: Offsets, mask: Array | None) -> Float[Array, "b o l l"]:
    """One scatter of windows."""
    values, places = windows(v, m, offsets, mask)
    matrices = add_windows(values, places, v.shape[0] * len(offsets), m.levels)
    return matrices.reshape(v.shape[0], len(offsets), m.levels, m.levels)


def matmul(v: Float[Array, "b h w"], m: Membership, offsets: Offsets, mask: Array | None) -> Float[Array, "b o l l"]:
    """One product of memberships for each offset."""
    weights = dense(v, m)
    if mask is not None:
        weights = weights * mask[..., None].astype(weights.dtype)
    products = [jnp.einsum("bhwi,bhwj->bij", *pair(weights, offset), precision=_HIGHEST) for offset in offsets]
    return jnp.stack(products, 1)


def scan(v: Float[Array, "b h w"], m: Membership, offsets: Offsets, mask: Array | None) -> Float[Array, "b o l l"]:
    """The product block by block of rows; memberships live for one block alone, in the gradient too."""
    batch, height, width = v.shape
    # A matrix of the opposite offset is the transpose, so that neighbours lie in the same row or below.
    down = [(drow, dcol) if drow >= 0 else (-drow, -dcol) for drow, dcol in offsets]
    reach = max(drow for drow, _ in down)
    rows = max(1, min(height, _SCAN_BYTES // (batch * width * m.levels * v.dtype.itemsize) - reach))
    blocks = -(-height // rows)
    inside = jnp.ones((batch, height, width), v.dtype) if mask is None else mask.astype(v.dtype)
    below = ((0, 0), (0, blocks * rows + reach - height), (0, 0))
    v, inside = jnp.pad(v, below), jnp.pad(inside, below)

    @jax.checkpoint
    def block(total: Array, first: Array) -> tuple[Array, None]:
        weights = dense(lax.dynamic_slice_in_dim(v, first, rows + reach, 1), m)
        weights = weights * lax.dynamic_slice_in_dim(inside, first, rows + reach, 1)[..., None]
        products = []
        for drow, dcol in down:
            one, other = pair(weights[:, : rows + drow], (drow, dcol))
            products.append(jnp.einsum("bhwi,bhwj->bij", one, other, precision=_HIGHEST))
        return total + jnp.stack(products, 1), None

    zeros = jnp.zeros((batch, len(offsets), m.levels, m.levels), v.dtype)
    total, _ = lax.scan(block, zeros, jnp.arange(blocks, dtype=jnp.int32) * rows)
    flipped = [total[:, k] if drow >= 0 else total[:, k].mT for k, (drow, _) in enumerate(offsets)]
    return jnp.stack(flipped, 1)


FORMULATIONS = {"scatter": scatter, "matmul": matmul, "scan": scan}
