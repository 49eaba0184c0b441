"""Wavelet packets, stationary (undecimated) and continuous transforms: equal to PyWavelets, differentiable, channels last.

Packets repeat `dwt2` on every band. The stationary transforms are the filters of the discrete one, spread by 2^level and applied at every
sample with periodic borders, so that they move with the image. jaxwt is the second opinion of the tests and not the engine: it has no stationary
transform in two dimensions, its inverse in one traces a slice a sample, and its continuous transform neither compiles nor places fractional
scales right in float32 (5 % off). Here the filters of a continuous transform are made in float64 before tracing.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pywt
from jax import Array
from jaxtyping import Shaped

from wavepath.ops.checks import check_float
from wavepath.ops.wavelet_filters import WaveletError, check_axes, compute_dtype, filter_bank
from wavepath.ops.wavelet_kernels import coefficients, extend
from wavepath.ops.wavelets import Details, dwt2, idwt2

LETTERS = "ahvd"  # of PyWavelets' paths, in the order of Subbands: ll, lh, hl, hh


def packets2(
    x: Shaped[Array | np.ndarray, "..."],
    wavelet: str | pywt.Wavelet = "haar",
    mode: str = "periodization",
    level: int = 1,
    axes: tuple[int, int] = (-3, -2),
) -> dict[str, Array]:
    """The wavelet packets of one level: every band transformed again, 4^level arrays; equal to the nodes of `pywt.WaveletPacket2D`.

    Args:
        x: floating-point array, `[..., height, width, channel]` with the default axes.
        wavelet, mode, axes: as for `dwt2`.
        level: depth, at least 1.

    Returns:
        Node by path, in PyWavelets' natural order: "aa", "ah", "av", "ad", "ha", ...; each letter is the band taken at one level, the first
        from the image: a = ll, h = lh, v = hl, d = hh.

    Raises:
        TypeError, WaveletError: as `dwt2`; and for a level below 1.
    """
    if level < 1:
        raise WaveletError(f"level={level} of wavelet packets must be 1 or more")
    nodes = {"": check_float(x, "packets2")}
    for _ in range(level):
        nodes = {path + letter: band for path, node in nodes.items() for letter, band in zip(LETTERS, dwt2(node, wavelet, mode, axes), strict=True)}
    return nodes


def ipackets2(
    nodes: Mapping[str, Array | np.ndarray],
    wavelet: str | pywt.Wavelet = "haar",
    mode: str = "periodization",
    axes: tuple[int, int] = (-3, -2),
    *,
    shape: tuple[int, int],
) -> Shaped[Array, "..."]:
    """The image of wavelet packets; the inverse of `packets2`.

    Args:
        nodes: arrays by path, all of one level; nodes left out count as zeros.
        wavelet, mode, axes: as given to `packets2`.
        shape: (height, width) of the image. The sizes between follow from it; they cannot be told from the nodes.

    Raises:
        WaveletError: for paths that are not packets of one level, or nodes that do not fit `shape`.
    """
    levels = {len(path) for path in nodes}
    if len(levels) != 1 or 0 in levels or any(set(path) - set(LETTERS) for path in nodes):
        raise WaveletError(f"nodes {', '.join(map(repr, nodes)) or 'none'}: paths must be of one level, made of the letters {', '.join(LETTERS)}")
    (level,), taps = levels, len(filter_bank(wavelet).dec_lo)
    sizes = [tuple(shape)]
    for _ in range(level):
        sizes.append(tuple(coefficients(size, taps, mode) for size in sizes[-1]))
    for path, node in nodes.items():
        rows, columns = check_axes(node.ndim, axes)
        if (node.shape[rows], node.shape[columns]) != sizes[-1]:
            height, width = sizes[-1]
            raise WaveletError(f"node {path!r} is {node.shape[rows]}x{node.shape[columns]}; packets of shape={shape} are {height}x{width}")
    found: dict[str, Array] = {path: jnp.asarray(node) for path, node in nodes.items()}
    for depth in reversed(range(level)):
        parents = ("".join(path) for path in product(LETTERS, repeat=depth))
        children = {parent: [found.get(parent + letter) for letter in LETTERS] for parent in parents}
        found = {
            parent: idwt2(bands, wavelet, mode, axes, sizes[depth])
            for parent, bands in children.items()
            if any(band is not None for band in bands)
        }
    return found[""]


def _correlate(x: Array, taps: Sequence[float], step: int, before: int, axis: int) -> Array:
    """out[i] = sum_k taps[k] x[i + step k - before], periodic."""
    size, reach = x.shape[axis], step * (len(taps) - 1)
    x = extend(x, axis, before, reach - before, "wrap")
    return sum(jax.lax.slice_in_dim(x, step * k, step * k + size, axis=axis) * tap for k, tap in enumerate(taps))


def _spread(x: Array, bank, step: int, axis: int) -> tuple[Array, Array]:
    """One stationary level along one axis: low and high, as long as the axis."""
    before = step * (len(bank.dec_lo) // 2 - 1)
    return _correlate(x, bank.dec_lo, step, before, axis), _correlate(x, bank.dec_hi, step, before, axis)


def _gather(low: Array, high: Array, bank, step: int, axis: int) -> Array:
    """The inverse of `_spread`: the mean of the two decimated inverses, of the even and of the odd coefficients."""
    before = step * (len(bank.rec_lo) // 2)
    return 0.5 * (_correlate(low, bank.rec_lo[::-1], step, before, axis) + _correlate(high, bank.rec_hi[::-1], step, before, axis))


def _stationary_levels(sizes: Sequence[int], level: int | None) -> int:
    deepest = min((size & -size).bit_length() - 1 for size in sizes)  # how often each size halves
    level = deepest if level is None else level
    if deepest == 0:
        raise WaveletError(f"a stationary transform of {'x'.join(map(str, sizes))} samples has no level: sizes must be even; crop or pad first")
    if not 1 <= level <= deepest:
        raise WaveletError(
            f"a stationary transform of {'x'.join(map(str, sizes))} samples takes 1 to {deepest} levels, not {level}: "
            "each size must be a multiple of 2^level; crop or pad first"
        )
    return level


def swt2(
    x: Shaped[Array | np.ndarray, "..."],
    wavelet: str | pywt.Wavelet = "haar",
    level: int | None = None,
    axes: tuple[int, int] = (-3, -2),
) -> list[Array | Details]:
    """Stationary wavelet transform: no band is subsampled, borders are periodic; equal to `pywt.swt2(..., trim_approx=True)`.

    Args:
        x: floating-point array, `[..., height, width, channel]` with the default axes; sizes are multiples of 2^level.
        wavelet, axes: as for `dwt2`.
        level: number of levels; None takes the most that the sizes allow.

    Returns:
        `[ll_n, Details_n, ..., Details_1]` like `wavedec2`, every band of the image's size and type.

    Raises:
        TypeError, WaveletError: as `dwt2`; and where the sizes do not allow the level.
    """
    x = check_float(x, "swt2")
    rows, columns = check_axes(x.ndim, axes)
    bank, dtype, details = filter_bank(wavelet), x.dtype, []
    low = x.astype(compute_dtype(dtype))
    for number in range(_stationary_levels((x.shape[rows], x.shape[columns]), level)):
        low, high = _spread(low, bank, 2**number, rows)
        low, hl = _spread(low, bank, 2**number, columns)
        lh, hh = _spread(high, bank, 2**number, columns)
        details.append(Details(*(band.astype(dtype) for band in (lh, hl, hh))))
    return [low.astype(dtype), *reversed(details)]


def iswt2(
    bands: Sequence,
    wavelet: str | pywt.Wavelet = "haar",
    axes: tuple[int, int] = (-3, -2),
) -> Shaped[Array, "..."]:
    """The inverse of `swt2`; equal to `pywt.iswt2`. Takes `[ll_n, (lh, hl, hh)_n, ..., (lh, hl, hh)_1]`."""
    first, *levels = bands
    image = check_float(first, "iswt2")
    rows, columns = check_axes(image.ndim, axes)
    bank, dtype = filter_bank(wavelet), image.dtype
    wide = compute_dtype(dtype)
    image = image.astype(wide)
    for number, details in zip(reversed(range(len(levels))), levels, strict=True):
        lh, hl, hh = (jnp.asarray(band, wide) for band in details)
        if not image.shape == lh.shape == hl.shape == hh.shape:
            raise WaveletError(f"stationary bands have one shape at all levels, not {image.shape}, {lh.shape}, {hl.shape} and {hh.shape}")
        low, high = _gather(image, hl, bank, 2**number, columns), _gather(lh, hh, bank, 2**number, columns)
        image = _gather(low, high, bank, 2**number, rows)
    return image.astype(dtype)


def swt(x: Shaped[Array | np.ndarray, "..."], wavelet: str | pywt.Wavelet = "haar", level: int | None = None, axis: int = -1) -> list[Array]:
    """`swt2` along one axis: `[low_n, high_n, ..., high_1]`; equal to `pywt.swt(..., trim_approx=True)`."""
    low = check_float(x, "swt")
    bank, dtype, highs = filter_bank(wavelet), low.dtype, []
    axis = _check_axis(low.ndim, axis)
    low = low.astype(compute_dtype(dtype))
    for number in range(_stationary_levels((low.shape[axis],), level)):
        low, high = _spread(low, bank, 2**number, axis)
        highs.append(high.astype(dtype))
    return [low.astype(dtype), *reversed(highs)]


def iswt(bands: Sequence[Array | np.ndarray], wavelet: str | pywt.Wavelet = "haar", axis: int = -1) -> Shaped[Array, "..."]:
    """The inverse of `swt`; equal to `pywt.iswt`."""
    first, *highs = bands
    signal = check_float(first, "iswt")
    axis, bank, dtype = _check_axis(signal.ndim, axis), filter_bank(wavelet), signal.dtype
    signal = signal.astype(compute_dtype(dtype))
    for number, high in zip(reversed(range(len(highs))), highs, strict=True):
        signal = _gather(signal, jnp.asarray(high, signal.dtype), bank, 2**number, axis)
    return signal.astype(dtype)


def _check_axis(ndim: int, axis: int) -> int:
    if not -ndim <= axis < ndim:
        raise WaveletError(f"axis={axis} is not one of the {ndim} there are")
    return axis % ndim


@lru_cache(maxsize=4)  # spectra of long signals and many scales take a hundred megabytes
def _continuous_filters(wavelet: str, scales: tuple[float, ...], samples: int, precision: int) -> np.ndarray:
    """Spectra [scale, frequency] that take the spectrum of a zero-padded signal to that of its coefficients, the first at index 0."""
    continuous = pywt.ContinuousWavelet(wavelet)
    integral, grid = pywt.integrate_wavelet(continuous, precision=precision)
    if continuous.complex_cwt:
        integral = np.conj(integral)
    steps, filters = [], []
    for scale in scales:
        # PyWavelets convolves with the integrated wavelet and takes differences: here they are taken of the filter.
        index = (np.arange(scale * (grid[-1] - grid[0]) + 1) / (scale * (grid[1] - grid[0]))).astype(int)
        taps = integral[index[index < len(integral)]][::-1]
        if len(taps) < 2:
            raise WaveletError(f"scale {scale:g} is too small for {wavelet}: its wavelet is shorter than a sample")
        steps.append(1 + (len(taps) - 2) // 2)
        filters.append(-np.sqrt(scale) * np.diff(taps, prepend=0, append=0))
    size = 1 << (samples + max(map(len, filters)) - 1).bit_length()
    padded = [np.roll(np.pad(taps, (0, size - len(taps))), -step) for taps, step in zip(filters, steps, strict=True)]
    return np.fft.fft(padded) if continuous.complex_cwt else np.fft.rfft(padded)


def cwt(
    x: Shaped[Array | np.ndarray, "..."],
    scales: Sequence[float | int] | np.ndarray,
    wavelet: str = "morl",
    axis: int = -1,
    sampling_period: float = 1.0,
    precision: int = 12,
) -> tuple[Array, np.ndarray]:
    """Continuous wavelet transform along one axis; equal to `pywt.cwt`.

    Args:
        x: floating-point array.
        scales: positive numbers, known when the function is traced.
        wavelet: a name from `pywt.wavelist(kind="continuous")`, with its parameters where it has some (`cmor1.5-1.0`).
        axis: the axis of time or space.
        sampling_period: distance between samples; only the frequencies depend on it.
        precision: the wavelet is sampled at 2^precision points.

    Returns:
        Coefficients `[scale, *x.shape]`, complex for a complex wavelet, and the frequency of each scale in cycles per unit of the period.

    Raises:
        TypeError: for integers.
        WaveletError: for a wavelet that is not continuous, an axis that does not exist, or scales that are not positive or too small.
    """
    x = check_float(x, "cwt")
    axis, dtype = _check_axis(x.ndim, axis), compute_dtype(x.dtype)
    scales = tuple(float(scale) for scale in np.atleast_1d(scales))
    if not scales or min(scales) <= 0:
        raise WaveletError("cwt takes one or more scales, all positive")
    try:
        complex_ = pywt.ContinuousWavelet(wavelet).complex_cwt
    except ValueError as error:
        raise WaveletError(f"{wavelet!r} is not a continuous wavelet; names are pywt.wavelist(kind='continuous')") from error
    samples = x.shape[axis]
    spectra = _continuous_filters(wavelet, scales, samples, precision)
    size = spectra.shape[-1] if complex_ else 2 * (spectra.shape[-1] - 1)
    forward, back = (jnp.fft.fft, jnp.fft.ifft) if complex_ else (jnp.fft.rfft, jnp.fft.irfft)
    signal = forward(jnp.moveaxis(x, axis, -1).astype(dtype), size)
    spectra = jnp.asarray(spectra, jnp.result_type(dtype, jnp.complex64)).reshape(len(scales), *(1,) * (x.ndim - 1), -1)
    values = jnp.moveaxis(back(signal * spectra, size)[..., :samples], -1, axis + 1)
    frequencies = np.array([pywt.scale2frequency(wavelet, scale) for scale in scales]) / sampling_period
    return (values if complex_ else values.astype(x.dtype)), frequencies
