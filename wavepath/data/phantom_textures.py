"""Phantom texture classes that only second-order statistics tell apart.

Every image of every class holds the same pixel values, each the same number of times, so mean, variance and the whole histogram are equal to
the last digit; what differs is where the values stand, that is, the co-occurrences. Classes are Gaussian random fields of different spectra
(oriented along four directions, isotropic, band-pass) whose values are replaced by rank. Frequencies below one in a dozen pixels are damped in
all of them, so that patches of 16 px differ little between classes in the spread of their means and in their variance.

A value is an amount of haematoxylin over even eosin, drawn by Beer-Lambert's law: the images have H&E's colours, and every channel is a monotone
function of the value.
"""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image
from scipy import fft
from scipy.stats import beta

from wavepath import console
from wavepath.errors import WavepathError
from wavepath.files import atomic_path, writable_folder

CLASSES = ("antidiagonal", "band", "diagonal", "horizontal", "isotropic", "vertical")
MIN_SIZE = 16

_LONG, _SHORT = 3.0, 0.75  # px, standard deviations of the smoothing along and across an oriented texture
_ROUND = 1.5  # px, of the isotropic one: the same area of smoothing
_BAND, _BAND_WIDTH = 0.17, 0.03  # cycles per pixel: the ring of frequencies of the band-pass texture
_LOCAL = 0.08  # cycles per pixel below which all classes are damped: slower waves would make the means of patches differ
_ANGLES = {"horizontal": 0.0, "antidiagonal": 45.0, "vertical": 90.0, "diagonal": 135.0}  # of the lines, counter-clockwise from the right
# Light absorbed in red, green and blue by a unit of each stain (optical density; Ruifrok & Johnston), and the amounts.
_HAEMATOXYLIN, _EOSIN = np.array([0.65, 0.70, 0.29]), np.array([0.07, 0.99, 0.11])
_AMOUNTS, _EOSIN_AMOUNT = (0.1, 1.1), 0.18


def texture(name: str, size: int, rng: np.random.Generator) -> UInt8[np.ndarray, "size size 3"]:
    """One image of a class; all images of a size are rearrangements of the same pixels.

    Args:
        name: one of `CLASSES`.
        size: side in pixels, from 16.
        rng: draws the field.

    Raises:
        WavepathError: an unknown class, or a size too small to hold texture.
    """
    if name not in CLASSES:
        raise WavepathError(f"there is no texture class {name!r}; choose one of {', '.join(CLASSES)}")
    if size < MIN_SIZE:
        raise WavepathError(f"{size} px hold no texture to speak of; give --size {MIN_SIZE} or more")
    # Twice the side, and a quarter of it kept: the field is periodic, the image is not.
    field = fft.ifft2(fft.fft2(rng.standard_normal((2 * size, 2 * size))) * _response(name, 2 * size)).real[:size, :size]
    order = np.argsort(field, axis=None, kind="stable")
    levels = np.empty(size * size)
    levels[order] = beta.ppf((np.arange(size * size) + 0.5) / (size * size), 2, 2)
    return _stain(levels.reshape(size, size))


def _response(name: str, side: int) -> Float64[np.ndarray, "side side"]:
    """Gain of each frequency."""
    v, u = np.meshgrid(fft.fftfreq(side), fft.fftfreq(side), indexing="ij")
    radius = np.hypot(u, v)
    local = 1 - np.exp(-((radius / _LOCAL) ** 2))
    if name == "band":
        return local * np.exp(-0.5 * ((radius - _BAND) / _BAND_WIDTH) ** 2)
    along = across = _ROUND
    angle = np.deg2rad(_ANGLES.get(name, 0.0))
    if name in _ANGLES:
        along, across = _LONG, _SHORT
    # Rows count downwards, angles upwards.
    x, y = u * np.cos(angle) - v * np.sin(angle), u * np.sin(angle) + v * np.cos(angle)
    return local * np.exp(-2 * np.pi**2 * ((along * x) ** 2 + (across * y) ** 2))


def _stain(levels: Float64[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    amount = _AMOUNTS[0] + (_AMOUNTS[1] - _AMOUNTS[0]) * levels
    density = amount[..., None] * _HAEMATOXYLIN + _EOSIN_AMOUNT * _EOSIN
    return np.rint(255 * 10.0**-density).astype(np.uint8)


def make_textures(out: Path, count: int, seed: int, size: int = 224, progress: bool = True) -> list[Path]:
    """Writes `count` PNG images of each class to `out/<class>/<class>_0000.png`, ...: a labelled folder of images.

    Image `n` of a class and seed is the same whatever the count.

    Args:
        out: folder, made where it is missing; images of the same names are replaced.
        count: images of each class.
        seed: any integer from 0.
        size: side in pixels, from 16.
        progress: show progress and ETA.

    Returns:
        The images' paths.

    Raises:
        WavepathError: a number out of range, or a folder that cannot be written.
    """
    if count < 1:
        raise WavepathError(f"cannot make {count} images of each class; give --textures 1 or more")
    if seed < 0:
        raise WavepathError(f"a seed is not negative, got {seed}; give --seed 0")
    out = writable_folder(Path(out))
    paths = []
    with console.progress("phantom textures", count * len(CLASSES), "images") if progress else nullcontext() as bar:
        for label, name in enumerate(CLASSES):
            folder = writable_folder(out / name)
            for number in range(count):
                path = folder / f"{name}_{number:04d}.png"
                image = texture(name, size, np.random.default_rng((seed, label, number)))
                with atomic_path(path) as temporary:
                    Image.fromarray(image).save(temporary, format="PNG")
                paths.append(path)
                if bar is not None:
                    bar.advance(1, path.name)
    return paths
