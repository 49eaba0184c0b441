"""The linear maps under the wavelet transforms: one level of analysis in two dimensions and its transpose, as a pair of JAX primitives.

Each is the other's transpose, written out by hand, so reverse mode runs the same fast loops as the forward pass; forward mode, `vmap`,
`jit`, `linear_transpose` and any order of derivative follow because both are linear. Synthesis (the inverse transform) is the transpose of
analysis with the reconstruction filters. The lowering is plain XLA, which the partitioner may shard over the leading dimensions.

Why these loops, on XLA's CPU backend (two threads, float32; minima of a busy machine, in copies `x * c` of the image):
* db4 forward of 32x224x224x3: extend one axis, split it into even and odd samples, sum shifted slices, rows before columns: 7. Strided slices
  of an image padded whole: 16; border strips computed apart and joined: 35. Images one by one through `lax.map` cost half as much again to twice.
* the transpose derived by autodiff pads every slice and adds: 3.5 times the forward pass. By hand it is a synthesis, about one forward pass:
  only the outputs inside the image, then the few samples beyond the border are computed apart and added where they came from.
* two taps (Haar): four strided slices of the image in one loop, 1.6 to 2.5; the transpose writes the four phases with one stack and reshape, 1.3,
  where axis by axis takes 3.3.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from wavepath.ops.wavelet_filters import Bank, WaveletError, compute_dtype

# jnp.pad's names; pywt's "constant" repeats the edge, and jnp's "constant" is pywt's "zero".
_PAD = {"symmetric": "symmetric", "reflect": "reflect", "zero": "constant", "periodic": "wrap", "constant": "edge"}


def extend(x: Array, axis: int, before: int, after: int, mode: str) -> Array:
    """`jnp.pad` of one axis, in its names of modes, also where the border is wider than the image."""
    size = x.shape[axis]
    if before == after == 0:
        return x
    if mode == "reflect" and size == 1:
        raise WaveletError("mode reflect needs at least two pixels along each axis; use symmetric or constant")
    if mode != "constant" and max(before, after) >= size:
        # Many times round a tiny image: jnp.pad would unroll into a chain of concatenations.
        return jnp.take(x, np.pad(np.arange(size), (before, after), mode=mode), axis=axis)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (before, after)
    return jnp.pad(x, widths, mode=mode)


def _phases(x: Array, axis: int) -> tuple[Array, Array]:
    """Even and odd samples along an axis of even length."""
    pairs = x.reshape(*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
    even, odd = lax.split(pairs, (1, 1), axis=axis + 1)
    return even.squeeze(axis + 1), odd.squeeze(axis + 1)


def _interleave(even: Array, odd: Array, axis: int) -> Array:
    """The inverse of `_phases`."""
    shape = list(even.shape)
    shape[axis] *= 2
    return jnp.stack([even, odd], axis + 1).reshape(shape)


def coefficients(size: int, taps: int, mode: str) -> int:
    """How many coefficients an axis of `size` samples has after one level."""
    return (size + 1) // 2 if mode == "periodization" else (size + taps - 1) // 2


def _borders(size: int, taps: int, mode: str) -> tuple[int, int]:
    """Samples that analysis adds before and after an axis."""
    if mode == "periodization":
        return taps // 2 - 1, taps // 2 - 1
    return taps - 2, 2 * coefficients(size, taps, mode) - size


def _analyse(x: Array, bank: Bank, mode: str, axis: int) -> tuple[Array, Array]:
    """One level along one axis: low- and high-pass halves."""
    taps, n = len(bank.dec_lo), x.shape[axis]
    before, after = _borders(n, taps, mode)
    if mode == "periodization":
        # PyWavelets repeats the last sample of an odd signal before it wraps round.
        x = extend(extend(x, axis, 0, n % 2, "edge"), axis, before, after, "wrap")
    else:
        x = extend(x, axis, before, after, _PAD[mode])
    phases, size = _phases(x, axis), coefficients(n, taps, mode)
    low = high = None
    for k in range(taps):
        part = lax.slice_in_dim(phases[k % 2], k // 2, k // 2 + size, axis=axis)
        low = part * bank.dec_lo[k] if low is None else low + part * bank.dec_lo[k]
        high = part * bank.dec_hi[k] if high is None else high + part * bank.dec_hi[k]
    return low, high


def _synthesise(low: Array, high: Array, lo: tuple[float, ...], hi: tuple[float, ...], wraps: bool, axis: int) -> Array:
    """Upsample, filter and add: the 2n - L + 2 samples all of whose coefficients exist, or with `wraps` all 2n of a period."""
    half, n = len(lo) // 2, low.shape[axis]
    if wraps:
        # x[t] = sum_n g[t + L/2 - 1 - 2n] a[n mod N]: pad both bands by wrapping, then filter phase by phase.
        low, high = extend(low, axis, half, half, "wrap"), extend(high, axis, half, half, "wrap")
        size, starts = n, [((p + half - 1) % 2, (p + half - 1) // 2 + half) for p in (0, 1)]
    else:
        size, starts = n - half + 1, [(p, half - 1) for p in (0, 1)]
    phases = []
    for offset, start in starts:
        total = None
        for k in range(half):
            a = lax.slice_in_dim(low, start - k, start - k + size, axis=axis)
            d = lax.slice_in_dim(high, start - k, start - k + size, axis=axis)
            part = a * lo[2 * k + offset] + d * hi[2 * k + offset]
            total = part if total is None else total + part
        phases.append(total)
    return _interleave(*phases, axis)


def _add(x: Array, part: Array, start: int, axis: int) -> Array:
    """`x` with `part` added from `start` on along an axis; an update in place, never a scatter."""
    here = lax.slice_in_dim(x, start, start + part.shape[axis], axis=axis)
    return lax.dynamic_update_slice_in_dim(x, here + part, start, axis)


def _fold(x: Array, strip: Array, mode: str, axis: int, after: bool) -> Array:
    """Adds what fell on the samples beyond one border to the samples of the image that they repeat."""
    size, width = x.shape[axis], strip.shape[axis]
    if width == 0 or mode == "zero":
        return x
    if mode == "constant":
        return _add(x, strip.sum(axis, keepdims=True), size - 1 if after else 0, axis)
    if mode == "periodic":
        return _add(x, strip, 0 if after else size - width, axis)
    inset = 1 if mode == "reflect" else 0
    return _add(x, jnp.flip(strip, axis), size - width - inset if after else inset, axis)


def _analyse_transposed(low: Array, high: Array, bank: Bank, mode: str, axis: int, size: int) -> Array:
    """The transpose of `_analyse` along one axis of `size` samples."""
    taps, n = len(bank.dec_lo), low.shape[axis]
    lo, hi = bank.dec_lo, bank.dec_hi
    if mode == "periodization":
        x = _synthesise(low, high, lo, hi, True, axis)
        if size % 2:
            x = _add(lax.slice_in_dim(x, 0, size, axis=axis), lax.slice_in_dim(x, size, size + 1, axis=axis), size - 1, axis)
        return x
    before, after = _borders(size, taps, mode)
    if mode != "zero" and max(before, after) >= size:
        # The extension goes many times round a tiny image.
        shape = (*low.shape[:axis], size, *low.shape[axis + 1 :])
        analyse = partial(_analyse, bank=bank, mode=mode, axis=axis)
        return jax.linear_transpose(analyse, jax.ShapeDtypeStruct(shape, low.dtype))((low, high))[0]
    x = lax.slice_in_dim(_synthesise(low, high, lo, hi, False, axis), 0, size, axis=axis)

    def beyond(start: int, stop: int, first: int, last: int) -> Array:
        """Samples start..stop of the extended axis from coefficients first..last, by padding them with the zeros that lie outside."""
        widths = [(0, 0)] * low.ndim
        widths[axis] = (taps // 2 - 1, taps // 2 - 1)
        bands = (jnp.pad(lax.slice_in_dim(band, first, last, axis=axis), widths) for band in (low, high))
        return lax.slice_in_dim(_synthesise(*bands, lo, hi, False, axis), start - 2 * first, stop - 2 * first, axis=axis)

    if mode != "zero":
        if before:
            x = _fold(x, beyond(0, before, 0, min(n, taps // 2 - 1)), mode, axis, after=False)
        if after:
            # Sample t has part in coefficients (t - L + 2) / 2 to t / 2.
            first = max(0, (before + size - taps + 2) // 2)
            x = _fold(x, beyond(before + size, before + size + after, first, n), mode, axis, after=True)
    return x


def _two_taps(x: Array, bank: Bank, rows: int, columns: int) -> tuple[Array, Array, Array, Array]:
    """Analysis with two taps and even sizes, where no border is seen: each 2 x 2 samples make one coefficient of every band."""

    def samples(i: int, j: int) -> Array:
        strides = tuple(2 if axis in (rows, columns) else 1 for axis in range(x.ndim))
        starts = tuple({rows: i, columns: j}.get(axis, 0) for axis in range(x.ndim))
        return lax.slice(x, starts, x.shape, strides)

    lo, hi = bank.dec_lo, bank.dec_hi
    if lo[0] == lo[1] == abs(hi[0]) == abs(hi[1]) and hi[0] == -hi[1]:
        # Haar: sums and differences, scaled once. A quarter of the products of the general form, which decides at this little work a sample.
        sign = 1.0 if hi[0] > 0 else -1.0
        a, b, c, d = (samples(i, j) for i in (0, 1) for j in (0, 1))
        scale = lo[0] * lo[0]
        return (a + b + c + d) * scale, (a + b - c - d) * (sign * scale), (a - b + c - d) * (sign * scale), (a - b - c + d) * scale

    def along(first: Array, second: Array) -> tuple[Array, Array]:
        return first * lo[0] + second * lo[1], first * hi[0] + second * hi[1]

    (low, high), (low_next, high_next) = (along(samples(0, j), samples(1, j)) for j in (0, 1))
    (ll, hl), (lh, hh) = along(low, low_next), along(high, high_next)
    return ll, lh, hl, hh


def _forward(x: Array, bank: Bank, mode: str, rows: int, columns: int) -> tuple[Array, Array, Array, Array]:
    wide = x.astype(compute_dtype(x.dtype))
    if len(bank.dec_lo) == 2 and x.shape[rows] % 2 == x.shape[columns] % 2 == 0:
        bands = _two_taps(wide, bank, rows, columns)
    else:
        low, high = _analyse(wide, bank, mode, rows)
        ll, hl = _analyse(low, bank, mode, columns)
        lh, hh = _analyse(high, bank, mode, columns)
        bands = ll, lh, hl, hh
    return tuple(band.astype(x.dtype) for band in bands)


def _two_taps_transposed(bands: tuple[Array, ...], bank: Bank, rows: int, columns: int) -> Array:
    """Synthesis with two taps: every coefficient makes its own 2 x 2 samples, written at once."""
    ll, lh, hl, hh = bands
    lo, hi = bank.dec_lo, bank.dec_hi
    first, second = sorted((rows, columns))

    def sample(i: int, j: int) -> Array:
        p, q = (i, j) if rows < columns else (j, i)
        return (ll * lo[p] + lh * hi[p]) * lo[q] + (hl * lo[p] + hh * hi[p]) * hi[q]

    shape = list(ll.shape)
    shape[first] *= 2
    shape[second] *= 2
    return jnp.stack([jnp.stack([sample(i, 0), sample(i, 1)], second + 1) for i in (0, 1)], first + 1).reshape(shape)


def _transposed(bands: tuple[Array, ...], bank: Bank, mode: str, rows: int, columns: int, height: int, width: int) -> Array:
    dtype = jnp.result_type(*bands)
    ll, lh, hl, hh = bands = tuple(band.astype(compute_dtype(dtype)) for band in bands)
    if len(bank.dec_lo) == 2 and height % 2 == width % 2 == 0:
        return _two_taps_transposed(bands, bank, rows, columns).astype(dtype)
    low = _analyse_transposed(ll, hl, bank, mode, columns, width)
    high = _analyse_transposed(lh, hh, bank, mode, columns, width)
    return _analyse_transposed(low, high, bank, mode, rows, height).astype(dtype)


# Compiled as wholes, so that calls outside `jit` do not pay for some fifty small operations.
@partial(jax.jit, static_argnames=("bank", "mode", "axes", "sizes"))
def _analysis_impl(x, *, bank, mode, axes, sizes):
    return _forward(x, bank, mode, *axes)


@partial(jax.jit, static_argnames=("bank", "mode", "axes", "sizes"))
def _transpose_impl(*bands, bank, mode, axes, sizes):
    return [_transposed(bands, bank, mode, *axes, *sizes)]


analysis_p = Primitive("wavelet_analysis")
transpose_p = Primitive("wavelet_analysis_transpose")
analysis_p.multiple_results = transpose_p.multiple_results = True
analysis_p.def_impl(_analysis_impl)
transpose_p.def_impl(_transpose_impl)


def _with_sizes(shape, axes, sizes) -> tuple[int, ...]:
    shape = list(shape)
    for axis, size in zip(axes, sizes, strict=True):
        shape[axis] = size
    return tuple(shape)


def _analysis_abstract(x, *, bank, mode, axes, sizes):
    halves = [coefficients(size, len(bank.dec_lo), mode) for size in sizes]
    return [x.update(shape=_with_sizes(x.shape, axes, halves), weak_type=False)] * 4


def _transpose_abstract(*bands, bank, mode, axes, sizes):
    return [bands[0].update(shape=_with_sizes(bands[0].shape, axes, sizes), weak_type=False)]


def _analysis_transpose(cotangents, x, **params):
    return transpose_p.bind(*map(ad.instantiate_zeros, cotangents), **params)


def _transpose_transpose(cotangents, *bands, **params):
    pulled = analysis_p.bind(ad.instantiate_zeros(cotangents[0]), **params)
    return [ct if ad.is_undefined_primal(band) else None for ct, band in zip(pulled, bands, strict=True)]


def _analysis_batch(arguments, dims, *, axes, **params):
    (x,), (dim,) = arguments, dims
    # The transform knows two axes and leaves the rest alone: count them past the new one.
    return analysis_p.bind(x, axes=tuple(axis + (axis >= dim) for axis in axes), **params), [dim] * 4


def _transpose_batch(bands, dims, *, axes, **params):
    size = next(band.shape[dim] for band, dim in zip(bands, dims, strict=True) if dim is not None)
    front = [
        jnp.broadcast_to(band, (size, *band.shape)) if dim is None else jnp.moveaxis(band, dim, 0)
        for band, dim in zip(bands, dims, strict=True)
    ]
    return transpose_p.bind(*front, axes=tuple(axis + 1 for axis in axes), **params), [0]


for _primitive, _abstract, _transpose, _batch in (
    (analysis_p, _analysis_abstract, _analysis_transpose, _analysis_batch),
    (transpose_p, _transpose_abstract, _transpose_transpose, _transpose_batch),
):
    _primitive.def_abstract_eval(_abstract)
    ad.deflinear2(_primitive, _transpose)
    batching.primitive_batchers[_primitive] = _batch
mlir.register_lowering(analysis_p, mlir.lower_fun(_analysis_impl.__wrapped__, multiple_results=True))
mlir.register_lowering(transpose_p, mlir.lower_fun(_transpose_impl.__wrapped__, multiple_results=True))


def analyse2(x: Array, bank: Bank, mode: str, rows: int, columns: int) -> tuple[Array, Array, Array, Array]:
    """One level of analysis: (ll, lh, hl, hh), linear in `x`. Arguments are those of `dwt2`, checked; axes count from the front."""
    return tuple(analysis_p.bind(x, bank=bank, mode=mode, axes=(rows, columns), sizes=(x.shape[rows], x.shape[columns])))


def synthesise2(bands: tuple[Array, Array, Array, Array], bank: Bank, mode: str, rows: int, columns: int) -> Array:
    """One level of synthesis, 2n samples a side with periodization and 2n - L + 2 otherwise."""
    dtype = jnp.result_type(*bands)
    grow = (lambda n: 2 * n) if mode == "periodization" else (lambda n: 2 * n - len(bank.rec_lo) + 2)
    sizes = tuple(grow(bands[0].shape[axis]) for axis in (rows, columns))
    wraps = mode if mode == "periodization" else "zero"
    (x,) = transpose_p.bind(*(band.astype(dtype) for band in bands), bank=bank.adjoint(), mode=wraps, axes=(rows, columns), sizes=sizes)
    return x
