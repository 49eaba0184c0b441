"""Names and taps: the discrete wavelets and boundary modes that exist, as plain numbers; errors that name what was meant."""

import difflib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import jax.numpy as jnp
import pywt

from wavepath.errors import WavepathError

MODES = ("periodization", "symmetric", "reflect", "zero", "periodic", "constant")


class WaveletError(WavepathError, ValueError):
    """A wavelet, boundary mode, axis, level or shape that does not exist or does not fit; the message names what does."""


class Bank(NamedTuple):
    """Filter taps as plain floats, which take the array's type. Analysis is reversed, so that it is a correlation; lengths are even."""

    dec_lo: tuple[float, ...]
    dec_hi: tuple[float, ...]
    rec_lo: tuple[float, ...]
    rec_hi: tuple[float, ...]

    def adjoint(self) -> "Bank":
        """The bank whose synthesis is the transpose of this one's analysis, and the other way round."""
        return Bank(self.rec_lo, self.rec_hi, self.dec_lo, self.dec_hi)


@lru_cache(maxsize=256)
def named_wavelet(name: str) -> pywt.Wavelet:
    """A discrete wavelet by its PyWavelets name. Raises WaveletError with the nearest name where there is none."""
    known = pywt.wavelist(kind="discrete")
    if name.lower() in ("haar", *known):
        return pywt.Wavelet(name)
    near = difflib.get_close_matches(name, known, 1)
    if name in pywt.wavelist(kind="continuous"):
        raise WaveletError(f"{name!r} is a continuous wavelet and has no discrete transform; use one such as db4 or sym4")
    raise WaveletError(f"unknown wavelet {name!r}" + (f"; did you mean {near[0]!r}?" if near else "; names are pywt.wavelist(kind='discrete')"))


def filter_bank(wavelet: str | pywt.Wavelet) -> Bank:
    """The filters of a discrete wavelet. Raises WaveletError, naming the nearest name, where there is none of that name."""
    w = wavelet if isinstance(wavelet, pywt.Wavelet) else named_wavelet(wavelet)
    return Bank(tuple(w.dec_lo[::-1]), tuple(w.dec_hi[::-1]), tuple(w.rec_lo), tuple(w.rec_hi))


def check_mode(mode: str) -> None:
    """Raises WaveletError for a boundary mode that does not exist."""
    if mode not in MODES:
        near = difflib.get_close_matches(mode, MODES, 1)
        raise WaveletError(f"unknown boundary mode {mode!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(MODES)}"))


def check_axes(ndim: int, axes: Sequence[int]) -> tuple[int, int]:
    """The two axes counted from the front. Raises WaveletError where they are not two different axes of the array."""
    if len(axes) != 2 or any(not -ndim <= axis < ndim for axis in axes) or len({axis % ndim for axis in axes}) != 2:
        raise WaveletError(f"axes={tuple(axes)} must be two different axes of the {ndim} there are; a plain [h, w] image takes axes=(-2, -1)")
    return axes[0] % ndim, axes[1] % ndim


def compute_dtype(dtype) -> jnp.dtype:
    """float32 for half-precision inputs: a sum of up to 102 products keeps three digits in bfloat16."""
    return jnp.promote_types(dtype, jnp.float32)


def max_level(height: int, width: int, wavelet: str | pywt.Wavelet) -> int:
    """The deepest level at which a coefficient is still free of the border: `pywt.dwtn_max_level`."""
    return pywt.dwt_max_level(min(height, width), len(filter_bank(wavelet).dec_lo))
