"""Frozen features joined with labels: a table per slide or per tile, annotated regions, or the tiles' own names (`data.labelled` reads them)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wavepath.console import warn
from wavepath.data.labelled import SlideTiles, find_labels, read_table
from wavepath.errors import DatasetError
from wavepath.interop.features import Features


@dataclass(frozen=True)
class Labelled:
    """Tiles with labels: features f32 [n, d], labels str [n], groups str [n] (case or slide), slides str [n], names of the tiles str [n]; how many
    tiles had no label, and the form that the labels came in."""

    features: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    slides: np.ndarray
    tiles: np.ndarray
    unlabelled: int
    kind: str

    def rows(self, keep: np.ndarray) -> "Labelled":
        """Those at `keep` (places, or a mask)."""
        columns = (self.features, self.labels, self.groups, self.slides, self.tiles)
        return Labelled(*(column[keep] for column in columns), self.unlabelled, self.kind)


def label_tiles(
    slides: list[Features], labels: Path | None, column: str = "features", *, label_pattern: str = "", case_pattern: str = "",
    skip_missing: bool = False,
) -> Labelled:
    """Joins features with labels.

    Args:
        slides: the features of each slide.
        labels: a CSV file or a folder of GeoJSON files; None with `label_pattern`.
        column: `features` or the name of another per-tile column, such as `features_mean`.
        label_pattern, case_pattern: see `find_labels`.
        skip_missing: leave out, with a warning, what a table names and has no features.

    Raises:
        DatasetError: no tile has a label, the table lacks its columns or names what is not there, or features are not finite.
    """
    whole = [slide for slide in slides if len(slide)]
    if not whole:
        raise DatasetError(f"none of the {len(slides)} feature files holds a tile; see embed.json and the manifest of the tiles for why")
    kind, found = find_labels([_tiles_of(slide) for slide in whole], labels, label_pattern, case_pattern)
    rows = [(slide, *these) for slide, these in zip(whole, found, strict=True)]
    origin = str(labels) if labels is not None else f"the pattern {label_pattern!r}"
    joined = _join(rows, column, kind, origin)
    if kind in ("slides", "tiles") and labels is not None:
        _check_known(slides, joined, kind, labels, skip_missing)
    return joined


def _check_known(slides: list[Features], joined: Labelled, kind: str, labels: Path, skip: bool) -> None:
    """A table that names what has no features: misspelt, or not embedded. Either way the test would be another one than the table says."""
    key = "slide_id" if kind == "slides" else "tile_id"
    known = {slide.slide_id for slide in slides} if kind == "slides" else set(joined.tiles.tolist())
    missing = sorted({row[key] for row in read_table(labels) if row["label"]} - known)
    if not missing:
        return
    problem = f"{labels} names {len(missing)} {kind} that have no features (such as {missing[0]!r})"
    if not skip:
        raise DatasetError(f"{problem}; embed them, correct the table, or leave them out with --skip-missing")
    warn(f"{problem}: they are left out")


def tile_names(slide: Features) -> np.ndarray:
    """The tiles' own names, or `<slide>_<x>_<y>` where a file has none; str [n]."""
    if "names" in slide.extra:
        return np.asarray(slide.extra["names"], str)
    return np.array([f"{slide.slide_id}_{x}_{y}" for x, y in slide.coords.tolist()], str)


def _tiles_of(slide: Features) -> SlideTiles:
    def names() -> Sequence[str] | None:
        return slide.extra.get("names")

    def centres() -> np.ndarray:
        if "patch_size_level0" not in slide.attributes:
            raise DatasetError(
                f"the features of {slide.slide_id} do not say how large a tile is at level 0 (attribute patch_size_level0), so regions cannot label"
                " them; embed with `wavepath embed`, or give a labels.csv"
            )
        return slide.coords + float(slide.attributes["patch_size_level0"]) / 2

    return SlideTiles(slide.slide_id, len(slide), names, centres)


def _join(rows: list[tuple[Features, list[str], list[str]]], column: str, kind: str, origin: str) -> Labelled:
    features, names, groups, ids, tiles, missing = [], [], [], [], [], 0
    for slide, slide_labels, slide_groups in rows:
        values = slide.features if column == "features" else slide.extra.get(column)
        if values is None:
            raise DatasetError(f"{slide.slide_id} has no column {column}; choose from features, {', '.join(slide.extra)}")
        known = np.array([label != "" for label in slide_labels], bool)
        wrong = int((~np.isfinite(values[known]).all(1)).sum())
        if wrong:
            raise DatasetError(
                f"{wrong} of {known.sum()} tiles of {slide.slide_id} have features that are not finite (column {column}); embed the slide again, or"
                " look for a run that diverged"
            )
        missing += int((~known).sum())
        features.append(values[known])
        names.extend(np.asarray(slide_labels, object)[known])
        groups.extend(np.asarray(slide_groups, object)[known])
        ids.extend([slide.slide_id] * int(known.sum()))
        tiles.append(tile_names(slide)[known])
    if not names:
        raise DatasetError(f"no tile has a label in {origin}; its ids must be those of the feature files, such as {rows[0][0].slide_id}")
    columns = (np.array(column, str) for column in (names, groups, ids))
    return Labelled(np.concatenate(features), *columns, np.concatenate(tiles), missing, kind)
