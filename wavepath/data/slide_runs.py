"""One run over a folder of slides, whatever is made of them: tiles (`prepare`) or pyramids.

Slides are done one by one; what is whole is kept, what fails becomes a row of the manifest with its reason, and the rest goes on. The state
between runs is in files alone (`wavepath.data.manifest`), so a run that is killed at any point is finished by the same command.
"""

import contextlib
import dataclasses
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from wavepath import console
from wavepath.data import manifest as mf
from wavepath.data import records, tiles
from wavepath.errors import ConfigError, DatasetError, WavepathError
from wavepath.files import atomic_path, write_json

if TYPE_CHECKING:
    from wavepath.data.screening import Screening
    from wavepath.data.slides import Slide, SlideRef

LOCK = "prepare.lock"
SCREENING_SHARE = 0.2  # of a slide's work, for the progress bar
CACHE_MB = 192  # of decoded native tiles: two rows of them over a slide 130,000 px wide
_THUMBNAIL_QUALITY = 88
_FACTS = ("slide_id", "path", "mpp", "mpp_source", "width", "height", "backend")  # of a slide that failed midway
Report = Callable[[float, str], None]


@dataclasses.dataclass
class SlideJob:
    """What stays the same over the slides of one run; a subclass says what is done with each."""

    root: Path
    config: ConfigDict
    workers: int
    folder: mf.PreparedFolder
    mpp: dict[str, float | None]  # by slide id: given by the table or the flag

    title = "prepare"
    product = "tiles"
    unit = "slide"

    def settings(self, groups: Sequence[str]) -> dict[str, Any]:
        """The part of the config that a stage depends on; without groups, that the whole slide depends on."""
        raise NotImplementedError

    def process(self, ref: "SlideRef", facts: dict[str, Any], seconds: dict[str, float], report: Report) -> Any:
        """Does one slide and closes it; returns its row. `facts` is filled as they become known, for the row of a slide that fails midway."""
        raise NotImplementedError

    def fingerprint(self, ref: "SlideRef", *groups: str) -> str:
        """Of the whole slide, or of a stage that depends on some groups of the config alone."""
        return mf.fingerprint(ref.path, self.settings(groups), self.mpp[ref.id])

    def drop_other_slides(self, refs: "Sequence[SlideRef]", whole_folder: bool) -> None:
        """Takes slides out of the dataset that are no longer in the slides folder; refuses where none of the old ones is there, or where a
        single slide was given, which says nothing about the others.
        """
        known = self.folder.known()
        gone = sorted(known - {ref.id for ref in refs})
        if gone and (len(gone) == len(known) or not whole_folder):
            other = f"{self.product} of other slides (such as {gone[0]!r})"
            raise DatasetError(f"{self.folder.out} holds {other}; choose another --out, or delete that folder")
        for slide_id in gone:
            console.say(f"{slide_id}: no longer in {self.root}; its {self.product} are taken out of {self.folder.out}")
            self.folder.forget(slide_id, self.folder.layout.all_files)

    def kept_rows(self, refs: "Sequence[SlideRef]") -> dict[str, Any]:
        """The rows of the slides that are whole already; says how many, and which are done again for what reason."""
        rows: dict[str, Any] = {}
        again: dict[str, list[str]] = {}
        for ref in refs:
            try:
                row, reason = self.folder.kept(ref.id, self.fingerprint(ref))
            except OSError:  # the slide cannot even be looked at: its own turn will tell why
                row, reason = None, ""
            if row is not None:
                rows[ref.id] = row
            elif reason:
                again.setdefault(reason, []).append(ref.id)
        console.say(f"{len(refs)} {self.unit}{'s' * (len(refs) != 1)}" + (f", of which {len(rows)} are whole already and kept" if rows else ""))
        for reason, ids in sorted(again.items()):
            console.say(f"{len(ids)} done again, since {reason}: {', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''}")
        return rows

    def run(self, refs: "Sequence[SlideRef]", timings: mf.Timings, strict: bool) -> dict[str, Any]:
        """Does the slides one by one; their rows."""
        with console.progress(self.title, len(refs), f"{self.unit}s") as bar:
            return {ref.id: self._one_slide(ref, bar, timings, strict) for ref in refs}

    def one_slide(self, ref: "SlideRef", report: Report) -> tuple[Any, dict[str, float]]:
        """Does one slide: its row, and its seconds by stage. Whatever goes wrong with it alone becomes the row's reason.

        Raises:
            ConfigError, StorageError, OSError: what would befall every other slide too.
        """
        begin = time.perf_counter()
        seconds: dict[str, float] = {}
        facts: dict[str, Any] = dict(slide_id=mf.printable(ref.id), path=mf.printable(relative(ref.path, self.root)))
        try:
            row = self.process(ref, facts, seconds, report)
        except (records.StorageError, ConfigError):
            raise
        except Exception as error:
            if records.is_storage_error(error):
                raise
            # What is not an error of ours is named by its type: it may be a defect, of a library or of wavepath.
            reason = str(error) if isinstance(error, WavepathError) else f"{type(error).__name__}: {error}"
            counts = {name: value for name, value in facts.items() if name in _FACTS}
            row = self.folder.layout.row(**counts, status=mf.FAILED, reason=mf.one_line(reason))
            self.folder.forget(ref.id, self.folder.layout.all_files)
        seconds["total"] = time.perf_counter() - begin
        return row, seconds

    def _one_slide(self, ref: "SlideRef", bar: console.Progress, timings: mf.Timings, strict: bool) -> Any:
        """Does one slide of a run in this process."""
        name, done = mf.printable(ref.id), 0.0

        def report(share: float, note: str) -> None:
            nonlocal done
            share = round(share, 2)  # it is printed
            bar.advance(share - done, f"{name}: {note}")
            done = share

        row, seconds = self.one_slide(ref, report)
        if row.status != mf.OK:
            if strict:
                raise WavepathError(refusal(row))
            console.warn(complaint(row))
        report(1.0, f"{row.tiles} {self.product}")
        timings.add(row.slide_id, seconds, row.tiles)
        return row

    def screened(self, ref: "SlideRef", slide: "Slide", report: Callable[[float], None]) -> "Screening":
        """The slide's screening: the stored one where it still fits (another share or tile size needs no second read), else a new one, stored."""
        from wavepath.data.screening import screen

        folder, expected = self.folder.slide(ref.id), self.fingerprint(ref, "tissue", "screen")
        stored = mf.read_stage(folder / mf.SCREENING)
        if stored is not None and stored.get("fingerprint") == expected and all((folder / name).is_file() for name in mf.SCREENING_FILES):
            try:
                return load_screening(folder)
            except WavepathError as error:
                console.warn(f"{ref.id}: {error}; screened again")
        self.folder.forget(ref.id, mf.SCREENING_FILES)
        screening = screen(slide, self.config, report)
        tissue = screening.tissue
        folder.mkdir(parents=True, exist_ok=True)
        screening.regions.to_csv(folder / "regions.csv")
        with atomic_path(folder / "tissue.npz") as path, open(path, "wb") as file:
            layers = {name: getattr(tissue, name) for name in ("tissue", "pen", "blur", "padding")}
            np.savez_compressed(file, **layers, cell=np.float64(tissue.cell), mpp=np.float64(tissue.mpp))
        with atomic_path(folder / "thumbnail.jpg") as path:
            path.write_bytes(tiles.encode_tile(np.ascontiguousarray(screening.thumbnail), "jpeg", _THUMBNAIL_QUALITY))
        write_json(folder / mf.SCREENING, dict(
            fingerprint=expected, verdict=bool(tissue.verdict), reason=tissue.reason, thumbnail_mpp=float(screening.thumbnail_mpp),
            pixels_read=int(screening.pixels_read), mpp=float(screening.mpp),
        ))
        return screening


def complaint(row: Any) -> str:
    """The line for a slide that gave nothing."""
    return f"{row.slide_id}: {row.status}, {row.reason}"


def refusal(row: Any) -> str:
    """The same where it stops the run."""
    return f"{complaint(row)}; mend or remove it, or leave out --strict to go on without it (finished slides are kept)"


@contextlib.contextmanager
def storage_errors(out: Path) -> Iterator[None]:
    """A full disk is one clear error, whichever file it meets."""
    try:
        yield
    except OSError as error:
        if not records.is_storage_error(error):
            raise
        raise records.storage_error(error.filename or out, error) from None


def slides_in(slides: Path, out: Path) -> "tuple[Path, list[SlideRef]]":
    """The folder of the slides, and the slides.

    Raises:
        WavepathError: there are none, or `out` is that folder or holds it.
    """
    from wavepath.data.slides import find_slides

    root = slides if slides.is_dir() else slides.parent
    if out.resolve() in (root.resolve(), *root.resolve().parents):
        raise WavepathError(f"--out {out} is the folder of the slides, or holds it; choose another one (a new folder in it will do)")
    # Thumbnails of an earlier run are images too, should `out` lie among the slides.
    refs = [ref for ref in find_slides(slides) if out.resolve() not in ref.path.resolve().parents]
    if not refs:
        raise WavepathError(f"no slides in {slides}; give a folder with slides, or one slide (`wavepath info` tells what a file is)")
    return root, refs


def match_labels(refs: "Sequence[SlideRef]", rows: Sequence[Any]) -> dict[str, dict[str, str]]:
    """Case and label of each slide, for the manifest; what does not match is said, since a wrong table is found late otherwise."""
    label_of = {row.slide_id: dict(case_id=row.case_id, label=row.label) for row in rows}
    if rows:
        ids = {ref.id for ref in refs}
        without, unknown = sorted(ids - label_of.keys()), sorted(label_of.keys() - ids)
        if len(without) == len(ids):
            raise DatasetError(f"the label table names none of the slides (it has {unknown[0]!r}, they are like {without[0]!r}); check its slide_id")
        if without:
            console.warn(f"{len(without)} slides have no label (first: {without[0]!r})")
        if unknown:
            console.warn(f"the label table names {len(unknown)} slides that are not there (first: {unknown[0]!r})")
    return label_of


def relative(path: Path, root: Path) -> str:
    """A path as the manifest names it."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def load_screening(folder: Path) -> "Screening":
    """The screening that was stored in a slide's own folder, `OUT/slides/<slide_id>`.

    Raises:
        DatasetError: it is not there or damaged.
    """
    from wavepath.data.screening import RegionTable, Screening
    from wavepath.data.tissue import TissueMap

    facts = mf.read_stage(folder / mf.SCREENING)
    try:
        with np.load(folder / "tissue.npz", allow_pickle=False) as arrays:
            layers = {name: arrays[name] for name in ("tissue", "pen", "blur", "padding")}
            tissue = TissueMap(
                **layers, cell=float(arrays["cell"]), mpp=float(arrays["mpp"]), verdict=facts["verdict"], reason=facts["reason"],
            )
        thumbnail = tiles.decode_tile((folder / "thumbnail.jpg").read_bytes())
        regions = RegionTable.from_csv(folder / "regions.csv")
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{folder} holds no whole screening ({type(error).__name__}); run `wavepath prepare` again") from None
    return Screening(
        tissue=tissue, regions=regions, thumbnail=thumbnail, thumbnail_mpp=facts["thumbnail_mpp"], pixels_read=facts["pixels_read"],
        mpp=facts["mpp"],
    )
