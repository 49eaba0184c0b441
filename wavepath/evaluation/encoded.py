"""Labelled tiles as several encoders see them: the same tiles in the same order, or an error."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from wavepath.console import progress
from wavepath.errors import ConfigError, DatasetError
from wavepath.evaluation.labels import Labelled, label_tiles
from wavepath.interop.features import Features, list_features, read_features

POOLS = {"cls": "features", "mean": "features_mean"}
_NAME = re.compile(r"([\w.+-]+( [\w.+-]+)*)=(.+)", re.DOTALL)


def named_folders(given: Iterable[str], flag: str = "--features") -> dict[str, Path]:
    """`NAME=FOLDER` pairs by name; one folder alone needs none, several without are called by their last parts.

    Args:
        given: what stood behind `flag`.

    Raises:
        ConfigError: a name twice, a name or folder that is empty, a folder twice, or two names that are one as names of files.
    """
    found: dict[str, Path] = {}
    for text in map(str, given):
        match = None if Path(text).exists() else _NAME.fullmatch(text)
        if not match and (text.startswith("=") or text.endswith("=")):
            raise ConfigError(f"{flag} {text}: give a folder, or a name and a folder as in ours={text.strip('=') or 'FEATURES'}")
        name, folder = (match.group(1), Path(match.group(3))) if match else (Path(text).resolve().name, Path(text))
        if name in found:
            raise ConfigError(f"two encoders are called {name!r} ({found[name]} and {folder}); name them, as in {flag} ours={found[name]}")
        if alike := [other for other in found if file_name(other) == file_name(name)]:
            raise ConfigError(f"the encoders {alike[0]!r} and {name!r} would write to the same files; choose names that differ in a letter")
        if same := [other for other, known in found.items() if known.resolve() == folder.resolve()]:
            raise ConfigError(f"{flag} names {folder} twice, as {same[0]!r} and {name!r}; leave one out")
        found[name] = folder
    return found


def file_name(title: str) -> str:
    """A row's or an encoder's name as part of a file's."""
    return re.sub("[^0-9A-Za-z.+-]+", "_", title)


def read_encoder(
    folder: Path, labels: Path | None, pool: str = "cls", *, label_pattern: str = "", case_pattern: str = "", skip_missing: bool = False
) -> Labelled:
    """The labelled tiles of a folder of features.

    Raises:
        DatasetError: features that differ in width or in the checkpoint they come from, or as `label_tiles`.
    """
    if pool not in POOLS:
        raise DatasetError(f"--pool {pool} is not one of {', '.join(POOLS)}")
    slides: list[Features] = []
    files = list_features(folder)
    with progress(f"features of {Path(folder).name}", len(files), "slides") as bar:
        for name, path in files:
            slides.append(read_features(path, name))
            bar.advance()
    widths: dict[int, str] = {}
    for slide in slides:
        if len(slide):
            widths.setdefault(slide.features.shape[1], slide.slide_id)
    if len(widths) > 1:
        listed = ", ".join(f"{name} {width}" for width, name in sorted(widths.items()))
        raise DatasetError(f"features under {folder} have the widths {sorted(widths)} ({listed}); embed all slides with one checkpoint")
    trained = {str(slide.attributes["parameters"]) for slide in slides if "parameters" in slide.attributes}
    if len(trained) > 1:
        raise DatasetError(f"features under {folder} come from {len(trained)} checkpoints; embed all slides with one, into a folder of their own")
    return label_tiles(slides, labels, POOLS[pool], label_pattern=label_pattern, case_pattern=case_pattern, skip_missing=skip_missing)


def aligned(encoders: Mapping[str, Labelled]) -> dict[str, Labelled]:
    """The encoders' tiles in the order of the first.

    Raises:
        DatasetError: other tiles, labels or cases.
    """
    (first, reference), *rest = encoders.items()
    keys = _keys(reference)
    places = {key: row for row, key in enumerate(keys)}
    result = {first: reference}
    for name, data in rest:
        theirs = _keys(data)
        if theirs != keys:
            lacking, more = sorted(set(keys) - set(theirs)), sorted(set(theirs) - set(keys))
            if lacking or more or len(theirs) != len(keys) or len(places) != len(keys):
                example = f"such as {' '.join((lacking or more)[0])}" if lacking or more else f"{len(keys)} and {len(theirs)}"
                raise DatasetError(
                    f"encoders {first!r} and {name!r} have other tiles ({len(lacking)} only in the first, {len(more)} only in the other, {example});"
                    " embed the same tiles with each"
                )
            data = data.rows(np.argsort([places[key] for key in theirs]))
        if not (np.array_equal(data.labels, reference.labels) and np.array_equal(data.groups, reference.groups)):
            raise DatasetError(f"the labels or cases of {name!r} are not those of {first!r}, though the tiles are; embed both under the same ids")
        result[name] = data
    return result


def _keys(data: Labelled) -> list[tuple[str, str]]:
    return list(zip(data.slides.tolist(), data.tiles.tolist(), strict=True))
