"""Tiles and features in the layouts of TRIDENT, CLAM and QuPath: what `wavepath convert` does.

Every file is whole or absent, and a slide that cannot be converted is named with the reason while the others go on. Rows keep their order: row i
of the coordinates, of the features and of the scores is one tile, and the i-th of the dataset that they came from.
"""

import csv
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from wavepath import console
from wavepath.data.slide_runs import load_screening
from wavepath.data.tile_sets import SlideTiles, TileSet, slide_levels
from wavepath.data.tissue import TissueMap, contours
from wavepath.errors import ConfigError, DatasetError, WavepathError
from wavepath.files import writable_folder
from wavepath.interop import clam, geojson
from wavepath.interop.coords import PATCHES, TRIDENT_SUFFIX, flat_names, trident_attributes, trident_folder, write_trident_coords
from wavepath.interop.features import SUFFIX, write_features

FORMATS = ("trident", "clam", "geojson")
LAYERS = ("tissue", "regions", "tiles")
# Class names and colours as QuPath shows them.
_TISSUE, _TILE = ("Tissue", (20, 120, 60)), ("Tile", (60, 120, 200))
_SELECTED, _REGION, _LEFT_OUT = ("Selected region", (200, 120, 20)), ("Region", (120, 120, 120)), ("Region left out", (190, 190, 190))
_SCREENING_COLUMNS = {"energy": "wavelet energy"}  # of regions and tiles: the name in QuPath


@dataclass
class Converted:
    """What was done: slides in all, files' folders, tiles, slides that failed with the reason, notes for the user."""

    total: int = 0
    done: int = 0
    tiles: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)

    def note_folder(self, folder: Path) -> None:
        """Adds a folder, once."""
        if folder not in self.folders:
            self.folders.append(folder)


Writer = Callable[[SlideTiles, str, Path, Converted], None]


def convert(
    source: TileSet, out: Path, to: str, *, labels: Sequence[Any] = (), layers: Sequence[str] = LAYERS, strict: bool = False
) -> Converted:
    """Writes every slide of `source` to `out`.

    Args:
        to: `trident`, `clam` or `geojson`.
        labels: rows `case_id, slide_id, label` (`read_labels`) for CLAM's dataset table; without them those of the prepared folder's manifest.
        layers: of `geojson`: what to draw of `tissue`, `regions`, `tiles`.
        strict: the first slide that cannot be converted is an error.

    Raises:
        ConfigError: an unknown format or layer. DatasetError: nothing could be converted.
    """
    if to not in FORMATS:
        raise ConfigError(f"no format {to!r}; choose from {', '.join(FORMATS)}")
    if wrong := [layer for layer in layers if layer not in LAYERS]:
        raise ConfigError(f"no layer {wrong[0]!r}; choose from {', '.join(LAYERS)}")
    out = writable_folder(out)
    names, result = flat_names(source.ids), Converted(len(source.ids))
    rows: list[SlideTiles] = []
    write: Writer = {"trident": _to_trident, "clam": _to_clam, "geojson": lambda *given: _to_geojson(*given, layers)}[to]
    with console.progress(f"converting to {to}", len(source.ids), "slides") as bar:
        for slide_id in source.ids:
            try:
                tiles = source.read(slide_id)
                write(tiles, names[slide_id], out, result)
                result.done, result.tiles = result.done + 1, result.tiles + len(tiles)
                if len(tiles):
                    rows.append(dataclasses.replace(tiles, coords=tiles.coords[:0], columns={}, features=None))  # what the tables need
            except ConfigError:
                raise
            except WavepathError as error:
                if strict:
                    raise
                result.failed[slide_id] = str(error)
                console.warn(f"{slide_id}: {error}")
            bar.advance(1, slide_id)
    if not result.done:
        raise DatasetError(f"no slide could be converted (first: {next(iter(result.failed.values()), 'there is none')})")
    if to == "clam":
        _clam_tables(rows, names, out, labels, result)
    return result


def _geometry(tiles: SlideTiles):
    if tiles.geometry is None or tiles.geometry.footprint is None:
        raise DatasetError("nothing says how large its tiles are; convert the folder of `wavepath prepare`, or embed again with --coords")
    return tiles.geometry


def _numbers(tiles: SlideTiles) -> dict[str, np.ndarray]:
    return {name: values for name, values in tiles.columns.items() if name not in ("coords", "features")}


def _to_trident(tiles: SlideTiles, name: str, out: Path, result: Converted) -> None:
    """`<mag>x_<patch>px_<overlap>px_overlap/patches/<name>_patches.h5`, and beside it `features_<encoder>/<name>.h5` where there are features."""
    size = _geometry(tiles)
    if tiles.level0_magnification is None or tiles.target_magnification is None:
        raise DatasetError("nothing says the magnification of its tiles; embed again with --slides, or convert the folder of `wavepath prepare`")
    folder = out / trident_folder(tiles.target_magnification, size.patch_size, size.overlap)
    given = dict(
        name=name, patch_size=size.patch_size, level0_magnification=tiles.level0_magnification, target_magnification=tiles.target_magnification,
        overlap=size.overlap, dimensions=tiles.dimensions,
    )
    known = dict(mpp=tiles.mpp, level0_mpp=tiles.level0_mpp, slide_id=tiles.slide_id)
    more = {key: value for key, value in known.items() if value is not None}
    attributes = trident_attributes(**given, savetodir=str(folder / PATCHES), more=more)
    write_trident_coords(folder / PATCHES / f"{name}{TRIDENT_SUFFIX}", tiles.coords, attributes, _numbers(tiles))
    result.note_folder(folder / PATCHES)
    if tiles.features is not None:
        place = folder / f"features_{tiles.encoder.replace('/', '_')}"
        attributes = trident_attributes(**given, savetodir=str(place), more=more | {"encoder": tiles.encoder})
        write_features(place / f"{name}{SUFFIX}", tiles.features, tiles.coords, attributes, _numbers(tiles))
        result.note_folder(place)


def _to_clam(tiles: SlideTiles, name: str, out: Path, result: Converted) -> None:
    """`patches/<name>.h5` where the size of the tiles is known, `h5_files/<name>.h5` and `pt_files/<name>.pt` where there are features."""
    if not len(tiles):
        result.notes.append(f"{tiles.slide_id} has no tiles and is left out")
        return
    levels = slide_levels(tiles, tiles.level0_mpp) if tiles.geometry is not None and tiles.geometry.footprint is not None else None
    if levels is None and tiles.features is None:
        raise DatasetError("nothing says how large its tiles or the slide are; give the slides with --slides")
    if levels is None:
        result.notes.append(f"{tiles.slide_id}: no coordinates for CLAM's extractor, since its size is not known (--slides gives it)")
    else:
        patch = clam.clam_patch(tiles.geometry.footprint, tiles.geometry.patch_size, levels)
        if not patch.exact:
            result.notes.append(
                f"{tiles.slide_id}: tiles of {patch.wanted:.6g} level-0 px are written as {patch.size} px of level {patch.level}, "
                f"{100 * (patch.footprint / patch.wanted - 1):+.2g} %, since CLAM counts in whole pixels of a level"
            )
        clam.write_clam_coords(out / PATCHES / f"{name}{SUFFIX}", tiles.coords, patch, name, str(out / PATCHES))
        result.note_folder(out / PATCHES)
    if tiles.features is not None:
        if len(tiles) > 1 and not tiles.coords.any():  # of a `.pt`
            result.notes.append(f"{tiles.slide_id}: its features carry no coordinates; those in {clam.H5_FILES} are zeros")
        clam.write_clam_features(out, name, tiles.features, tiles.coords)
        result.note_folder(out / clam.H5_FILES)
        result.note_folder(out / clam.PT_FILES)


def _clam_tables(slides: Sequence[SlideTiles], names: dict[str, str], out: Path, labels: Sequence[Any], result: Converted) -> None:
    """The process list, and the dataset table where there are labels."""
    clam.write_process_list(out / clam.PROCESS_LIST, [names[tiles.slide_id] + tiles.suffix for tiles in slides])
    if labels:
        of = {row.slide_id: (row.case_id, row.label) for row in labels}
        if not of.keys() & names.keys():
            raise DatasetError(f"the label table names none of the slides (it has {next(iter(of))!r}, they are like {next(iter(names))!r})")
    else:
        of = {tiles.slide_id: (tiles.case_id or tiles.slide_id, tiles.label) for tiles in slides if tiles.label}
    rows = [(*of[tiles.slide_id][:1], names[tiles.slide_id], of[tiles.slide_id][1]) for tiles in slides if tiles.slide_id in of]
    if rows:
        clam.write_dataset_csv(out / clam.DATASET, rows)
        if without := len(slides) - len(rows):
            result.notes.append(f"{without} slides have no label and are not in {clam.DATASET}")
        if missing := sorted(of.keys() - {tiles.slide_id for tiles in slides}):
            result.notes.append(f"{len(missing)} labelled slides were not converted and are not in {clam.DATASET} (first: {missing[0]!r})")


def _to_geojson(tiles: SlideTiles, name: str, out: Path, result: Converted, layers: Sequence[str]) -> None:
    """`<name>.geojson`: tissue as annotations, regions and tiles as tile objects with their numbers as measurements."""
    features: list[dict[str, Any]] = []
    screened = tiles.folder is not None and any((tiles.folder / file).is_file() for file in ("regions.csv", "tissue.npz"))
    if screened and {"tissue", "regions"} & set(layers):
        screening = load_screening(tiles.folder)
        if "tissue" in layers:
            features += tissue_features(screening.tissue, tiles.dimensions)
        if "regions" in layers:
            features += region_features(screening.regions, _selected(tiles.folder), tiles.dimensions)
    elif not screened and "tiles" not in layers:
        raise DatasetError("no screening of it is kept, so there is nothing to draw but tiles; convert the folder of `wavepath prepare`")
    if "tiles" in layers:
        features += tile_features(tiles.coords, _geometry(tiles).footprint, _numbers(tiles), tiles.dimensions)
    geojson.write_features(out / f"{name}.geojson", features)
    result.note_folder(out)


def _selected(folder: Path) -> dict[int, int]:
    """Tiles of each selected region, by its index; empty where that is not kept."""
    try:
        with open(folder / "selection.csv", newline="", encoding="utf-8") as file:
            return {int(row["index"]): int(row["tiles"]) for row in csv.DictReader(file) if row["selected"] == "1"}
    except FileNotFoundError:
        return {}
    except (KeyError, ValueError) as error:
        raise DatasetError(f"{folder / 'selection.csv'} is damaged ({error}); run `wavepath prepare` again") from None


def tissue_features(tissue: TissueMap, dimensions: tuple[int, int] | None = None) -> list[dict[str, Any]]:
    """Each piece of tissue as a locked annotation with its holes, in level-0 pixels, largest first; cut to the slide where its size is known."""
    import shapely

    # Outlines are at least 0.7 cells apart, so that each may be simplified by itself without touching another one.
    lines = shapely.simplify([shapely.LinearRing(line) for line in contours(tissue.tissue, tissue.cell)], 0.25 * tissue.cell, preserve_topology=False)
    rings = [line for line in lines if len(line.coords) > 3]
    # Even-odd: a ring inside of another one is a hole, one inside of that is tissue again.
    whole = shapely.build_area(shapely.GeometryCollection(rings)) if rings else shapely.Polygon()
    if dimensions is not None:
        whole = whole.intersection(shapely.box(0, 0, *dimensions))
    parts = [part for part in getattr(whole, "geoms", [whole]) if part.geom_type == "Polygon" and not part.is_empty]
    parts.sort(key=lambda part: -part.area)
    return [
        geojson.polygon_feature(part, f"tissue {number}", *_TISSUE, "annotation", locked=True) for number, part in enumerate(parts, start=1)
    ]


def _square(x: float, y: float, side: float, dimensions: tuple[int, int] | None) -> list[tuple[float, float]]:
    right, bottom = x + side, y + side
    if dimensions is not None:
        right, bottom = min(right, max(x + 1, dimensions[0])), min(bottom, max(y + 1, dimensions[1]))
    return [(x, y), (right, y), (right, bottom), (x, bottom)]


def region_features(regions: Any, selected: dict[int, int], dimensions: tuple[int, int] | None = None) -> list[dict[str, Any]]:
    """The screened regions with any tissue as tile objects: wavelet energy, shares of tissue, pen and blur, whether selected, tiles taken.

    Args:
        regions: a `RegionTable`. selected: tiles of each selected region, by its index.
    """
    found = []
    for place in np.flatnonzero(np.asarray(regions.tissue) > 0).tolist():
        index = int(regions.index[place])
        name, colour = _SELECTED if index in selected else _REGION if regions.eligible[place] else _LEFT_OUT
        numbers = {"wavelet energy": regions.energy[place]}
        numbers |= {f"{layer} share": getattr(regions, layer)[place] for layer in ("tissue", "pen", "blur")}
        numbers |= {"selected": float(index in selected), "tiles": float(selected.get(index, 0))}
        reason = str(regions.reason[place])
        outline = _square(float(regions.x[place]), float(regions.y[place]), float(regions.size[place]), dimensions)
        found.append(geojson.polygon_feature(outline, f"region {index}" + (f" ({reason})" if reason else ""), name, colour, "tile", numbers))
    return found


def tile_features(
    coords: np.ndarray, footprint: float, columns: dict[str, np.ndarray], dimensions: tuple[int, int] | None = None
) -> list[dict[str, Any]]:
    """Tiles as tile objects with their numbers as measurements.

    Args:
        coords: [n, 2] level-0 (x, y). footprint: side in level-0 pixels. columns: numbers of each tile [n], by name.
    """
    named = {_SCREENING_COLUMNS.get(name, name): np.asarray(values).tolist() for name, values in columns.items()}
    return [
        geojson.polygon_feature(
            _square(x, y, footprint, dimensions), "", *_TILE, "tile", {name: values[place] for name, values in named.items()} | {"tile": place}
        )
        for place, (x, y) in enumerate(coords.tolist())
    ]
