"""Whole slides through a network that makes pixels, tile by tile: super-resolution, and at scale 1 staining.

    image -> tiles (read ahead by a thread) -> batches of one shape -> network -> blended rows -> pyramidal TIFF

Rows leave from top to bottom. With W output pixels across, tiles of t output pixels, R rows of tiles in a band (one, unless the image is
narrow), memory is about

    W (R t (12 + 3) + 256 * 6 + 2 * 6 * n / s) bytes + a few batches

for the sums in float32 and the finished rows in uint8, the rows of TIFF tiles of all levels, and the slide's own tiles of height n px at scale
s; whatever the height of the slide. Bands that are finished are kept on disk until the slide is whole (spool.py).
"""

import glob
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from wavepath import __version__
from wavepath.console import Progress, progress, say, warn
from wavepath.errors import ConfigError, WavepathError
from wavepath.files import folder_lock, writable_folder
from wavepath.inference.grid import Canvas, Grid
from wavepath.inference.spool import BYTES_PER_PIXEL, Bands
from wavepath.interop.tiff import PyramidWriter
from wavepath.training.parallel import Prefetch

Read = Callable[[int, int, int, int], np.ndarray]  # (x, y, width, height) -> uint8[height, width, 3], always within the image
Predict = Callable[..., Any]  # uint8[batch, tile, tile, 3] (and further images by name) -> [batch, tile * scale, tile * scale, 3] in [0, 1], anywhere
Finish = Callable[[np.ndarray, int], np.ndarray]  # uint8[rows, width, 3] of the output, and the number of the first -> the same, as it is written
Fill = Callable[[np.ndarray], np.ndarray | None]  # uint8[tile, tile, 3] -> uint8[tile * scale, tile * scale, 3] in place of the network, or None
BAND_TILES = 64  # at least so many tiles in a band, so that its last batch is not most of it. A part of what the output is: see `Grid.bands`.
_JPEG_BYTES_PER_PIXEL = 0.5
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Pixels:
    """What is read: an image of any kind, `width` x `height` pixels of `mpp` micrometres (None: not known)."""

    width: int
    height: int
    read: Read
    mpp: float | None = None


@dataclass(frozen=True)
class Written:
    """What was done: output size in pixels, tiles through the network now, tiles filled in otherwise, bands in all and from an earlier call."""

    width: int
    height: int
    mpp: float | None
    tiles: int
    filled: int
    bands: int
    reused: int
    seconds: float
    whole: bool = False  # it was there already

    @property
    def megapixels_per_second(self) -> float:
        """Output pixels made now, in millions, by second."""
        return self.width * self.height * (1 - self.reused / max(self.bands, 1)) / 1e6 / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class _Piece:
    """One batch for the network and where its rows belong, or tiles that were filled in: never both."""

    places: list[tuple[int, int]]
    tiles: np.ndarray | None = None  # uint8[batch, tile, tile, 3], padded by repeating the last
    extra: dict[str, np.ndarray] = field(default_factory=dict)  # the same places of further images
    filled: list[np.ndarray] | None = None


def _pieces(
    image: Pixels, grid: Grid, rows: range, batch: int, fill: Fill | None = None, extra: Mapping[str, tuple[Read, int]] = _NOTHING
) -> Iterator[_Piece]:
    """The tiles of one band in reading order, in batches that never reach into another band.

    Tiles for the network wait until they are a batch, whatever is filled in between them; `batch` filled tiles are a piece of their own. Which tile
    is in which piece follows from the band alone, so that a band that is computed again adds up in the same order.
    """
    tiles: list[np.ndarray] = []
    places: list[tuple[int, int]] = []
    filled: list[np.ndarray] = []
    blank: list[tuple[int, int]] = []

    def piece() -> _Piece:
        spare = batch - len(tiles)
        padded = [*places, *[places[-1]] * spare]
        more = {name: np.stack([_read(read, grid, *place, factor) for place in padded]) for name, (read, factor) in extra.items()}
        return _Piece(places, np.stack([*tiles, *[tiles[-1]] * spare]), more)

    for row in rows:
        for column in range(len(grid.columns.starts)):
            tile = _read(image.read, grid, row, column)
            instead = fill(tile) if fill is not None else None
            if instead is None:
                tiles.append(tile)
                places.append((row, column))
            else:
                filled.append(instead)
                blank.append((row, column))
            if len(tiles) == batch:
                yield piece()
                tiles, places = [], []
            if len(filled) == batch:
                yield _Piece(blank, filled=filled)
                filled, blank = [], []
    if tiles:
        yield piece()
    if filled:
        yield _Piece(blank, filled=filled)


def _read(read: Read, grid: Grid, row: int, column: int, factor: int = 1) -> np.ndarray:
    """uint8[factor * tile, factor * tile, 3]: one tile of an image `factor` times as fine as the grid, mirrored where it reaches over the border."""
    y, height, above, below = grid.rows.box(row)
    x, width, before, behind = grid.columns.box(column)
    tile = read(x * factor, y * factor, width * factor, height * factor)
    if not (above or below or before or behind):
        return tile

    def lines(count: int, margins: tuple[int, int]) -> np.ndarray:
        # Whole pixels of the grid are mirrored: what is finer stays with its pixel.
        return (np.pad(np.arange(count), margins, mode="reflect")[:, None] * factor + np.arange(factor)).ravel()

    return tile[np.ix_(lines(height, (above, below)), lines(width, (before, behind)))]


def _blend(canvas: Canvas, pieces: Iterator[_Piece], predict: Predict, bar: Progress | None = None) -> tuple[int, int]:
    """Blends all tiles of the pieces in; counts tiles through the network and tiles filled in."""
    counts = [0, 0]

    def add(piece: _Piece, outputs: Any = None) -> None:
        if piece.filled is not None:
            values = (tile.astype(np.float32) / np.float32(255) for tile in piece.filled)
        else:
            values = np.asarray(outputs)[: len(piece.places)].astype(np.float32, copy=False)
            if not np.isfinite(values).all():
                raise WavepathError("the network gives values that are not finite; its checkpoint is of no use, choose an earlier one with --step")
        for (row, column), tile in zip(piece.places, values, strict=True):
            canvas.add(row, column, tile)
        counts[piece.filled is not None] += len(piece.places)
        if bar is not None:
            bar.advance(len(piece.places))

    ahead = Prefetch(pieces, lambda piece: piece, ahead=2)
    waiting = None
    try:
        for piece in ahead:
            if piece.filled is not None:
                add(piece)
                continue
            outputs = predict(piece.tiles, **piece.extra)
            # One batch behind: while the host blends, the device has the next.
            if waiting is not None:
                add(*waiting)
            waiting = (piece, outputs)
        if waiting is not None:
            add(*waiting)
    finally:
        ahead.close()
    return counts[0], counts[1]


def enlarge(
    predict: Predict, image: np.ndarray, scale: int, *, tile: int = 64, overlap: int = 16, batch: int = 16, context: int | None = None,
    extra: Mapping[str, tuple[np.ndarray, int]] = _NOTHING,
) -> np.ndarray:  # fmt: skip
    """An image in memory through the network, on the grid that whole slides go by.

    Args:
        predict: uint8[batch, tile, tile, 3] -> [batch, tile * scale, tile * scale, 3] in [0, 1]; with `extra` it has further arguments by name.
        image: uint8[h, w, 3].
        scale: output pixels for each input pixel; 1 for tasks that do not enlarge.
        tile, overlap: in input pixels. context: of the overlap, unused at each end (default: a quarter of it).
        batch: tiles at once; always so many, so that the network is compiled once.
        extra: further images of the same place by the name of `predict`'s argument: (uint8[f * h, f * w, 3], f), whose tiles are f times as large.

    Returns:
        uint8[h * scale, w * scale, 3].

    Raises:
        ConfigError: tile and overlap do not fit.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image is uint8[h, w, 3], got {image.dtype}{list(image.shape)}")
    height, width = image.shape[:2]
    for name, (other, factor) in extra.items():
        if other.dtype != np.uint8 or other.shape != (factor * height, factor * width, 3):
            raise ValueError(f"{name} is uint8{[factor * height, factor * width, 3]}, {factor} times the image, got {other.dtype}{list(other.shape)}")
    grid = Grid(height, width, tile, overlap, overlap // 4 if context is None else context, scale)
    pixels, finer = Pixels(width, height, _reader(image)), {name: (_reader(other), factor) for name, (other, factor) in extra.items()}
    canvas = Canvas(grid)
    rows = []
    for band in grid.bands(BAND_TILES):
        _blend(canvas, _pieces(pixels, grid, band, batch, extra=finer), predict)
        rows.append(canvas.take(grid.done(band.stop)))
    return np.concatenate(rows)


def _reader(image: np.ndarray) -> Read:
    return lambda x, y, w, h: image[y : y + h, x : x + w]


def write_slide(
    image: Pixels,
    predict: Predict,
    out: Path,
    *,
    task: str,
    origin: dict[str, Any],
    scale: int = 1,
    tile: int = 64,
    overlap: int = 16,
    context: int | None = None,
    batch: int = 16,
    fill: Fill | None = None,
    finish: Finish | None = None,
    quality: int = 90,
    overwrite: bool = False,
    notice: str = "",
) -> Written:
    """A whole slide through the network, written as a flat pyramidal JPEG TIFF; goes on with what an interrupted call has left.

    Args:
        image: what is read. predict: as `enlarge` takes it.
        out: the TIFF. `OUT.parts/` beside it holds the finished bands until it is whole.
        task: its name, for the file's description.
        origin: JSON values that say what the output is made from (parameters, slide, region): with the grid and `quality` they decide
            whether two calls mean the same output. The batch size and the devices do not: they change the last bits at most.
        scale, tile, overlap, context, batch: as `enlarge` takes them.
        fill: decides tiles that the network does not see and gives their pixels; they are blended like the others.
        finish: a last change of finished rows, each by itself: they come in pieces of any height.
        quality: of the JPEG, 1 to 100.
        overwrite: replace a file `out` that was made from something else.
        notice: words (ASCII) that the file's description begins with, ahead of the task: what whoever opens it must know.

    Raises:
        ConfigError: `out` is there and was made from something else, is no TIFF by its name, or the tiles do not fit.
        WavepathError: nothing can be written there, the disk is full, the network gives values that are not finite.
        LockedError: another process writes the same output.
    """
    context = overlap // 4 if context is None else context
    grid = Grid(image.height, image.width, tile, overlap, context, scale)
    width, height, mpp = image.width * scale, image.height * scale, image.mpp and image.mpp / scale
    facts = {**origin, "scale": scale, "tile": tile, "overlap": overlap, "context": context, "quality": quality, "size": [width, height], "mpp": mpp}
    facts["wavepath_version"] = __version__
    facts["fingerprint"] = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    description = f"{notice} wavepath {task} {json.dumps(facts, sort_keys=True)}".lstrip()
    out = Path(out)
    if out.suffix.lower() not in (".tif", ".tiff"):
        raise ConfigError(f"--out {out} is not the name of a TIFF; let it end in .tiff")
    writable_folder(out.parent)
    bands = grid.bands(BAND_TILES)
    parts = Bands(out.with_name(out.name + ".parts"))
    if _same(out, facts["fingerprint"], overwrite):
        parts.remove()
        return Written(width, height, mpp, 0, 0, len(bands), len(bands), 0.0, whole=True)
    writable_folder(parts.folder)
    with folder_lock(parts.folder, "lock"):
        if _same(out, facts["fingerprint"], overwrite):  # another process has made it since
            parts.remove()
            return Written(width, height, mpp, 0, 0, len(bands), len(bands), 0.0, whole=True)
        for left in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):  # by a process that was killed
            left.unlink(missing_ok=True)
        parts.begin(facts)
        _check_disk(out, width * height)
        written = _write(image, grid, predict, out, parts, bands, batch, fill, finish, mpp, description, quality)
        parts.remove()
    return written


def _write(
    image: Pixels, grid: Grid, predict: Predict, out: Path, parts: Bands, bands: list[range], batch: int, fill: Fill | None,
    finish: Finish | None, mpp: float | None, description: str, quality: int,
) -> Written:  # fmt: skip
    start, tiles, filled = time.monotonic(), 0, 0
    width, scale = grid.width * grid.scale, grid.scale
    edges = [0, *(grid.done(band.stop) for band in bands)]
    with PyramidWriter(out, width, grid.height * scale, mpp, quality=quality, description=description) as writer:
        first = 0
        while first < len(bands):
            kept = parts.read(first, edges[first + 1] - edges[first], width)
            if kept is None:
                break
            writer.write_rows(kept)
            first += 1
        # Tiles of earlier bands reach into the first one that is missing: they are computed again rather than kept as sums in float32.
        again = next((n for n in range(first) if grid.reach(bands[n].stop - 1) > edges[first]), first) if first < len(bands) else first
        if first:
            say(f"going on: {first} of {len(bands)} bands are there from an earlier call")
        across = len(grid.columns.starts)
        canvas = Canvas(grid, top=edges[first])
        with progress("tiles", sum(len(band) for band in bands[again:]) * across, "tiles") as bar:
            for index in range(again, len(bands)):
                counts = _blend(canvas, _pieces(image, grid, bands[index], batch, fill), predict, bar)
                if index < first:
                    continue
                tiles, filled = tiles + counts[0], filled + counts[1]
                rows = canvas.take(edges[index + 1])
                if finish is not None:
                    rows = finish(rows, edges[index])
                parts.write(index, rows)
                writer.write_rows(rows)
    return Written(width, grid.height * scale, mpp, tiles, filled, len(bands), first, time.monotonic() - start)


def _same(out: Path, fingerprint: str, overwrite: bool) -> bool:
    """Whether `out` is there and is what would be made.

    Raises:
        ConfigError: it is something else, and may not be overwritten.
    """
    if not out.exists():
        return False
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; give the name of a file in it")
    if f'"fingerprint": "{fingerprint}"' in described(out):
        return True
    if not overwrite:
        raise ConfigError(f"{out} is there and was made from something else or with other settings; add --overwrite, or choose another --out")
    return False


def described(path: Path) -> str:
    """The description in a TIFF's first directory; empty where there is none or the file is no TIFF."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            return str(tiff.pages[0].description)
    except (tifffile.TiffFileError, OSError, ValueError, IndexError):
        return ""


def _check_disk(out: Path, pixels: int) -> None:
    """Says before the work starts that the disk is likely to be too small for it."""
    needed, free = pixels * (BYTES_PER_PIXEL + _JPEG_BYTES_PER_PIXEL), shutil.disk_usage(out.parent).free
    if needed > free:
        warn(f"{out.parent} has {free / 1e9:.1f} GB free; the output and its parts may take {needed / 1e9:.1f} GB while it is made")
