"""Frozen features joined with labels: a table per slide or per tile, annotated regions, or the tiles' own names (`data.labelled` reads them)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wavepath.data.labelled import SlideTiles, find_labels
from wavepath.errors import DatasetError
from wavepath.interop.features import Features


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
        labels: a CSV file or a folder of GeoJSON files; None with `label_pattern`.
        column: `features` or the name of another per-tile column, such as `features_mean`.
        label_pattern, case_pattern: see `find_labels`.

    Raises:
        DatasetError: no tile has a label, or the table lacks its columns.
    """
    kind, found = find_labels([_tiles_of(slide) for slide in slides], labels, label_pattern, case_pattern)
    rows = [(slide, *these) for slide, these in zip(slides, found, strict=True)]
    return _join(rows, column, kind, str(labels) if labels is not None else f"the pattern {label_pattern!r}")


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
