"""Plain images as slides of one level: JPEG, PNG and TIFF without tiles.

Such a file can only be decoded whole, so there is a limit on its pixels: a compressed image of a few megabytes can ask for
all memory there is.
"""

import threading
import warnings
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

from wavepath.data.mpp import from_density
from wavepath.data.slide_backends import TIFF_MAGIC, Backend, Level, over_white, read_header
from wavepath.data.slide_metadata import tiff_facts
from wavepath.errors import SlideError

MAX_PIXELS = 80_000_000  # about 0.6 GB while decoding, 0.24 GB held
_CONVERT = "convert it to a tiled pyramid, for example `vips tiffsave IN OUT.tiff --tile --pyramid --compression jpeg`"
_EIGHT_BIT = {"1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "RGBX"}


class ImageBackend(Backend):
    """One plain image, decoded at the first read and held until the slide is closed.

    Raises:
        SlideError: no image that Pillow or tifffile knows, more than `MAX_PIXELS`, more than 8 bits, or damaged.
    """

    name = "image"
    cached = False

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._pixels: np.ndarray | None = None
        self.properties = {}
        self.mpp_candidates = []
        self._tiff = read_header(path, 4) in TIFF_MAGIC
        width, height = self._open_tiff() if self._tiff else self._open_image()
        self.levels = (Level(width, height, 1.0),)
        self.tile_sizes = ((width, height),)

    def _check_size(self, width: int, height: int) -> None:
        if width * height > MAX_PIXELS:
            raise SlideError(
                f"{self.path} is too large to read untiled ({width} x {height}, limit {MAX_PIXELS / 1e6:g} megapixels: such an image is decoded "
                f"whole into memory); {_CONVERT}"
            )
        if width < 1 or height < 1:
            raise SlideError(f"{self.path} has no pixels ({width} x {height}); export it again or remove it")

    def _open_image(self) -> tuple[int, int]:
        try:
            with warnings.catch_warnings():
                # Pillow's own warning about large images: the limit here is lower, and its message says what to do.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(self.path) as image:
                    size, mode, info = image.size, image.mode, image.info
                    self.vendor = self.compression = image.format or ""
        except Image.DecompressionBombError:
            raise SlideError(
                f"{self.path} is too large to read untiled (limit {MAX_PIXELS / 1e6:g} megapixels: such an image is decoded "
                f"whole into memory); {_CONVERT}"
            ) from None
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
            raise self._damaged(error) from None
        self._check_size(*size)
        if mode not in _EIGHT_BIT:
            raise SlideError(f"{self.path} has pixels of mode {mode}; wavepath reads 8-bit RGB or grey images, convert it to one")
        dpi = info.get("dpi")
        if dpi:
            self.mpp_candidates += from_density(f"{self.vendor} resolution", float(dpi[0]), float(dpi[1]), 25400.0)
        return size

    def _open_tiff(self) -> tuple[int, int]:
        try:
            with tifffile.TiffFile(self.path) as tiff:
                page = tiff.pages[0]
                facts = tiff_facts(tiff, page)
                self.vendor, self.objective, self.compression = facts.vendor, facts.objective, facts.compression
                self.properties, self.mpp_candidates = facts.properties, facts.mpp_candidates
                if page.dtype != np.uint8 or page.samplesperpixel not in (1, 3, 4) or page.imagedepth != 1 or page.photometric not in (1, 2, 6):
                    raise SlideError(
                        f"{self.path} holds {page.bitspersample}-bit pixels of {page.samplesperpixel} samples "
                        f"({getattr(page.photometric, 'name', page.photometric)}); wavepath reads 8-bit RGB or grey images, convert it to one"
                    )
                size = (page.imagewidth, page.imagelength)
        except SlideError:
            raise
        except Exception as error:
            # tifffile raises whatever a damaged field leads to.
            raise self._damaged(error) from None
        self._check_size(*size)
        return size

    def _load(self) -> np.ndarray:
        if self._tiff:
            with tifffile.TiffFile(self.path) as tiff:
                page = tiff.pages[0]
                pixels = page.asarray()
                if page.planarconfig == 2 and page.samplesperpixel > 1:
                    pixels = np.moveaxis(pixels, 0, -1)
            if pixels.ndim == 2:
                pixels = pixels[..., None]
            if pixels.shape[2] == 1:
                pixels = np.repeat(pixels, 3, axis=2)
            return over_white(pixels) if pixels.shape[2] == 4 else np.ascontiguousarray(pixels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(self.path) as image:
                transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
                return over_white(np.asarray(image.convert("RGBA"))) if transparent else np.array(image.convert("RGB"))

    def decode(self, level: int, column: int, row: int) -> np.ndarray:
        with self._lock:
            if self._pixels is None:
                try:
                    pixels = self._load()
                except Exception as error:
                    # Pillow and tifffile raise OSError, ValueError, SyntaxError, struct.error and their own for damaged data.
                    raise self._damaged(error) from None
                pixels.flags.writeable = False
                self._pixels = pixels
            return self._pixels

    def _damaged(self, error: Exception) -> SlideError:
        text = " ".join(str(error).replace(str(self.path), "it").split())[:160]
        return SlideError(f"{self.path} is a damaged or truncated image ({text}); copy it again from its source or remove it")

    def close(self) -> None:
        self._pixels = None
