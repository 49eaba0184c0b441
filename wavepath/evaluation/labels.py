"""Labels of tiles: from a table per slide, a table per tile, annotated regions, or the tiles' own names.

Four forms, recognised by what is given:
* `labels.csv` with `case_id,slide_id,label` (CLAM's): every tile has its slide's label, and splits are by case.
* `labels.csv` with a column `tile_id`: one label for each tile, `case_id` (or `slide_id`) names the group that is never split.
* a folder of GeoJSON files named by slide id: a tile has the class of the region that covers its centre.
* no file, but a pattern: the label (and the case) is the first group of a regular expression searched in the tile's name.
"""

import csv
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import shapely

from wavepath.errors import DatasetError
from wavepath.interop.features import Features
from wavepath.interop.geojson import read_regions


@dataclass(frozen=True)
class Labelled:
    """Tiles with labels: features f32 [n, d], labels str [n], groups str [n] (case or slide), and how many tiles had no label."""

    features: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    unlabelled: int
    kind: str


def label_tiles(
    slides: list[Features], labels: Path | None, column: str = "features", *, label_pattern: str = "", case_pattern: str = ""
) -> Labelled:
    """Joins features with labels.

    Args:
        slides: the features of each slide.
        labels: a CSV file or a folder of GeoJSON files (see above); None with `label_pattern`.
        column: `features` or the name of another per-tile column, such as `features_mean`.
        label_pattern: regular expression with one group, searched in the tile's name (its path without suffix).
        case_pattern: likewise for the case; empty: each tile is a case of its own.

    Raises:
        DatasetError: no tile has a label, or the table lacks its columns.
    """
    if labels is None:
        return _join([(slide, *_by_name(slide, label_pattern, case_pattern)) for slide in slides], column, "names", f"the pattern {label_pattern!r}")
    labels = Path(labels)
    if not labels.exists():
        raise DatasetError(f"{labels} does not exist; give a labels.csv or a folder of GeoJSON regions")
    if labels.is_dir():
        kind, rows = "regions", [(slide, *_by_region(slide, labels)) for slide in slides]
    else:
        table = read_table(labels)
        kind = "tiles" if "tile_id" in table[0] else "slides"
        find = _by_tile if kind == "tiles" else _by_slide
        rows = [(slide, *found) for slide, found in zip(slides, find(slides, table), strict=True)]
    return _join(rows, column, kind, str(labels))


def _join(rows: list[tuple[Features, list[str], list[str]]], column: str, kind: str, origin: str) -> Labelled:
    features, names, groups, missing = [], [], [], 0
    for slide, slide_labels, slide_groups in rows:
        values = slide.features if column == "features" else slide.extra.get(column)
        if values is None:
            raise DatasetError(f"{slide.slide_id} has no column {column}; choose from features, {', '.join(slide.extra)}")
        known = np.array([label != "" for label in slide_labels], bool)
        missing += int((~known).sum())
        features.append(values[known])
        names.extend(np.asarray(slide_labels, object)[known])
        groups.extend(np.asarray(slide_groups, object)[known])
    if not names:
        raise DatasetError(f"no tile has a label in {origin}; its ids must be those of the feature files, such as {rows[0][0].slide_id}")
    return Labelled(np.concatenate(features), np.array(names, str), np.array(groups, str), missing, kind)


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a labels table; needs `label` and one of `slide_id`, `tile_id`."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [{key.strip(): (value or "").strip() for key, value in row.items() if key} for row in csv.DictReader(file)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path} is not a CSV table ({error})") from None
    if not rows or "label" not in rows[0] or not {"slide_id", "tile_id"} & set(rows[0]):
        raise DatasetError(f"{path} needs the columns case_id,slide_id,label (or tile_id,label with case_id or slide_id)")
    return rows


def _by_slide(slides: list[Features], table: list[dict[str, str]]) -> list[tuple[list[str], list[str]]]:
    by_id = {row["slide_id"]: row for row in table}
    found = []
    for slide in slides:
        row = by_id.get(slide.slide_id, {})
        found.append(([row.get("label", "")] * len(slide), [row.get("case_id") or slide.slide_id] * len(slide)))
    return found


def _by_tile(slides: list[Features], table: list[dict[str, str]]) -> list[tuple[list[str], list[str]]]:
    by_id = {row["tile_id"]: row for row in table}
    found = []
    for slide in slides:
        names = slide.extra.get("names")
        if names is None:
            raise DatasetError(
                f"{slide.slide_id} has no tile names, so labels by tile_id cannot be joined; embed a folder of images, or label by slide"
            )
        rows = [by_id.get(str(name), {}) for name in names]
        found.append(([row.get("label", "") for row in rows], [row.get("case_id") or row.get("slide_id") or slide.slide_id for row in rows]))
    return found


def _by_name(slide: Features, label_pattern: str, case_pattern: str) -> tuple[list[str], list[str]]:
    names = slide.extra.get("names")
    if names is None:
        raise DatasetError(f"{slide.slide_id} has no tile names, so labels cannot come from them; embed a folder of images, or give --labels")
    try:
        found = [re.search(label_pattern, str(name)) for name in names]
        cases = [re.search(case_pattern, str(name)) for name in names] if case_pattern else [None] * len(names)
        labels = [match.group(1) if match else "" for match in found]
        groups = [match.group(1) if match else str(name) for match, name in zip(cases, names, strict=True)]
    except (re.error, IndexError) as error:
        raise DatasetError(f"--label-pattern and --case-pattern are regular expressions with one group, such as '^([^/]+)/' ({error})") from None
    return labels, groups


def _by_region(slide: Features, folder: Path) -> tuple[list[str], list[str]]:
    path = folder / f"{slide.slide_id}.geojson"
    groups = [slide.slide_id] * len(slide)
    if not path.exists():
        return [""] * len(slide), groups
    regions = read_regions(path)
    if "patch_size_level0" not in slide.attributes:
        raise DatasetError(
            f"the features of {slide.slide_id} do not say how large a tile is at level 0 (attribute patch_size_level0), so regions cannot label them;"
            " embed with `wavepath embed`, or give a labels.csv"
        )
    size = float(slide.attributes["patch_size_level0"])
    centres = shapely.points(slide.coords + size / 2)
    labels = np.full(len(slide), "", object)
    # Artefacts lie over tissue: a tile under one has no tissue class, whatever the order of the file.
    for artefact in (False, True):
        for name, polygon in regions:
            if (name.lower() in ("pen", "fold", "blur")) == artefact:
                labels[shapely.contains(polygon, centres)] = "" if artefact else name
    return list(labels), groups
