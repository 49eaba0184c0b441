"""Labels of tiles, and labelled sources cut into folds by patient.

Labels come in four forms, recognised by what is given:
* `labels.csv` with `case_id,slide_id,label` (CLAM's): every tile has its slide's label, and splits are by case.
* `labels.csv` with a column `tile_id`: one label for each tile.
* a folder of GeoJSON files named by slide id: a tile has the class of the region that covers its centre.
* no file, but a pattern: the label (and the case) is the first group of a regular expression searched in the tile's name: of an image its
  path in the folder without suffix, else `<slide>_<x>_<y>`.

The case of a table's row, which is never on both sides of a split, is its `case_id`; where that is missing, what the case pattern finds in the
slide's id (the tile's name); without a pattern the slide.
"""

import csv
import functools
import json
import re
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from wavepath import console
from wavepath.data.sources import Source, Span, View, open_source
from wavepath.errors import ConfigError, DatasetError
from wavepath.interop.geojson import read_regions

_ARTEFACTS = ("pen", "fold", "blur")
_FORMS = "config.data.labels (a labels.csv or a folder of GeoJSON regions) or config.data.label_pattern, such as '^([^/]+)/'"


@dataclass(frozen=True)
class SlideTiles:
    """The tiles of one slide (or image folder), as far as labels need them.

    Attributes:
        slide: its id.
        count: number of tiles.
        names: gives the tiles' names, or None where they have none; asked for only by the forms that need them.
        centres: gives the tiles' centres f64 [n, 2] in level-0 pixels.
    """

    slide: str
    count: int
    names: Callable[[], Sequence[str] | None]
    centres: Callable[[], np.ndarray]


Found = tuple[list[str], list[str]]  # label and case of each tile of a slide; "" where it has no label


def find_labels(slides: Sequence[SlideTiles], labels: Path | None, label_pattern: str = "", case_pattern: str = "") -> tuple[str, list[Found]]:
    """Label and case of every tile, by slide.

    Args:
        slides: the tiles.
        labels: a CSV file or a folder of GeoJSON files (see above); None with `label_pattern`.
        label_pattern: regular expression with one group, searched in the tile's name.
        case_pattern: likewise for the case (with labels of slides or regions: searched in the slide's id; a `case_id` of a table goes before it);
            empty: each tile is a case of its own (its slide).

    Returns:
        The form (`names`, `slides`, `tiles`, `regions`), and for each slide the labels and the cases of its tiles.

    Raises:
        DatasetError: a table without its columns, or with rows that contradict one another; a pattern that is none, or that finds no case for a
            labelled tile.
    """
    if labels is None:
        return "names", [_by_name(slide, label_pattern, case_pattern) for slide in slides]
    labels = Path(labels)
    if not labels.exists():
        raise DatasetError(f"{labels} does not exist; give a labels.csv or a folder of GeoJSON regions")
    if labels.is_dir():
        return "regions", [_by_region(slide, labels, case_pattern) for slide in slides]
    table = read_table(labels)
    if "tile_id" in table[0]:
        by_tile = _indexed(table, "tile_id", labels)
        return "tiles", [_by_tile(slide, by_tile, case_pattern) for slide in slides]
    by_slide = _indexed(table, "slide_id", labels)
    return "slides", [_by_slide(slide, by_slide.get(slide.slide, {}), case_pattern) for slide in slides]


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


def _indexed(table: list[dict[str, str]], key: str, path: Path) -> dict[str, dict[str, str]]:
    """The rows by id. An id may be there again, with the same label and case."""
    rows: dict[str, dict[str, str]] = {}
    for row in table:
        before = rows.setdefault(row[key], row)
        for name in ("label", "case_id"):
            if row[key] and before.get(name) != row.get(name):
                raise DatasetError(f"{path} has {key} {row[key]!r} with {name} {before[name]!r} and {row[name]!r}; leave one of the rows")
    return rows


def _by_slide(slide: SlideTiles, row: dict[str, str], case_pattern: str) -> Found:
    label = row.get("label", "")
    case = row.get("case_id") or (_case(case_pattern, slide.slide) if case_pattern and label else slide.slide)
    return [label] * slide.count, [case] * slide.count


def _by_tile(slide: SlideTiles, table: dict[str, dict[str, str]], case_pattern: str) -> Found:
    names = slide.names()
    if names is None:
        raise DatasetError(
            f"{slide.slide} has no tile names, so labels by tile_id cannot be joined; embed a folder of images, or label by slide"
        )
    labels, cases = [], []
    for name in map(str, names):
        row = table.get(name, {})
        labels.append(row.get("label", ""))
        case = row.get("case_id") or (_case(case_pattern, name) if case_pattern and labels[-1] else row.get("slide_id") or slide.slide)
        cases.append(case)
    return labels, cases


def _by_name(slide: SlideTiles, label_pattern: str, case_pattern: str) -> Found:
    names = slide.names()
    if names is None:
        raise DatasetError(f"{slide.slide} has no tile names, so labels cannot come from them; embed a folder of images, or give a table of labels")
    labels = [_search(label_pattern, str(name)) or "" for name in names]
    return labels, [_case(case_pattern, str(name)) if label else "" for label, name in zip(labels, names, strict=True)]


def _by_region(slide: SlideTiles, folder: Path, case_pattern: str) -> Found:
    import shapely

    cases = [_case(case_pattern, slide.slide)] * slide.count
    path = folder / f"{slide.slide}.geojson"
    if not path.exists():
        return [""] * slide.count, cases
    centres = shapely.points(slide.centres())
    labels = np.full(slide.count, "", object)
    regions = read_regions(path)
    # Artefacts lie over tissue: a tile under one has no tissue class, whatever the order of the file.
    for artefact in (False, True):
        for name, polygon in regions:
            if (name.lower() in _ARTEFACTS) == artefact:
                labels[shapely.contains(polygon, centres)] = "" if artefact else name
    return list(labels), cases


def _search(pattern: str, text: str) -> str | None:
    try:
        match = re.search(pattern, text)
        return match and match.group(1)
    except (re.error, IndexError) as error:
        raise DatasetError(f"label and case patterns are regular expressions with one group, as in '^([^/]+)/', not {pattern!r} ({error})") from None


def _case(pattern: str, name: str) -> str:
    if not pattern:
        return name
    found = _search(pattern, name)
    if not found:
        # A tile that becomes a case of its own in silence could be on both sides of a split.
        raise DatasetError(f"the case pattern {pattern!r} finds nothing in {name!r}; give one that names the case of every labelled tile")
    return found


# Sources ------------------------------------------------------------------------------------------------------------------------------------


class LabelledSource(View):
    """Some examples of another source, each with a label; ids count from 0 without gaps, in the order of the source.

    Attributes:
        classes: names, sorted; a label is a place in it.
        labels: int32[n].
        cases: str[n], the patient (or slide) of each example.
        held_out: the other part of the split, of the training part of one.
        whole: the checksum of everything that was split.
    """

    held_out: "LabelledSource | None" = None
    whole: str = ""

    def __init__(self, source: Source, ids: np.ndarray, labels: np.ndarray, cases: np.ndarray, classes: tuple[str, ...]):
        super().__init__(source)
        self._ids = np.asarray(ids, np.int64)
        self.labels, self.cases, self.classes = np.asarray(labels, np.int32), np.asarray(cases, str), tuple(classes)
        stops = np.searchsorted(self._ids, [span.stop for span in source.spans]).tolist()
        starts = [0, *stops[:-1]]
        self.spans = [
            Span(span.slide, start, stop, span.mpp, span.slide_mpp)
            for span, start, stop in zip(source.spans, starts, stops, strict=True) if stop > start
        ]
        sizes = np.diff(np.concatenate([[0], np.searchsorted(self._ids, np.cumsum(source.blocks))]))
        self.blocks = sizes[sizes > 0]

    def part(self, keep: np.ndarray) -> "LabelledSource":
        """The examples where `keep` bool[n] is true."""
        return LabelledSource(self._source, self._ids[keep], self.labels[keep], self.cases[keep], self.classes)

    def counts(self) -> dict[str, int]:
        """Examples of each class."""
        return {name: int(count) for name, count in zip(self.classes, np.bincount(self.labels, minlength=len(self.classes)), strict=True)}

    def digest(self) -> str:
        """A checksum of classes, labels and cases: the same data under other labels is other data."""
        facts = [list(self.classes), self.labels.tolist(), self.cases.tolist()]
        return f"{zlib.crc32(json.dumps(facts).encode('utf-8')):08x}"

    def base_ids(self, example_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        return self._ids[self._checked(example_ids)]

    def meta(self, example_id: int) -> dict[str, Any]:
        index = int(example_id)
        return {**super().meta(index), "label": self.classes[self.labels[index]], "case": str(self.cases[index])}

    def tile_name(self, example_id: int) -> str:
        """What the tile is called in tables."""
        return _tile_name(self.meta(example_id))

    def close(self) -> None:
        self._source.close()


def _tile_name(meta: dict[str, Any]) -> str:
    return str(meta.get("name") or f"{meta['slide']}_{meta['x']}_{meta['y']}")


def _tiles_of(source: Source, span: Span) -> SlideTiles:
    ids = range(span.start, span.stop)

    def names() -> list[str]:
        return [_tile_name(source.meta(index)) for index in ids]

    def centres() -> np.ndarray:
        if not (span.mpp and span.slide_mpp):
            raise DatasetError(f"the tiles of {span.slide} have no place on a slide, so regions cannot label them; give a table or a label pattern")
        half = source.image_shape[0] * span.mpp / span.slide_mpp / 2
        metas = [source.meta(index) for index in ids]
        return np.array([(meta["x"] + half, meta["y"] + half) for meta in metas], float).reshape(-1, 2)

    return SlideTiles(span.slide, span.stop - span.start, names, centres)


def open_labelled(config: ConfigDict) -> LabelledSource:
    """Opens the source that `config.data` names and keeps the examples that have a label. Classes are the labels found, sorted.

    Raises:
        ConfigError: no labels named.
        DatasetError: as `open_source`; no tile with a label, or one class only.
    """
    data = config.data
    if not data.labels and not data.label_pattern:
        raise ConfigError(f"task {config.task!r} needs labels; give {_FORMS}")
    if data.labels and data.label_pattern:
        raise ConfigError("give one of config.data.labels and config.data.label_pattern, not both")
    source = open_source(config)
    origin = data.labels or f"the pattern {data.label_pattern!r}"
    slides = [_tiles_of(source, span) for span in source.spans]
    kind, found = find_labels(slides, Path(data.labels) if data.labels else None, data.label_pattern, data.case_pattern)
    names = np.array([label for labels, _ in found for label in labels], object)
    cases = np.array([case for _, these in found for case in these], object)
    known = names != ""
    if not known.any():
        example = _tile_name(source.meta(0)) if kind in ("names", "tiles") else source.slides[0]
        raise DatasetError(f"no tile of {source.name} has a label in {origin}; what it must match or name looks like {example!r}")
    classes, truth = np.unique(names[known].astype(str), return_inverse=True)
    if len(classes) < 2:
        raise DatasetError(f"all {known.sum()} labelled tiles of {source.name} are {str(classes[0])!r}; give labels of two classes ({_FORMS})")
    if kind == "names" and not data.case_pattern:
        console.warn("no config.data.case_pattern: each tile is its own case, so tiles of one patient may be trained and tested on")
    labelled = LabelledSource(source, np.flatnonzero(known), truth, cases[known].astype(str), tuple(str(name) for name in classes))
    listed = ", ".join(f"{name} {count}" for name, count in labelled.counts().items())
    missing = f"; {(~known).sum()} tiles without a label are left out" if not known.all() else ""
    console.say(f"labels: {len(labelled)} tiles of {len(np.unique(labelled.cases))} cases in {len(classes)} classes ({listed}){missing}")
    return labelled


# Folds --------------------------------------------------------------------------------------------------------------------------------------


def assign_folds(truth: np.ndarray, cases: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """The fold of every example, int64[n]: a case is in one fold alone, classes are spread evenly where each has a case for every fold; said
    where they are not.

    Args:
        truth: int [n], class numbers.
        cases: str [n].
        folds: at most the number of cases.
        seed: of the shuffle; the result depends on the arguments alone.
    """
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, StratifiedKFold

    classes, truth = np.unique(truth, return_inverse=True)
    names, member = np.unique(cases, return_inverse=True)
    if len(names) == len(cases) and np.bincount(truth).min() >= folds:
        splitters = [StratifiedKFold(folds, shuffle=True, random_state=seed)]
    else:
        with_class = [len(np.unique(member[truth == index])) for index in range(len(classes))]
        # The stratified splitter may leave a fold empty where one case is most of the data.
        splitters = [StratifiedGroupKFold(folds, shuffle=True, random_state=seed)] * (min(with_class) >= folds)
        splitters.append(GroupKFold(folds, shuffle=True, random_state=seed))
    for splitter in splitters:
        fold = np.full(len(truth), -1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # classes with fewer members than folds
            for index, (_, test) in enumerate(splitter.split(truth, truth, cases)):
                fold[test] = index
        if len(np.unique(fold)) == folds:
            break
    if isinstance(splitter, GroupKFold):
        _say_unstratified(folds, len(names), min(with_class))
    return fold


@functools.cache  # the folds of one split are asked for again and again
def _say_unstratified(folds: int, cases: int, fewest: int) -> None:
    why = f"a class comes from {fewest} of {cases} cases alone" if fewest < folds else f"some of the {cases} cases hold too many tiles"
    console.warn(f"{folds} folds by case are not stratified ({why}): shares of the classes differ from fold to fold")


def split(source: LabelledSource, folds: int, fold: int, seed: int) -> LabelledSource:
    """The training part of one fold of a cross-validation; its `held_out` is the fold itself. No case is in both.

    Raises:
        ConfigError: more folds than cases, or a fold that there is not.
        DatasetError: a training part of one class.
    """
    cases = len(np.unique(source.cases))
    if folds < 2:
        raise ConfigError(f"config.data.folds={folds} must be at least 2: one fold is held out of training")
    if not 0 <= fold < folds:
        raise ConfigError(f"config.data.fold={fold} does not exist; folds are numbered 0 to {folds - 1} (config.data.folds={folds})")
    if cases < folds:
        few = f"set config.data.folds={cases}" if cases > 1 else "label tiles of a second case, or check config.data.case_pattern"
        raise ConfigError(f"config.data.folds={folds}, but the labelled tiles come from {cases} case{'s' * (cases > 1)}, and a fold needs one; {few}")
    held = assign_folds(source.labels, source.cases, folds, seed) == fold
    train = source.part(~held)
    train.held_out, train.whole = source.part(held), source.digest()
    lacking = [name for name, count in train.counts().items() if not count]
    if len(source.classes) - len(lacking) < 2:
        raise DatasetError(
            f"fold {fold} of {folds} leaves one class to train on ({', '.join(lacking)} only in held-out cases); set another config.data.fold_seed, "
            "or label more cases of each class"
        )
    if lacking:
        console.warn(f"fold {fold} of {folds}: no training tile of {', '.join(lacking)}, whose cases are all held out; that class cannot be learnt")
    left = ", ".join(f"{name} {count}" for name, count in train.held_out.counts().items())
    console.say(
        f"fold {fold} of {folds}: {len(train)} tiles of {len(np.unique(train.cases))} cases to train on, {len(train.held_out)} of "
        f"{len(np.unique(train.held_out.cases))} held out ({left})"
    )
    return train
