"""Slides divided into training, validation and test: folds by case, the official test set of CAMELYON16, or CLAM's tables of splits.

No case is ever on two sides. The validation part chooses when training stops; nothing is chosen by the test part.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from wavepath import console
from wavepath.data.bags import BagSource
from wavepath.data.labelled import assign_folds
from wavepath.data.mpp import read_rows
from wavepath.errors import ConfigError, DatasetError

CAMELYON = "camelyon16"
SIDES = ("train", "val", "test")
# The challenge's slides as distributed: 270 to train on (normal_086 became tumor_111) and 130 to test, of which test_049 was later withdrawn.
_OFFICIAL = {"normal": 159, "tumor": 111, "test": 130}
_CAMELYON = re.compile(r"(?:.*/)?(normal|tumor|test)_(\d{3})", re.IGNORECASE)


@dataclass(frozen=True)
class Split:
    """Places of bags, int64, ascending; `name` says how they were divided."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    name: str


def bag_split(source: BagSource, config: ConfigDict) -> Split:
    """The split that `config.data` asks for: `splits`, else fold `fold` of `folds`, and `mil.validation` of what is not tested.

    Args:
        source: all bags, with labels.
        config: `data.splits` (`camelyon16`, a table, a folder of `splits_<fold>.csv`), `data.folds` (0: one case at a time), `data.fold`,
            `data.fold_seed`, `mil.validation`.

    Raises:
        ConfigError: settings that do not fit the data.
        DatasetError: a table that does, or a part without one of the classes.
    """
    data, share = config.data, float(config.mil.validation)
    if not 0 <= share < 1:
        raise ConfigError(f"config.mil.validation={share} is a share of the cases, at least 0 and below 1")
    if data.splits.lower() == CAMELYON:
        return _finished(source, *_camelyon(source), share, data.fold_seed, "the official CAMELYON16 split", _CAMELYON_REMEDY)
    if data.splits:
        train, validation, test, name = _from_table(source, _table(Path(data.splits), int(data.fold)), config)
        _check_classes(source, train, "train", name, "put slides of every class there")
        if len(validation):
            _check_classes(source, validation, "validation", name, "put slides of every class there, or none")
        _say_test(source, test, name)
        return Split(train, validation, test, name)
    test, name = _fold(source, int(data.folds), int(data.fold), int(data.fold_seed))
    rest = np.setdiff1d(np.arange(len(source)), test)
    remedy = "set another config.data.fold_seed, fewer config.data.folds, or label more cases of it"
    return _finished(source, rest, test, share, (int(data.fold_seed), int(data.fold)), name, remedy)


_CAMELYON_REMEDY = "give slides of every class"


def parts(source: BagSource, split: Split) -> BagSource:
    """The training part of a split; `held_out` is its validation part and `test` its test part, either of which may be empty."""
    train = source.part(split.train)
    train.held_out, train.test, train.split = source.part(split.validation), source.part(split.test), split.name
    listed = [f"{len(part)} {name}" for name, part in (("to train on", train), ("to validate", train.held_out), ("to test", train.test))]
    console.say(f"{split.name}: {', '.join(listed)} slides")
    return train


def _finished(source: BagSource, rest: np.ndarray, test: np.ndarray, share: float, seed: Any, name: str, remedy: str) -> Split:
    """Takes the validation part out of what is not tested, and looks whether every part has every class."""
    _check_classes(source, rest, "train", name, remedy)
    validation = draw_cases(source.labels[rest], source.cases[rest], share, seed)
    train, held = rest[~validation], rest[validation]
    if share > 0:
        few = f"{remedy}, or set config.mil.validation=0"
        _check_classes(source, train, "train", name, few)
        _check_classes(source, held, "validation", name, few)
    _say_test(source, test, name)
    return Split(train, held, test, name)


def _check_classes(source: BagSource, places: np.ndarray, side: str, name: str, remedy: str) -> None:
    lacking = sorted(set(range(len(source.classes))) - set(source.labels[places].tolist()))
    if lacking:
        listed = ", ".join(source.classes[index] for index in lacking)
        raise DatasetError(f"{name}: no slide of class {listed} in the {side} part ({len(places)} slides); {remedy}")


def _say_test(source: BagSource, test: np.ndarray, name: str) -> None:
    lacking = sorted(set(range(len(source.classes))) - set(source.labels[test].tolist()))
    if len(test) and lacking and "left out" not in name:
        listed = ", ".join(source.classes[index] for index in lacking)
        console.warn(f"{name}: no slide of class {listed} in the test part; an AUC needs the folds together")


# Folds --------------------------------------------------------------------------------------------------------------------------------------


def _fold(source: BagSource, folds: int, fold: int, seed: int) -> tuple[np.ndarray, str]:
    names = np.unique(source.cases)
    count = folds or len(names)
    if folds == 1 or folds < 0:
        raise ConfigError(f"config.data.folds={folds} must be at least 2, or 0 to leave out one case at a time")
    if not 0 <= fold < count:
        raise ConfigError(f"config.data.fold={fold} does not exist; folds are numbered 0 to {count - 1} (config.data.folds={folds})")
    if len(names) < max(folds, 2):
        raise ConfigError(f"config.data.folds={folds}, but the slides come from {len(names)} cases, and a fold needs one; set fewer folds")
    if not folds:
        return np.flatnonzero(source.cases == names[fold]), f"case {names[fold]} left out ({fold + 1} of {count})"
    return np.flatnonzero(assign_folds(source.labels, source.cases, folds, seed) == fold), f"fold {fold} of {folds}"


def draw_cases(labels: np.ndarray, cases: np.ndarray, share: float, seed: Any) -> np.ndarray:
    """A share of the cases, of each class alike: bool [n], true for the examples of drawn cases.

    Of each class the share of its cases is drawn, rounded, at least one, and one at least stays. A case with slides of several classes counts for
    that of most of them, of the later one where they are as many.

    Args:
        labels: int [n]. cases: str [n].
        share: in [0, 1).
        seed: integer or integers; the draw depends on the arguments alone.
    """
    drawn = np.zeros(len(labels), bool)
    if share <= 0:
        return drawn
    names, member = np.unique(cases, return_inverse=True)
    counts = np.zeros((len(names), int(labels.max()) + 1), np.int64)
    np.add.at(counts, (member, labels), 1)
    kind = counts.shape[1] - 1 - counts[:, ::-1].argmax(axis=1)
    generator = np.random.default_rng(seed)
    for label in np.unique(kind):
        of_class = np.flatnonzero(kind == label)
        number = min(max(1, round(share * len(of_class))), len(of_class) - 1)
        drawn |= np.isin(member, generator.permutation(of_class)[:number])
    return drawn


# CAMELYON16 ---------------------------------------------------------------------------------------------------------------------------------


def _camelyon(source: BagSource) -> tuple[np.ndarray, np.ndarray]:
    found = [_CAMELYON.fullmatch(slide) for slide in source.slides]
    if odd := [slide for slide, match in zip(source.slides, found, strict=True) if not match]:
        raise DatasetError(
            f"config.data.splits={CAMELYON}: {len(odd)} of {len(source)} slides are not named as in CAMELYON16 (normal_001, tumor_001, test_001); the"
            f" first is {odd[0]!r}; rename them, or leave them out with config.data.exclude_slides"
        )
    kinds = np.array([match.group(1).lower() for match in found])
    counts = {kind: int((kinds == kind).sum()) for kind in _OFFICIAL}
    if empty := [kind for kind, count in counts.items() if not count]:
        raise DatasetError(f"config.data.splits={CAMELYON}: no slide {empty[0]}_* among the {len(source)}; embed and label those slides too")
    line = ", ".join(f"{kind}_* {count} of {_OFFICIAL[kind]}" for kind, count in counts.items())
    whole = counts["test"] >= _OFFICIAL["test"] - 1 and all(counts[kind] == _OFFICIAL[kind] for kind in ("normal", "tumor"))
    (console.say if whole else console.warn)(f"CAMELYON16: {line}" + ("" if whole else "; results on a part are not those of the whole"))
    train, test = np.flatnonzero(kinds != "test"), np.flatnonzero(kinds == "test")
    _check_cases(source, {"train": train, "test": test}, CAMELYON)
    return train, test


# Tables -------------------------------------------------------------------------------------------------------------------------------------


def _table(path: Path, fold: int) -> Path:
    if path.is_dir():
        table = path / f"splits_{fold}.csv"
        if not table.is_file():
            raise ConfigError(f"{path} has no splits_{fold}.csv; give another config.data.fold, or one table as config.data.splits")
        return table
    if not path.is_file():
        raise ConfigError(f"config.data.splits={str(path)!r} is no file; give {CAMELYON}, a splits_<fold>.csv, or a folder of them")
    return path


def _from_table(source: BagSource, path: Path, config: ConfigDict) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    rows = read_rows(path, "table of splits")
    if not {"train", "test"} <= set(rows[0]):
        raise DatasetError(f"{path}: the columns train,val,test are needed, found {','.join(rows[0])}")
    listed = {side: [row[side] for row in rows if row.get(side)] for side in SIDES}
    places = {slide: place for place, slide in enumerate(source.slides)}
    short: dict[str, list[int]] = {}
    for slide, place in places.items():
        short.setdefault(slide.rpartition("/")[2], []).append(place)

    def place_of(slide: str) -> int | None:
        if slide in places:
            return places[slide]
        found = short.get(slide, ())
        return found[0] if len(found) == 1 else None

    found = {side: [place_of(slide) for slide in slides] for side, slides in listed.items()}
    absent = [slide for side in SIDES for slide, place in zip(listed[side], found[side], strict=True) if place is None]
    unknown = [slide for slide in absent if slide not in source.left_out]
    if unknown and config.data.missing == "error":
        raise DatasetError(
            f"{path} names {len(unknown)} slides without features or label (first: {unknown[0]!r}; a slide there: {source.slides[0]!r}); embed and"
            " label them, or leave them out with config.data.missing=skip"
        )
    if absent:
        console.warn(f"{path}: {len(absent)} of its slides have no features or label and are left out (first: {absent[0]!r})")
    sides = {side: np.unique([place for place in found[side] if place is not None]).astype(np.int64) for side in SIDES}
    _check_sides(source, sides, path)
    _check_cases(source, sides, str(path))
    if unused := len(source) - sum(map(len, sides.values())):
        console.say(f"{path}: {unused} of {len(source)} slides are on no side and not used")
    return sides["train"], sides["val"], sides["test"], path.name


def _check_sides(source: BagSource, sides: dict[str, np.ndarray], path: Path) -> None:
    seen: dict[int, str] = {}
    for side, places in sides.items():
        for place in places.tolist():
            if seen.setdefault(place, side) != side:
                raise DatasetError(f"{path} has slide {source.slides[place]!r} in {seen[place]} and in {side}; keep one")


def _check_cases(source: BagSource, sides: dict[str, Sequence[int] | np.ndarray], name: str) -> None:
    """Refuses a case on two sides: what is learnt of a patient would be tested on the same patient."""
    seen: dict[str, str] = {}
    for side, places in sides.items():
        for case in source.cases[np.asarray(places, np.int64)].tolist():
            if seen.setdefault(case, side) != side:
                raise DatasetError(f"{name} has slides of case {case!r} in {seen[case]} and in {side}; put all of them on one side")
