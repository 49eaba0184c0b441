"""Pyramidal TIFF, written as a stream: what OpenSlide, QuPath, TRIDENT and tiffslide all read with every level.

A flat pyramid: successive directories of tiled 8-bit RGB, every level but the first marked `NewSubfileType=1`, the
resolution tag halved from level to level, BigTIFF throughout. (A level without its own resolution gives the wrong pixel
size in readers that use it.) A name that ends in .ome.tiff gives an OME-TIFF instead, its lower levels in SubIFDs: for
Bio-Formats, napari, QuPath, tiffslide; OpenSlide sees its first level alone. The file is built here byte by
byte, not by a TIFF library, because rows come from the caller top to bottom and the whole slide never fits in memory:
level 0 goes straight to the file, the lower levels are halved on the way and spooled to temporary files until the slide
ends.
"""

import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, NoReturn
from xml.sax.saxutils import escape, quoteattr

import imagecodecs
import numpy as np
from jaxtyping import UInt8

from wavepath.errors import WavepathError
from wavepath.files import atomic_path

SOFTWARE = "wavepath"
# A reader opens a thumbnail quickly when the last level is about this large.
SMALLEST_LEVEL = 512

_BYTE_SIZE = {2: 1, 3: 2, 4: 4, 5: 8, 16: 8}  # ASCII, SHORT, LONG, RATIONAL, LONG8
_ASCII, _SHORT, _LONG, _RATIONAL, _LONG8 = 2, 3, 4, 5, 16
_COMPRESSION = {"jpeg": 7, "deflate": 8}
_OME = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
_PHOTOMETRIC = {"jpeg": 6, "deflate": 2}  # YCbCr, RGB


def pyramid_levels(width: int, height: int) -> int:
    """The number of levels, each half of the one above, until the longer side is at most `SMALLEST_LEVEL` px."""
    levels = 1
    while max(width, height) >> (levels - 1) > SMALLEST_LEVEL:
        levels += 1
    return levels


def halve(rows: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Means of 2 x 2 pixels, rounded to nearest; an odd last row or column is dropped, so positions never drift."""
    height, width = rows.shape[0] // 2 * 2, rows.shape[1] // 2 * 2
    total = rows[0:height:2, 0:width:2].astype(np.uint16)
    total += rows[1:height:2, 0:width:2]
    total += rows[0:height:2, 1:width:2]
    total += rows[1:height:2, 1:width:2]
    total += 2
    total >>= 2
    return total.astype(np.uint8)


def _jpeg(quality: int) -> Callable[[np.ndarray], bytes]:
    def encode(tile: np.ndarray) -> bytes:
        return imagecodecs.jpeg8_encode(tile, level=quality, colorspace="RGB", outcolorspace="YCBCR", subsampling="420")

    return encode


def _deflate(tile: np.ndarray) -> bytes:
    return imagecodecs.zlib_encode(tile, level=6)


@dataclass
class _Level:
    """One resolution while it is written: rows not yet cut into tiles, and where the finished tiles lie in `file`."""

    width: int
    height: int
    file: BinaryIO
    pending: np.ndarray  # [tile, width, 3], of which `held` rows are filled
    held: int = 0
    rows: int = 0
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)


class PyramidWriter:
    """Writes one slide, top to bottom, with memory in proportion to `width * tile` and not to the slide's area.

        with PyramidWriter(path, 40000, 40000, mpp=0.25) as writer:
            for strip in strips:  # uint8[any number of rows, 40000, 3]
                writer.write_rows(strip)

    The file appears under its name only when the block ends without an error and every row has been written. Equal rows
    and settings give equal bytes, however the rows are cut into strips.

    Args:
        path: the file to write, `.tiff` or `.tif`; its folder is made.
        width, height: level-0 size in pixels.
        mpp: micrometres per level-0 pixel, or None to leave the size unknown.
        tile: tile side in pixels, a multiple of 16.
        quality: JPEG quality, 1..100 (chroma is halved each way, as slide scanners do).
        levels: number of levels; None: until the longer side is at most 512 px.
        description: text of the ImageDescription tag (ASCII).
        codec: "jpeg", or "deflate" for lossless tiles.
        workers: threads that compress tiles.
        ome: write an OME-TIFF; None: if the name ends in .ome.tiff or .ome.tif.
    """

    def __init__(
        self,
        path: Path,
        width: int,
        height: int,
        mpp: float | None,
        *,
        tile: int = 256,
        quality: int = 85,
        levels: int | None = None,
        description: str = "",
        codec: str = "jpeg",
        workers: int = 2,
        ome: bool | None = None,
    ):
        if width < 1 or height < 1:
            raise ValueError(f"a slide needs at least one pixel, got {width} x {height}")
        if tile < 16 or tile % 16:
            raise ValueError(f"a TIFF tile's side is a multiple of 16, got {tile}")
        if codec not in _COMPRESSION:
            raise ValueError(f"codec is one of {', '.join(_COMPRESSION)}, got {codec!r}")
        if mpp is not None and not mpp > 0:
            raise ValueError(f"mpp is positive, got {mpp}")
        count = pyramid_levels(width, height) if levels is None else levels
        if count < 1 or min(width, height) >> (count - 1) < 1:
            raise ValueError(f"{count} levels do not fit a slide of {width} x {height}")
        self.path, self.width, self.height, self.mpp = Path(path), width, height, mpp
        self.tile, self.codec, self.description = tile, codec, description
        self._count, self._workers = count, workers
        self.ome = self.path.name.lower().endswith((".ome.tiff", ".ome.tif")) if ome is None else ome
        self._encode = _jpeg(quality) if codec == "jpeg" else _deflate
        self._levels: list[_Level] = []
        self._stack = ExitStack()

    def __enter__(self) -> "PyramidWriter":
        try:
            self._stack.__enter__()
            # `atomic_path` removes the temporary file when an error passes through, and renames it otherwise.
            temporary = self._stack.enter_context(atomic_path(self.path))
            self._pool = self._stack.enter_context(ThreadPoolExecutor(self._workers))
            file = self._stack.enter_context(open(temporary, "wb"))
            file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))  # the first directory's place follows at the end
            for index in range(self._count):
                # Spooled beside the output, not in /tmp, which may be memory.
                target = file if index == 0 else self._stack.enter_context(tempfile.TemporaryFile(dir=self.path.parent))
                width, height = self.width >> index, self.height >> index
                self._levels.append(_Level(width, height, target, np.empty((self.tile, width, 3), np.uint8)))
        except OSError as error:
            self._abandon(error)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is not None:
                raise error
            self._finish()
        except BaseException as failure:
            self._abandon(failure)
        self._stack.close()

    def _abandon(self, failure: BaseException) -> NoReturn:
        """Ends without a file: the failure must pass through `atomic_path`, which else publishes half a slide."""
        self._stack.__exit__(type(failure), failure, failure.__traceback__)
        if isinstance(failure, OSError) and failure.strerror:
            raise WavepathError(
                f"cannot write {self.path}: {failure.strerror}; choose another folder or free its disk"
            ) from None
        raise failure

    def write_rows(self, rgb: UInt8[np.ndarray, "h w 3"]) -> None:
        """Appends the next rows.

        Args:
            rgb: uint8[h, width, 3], any number of rows.

        Raises:
            ValueError: for another width or type, or for more rows than the slide has.
        """
        if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[1:] != (self.width, 3):
            raise ValueError(f"rows are uint8[h, {self.width}, 3], got {rgb.dtype}{list(rgb.shape)}")
        if self._levels[0].rows + len(rgb) > self.height:
            raise ValueError(f"{self._levels[0].rows + len(rgb)} rows for a slide of {self.height}")
        self._append(0, rgb)

    def _append(self, index: int, rgb: np.ndarray) -> None:
        level = self._levels[index]
        rgb = rgb[: level.height - level.rows]  # a lower level of odd height drops its last row
        while len(rgb):
            taken = min(self.tile - level.held, len(rgb))
            level.pending[level.held : level.held + taken] = rgb[:taken]
            level.held += taken
            level.rows += taken
            rgb = rgb[taken:]
            if level.held == self.tile or level.rows == level.height:
                self._flush(index)

    def _flush(self, index: int) -> None:
        """Compresses one row of tiles, writes it, and hands its halved rows to the next level."""
        level = self._levels[index]
        rows = level.pending[: level.held]
        for data in self._pool.map(self._encode, self._tiles(rows)):
            level.offsets.append(level.file.tell())
            level.sizes.append(len(data))
            level.file.write(data)
        level.held = 0
        if index + 1 < len(self._levels):
            self._append(index + 1, halve(rows))

    def _tiles(self, rows: np.ndarray) -> list[np.ndarray]:
        """Cuts rows into tiles; those over the edge repeat the last pixel, which JPEG codes without ringing."""
        tiles = []
        for x in range(0, rows.shape[1], self.tile):
            cut = rows[:, x : x + self.tile]
            missing = (self.tile - cut.shape[0], self.tile - cut.shape[1])
            if any(missing):
                cut = np.pad(cut, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
            tiles.append(np.ascontiguousarray(cut))
        return tiles

    def _finish(self) -> None:
        """Appends the spooled levels and the directories, and points the header at the first directory."""
        if self._levels[0].rows != self.height:
            raise ValueError(f"{self.path.name}: {self._levels[0].rows} of {self.height} rows were written")
        file = self._levels[0].file
        for level in self._levels[1:]:
            base = file.tell()
            level.offsets = [base + offset for offset in level.offsets]
            level.file.seek(0)
            shutil.copyfileobj(level.file, file, 1 << 20)
        link = 8  # the header's pointer to the first directory
        if self.ome:
            # The lower levels are in no chain: the first directory names their places.
            below = [self._write_directory(index, None)[0] for index in range(1, len(self._levels))]
            self._write_directory(0, link, below)
        else:
            for index in range(len(self._levels)):
                _, link = self._write_directory(index, link)
        file.flush()
        os.fsync(file.fileno())

    def _resolution(self, index: int) -> tuple[int, int]:
        """Pixels per centimetre as a fraction of 32-bit integers, exact for an mpp with a short decimal form."""
        if self.mpp is None:
            return 1, 1
        value = Fraction(10000) / Fraction(repr(float(self.mpp))) / 2**index
        for limit in (2**32 - 1, 10**6, 10**3, 1):
            near = value.limit_denominator(limit)
            if 0 < near.numerator < 2**32 and near.denominator < 2**32:
                return near.numerator, near.denominator
        raise ValueError(f"mpp {self.mpp} does not fit a TIFF resolution")

    def _ome_xml(self) -> str:
        """The OME metadata of the slide: one RGB image, its physical pixel size, the description."""
        size = "" if self.mpp is None else "".join(f' PhysicalSize{axis}="{float(self.mpp)!r}" PhysicalSize{axis}Unit="&#181;m"' for axis in "XY")
        name = self.path.name
        return (
            f'<?xml version="1.0" encoding="UTF-8"?><OME xmlns="{_OME}" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" '
            f'xsi:schemaLocation="{_OME} {_OME}/ome.xsd" Creator="{SOFTWARE}"><Image ID="Image:0" Name={quoteattr(name)}>'
            f"<Description>{escape(self.description)}</Description>"
            f'<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="{self.width}" SizeY="{self.height}" SizeC="3" SizeZ="1" '
            f'SizeT="1" Interleaved="true" SignificantBits="8"{size}><Channel ID="Channel:0:0" SamplesPerPixel="3"/>'
            '<TiffData IFD="0" PlaneCount="1"/></Pixels></Image></OME>'
        )

    def _write_directory(self, index: int, link: int | None, below: list[int] | None = None) -> tuple[int, int]:
        """Writes one directory at the end of the file and stores its place at `link`; returns its place and that of its own link.

        `below`: places of the directories of the lower levels, where they hang on this one.
        """
        level = self._levels[index]
        file = self._levels[0].file
        resolution = self._resolution(index)
        tags: list[tuple[int, int, list[int] | bytes]] = [
            (254, _LONG, [1 if index else 0]),
            (256, _LONG, [level.width]),
            (257, _LONG, [level.height]),
            (258, _SHORT, [8, 8, 8]),
            (259, _SHORT, [_COMPRESSION[self.codec]]),
            (262, _SHORT, [_PHOTOMETRIC[self.codec]]),
            (277, _SHORT, [3]),
            (282, _RATIONAL, list(resolution)),
            (283, _RATIONAL, list(resolution)),
            (284, _SHORT, [1]),
            (296, _SHORT, [1 if self.mpp is None else 3]),  # 3: per centimetre
            (305, _ASCII, SOFTWARE.encode("ascii") + b"\0"),
            (322, _LONG, [self.tile]),
            (323, _LONG, [self.tile]),
            (324, _LONG8, level.offsets),
            (325, _LONG8, level.sizes),
        ]
        if index == 0 and (self.description or self.ome):
            text = self._ome_xml().encode("ascii", "xmlcharrefreplace") if self.ome else self.description.encode("ascii", "replace")
            tags.append((270, _ASCII, text + b"\0"))
        if below:
            tags.append((330, _LONG8, below))
        if self.codec == "jpeg":
            tags.append((530, _SHORT, [2, 2]))
            tags.append((532, _RATIONAL, [0, 1, 255, 1, 128, 1, 255, 1, 128, 1, 255, 1]))
        entries = b""
        for tag, kind, values in sorted(tags):
            if isinstance(values, bytes):
                data, count = values, len(values)
            else:
                letter = {_SHORT: "H", _LONG: "I", _RATIONAL: "I", _LONG8: "Q"}[kind]
                data = struct.pack(f"<{len(values)}{letter}", *values)
                count = len(data) // _BYTE_SIZE[kind]
            if len(data) > 8:  # too long for the entry itself: stored before the directory, on an even place
                place = self._align()
                file.write(data)
                data = struct.pack("<Q", place)
            entries += struct.pack("<HHQ", tag, kind, count) + data.ljust(8, b"\0")
        place = self._align()
        file.write(struct.pack("<Q", len(tags)) + entries)
        next_link = file.tell()
        file.write(struct.pack("<Q", 0))
        if link is not None:
            file.seek(link)
            file.write(struct.pack("<Q", place))
            file.seek(0, os.SEEK_END)
        return place, next_link

    def _align(self) -> int:
        """Pads the file to a multiple of 8 bytes and returns its end."""
        file = self._levels[0].file
        file.write(b"\0" * (-file.tell() % 8))
        return file.tell()


def write_pyramid(path: Path, rgb: UInt8[np.ndarray, "h w 3"], mpp: float | None, **options: object) -> None:
    """Writes an image held in memory as a pyramidal TIFF; `options` are `PyramidWriter`'s."""
    with PyramidWriter(path, rgb.shape[1], rgb.shape[0], mpp, **options) as writer:
        writer.write_rows(rgb)
