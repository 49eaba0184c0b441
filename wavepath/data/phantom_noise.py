"""Randomness of the phantom slides as pure functions of a position: hashes, periodic textures, smooth fields.

A slide is rendered block by block, in any order and on several threads, and must not show where blocks meet. So nothing
here keeps a running generator: a random number is a hash of a lattice position, a texture is a periodic array read at
the block's place, and a smooth field is a cubic B-spline over a coarse grid, evaluated elementwise (no BLAS: its
results depend on the number of threads).
"""

import numpy as np
from jaxtyping import Float32, Int64, UInt32
from scipy import fft, ndimage

CELL = 16  # level-0 pixels of one cell of the coarse grid
PAD = 16  # cells of the coarse grid beyond each edge of the slide, for halos
MAX_BLOCK = 768  # the largest block side, halo included

_TEXTURE_PERIOD = 1024


def mix(value: UInt32[np.ndarray, "..."]) -> UInt32[np.ndarray, "..."]:
    """A bijection of 32-bit integers in which every bit changes about half of the output (xorshift-multiply)."""
    value = np.asarray(value, np.uint32)
    value = (value ^ (value >> np.uint32(16))) * np.uint32(0x7FEB352D)
    value = (value ^ (value >> np.uint32(15))) * np.uint32(0x846CA68B)
    return value ^ (value >> np.uint32(16))


def lattice_randoms(
    iy: Int64[np.ndarray, "n"], ix: Int64[np.ndarray, "n"], salt: int, count: int
) -> Float32[np.ndarray, "k n"]:
    """`count` uniform numbers in [0, 1) for each lattice cell; they depend on the cell and the salt alone."""
    base = mix(np.asarray(iy).astype(np.uint32) + np.uint32(salt & 0xFFFFFFFF))
    base = mix(base ^ (np.asarray(ix).astype(np.uint32) * np.uint32(0x9E3779B1)))
    steps = (np.arange(count, dtype=np.uint32) * np.uint32(0x85EBCA6B))[:, None]
    return (mix(base[None] + steps) >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def hex_lattice(
    y0: float, x0: float, y1: float, x1: float, pitch: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The cells of a hexagonal lattice whose centres lie in a box, a pitch of margin around it.

    Args:
        y0, x0, y1, x1: the box, in any unit of length.
        pitch: distance of neighbouring centres, in the same unit.

    Returns:
        iy, ix (int64[n]) and the centres y, x (float32[n]).
    """
    row = pitch * 0.8660254
    rows = np.arange(int(np.floor(y0 / row)) - 1, int(np.ceil(y1 / row)) + 2, dtype=np.int64)
    columns = np.arange(int(np.floor(x0 / pitch)) - 1, int(np.ceil(x1 / pitch)) + 2, dtype=np.int64)
    iy, ix = (part.ravel() for part in np.meshgrid(rows, columns, indexing="ij"))
    return iy, ix, (iy * row).astype(np.float32), ((ix + 0.5 * (iy & 1)) * pitch).astype(np.float32)


def _spline_weights(t: np.ndarray) -> np.ndarray:
    """Cubic B-spline weights of the four grid points at -1, 0, 1, 2 for a place t in [0, 1): float32[4, ...]."""
    t = np.asarray(t, np.float64)
    weights = [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]
    return np.stack(weights).astype(np.float32) / np.float32(6)


def _polyphase() -> np.ndarray:
    """Weights of the cells -2..2 around a cell for each of its `CELL` pixels: float32[5, CELL]."""
    place = (np.arange(CELL) + 0.5) / CELL - 0.5
    weights = np.zeros((5, CELL), np.float32)
    for pixel, t in enumerate(place):
        first = 0 if t < 0 else 1
        weights[first : first + 4, pixel] = _spline_weights(np.array(t - np.floor(t)))
    return weights


_WEIGHTS = _polyphase()


def upsample(
    field: Float32[np.ndarray, "gh gw"], y0: int, x0: int, height: int, width: int
) -> Float32[np.ndarray, "height width"]:
    """A block of the smooth field whose B-spline coefficients are the coarse grid.

    Args:
        field: the whole coarse grid, `PAD` cells of margin included.
        y0, x0, height, width: the block in level-0 pixels, all multiples of `CELL`; it may reach `PAD - 2` cells over
            the edges.
    """
    gy, gx, ny, nx = y0 // CELL + PAD, x0 // CELL + PAD, height // CELL, width // CELL
    part = field[gy - 2 : gy + ny + 2, gx - 2 : gx + nx + 2]
    rows = np.zeros((ny + 4, nx, CELL), np.float32)
    for tap in range(5):
        rows += part[:, tap : tap + nx, None] * _WEIGHTS[tap]
    rows = rows.reshape(ny + 4, 1, width)
    block = rows[2 : 2 + ny] * _WEIGHTS[2][None, :, None]
    term = np.empty((ny, CELL // 2, width), np.float32)  # reused: fresh memory costs more than the sums
    for half, taps in ((slice(0, CELL // 2), (0, 1, 3)), (slice(CELL // 2, CELL), (1, 3, 4))):
        for tap in taps:  # the fifth weight is zero in either half
            np.multiply(rows[tap : tap + ny], _WEIGHTS[tap, half][None, :, None], out=term)
            block[:, half] += term
    return block.reshape(height, width)


def sample(
    field: Float32[np.ndarray, "gh gw"], y: Float32[np.ndarray, "n"], x: Float32[np.ndarray, "n"]
) -> Float32[np.ndarray, "n"]:
    """Linear interpolation of the coarse grid at single places (level-0 pixels), clamped to the margin."""
    gy = np.clip(y / CELL + (PAD - 0.5), 0, field.shape[0] - 1.001).astype(np.float32)
    gx = np.clip(x / CELL + (PAD - 0.5), 0, field.shape[1] - 1.001).astype(np.float32)
    iy, ix = gy.astype(np.int64), gx.astype(np.int64)
    ty, tx = gy - iy, gx - ix
    top = field[iy, ix] * (1 - tx) + field[iy, ix + 1] * tx
    bottom = field[iy + 1, ix] * (1 - tx) + field[iy + 1, ix + 1] * tx
    return top * (1 - ty) + bottom * ty


def smooth_noise(
    shape: tuple[int, int], cell_um: float, wavelength_um: float, seed: list[int]
) -> Float32[np.ndarray, "gh gw"]:
    """Gaussian noise of unit variance on the coarse grid, smooth over about `wavelength_um`."""
    rng = np.random.default_rng(seed)
    step = max(wavelength_um / 2 / cell_um, 1e-6)  # a lattice of half the wavelength
    sizes = [int(np.ceil(extent / step)) + 4 for extent in shape]
    field = rng.standard_normal(sizes).astype(np.float32)
    for axis, extent in enumerate(shape):
        place = np.arange(extent) / step + 1
        first = np.floor(place).astype(np.int64)
        weights = _spline_weights(place - first)
        # In place: on a large slide one of these arrays is 25 MB.
        total = np.zeros((extent, field.shape[1]) if axis == 0 else (field.shape[0], extent), np.float32)
        for tap in range(4):
            term = field.take(first + (tap - 1), axis=axis)
            term *= weights[tap][:, None] if axis == 0 else weights[tap][None]
            total += term
        field = total
    # A B-spline keeps on average 0.479 of white noise's variance along an axis, squared for two axes.
    field *= np.float32(1 / 0.479)
    return field


def _band(shape: tuple[int, int], low: float, high: float, seed: list[int], stretch: float = 1.0) -> np.ndarray:
    """Periodic noise, unit variance, of wavelengths `low` to `high` in pixels; `stretch` lengthens it along x."""
    white = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    fy = np.fft.fftfreq(shape[0]).astype(np.float32)[:, None]
    fx = np.fft.rfftfreq(shape[1]).astype(np.float32)[None] * np.float32(stretch)
    f2 = fy * fy + fx * fx
    gain = np.exp(-f2 * np.float32(1.4 * low**2)) - np.exp(-f2 * np.float32(1.4 * high**2))
    field = fft.irfft2(fft.rfft2(white) * gain, s=shape)
    return ((field - field.mean()) / field.std()).astype(np.float32)


class Textures:
    """Periodic textures at several scales, read at any place of a slide without a copy.

    Args:
        seed: seeds of the slide.
        mpp: micrometres per pixel; the textures' scales are micrometres.
    """

    # name -> shortest and longest wavelength in um, period in pixels; periods differ so that sums repeat far away.
    _BANDS = {
        "grain": (0.35, 1.1, _TEXTURE_PERIOD),  # cytoplasm, sensor
        "fine": (1.2, 4.5, 1000),
        "medium": (4.0, 13.0, 944),
        "coarse": (14.0, 45.0, _TEXTURE_PERIOD),
    }
    # Fibres: texels of 1/8 um across and 1 um along, read through the fibres' own coordinates.
    _FIBRE_PERIODS, _ACROSS, _ALONG = (2048, 1024), 8, 1

    def __init__(self, seed: list[int], mpp: float):
        self._fields = {}
        for number, (name, (low, high, period)) in enumerate(self._BANDS.items()):
            field = _band((period, period), low / mpp, high / mpp, [*seed, number])
            self._fields[name] = np.pad(field, ((0, MAX_BLOCK), (0, MAX_BLOCK)), mode="wrap"), period
        # Thin strands and the bundles that they run in: wavelengths in texels; texels are 8 times as long as wide.
        strands = _band(self._FIBRE_PERIODS, 11, 40, [*seed, 100], stretch=1.2)
        bundles = _band(self._FIBRE_PERIODS, 40, 150, [*seed, 101], stretch=0.8)
        self._strands, self._bundles = (part.astype(np.float16).ravel() for part in (strands, bundles))

    def block(self, name: str, y0: int, x0: int, height: int, width: int) -> Float32[np.ndarray, "height width"]:
        """A texture at a block of the slide (a view: do not write to it)."""
        field, period = self._fields[name]
        y, x = y0 % period, x0 % period
        return field[y : y + height, x : x + width]

    def fibres(self, v: Float32[np.ndarray, "h w"], u: Float32[np.ndarray, "h w"]) -> tuple[np.ndarray, np.ndarray]:
        """Strands and bundles (float32[h, w] each, unit variance) at fibre coordinates v across and u along, in um."""
        across, along = self._FIBRE_PERIODS  # powers of two
        place = np.floor(v * np.float32(self._ACROSS)).astype(np.int32)
        place &= across - 1
        place *= along
        column = np.floor(u * np.float32(self._ALONG)).astype(np.int32)
        column &= along - 1
        place += column
        return self._strands.take(place).astype(np.float32), self._bundles.take(place).astype(np.float32)


def blur(image: Float32[np.ndarray, "h w"], sigma_px: float) -> Float32[np.ndarray, "h w"]:
    """A nearly Gaussian blur: three running means, whose cost does not grow with the width."""
    width = max(1, int(round(np.sqrt(4 * sigma_px**2 + 1))))
    for _ in range(3):
        image = ndimage.uniform_filter(image, width, mode="nearest")
    return image
