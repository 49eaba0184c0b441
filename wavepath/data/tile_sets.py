"""The tiles of slides as other tools want to hear of them: from a prepared folder or a folder of features, one slide at a time.

What a feature file does not say (the slide's size, its file, its label) is looked up where the features came from, if that is still there:
`embed.json` names it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wavepath.console import say
from wavepath.data.coords_source import stored_overlap
from wavepath.data.manifest import EMPTY, MANIFEST, OK, SETTINGS, SlideRow, read_manifest, slide_folder
from wavepath.data.mpp import strip_suffix
from wavepath.errors import ConfigError, DatasetError, WavepathError
from wavepath.files import read_json
from wavepath.interop.coords import PATCHES, Geometry, geometry, number, read_coords
from wavepath.interop.features import SUFFIX, features_folder, list_features, read_features

EMBED = "embed.json"  # of a folder of `wavepath embed`


@dataclass(frozen=True)
class SlideTiles:
    """The tiles of one slide. Positions and sizes in level-0 pixels, mpp in um per pixel; what is not known is None.

    `coords` int64 [n, 2] (x, y) of the top left corners; `geometry` their size; `mpp` of the tiles, `level0_mpp` of the slide, and the
    magnifications that stand for them (10 / mpp, or what another tool took them for); `columns` numbers of each tile [n] by name; `features`
    float32 [n, d]. `suffix` is that of the slide's file, `path` the file where it was found, `folder` the slide's own in a prepared folder.
    """

    slide_id: str
    coords: np.ndarray
    geometry: Geometry | None
    mpp: float | None = None
    level0_mpp: float | None = None
    level0_magnification: float | None = None
    target_magnification: float | None = None
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    features: np.ndarray | None = None
    encoder: str = ""
    dimensions: tuple[int, int] | None = None
    suffix: str = ""
    path: Path | None = None
    folder: Path | None = None
    case_id: str = ""
    label: str = ""

    def __len__(self) -> int:
        return len(self.coords)


class TileSet:
    """Slides with tiles: `ids` in order, `read(id)` one of them. `kind` is `tiles` or `features`."""

    kind = ""
    ids: list[str]

    def __init__(self, slides: Path | None):
        self._rows: dict[str, SlideRow] = {}
        self._prepared: Path | None = None
        self._files: dict[str, Path] | None = None
        if slides is not None:
            self._files = _slide_files(slides)

    def read(self, slide_id: str, advance: Callable[[int], None] = lambda tiles: None) -> SlideTiles:
        """One slide's tiles; `advance` is told of every so many that were read.

        Raises:
            DatasetError: what is stored of them is damaged.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Releases files."""

    def _use_prepared(self, folder: Path) -> None:
        """What the manifest says of each slide, and where its file is."""
        self._prepared = folder
        self._rows = {row.slide_id: row for row in read_manifest(folder)}
        if self._files is None and (folder / SETTINGS).is_file():
            root = Path(str(read_json(folder / SETTINGS).get("slides", "")))
            self._files = {row.slide_id: root / row.path for row in self._rows.values() if (root / row.path).is_file()}

    def _facts(self, slide_id: str) -> dict[str, Any]:
        """Size, file and label of a slide, as far as they are known."""
        row, path = self._rows.get(slide_id), self._path(slide_id)
        facts: dict[str, Any] = dict(path=path)
        if path is not None or row is not None:
            name = path.name if path is not None else row.path.rsplit("/", 1)[-1]
            facts["suffix"] = name.removeprefix(strip_suffix(name))
        if row is not None:
            facts |= dict(case_id=row.case_id, label=row.label)
            if row.width and row.height:
                facts["dimensions"] = (row.width, row.height)
            if self._prepared is not None:
                facts["folder"] = slide_folder(self._prepared, slide_id)
        return facts

    def _path(self, slide_id: str) -> Path | None:
        found = (self._files or {}).get(slide_id)
        return found if found is not None else (self._files or {}).get(slide_id.rsplit("/", 1)[-1])


def _slide_files(slides: Path) -> dict[str, Path]:
    from wavepath.data.slides import find_slides

    return {ref.id: ref.path for ref in find_slides(slides)}


class PreparedTiles(TileSet):
    """The tiles of a folder of `wavepath prepare`, with the energy and the region of each."""

    kind = "tiles"

    def __init__(self, folder: Path, slides: Path | None = None):
        from wavepath.data.sources import PreparedSource

        super().__init__(slides)
        self._use_prepared(folder)
        self._source = PreparedSource(folder, 1)
        self._spans = {span.slide: span for span in self._source.spans}
        self._overlap = stored_overlap(folder)
        self._usual = min((row.tile_mpp for row in self._rows.values() if row.tile_mpp), default=0.0)
        self.ids = [row.slide_id for row in self._rows.values() if row.slide_id in self._spans or (row.status == EMPTY and row.mpp)]
        if failed := len(self._rows) - len([row for row in self._rows.values() if row.status in (OK, EMPTY)]):
            say(f"{failed} slides of {folder} have failed and are not among its tiles ({MANIFEST} tells why)")

    def read(self, slide_id: str, advance: Callable[[int], None] = lambda tiles: None) -> SlideTiles:
        row, span, size = self._rows[slide_id], self._spans.get(slide_id), self._source.image_shape[0]
        ids = range(span.start, span.stop) if span else range(0)
        metas = []
        for index in ids:
            metas.append(self._source.meta(index))
            if len(metas) % 256 == 0:
                advance(256)
        advance(len(metas) % 256)
        coords = np.array([(meta["x"], meta["y"]) for meta in metas], np.int64).reshape(-1, 2)
        columns = {name: np.array([meta[name] for meta in metas], kind) for name, kind in (("energy", np.float32), ("region", np.int64))}
        mpp = row.tile_mpp or max(self._usual, row.mpp)  # a slide without tiles is filed with the others
        stated = Geometry(size, size * mpp / row.mpp, None, self._overlap)
        return SlideTiles(slide_id, coords, stated, mpp, row.mpp, 10 / row.mpp, 10 / mpp, columns, **self._facts(slide_id))

    def close(self) -> None:
        self._source.close()


class FeatureTiles(TileSet):
    """The tiles of a folder of feature files, wavepath's or TRIDENT's or CLAM's."""

    kind = "features"

    def __init__(self, folder: Path, slides: Path | None = None, column: str = "features", encoder: str = ""):
        super().__init__(slides)
        self._column, self._encoder = column, encoder
        self._paths = dict(list_features(folder))
        self.ids = list(self._paths)
        self._patches = features_folder(folder).parent / PATCHES
        place = features_folder(folder) / EMBED
        if place.is_file():
            said = read_json(place)
            source = Path(str(said.get("source", "")))
            try:
                if (source / MANIFEST).is_file():
                    self._use_prepared(source)
                elif self._files is None and said.get("kind") == "stream" and source.exists():
                    self._files = _slide_files(source)
            except WavepathError as error:
                say(f"what the features were made from is no help: {error}")

    def read(self, slide_id: str, advance: Callable[[int], None] = lambda tiles: None) -> SlideTiles:
        found = read_features(self._paths[slide_id], slide_id)
        said, features, encoder = found.attributes, found.features, str(found.attributes.get("encoder", ""))
        try:
            size = geometry(said) or self._beside(slide_id, found.coords)
        except ValueError as error:
            raise DatasetError(f"{self._paths[slide_id]}: {error}; make the file again") from None
        if self._column != "features":
            if self._column not in found.extra or found.extra[self._column].ndim != 2:
                raise ConfigError(f"{self._paths[slide_id]} has no features {self._column!r}; leave out --column, or embed again")
            features, encoder = found.extra[self._column], f"{encoder}-{self._column.removeprefix('features_')}"
        columns = {name: values for name, values in found.extra.items() if values.ndim == 1 and values.dtype.kind in "iufb"}
        # A column without a single number says nothing (the energy of tiles that were never screened).
        columns = {name: values for name, values in columns.items() if values.dtype.kind != "f" or not len(values) or not np.isnan(values).all()}
        facts = self._facts(slide_id)
        if "dimensions" not in facts and (sides := [number(said.get(f"level0_{side}")) for side in ("width", "height")]) and all(sides):
            facts["dimensions"] = (int(sides[0]), int(sides[1]))
        advance(len(found))
        return SlideTiles(
            slide_id, found.coords, size, number(said.get("mpp")), number(said.get("level0_mpp")), number(said.get("level0_magnification")),
            number(said.get("target_magnification")), columns, features, self._encoder or encoder or "unknown", **facts,
        )


    def _beside(self, slide_id: str, coords: np.ndarray) -> Geometry | None:
        """The size of the tiles from CLAM's `patches`, beside its features, which do not say it; None where these are of other tiles."""
        path = self._patches / f"{slide_id}{SUFFIX}"
        if not path.is_file():
            return None
        found = read_coords(path)
        size, downsample = found.geometry, number(np.ravel(found.attributes.get("downsample", 1))[0])
        if size.footprint is None and (downsample is None or (size.level and "downsample" not in found.attributes)):
            return None
        return Geometry(size.patch_size, size.footprint or size.patch_size * downsample) if np.array_equal(found.coords, coords) else None


def open_tile_set(path: Path, *, slides: Path | None = None, column: str = "features", encoder: str = "") -> TileSet:
    """Opens a prepared folder or a folder of features.

    Args:
        slides: the slides themselves, where they are no longer at the place that the folder names.
        column, encoder: of features, which are written and the name they go by (default: the class token, the file's own name).

    Raises:
        DatasetError: neither of the two is there.
    """
    path = Path(path)
    if not path.is_dir():
        raise DatasetError(f"no folder {path}; give a folder of `wavepath prepare` or of `wavepath embed`")
    if (path / MANIFEST).is_file():
        if column != "features" or encoder:
            raise ConfigError(f"{path} holds tiles and no features; --column and --encoder go with a folder of features")
        return PreparedTiles(path, slides)
    return FeatureTiles(path, slides, column, encoder)


def slide_levels(tiles: SlideTiles, mpp: float | None = None) -> Sequence[tuple[int, int, float]] | None:
    """(width, height, downsample) of each pyramid level, from the slide where it is found; its level 0 alone from its size; else None."""
    from wavepath.data.slides import open_slide

    if tiles.path is not None:
        with open_slide(tiles.path, mpp=mpp) as slide:
            return [tuple(level) for level in slide.levels]
    return [(*tiles.dimensions, 1.0)] if tiles.dimensions else None
