"""Tiled TIFF slides (Aperio SVS, generic pyramids, OME-TIFF) decoded natively: tifffile finds the tiles, imagecodecs decodes.

OpenSlide composes every read through a 32-bit canvas, which costs several times the decoding itself; here a tile goes from its
bytes to RGB in one step. Pixels are OpenSlide's to the bit: JPEG colours follow the photometric tag, not the JPEG markers,
as OpenSlide does for Aperio, and JPEG 2000 YCbCr is converted by the same integer rule.
"""

import logging
import os
import struct
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile

from wavepath.data.slide_backends import Backend, build_levels
from wavepath.data.slide_metadata import tiff_facts
from wavepath.errors import SlideError

# tifffile logs what it finds wrong; here that becomes an error, or does not matter.
logging.getLogger("tifffile").addHandler(logging.NullHandler())
_JPEG, _OLD_JPEG = 7, 6
_APERIO_YCBCR, _APERIO_RGB, _JPEG2000 = 33003, 33005, 34712
_MIN_IS_BLACK, _RGB, _YCBCR = 1, 2, 6


class UnsupportedTiff(SlideError):
    """A sound TIFF that this backend does not decode; `untiled` says that it has no tiles at all."""

    def __init__(self, message: str, untiled: bool = False):
        super().__init__(message)
        self.untiled = untiled


def _chroma_tables() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What Cb and Cr add to each colour (ITU-R BT.601, full range), rounded; green as a sum in 16-bit fixed point."""
    offset = np.arange(256) - 128
    red = np.rint(1.402 * offset).astype(np.int16)
    blue = np.rint(1.772 * offset).astype(np.int16)
    green_b = np.rint(65536 * (0.5 - 0.34414 * offset)).astype(np.int32)
    green_r = np.rint(65536 * -0.71414 * offset).astype(np.int32)
    return red, green_b, green_r, blue


_RED, _GREEN_B, _GREEN_R, _BLUE = _chroma_tables()


def ycbcr_to_rgb(ycbcr: np.ndarray) -> np.ndarray:
    """uint8[h, w, 3] YCbCr (full range) -> uint8[h, w, 3] RGB."""
    y, cb, cr = ycbcr[..., 0].astype(np.int16), ycbcr[..., 1], ycbcr[..., 2]
    out = np.empty_like(ycbcr)
    out[..., 0] = np.clip(y + _RED[cr], 0, 255)
    out[..., 1] = np.clip(y + ((_GREEN_B[cb] + _GREEN_R[cr]) >> 16), 0, 255)
    out[..., 2] = np.clip(y + _BLUE[cb], 0, 255)
    return out


def _subsampled(codestream: bytes) -> bool:
    """Whether a JPEG 2000 codestream stores a component at lower resolution (its SIZ marker says so)."""
    start = codestream.find(b"\xff\x4f\xff\x51")
    if start < 0 or len(codestream) < start + 51:
        return False
    (count,) = struct.unpack_from(">H", codestream, start + 40)
    steps = codestream[start + 42 : start + 42 + 3 * count]
    return any(steps[3 * index + 1] != 1 or steps[3 * index + 2] != 1 for index in range(len(steps) // 3))


class TiffBackend(Backend):
    """One tiled TIFF file.

    Raises:
        UnsupportedTiff: the file is sound but untiled, not 8-bit RGB or grey, or in a layout only OpenSlide knows.
        SlideError: the file is damaged or truncated.
    """

    name = "tiff"

    def __init__(self, path: Path):
        self.path = path
        self._file = open(path, "rb", buffering=0)  # read by position, so by many threads at once
        self._fd = self._file.fileno()
        try:
            self._open()
        except BaseException:
            self._file.close()
            raise

    def _open(self) -> None:
        try:
            with tifffile.TiffFile(self.path) as tiff:
                self._check_whole(tiff)
                pages = self._levels(tiff)
                facts = tiff_facts(tiff, pages[0])
                self._offsets = [np.asarray(page.dataoffsets, np.int64) for page in pages]
                self._counts = [np.asarray(page.databytecounts, np.int64) for page in pages]
                self._tables = [page.jpegtables for page in pages]
        except SlideError:
            raise
        except Exception as error:
            # tifffile raises whatever a damaged field leads to: TypeError, KeyError, struct.error, ...
            raise SlideError(f"{self.path} is a damaged or truncated TIFF ({_one_line(error)}); copy it again from its source") from None
        self.vendor, self.objective, self.compression = facts.vendor, facts.objective, facts.compression
        self.properties, self.mpp_candidates = facts.properties, facts.mpp_candidates
        self._pages = pages
        self._check_layout()
        self.levels = build_levels([(page.imagewidth, page.imagelength) for page in pages])
        self.tile_sizes = tuple((page.tilewidth, page.tilelength) for page in pages)
        self._across = [-(-page.imagewidth // page.tilewidth) for page in pages]
        self._white = [np.full((page.tilelength, page.tilewidth, 3), 255, np.uint8) for page in pages]

    def _levels(self, tiff: tifffile.TiffFile) -> list[tifffile.TiffPage]:
        """The pages that are levels, widest first."""
        first = tiff.pages[0]
        if tiff.is_ome:
            pages = self._ome_levels(tiff)
        elif not first.is_tiled:
            raise UnsupportedTiff(f"{self.path} is a TIFF without tiles; convert it to a tiled pyramid", untiled=True)
        else:
            # Aperio: every tiled page is a level. Else: those marked as reduced resolution, as OpenSlide has it.
            aperio = first.description.startswith("Aperio")
            pages = [first, *(page for page in tiff.pages[1:] if page.is_tiled and (aperio or page.subfiletype & 1))]
        for page in pages:
            if page.dtype != np.uint8 or page.samplesperpixel == 2 or page.samplesperpixel > 4 or page.imagedepth != 1:
                pixel = f"{page.samplesperpixel} samples of {page.bitspersample} bits a pixel"
                raise SlideError(f"{self.path} holds {pixel}; wavepath reads bright-field slides as 8-bit RGB")
            reason = self._unsupported(page)
            if reason:
                raise UnsupportedTiff(f"{self.path} holds {reason}; leave the backend at auto or convert it to 8-bit RGB")
        base = max(pages, key=lambda page: page.imagewidth)
        kept = {}
        for page in sorted(pages, key=lambda page: -page.imagewidth):
            # A macro image that is tiled and marked as reduced is no level: its sides do not shrink alike.
            ratio = base.imagewidth / page.imagewidth
            if abs(base.imagelength / ratio - page.imagelength) <= max(2.0, 0.02 * page.imagelength):
                kept.setdefault(page.imagewidth, page)
        return list(kept.values())

    def _ome_levels(self, tiff: tifffile.TiffFile) -> list[tifffile.TiffPage]:
        """The pyramid of the largest colour image of an OME-TIFF, in sub-IFDs or in pages marked as reduced."""
        choices = []
        for place, series in enumerate(tiff.series):
            if len(series.pages) == 1:
                choices.append((series.keyframe.imagewidth * series.keyframe.imagelength, -place, series))
        if not choices:
            # OpenSlide would take the first plane for the slide.
            axes = ", ".join(f"{series.axes} {series.dtype}" for series in tiff.series)
            raise SlideError(f"{self.path} holds images of several planes ({axes}); wavepath reads bright-field slides as 8-bit RGB")
        series = max(choices)[2]
        pages = [level.keyframe for level in series.levels]
        if not pages[0].is_tiled:
            raise UnsupportedTiff(f"{self.path} is an OME-TIFF without tiles; convert it to a tiled pyramid", untiled=True)
        if len(pages) == 1:
            pages += [page for page in tiff.pages[1:] if page.is_tiled and page.subfiletype & 1]
        return [page for page in pages if page.is_tiled]

    @staticmethod
    def _unsupported(page: tifffile.TiffPage) -> str | None:
        """What in a page this backend does not decode; None where it decodes all."""
        if page.samplesperpixel == 4:
            return "a fourth channel"
        if page.photometric not in (_MIN_IS_BLACK, _RGB, _YCBCR):
            return f"{getattr(page.photometric, 'name', page.photometric)} colours"
        if page.compression == _OLD_JPEG or (page.photometric == _YCBCR and page.compression not in (_JPEG, _APERIO_YCBCR)):
            return f"{getattr(page.compression, 'name', page.compression)} data in YCbCr"
        return None

    def _check_whole(self, tiff: tifffile.TiffFile) -> None:
        """All pages and their data must lie inside the file: a slide cut short by a failed copy is refused at once, not in the middle of a run.

        A cut in the chain of pages would otherwise lose levels in silence.
        """
        size = os.fstat(self._fd).st_size
        if not len(tiff.pages):
            raise SlideError(f"{self.path} is a damaged or truncated TIFF (it lists no images); copy it again from its source")
        layout, last = tiff.tiff, tiff.pages[len(tiff.pages) - 1]
        tags = struct.unpack(layout.tagnoformat, os.pread(self._fd, layout.tagnosize, last.offset))[0]
        following = os.pread(self._fd, layout.offsetsize, last.offset + layout.tagnosize + tags * layout.tagsize)
        if len(following) < layout.offsetsize or struct.unpack(layout.offsetformat, following)[0] != 0:
            raise SlideError(f"{self.path} is truncated: its list of images ends too early; copy it again from its source")
        for page in tiff.pages:
            ends = np.asarray(page.dataoffsets, np.int64) + np.asarray(page.databytecounts, np.int64)
            if ends.max(initial=0) > size:
                raise SlideError(f"{self.path} is truncated: its data end at byte {ends.max()} but it has {size}; copy it again from its source")

    def _check_layout(self) -> None:
        """Every level has as many tiles as its size needs, in a layout this backend decodes to OpenSlide's pixels."""
        size = os.fstat(self._fd).st_size
        for page, offsets, counts in zip(self._pages, self._offsets, self._counts, strict=True):
            planes = page.samplesperpixel if page.planarconfig == 2 else 1
            expected = -(-page.imagewidth // page.tilewidth) * -(-page.imagelength // page.tilelength) * planes
            if len(offsets) != expected or len(counts) != expected:
                raise SlideError(f"{self.path} is damaged: {len(offsets)} tiles where {expected} are needed; copy it again from its source")
            if (offsets + counts).max(initial=0) > size:  # levels in sub-IFDs are not among the file's pages
                raise SlideError(f"{self.path} is truncated: its tiles end beyond its {size} bytes; copy it again from its source")
            if self.vendor == "aperio" and not counts.all():
                # OpenSlide fills such gaps from the finer levels; leave it to it.
                raise UnsupportedTiff(f"{self.path} lacks tiles, which OpenSlide fills from other levels; leave the backend at auto")
            if page.planarconfig == 2 and page.compression in (_JPEG, _APERIO_YCBCR, _APERIO_RGB, _JPEG2000):
                raise UnsupportedTiff(f"{self.path} holds compressed colour planes one by one; convert it to an interleaved pyramid")
            if page.compression in (_APERIO_YCBCR, _APERIO_RGB, _JPEG2000) and counts.any():
                first = int(np.flatnonzero(counts)[0])
                if _subsampled(os.pread(self._fd, min(200, int(counts[first])), int(offsets[first]))):
                    raise UnsupportedTiff(f"{self.path} holds JPEG 2000 with subsampled colour; leave the backend at auto")

    def decode(self, level: int, column: int, row: int) -> np.ndarray:
        if self._file.closed:
            raise SlideError(f"{self.path} has been closed; open it again to read it")
        page = self._pages[level]
        index = row * self._across[level] + column
        try:
            if page.planarconfig == 2 and page.samplesperpixel == 3:
                step = len(self._offsets[level]) // 3
                planes = [self._segment(level, index + plane * step) for plane in range(3)]
                if any(plane is None for plane in planes):
                    return self._white[level]
                tile = np.stack([plane[..., 0] for plane in planes], axis=-1)
            else:
                tile = self._segment(level, index)
        except SlideError:
            raise
        except Exception as error:
            # imagecodecs has one exception class for each codec and raises plain ValueError and RuntimeError besides.
            raise SlideError(
                f"{self.path} is damaged: tile ({column}, {row}) of level {level} cannot be decoded ({_one_line(error)}); "
                "copy it again from its source"
            ) from None
        return self._white[level] if tile is None else tile

    def _segment(self, level: int, index: int) -> np.ndarray | None:
        """Tile `index` as uint8[h, w, 3] (or [h, w, 1] of one plane); None where the file has no data for it."""
        page = self._pages[level]
        count = int(self._counts[level][index])
        if count == 0:
            return None
        data = os.pread(self._fd, count, int(self._offsets[level][index]))
        if len(data) != count:
            raise SlideError(f"{self.path} is truncated: tile {index} of level {level} ends beyond the file; copy it again from its source")
        if page.compression == _JPEG and page.samplesperpixel == 3:
            # libjpeg fills the rest of a cut tile with grey and says nothing: the end marker must be there.
            if data.rfind(b"\xff\xd9", -64) < 0:
                raise SlideError(f"{self.path} is damaged: tile {index} of level {level} is cut short; copy it again from its source")
            stored = "YCBCR" if page.photometric == _YCBCR else "RGB"
            tile = imagecodecs.jpeg8_decode(data, tables=self._tables[level], colorspace=stored, outcolorspace="RGB")
        elif page.compression in (_APERIO_RGB, _APERIO_YCBCR, _JPEG2000):
            tile = imagecodecs.jpeg2k_decode(data, numthreads=1)
            if page.compression == _APERIO_YCBCR:
                tile = ycbcr_to_rgb(tile)
        else:
            decoded, _, _ = page.decode(data, index, jpegtables=self._tables[level], _fullsize=True)
            tile = decoded[0]
        if tile.shape[:2] != (page.tilelength, page.tilewidth):
            size = f"{tile.shape[1]} x {tile.shape[0]}"
            raise SlideError(f"{self.path} is damaged: tile {index} of level {level} is {size}; copy it again from its source")
        if page.planarconfig == 2 and page.samplesperpixel == 3:
            return tile.reshape(*tile.shape[:2], 1)
        return _as_rgb(tile)

    def close(self) -> None:
        self._file.close()


def _as_rgb(tile: np.ndarray) -> np.ndarray:
    """uint8[h, w] or [h, w, 1|3] -> uint8[h, w, 3]."""
    if tile.ndim == 2 or tile.shape[2] == 1:
        return np.repeat(tile.reshape(*tile.shape[:2], 1), 3, axis=2)
    return tile


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
