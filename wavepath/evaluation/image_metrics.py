"""How well 8-bit images are restored: PSNR and SSIM in RGB and in luma, by scikit-image in float64.

    psnr, ssim      RGB, every pixel (no border is cut)
    psnr_y, ssim_y  luma (BT.601 in studio swing, not rounded), without `shave` pixels at each border

SSIM is that of Wang et al.: a Gaussian window of 11 pixels and deviation 1.5, variances divided by n, the mean over the places where the window
lies inside; in RGB the mean over the channels. Images are compared as they are written, rounded to 8 bits; the range is 255.
`wavepath.ops.similarity` computes the same on devices, in float32: there flat glass costs SSIM its fifth digit.
"""

import numpy as np
from jaxtyping import UInt8
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from wavepath.errors import DatasetError

RESTORATION = ("psnr", "ssim", "psnr_y", "ssim_y")
CONVENTIONS = {
    "psnr": "dB, RGB, 8-bit rounded, range 255, no border crop",
    "ssim": "RGB, Gaussian window of 11 px and sigma 1.5, n-weighted variances, where the window lies inside, mean over channels; no border crop",
    "psnr_y": "dB, BT.601 studio-swing luma of the 8-bit image, not rounded, range 255; `shave` px cut at each border",
    "ssim_y": "as ssim, of that luma with the same px cut",
}
_WINDOW = 11


def restoration(output: UInt8[np.ndarray, "h w 3"], target: UInt8[np.ndarray, "h w 3"], shave: int) -> dict[str, float]:
    """The four metrics of one image; `psnr` of equal images is infinite.

    Args:
        output, target: of one shape.
        shave: pixels cut at each border for the metrics in luma; by convention the factor of super-resolution.

    Raises:
        DatasetError: shapes that differ, or images too small for the window.

    Source: METHODS 4.7.
    """
    height, width = target.shape[:2]
    if output.shape != target.shape:
        raise DatasetError(f"an output of {output.shape[1]} x {output.shape[0]} px cannot be compared with a target of {width} x {height}")
    if min(height, width) - 2 * shave < _WINDOW:
        raise DatasetError(
            f"images of {width} x {height} px, with {shave} px cut at each border, are too small for an SSIM window of {_WINDOW} px; make larger ones"
        )
    inside = slice(shave, -shave or None)
    pairs = {"": (output, target, -1), "_y": (*(rgb2ycbcr(image)[inside, inside, 0] for image in (output, target)), None)}
    found = {}
    for suffix, (a, b, channels) in pairs.items():
        with np.errstate(divide="ignore"):
            found[f"psnr{suffix}"] = float(peak_signal_noise_ratio(b, a, data_range=255))
        found[f"ssim{suffix}"] = float(
            structural_similarity(a, b, channel_axis=channels, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        )
    return found
