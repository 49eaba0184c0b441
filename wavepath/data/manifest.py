"""What a prepared folder says about itself: the manifest of its slides, the fingerprints that tell whole from outdated, the seconds.

    OUT/manifest.csv                 every slide with its status, reason and counts; no times or dates, so that equal runs give equal bytes
    OUT/settings.json                version, slides folder and the resolved config
    OUT/timings.csv                  seconds of each slide
    OUT/slides/<slide_id>/           regions.csv, tissue.npz, thumbnail.jpg, selection.csv, screening.json, info.json

`screening.json` and `info.json` are written last in their stage: a stage without its file never happened.
"""

import contextlib
import csv
import dataclasses
import glob
import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wavepath import __version__, console
from wavepath.data import records
from wavepath.errors import DatasetError, WavepathError
from wavepath.files import read_json, write_json, write_text

FORMAT = 1  # of the folder; another number makes every shard outdated
MANIFEST, TIMINGS, SETTINGS = "manifest.csv", "timings.csv", "settings.json"
SCREENING, INFO = "screening.json", "info.json"
SHARD = "tiles.array_record"  # a slide's shard in its own folder, until all are put in order
SCREENING_FILES = (SCREENING, "regions.csv", "tissue.npz", "thumbnail.jpg")  # the closing file first
TILE_FILES = (INFO, "selection.csv", SHARD)
SAMPLES, PAIRS, OVERVIEW = "samples.csv", "pairs.csv", "overview.jpg"  # of pyramids, of pairs, of both
WORK = "work"  # `.work.<name>.tmp`: where the workers of a run on several machines say what they did, while it runs
_TOP_NAMES = (MANIFEST, TIMINGS, SETTINGS, SAMPLES, PAIRS, OVERVIEW, WORK, "dataset_info.json", "features.json", "metadata")
OK, FAILED, EMPTY = "ok", "failed", "empty"
TIMING_COLUMNS = ("slide_id", "open", "screen", "read", "encode", "write", "total", "tiles")


@dataclasses.dataclass(frozen=True)
class SlideRow:
    """One slide of the manifest. Lengths in level-0 pixels, mpp in micrometres per pixel; what is not known is None."""

    slide_id: str
    path: str  # relative to the slides folder
    status: str = FAILED
    reason: str = ""
    mpp: float | None = None  # level 0
    mpp_source: str = ""
    width: int | None = None
    height: int | None = None
    backend: str = ""
    regions: int = 0
    regions_tissue: int = 0  # enough tissue, not pen, blur or artefact: those that were ranked
    regions_selected: int = 0
    region_um: float | None = None
    tiles: int = 0
    tile_mpp: float | None = None
    energy_tissue: float | None = None  # mean over the ranked regions
    energy_selected: float | None = None  # mean over the selected ones
    pixels_screened: int = 0  # pixels of the overview that screening read
    pixels_tiles: int = 0  # pixels of the stored tiles
    pixels_tissue: int = 0  # pixels of all tissue at the mpp of the tiles: what would have been read without screening
    shard: str = ""
    case_id: str = ""
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a kind of prepared folder is made of.

    Attributes:
        dataset: TFDS's name of it, the beginning of the shards' names.
        shards: split -> name of a slide's shard in the slide's own folder.
        row: class of the manifest's rows.
        files: what a slide's last stage writes, the closing file first.
        needed: files that every slide has which is whole.
    """

    dataset: str
    shards: Mapping[str, str]
    row: type
    files: tuple[str, ...]
    needed: tuple[str, ...]

    @property
    def all_files(self) -> tuple[str, ...]:
        """Everything of a slide."""
        return (*self.files, *SCREENING_FILES)


TILES = Layout(records.DATASET, {records.SPLIT: SHARD}, SlideRow, TILE_FILES, (*SCREENING_FILES, "selection.csv"))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return repr(value) if isinstance(value, float) else str(value)


def manifest_text(rows: Iterable[Any], kind: type = SlideRow) -> str:
    """The CSV text of a table of dataclasses, of a manifest by default; floats with all their digits, so that it reads back equal."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    names = [field.name for field in dataclasses.fields(kind)]
    writer.writerow(names)
    for row in rows:
        writer.writerow([_cell(getattr(row, name)) for name in names])
    return buffer.getvalue()


def read_manifest(folder: Path, kind: type = SlideRow, name: str = MANIFEST, command: str = "wavepath prepare") -> list[Any]:
    """The slides of a prepared folder, in the order of their ids; or the rows of another table of it.

    Raises:
        DatasetError: no manifest, or one of another layout.
    """
    path = Path(folder) / name
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [_row(cells, kind) for cells in csv.DictReader(file)]
    except FileNotFoundError:
        raise DatasetError(f"{folder} has no {name}: it is not a whole prepared dataset; run `{command}` (again)") from None
    except (TypeError, ValueError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} is not a manifest of this version ({error}); run `{command}` again") from None


def _row(cells: Mapping[str, str], kind: type) -> Any:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        text = cells[field.name] if field.name in cells else None
        if text is None:
            if field.metadata.get("later"):  # a column that older folders do not have, at its default there
                continue
            raise ValueError(f"no column {field.name}")
        holds = str(field.type)
        if "str" in holds:
            values[field.name] = text
        elif text == "":
            values[field.name] = None
        else:
            values[field.name] = (float if "float" in holds else int)(text)
    return kind(**values)


def printable(text: str) -> str:
    """A name as it is, but for bytes that are not valid text, which are escaped: they could not be written to any table."""
    return text.encode("utf-8", "backslashreplace").decode()


def one_line(message: object) -> str:
    """An error's text on one line, printable."""
    return printable(" ".join(str(message).split()))


def slide_folder(out: Path, slide_id: str) -> Path:
    """Where a slide's own files lie; `/` in an id makes folders."""
    return Path(out) / "slides" / slide_id


def slide_files(path: Path) -> list[Path]:
    """The files that a slide consists of: itself, what MRXS and VMS slides keep beside it, or every file of a DICOM series."""
    path, suffix = Path(path), Path(path).suffix.lower()
    if suffix == ".mrxs":
        beside = path.with_suffix("").rglob("*")
    elif suffix in (".vms", ".vmu"):
        beside = path.parent.glob(f"{glob.escape(path.stem)}*")
    elif suffix in (".dcm", ".dicom", ""):
        beside = path.parent.glob(f"*{path.suffix}")
    else:
        beside = []
    return sorted({path, *(file for file in beside if file.is_file())})


def fingerprint(slide: Path, settings: Mapping[str, Any], mpp: float | None) -> str:
    """A hash of everything that a slide's outputs depend on: its files' sizes and times, the settings, a given mpp, and the version."""
    files = []
    for file in slide_files(slide):
        stat = file.stat()
        files.append([file.name, stat.st_size, stat.st_mtime_ns])
    content = dict(format=FORMAT, version=__version__, files=files, settings=settings, mpp=mpp)
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=list).encode()).hexdigest()


def read_stage(path: Path) -> dict[str, Any] | None:
    """A stage's closing file, or None where the stage never ended (or its file is damaged, which comes to the same)."""
    try:
        content = read_json(path)
    except (FileNotFoundError, NotADirectoryError, WavepathError):
        return None
    return content if isinstance(content, dict) else None


class Timings:
    """The seconds of every slide: a line is appended when a slide ends, and the file is put in order when the run ends."""

    def __init__(self, out: Path):
        self.path = Path(out) / TIMINGS
        self.rows: dict[str, list[str]] = {}
        if self.path.is_file():
            with open(self.path, newline="", encoding="utf-8", errors="replace") as file:
                # A kill may have cut the last line short; its slide has no seconds then.
                self.rows = {cells[0]: cells for cells in csv.reader(file) if len(cells) == len(TIMING_COLUMNS) and cells[0] != "slide_id"}
        self.save()

    def add(self, slide_id: str, seconds: Mapping[str, float], tiles: int) -> None:
        """Notes one slide; `seconds` may lack stages."""
        cells = [slide_id, *(f"{seconds.get(name, 0.0):.3f}" for name in TIMING_COLUMNS[1:-1]), str(tiles)]
        self.rows[slide_id] = cells
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(cells)

    def save(self) -> None:
        """Rewrites the file, one line a slide, sorted."""
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([TIMING_COLUMNS, *(self.rows[key] for key in sorted(self.rows))])
        write_text(self.path, buffer.getvalue())

    def total(self, column: str, slide_ids: Iterable[str]) -> float:
        """Seconds of one stage, summed over slides."""
        place = TIMING_COLUMNS.index(column)
        return sum(float(self.rows[slide_id][place]) for slide_id in slide_ids if slide_id in self.rows)


class PreparedFolder:
    """The files of a prepared folder while `prepare` works in it; the caller holds the folder's lock.

    `shards`: where the shards of each slide id lie, by split: `slides/<slide_id>/tiles.array_record` once it is written, then under its
    number at the top of the folder, where TFDS wants it.
    """

    def __init__(self, out: Path, layout: Layout = TILES):
        self.out, self.layout = Path(out), layout
        self._refuse_others()
        self._remove_temporaries()
        self.shards = self._find_shards()

    def _refuse_others(self) -> None:
        """Two kinds of dataset in one folder would overwrite each other's tables."""
        top = [path for path in self.out.glob("*.array_record-*") if not path.name.startswith(f"{self.layout.dataset}-")]
        own = [path for path in (self.out / "slides").rglob("*.array_record") if path.name not in self.layout.shards.values()]
        if top or own:
            raise DatasetError(f"{self.out} holds another kind of dataset (such as {(top + own)[0].name}); choose another --out")

    def _remove_temporaries(self) -> None:
        """What a killed run left behind under temporary names; at the top of the folder, which may hold other files, only names of ours."""
        ours = [path for name in _TOP_NAMES for path in self.out.glob(f".{name}.*.tmp")]
        for path in [*ours, *(self.out / "slides").rglob(".*.tmp")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _find_shards(self) -> dict[str, dict[str, Path]]:
        """Shards among the dataset's name their slide in their records: a number alone says nothing after a kill between two renames."""
        found: dict[str, dict[str, Path]] = {}
        pattern = re.compile(rf"{self.layout.dataset}-({'|'.join(self.layout.shards)})\.array_record-\d{{5}}-of-\d{{5}}")
        for path in sorted(self.out.iterdir()):
            if match := pattern.fullmatch(path.name):
                slide_id = records.slide_of(path)
                if slide_id is None:
                    console.warn(f"{path.name} is damaged; its slide is prepared again")
                    self.unpublish()
                    path.unlink()
                else:
                    found.setdefault(slide_id, {})[match[1]] = path
        for split, name in self.layout.shards.items():
            for path in (self.out / "slides").rglob(name):
                found.setdefault(path.parent.relative_to(self.out / "slides").as_posix(), {})[split] = path
        return found

    def adopt(self, slide_id: str) -> None:
        """Takes notice of shards that lie in a slide's own folder, where another process may have put them."""
        own = {split: self.slide(slide_id) / name for split, name in self.layout.shards.items()}
        if found := {split: path for split, path in own.items() if path.is_file()}:
            self.shards[slide_id] = found

    def known(self) -> set[str]:
        """Ids of all slides that have left a stage's closing file or a shard."""
        folder = self.out / "slides"
        return {path.parent.relative_to(folder).as_posix() for name in (INFO, SCREENING) for path in folder.rglob(name)} | self.shards.keys()

    def slide(self, slide_id: str) -> Path:
        """Where a slide's own files lie."""
        return slide_folder(self.out, slide_id)

    def unpublish(self) -> None:
        """Something changes: from now on this is no whole dataset."""
        for name in ("dataset_info.json", MANIFEST):
            (self.out / name).unlink(missing_ok=True)

    def forget(self, slide_id: str, names: Sequence[str]) -> None:
        """Removes some of a slide's files, the closing one first, and with a shard's name its shards wherever they lie."""
        self.unpublish()
        folder = self.slide(slide_id)
        for name in names:
            (folder / name).unlink(missing_ok=True)
        if set(names) & set(self.layout.shards.values()):
            for path in self.shards.pop(slide_id, {}).values():
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # only if it is empty

    def shard_bytes(self, slide_id: str) -> int:
        """The size of a slide's shards."""
        return sum(path.stat().st_size for path in self.shards.get(slide_id, {}).values())

    def kept(self, slide_id: str, expected: str) -> tuple[Any, str]:
        """The row of a slide that is whole and has the expected fingerprint, or None with the reason (empty: it never was done)."""
        folder = self.slide(slide_id)
        info = read_stage(folder / INFO)
        if info is None:
            return None, ""
        try:
            row = self.layout.row(**info["row"])
            if info["fingerprint"] != expected:
                return None, "the slide, the settings or the version changed"
            if row.status == OK and (slide_id not in self.shards or self.shard_bytes(slide_id) != info["bytes"]):
                return None, "its shard is missing or damaged"
            if any(not (folder / name).is_file() for name in self.layout.needed):
                return None, "some of its files are missing"
        except (KeyError, TypeError):
            return None, "its files are damaged"
        return row, ""

    def close_slide(self, row: Any, slide_id: str, expected: str, **more: Any) -> None:
        """Writes the file that makes a slide whole; `more` is kept in it."""
        content = dict(fingerprint=expected, row=dataclasses.asdict(row), bytes=self.shard_bytes(slide_id), **more)
        write_json(self.slide(slide_id) / INFO, content)

    def arrange(self, targets: Mapping[tuple[str, str], Path]) -> None:
        """Moves shards, named by slide and the split under which they lie now, to their places at the top of the folder.

        A kill between two renames does no harm: each shard is at one of its two places, and the next run finds it.
        """
        if any(self.shards[slide_id][split] != path for (slide_id, split), path in targets.items()):
            self.unpublish()
        for (slide_id, split), path in targets.items():
            # Out of the way first: the name a shard has now may be another's tomorrow.
            mine = self.shards[slide_id]
            if mine[split].parent == self.out and mine[split] != path:
                mine[split] = mine[split].replace(self.slide(slide_id) / self.layout.shards[split])
        for (slide_id, split), path in targets.items():
            if self.shards[slide_id][split] != path:
                self.shards[slide_id][split] = self.shards[slide_id][split].replace(path)

    def publish(self, rows: Sequence[SlideRow], settings: Mapping[str, Any]) -> list[SlideRow]:
        """Puts the shards of tiles in the order of the rows and writes manifest, settings and TFDS's metadata; returns the rows with their shards."""
        tiles = [row for row in rows if row.status == OK]
        target = {row.slide_id: self.out / records.shard_name(index, len(tiles)) for index, row in enumerate(tiles)}
        self.arrange({(slide_id, records.SPLIT): path for slide_id, path in target.items()})
        rows = [dataclasses.replace(row, shard=target[row.slide_id].name if row.slide_id in target else "") for row in rows]
        write_json(self.out / SETTINGS, settings)
        if not tiles:
            self.unpublish()
        write_text(self.out / MANIFEST, manifest_text(rows))
        if tiles:
            config = settings["config"]["tiles"]
            records.write_metadata(
                self.out, [row.tiles for row in tiles], sum(path.stat().st_size for path in target.values()), config["size"], config["codec"],
                f"Tiles of {len(tiles)} slides made by wavepath {__version__}; manifest.csv lists all {len(rows)} slides.",
            )
        return rows


class SlideFolder(PreparedFolder):
    """One slide's part of a prepared folder, for a worker beside others: nothing outside of `slides/<slide_id>` is read or changed.

    Whoever started the workers holds the folder's lock, has unpublished it, and has taken the slide's outdated shards away.
    """

    def __init__(self, out: Path, slide_id: str, layout: Layout = TILES):
        self.out, self.layout, self.shards = Path(out), layout, {}
        self.adopt(slide_id)

    def unpublish(self) -> None:
        """Done before the workers started; a worker that was given up for lost must not undo what was published since."""
