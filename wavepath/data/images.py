"""A folder of images as a source of tiles: JPEG, PNG and TIFF files at any depth, brought to one size.

Where all images have one size they are used as they are. Where sizes differ, every image is resized with its aspect kept (Pillow, bicubic
with antialiasing) until its shorter side is the common side, and the centre square is cut out. The common side is the median of
the shorter sides, but at most twice the model's image size: a training crop gains nothing from more.
"""

import io
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from wavepath import console
from wavepath.data.decode import BatchArrays, check_whole, decode_jpeg, in_threads, thread_count
from wavepath.data.manifest import one_line
from wavepath.data.sources import Source, Span, even_blocks
from wavepath.errors import DatasetError

_SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff"}
_SLIDE_SUFFIXES = {".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".dcm", ".svslide", ".czi", ".isyntax"}
_MAX_SIDE = 8192  # a larger image is a slide, whose tiles are wanted and not the whole squeezed into one
_COLOURS = {"RGB", "RGBA", "L", "LA", "La", "RGBa", "P", "PA", "1", "CMYK", "YCbCr"}


def find_images(folder: Path) -> list[Path]:
    """All images below `folder`, sorted by folder and name; hidden files do not count, linked folders do.

    Raises:
        DatasetError: there are none; says so if there are slides instead.
    """
    found, slides, seen = [], [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # links that go round in circles
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            suffix = Path(name).suffix.lower()
            if suffix in _SUFFIXES and not name.startswith("."):
                found.append(Path(parent) / name)
            elif suffix in _SLIDE_SUFFIXES:
                slides.append(name)
    if not found and slides:
        raise DatasetError(
            f"{folder} holds slides (such as {min(slides)}), not tiles; run `wavepath prepare --slides {folder} --out TILES` and train on TILES, "
            f"or stream with --config.data.slides={folder}"
        )
    if not found:
        raise DatasetError(f"{folder} is no prepared dataset and holds no .jpg, .png or .tif images; give another --config.data.dir")
    return sorted(found, key=lambda path: (path.parent.as_posix(), path.name))


def decode_image(encoded: bytes) -> np.ndarray:
    """An image file's bytes as uint8[h, w, 3]; grey becomes RGB, transparency white glass, rotation tags are not applied.

    Raises:
        ValueError: more than 8 bits a channel, or floating point: there is no right way to scale those; or a JPEG that is cut short.
    """
    import imagecodecs
    from PIL import Image

    if encoded[:3] == b"\xff\xd8\xff":
        check_whole(encoded)
        image = imagecodecs.jpeg8_decode(encoded)
        if image.ndim == 3 and image.shape[2] == 3:
            return image
    with Image.open(io.BytesIO(encoded)) as picture:
        if picture.mode not in _COLOURS:
            raise ValueError(f"pixels of kind {picture.mode}; convert it to 8-bit RGB")
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
            picture = Image.alpha_composite(white, picture)
        return np.array(picture.convert("RGB"))


def decode_in_place(encoded: bytes, out: np.ndarray) -> bool:
    """Decodes a JPEG file of RGB of the size of `out` uint8[h, w, 3] into it; False where it is anything else.

    Raises:
        ValueError: a JPEG that is cut short.
    """
    if encoded[:3] != b"\xff\xd8\xff":
        return False
    check_whole(encoded)
    try:
        decode_jpeg(encoded, out)
    except (ValueError, RuntimeError):  # grey, CMYK, another size, not supported: the general way knows what to do or to say
        return False
    return True


def fit(image: np.ndarray, side: int) -> np.ndarray:
    """Resizes uint8[h, w, 3] until its shorter side is `side` (bicubic, antialiased) and cuts out the centre: uint8[side, side, 3]."""
    from PIL import Image

    height, width = image.shape[:2]
    if height <= width:
        new_height, new_width = side, max(side, (width * side + height // 2) // height)
    else:
        new_height, new_width = max(side, (height * side + width // 2) // width), side
    if (new_height, new_width) != (height, width):
        image = np.asarray(Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BICUBIC))
    top, left = (new_height - side) // 2, (new_width - side) // 2
    return image[top : top + side, left : left + side]


class ImageFolder(Source):
    """A folder of images. Each folder that holds images counts as a slide (for splits and for `data.exclude_slides`).

    Args:
        folder: searched at every depth.
        image_size: side of the model's images in pixels; bounds the common size where sizes differ.
        threads: decoding threads; 0: one for each core.
    """

    kind = "images"

    def __init__(self, folder: Path, image_size: int, threads: int = 0):
        self.name, self.threads = str(folder), thread_count(threads)
        self._folder = Path(folder)
        self._paths = find_images(self._folder)
        sizes = self._sizes()
        known = [size for size in sizes if size is not None]
        if not known:
            raise DatasetError(f"{folder}: none of the {len(sizes)} images can be read (first: {self._paths[0]}); give another --config.data.dir")
        self._side = 0
        if len(set(known)) == 1:
            self.image_shape = (*known[0], 3)
        else:
            self._side = min(sorted(min(size) for size in known)[(len(known) - 1) // 2], 2 * image_size)
            self.image_shape = (self._side, self._side, 3)
            console.say(
                f"data: the images of {folder} have {len(set(known))} sizes; each is resized to a shorter side of {self._side} px and its centre "
                f"{self._side}x{self._side} used"
            )
        self.spans = self._spans()
        self.blocks = even_blocks(self.spans)
        self._pool, self._arrays = ThreadPoolExecutor(self.threads, thread_name_prefix="decode"), BatchArrays()

    def _sizes(self) -> list[tuple[int, int] | None]:
        """(height, width) of each image from its header; None where the header cannot be read (an error when the image is wanted)."""
        from PIL import Image

        sizes: list[tuple[int, int] | None] = []
        unreadable = []
        with console.progress(f"image headers in {self._folder}", len(self._paths), "images") as bar:
            for path in self._paths:
                try:
                    with Image.open(path) as image:
                        width, height = image.size
                except Image.DecompressionBombError:
                    width = height = _MAX_SIDE + 1
                except (OSError, ValueError, SyntaxError):
                    sizes.append(None)
                    unreadable.append(path)
                    continue
                finally:
                    bar.advance()
                if max(width, height) > _MAX_SIDE:
                    raise DatasetError(
                        f"{path} is larger than {_MAX_SIDE} px: a slide, not a tile; run `wavepath prepare --slides {self._folder} --out TILES` and "
                        f"train on TILES, or stream with --config.data.slides={self._folder}"
                    )
                sizes.append((height, width))
        if unreadable:
            console.warn(f"{len(unreadable)} images in {self._folder} cannot be read (first: {unreadable[0]})")
        return sizes

    def _spans(self) -> list[Span]:
        counts = Counter(path.parent for path in self._paths)  # in the order of the paths, which are sorted by folder
        spans, start = [], 0
        for parent, count in counts.items():
            relative = parent.relative_to(self._folder).as_posix()
            spans.append(Span(self._folder.resolve().name if relative == "." else relative, start, start + count, None))
            start += count
        return spans

    def read(self, example_ids: Iterable[int]) -> list[bytes]:
        return [self._bytes(int(index)) for index in example_ids]

    def _bytes(self, index: int) -> bytes:
        try:
            return self._paths[index].read_bytes()
        except OSError as error:
            raise DatasetError(f"{self._paths[index]} (example {index}) cannot be read: {error.strerror}; put it back or start again") from None

    def images(self, example_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = [int(index) for index in example_ids]
        out = self._arrays.get(len(ids), self.image_shape)

        def work(place: int) -> None:
            self._load(ids[place], out[place])

        in_threads(work, len(ids), self._pool, self.threads)
        return out

    def _load(self, index: int, out: np.ndarray) -> None:
        encoded = self._bytes(index)
        try:
            if not self._side and decode_in_place(encoded, out):
                return
            image = decode_image(encoded)
        except Exception as error:  # the codecs have error classes of their own, one each
            raise DatasetError(
                f"{self._paths[index]} (example {index}) cannot be decoded ({one_line(error)}); replace or remove it, or train with "
                "--config.data.on_corrupt=replace"
            ) from None
        if self._side:
            image = fit(image, self._side)
        elif image.shape != self.image_shape:
            raise DatasetError(f"{self._paths[index]} (example {index}) has changed its size since the start; start again")
        out[...] = image

    def meta(self, example_id: int) -> dict[str, Any]:
        path, span = self._paths[int(example_id)], self.span_of(int(example_id))
        return {
            "slide": span.slide, "x": 0, "y": 0, "mpp": float("nan"), "slide_mpp": None, "energy": float("nan"), "region": -1, "id": int(example_id),
            "path": path, "name": path.relative_to(self._folder).with_suffix("").as_posix(),
        }

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
