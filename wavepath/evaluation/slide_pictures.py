"""What a heatmap is drawn over and its tiles are shown from: slides, or a folder of `wavepath prepare`; and strips of the tiles with most and least.

    with open_pixels(tiles=TILES) as pixels:
        backdrop = pixels.backdrop(slide_id)     # thumbnail, dimensions, mpp; None where the slide is not there
        tile_strip(path, tiles=pixels.reader(slide_id, coords, size_level0), values=attention)
"""

import contextlib
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from wavepath.console import warn
from wavepath.data.manifest import MANIFEST, SETTINGS, SlideRow, read_manifest, slide_folder
from wavepath.data.mpp import given_mpp, read_mpp_csv
from wavepath.data.slides import find_slides, open_slide
from wavepath.data.sources import PreparedSource
from wavepath.errors import DatasetError, SlideError
from wavepath.files import atomic_path, read_json

Reader = Callable[[Sequence[int]], list[np.ndarray]]
THUMBNAIL_PX = 1536  # longer side: what a panel of a heatmap has pixels for
TILE_PX = 224  # side of a tile read from a slide
_DPI = 200


@dataclass(frozen=True)
class Backdrop:
    """A slide's `thumbnail` uint8 [h, w, 3], its `dimensions` (width, height) in level-0 pixels, and um per level-0 pixel (None: not known)."""

    thumbnail: np.ndarray
    dimensions: tuple[int, int]
    mpp: float | None


class Pixels:
    """Thumbnails and tiles of slides by their ids; made by `open_pixels`."""

    def backdrop(self, slide_id: str) -> Backdrop | None:
        """The slide's thumbnail, or None where there is no such slide here, or it cannot be read (which is said)."""
        raise NotImplementedError

    def reader(self, slide_id: str, coords: Int[np.ndarray, "n 2"], size_level0: float) -> Reader | None:
        """Reads tiles by their index into `coords`; None where they are not here.

        Args:
            coords: top left corners in level-0 pixels. size_level0: side of a tile in them.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Releases files and threads."""


@contextlib.contextmanager
def open_pixels(
    tiles: Path | None = None, slides: Path | None = None, mpp_csv: Path | None = None, slide_mpp: float | None = None
) -> Iterator[Pixels | None]:
    """The pixels of a prepared folder, of a folder of slides (or one slide), or None where neither is given.

    Args:
        mpp_csv, slide_mpp: with `slides`: table slide,mpp, and the um per pixel of others, for the scale bars of slides whose files do not say it.

    Raises:
        DatasetError, SlideError: the folder is none of its kind.
    """
    if tiles is not None:
        pixels: Pixels | None = PreparedPixels(Path(tiles))
    else:
        pixels = SlidePixels(Path(slides), read_mpp_csv(mpp_csv) if mpp_csv else {}, slide_mpp) if slides is not None else None
    try:
        yield pixels
    finally:
        if pixels is not None:
            pixels.close()


def _called(ids: Collection[str], slide_id: str) -> str | None:
    """The id itself or, since TRIDENT's and CLAM's files know a slide by the end of its path or the joined path, the one id that comes to that."""
    if slide_id in ids:
        return slide_id
    alike = [name for name in ids if name.replace("/", "__") == slide_id or name.rpartition("/")[2] == slide_id.rpartition("/")[2]]
    return alike[0] if len(alike) == 1 else None


class SlidePixels(Pixels):
    """Reads from the slides themselves."""

    def __init__(self, slides: Path, table: Mapping[str, float], mpp: float | None = None):
        refs = find_slides(slides)
        self._paths = {ref.id: ref.path for ref in refs}
        given = given_mpp(refs, table, mpp)
        self._mpp = {ref.path: given[ref.id] for ref in refs}

    def _path(self, slide_id: str) -> Path | None:
        name = _called(self._paths, slide_id)
        return None if name is None else self._paths[name]

    def backdrop(self, slide_id: str) -> Backdrop | None:
        path = self._path(slide_id)
        if path is None:
            return None
        try:
            with open_slide(path, mpp=self._mpp[path]) as slide:
                return Backdrop(slide.thumbnail(THUMBNAIL_PX), slide.dimensions, slide.mpp)
        except (SlideError, OSError) as error:
            warn(f"no thumbnail of {slide_id}: {error}")
            return None

    def reader(self, slide_id: str, coords: np.ndarray, size_level0: float) -> Reader | None:
        path = self._path(slide_id)
        if path is None:
            return None

        def read(indices: Sequence[int]) -> list[np.ndarray]:
            with open_slide(path) as slide:
                # By pixels, not by mpp: a slide that has none has tiles all the same.
                wanted = max(1.0, size_level0 / TILE_PX)
                level = max((n for n, each in enumerate(slide.levels) if each.downsample <= wanted * 1.01), key=lambda n: slide.levels[n].downsample)
                down = slide.levels[level].downsample
                side = max(1, round(size_level0 / down))
                found = [slide.read_level(level, round(x / down), round(y / down), side, side) for x, y in np.asarray(coords)[list(indices)].tolist()]
            return [np.asarray(Image.fromarray(tile).resize((TILE_PX, TILE_PX), Image.Resampling.LANCZOS)) for tile in found]

        return read


class PreparedPixels(Pixels):
    """Reads thumbnails and stored tiles of a prepared folder; tiles that are not among the stored come from the slide, while it is there."""

    def __init__(self, folder: Path):
        if not (folder / MANIFEST).is_file():
            raise DatasetError(f"{folder} has no {MANIFEST}; give a folder of `wavepath prepare`, or the slides")
        self._folder = folder
        self._rows: dict[str, SlideRow] = {row.slide_id: row for row in read_manifest(folder)}
        self._source: PreparedSource | None = None

    def backdrop(self, slide_id: str) -> Backdrop | None:
        slide_id = _called(self._rows, slide_id) or slide_id
        row, path = self._rows.get(slide_id), slide_folder(self._folder, slide_id) / "thumbnail.jpg"
        if row is None or not row.width or not row.height or not path.is_file():
            return None
        with Image.open(path) as image:
            return Backdrop(np.asarray(image.convert("RGB")), (row.width, row.height), row.mpp)

    def reader(self, slide_id: str, coords: np.ndarray, size_level0: float) -> Reader | None:
        slide_id = _called(self._rows, slide_id) or slide_id
        self._source = self._source or PreparedSource(self._folder)
        span = next((span for span in self._source.spans if span.slide == slide_id), None)
        if span is None:
            return self._from_slide(slide_id, coords, size_level0)
        places = [tuple(place) for place in np.asarray(coords).tolist()]
        source, ids = self._source, {}
        if len(places) == span.stop - span.start:  # most likely the very tiles in their order: then only those that are shown are looked up
            ids = dict(enumerate(range(span.start, span.stop)))

        def read(indices: Sequence[int]) -> list[np.ndarray]:
            nonlocal ids
            if not all(index in ids and _corner(source.meta(ids[index])) == places[index] for index in indices):
                stored = {_corner(source.meta(index)): index for index in range(span.start, span.stop)}
                ids = {index: stored[place] for index, place in enumerate(places) if place in stored}
            if any(index not in ids for index in indices):
                other = self._from_slide(slide_id, coords, size_level0)
                if other is None:
                    raise DatasetError(f"{self._folder} does not hold the tiles of {slide_id} that were scored; give the folder they are of")
                return other(indices)
            return list(source.images([ids[index] for index in indices]))

        return read

    def _from_slide(self, slide_id: str, coords: np.ndarray, size_level0: float) -> Reader | None:
        row = self._rows.get(slide_id)
        path = Path(read_json(self._folder / SETTINGS)["slides"]) / row.path if row is not None else None
        if path is None or not path.exists():
            return None
        slides = SlidePixels(path, {})
        return slides.reader(next(iter(slides._paths)), coords, size_level0)

    def close(self) -> None:
        if self._source is not None:
            self._source.close()


def _corner(meta: dict) -> tuple[int, int]:
    return int(meta["x"]), int(meta["y"])


def extremes(values: Float[np.ndarray, " n"], count: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the highest values from the highest down, and of the lowest from the lowest up: `count` each, of fewer tiles half of them, so that
    none is in both; of equal values the first. What is not finite is in neither."""
    finite = np.flatnonzero(np.isfinite(values))
    order = finite[np.argsort(np.asarray(values)[finite], kind="stable")]
    half = len(order) // 2
    low = order[: min(count, half)]
    descending = finite[np.argsort(-np.asarray(values)[finite], kind="stable")]
    high = [index for index in descending if index not in set(low.tolist())][: min(count, len(order) - half)]
    return np.array(high, np.int64), low


def tile_strip(
    path: Path, *, tiles: Reader, values: Float[np.ndarray, " n"], names: Sequence[str] | None = None, count: int = 8, title: str = "",
    value_name: str = "attention",
) -> None:
    """Writes a PNG of two lines: the tiles with the highest values and those with the lowest, each with its value.

    Args:
        tiles: gives uint8 [h, w, 3] for each of some indices. values: one for each tile. names: under the values, where given.
        count: of each line. value_name: what the values are, at the left of the lines.

    Raises:
        DatasetError: no tile has a finite value, or `tiles` cannot read them. SlideError: see `open_slide`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    values = np.asarray(values)
    high, low = extremes(values, count)
    if not len(high):
        raise DatasetError(f"{path}: no tile has a finite value, so there is nothing to show")
    what = "\n".join(textwrap.wrap(value_name, 13))
    lines = [(f"highest\n{what}", high)] + ([(f"lowest\n{what}", low)] if len(low) else [])
    wide = max(len(high), len(low))
    note = 0.16 + (0.14 if names is not None else 0)
    figure = Figure(figsize=(0.95 * wide + 0.75, (0.95 + note) * len(lines) + (0.3 if title else 0.05)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03, wspace=0.01, hspace=0.01)
    axes = figure.subplots(len(lines), wide, squeeze=False)
    pixels = iter(tiles([int(index) for _, indices in lines for index in indices]))
    for row, (head, indices) in zip(axes, lines, strict=True):
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for axis, index in zip(row, indices, strict=False):
            axis.imshow(next(pixels))
            text = f"{values[index]:.3g}" + (f"\n{names[index]}" if names is not None else "")
            axis.set_xlabel(text, fontsize=7, labelpad=2)
        row[0].set_ylabel(head, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=9)
    with atomic_path(path) as temporary:
        figure.set_dpi(_DPI)
        FigureCanvasAgg(figure).print_png(str(temporary))
