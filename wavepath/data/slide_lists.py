"""Which slides a folder holds, and what a label table says about them.

A slide's id is its path below the folder without suffix, so that slides of one name in different folders stay apart. A DICOM
series is one slide, however many files it has.
"""

import os
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from wavepath.console import say, warn
from wavepath.data.mpp import read_rows, strip_suffix
from wavepath.data.slide_backends import is_dicom, read_header
from wavepath.errors import DatasetError, SlideError

_TIFF = {".svs", ".tif", ".tiff", ".btf", ".tf2", ".tf8", ".qptiff"}
_OPENSLIDE = {".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".czi", ".avs"}
_IMAGES = {".png", ".jpg", ".jpeg"}
_MAYBE_DICOM = {".dcm", ".dicom", ""}
SUFFIXES = _TIFF | _OPENSLIDE | _IMAGES | {".dcm"}
_SCREENED = {"regions.csv", "tissue.npz"}
_SERIES_UID = (0x0020, 0x000E)
_LONG_LENGTH = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")


class SlideRef(NamedTuple):
    """A slide on disk: the file to open and the id that names it everywhere else."""

    path: Path
    id: str


class LabelRow(NamedTuple):
    """One line of a label table: the case (patient) that splits go by, the slide, its label."""

    case_id: str
    slide_id: str
    label: str


def find_slides(root: Path | str) -> list[SlideRef]:
    """All slides below a folder, sorted by id, or the one slide of a file.

    Hidden files and folders are passed over, and so are the tables and thumbnails of a prepared slide; files of other types are
    counted and named, symbolic links are followed. Of the files that belong to another (a `.mrxs` slide's folder, the JPEGs of a
    `.vms`) only the main one counts. Two slides whose ids would be equal (a.svs, a.tiff) keep their suffixes, and that is said.

    Raises:
        SlideError: no such path, or no slide in it.
    """
    root = Path(root)
    if not root.exists():
        raise SlideError(f"no slides at {root}: there is no such file or folder")
    if root.is_file():
        return [SlideRef(root, strip_suffix(root.name))]
    files, others = [], Counter()
    for path in _walk(root):
        suffix = path.suffix.lower()
        if suffix in _MAYBE_DICOM and _has_dicom_header(path):
            files.append(path)
        elif suffix in SUFFIXES:
            files.append(path)
        else:
            others[suffix or "no suffix"] += 1
    refs = _with_ids(root, _without_parts(files))
    if others:
        kinds = ", ".join(f"{suffix} {count}" for suffix, count in sorted(others.items()))
        say(f"{root}: {sum(others.values())} files of other types are passed over ({kinds})")
    if not refs:
        raise SlideError(f"no slides in {root}; wavepath reads {' '.join(sorted(SUFFIXES))} and DICOM series")
    return refs


def _walk(folder: Path) -> Iterator[Path]:
    """Files below `folder` in a fixed order; each real folder once, so that circular links end."""
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        # The folder of a MIRAX slide holds its data files only.
        mirax = {name[:-5] for name in names if name.lower().endswith(".mrxs")}
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in mirax)
        # Where `prepare` keeps a slide's tables, the image is that slide's thumbnail: with --slide-mpp it would pass for a slide.
        if _SCREENED <= set(names):
            names = []
        yield from (Path(parent) / name for name in sorted(names) if not name.startswith("."))


def _has_dicom_header(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return is_dicom(file.read(132))
    except OSError:
        return False


def _without_parts(files: list[Path]) -> list[Path]:
    """Drops the JPEGs that a Hamamatsu VMS or VMU index in the same folder names its own."""
    indexed = {path.parent for path in files if path.suffix.lower() in (".vms", ".vmu")}
    return [path for path in files if path.suffix.lower() not in _IMAGES or path.parent not in indexed]


def _with_ids(root: Path, files: list[Path]) -> list[SlideRef]:
    plain = [path for path in files if not _has_dicom_header(path)]
    named = [(path.relative_to(root).as_posix(), path) for path in plain]
    ids = {name: strip_suffix(name) for name, _ in named}
    # Again and again: a suffix that is kept may make an id that a third file has (a.svs, a.tiff, a.svs.tiff).
    while True:
        count = Counter(ids.values())
        shared = [name for name, short in ids.items() if count[short] > 1 and short != name]
        if not shared:
            break
        for name in shared:
            warn(f"{name} keeps its suffix in its id: another file is named {ids[name]} too")
            ids[name] = name
    refs = [SlideRef(path, ids[name]) for name, path in named]
    taken = {ref.id for ref in refs}
    for ref in _dicom_refs(root, [path for path in files if path not in set(plain)]):
        if ref.id in taken:
            warn(f"the DICOM series in {ref.path.parent} is named {ref.id}.dcm: another slide is named {ref.id}")
            ref = SlideRef(ref.path, f"{ref.id}.dcm")
        taken.add(ref.id)
        refs.append(ref)
    return sorted(refs, key=lambda ref: ref.id)


def _dicom_refs(root: Path, files: list[Path]) -> list[SlideRef]:
    """One slide for each series of a folder; its largest file stands for it, which is sure to hold slide pixels."""
    series: dict[tuple[Path, str], list[Path]] = {}
    for path in files:
        series.setdefault((path.parent, dicom_series(path)), []).append(path)
    folders = Counter(folder for folder, _ in series)
    refs = []
    for (folder, _), paths in series.items():
        largest = max(paths, key=lambda path: (path.stat().st_size, path.name))
        relative = folder.relative_to(root).as_posix()
        if folders[folder] == 1:
            name = root.resolve().name if relative == "." else relative
        else:
            name = strip_suffix(largest.relative_to(root).as_posix())
        refs.append(SlideRef(largest, name))
    return refs


def dicom_series(path: Path) -> str:
    """The series UID of a DICOM file; empty where its header is not explicit little endian, so that the folder counts as one series."""
    header = read_header(path, 1 << 20)
    place = 132
    while place + 12 <= len(header):
        group, element, kind, length = struct.unpack_from("<HH2sH", header, place)
        if not kind.isalpha() or (group, element) > _SERIES_UID:
            return ""
        place += 8
        if kind in _LONG_LENGTH:
            (length,) = struct.unpack_from("<I", header, place)
            place += 4
            if length == 0xFFFFFFFF:
                place = _end_of_sequence(header, place)
                continue
        if (group, element) == _SERIES_UID:
            return header[place : place + length].decode("ascii", "replace").strip("\0 ")
        place += length
    return ""


def _end_of_sequence(header: bytes, place: int) -> int:
    """The place behind a sequence of undefined length: behind the delimiter that closes it, nested ones skipped."""
    depth = 1
    while depth and place + 8 <= len(header):
        group, element, length = struct.unpack_from("<HHI", header, place)
        if (group, element) == (0xFFFE, 0xE0DD):
            depth -= 1
            place += 8
        elif group == 0xFFFE:
            # An item begins (its elements follow one by one) or ends.
            place += 8
        else:
            kind = header[place + 4 : place + 6]
            (short,) = struct.unpack_from("<H", header, place + 6)
            place += 8
            if kind in _LONG_LENGTH:
                (long,) = struct.unpack_from("<I", header, place) if place + 4 <= len(header) else (0,)
                place += 4
                depth += long == 0xFFFFFFFF
                place += 0 if long == 0xFFFFFFFF else long
            else:
                place += short
    return place


def read_labels(path: Path) -> list[LabelRow]:
    """The table `case_id,slide_id,label` (CLAM's), in its order. Without a `case_id` column each slide is its own case.

    Raises:
        DatasetError: the file or a column is missing, a cell is empty, or a slide is listed with two cases or labels.
    """
    rows: dict[str, LabelRow] = {}
    for line, cells in enumerate(read_rows(path, "label table"), start=2):
        if "slide_id" not in cells or "label" not in cells:
            raise DatasetError(f"{path}: the columns case_id,slide_id,label are needed, found {','.join(cells)}")
        row = LabelRow(cells.get("case_id") or cells["slide_id"], cells["slide_id"], cells["label"])
        if not row.slide_id or not row.label:
            raise DatasetError(f"{path} line {line}: slide_id or label is empty; fill it in or remove the line")
        if rows.setdefault(row.slide_id, row) != row:
            raise DatasetError(f"{path} line {line}: slide {row.slide_id} is listed twice with different values; keep one")
    return list(rows.values())
