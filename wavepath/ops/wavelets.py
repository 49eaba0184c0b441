"""Discrete wavelet transforms of images: differentiable, channels last, equal to PyWavelets.

Every discrete wavelet of PyWavelets, its boundary modes, any size (odd too), any two axes, any leading dimensions. Names of the bands:

| here | PyWavelets | filters along (axes[0], axes[1]) | answers to |
|------|-----------|----------------------------------|------------|
| `ll` | cA        | low, low                         | the image at half size (times two for an orthonormal wavelet) |
| `lh` | cH        | high, low                        | horizontal edges |
| `hl` | cV        | low, high                        | vertical edges |
| `hh` | cD        | high, high                       | diagonal detail |

The loops and their hand-written transposes are in `wavelet_kernels`, packets and the stationary and continuous transforms in
`wavelet_transforms`. Half-precision inputs are computed in float32 and returned in their own type.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pywt
from jax import Array, lax
from jaxtyping import Float, Shaped

from wavepath.ops.checks import check_float
from wavepath.ops.wavelet_filters import (
    MODES,
    Bank,
    WaveletError,
    check_axes,
    check_mode,
    compute_dtype,
    filter_bank,
    max_level,
)
from wavepath.ops.wavelet_kernels import analyse2, synthesise2

__all__ = [
    "MODES",
    "Bank",
    "Details",
    "Subbands",
    "WaveletError",
    "check_mode",
    "dwt2",
    "filter_bank",
    "idwt2",
    "max_level",
    "subband_energy",
    "wavedec2",
    "waverec2",
]


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
    x = check_float(x, "dwt2")
    check_mode(mode)
    rows, columns = check_axes(x.ndim, axes)
    if 0 in (x.shape[rows], x.shape[columns]):
        raise WaveletError(f"an image of {x.shape[rows]}x{x.shape[columns]} pixels has no transform")
    return Subbands(*analyse2(x, filter_bank(wavelet), mode, rows, columns))


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
    given = [check_float(band, "idwt2") for band in bands if band is not None]
    if len(bands) != 4 or not given:
        raise WaveletError("idwt2 takes the four bands (ll, lh, hl, hh), at least one of them not None")
    if len({band.shape for band in given}) != 1:
        raise WaveletError(f"bands of different shapes: {', '.join(str(band.shape) for band in given)}")
    rows, columns = check_axes(given[0].ndim, axes)
    bank = filter_bank(wavelet)
    shortest = 1 if mode == "periodization" else len(bank.rec_lo) // 2
    if min(given[0].shape[rows], given[0].shape[columns]) < shortest:
        height, width = given[0].shape[rows], given[0].shape[columns]
        raise WaveletError(f"bands of {height}x{width} are too short: this wavelet makes at least {shortest} coefficients a side")
    image = synthesise2(tuple(jnp.zeros_like(given[0]) if b is None else jnp.asarray(b) for b in bands), bank, mode, rows, columns)
    if shape is None:
        return image
    for axis, wanted in ((rows, shape[0]), (columns, shape[1])):
        if wanted not in (image.shape[axis], image.shape[axis] - 1):
            raise WaveletError(f"shape={tuple(shape)} is not of these bands: {image.shape[rows]}x{image.shape[columns]} or one fewer a side is")
        image = lax.slice_in_dim(image, 0, wanted, axis=axis)
    return image


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
    x = check_float(x, "wavedec2")
    rows, columns = check_axes(x.ndim, axes)
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
        if sample is not None and image is not None:
            # An odd band came back one larger than its siblings on the next finer level.
            for axis in check_axes(sample.ndim, axes):
                if image.shape[axis] == sample.shape[axis] + 1:
                    image = lax.slice_in_dim(jnp.asarray(image), 0, sample.shape[axis], axis=axis)
        image = idwt2((image, *details), wavelet, mode, axes)
    if shape is None:
        return jnp.asarray(image)
    rows, columns = check_axes(image.ndim, axes)
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
        rows, columns = check_axes(band.ndim, axes)
        last, first = max(rows, columns), min(rows, columns)
        square = jnp.square(band.astype(compute_dtype(band.dtype)))
        if weights is None:
            # Two steps with an addition along the longer stride first: XLA's CPU code for a joint reduction does not vectorise.
            return square.sum(first).sum(last - 1) / (band.shape[rows] * band.shape[columns])
        total = jnp.broadcast_to(weights, band.shape).astype(square.dtype)
        weight = total.sum(first).sum(last - 1)
        return jnp.where(weight > 0, (square * total).sum(first).sum(last - 1) / jnp.where(weight > 0, weight, 1), 0)

    return type(bands)(*(mean_square(band) for band in bands))
