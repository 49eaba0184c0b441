"""One grid of overlapping tiles for every task that makes pixels, and the blending of what the tiles give.

Along each axis tiles of one length start every `tile - overlap` pixels. The outermost `context` pixels of a tile's output are never used: a
convolution has invented half of what it saw there. The image is mirrored by as much beyond its borders, so this holds for border pixels as
well. What remains of the overlap, `overlap - 2 context` pixels, is a linear ramp from one tile to the next. The last tile ends where the
mirrored image ends; an image smaller than a tile is one tile, mirrored up to its size.

    row of tiles    |c|------------|~ramp~|c|
                                 |c|~ramp~|------------|~ramp~|c|

Weights are divided by their sum along each axis, so they sum to 1 at every pixel whatever the overlaps are, and a task that is local (each
output pixel depends on `context` pixels around it) gives the same as on the whole image.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from wavepath.errors import ConfigError

LEAST_TILE = 32  # px; smaller ones are mostly overlap


def check_tiling(tile: int, overlap: int, context: int) -> None:
    """Refuses tiles that do not cover an image.

    Raises:
        ConfigError: naming the sizes that fit.
    """
    if tile < 1:
        raise ConfigError(f"a tile has at least one pixel, got {tile}")
    if not 0 <= overlap < tile:
        raise ConfigError(f"the overlap is at least 0 and less than the tile's {tile} px, got {overlap}")
    if not 0 <= 2 * context <= overlap:
        raise ConfigError(f"the unused border of a tile is at most half of the overlap ({overlap} px), got {context}")


def tiling(patch: int, tile: int | None = None, overlap: int | None = None) -> tuple[int, int]:
    """Tile and overlap in input px: what is asked for, else the side that was trained on, at least 32 px, and a quarter of the tile.

    Args:
        patch: side in px of what the network (of several: any of them) was trained on.

    Raises:
        ConfigError: they do not cover an image, see `check_tiling`.
    """
    tile = max(LEAST_TILE, patch) if tile is None else tile
    overlap = tile // 4 if overlap is None else overlap
    check_tiling(tile, overlap, overlap // 4)
    return tile, overlap


@dataclass(frozen=True)
class Axis:
    """The tiles along one axis. Lengths are input pixels; weights are for output pixels, `scale` to each of them.

    Attributes:
        length: of the image.
        tile, overlap, context: see the module's text.
        scale: output pixels for each input pixel.
    """

    length: int
    tile: int
    overlap: int
    context: int = 0
    scale: int = 1

    def __post_init__(self) -> None:
        check_tiling(self.tile, self.overlap, self.context)
        if self.length < 1:
            raise ConfigError(f"an image has at least one pixel, got {self.length}")

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each tile begins, first -`context`; all tiles have one length, the last ends `context` behind the image (or later: it is alone)."""
        first, last = -self.context, self.length + self.context - self.tile
        if last <= first:
            return (first,)
        regular = range(first, last, self.tile - self.overlap)
        return (*regular, last)

    @cached_property
    def weights(self) -> tuple[np.ndarray, ...]:
        """float32[tile * scale] for each tile: its share of each output pixel; 0 beyond the image and in the unused border."""
        size = self.tile * self.scale
        ramp = (self.overlap - 2 * self.context) * self.scale
        # Distance of each pixel's centre from the nearer end of what is used of the tile.
        inside = np.minimum(np.arange(size), np.arange(size)[::-1]) + 0.5 - self.context * self.scale
        window = (inside > 0).astype(np.float64) if ramp == 0 else np.clip(inside / ramp, 0.0, 1.0)
        total = np.zeros(self.length * self.scale)
        spans = [self._span(start) for start in self.starts]
        for low, high, skipped in spans:
            total[low:high] += window[skipped : skipped + high - low]
        weights = []
        for low, high, skipped in spans:
            weight = np.zeros(size, np.float32)
            weight[skipped : skipped + high - low] = window[skipped : skipped + high - low] / total[low:high]
            weights.append(weight)
        return tuple(weights)

    def _span(self, start: int) -> tuple[int, int, int]:
        """Output pixels [low, high) of the image that the tile at `start` covers, and how many of its own lie before the image."""
        low, high = max(0, start), min(self.length, start + self.tile)
        return low * self.scale, high * self.scale, (low - start) * self.scale

    def used(self, index: int) -> tuple[int, int, int]:
        """Output pixels [low, high) of the image to which tile `index` contributes, and where they begin within its output."""
        start = self.starts[index]
        low, high = max(0, start + self.context), min(self.length, start + self.tile - self.context)
        return low * self.scale, high * self.scale, (low - start) * self.scale

    def box(self, index: int) -> tuple[int, int, int, int]:
        """Where to read tile `index`: first pixel and count within the image, and how many to mirror before and behind."""
        start = self.starts[index]
        low, high = max(0, start), min(self.length, start + self.tile)
        return low, high - low, low - start, start + self.tile - high


@dataclass(frozen=True)
class Grid:
    """Tiles of one shape over an image of `height` x `width` input pixels, in rows from top to bottom."""

    height: int
    width: int
    tile: int
    overlap: int
    context: int = 0
    scale: int = 1

    @cached_property
    def rows(self) -> Axis:
        """The tiles down the image."""
        return Axis(self.height, self.tile, self.overlap, self.context, self.scale)

    @cached_property
    def columns(self) -> Axis:
        """The tiles across the image."""
        return Axis(self.width, self.tile, self.overlap, self.context, self.scale)

    @property
    def count(self) -> int:
        """Tiles in all."""
        return len(self.rows.starts) * len(self.columns.starts)

    def bands(self, tiles: int) -> list[range]:
        """The rows of tiles in groups of at least `tiles` tiles where there are as many: what is computed, and kept, as one piece."""
        step = max(1, math.ceil(tiles / len(self.columns.starts)))
        count = len(self.rows.starts)
        return [range(row, min(row + step, count)) for row in range(0, count, step)]

    def done(self, rows: int) -> int:
        """Output rows that are final when the first `rows` rows of tiles have been blended."""
        axis = self.rows
        return axis.used(rows)[0] if rows < len(axis.starts) else self.height * self.scale

    def reach(self, row: int) -> int:
        """The output row behind the last one to which a row of tiles contributes."""
        return self.rows.used(row)[1]


class Canvas:
    """Output rows while they are blended: memory for one band of tiles, float32, not for the image.

    Tiles are added in any rows that follow; `take(stop)` gives the rows that are final and forgets them. Equal tiles added in equal order give
    equal bytes.
    """

    def __init__(self, grid: Grid, top: int = 0):
        self._grid, self._top = grid, top
        self._sum = np.zeros((0, grid.width * grid.scale, 3), np.float32)

    def add(self, row: int, column: int, values: np.ndarray) -> None:
        """Blends one tile's output, float32[tile * scale, tile * scale, 3] in [0, 1], in."""
        rows, columns = self._grid.rows, self._grid.columns
        low, high, y = rows.used(row)
        left, right, x = columns.used(column)
        hidden = max(0, self._top - low)  # rows that were given out before: a band that is computed again after an interruption
        low, y = low + hidden, y + hidden
        if low >= high:
            return
        self._grow(high - self._top)
        weight = rows.weights[row][y : y + high - low, None, None] * columns.weights[column][None, x : x + right - left, None]
        self._sum[low - self._top : high - self._top, left:right] += values[y : y + high - low, x : x + right - left] * weight

    def _grow(self, height: int) -> None:
        if height > len(self._sum):
            sums = np.zeros((height, *self._sum.shape[1:]), np.float32)
            sums[: len(self._sum)] = self._sum
            self._sum = sums

    def take(self, stop: int) -> np.ndarray:
        """uint8[stop - top, width, 3]: the rows before `stop` that were not taken yet, rounded to nearest."""
        count = stop - self._top
        self._grow(count)
        rows = self._sum[:count]
        np.clip(rows, 0.0, 1.0, out=rows)
        rows *= 255.0
        np.rint(rows, out=rows)
        self._sum, self._top = self._sum[count:].copy(), stop
        return rows.astype(np.uint8)
