"""Bags: the tile features of each slide with the slide's label, read from disk when they are wanted.

A folder holds one feature file for each slide: HDF5 of `wavepath embed`, TRIDENT or CLAM (`h5_files`), or CLAM's torch files (`pt_files`). The folder
above CLAM's two will do. A slide's id is the file's relative path without suffix; a label table may name it by its file name alone where that is
unique. Opening a folder looks at sizes and attributes only; values are looked at when a bag is first read.
"""

import json
import threading
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import h5py
import numpy as np
from ml_collections import ConfigDict

from wavepath import console
from wavepath.config import filled
from wavepath.data.slide_lists import read_labels
from wavepath.data.sources import read_slide_list
from wavepath.errors import ConfigError, DatasetError
from wavepath.interop.features import SUFFIX, Features, list_features, read_features

POOLS = {"cls": "features", "mean": "features_mean"}  # config.mil.pool -> dataset of the file
TORCH = ".pt"
_CLAM = ("h5_files", "pt_files")
_UNREADABLE = (OSError, RuntimeError, KeyError, ValueError, TypeError)  # h5py's own, for what is cut short or garbled inside, or no numbers


@dataclass(frozen=True)
class BagFile:
    """One feature file: `tiles` rows of `width`, made by `encoder` (whatever its attributes tell of the checkpoint; () where they tell nothing)."""

    slide: str
    path: Path
    tiles: int
    width: int
    encoder: tuple[str, ...] = ()


class BagSource:
    """Bags in the order of their slide ids; safe to use from several threads.

    Attributes:
        name: the folder.
        slides: str, slide id of each bag.
        cases: str[n], the patient of each bag, never on two sides of a split.
        labels: int32[n], places in `classes`; -1 where there are no labels.
        classes: names, sorted.
        lengths: int64[n], tiles of each bag.
        width: of the features.
        column: dataset of the feature files that is read.
        encoder: what the files tell of the encoder that made them; () where they tell nothing.
        left_out: slides of the label table that are no bag, with the reason of each.
        held_out, test: the other parts of the split, of the training part of one: validation and test.
        split: what the split is called.
        max_tiles: of a bag in a training step; 0: all.
        buckets: sizes that bags are padded to (see `bag_batches.bucket`).
        weights: of each class in the loss; () where every slide counts the same.
    """

    kind = "bags"
    best_order = "global"
    held_out: "BagSource | None" = None
    test: "BagSource | None" = None
    split: str = ""
    max_tiles: int = 0
    buckets: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()

    def __init__(
        self, name: str, files: Sequence[BagFile], labels: Sequence[int] | np.ndarray, cases: Sequence[str] | np.ndarray, classes: Sequence[str],
        *, column: str = "features", left_out: Mapping[str, str] = MappingProxyType({}), cache_mb: float = 512, cache: "_Cache | None" = None,
    ):  # fmt: skip
        self.name, self.files, self.column, self.left_out = name, list(files), column, dict(left_out)
        self.labels, self.cases, self.classes = np.asarray(labels, np.int32), np.asarray(cases, str), tuple(classes)
        self.slides = [file.slide for file in self.files]
        self.lengths = np.array([file.tiles for file in self.files], np.int64)
        self.width = self.files[0].width if self.files else 0
        self.encoder = self.files[0].encoder if self.files else ()
        self.image_shape = (self.width,)
        self.blocks = np.ones(len(self.files), np.int64)
        self._cache = cache or _Cache(int(cache_mb * (1 << 20)))

    def __len__(self) -> int:
        return len(self.files)

    def part(self, places: Sequence[int] | np.ndarray) -> "BagSource":
        """The bags at `places`, int[k], in that order; what was read stays read."""
        places = np.asarray(places, np.int64)
        chosen = [self.files[place] for place in places]
        part = BagSource(
            self.name, chosen, self.labels[places], self.cases[places], self.classes, column=self.column, left_out=self.left_out, cache=self._cache
        )
        part.max_tiles, part.buckets, part.weights = self.max_tiles, self.buckets, self.weights
        return part

    def bag(self, index: int) -> np.ndarray:
        """The features of one bag, float32 [n, d]; not to be written to.

        Raises:
            DatasetError: the file cannot be read, changed since it was opened, or holds values that are not finite; naming the slide.
        """
        file = self.files[index]
        found = self._cache.get(file.path)
        if found is None:
            found = _column(file.path, self.column)
            if found.shape != (file.tiles, file.width):
                raise DatasetError(f"{file.path} changed while it was used: {found.shape} features, {(file.tiles, file.width)} before; start again")
            wrong = int((~np.isfinite(found)).any(axis=1).sum())
            if wrong:
                raise DatasetError(
                    f"slide {file.slide}: {wrong} of {len(found)} tiles have features that are not finite (NaN or infinite); embed it again, or leave"
                    " it out with config.data.exclude_slides"
                )
            self._cache.put(file.path, found)
        return found

    def read(self, index: int) -> Features:
        """All that the file of one bag holds: features (of `column`), coordinates, attributes and further columns; raises as `bag`."""
        file = self.files[index]
        if file.path.suffix == TORCH:
            return Features(file.slide, self.bag(index), _coords_beside(file), {}, {})
        found = read_features(file.path, file.slide)
        return Features(file.slide, self.bag(index), found.coords, found.attributes, found.extra)

    def meta(self, index: int) -> dict[str, Any]:
        """Facts about one bag. Its `name` has the number of tiles, so that a slide embedded anew with others is another example."""
        file = self.files[int(index)]
        facts = {"slide": file.slide, "name": f"{file.slide} {file.tiles}", "case": str(self.cases[index]), "path": str(file.path)}
        return facts | ({"label": self.classes[self.labels[index]]} if self.labels[index] >= 0 else {})

    def counts(self) -> dict[str, int]:
        """Bags of each class."""
        known = self.labels[self.labels >= 0]
        return {name: int(count) for name, count in zip(self.classes, np.bincount(known, minlength=len(self.classes)), strict=True)}

    def digest(self) -> str:
        """A checksum of slides, cases, labels and classes: the same features under other labels are other data."""
        facts = [self.slides, self.cases.tolist(), self.labels.tolist(), list(self.classes)]
        return f"{zlib.crc32(json.dumps(facts).encode('utf-8')):08x}"

    def describe(self) -> str:
        """One line for the user."""
        if not len(self):
            return "no bags"
        low, middle, high = np.percentile(self.lengths, [0, 50, 100]).astype(int)
        listed = ", ".join(f"{name} {count}" for name, count in self.counts().items()) or "no labels"
        cases = len(np.unique(self.cases))
        return f"{len(self)} slides of {cases} cases ({listed}), {low} to {high} tiles (median {middle}) of {self.width} features"

    def close(self) -> None:
        """Nothing stays open; for the sake of other sources."""


class _Cache:
    """Arrays by path, up to a number of bytes. What is in stays in: of a set that is read round and round, the latest used are the last needed."""

    def __init__(self, limit: int):
        self._limit, self._held, self._kept, self._lock = limit, 0, {}, threading.Lock()

    def get(self, path: Path) -> np.ndarray | None:
        return self._kept.get(path)

    def put(self, path: Path, array: np.ndarray) -> None:
        with self._lock:
            if path not in self._kept and self._held + array.nbytes <= self._limit:
                self._kept[path] = array
                self._held += array.nbytes


# Opening ------------------------------------------------------------------------------------------------------------------------------------


def open_bags(config: ConfigDict) -> BagSource:
    """All bags that `config.data.bags` and `config.data.labels` name, with the column `config.mil.pool`; says what was found.

    `{seed}` and `{fold}` in `data.bags` stand for the run's own: features of one encoder for each seed, or fold.

    Raises:
        ConfigError: fields that are missing or unknown.
        DatasetError: as `feature_bags`.
    """
    data = config.data
    if not data.bags:
        raise ConfigError(f"task {config.task!r} learns from features; give their folder (of `wavepath embed`, TRIDENT or CLAM) as config.data.bags")
    if not data.labels:
        raise ConfigError("slides need labels; give a table case_id,slide_id,label as config.data.labels")
    exclude = read_slide_list(Path(data.exclude_slides)) if data.exclude_slides else ()
    source = feature_bags(
        Path(filled(data.bags, config)), labels=Path(data.labels), pool=config.mil.pool, missing=data.missing, exclude=exclude, cache_mb=data.cache_mb
    )
    source.max_tiles, source.buckets = int(config.mil.max_tiles), tuple(config.mil.buckets)
    console.say(f"data: bags {source.name}: {source.describe()}")
    return source


def feature_bags(
    folder: Path, *, labels: Path | None = None, pool: str = "cls", missing: str = "error", exclude: Iterable[str] = (), cache_mb: float = 512
) -> BagSource:
    """The bags of a folder of feature files: those that a table labels, or, without one, all of them without label, each its own case.

    Slides without a tile are left out, with a warning. Classes are the labels found, sorted.

    Args:
        folder: see the module.
        labels: table `case_id,slide_id,label`.
        pool: `cls`: the column `features`; `mean`: `features_mean`.
        missing: `error`, or `skip`: slides of the table without a feature file are left out, with a warning.
        exclude: ids of slides that are left out.
        cache_mb: MiB of features kept in memory.

    Raises:
        ConfigError: an unknown `pool` or `missing`.
        DatasetError: no feature files, files that cannot be read, of several widths or of several encoders; labels of one class, of slides that are
            not there, or ids that are not unique.
    """
    if pool not in POOLS:
        raise ConfigError(f"config.mil.pool={pool!r} is unknown; choose one of {', '.join(POOLS)}")
    if missing not in ("error", "skip"):
        raise ConfigError(f"config.data.missing={missing!r} is unknown; choose error or skip")
    found = _files(Path(folder))
    left_out: dict[str, str] = {}
    rows = [(slide, slide, "", slide) for slide in found] if labels is None else _matched(found, Path(labels), Path(folder), missing, left_out)
    excluded = set(exclude)
    left_out |= {name: "excluded" for row in rows if excluded & {row[0], row[3]} for name in (row[0], row[3])}  # a table of splits may name them
    rows = [row for row in rows if not excluded & {row[0], row[3]}]
    looked_at = {slide: _look(slide, found[slide], POOLS[pool]) for slide, _, _, _ in rows}
    if empty := sorted(slide for slide, file in looked_at.items() if not file.tiles):
        left_out |= dict.fromkeys(empty, "no tile")
        console.warn(f"{len(empty)} of {len(looked_at)} slides in {folder} have no tile and are left out (first: {empty[0]})")
    rows = sorted(row for row in rows if looked_at[row[0]].tiles)
    if not rows:
        raise DatasetError(f"no slide of {folder} is left to use; look into config.data.labels and config.data.exclude_slides")
    _same([looked_at[slide] for slide, _, _, _ in rows], folder)
    if labels is None:
        truth, classes = np.full(len(rows), -1), ()
    else:
        names, truth = np.unique([label for _, _, label, _ in rows], return_inverse=True)
        classes = tuple(str(name) for name in names)
        if len(classes) < 2:
            raise DatasetError(f"all {len(rows)} slides of {labels} that have features are {classes[0]!r}; give labels of two classes or more")
    files, cases = [looked_at[slide] for slide, _, _, _ in rows], [case for _, case, _, _ in rows]
    return BagSource(str(folder), files, truth, cases, classes, column=POOLS[pool], left_out=left_out, cache_mb=cache_mb)


def _files(folder: Path) -> dict[str, Path]:
    """Slide id -> feature file; HDF5 where there is any, since torch files have no coordinates."""
    if not folder.is_dir():
        raise DatasetError(f"there is no folder {folder}; write features with `wavepath embed --checkpoint RUN --data TILES --out {folder}`")
    for name in _CLAM:
        if (folder / name).is_dir() and not any(folder.glob(f"*{SUFFIX}")):
            folder = folder / name
            break
    torch = sorted(path for path in folder.rglob("*" + TORCH) if not path.name.startswith("."))
    if torch and not any(folder.rglob("*" + SUFFIX)):
        return {path.relative_to(folder).as_posix().removesuffix(TORCH): path for path in torch}
    return dict(list_features(folder))


def _matched(
    found: Mapping[str, Path], labels: Path, folder: Path, missing: str, left_out: dict[str, str]
) -> list[tuple[str, str, str, str]]:
    """(slide, case, label, id in the table) of each row of the table that has a feature file."""
    names = {slide: slide.rpartition("/")[2] for slide in found}
    times = Counter(names.values())
    alone = {name: slide for slide, name in names.items() if times[name] == 1}
    rows, absent = [], []
    for row in read_labels(labels):
        slide = row.slide_id if row.slide_id in found else alone.get(row.slide_id)
        if slide is None:
            absent.append(row.slide_id)
        else:
            rows.append((slide, row.case_id, row.label, row.slide_id))
    if absent:
        left_out |= dict.fromkeys(absent, "no feature file")
        what = f"{len(absent)} of {len(absent) + len(rows)} slides of {labels} have no feature file in {folder} (first: {absent[0]!r})"
        if missing == "error" or not rows:
            like = f"files there are named like {next(iter(found))!r}"
            raise DatasetError(f"{what}; {like}; embed them, delete their rows, or leave them out in training with config.data.missing=skip")
        console.warn(f"{what}; they are left out")
    twice = [slide for slide, count in Counter(slide for slide, _, _, _ in rows).items() if count > 1]
    if twice:
        raise DatasetError(f"{labels} names the slide {twice[0]!r} by its id and by its file name; keep one of the rows")
    if unused := len(found) - len(rows):
        console.say(f"{unused} of {len(found)} feature files have no row in {labels} and are not used")
    return rows


def _same(files: Sequence[BagFile], folder: Path) -> None:
    """Refuses features that cannot be compared with one another."""
    first = files[0]
    if other := next((file for file in files if file.width != first.width), None):
        widths = f"{first.slide}: {first.width}, {other.slide}: {other.width}"
        raise DatasetError(f"{folder} mixes features of several widths ({widths}); embed all slides with one encoder")
    if other := next((file for file in files if file.encoder != first.encoder), None):
        shown = [f"{file.slide}: {' '.join(file.encoder) or 'not told'}" for file in (first, other)]
        raise DatasetError(f"{folder} mixes features of several encoders or checkpoints ({'; '.join(shown)}); embed all slides with one of them")


# Files --------------------------------------------------------------------------------------------------------------------------------------


def _look(slide: str, path: Path, column: str) -> BagFile:
    """Size and origin of a file, without its values where the format allows it."""
    if path.suffix == TORCH:
        return BagFile(slide, path, *_column(path, column).shape)
    try:
        with h5py.File(path, "r") as file:
            dataset = _dataset(file, path, column)
            shape, attributes = dataset.shape, dict(file.get("features", dataset).attrs)
            coords = file["coords"].shape[0] if isinstance(file.get("coords"), h5py.Dataset) and file["coords"].ndim else None
    except _UNREADABLE as error:
        raise DatasetError(f"cannot read {path} ({error}); delete it and write it again") from None
    shape = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape  # some writers keep a batch axis
    if len(shape) != 2:
        raise DatasetError(f"{path}: `{column}` has the shape {shape}; tiles in rows [n, d] are needed (features of whole slides are no bag)")
    if coords is not None and coords != shape[0]:  # now, and not when attention is written
        raise DatasetError(f"{path} has {shape[0]} rows of `{column}` and {coords} of `coords`; delete it and make it again")
    told = (attributes.get("encoder"), attributes.get("parameters"))
    return BagFile(slide, path, int(shape[0]), int(shape[1]), tuple(_text(value) for value in told if value is not None))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _dataset(file: h5py.File, path: Path, column: str) -> h5py.Dataset:
    if not isinstance(file.get(column), h5py.Dataset):
        others = "; config.mil.pool=cls reads `features`" if "features" in file and column != "features" else ""
        raise DatasetError(f"{path} has no dataset `{column}`; write it with `wavepath embed`{others}")
    return file[column]


def _column(path: Path, column: str) -> np.ndarray:
    """The features of a file, float32 [n, d]."""
    if path.suffix != TORCH:
        try:
            with h5py.File(path, "r") as file:
                values = np.asarray(_dataset(file, path, column)[()], np.float32)
        except _UNREADABLE as error:
            raise DatasetError(f"cannot read {path} ({error}); delete it and write it again") from None
    else:
        from wavepath.interop.torch_file import read_torch

        if column != POOLS["cls"]:
            raise DatasetError(f"{path} holds one kind of features; read it with config.mil.pool=cls")
        values = read_torch(path)
        if isinstance(values, Mapping):
            values = values.get("features", next(iter(values.values())) if len(values) == 1 else None)
        if not isinstance(values, np.ndarray):
            raise DatasetError(f"{path} holds no single tensor of features; write it as CLAM does, one float tensor [n, d]")
        values = values.astype(np.float32)
    values = values[0] if values.ndim == 3 and len(values) == 1 else values
    if values.ndim != 2:
        raise DatasetError(f"{path} has features of the shape {values.shape}; tiles in rows [n, d] are needed")
    return values


def _coords_beside(file: BagFile) -> np.ndarray:
    """Coordinates of a torch file's tiles from CLAM's HDF5 of the same slide, int64 [n, 2]; zeros where there is none."""
    for folder in ("h5_files", "patches", "../patches"):
        path = file.path.parent.parent / folder / f"{Path(file.slide).name}{SUFFIX}"
        if path.is_file():
            with h5py.File(path, "r") as opened:
                if "coords" in opened and len(opened["coords"]) == file.tiles:
                    return np.asarray(opened["coords"][()], np.int64)
    return np.zeros((file.tiles, 2), np.int64)
