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

from wavepath.data.mpp import read_mpp_csv, require_mpp, resolve
from wavepath.data.slide_backends import Backend, Level, open_backend
from wavepath.data.slide_cache import DEFAULT_CACHE_MB, DecodeAhead, TileCache, tile_order
from wavepath.data.slide_lists import LabelRow, SlideRef, find_slides, read_labels
from wavepath.errors import SlideError

__all__ = [
    "LabelRow", "Level", "Slide", "SlideRef", "TileCache", "find_slides", "open_slide", "read_labels", "read_mpp_csv", "require_mpp",
]  # fmt: skip

SAME_MPP = 0.01  # a level within this share of the wanted mpp is read as it is
_REDUCE_FROM = 4.0  # from this factor on, whole blocks are averaged before the resampling filter
_SOURCE_SIDE = 4096  # largest source of one resampled block, in level pixels


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
        """The mpp at which `read(..., mpp=mpp)` really reads: that of a level within 1 % of it, else `mpp`.

        A caller that reads neighbouring pieces at a coarse mpp (strips of an overview) asks for this value, so that its steps
        in level-0 pixels are those of the pixels it gets.
        """
        level_mpp = self.level_mpp(self.level_for(mpp))
        return level_mpp if abs(level_mpp / mpp - 1) <= SAME_MPP else mpp

    def read_level(self, level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        """uint8[h, w, 3]: the region at (x, y) in whole pixels of `level`; white outside the slide.

        Raises:
            SlideError: no such level, or a damaged tile.
        """
        if not 0 <= level < len(self.levels):
            raise SlideError(f"{self.path} has levels 0 to {len(self.levels) - 1}, not {level}")
        width, height, _ = self.levels[level]
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
        inside = left == x and top == y and right == x + w and bottom == y + h
        out = np.empty((h, w, 3), np.uint8) if inside else np.full((h, w, 3), 255, np.uint8)
        if left >= right or top >= bottom:
            return out
        tw, th = self.tile_sizes[level]
        for row in range(top // th, (bottom - 1) // th + 1):
            y1 = max(top, row * th)
            y2 = min(bottom, (row + 1) * th)
            for column in range(left // tw, (right - 1) // tw + 1):
                x1 = max(left, column * tw)
                x2 = min(right, (column + 1) * tw)
                tile = self._tile(level, column, row)
                out[y1 - y : y2 - y, x1 - x : x2 - x] = tile[y1 - row * th : y2 - row * th, x1 - column * tw : x2 - column * tw]
        return out

    def read(self, x0: int, y0: int, w: int, h: int, mpp: float) -> np.ndarray:
        """uint8[h, w, 3]: `w` by `h` pixels of `mpp` micrometres whose top left corner is at level-0 pixel (x0, y0).

        Where a level has that mpp (1 %), its pixels are given as they are. Else the nearest finer level is resampled with an
        antialiasing filter on one fixed pixel grid for the whole slide, so that overlapping reads agree to the bit; the corner
        goes to the nearest point of that grid (off by at most half an output pixel).

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

    def _tile(self, level: int, column: int, row: int) -> np.ndarray:
        if not self._backend.cached:
            return self._decode(level, column, row)
        return self._cache.get((self._owner, level, column, row), lambda: self._decode(level, column, row))

    def _decode(self, level: int, column: int, row: int) -> np.ndarray:
        with self._native_lock:
            self._native_decodes += 1
        return self._backend.decode(level, column, row)

    def _tiles_of(self, level: int, box: tuple[int, int, int, int]) -> list[tuple[int, int]]:
        (x, y, w, h), (tw, th), (width, height, _) = box, self.tile_sizes[level], self.levels[level]
        columns = range(max(x, 0) // tw, (min(x + w, width) - 1) // tw + 1)
        return [(column, row) for row in range(max(y, 0) // th, (min(y + h, height) - 1) // th + 1) for column in columns]

    def _read_grid(self, level: int, factor: float, x: int, y: int, w: int, h: int) -> np.ndarray:
        """Region (x, y, w, h) in pixels of the grid whose pixels are `factor` pixels of `level`, anchored at the slide's corner."""
        if factor == 1.0:
            return self.read_level(level, x, y, w, h)
        out = np.full((h, w, 3), 255, np.uint8)
        side = 256 if factor < _REDUCE_FROM else min(512, max(16, int(_SOURCE_SIDE / factor) // 16 * 16))
        width, height = (math.ceil(side_px / factor) for side_px in self.levels[level][:2])
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
        for row in range(top // side, (bottom - 1) // side + 1) if bottom > top else ():
            for column in range(left // side, (right - 1) // side + 1) if right > left else ():
                block = self._cache.get((self._owner, level, factor, column, row), lambda c=column, r=row: self._resample(level, factor, side, c, r))
                x1, y1 = max(left, column * side), max(top, row * side)
                x2, y2 = min(right, (column + 1) * side), min(bottom, (row + 1) * side)
                out[y1 - y : y2 - y, x1 - x : x2 - x] = block[y1 - row * side : y2 - row * side, x1 - column * side : x2 - column * side]
        return out

    def _resample(self, level: int, factor: float, side: int, column: int, row: int) -> np.ndarray:
        """One block of the resampled grid: whole blocks averaged first where that leaves a factor of 2 or more, then bicubic.

        Every block is computed from the same source pixels by the same steps whoever asks for it: that makes reads agree.
        """
        from PIL import Image

        whole = int(factor / 2) if factor >= _REDUCE_FROM else 1
        rest = factor / whole
        margin = math.ceil(2 * rest) + 1
        starts = [index * side * rest for index in (column, row)]
        firsts = [math.floor(start) - margin for start in starts]
        counts = [math.ceil(start + side * rest) + margin - first for start, first in zip(starts, firsts, strict=True)]
        source = Image.fromarray(self.read_level(level, firsts[0] * whole, firsts[1] * whole, counts[0] * whole, counts[1] * whole))
        if whole > 1:
            source = source.reduce(whole)
        corner = [start - first for start, first in zip(starts, firsts, strict=True)]
        box = (corner[0], corner[1], corner[0] + side * rest, corner[1] + side * rest)
        return np.array(source.resize((side, side), Image.Resampling.BICUBIC, box=box))
