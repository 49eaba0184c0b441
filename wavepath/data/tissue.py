"""Where the tissue is, and what spoils it: pen, loss of focus, padding. On a coarse grid of cells, from one reading of the overview.

An image is reduced cell by cell (`cell_features`) to its mean colour and two texture energies; a slide's
strips are reduced one by one and joined, so memory holds a few bytes for each cell and never the overview. `tissue_map` then decides:

* **foreground**: coloured, or dark, or grey with structure; glass is none of these. Smoothed, closed, freed of specks and small holes.
* **pen**: by the direction of the optical density, which thickness of the ink does not change. In tissue green absorbs most, then
  blue in eosin and red blood, or red in haematoxylin. Red ink absorbs green and blue alike and hardly any red; green and blue ink absorb
  more red than green; black ink absorbs all alike and more than nuclei do on average. A pen's core must be certain; its faint rim
  is taken where it touches the core.
* **blur**: the finest wavelet energy is small, and small beside the next coarser one (a ramp has 1/16, sharp tissue at 5x 0.12 to 0.5,
  noise 1), both in themselves or both against the slide's own median; or there is no structure at all under the colour.
* **padding**: exactly flat white or black that touches the border.

Thresholds are the `tissue` tree of the config; they were set on the images of the quality test and on the real tiles beside them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from ml_collections import ConfigDict
from scipy import ndimage

# Optical density of each uint8 value; zero light counts as half a grey level.
_DENSITY = -np.log10(np.maximum(np.arange(256), 0.5) / 255).astype(np.float32)
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class Features:
    """What is kept of each cell: its mean colour, and its mean squared Haar details at one and two levels."""

    rgb: np.ndarray  # uint8[h, w, 3]
    fine: np.ndarray  # float32[h, w]
    coarse: np.ndarray  # float32[h, w]

    @staticmethod
    def join(parts: Iterable["Features"]) -> "Features":
        """Stacks strips from top to bottom."""
        parts = list(parts)
        return Features(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("rgb", "fine", "coarse")))


@dataclass(frozen=True)
class TissueMap:
    """Layers on a grid of square cells. `tissue` is clean tissue: pen, blurred and padded cells are already taken out of it."""

    tissue: np.ndarray  # bool[h, w]
    pen: np.ndarray
    blur: np.ndarray
    padding: np.ndarray
    cell: float  # level-0 pixels for each cell
    mpp: float  # micrometres for each cell
    verdict: bool  # whether there is tissue to work on
    reason: str  # why not; empty where there is
    _sums: dict = field(default_factory=dict, repr=False, compare=False)

    def fractions(self, x0: np.ndarray, y0: np.ndarray, w: np.ndarray | float, h: np.ndarray | float, layer: str = "tissue") -> np.ndarray:
        """Share of each of many level-0 boxes that a layer covers, exact to the fraction of a cell; outside the slide nothing is covered."""
        if layer not in self._sums:
            # An integral image: screening asks for every region, extraction for every tile.
            self._sums[layer] = np.pad(getattr(self, layer), ((1, 0), (1, 0))).cumsum(0, dtype=np.int64).cumsum(1)
        sums, (rows, columns) = self._sums[layer], self.tissue.shape

        def at(y: np.ndarray, x: np.ndarray) -> np.ndarray:
            y, x = np.clip(y / self.cell, 0, rows), np.clip(x / self.cell, 0, columns)
            i, j = np.minimum(y.astype(int), rows - 1), np.minimum(x.astype(int), columns - 1)
            a, b = y - i, x - j
            return (1 - a) * ((1 - b) * sums[i, j] + b * sums[i, j + 1]) + a * ((1 - b) * sums[i + 1, j] + b * sums[i + 1, j + 1])

        x0, y0 = np.asarray(x0, np.float64), np.asarray(y0, np.float64)
        covered = at(y0 + h, x0 + w) - at(y0, x0 + w) - at(y0 + h, x0) + at(y0, x0)
        return np.clip(covered * self.cell**2 / (w * h), 0, 1)

    def fraction(self, x0: float, y0: float, w: float, h: float, layer: str = "tissue") -> float:
        """`fractions` of one box."""
        return float(self.fractions(x0, y0, w, h, layer))

    def share(self, layer: str = "tissue") -> float:
        """Share of the whole grid that a layer covers."""
        return float(getattr(self, layer).mean())


@dataclass(frozen=True)
class Quality:
    """The verdict on one image, with the share of it that each layer covers."""

    ok: bool
    reason: str
    tissue: float
    pen: float
    blur: float
    padding: float
    map: TissueMap


def on_white(image: np.ndarray) -> np.ndarray:
    """RGB from uint8 grey [h, w], RGB, or RGBA composited on white."""
    if image.ndim == 2:
        return np.repeat(image[..., None], 3, -1)
    if image.shape[-1] == 4:
        alpha = image[..., 3:].astype(np.uint16)
        return ((image[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return image[..., :3]


def _blocks(values: np.ndarray, side: int, kind: type) -> np.ndarray:
    """Sums over side x side blocks of [h, w, ...], added by whole rows and then by strides, which numpy vectorises."""
    rows = sum((values[k::side] for k in range(1, side)), values[::side].astype(kind))
    return sum((rows[:, k::side] for k in range(1, side)), rows[:, ::side])


def _details(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Haar approximation, and the mean square of its three details, at half size."""
    top, bottom = grey[::2], grey[1::2]
    plus, minus = top + bottom, top - bottom
    low, high = plus[:, ::2] + plus[:, 1::2], plus[:, ::2] - plus[:, 1::2]
    left, right = minus[:, ::2], minus[:, 1::2]
    # (left + right)^2 + (left - right)^2 = 2 (left^2 + right^2)
    energy = (high * high + 2 * (left * left + right * right)) * np.float32(1 / 12)
    return low * np.float32(0.5), energy


def cell_features(rgb: np.ndarray, cell: int) -> Features:
    """Reduces an image, or a strip whose height is a multiple of 4 and of `cell`, to cells.

    Args:
        rgb: uint8[h, w, 3]; the last row and column are repeated up to whole cells and whole 4-pixel blocks.
        cell: pixels a side, a power of two up to 128.
    """
    unit = max(cell, 4)
    missing = (-rgb.shape[0] % unit, -rgb.shape[1] % unit)
    if any(missing):
        rgb = np.pad(rgb, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
    grey = rgb[..., 0] * (_LUMA[0] / 255)
    grey += rgb[..., 1] * (_LUMA[1] / 255)
    grey += rgb[..., 2] * (_LUMA[2] / 255)
    half, fine = _details(grey)
    _, coarse = _details(half)

    def to_cells(energy: np.ndarray, block: int) -> np.ndarray:
        if cell >= block:
            return _blocks(energy, cell // block, np.float32) * np.float32((block / cell) ** 2)
        return np.repeat(np.repeat(energy, block // cell, 0), block // cell, 1)

    mean = (_blocks(rgb, cell, np.uint32 if cell > 16 else np.uint16) + cell * cell // 2) // (cell * cell)
    return Features(mean.astype(np.uint8), to_cells(fine, 2), to_cells(coarse, 4))


def _grow(mask: np.ndarray, radius: float) -> np.ndarray:
    """The mask and everything within `radius` cells of it, by squares: separable, and its cost does not rise with the radius."""
    reach = int(radius)
    if reach < 1 or not mask.any():
        return mask
    return ndimage.maximum_filter(mask.view(np.uint8), 2 * reach + 1, mode="nearest").view(bool)


def _shrink(mask: np.ndarray, radius: float) -> np.ndarray:
    return ~_grow(~mask, radius)


def _open(mask: np.ndarray, radius: float) -> np.ndarray:
    """Without what is narrower than a square of 2 `radius` + 1 cells."""
    return _grow(_shrink(mask, radius), radius) if mask.any() else mask


def _mean3(plane: np.ndarray) -> np.ndarray:
    """Mean over 3 x 3 cells."""
    padded = np.pad(plane, 1, mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) * np.float32(1 / 9)


def _drop_small(mask: np.ndarray, cells: float) -> np.ndarray:
    """Without the 8-connected pieces below `cells`."""
    if cells <= 1 or not mask.any():
        return mask
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= cells)[labels]


def _pen(features: Features, settings: ConfigDict, um: float) -> np.ndarray:
    """Pen of any of four colours. Ratios of optical densities; the certain core first, then its rim within reach."""
    red, green, blue = (_mean3(_DENSITY[features.rgb[..., channel]]) for channel in range(3))
    mean = (red + green + blue) / 3
    spread = (np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)) / np.maximum(mean, 1e-3)
    blue_share, red_share = blue / np.maximum(green, 1e-3), red / np.maximum(green, 1e-3)
    # A smaller core is a nucleus, a blood cell or a speck of pigment.
    stroke, reach = settings.pen_area_um2 / um**2, settings.pen_reach_um / um
    core, rim = np.zeros(mean.shape, bool), np.zeros(mean.shape, bool)
    for certain, likely, smallest in (
        (  # red: hardly any red absorbed, as by no blood
            (blue_share > settings.pen_red_blue) & (red_share < 0.15) & (green > settings.pen_density),
            ((blue_share > settings.pen_red_blue - 0.06) & (red_share < 0.45) | (blue_share > settings.pen_red_blue - 0.12) & (red_share < 0.27))
            & (green > 0.12),
            stroke,
        ),
        (  # red over tissue: packed red cells look like it, but never over so large an area without a gap
            _open((blue_share > settings.pen_red_blue) & (red_share < 0.25) & (green > 1.45 * settings.pen_density), 1),
            np.zeros(mean.shape, bool),
            settings.pen_veil_um2 / um**2,
        ),
        (  # green and blue
            (red - green > 0.10) & (red_share > 1.2) & (mean > 0.08),
            (red - green > 0.02) & (red_share > 1.05),
            min(stroke, max(10, 5e-4 * mean.size)),  # no tissue has these colours: the thin lines of a thumbnail count
        ),
        (  # black: more alike in all colours than haematoxylin, and darker than tissue is on average; a nucleus is, too, but is small
            (mean > settings.pen_black) & (spread < 0.5) & (blue_share > 0.7),
            (mean > 0.6 * settings.pen_black) & (spread < 0.65) & (blue_share > 0.7),
            4 * stroke,
        ),
    ):
        core |= _drop_small(certain, smallest)
        rim |= likely
    if not core.any():
        return core
    # Single cells of tissue have a rim's colour too: the rim is opened, and kept where it hangs together with a core of whatever colour.
    rim = core | _open(rim, 1) & _grow(core, reach)
    pen = ndimage.binary_propagation(core, mask=rim)
    return _grow(pen, settings.pen_margin_um / um)


def _share(mask: np.ndarray, size: int) -> np.ndarray:
    """Share of the mask in a window of `size` cells."""
    return ndimage.uniform_filter(mask.astype(np.float32), size, mode="nearest")


def _blur(features: Features, foreground: np.ndarray, pen: np.ndarray, settings: ConfigDict, um: float) -> np.ndarray:
    """Foreground without fine structure, judged in a window of `blur_window_um`."""
    size = max(3, int(round(settings.blur_window_um / um)) | 1)
    fine, coarse = (ndimage.uniform_filter(np.asarray(e, np.float32), size, mode="nearest") for e in (features.fine, features.coarse))
    # Rounding and compression add alike to both, and would lift the ratio where little else is left.
    ratio = np.maximum(fine - settings.blur_noise, 0) / np.maximum(coarse - settings.blur_noise, 1e-9)
    # What the slide itself shows where it is sharp. A ramp's ratio is 1/16, so high magnifications, where 0.1 is sharp, are not judged by it.
    inside = foreground if foreground.any() else np.ones_like(foreground)
    usual_fine, usual_ratio = float(np.median(fine[inside])), float(np.median(ratio[inside]))
    # Beside a pen the benefit of the doubt is the pen's: its faint edge is smooth too.
    smooth = ratio < settings.blur_ratio * np.where(_grow(pen, settings.pen_reach_um / um), 1.25, 1)
    softer = ratio < settings.blur_relative_ratio * usual_ratio
    soft = smooth & (fine < settings.blur_floor) | softer & (fine < settings.blur_relative * usual_fine) | (coarse < settings.blur_empty)
    core = foreground & (_share(soft & foreground, size) > 0.5 * _share(foreground, size))
    # The outline of blurred tissue against glass has energy, but is as smooth as the rest.
    return core | foreground & (smooth | softer) & _grow(core, size)


def _padding(features: Features, luma: np.ndarray, settings: ConfigDict) -> np.ndarray:
    """Flat white or black that touches the border: nothing a camera saw is without noise."""
    flat = (features.fine < 1e-9) & (features.coarse < 1e-9) & ((luma > 0.99) | (luma < settings.black))
    labels, count = ndimage.label(flat)
    if not count:
        return flat
    touching = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    return np.isin(labels, touching[touching > 0])


def tissue_map(features: Features, settings: ConfigDict, *, um: float, cell: float) -> TissueMap:
    """Decides the layers from the features of a whole slide or image.

    Args:
        features: of all cells.
        settings: the `tissue` tree of the config.
        um: micrometres for each cell; the filters' sizes follow from it.
        cell: level-0 pixels for each cell, recorded in the map.
    """
    red, green, blue = (features.rgb[..., channel] for channel in range(3))
    luma = red * (_LUMA[0] / 255) + green * (_LUMA[1] / 255) + blue * (_LUMA[2] / 255)
    brightest = np.maximum(np.maximum(red, green), blue).astype(np.float32)
    saturation = (brightest - np.minimum(np.minimum(red, green), blue)) / np.maximum(brightest, 1)
    coloured = (saturation > settings.saturation) & (luma < settings.white) | (luma < settings.dark)
    size = int(round(settings.window_um / um)) | 1
    # In a thumbnail or a tile of few pixels the window is a share of the image.
    size = min(size, max(1, (min(luma.shape) // 16) | 1))
    foreground = _share(coloured, size) >= settings.coloured if size > 1 else coloured
    # Pale counterstain without a colour of its own: told from glass by its structure, and from a coverslip's edge by its width.
    grey = _share((luma < settings.grey) & (features.coarse > settings.structure), size) >= 0.5
    foreground |= _open(grey, size)

    padding = _padding(features, luma, settings)
    nothing = np.zeros_like(foreground)
    pen = _pen(features, settings, um) & ~padding if settings.pen else nothing
    candidates = foreground & ~pen & ~padding
    blur = _blur(features, candidates, pen, settings, um) if settings.blur else nothing
    smallest = min(settings.min_area_um2 / um**2, settings.min_share * luma.size)
    blur &= _drop_small(blur | pen, smallest / 4)

    tissue = candidates & ~blur
    radius = settings.close_um / 2 / um
    tissue = _shrink(_grow(tissue, radius), radius)
    holes = ~tissue
    tissue = ~_drop_small(holes, min(settings.max_hole_um2 / um**2, settings.min_share * luma.size))
    tissue = _drop_small(tissue & ~pen & ~padding & ~blur, smallest)

    verdict, reason = bool(tissue.any()), ""
    if not verdict:
        layers = {"pen": pen.mean(), "out of focus": blur.mean(), "padding": padding.mean()}
        worst = max(layers, key=layers.get)
        reason = "no tissue" + (f": {worst} covers {layers[worst]:.0%}" if layers[worst] > 0.1 else ": glass only")
    return TissueMap(tissue, pen, blur, padding, float(cell), float(um), verdict, reason)


def assess_image(rgb: np.ndarray, settings: ConfigDict, pixel_um: float = 2.0) -> Quality:
    """The quality step on one image, without a physical scale of its own.

    Args:
        rgb: uint8[h, w, 3], or [h, w, 4] (composited on white), or grey [h, w].
        settings: the `tissue` tree of the config.
        pixel_um: micrometres for each pixel, where known; otherwise the screening magnification is assumed (2 um, 5x).

    Returns:
        Whether the image holds tissue, why not, and the layers. A small image is judged in cells of 2 pixels or 1.
    """
    rgb = on_white(np.asarray(rgb))
    side = min(rgb.shape[:2])
    cell = next((c for c in (4, 2) if side >= 120 * c), 1)
    found = tissue_map(cell_features(rgb, cell), settings, um=cell * pixel_um, cell=cell)
    rows, columns = -(-rgb.shape[0] // cell), -(-rgb.shape[1] // cell)
    layers = {name: getattr(found, name)[:rows, :columns] for name in ("tissue", "pen", "blur", "padding")}
    found = TissueMap(**layers, cell=found.cell, mpp=found.mpp, verdict=found.verdict, reason=found.reason)
    return Quality(found.verdict, found.reason, *(found.share(name) for name in layers), found)


def contours(mask: np.ndarray, cell: float = 1.0) -> list[np.ndarray]:
    """Closed outlines of a mask, for drawing: each float[n, 2] of (x, y) in level-0 pixels when `cell` is the map's cell.

    Outer borders and the borders of holes, longest first; the corners of cells are cut by half a cell.
    """
    from skimage.measure import find_contours

    found = find_contours(np.pad(np.asarray(mask, np.float32), 1), 0.5)
    outlines = [np.clip((line[:, ::-1] - 0.5), 0, np.array(mask.shape[::-1])) * cell for line in found]
    return sorted(outlines, key=len, reverse=True)
