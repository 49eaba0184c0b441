"""Discrete wavelet transforms of images: differentiable, channels last, equal to PyWavelets.

Every discrete wavelet of PyWavelets, its boundary modes, any size (odd too), any two axes, any leading dimensions. Names of the bands:

| here | PyWavelets | filters along (axes[0], axes[1]) | answers to |
|------|-----------|----------------------------------|------------|
| `ll` | cA        | low, low                         | the image at half size (times two for an orthonormal wavelet) |
| `lh` | cH        | high, low                        | horizontal edges |
| `hl` | cV        | low, high                        | vertical edges |
| `hh` | cD        | high, high                       | diagonal detail |

Formulation: extend the axis once, split it into its even and odd samples (the polyphase components), and sum shifted unit-stride slices
of the two, `out[i] = sum_k f[2k] even[i+k] + f[2k+1] odd[i+k]`. The transposes of split and unit-stride slice are concatenation and padding,
so gradients need no scatter, and jit, vmap, grad and forward mode all follow from the primitives. Half-precision inputs are computed in
float32 and returned in their own type.
"""

import difflib
import warnings
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pywt
from jax import Array, lax
from jaxtyping import Float, Shaped

from wavepath.errors import WavepathError

MODES = ("periodization", "symmetric", "reflect", "zero", "periodic", "constant")

# jnp.pad's names; pywt's "constant" repeats the edge, and jnp's "constant" is pywt's "zero".
_PAD = {"symmetric": "symmetric", "reflect": "reflect", "zero": "constant", "periodic": "wrap", "constant": "edge"}


class WaveletError(WavepathError, ValueError):
    """A wavelet, boundary mode, axis, level or shape that does not exist or does not fit; the message names what does."""


class Subbands(NamedTuple):
    """One level of a 2-D transform; PyWavelets: `(cA, (cH, cV, cD))`."""

    ll: Array
    lh: Array | None
    hl: Array | None
    hh: Array | None


class Details(NamedTuple):
    """The three detail bands of one level of `wavedec2`; PyWavelets: `(cH, cV, cD)`."""

    lh: Array | None
    hl: Array | None
    hh: Array | None


class Bank(NamedTuple):
    """Filter taps as plain floats, which take the array's type. Analysis is reversed, so that it is a correlation; lengths are even."""

    dec_lo: tuple[float, ...]
    dec_hi: tuple[float, ...]
    rec_lo: tuple[float, ...]
    rec_hi: tuple[float, ...]


@lru_cache(maxsize=256)
def _named_wavelet(name: str) -> pywt.Wavelet:
    known = pywt.wavelist(kind="discrete")
    if name.lower() in ("haar", *known):
        return pywt.Wavelet(name)
    near = difflib.get_close_matches(name, known, 1)
    if name in pywt.wavelist(kind="continuous"):
        raise WaveletError(f"{name!r} is a continuous wavelet and has no discrete transform; use one such as db4 or sym4")
    raise WaveletError(f"unknown wavelet {name!r}" + (f"; did you mean {near[0]!r}?" if near else "; names are pywt.wavelist(kind='discrete')"))


def filter_bank(wavelet: str | pywt.Wavelet) -> Bank:
    """The filters of a discrete wavelet. Raises WaveletError, naming the nearest name, where there is none of that name."""
    w = wavelet if isinstance(wavelet, pywt.Wavelet) else _named_wavelet(wavelet)
    return Bank(tuple(w.dec_lo[::-1]), tuple(w.dec_hi[::-1]), tuple(w.rec_lo), tuple(w.rec_hi))


def check_mode(mode: str) -> None:
    """Raises WaveletError for a boundary mode that does not exist."""
    if mode not in MODES:
        near = difflib.get_close_matches(mode, MODES, 1)
        raise WaveletError(f"unknown boundary mode {mode!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(MODES)}"))


def _check_axes(ndim: int, axes: Sequence[int]) -> tuple[int, int]:
    if len(axes) != 2 or any(not -ndim <= axis < ndim for axis in axes) or len({axis % ndim for axis in axes}) != 2:
        raise WaveletError(f"axes={tuple(axes)} must be two different axes of the {ndim} there are; a plain [h, w] image takes axes=(-2, -1)")
    return axes[0] % ndim, axes[1] % ndim


def _check_float(x, function: str) -> Array:
    """Integers are refused rather than promoted: whether 255 means 255 or 1 is the caller's to say."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{function} takes floating-point values and got {x.dtype}: convert first, with wavepath.ops.stain.to_float(image) "
            "for uint8 images in [0, 1] or with .astype('float32') to keep the values"
        )
    return jnp.asarray(x)


def _compute_dtype(dtype) -> jnp.dtype:
    """float32 for half-precision inputs: a sum of up to 76 products keeps three digits in bfloat16."""
    return jnp.promote_types(dtype, jnp.float32)


def _pad(x: Array, axis: int, before: int, after: int, mode: str) -> Array:
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


def _analyse(x: Array, bank: Bank, mode: str, axis: int) -> tuple[Array, Array]:
    """One level along one axis: low- and high-pass halves of length (n + L - 1) // 2, or ceil(n / 2) with periodization."""
    taps, n = len(bank.dec_lo), x.shape[axis]
    if mode == "periodization":
        if n % 2:
            # PyWavelets repeats the last sample of an odd signal before it wraps round.
            x = _pad(x, axis, 0, 1, "edge")
        size, x = (n + 1) // 2, _pad(x, axis, taps // 2 - 1, taps // 2 - 1, "wrap")
    else:
        size = (n + taps - 1) // 2
        x = _pad(x, axis, taps - 2, 2 * size - n, _PAD[mode])
    phases = _phases(x, axis)
    low = high = None
    for k in range(taps):
        part = lax.slice_in_dim(phases[k % 2], k // 2, k // 2 + size, axis=axis)
        low = part * bank.dec_lo[k] if low is None else low + part * bank.dec_lo[k]
        high = part * bank.dec_hi[k] if high is None else high + part * bank.dec_hi[k]
    return low, high


def _synthesise(low: Array, high: Array, bank: Bank, mode: str, axis: int) -> Array:
    """The inverse of `_analyse`: length 2n - L + 2, or 2n with periodization; one more than the signal where that was odd."""
    taps, n = len(bank.rec_lo), low.shape[axis]
    half = taps // 2
    if mode == "periodization":
        # x[t] = sum_n g[t + L/2 - 1 - 2n] a[n mod N]: pad both bands by wrapping, then filter phase by phase.
        low, high = _pad(low, axis, half, half, "wrap"), _pad(high, axis, half, half, "wrap")
        size, starts = n, [((p + half - 1) % 2, (p + half - 1) // 2 + half) for p in (0, 1)]
    else:
        size, starts = n - half + 1, [(p, half - 1) for p in (0, 1)]
    phases = []
    for offset, start in starts:
        total = None
        for k in range(half):
            a = lax.slice_in_dim(low, start - k, start - k + size, axis=axis)
            d = lax.slice_in_dim(high, start - k, start - k + size, axis=axis)
            part = a * bank.rec_lo[2 * k + offset] + d * bank.rec_hi[2 * k + offset]
            total = part if total is None else total + part
        phases.append(total)
    return _interleave(*phases, axis)


# Compiled as wholes, so that calls outside `jit` do not pay for some fifty small operations; inside `jit` they dissolve (inline).
@partial(jax.jit, static_argnums=(1, 2, 3, 4), inline=True)
def _forward(x: Array, bank: Bank, mode: str, rows: int, columns: int) -> Subbands:
    low, high = _analyse(x.astype(_compute_dtype(x.dtype)), bank, mode, rows)
    ll, hl = _analyse(low, bank, mode, columns)
    lh, hh = _analyse(high, bank, mode, columns)
    return Subbands(*(band.astype(x.dtype) for band in (ll, lh, hl, hh)))


@partial(jax.jit, static_argnums=(1, 2, 3, 4), inline=True)
def _inverse(bands: tuple[Array, Array, Array, Array], bank: Bank, mode: str, rows: int, columns: int) -> Array:
    dtype = jnp.result_type(*bands)
    ll, lh, hl, hh = (band.astype(_compute_dtype(dtype)) for band in bands)
    low, high = _synthesise(ll, hl, bank, mode, columns), _synthesise(lh, hh, bank, mode, columns)
    return _synthesise(low, high, bank, mode, rows).astype(dtype)


def dwt2(
    x: Shaped[Array | np.ndarray, "..."],
    wavelet: str | pywt.Wavelet = "haar",
    mode: str = "periodization",
    axes: tuple[int, int] = (-3, -2),
) -> Subbands:
    """One level of the 2-D discrete wavelet transform; equal to `pywt.dwt2`.

    Args:
        x: floating-point array with at least two dimensions; `[..., height, width, channel]` with the default axes.
        wavelet: a name from `pywt.wavelist(kind="discrete")`, or a `pywt.Wavelet`.
        mode: what lies beyond the border: `periodization` (n/2 coefficients a side; keeps the energy of an orthogonal wavelet when sizes
            are even), or `symmetric`, `reflect`, `zero`, `periodic`, `constant` ((n + L - 1) // 2 coefficients for L taps).
        axes: the (vertical, horizontal) axes.

    Returns:
        `Subbands(ll, lh, hl, hh)` with the two axes halved, in the type of `x` (the module's table says which band is which).

    Raises:
        TypeError: for integers, which have no obvious scale.
        WaveletError: for a wavelet, mode or axes that do not exist.
    """
    x = _check_float(x, "dwt2")
    check_mode(mode)
    rows, columns = _check_axes(x.ndim, axes)
    if 0 in (x.shape[rows], x.shape[columns]):
        raise WaveletError(f"an image of {x.shape[rows]}x{x.shape[columns]} pixels has no transform")
    return _forward(x, filter_bank(wavelet), mode, rows, columns)


def idwt2(
    bands: Sequence[Array | np.ndarray | None],
    wavelet: str | pywt.Wavelet = "haar",
    mode: str = "periodization",
    axes: tuple[int, int] = (-3, -2),
    shape: tuple[int, int] | None = None,
) -> Shaped[Array, "..."]:
    """The inverse of `dwt2`; equal to `pywt.idwt2`.

    Args:
        bands: `Subbands` or any (ll, lh, hl, hh); a band that is None counts as zeros.
        wavelet, mode, axes: as given to `dwt2`.
        shape: (height, width) to return. A transform cannot tell an odd size from the next even one, so without `shape` an odd image
            comes back one row or column larger, as in PyWavelets.

    Raises:
        WaveletError: where the bands differ in shape, are shorter than the filter allows, or `shape` is not theirs.
    """
    check_mode(mode)
    given = [_check_float(band, "idwt2") for band in bands if band is not None]
    if len(bands) != 4 or not given:
        raise WaveletError("idwt2 takes the four bands (ll, lh, hl, hh), at least one of them not None")
    if len({band.shape for band in given}) != 1:
        raise WaveletError(f"bands of different shapes: {', '.join(str(band.shape) for band in given)}")
    rows, columns = _check_axes(given[0].ndim, axes)
    bank = filter_bank(wavelet)
    shortest = 1 if mode == "periodization" else len(bank.rec_lo) // 2
    if min(given[0].shape[rows], given[0].shape[columns]) < shortest:
        height, width = given[0].shape[rows], given[0].shape[columns]
        raise WaveletError(f"bands of {height}x{width} are too short: this wavelet makes at least {shortest} coefficients a side")
    image = _inverse(tuple(jnp.zeros_like(given[0]) if b is None else jnp.asarray(b) for b in bands), bank, mode, rows, columns)
    if shape is None:
        return image
    for axis, wanted in ((rows, shape[0]), (columns, shape[1])):
        if wanted not in (image.shape[axis], image.shape[axis] - 1):
            raise WaveletError(f"shape={tuple(shape)} is not of these bands: {image.shape[rows]}x{image.shape[columns]} or one fewer a side is")
        image = lax.slice_in_dim(image, 0, wanted, axis=axis)
    return image


def max_level(height: int, width: int, wavelet: str | pywt.Wavelet) -> int:
    """The deepest level at which a coefficient is still free of the border: `pywt.dwtn_max_level`."""
    return pywt.dwt_max_level(min(height, width), len(filter_bank(wavelet).dec_lo))


def wavedec2(
    x: Shaped[Array | np.ndarray, "..."],
    wavelet: str | pywt.Wavelet = "haar",
    mode: str = "periodization",
    level: int | None = None,
    axes: tuple[int, int] = (-3, -2),
) -> list[Array | Details]:
    """Several levels of `dwt2` on the low-pass band; equal to `pywt.wavedec2`.

    Args:
        level: number of levels; None takes `max_level`. A deeper one is computed with a warning: all of its coefficients see the border.

    Returns:
        `[ll_n, Details_n, ..., Details_1]`, the coarsest first. Level 0 is `[x]`.
    """
    x = _check_float(x, "wavedec2")
    rows, columns = _check_axes(x.ndim, axes)
    deepest = max_level(x.shape[rows], x.shape[columns], wavelet)
    level = deepest if level is None else level
    if level < 0:
        raise WaveletError(f"level={level} must be 0 or more")
    if level > deepest:
        warnings.warn(f"level {level} is beyond {deepest}, the deepest that is free of border effects at this size", stacklevel=2)
    details: list[Array | Details] = []
    for _ in range(level):
        bands = dwt2(x, wavelet, mode, axes)
        details.append(Details(*bands[1:]))
        x = bands.ll
    return [x, *reversed(details)]


def waverec2(
    coefficients: Sequence,
    wavelet: str | pywt.Wavelet = "haar",
    mode: str = "periodization",
    axes: tuple[int, int] = (-3, -2),
    shape: tuple[int, int] | None = None,
) -> Shaped[Array, "..."]:
    """The inverse of `wavedec2`; equal to `pywt.waverec2`.

    Args:
        coefficients: `[ll_n, (lh, hl, hh)_n, ..., (lh, hl, hh)_1]`; single bands may be None (zeros).
        shape: (height, width) of the image, for odd sizes (see `idwt2`).
    """
    image, *levels = coefficients
    for details in levels:
        sample = next((band for band in details if band is not None), None)
        if sample is not None:
            # An odd band came back one larger than its siblings on the next finer level.
            for axis in _check_axes(sample.ndim, axes):
                if image.shape[axis] == sample.shape[axis] + 1:
                    image = lax.slice_in_dim(jnp.asarray(image), 0, sample.shape[axis], axis=axis)
        image = idwt2((image, *details), wavelet, mode, axes)
    if shape is None:
        return jnp.asarray(image)
    rows, columns = _check_axes(image.ndim, axes)
    if not all(0 <= image.shape[axis] - wanted <= 1 for axis, wanted in ((rows, shape[0]), (columns, shape[1]))):
        raise WaveletError(f"shape={tuple(shape)} is not of these bands: {image.shape[rows]}x{image.shape[columns]} or one fewer a side is")
    return lax.slice_in_dim(lax.slice_in_dim(image, 0, shape[0], axis=rows), 0, shape[1], axis=columns)


def subband_energy(
    bands: Subbands | Details,
    axes: tuple[int, int] = (-3, -2),
    weights: Float[Array, "..."] | None = None,
) -> Subbands | Details:
    """Mean square of each band over its two axes, in float32 or better: the usual texture energy (METHODS 1.4).

    Args:
        bands: from `dwt2`, or the details of one level of `wavedec2`.
        axes: the two transformed axes.
        weights: nonnegative weights that broadcast against a band, at coefficient resolution; the mean is then weighted. Where they sum
            to zero the energy is 0.

    Returns:
        The same kind of tuple, each band without its two axes. The detail energy of METHODS 1.4 is the mean of `lh`, `hl` and `hh`.
    """

    def mean_square(band: Array) -> Array:
        rows, columns = _check_axes(band.ndim, axes)
        last, first = max(rows, columns), min(rows, columns)
        square = jnp.square(band.astype(_compute_dtype(band.dtype)))
        if weights is None:
            # Two steps with an addition along the longer stride first: XLA's CPU code for a joint reduction does not vectorise.
            return square.sum(first).sum(last - 1) / (band.shape[rows] * band.shape[columns])
        total = jnp.broadcast_to(weights, band.shape).astype(square.dtype)
        weight = total.sum(first).sum(last - 1)
        return jnp.where(weight > 0, (square * total).sum(first).sum(last - 1) / jnp.where(weight > 0, weight, 1), 0)

    return type(bands)(*(mean_square(band) for band in bands))
