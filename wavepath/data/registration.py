"""How far two stained pictures of one place are shifted against each other, and how sure that is (METHODS 3.5).

What H&E and IHC have in common is where there is material: nuclei, the edges of nests, clefts, glass. So optical densities are compared, over all
stains: haematoxylin alone, by colour deconvolution, tells true pairs from wrong ones less well, since DAB hides it and the two stainings' vectors
differ. The correlation coefficient of the two density maps over their overlap is computed for every shift up to a quarter of the side, through FFTs
(Padfield, IEEE TIP 21, 2012: without the overlap's own means and variances a large shift looks worse than it is); first at about 256 px, where
serial sections still look alike, then near that place at full size.

Sections of other nuclei, or a picture out of focus, defeat any comparison of intensities, and there is a highest correlation always. So a shift
comes with how far its correlation stands out from those of all other shifts, and is `sure` only above what wrong pairs reach.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt8
from scipy import fft, ndimage

from wavepath.ops.stain import LUMA, optical_density, to_float

_REDUCED = 256  # longer side of the first comparison in px
_REACH = 0.25  # shifts of up to this share of the side are tried
_SMOOTH = 1.0  # px of the first comparison: single nuclei of serial sections differ
_BROAD = 0.06  # of the side: what is wider is shading or the section's own density, and tells little about place
_FINE_SMOOTH, _FINE_BROAD = 2.0, 49  # px of the second comparison: blur, and side of the mean that is taken off
_BASIN = 5  # px of the first comparison round the peak that count as the peak itself
MIN_PEAK = 4.7  # 54 pairs of pictures that do not belong together, of two laboratories at 1024 px, reached 4.56
MIN_SHARPNESS = 0.4  # of a picture in focus: 0.63 to 1.12 at 0.25 to 0.5 um per px, out of focus 0.25


@dataclass(frozen=True)
class Shift:
    """Where the second picture's content lies, seen from the first: a place (x, y) of the first is at (x + dx, y + dy) of the second.

    Attributes:
        dx, dy: px, to the right and down.
        correlation: of the densities over the overlap at that shift, at the reduced size; -1 to 1.
        peak: how far it stands above the correlations of other shifts, in their standard deviations.
        fine: the correlation at full size, -1 to 1.
    """

    dx: int
    dy: int
    correlation: float
    peak: float
    fine: float

    @property
    def sure(self) -> bool:
        """Whether the shift can be relied upon."""
        return self.peak >= MIN_PEAK

    @property
    def size(self) -> float:
        """Its length in px."""
        return float(np.hypot(self.dx, self.dy))


def density(rgb: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "h w"]:
    """Mean optical density over the channels, see `wavepath.ops.stain`."""
    return np.asarray(optical_density(to_float(np.ascontiguousarray(rgb))), np.float32).mean(-1)


def correlations(
    first: Float32[np.ndarray, "h w"], second: Float32[np.ndarray, "h w"], reach: int
) -> Float32[np.ndarray, "n n"]:
    """Correlation coefficient of two maps over their overlap, for shifts of the second by -reach..reach px: [reach + dy, reach + dx].

    Args:
        reach: less than the shorter side.
    """
    shape = [fft.next_fast_len(extent + reach, real=True) for extent in first.shape]
    rows, columns = np.arange(-reach, reach + 1)[:, None], np.arange(-reach, reach + 1)[None]

    def transform(values: np.ndarray) -> np.ndarray:
        return fft.rfft2(values, shape)

    def lagged(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """sum over x of a(x) b(x + shift)."""
        return fft.irfft2(np.conj(a) * b, shape)[rows, columns]

    first, second = (part.astype(np.float64) - part.mean(dtype=np.float64) for part in (first, second))
    one = transform(np.ones(first.shape))
    a, b, aa, bb = transform(first), transform(second), transform(first * first), transform(second * second)
    count = np.maximum(lagged(one, one), 1.0)
    sum_a, sum_b = lagged(a, one), lagged(one, b)
    spread_a, spread_b = lagged(aa, one) - sum_a**2 / count, lagged(one, bb) - sum_b**2 / count
    scale = np.sqrt(np.maximum(spread_a, 0) * np.maximum(spread_b, 0))
    # An overlap that is flat in one picture correlates with nothing; its rounding noise must not win.
    least = 1e-4 * np.sqrt((first**2).sum() * (second**2).sum()) + 1e-12
    product = lagged(a, b) - sum_a * sum_b / count
    return np.where(scale > least, product / np.maximum(scale, least), 0).astype(np.float32)


def estimate_shift(he: UInt8[np.ndarray, "h w 3"], ihc: UInt8[np.ndarray, "h w 3"]) -> Shift:
    """The shift between two pictures of equal size, each side at least 32 px.

    Returns:
        The most likely shift to a pixel and its confidence; for pictures that show different things it is a guess with a low `peak`.
    """
    maps = [density(part) for part in (he, ihc)]
    height, width = maps[0].shape
    factor = max(1, -(-max(height, width) // _REDUCED))
    small = [_reduced(part, factor) for part in maps]
    broad = max(_BROAD * max(small[0].shape), 4 * _SMOOTH)
    small = [ndimage.gaussian_filter(part, _SMOOTH) - ndimage.gaussian_filter(part, broad) for part in small]
    reach = max(2, int(_REACH * min(small[0].shape)))
    surface = correlations(*small, reach)
    y, x = np.unravel_index(int(surface.argmax()), surface.shape)
    outside = np.hypot(*np.ogrid[-y : len(surface) - y, -x : len(surface) - x]) > _BASIN
    rest = surface[outside]
    peak = float((surface[y, x] - rest.mean()) / max(float(rest.std()), 1e-6))
    dy, dx = (int(place) - reach for place in (y, x))
    dy, dx, fine = _refined(maps, dy * factor, dx * factor, factor + 1)
    return Shift(dx, dy, round(float(surface[y, x]), 4), round(peak, 2), round(fine, 4))


def _refined(maps: list[np.ndarray], dy: int, dx: int, reach: int) -> tuple[int, int, float]:
    """The best shift within `reach` px of a first one, at full size; so near, the overlap is the same for all, and one product is enough."""
    shared = overlap(*maps[0].shape, dx, dy)
    first, second = (
        ndimage.gaussian_filter(part[place], _FINE_SMOOTH) - ndimage.uniform_filter(part[place], _FINE_BROAD)
        for part, place in zip(maps, shared, strict=True)
    )
    shape = [fft.next_fast_len(extent + reach, real=True) for extent in first.shape]
    near = np.arange(-reach, reach + 1)
    first, second = first - first.mean(), second - second.mean()
    surface = fft.irfft2(np.conj(fft.rfft2(first, shape)) * fft.rfft2(second, shape), shape)[near[:, None], near[None]]
    y, x = np.unravel_index(int(surface.argmax()), surface.shape)
    scale = float(np.linalg.norm(first) * np.linalg.norm(second))
    return dy + int(near[y]), dx + int(near[x]), float(surface[y, x]) / max(scale, 1e-9)


def overlap(height: int, width: int, dx: int, dy: int, unit: int = 1) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """What two pictures of one size share under a shift: rows and columns of each; sides a multiple of `unit` px, in the middle of it.

    Raises:
        ValueError: they share less than `unit` px.
    """
    rows, columns = height - abs(dy), width - abs(dx)
    tall, wide = rows // unit * unit, columns // unit * unit
    if tall < unit or wide < unit:
        raise ValueError(f"pictures of {width} x {height} px share nothing at a shift of {dx}, {dy} px")
    top, left = max(0, -dy) + (rows - tall) // 2, max(0, -dx) + (columns - wide) // 2
    first, second = ((slice(y, y + tall), slice(x, x + wide)) for y, x in ((top, left), (top + dy, left + dx)))
    return first, second


def _reduced(image: np.ndarray, factor: int) -> np.ndarray:
    """Means over squares of `factor` px."""
    height, width = (extent // factor for extent in image.shape)
    return image[: height * factor, : width * factor].reshape(height, factor, width, factor).mean((1, 3), dtype=np.float32)


def sharpness(rgb: UInt8[np.ndarray, "h w 3"]) -> float:
    """Deviation of the luminance in detail of 1 to 2 px over that in detail of 4 to 8 px (differences of Gaussian blurs).

    Below `MIN_SHARPNESS` a picture of tissue is out of focus; of glass alone it says nothing.
    """
    grey = rgb.astype(np.float32) @ np.array(LUMA, np.float32)

    def deviation(image: np.ndarray, low: float, high: float) -> float:
        return float((ndimage.gaussian_filter(image, low) - ndimage.gaussian_filter(image, high)).std(dtype=np.float64))

    fine, coarse = deviation(grey, 1, 2), deviation(_reduced(grey, 2), 2, 4)  # 4 and 8 px
    return round(fine / max(coarse, 1e-6), 4)
