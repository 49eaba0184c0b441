"""The physical size of a pixel: which of a file's statements to believe, and what a user can state instead.

Micrometres per pixel (mpp) decide what a network sees, so none is ever guessed: not from the objective (20x is 0.5 mpp on one
scanner and 0.46 on another), and not from a print resolution that an image program left in the file.
"""

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from wavepath.console import warn
from wavepath.errors import DatasetError, MissingMppError, SlideError

if TYPE_CHECKING:
    from wavepath.data.slide_lists import SlideRef

MIN_MPP, MAX_MPP = 0.05, 20.0
SAME_MPP = 0.01  # resolutions this close (as a share) count as one: a level is read as it is
_DPI = (72.0, 96.0, 150.0, 300.0)
_MICROMETRES = {
    "µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0, "micrometer": 1.0, "micrometre": 1.0, "": 1.0,
    "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "pm": 1e-6, "å": 1e-4, "in": 25400.0, "inch": 25400.0,
}  # fmt: skip
_COMPOUND_SUFFIX = re.compile(r"\.ome\.(tiff?|btf|tf2|tf8)$", re.IGNORECASE)


class Candidate(NamedTuple):
    """What one field of a file says about the pixel size, in micrometres along x and y."""

    source: str
    x: float
    y: float


class Mpp(NamedTuple):
    """The believed pixel size (None: none was), the field it came from, and why other fields were refused."""

    value: float | None
    source: str
    refused: tuple[str, ...]


def micrometres(unit: str) -> float | None:
    """Micrometres in one `unit` of OME-XML or ImageJ; None for pixels and other units without a length."""
    return _MICROMETRES.get(unit.strip().lower())


def number(text: object) -> float | None:
    """A finite positive float from a metadata field (decimal commas are accepted); None from anything else."""
    try:
        value = float(str(text).strip().replace(",", "."))
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def from_density(source: str, x: float, y: float, per: float) -> list[Candidate]:
    """A candidate from a resolution tag of `x`, `y` pixels per `per` micrometres; none where the tag is empty."""
    if not (math.isfinite(x) and math.isfinite(y) and x > 0 and y > 0):
        return []
    return [Candidate(source, per / x, per / y)]


def refusal(candidate: Candidate) -> str | None:
    """Why a stated pixel size cannot be the slide's; None where it can."""
    source, x, y = candidate
    for dpi in _DPI:
        if abs(25400 / x - dpi) < 0.5:
            return f"{source} is {dpi:g} dpi, a screen or print resolution"
    if not MIN_MPP <= x <= MAX_MPP or not MIN_MPP <= y <= MAX_MPP:
        return f"{source} says {x:g} um per pixel, outside {MIN_MPP:g} to {MAX_MPP:g}"
    if abs(x / y - 1) > 0.02:
        return f"{source} says {x:g} by {y:g} um, pixels that are not square"
    return None


def resolve(candidates: Iterable[Candidate], given: float | None, path: Path) -> Mpp:
    """The first believable candidate, or the user's own value ahead of them all.

    Raises:
        SlideError: the user's own value is outside 0.05 to 20 um per pixel.
    """
    if given is not None:
        reason = refusal(Candidate("the given value", given, given)) if number(given) else "the given value is not a positive number"
        if reason:
            raise SlideError(f"the mpp given for {path} cannot be right ({reason}); give micrometres per pixel at full resolution")
        return Mpp(float(given), "given", ())
    refused = []
    for candidate in candidates:
        reason = refusal(candidate)
        if reason is None:
            return Mpp((candidate.x + candidate.y) / 2, candidate.source, tuple(refused))
        refused.append(reason)
    return Mpp(None, "", tuple(refused))


def missing_mpp_message(path: Path, refused: Iterable[str], objective: float | None) -> str:
    """One line that says why a slide has no mpp and names the three ways to give it."""
    reasons = "; ".join(refused) or "its metadata name none"
    hint = f" (its objective is {objective:g}x; scanners differ, so the mpp is not inferred from it)" if objective else ""
    return (
        f"{path} has no usable pixel size: {reasons}{hint}. Give it in one of three ways: in the file's metadata, "
        "in a CSV with the columns slide,mpp (--mpp-csv), or for all slides with --slide-mpp"
    )


def require_mpp(slide) -> float:
    """The mpp of an open `Slide` at level 0, in micrometres per pixel.

    Raises:
        MissingMppError: naming the three ways to give it (file metadata, `--mpp-csv`, `--slide-mpp`).
    """
    if slide.mpp is None:
        raise MissingMppError(missing_mpp_message(slide.path, slide.mpp_refused, slide.objective))
    return slide.mpp


def strip_suffix(name: str) -> str:
    """`a/b.svs` -> `a/b`, `c.ome.tiff` -> `c`; a name whose last dot is no suffix (`case.1 (2)`) is the caller's to know."""
    if _COMPOUND_SUFFIX.search(name):
        return _COMPOUND_SUFFIX.sub("", name)
    head, dot, tail = name.rpartition(".")
    return head if dot and head and "/" not in tail else name


def read_rows(path: Path, what: str) -> list[dict[str, str]]:
    """The rows of a CSV with a header, cells stripped, column names in lower case; blank lines are skipped.

    Raises:
        DatasetError: no such file, not text, or empty.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [
                {(name or "").strip().lower(): (value or "").strip() for name, value in row.items() if isinstance(value, str | None)}
                for row in csv.DictReader(file)
            ]
    except OSError as error:
        raise DatasetError(f"cannot read the {what} {path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"the {what} {path} is not a CSV in UTF-8 ({error}); save it as one") from None
    rows = [row for row in rows if any(row.values())]
    if not rows:
        raise DatasetError(f"the {what} {path} has no rows; it needs a header line and at least one row")
    return rows


def read_mpp_csv(path: Path) -> dict[str, float]:
    """The table `slide,mpp` of `--mpp-csv`: slide id or file name, as written there -> micrometres per pixel at level 0.

    `slide_id` and TRIDENT's `wsi` are taken for `slide`. A value outside 0.05 to 20, or that of a print resolution, counts as
    missing, and that is said.

    Raises:
        DatasetError: the file or a column is missing, a value is not a number, or a slide has two values.
    """
    table: dict[str, float] = {}
    for line, row in enumerate(read_rows(path, "mpp table"), start=2):
        name = row.get("slide") or row.get("slide_id") or row.get("wsi") or ""
        if not name or "mpp" not in row:
            raise DatasetError(f"{path} line {line}: the columns slide,mpp are needed, found {','.join(row)}")
        if not row["mpp"]:
            continue
        value = number(row["mpp"])
        if value is None:
            raise DatasetError(f"{path} line {line}: the mpp of {name} is {row['mpp']!r}, not a positive number")
        reason = refusal(Candidate(f"{path} line {line}", value, value))
        if reason:
            warn(f"the mpp of {name} is left out: {reason}")
            continue
        name = name.replace("\\", "/").removeprefix("./")
        if table.setdefault(name, value) != value:
            raise DatasetError(f"{path} line {line}: {name} has two different mpp values; keep one")
    return table


def given_mpp(refs: "Sequence[SlideRef]", table: Mapping[str, float], default: float | None) -> dict[str, float | None]:
    """The mpp that the user gives for each slide; the table names slides by id, by path or by file name, with the file's own suffix or none.

    Another suffix is another file: `a.svs,0.25` says nothing about `a.tiff`, nor `case.1,0.25` about `case.svs`. A file name counts in every
    folder, unless it is the path or id of one slide.
    """
    paths = {ref.id: ((PurePosixPath(ref.id).parent / ref.path.name).as_posix(), ref.id) for ref in refs}
    exact = {name for pair in paths.values() for name in pair}
    given, used = {}, set()
    for ref in refs:
        called = [*paths[ref.id], *(name for name in (ref.path.name, strip_suffix(ref.path.name)) if name not in exact)]
        names = [name for name in called if name in table]
        given[ref.id] = table[names[0]] if names else default or None
        used.update(called)
    other = sorted(set(table) - used)
    if other:
        warn(f"the mpp table names {len(other)} slides that are not there (first: {other[0]!r})")
    return given
