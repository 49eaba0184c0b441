"""How well a virtual immunostain shows what the real one shows: fidelity, fidelity but for the registration, and the DAB that a pathologist reads.

    psnr, ssim, ssim_g          pixel by pixel
    psnr_shift, ssim_shift      the best over small shifts: pairs are neighbouring sections, whose residual misregistration costs more than the stain
    dab_output, dab_target      share of DAB-positive pixels; dab_error is the absolute difference
    dab_correlation             whether the DAB is at the right places, in cells coarser than the misregistration

DAB is the third amount of `wavepath.ops.stain.separate_stains` (scikit-image's `rgb2hed`). Its threshold was chosen on pictures: against the true
masks of phantom pairs (24 of 256 px) it finds F1 0.98 and the positive area to 0.007 of 0.231; of HER2 immunostains of two laboratories it finds
0.1 to 0.2 % in three negative ones (dark nuclei), 5 and 6 % in two with incomplete membranes and 35 to 68 % in three strongly positive ones. At 0.03
dark nuclei count, at 0.05 pale membranes are lost. Shares are of all pixels, glass among them, so that output and target have one denominator.
"""

import jax
import numpy as np
from jax import Array
from jaxtyping import Bool, Float32, UInt8
from scipy import fft, ndimage
from skimage.measure import block_reduce
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from wavepath.data.registration import correlations, density, overlap
from wavepath.errors import DatasetError
from wavepath.ops.stain import LUMA, separate_stains, to_float

NAMES = ("psnr", "ssim", "ssim_g", "psnr_shift", "ssim_shift", "dab_output", "dab_target", "dab_error", "dab_correlation")
MORE_IS_BETTER = {"psnr": True, "ssim": True, "ssim_g": True, "psnr_shift": True, "ssim_shift": True, "dab_error": False, "dab_correlation": True}
DAB_THRESHOLD = 0.035  # amount of DAB from which a pixel is positive: full absorption is 1
CELL = 32  # px of the cells in which DAB is compared
CELL_UM = 16.0  # the same where the resolution is known: about two cells across
SHIFT = 16  # px
CONVENTIONS = {
    "psnr": "dB, RGB, 8-bit, range 255, whole image; infinite for equal images",
    "ssim": "RGB, uniform window of 7 px, sample covariances, range 255, mean over channels (defaults of scikit-image, as CEFF reports it)",
    "ssim_g": "RGB, Gaussian window of 11 px and sigma 1.5, n-weighted variances (Wang et al.; as super-resolution is measured here)",
    "psnr_shift": "psnr of the overlap, the best of all shifts of up to 16 px to each side, 0 among them: never below psnr",
    "ssim_shift": "ssim of the overlap at the best shift of up to 16 px found by a local search: never below ssim",
    "dab_output": f"share of all pixels of the output whose DAB (colour deconvolution as rgb2hed) exceeds {DAB_THRESHOLD}; some of the eosin of "
    "an H&E image passes for DAB, so of copied input it says little",
    "dab_target": "the same of the true immunostain",
    "dab_error": "absolute difference of the two shares",
    "dab_correlation": f"Pearson correlation of the mean DAB in cells of {CELL_UM:g} um ({CELL} px where the resolution is not known); "
    "0 where one image is flat or there are fewer than four cells",
}
_WINDOW, _LEAST = 7, 11  # px: of `ssim`, and of the Gaussian window, which no image may be smaller than
_FLAT = 1e-5  # deviation of cells below which there is no pattern: a fiftieth of one grey level


def scores(
    output: UInt8[np.ndarray, "h w 3"], target: UInt8[np.ndarray, "h w 3"], shift: int = SHIFT, mpp: float | None = None
) -> dict[str, float]:
    """All of `NAMES` of one image; see `CONVENTIONS`.

    Args:
        output: the virtual immunostain. target: the real one, of the same shape.
        shift: greatest shift to each side in px; a quarter of the shorter side at most is tried. 0: none.
        mpp: micrometres per pixel, for the cells of `dab_correlation`.

    Raises:
        DatasetError: shapes that differ, or images smaller than 11 px.

    Source: METHODS 3.6 (psnr, ssim); the others are this library's own.
    """
    height, width = target.shape[:2]
    if output.shape != target.shape:
        raise DatasetError(f"an output of {output.shape[1]} x {output.shape[0]} px cannot be compared with a target of {width} x {height}")
    if min(height, width) < _LEAST:
        raise DatasetError(f"images of {width} x {height} px are too small for an SSIM window of {_LEAST} px; make larger ones")
    found = {"psnr": psnr(output, target), "ssim": ssim(output, target), "ssim_g": _ssim_g(output, target)}
    found |= dict(zip(("psnr_shift", "ssim_shift"), _shifted(output, target, shift, found["psnr"], found["ssim"]), strict=True))
    amounts = [dab(image) for image in (output, target)]
    shares = [float((amount > DAB_THRESHOLD).mean()) for amount in amounts]
    found |= {"dab_output": shares[0], "dab_target": shares[1], "dab_error": abs(shares[0] - shares[1])}
    return found | {"dab_correlation": _cell_correlation(*amounts, max(2, round(CELL_UM / mpp)) if mpp else CELL)}


def psnr(output: UInt8[np.ndarray, "h w 3"], target: UInt8[np.ndarray, "h w 3"]) -> float:
    """dB; infinite for equal images."""
    with np.errstate(divide="ignore"):
        return float(peak_signal_noise_ratio(target, output, data_range=255))


def ssim(output: UInt8[np.ndarray, "h w 3"], target: UInt8[np.ndarray, "h w 3"]) -> float:
    """As METHODS 3.6 has it: `structural_similarity` with its defaults."""
    return float(structural_similarity(output, target, channel_axis=2, data_range=255))


def _ssim_g(output: np.ndarray, target: np.ndarray) -> float:
    settings = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    return float(structural_similarity(output, target, channel_axis=2, data_range=255, **settings))


def dab(rgb: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "h w"]:
    """Amount of DAB at each pixel, from 0; 1 is full absorption."""
    return np.asarray(_third(np.ascontiguousarray(rgb)))


@jax.jit
def _third(rgb: UInt8[Array, "h w 3"]) -> Float32[Array, "h w"]:
    return separate_stains(to_float(rgb))[..., 2]


def dab_positive(rgb: UInt8[np.ndarray, "h w 3"]) -> Bool[np.ndarray, "h w"]:
    """Which pixels count as positive."""
    return dab(rgb) > DAB_THRESHOLD


def _cell_correlation(output: Float32[np.ndarray, "h w"], target: Float32[np.ndarray, "h w"], cell: int) -> float:
    """Pearson correlation of means over whole cells; what is left over at the right and bottom is not looked at."""
    height, width = (extent // cell * cell for extent in target.shape)
    if (height // cell) * (width // cell) < 4:
        return 0.0
    a, b = (block_reduce(amount[:height, :width].astype(np.float64), cell, np.mean).ravel() for amount in (output, target))
    if min(a.std(), b.std()) < _FLAT:
        return 0.0
    return float(np.clip(np.corrcoef(a, b)[0, 1], -1, 1))


def _shifted(output: np.ndarray, target: np.ndarray, shift: int, psnr_there: float, ssim_there: float) -> tuple[float, float]:
    """`psnr_shift` and `ssim_shift`, given both without a shift."""
    reach = min(int(shift), min(target.shape[:2]) // 4, min(target.shape[:2]) - _LEAST)
    if reach < 1:
        return psnr_there, ssim_there
    by_error, by_structure = best_shifts(output, target, reach)

    def there(dy: int, dx: int) -> tuple[np.ndarray, np.ndarray]:
        first, second = overlap(*target.shape[:2], dx, dy)
        return output[first], target[second]

    # The searches rank in float32 and in luma; the numbers themselves are those of the metrics, and no shift stays a candidate.
    best = max(psnr_there, psnr(*there(*by_error))) if by_error != (0, 0) else psnr_there
    return best, max(ssim_there, ssim(*there(*by_structure))) if by_structure != (0, 0) else ssim_there


def best_shifts(output: UInt8[np.ndarray, "h w 3"], target: UInt8[np.ndarray, "h w 3"], reach: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shifts (dy, dx) of least squared error and of highest SSIM: a place p of the output is at p + shift of the target.

    The first is exact, through FFTs of all shifts of up to `reach` px. The second climbs in SSIM of the luma from the best of three starts: no shift,
    the first result, and the highest correlation of optical density (as pairs are registered).
    """
    errors = _errors(output, target, reach)
    y, x = np.unravel_index(int(errors.argmin()), errors.shape)
    by_error = int(y) - reach, int(x) - reach
    surface = correlations(density(output), density(target), reach)
    y, x = np.unravel_index(int(surface.argmax()), surface.shape)
    similarity = _Structure(output, target)
    known = {place: similarity(*place) for place in ((0, 0), by_error, (int(y) - reach, int(x) - reach))}
    best = max(known, key=known.__getitem__)
    while True:
        dy, dx = best
        for place in ((dy - 1, dx), (dy + 1, dx), (dy, dx - 1), (dy, dx + 1)):
            if max(map(abs, place)) <= reach and place not in known:
                known[place] = similarity(*place)
        best = max(known, key=known.__getitem__)
        if best == (dy, dx):
            return by_error, best


def _errors(output: np.ndarray, target: np.ndarray, reach: int) -> np.ndarray:
    """Mean squared error over the overlap at each shift, float64[reach + dy, reach + dx]."""
    height, width = target.shape[:2]
    shape = [fft.next_fast_len(extent + reach, real=True) for extent in (height, width)]
    a, b = (np.moveaxis(image.astype(np.float64) - 128, 2, 0) for image in (output, target))
    ones = fft.rfft2(np.ones((height, width)), shape)
    # The sum over x of (a(x) - b(x + shift))^2 is one inverse transform of three products.
    spectrum = np.conj(fft.rfft2((a * a).sum(0), shape)) * ones + np.conj(ones) * fft.rfft2((b * b).sum(0), shape)
    for channel in range(3):
        spectrum -= 2 * np.conj(fft.rfft2(a[channel], shape)) * fft.rfft2(b[channel], shape)
    near = np.arange(-reach, reach + 1)
    total = fft.irfft2(spectrum, shape)[near[:, None], near[None]]
    return total / (3 * (height - abs(near))[:, None] * (width - abs(near))[None])


class _Structure:
    """SSIM of the luma over the overlap at a shift, float32: the windows' means and variances are the same at all shifts, only the product is not."""

    def __init__(self, output: np.ndarray, target: np.ndarray):
        low, high = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        self._maps = []
        for image in (output, target):
            # About zero, where float32 squares keep their digits; variances do not mind, means get the offset back.
            grey = image.astype(np.float32) @ np.array(LUMA, np.float32) - 128
            mean = ndimage.uniform_filter(grey, _WINDOW)
            spread = ndimage.uniform_filter(grey * grey, _WINDOW) - mean * mean
            self._maps.append((grey, mean, mean + 128, np.square(mean + 128) + low / 2, spread + high / 2))
        self._low, self._high = low, high

    def __call__(self, dy: int, dx: int) -> float:
        first, second = overlap(*self._maps[0][0].shape, dx, dy)
        (a, mean_a, light_a, bright_a, spread_a), (b, mean_b, light_b, bright_b, spread_b) = (
            [part[place] for part in maps] for maps, place in zip(self._maps, (first, second), strict=True)
        )
        value = ndimage.uniform_filter(a * b, _WINDOW)
        value -= mean_a * mean_b
        value *= 2
        value += self._high
        value *= 2 * light_a * light_b + self._low
        value /= (bright_a + bright_b) * (spread_a + spread_b)
        edge = _WINDOW // 2  # further out windows of the full images and of the overlap differ
        return float(value[edge:-edge, edge:-edge].mean(dtype=np.float64))
