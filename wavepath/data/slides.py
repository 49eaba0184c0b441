"""One interface to every slide: `open_slide(path)` gives a `Slide`, read by level and pixel or by level-0 position and mpp.

    with open_slide("case.svs") as slide:
        tile = slide.read(x0=4096, y0=8192, w=224, h=224, mpp=0.5)  # uint8[224, 224, 3]

Positions are whole level-0 pixels, sizes are output pixels, mpp is micrometres per pixel. What lies outside the slide is white.
A `Slide` may be used from many threads; the decoded tiles it keeps are limited in bytes.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from wavepath.data.mpp import SAME_MPP, read_mpp_csv, require_mpp, resolve
from wavepath.data.slide_backends import Backend, Level, open_backend
from wavepath.data.slide_cache import DEFAULT_CACHE_MB, DecodeAhead, TileCache, tile_order
from wavepath.data.slide_grid import BLOCK, SMALL_BLOCK, assemble, average, averaging_side, resample, split_factor
from wavepath.data.slide_lists import LabelRow, SlideRef, find_slides, read_labels
from wavepath.errors import SlideError

__all__ = [
    "LabelRow", "Level", "Slide", "SlideRef", "TileCache", "find_slides", "open_slide", "read_labels", "read_mpp_csv", "require_mpp",
]  # fmt: skip


def open_slide(
    path: Path | str, *, mpp: float | None = None, backend: str = "auto", cache_mb: float = DEFAULT_CACHE_MB, cache: TileCache | None = None
) -> "Slide":
    """Opens a slide of any format that wavepath reads.

    Args:
        path: the file; of a DICOM series any one file.
        mpp: micrometres per pixel at level 0, ahead of whatever the file says.
        backend: `auto` (by content), `tiff`, `openslide` or `image`.
        cache_mb: decoded tiles kept, in MiB; `cache` gives a `TileCache` to share between slides instead.

    Raises:
        SlideError: with the reason, if the file is missing, empty, damaged, truncated, unknown or too large untiled; or if
            `mpp` is outside 0.05 to 20.
    """
    path = Path(path)
    opened = open_backend(path, backend)
    try:
        return Slide(path, opened, mpp, cache if cache is not None else TileCache(int(cache_mb * (1 << 20))))
    except BaseException:
        opened.close()
        raise


class Slide:
    """An open slide; see the module's text. Made by `open_slide`."""

    def __init__(self, path: Path, backend: Backend, mpp: float | None, cache: TileCache):
        self.path = path
        self._backend, self._cache = backend, cache
        self._owner = object()  # marks this slide's tiles in a shared cache without keeping the slide alive
        self._native_lock = threading.Lock()
        self._native_decodes = 0
        believed = resolve(backend.mpp_candidates, mpp, path)
        self.mpp: float | None = believed.value  # micrometres per level-0 pixel, None if nothing trustworthy says it
        self.mpp_source: str = believed.source  # the field it came from, or "given"
        self.mpp_refused: tuple[str, ...] = believed.refused  # why other fields were not believed
        self.levels: tuple[Level, ...] = backend.levels
        self.tile_sizes = backend.tile_sizes  # (width, height) of the native tiles of each level
        self.dimensions: tuple[int, int] = (self.levels[0].width, self.levels[0].height)
        self.backend: str = backend.name
        self.properties: dict[str, str] = backend.properties
        self.vendor: str = backend.vendor
        self.objective: float | None = backend.objective
        self.compression: str = backend.compression

    @property
    def native_decodes(self) -> int:
        """Native tiles decoded so far: what reading has cost."""
        return self._native_decodes

    def level_mpp(self, level: int) -> float:
        """Micrometres per pixel of `level`.

        Raises:
            MissingMppError: the slide has no mpp.
        """
        return require_mpp(self) * self.levels[level].downsample

    def level_for(self, mpp: float) -> int:
        """The coarsest level from which `mpp` can be read: at `mpp` (1 %) or finer.

        Raises:
            MissingMppError: the slide has no mpp. SlideError: even level 0 is coarser than `mpp`.
        """
        fitting = [level for level in range(len(self.levels)) if self.level_mpp(level) <= mpp * (1 + SAME_MPP)]
        if not fitting:
            raise SlideError(
                f"{self.path} has {self.mpp:g} um per pixel, coarser than the {mpp:g} asked for; ask for {self.mpp:g} or more"
            )
        return max(fitting, key=lambda level: self.levels[level].downsample)

    def read_mpp(self, mpp: float) -> float:
        """The mpp near `mpp` (1 %) that costs least to read: that of a level, or a whole multiple of it; else `mpp` itself.

        A caller that reads neighbouring pieces at a coarse mpp (strips of an overview) asks for this value first, so that its
        steps in level-0 pixels are those of the pixels it gets.
        """
        level_mpp = self.level_mpp(self.level_for(mpp))
        whole = max(1, round(mpp / level_mpp)) * level_mpp
        return whole if abs(whole / mpp - 1) <= SAME_MPP else mpp

    def read_level(self, level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        """uint8[h, w, 3]: the region at (x, y) in whole pixels of `level`; white outside the slide.

        Raises:
            SlideError: no such level, or a damaged tile.
        """
        if not 0 <= level < len(self.levels):
            raise SlideError(f"{self.path} has levels 0 to {len(self.levels) - 1}, not {level}")
        return self._native(level, x, y, w, h)

    def read(self, x0: int, y0: int, w: int, h: int, mpp: float) -> np.ndarray:
        """uint8[h, w, 3]: `w` by `h` pixels of `mpp` micrometres whose top left corner is at level-0 pixel (x0, y0).

        Where a level has that mpp (1 %), its pixels are given as they are. Else the nearest finer level is resampled on one fixed
        pixel grid for the whole slide, so that overlapping reads agree to the bit; the corner goes to the nearest point of that
        grid (off by at most half an output pixel). At a whole multiple of a level's mpp pixels are averaged in blocks, at others
        an antialiasing bicubic filter is used.

        Raises:
            MissingMppError: the slide has no mpp. SlideError: `mpp` is finer than the slide's, or a tile is damaged.
        """
        level = self.level_for(mpp)
        factor = mpp / self.level_mpp(level)
        if abs(factor - 1) <= SAME_MPP:
            factor = 1.0
        step = self.levels[level].downsample * factor
        return self._read_grid(level, factor, math.floor(x0 / step + 0.5), math.floor(y0 / step + 0.5), w, h)

    def thumbnail(self, max_px: int) -> np.ndarray:
        """uint8[h, w, 3]: the whole slide, its longer side `max_px` (or the slide's own, if that is less)."""
        width, height = self.dimensions
        wanted = max(1.0, max(width, height) / max_px)
        level = max((n for n, each in enumerate(self.levels) if each.downsample <= wanted), key=lambda n: self.levels[n].downsample)
        factor = wanted / self.levels[level].downsample
        size = [max(1, min(max_px, round(side / wanted))) for side in (width, height)]
        if factor == 1.0:
            size = [min(size[0], self.levels[level].width), min(size[1], self.levels[level].height)]
        return self._read_grid(level, factor, 0, 0, *size)

    def read_many(self, level: int, boxes: Sequence[tuple[int, int, int, int]], threads: int = 1) -> Iterator[tuple[int, np.ndarray]]:
        """Reads many regions, each native tile decoded once: yields (index into `boxes`, uint8[h, w, 3]).

        The order is that of the slide's own tiles, not of `boxes` (x, y, w, h in pixels of `level`). `threads` counts the
        caller's thread: the others decode ahead. Memory is the cache's, whatever the number of boxes.
        """
        boxes = [tuple(int(value) for value in box) for box in boxes]
        tile, size = self.tile_sizes[level], self.levels[level][:2]
        order = list(tile_order(boxes, tile, size, self._cache.limit_bytes))
        if threads <= 1 or not self._backend.cached:
            for index in order:
                yield index, self.read_level(level, *boxes[index])
            return
        wanted = [self._tiles_of(level, boxes[index]) for index in order]
        first_use = list(dict.fromkeys(each for tiles in wanted for each in tiles))
        met: set[tuple[int, int]] = set()
        window = min(16 * threads, max(1, self._cache.limit_bytes // 4 // (tile[0] * tile[1] * 3)))
        with DecodeAhead(
            first_use,
            decode=lambda each: self._tile(level, *each),
            state=lambda each: self._cache.state((self._owner, level, *each)),
            threads=threads,
            window=window,
        ) as ahead:
            for index, tiles in zip(order, wanted, strict=True):
                for each in tiles:
                    if each not in met:
                        met.add(each)
                        ahead.need(each)
                        # Not looked at here, but decoded by this thread if no helper has begun.
                        self._tile(level, *each)
                yield index, self.read_level(level, *boxes[index])

    def close(self) -> None:
        """Closes the file and forgets its tiles."""
        self._backend.close()
        self._cache.drop(self._owner)

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tile(self, level: int, column: int, row: int, keep: bool = True) -> np.ndarray:
        if not self._backend.cached:
            return self._decode(level, column, row)
        return self._cache.get((self._owner, level, column, row), lambda: self._decode(level, column, row), keep)

    def _decode(self, level: int, column: int, row: int) -> np.ndarray:
        with self._native_lock:
            self._native_decodes += 1
        return self._backend.decode(level, column, row)

    def _tiles_of(self, level: int, box: tuple[int, int, int, int]) -> list[tuple[int, int]]:
        (x, y, w, h), (tw, th), (width, height, _) = box, self.tile_sizes[level], self.levels[level]
        columns = range(max(x, 0) // tw, (min(x + w, width) - 1) // tw + 1)
        return [(column, row) for row in range(max(y, 0) // th, (min(y + h, height) - 1) // th + 1) for column in columns]

    def _native(self, level: int, x: int, y: int, w: int, h: int, keep: bool = True) -> np.ndarray:
        """A region of a level's own pixels."""
        return assemble((x, y, w, h), self.levels[level][:2], self.tile_sizes[level], lambda column, row: self._tile(level, column, row, keep))

    def _read_grid(self, level: int, factor: float, x: int, y: int, w: int, h: int) -> np.ndarray:
        """Region (x, y, w, h) in pixels of the grid whose pixels are `factor` pixels of `level`, anchored at the slide's corner."""
        whole, rest = split_factor(factor)
        if rest == 1.0:
            return self._averaged(level, whole, x, y, w, h)
        side = BLOCK if factor >= 2 else SMALL_BLOCK
        size = tuple(math.ceil(extent / factor) for extent in self.levels[level][:2])

        def block(column: int, row: int) -> np.ndarray:
            def make() -> np.ndarray:
                return resample(lambda *box: self._averaged(level, whole, *box), rest, side, column, row)

            return self._cache.get((self._owner, "resampled", level, factor, column, row), make)

        return assemble((x, y, w, h), size, (side, side), block)

    def _averaged(self, level: int, whole: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        """Region (x, y, w, h) in pixels of the grid whose pixels are means of `whole` by `whole` pixels of `level`."""
        if whole == 1:
            return self._native(level, x, y, w, h)
        sides = [averaging_side(tile, whole) for tile in self.tile_sizes[level]]
        # Where the pieces are made of whole native tiles, nobody else needs those tiles.
        keep = any(side * whole % tile for side, tile in zip(sides, self.tile_sizes[level], strict=True))
        size = tuple(-(-extent // whole) for extent in self.levels[level][:2])

        def piece(column: int, row: int) -> np.ndarray:
            def make() -> np.ndarray:
                width, height = sides[0] * whole, sides[1] * whole
                return average(self._native(level, column * width, row * height, width, height, keep), whole)

            return self._cache.get((self._owner, "mean", level, whole, column, row), make)

        return assemble((x, y, w, h), size, (sides[0], sides[1]), piece)
