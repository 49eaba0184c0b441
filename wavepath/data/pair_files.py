"""Which two pictures belong together: folders HE/ and IHC/ of equal names, images with both sides beside each other, or a table."""

import csv
import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from wavepath import console
from wavepath.data.images import decode_image, find_images
from wavepath.data.manifest import one_line, printable
from wavepath.data.pair_records import SPLITS
from wavepath.errors import ConfigError, DatasetError

_COLUMNS = ("he", "ihc", "slide", "label", "split")


@dataclasses.dataclass(frozen=True)
class PairFiles:
    """One pair as it was given; `ihc` is None where `he` holds both sides, H&E to the left. `split` is empty where nothing says."""

    name: str
    he: Path
    ihc: Path | None
    slide: str
    label: str = ""
    split: str = ""

    @property
    def paths(self) -> list[Path]:
        """Its files."""
        return [self.he] if self.ihc is None else [self.he, self.ihc]


def from_folders(root: Path) -> list[PairFiles]:
    """The pairs of `root/HE` and `root/IHC`: equal paths below these folders, without suffix; what has no partner is said.

    Raises:
        DatasetError: a folder is missing, or no two names are equal.
    """
    sides = {}
    for side in ("HE", "IHC"):
        folder = Path(root) / side
        if not folder.is_dir():
            raise DatasetError(f"there is no folder {folder}; --folders takes a folder with HE/ and IHC/, whose images have equal names")
        sides[side] = _by_name(folder)
    he, ihc = sides["HE"], sides["IHC"]
    both = [name for name in he if name in ihc]
    if not both:
        example = f"such as {next(iter(he))!r} and {next(iter(ihc))!r}"
        raise DatasetError(f"no image of {root}/HE has the name of one of {root}/IHC ({example}); rename them, or give a table with --csv")
    for side, mine, other in (("HE", he, ihc), ("IHC", ihc, he)):
        if alone := [name for name in mine if name not in other]:
            console.warn(f"{len(alone)} images of {root}/{side} have no partner and are left out (first: {printable(alone[0])})")
    return [PairFiles(printable(name), he[name], ihc[name], printable(name)) for name in both]


def from_ab(folder: Path) -> list[PairFiles]:
    """The pairs of a folder of images with both sides beside each other, H&E to the left (the pix2pix layout).

    Raises:
        DatasetError: no such folder, or no images.
    """
    if not Path(folder).is_dir():
        raise DatasetError(f"there is no folder {folder}; --ab takes a folder of images with H&E in the left half and IHC in the right one")
    return [PairFiles(printable(name), path, None, printable(name)) for name, path in _by_name(Path(folder)).items()]


def from_csv(path: Path) -> list[PairFiles]:
    """The pairs of a table with the columns he, ihc and, where wanted, slide, label, split; paths are absolute or relative to the table.

    Raises:
        DatasetError: the table cannot be read, lacks a column, has an empty cell or an unknown split, or names one H&E image twice.
    """
    path = Path(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, names = list(reader), reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"cannot read {path} ({one_line(error)}); --csv takes a table {','.join(_COLUMNS[:2])}[,slide,label,split]") from None
    if unknown := sorted(set(names) - set(_COLUMNS)) or [name for name in _COLUMNS[:2] if name not in names]:
        raise DatasetError(f"{path}: its header is {','.join(names)}, which has or lacks {unknown[0]!r}; it is he,ihc[,slide,label,split]")
    pairs, seen = [], {}
    for line, row in enumerate(rows, start=2):
        cells = {name: (row.get(name) or "").strip() for name in _COLUMNS}
        if not cells["he"] or not cells["ihc"]:
            raise DatasetError(f"{path}, line {line}: he and ihc each name an image")
        if cells["split"] and cells["split"] not in SPLITS:
            raise DatasetError(f"{path}, line {line}: split is {cells['split']!r}; it is train or test")
        # A name is a path below the slides' own files: nothing that leads out of them.
        name = "/".join(part for part in Path(cells["he"]).with_suffix("").parts if part not in ("/", ".."))
        if name in seen:
            raise DatasetError(f"{path}, line {line}: {cells['he']} is in line {seen[name]} already; list each H&E image once")
        seen[name] = line
        he, ihc = (path.parent / cells[side] for side in ("he", "ihc"))
        pairs.append(PairFiles(name, he, ihc, cells["slide"] or name, cells["label"], cells["split"]))
    if not pairs:
        raise DatasetError(f"{path} lists no pairs")
    return pairs


def _by_name(folder: Path) -> dict[str, Path]:
    """The images below a folder by their path without suffix."""
    found: dict[str, Path] = {}
    for path in find_images(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise DatasetError(f"{found[name]} and {path.name} differ in their suffix alone; remove one of them")
        found[name] = path
    return found


def with_patterns(pairs: Sequence[PairFiles], group: str = "", label: str = "", split: str = "") -> list[PairFiles]:
    """The pairs with slide, label and split read from their names by regular expressions with one group each; empty: as they are.

    Raises:
        ConfigError: a pattern that is none, finds no slide or split in a name, or a split that is neither train nor test.
    """
    found = list(pairs)
    for flag, field, pattern in (("--group-pattern", "slide", group), ("--label-pattern", "label", label), ("--split-pattern", "split", split)):
        if pattern:
            read = _reader(flag, pattern)
            found = [dataclasses.replace(pair, **{field: read(pair.name)}) for pair in found]
    if group and (lost := [pair.name for pair in found if not pair.slide]):
        # A pair that became a slide of its own in silence could be on both sides of the split.
        raise ConfigError(f"--group-pattern {group!r} finds nothing in {lost[0]!r}; give one that names the slide of every pair")
    if split and (lost := [pair for pair in found if pair.split not in SPLITS]):
        raise ConfigError(f"--split-pattern {split!r} finds {lost[0].split!r} in {lost[0].name!r}; it finds train or test in every name")
    if label and not any(pair.label for pair in found):
        raise ConfigError(f"--label-pattern {label!r} finds nothing in any name, such as {found[0].name!r}")
    return found


def _reader(flag: str, pattern: str) -> Callable[[str], str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{flag} {pattern!r} is no regular expression ({error})") from None
    if compiled.groups < 1:
        raise ConfigError(f"{flag} {pattern!r} has no group; put parentheses around what is wanted, as in '^([^_]+)_'")

    def read(name: str) -> str:
        match = compiled.search(name)
        return (match[1] or "") if match else ""

    return read


def read_pair(pair: PairFiles) -> tuple[np.ndarray, np.ndarray]:
    """H&E and immunostain, uint8[h, w, 3] each.

    Raises:
        ValueError: a file that cannot be read, or sides of different sizes.
    """
    images = []
    for path in pair.paths:
        try:
            images.append(decode_image(path.read_bytes()))
        except Exception as error:  # the codecs have error classes of their own, one each
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise ValueError(one_line(f"{path.name} cannot be read: {reason}")) from None
    if pair.ihc is None:
        (both,) = images
        if both.shape[1] % 2:
            raise ValueError(f"it is {both.shape[1]} px wide, which two equal halves are not")
        half = both.shape[1] // 2
        images = [both[:, :half], both[:, half:]]
    he, ihc = images
    if he.shape != ihc.shape:
        raise ValueError(f"H&E has {he.shape[1]} x {he.shape[0]} px, IHC {ihc.shape[1]} x {ihc.shape[0]}")
    return he, ihc
