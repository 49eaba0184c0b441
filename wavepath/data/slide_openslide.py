"""Slides that OpenSlide reads: NDPI, MRXS, DICOM, SCN, BIF, CZI and the other vendors' formats.

OpenSlide takes positions in level-0 pixels. On a level whose scale is not whole (2.0003), a whole pixel of the level is then
mostly not at a whole level-0 pixel, and OpenSlide interpolates. So this backend reads each level in fixed blocks: a pixel has one
value whatever region is asked. Blocks begin where the interpolation is nil: on a small level there is one block, and on the
others the beginning is rounded to the nearest level-0 pixel, which shifts a block by less than half of one.

Some DICOM slides declare RGB while their JPEG frames hold YCbCr. OpenSlide believes the declaration and gives white glass as pink;
here the frame itself decides.
"""

from pathlib import Path

import numpy as np
import openslide

from wavepath.data.mpp import Candidate, number
from wavepath.data.slide_backends import Backend, build_levels, over_white
from wavepath.data.slide_tiff import ycbcr_to_rgb
from wavepath.errors import SlideError

_BLOCK = 512
_WHOLE_LEVEL = 8_000_000  # pixels
_OPENSLIDE_STRIDE = 4096  # OpenSlide splits larger reads at multiples of this and rounds each part's position
_CACHE_BYTES = 16 << 20


def detect_format(path: Path) -> str | None:
    """OpenSlide's name for the format of a file; None where it is no format of OpenSlide."""
    return openslide.OpenSlide.detect_format(str(path))


def misdeclared_ycbcr(path: Path, properties: dict[str, str]) -> bool:
    """Whether a DICOM slide declares RGB although its JPEG frames are YCbCr.

    A JFIF frame without Adobe's marker holds YCbCr by definition (its standard knows no RGB). Only frames that subsample two components
    are taken for such, which no writer does to RGB.
    """
    if properties.get("openslide.vendor") != "dicom" or properties.get("dicom.PhotometricInterpretation") != "RGB":
        return False
    with open(path, "rb") as file:
        head = file.read(1 << 20)
    frame = head[max(0, head.find(b"\xff\xd8\xff")) :][: 1 << 14]
    sizes = frame.find(b"\xff\xc0")
    if frame[6:10] != b"JFIF" or b"Adobe" in frame or sizes < 0 or len(frame) < sizes + 12:
        return False
    return frame[sizes + 11] != 0x11  # sampling of the first component: luma has more samples than chroma


class OpenSlideBackend(Backend):
    """One slide through OpenSlide.

    Raises:
        SlideError: OpenSlide does not know the format or finds the file damaged.
    """

    name = "openslide"

    def __init__(self, path: Path):
        self.path = path
        try:
            self._slide = openslide.OpenSlide(str(path))
        except openslide.OpenSlideUnsupportedFormatError:
            raise SlideError(f"{path} is in no format that OpenSlide knows; leave the backend at auto or convert it to a pyramidal TIFF") from None
        except openslide.OpenSlideError as error:
            raise self._damaged(error) from None
        self._slide.set_cache(openslide.OpenSlideCache(_CACHE_BYTES))
        properties = self.properties = dict(self._slide.properties)
        self.vendor = properties.get("openslide.vendor", "")
        self.objective = number(properties.get("openslide.objective-power"))
        self.compression = properties.get("dicom.TransferSyntaxUID", "")
        x, y = number(properties.get("openslide.mpp-x")), number(properties.get("openslide.mpp-y"))
        self.mpp_candidates = [Candidate("openslide.mpp-x", x, y or x)] if x else []
        sizes = list(self._slide.level_dimensions)
        self.levels = build_levels(sizes)
        self._scales = self._slide.level_downsamples
        self._ycbcr = misdeclared_ycbcr(path, properties)
        self.tile_sizes = tuple(self._block(level, *size) for level, size in enumerate(sizes))

    def _block(self, level: int, width: int, height: int) -> tuple[int, int]:
        """The block in which a level is read: the whole level, or about 512 px in whole native tiles."""
        whole = abs(self._scales[level] - round(self._scales[level])) < 1e-9
        if not whole and width * height <= _WHOLE_LEVEL and max(width, height) <= _OPENSLIDE_STRIDE:
            return width, height
        sides = []
        for axis in ("width", "height"):
            native = int(number(self.properties.get(f"openslide.level[{level}].tile-{axis}")) or _BLOCK)
            sides.append(min(native * max(1, round(_BLOCK / native)), 2048))
        return sides[0], sides[1]

    def decode(self, level: int, column: int, row: int) -> np.ndarray:
        (bw, bh), scale, (width, height) = self.tile_sizes[level], self._scales[level], self._slide.level_dimensions[level]
        position = (int(column * bw * scale + 0.5), int(row * bh * scale + 0.5))
        size = (min(bw, width - column * bw), min(bh, height - row * bh))
        try:
            rgba = np.asarray(self._slide.read_region(position, level, size))
        except openslide.OpenSlideError as error:
            raise self._damaged(error) from None
        if self._ycbcr:
            rgba = np.dstack([ycbcr_to_rgb(rgba[..., :3]), rgba[..., 3]])
        return over_white(rgba)

    def _damaged(self, error: Exception) -> SlideError:
        text = " ".join(str(error).split())[:200]
        return SlideError(f"{self.path} is damaged, truncated or incomplete: OpenSlide says {text!r}; copy it, with its companion files, again")

    def close(self) -> None:
        self._slide.close()
