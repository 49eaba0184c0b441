"""What a reader of one file format gives: levels, the grid of native tiles, one decoded tile; and which reader a file gets.

`Slide` (in `slides`) assembles regions from native tiles, caches and resamples; a backend only decodes. Three exist:
`tiff` (tiled TIFF family, decoded natively), `openslide` (whatever else OpenSlide knows) and `image` (plain images).
"""

import abc
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wavepath.data.mpp import Candidate
from wavepath.errors import SlideError

BACKENDS = ("auto", "tiff", "openslide", "image")
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_IMAGE_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")


class Level(NamedTuple):
    """One resolution of a slide; `downsample` is level-0 pixels per pixel of this level."""

    width: int
    height: int
    downsample: float


class Backend(abc.ABC):
    """Decodes native tiles of one file. All methods may be called from many threads at once."""

    name: str
    levels: tuple[Level, ...]
    tile_sizes: tuple[tuple[int, int], ...]  # (width, height) of the native tiles, for each level
    vendor: str = ""
    objective: float | None = None
    compression: str = ""
    properties: dict[str, str]
    mpp_candidates: list[Candidate]
    cached: bool = True  # False: the backend holds its pixels itself

    @abc.abstractmethod
    def decode(self, level: int, column: int, row: int) -> np.ndarray:
        """uint8[h, w, 3]: the native tile at (column, row) of `level`; edge tiles may be cut to the level or carry padding.

        Raises:
            SlideError: the tile's data are damaged or missing from the file.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Releases the file."""


def build_levels(sizes: list[tuple[int, int]]) -> tuple[Level, ...]:
    """Levels from their (width, height), finest first.

    Writers halve a level and round, so that the ratio of the widths (2220 / 277 = 8.014) is not the scale (8). Where a power
    of two, or the nearest whole number, explains both sides to within a pixel, that is the scale; else the mean ratio.
    """
    width, height = sizes[0]
    levels = []
    for w, h in sizes:
        ratio = (width / w + height / h) / 2
        for whole in (2 ** round(math.log2(ratio)), round(ratio)):
            if abs(width / whole - w) < 1 and abs(height / whole - h) < 1:
                ratio = float(whole)
                break
        levels.append(Level(w, h, ratio))
    return tuple(levels)


def over_white(rgba: np.ndarray) -> np.ndarray:
    """uint8[h, w, 4] with straight alpha -> uint8[h, w, 3] on white, as a slide looks on glass."""
    alpha = rgba[..., 3:]
    if alpha.min(initial=255) == 255:
        return np.ascontiguousarray(rgba[..., :3])
    weighted = rgba[..., :3].astype(np.uint32) * alpha + np.uint32(255) * (255 - alpha.astype(np.uint32))
    return ((weighted + 127) // 255).astype(np.uint8)


def read_header(path: Path, count: int = 132) -> bytes:
    """The first bytes of a file.

    Raises:
        SlideError: no such file, a folder, not readable, or empty.
    """
    try:
        with open(path, "rb") as file:
            header = file.read(count)
    except IsADirectoryError:
        raise SlideError(f"{path} is a folder, not a slide; give one of its files, or the folder to a command that takes many slides") from None
    except OSError as error:
        raise SlideError(f"cannot open {path}: {error.strerror}; check the path and the permissions") from None
    if not header:
        raise SlideError(f"{path} is empty (0 bytes); copy it again from its source or remove it")
    return header


def is_dicom(header: bytes) -> bool:
    """Whether a file that starts with `header` (132 bytes) is DICOM."""
    return header[128:132] == b"DICM"


def open_backend(path: Path, backend: str = "auto") -> Backend:
    """Opens `path` with the named backend; `auto` looks at the content, never at the suffix.

    Tiled TIFF of the Aperio, generic and OME kinds with 8-bit RGB or grey pixels is decoded natively; vendors' TIFF dialects
    (Hamamatsu, Leica, Ventana, Philips, Trestle), other containers, and what the native decoder does not know go to OpenSlide;
    untiled TIFF, JPEG and PNG are plain images.

    Raises:
        SlideError: with the reason, if the file is missing, empty, damaged, truncated, of unknown format or too large untiled.
    """
    if backend not in BACKENDS:
        raise SlideError(f"no slide backend is named {backend!r}; choose one of {', '.join(BACKENDS)}")
    header = read_header(path)
    # Imported here: `wavepath --help` and the tables need none of the decoders.
    if backend == "image":
        from wavepath.data.slide_image import ImageBackend

        return ImageBackend(path)
    if backend == "tiff":
        from wavepath.data.slide_tiff import TiffBackend

        if not header.startswith(TIFF_MAGIC):
            raise SlideError(f"{path} is not a TIFF file; leave the backend at auto")
        return TiffBackend(path)
    from wavepath.data.slide_openslide import OpenSlideBackend, detect_format

    if backend == "openslide":
        return OpenSlideBackend(path)
    if header.startswith(_IMAGE_MAGIC):
        from wavepath.data.slide_image import ImageBackend

        return ImageBackend(path)
    known = detect_format(path)
    if header.startswith(TIFF_MAGIC) and known in (None, "aperio", "generic-tiff"):
        return _open_tiff(path, known)
    if known is not None:
        return OpenSlideBackend(path)
    if is_dicom(header):
        raise SlideError(f"{path} is DICOM but no whole-slide image that OpenSlide can read; check that its series is complete")
    raise SlideError(f"{path} is no slide or image: its content is not TIFF, DICOM, JPEG, PNG or a format of OpenSlide; export it again or remove it")


def _open_tiff(path: Path, known: str | None) -> Backend:
    """The native reader where it can decode the file to the same pixels as OpenSlide, else OpenSlide, else a plain image."""
    from wavepath.data.slide_image import ImageBackend
    from wavepath.data.slide_openslide import OpenSlideBackend
    from wavepath.data.slide_tiff import TiffBackend, UnsupportedTiff

    try:
        return TiffBackend(path)
    except UnsupportedTiff as reason:
        if known is not None:
            return OpenSlideBackend(path)
        if reason.untiled:
            return ImageBackend(path)
        raise
