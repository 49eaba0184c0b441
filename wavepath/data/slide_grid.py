"""Regions put together from tiles of a grid, and the grids of resolutions that a file does not store.

A resampled grid is anchored at the slide's corner and made in fixed blocks, each from the same source pixels by the same steps
whoever asks for it: so overlapping reads agree to the bit, whatever their corners and sizes.
"""

import math
from collections.abc import Callable

import numpy as np

BLOCK, SMALL_BLOCK = 512, 256  # sides of a resampled block; small ones below a scale of 2, where single tiles are read
_WHOLE = 1e-6  # a factor so near a whole number is one
_PIECE, _LARGEST_PIECE = 512, 2560  # sides of the source of one averaged piece, in level pixels

Fetch = Callable[[int, int], np.ndarray]


def assemble(box: tuple[int, int, int, int], size: tuple[int, int], tile: tuple[int, int], fetch: Fetch) -> np.ndarray:
    """uint8[h, w, 3]: the region `box` (x, y, w, h) of an image of `size` (width, height), white outside it.

    `fetch(column, row)` gives uint8[>=th, >=tw, 3], the tile of `tile` (tw, th) pixels there; each is fetched once. Edge tiles may
    be cut to the image.
    """
    x, y, w, h = box
    tw, th = tile
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, size[0]), min(y + h, size[1])
    inside = left == x and top == y and right == x + w and bottom == y + h
    out = np.empty((h, w, 3), np.uint8) if inside else np.full((h, w, 3), 255, np.uint8)
    if left >= right or top >= bottom:
        return out
    for row in range(top // th, (bottom - 1) // th + 1):
        y1 = max(top, row * th)
        y2 = min(bottom, (row + 1) * th)
        for column in range(left // tw, (right - 1) // tw + 1):
            x1 = max(left, column * tw)
            x2 = min(right, (column + 1) * tw)
            out[y1 - y : y2 - y, x1 - x : x2 - x] = fetch(column, row)[y1 - row * th : y2 - row * th, x1 - column * tw : x2 - column * tw]
    return out


def split_factor(factor: float) -> tuple[int, float]:
    """A scale as its whole part, done by averaging pixels in blocks (as pyramids are made), and the rest below 2, done by a filter.

    Averaged pieces are made of native tiles that nobody else needs, so each is decoded once; a filter over the whole scale would
    reach over many tiles' borders, and give a scale of 2.1 another sharpness than one of 2. A rest of 1 needs no filter.
    """
    if abs(factor - round(factor)) < _WHOLE * factor:
        return round(factor), 1.0
    return int(factor), factor / int(factor)


def averaging_side(tile: int, whole: int) -> int:
    """Side of an averaged piece, in averaged pixels: of whole native tiles where that is possible at a sensible size."""
    aligned = math.lcm(tile, whole)
    aligned *= max(1, _PIECE // aligned)
    return max(1, (aligned if aligned <= _LARGEST_PIECE else _LARGEST_PIECE - _LARGEST_PIECE % whole) // whole)


def average(rgb: np.ndarray, whole: int) -> np.ndarray:
    """uint8[h, w, 3] -> uint8[h / whole, w / whole, 3], rounded means of `whole` by `whole` pixels."""
    from PIL import Image

    return np.array(Image.fromarray(rgb).reduce(whole))


def resample(read: Callable[[int, int, int, int], np.ndarray], factor: float, side: int, column: int, row: int) -> np.ndarray:
    """Block (column, row) of `side` by `side` pixels of the grid of scale `factor`, by Pillow's antialiasing bicubic filter.

    `read(x, y, w, h)` gives source pixels; more are read than the block covers, so that the filter sees the same neighbours at
    the border of a block as inside it.
    """
    from PIL import Image

    margin = math.ceil(2 * factor) + 1
    starts = [index * side * factor for index in (column, row)]
    firsts = [math.floor(start) - margin for start in starts]
    counts = [math.ceil(start + side * factor) + margin - first for start, first in zip(starts, firsts, strict=True)]
    source = Image.fromarray(read(*firsts, *counts))
    x, y = (start - first for start, first in zip(starts, firsts, strict=True))
    return np.array(source.resize((side, side), Image.Resampling.BICUBIC, box=(x, y, x + side * factor, y + side * factor)))
