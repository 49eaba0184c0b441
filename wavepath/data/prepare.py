"""Slides to a dataset of tiles: `prepare` goes through the slides one by one, and what is whole already is kept.

For each slide: open, screen, select, lay the tile grid, extract, store one shard; then all shards are put in order and TFDS's metadata
is written. The state between runs is in files alone (`wavepath.data.manifest`), each of which is whole or absent, so a run that is killed
at any point is finished by the same command, to the same bytes. While anything changes there is no `dataset_info.json`: an unfinished
dataset cannot be taken for a whole one.
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

from wavepath import __version__, console
from wavepath.data import manifest as mf
from wavepath.data import records, tiles
from wavepath.data.mpp import given_mpp, resolve
from wavepath.errors import EXIT_NOTHING, EXIT_OK, EXIT_PARTIAL, ConfigError, DatasetError, SlideError, WavepathError
from wavepath.files import atomic_path, folder_lock, writable_folder, write_json, write_text

if TYPE_CHECKING:
    from wavepath.data.screening import Screening
    from wavepath.data.slides import Slide, SlideRef

LOCK = "prepare.lock"
_SCREENING_SHARE = 0.2  # of a slide's work, for the progress bar
_THUMBNAIL_QUALITY = 88
_CACHE_MB = 192  # of decoded native tiles: two rows of them over a slide 130,000 px wide


@dataclasses.dataclass(frozen=True)
class PrepareResult:
    """What `prepare` did. `rows` is the manifest; `reused` counts the slides that were whole already; `seconds` are those of this run."""

    total: int
    ok: int
    failed: int
    empty: int
    reused: int
    tiles: int
    exit_code: int
    rows: list[mf.SlideRow]
    seconds: dict[str, float]


@dataclasses.dataclass
class _Job:
    """What stays the same over the slides of one run."""

    root: Path
    config: ConfigDict
    workers: int
    folder: mf.PreparedFolder
    mpp: dict[str, float | None]  # by slide id: given by the table or the flag

    def fingerprint(self, ref: "SlideRef", *groups: str) -> str:
        """Of the whole slide, or of a stage that depends on some groups of the config alone."""
        settings = {name: value for name, value in self.config.to_dict().items() if not groups or name in groups}
        return mf.fingerprint(ref.path, settings, self.mpp[ref.id])


def prepare(
    slides: Path, out: Path, config: ConfigDict, *, mpp_csv: Path | None = None, slide_mpp: float | None = None, labels: Path | None = None,
    strict: bool = False, workers: int = 2,
) -> PrepareResult:
    """Screens the slides, extracts the tiles of the selected regions and stores them as a TFDS dataset in `out`.

    A slide that cannot be read, has no mpp or fails in any other way is listed in `out/manifest.csv` with the reason, one without tissue
    likewise, and the rest goes on. Slides that an earlier run finished with the same settings are kept.

    Args:
        slides: a folder of slides, searched through its subfolders, or one slide.
        config: the `prepare` config (`wavepath.defaults.prepare_defaults`).
        mpp_csv: table `slide,mpp`; slide_mpp: for all slides that it does not name. Both in um per level-0 pixel, and both overrule the file.
        labels: table `case_id,slide_id,label`, copied into the manifest.
        strict: stop at the first slide that gives no tiles.
        workers: threads that read and encode tiles.

    Raises:
        WavepathError: no slides, an unusable config or table, an unwritable or full `out`, tiles of other slides in `out`, another process in
            it (LockedError), or, under `strict`, a slide that gave no tiles.
    """
    from wavepath.data import screening  # noqa: F401 - JAX comes with it; the first slide's seconds are not to hold that
    from wavepath.data.slides import find_slides, read_labels, read_mpp_csv

    _check(config)
    slides, out = Path(slides), Path(out)
    if slide_mpp is not None:
        resolve((), slide_mpp, slides)  # a value that no slide can have is one error now, and costs no tiles of an earlier run
    root = slides if slides.is_dir() else slides.parent
    if out.resolve() in (root.resolve(), *root.resolve().parents):
        raise WavepathError(f"--out {out} is the folder of the slides, or holds it; choose another one (a new folder in it will do)")
    # Thumbnails of an earlier run are images too, should `out` lie among the slides.
    refs = [ref for ref in find_slides(slides) if out.resolve() not in ref.path.resolve().parents]
    if not refs:
        raise WavepathError(f"no slides in {slides}; give a folder with slides, or one slide (`wavepath info` tells what a file is)")
    given = given_mpp(refs, read_mpp_csv(mpp_csv) if mpp_csv else {}, slide_mpp)
    label_of = _labels(refs, read_labels(labels) if labels else [])
    with _storage_errors(out), folder_lock(writable_folder(out), LOCK):
        job = _Job(root, config, workers, mf.PreparedFolder(out), given)
        timings = mf.Timings(out)
        _drop_other_slides(job, refs, whole_folder=slides.is_dir())
        rows = _kept_rows(job, refs)
        todo = [ref for ref in refs if ref.id not in rows]
        with console.progress("prepare", len(todo), "slides") as bar:
            for ref in todo:
                rows[ref.id] = _one_slide(job, ref, bar, timings, strict)
        ordered = [dataclasses.replace(rows[ref.id], **label_of.get(ref.id, {})) for ref in refs]
        settings = dict(format=mf.FORMAT, version=__version__, slides=str(root.resolve()), config=config.to_dict())
        ordered = job.folder.publish(ordered, settings)
        timings.save()
    count = {status: sum(row.status == status for row in ordered) for status in (mf.OK, mf.FAILED, mf.EMPTY)}
    total_tiles = sum(row.tiles for row in ordered)
    return PrepareResult(
        total=len(ordered), ok=count[mf.OK], failed=count[mf.FAILED], empty=count[mf.EMPTY], reused=len(refs) - len(todo), tiles=total_tiles,
        exit_code=EXIT_NOTHING if not total_tiles else EXIT_PARTIAL if count[mf.FAILED] else EXIT_OK, rows=ordered,
        seconds={stage: timings.total(stage, [ref.id for ref in todo]) for stage in mf.TIMING_COLUMNS[1:-1]},
    )


def _check(config: ConfigDict) -> None:
    """Settings that no slide could be prepared with: one error now instead of one for each slide."""
    if config.tiles.codec not in tiles.CODECS:
        raise ConfigError(f"tiles.codec is {config.tiles.codec!r}; choose from {', '.join(tiles.CODECS)}")
    if config.tiles.size < 8 or not 0.05 <= config.tiles.mpp <= 20 or not 1 <= config.tiles.quality <= 100:
        raise ConfigError("tiles.size is at least 8 px, tiles.mpp 0.05 to 20 um per px, tiles.quality 1 to 100")
    modes = ("wavelet", "random", "all", "threshold")
    if config.select.mode not in modes:
        raise ConfigError(f"select.mode is {config.select.mode!r}; choose from {', '.join(modes)}")
    if not 0 < config.select.top <= 1:
        raise ConfigError(f"select.top is a share above 0 and up to 1, not {config.select.top:g}")


@contextlib.contextmanager
def _storage_errors(out: Path) -> Iterator[None]:
    """A full disk is one clear error, whichever file it meets."""
    try:
        yield
    except OSError as error:
        if not records.is_storage_error(error):
            raise
        raise records.storage_error(error.filename or out, error) from None


def _labels(refs: "Sequence[SlideRef]", rows: Sequence[Any]) -> dict[str, dict[str, str]]:
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


def _drop_other_slides(job: _Job, refs: "Sequence[SlideRef]", whole_folder: bool) -> None:
    """Takes slides out of the dataset that are no longer in the slides folder; refuses where none of the old ones is there, or where a
    single slide was given, which says nothing about the others.
    """
    known = job.folder.known()
    gone = sorted(known - {ref.id for ref in refs})
    if gone and (len(gone) == len(known) or not whole_folder):
        raise DatasetError(f"{job.folder.out} holds tiles of other slides (such as {gone[0]!r}); choose another --out, or delete that folder")
    for slide_id in gone:
        console.say(f"{slide_id}: no longer in {job.root}; its tiles are taken out of {job.folder.out}")
        job.folder.forget(slide_id, (*mf.TILE_FILES, *mf.SCREENING_FILES))


def _kept_rows(job: _Job, refs: "Sequence[SlideRef]") -> dict[str, mf.SlideRow]:
    """The rows of the slides that are whole already; says how many, and which are done again for what reason."""
    rows: dict[str, mf.SlideRow] = {}
    again: dict[str, list[str]] = {}
    for ref in refs:
        try:
            row, reason = job.folder.kept(ref.id, job.fingerprint(ref))
        except OSError:  # the slide cannot even be looked at: its own turn will tell why
            row, reason = None, ""
        if row is not None:
            rows[ref.id] = row
        elif reason:
            again.setdefault(reason, []).append(ref.id)
    console.say(f"{len(refs)} slide{'s' * (len(refs) != 1)}" + (f", of which {len(rows)} are whole already and kept" if rows else ""))
    for reason, ids in sorted(again.items()):
        console.say(f"{len(ids)} done again, since {reason}: {', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''}")
    return rows


def _one_slide(job: _Job, ref: "SlideRef", bar: console.Progress, timings: mf.Timings, strict: bool) -> mf.SlideRow:
    """Prepares one slide; whatever goes wrong with it alone becomes its row."""
    begin, done = time.perf_counter(), 0.0
    seconds: dict[str, float] = {}
    facts: dict[str, Any] = dict(slide_id=mf.printable(ref.id), path=mf.printable(_relative(ref.path, job.root)))

    def report(share: float, note: str) -> None:
        nonlocal done
        share = round(share, 2)  # it is printed
        bar.advance(share - done, f"{facts['slide_id']}: {note}")
        done = share

    try:
        row = _process(job, ref, facts, seconds, report)
    except (records.StorageError, ConfigError):
        raise
    except Exception as error:
        if records.is_storage_error(error):
            raise
        # What is not an error of ours is named by its type: it may be a defect, of a library or of wavepath.
        reason = str(error) if isinstance(error, WavepathError) else f"{type(error).__name__}: {error}"
        counts = {name: value for name, value in facts.items() if name in ("slide_id", "path", "mpp", "mpp_source", "width", "height", "backend")}
        row = mf.SlideRow(**counts, status=mf.FAILED, reason=mf.one_line(reason))
        job.folder.forget(ref.id, (*mf.TILE_FILES, *mf.SCREENING_FILES))
    if row.status != mf.OK:
        message = f"{row.slide_id}: {row.status}, {row.reason}"
        if strict:
            raise WavepathError(f"{message}; mend or remove it, or leave out --strict to go on without it (finished slides are kept)")
        console.warn(message)
    report(1.0, f"{row.tiles} tiles")
    seconds["total"] = time.perf_counter() - begin
    timings.add(row.slide_id, seconds, row.tiles)
    return row


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _process(job: _Job, ref: "SlideRef", facts: dict[str, Any], seconds: dict[str, float], report: Callable[[float, str], None]) -> mf.SlideRow:
    """Open, screen, select, extract, store. `facts` is filled as they become known, for the row of a slide that fails midway."""
    from wavepath.data.screening import select
    from wavepath.data.slides import open_slide, require_mpp

    if mf.printable(ref.id) != ref.id:
        raise SlideError("its name is not valid UTF-8 text and could not be written to any table; rename it")
    config, folder = job.config, job.folder.slide(ref.id)
    # Before anything is read: a slide that changes meanwhile does not match it, and is done again.
    whole = job.fingerprint(ref)
    job.folder.forget(ref.id, mf.TILE_FILES)
    begin = time.perf_counter()
    with open_slide(ref.path, mpp=job.mpp[ref.id], cache_mb=_CACHE_MB) as slide:
        facts.update(width=slide.dimensions[0], height=slide.dimensions[1], backend=slide.backend)
        facts.update(mpp=require_mpp(slide), mpp_source=slide.mpp_source)
        tiles.tile_resolution(slide, config)  # a refusal comes before the work of screening
        seconds["open"] = time.perf_counter() - begin
        report(0.01, "screening")
        begin = time.perf_counter()
        screening = _screened(job, ref, slide, lambda share: report(0.01 + (_SCREENING_SHARE - 0.01) * share, "screening"))
        seconds["screen"] = time.perf_counter() - begin
        chosen = config.select
        selected = select(
            screening.regions, mode=chosen.mode, top=chosen.top, threshold=chosen.threshold, count=chosen.count or None, seed=config.seed,
            slide_id=ref.id,
        )
        plan = tiles.tile_grid(slide, screening, selected, config, ref.id)
        facts.update(_counts(slide, screening, plan))
        _write_selection(folder / "selection.csv", screening, plan)
        if len(plan):
            _store(job, ref, slide, plan, seconds, report)
            row = mf.SlideRow(**facts, status=mf.OK)
        else:
            row = mf.SlideRow(**facts, status=mf.EMPTY, reason=mf.one_line(_why_empty(slide, screening, plan)))
    job.folder.close_slide(row, ref.id, whole)
    return row


def _screened(job: _Job, ref: "SlideRef", slide: "Slide", report: Callable[[float], None]) -> "Screening":
    """The slide's screening: the stored one where it still fits (another share or tile size needs no second read), else a new one, stored."""
    from wavepath.data.screening import screen

    folder, expected = job.folder.slide(ref.id), job.fingerprint(ref, "tissue", "screen")
    stored = mf.read_stage(folder / mf.SCREENING)
    if stored is not None and stored.get("fingerprint") == expected and all((folder / name).is_file() for name in mf.SCREENING_FILES):
        try:
            return load_screening(folder)
        except WavepathError as error:
            console.warn(f"{ref.id}: {error}; screened again")
    job.folder.forget(ref.id, mf.SCREENING_FILES)
    screening = screen(slide, job.config, report)
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


def load_screening(folder: Path) -> "Screening":
    """The screening that `prepare` stored in a slide's own folder, `OUT/slides/<slide_id>`.

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


def _write_selection(path: Path, screening: "Screening", plan: tiles.TilePlan) -> None:
    """Which regions were taken, and how many tiles each gave."""
    index = np.asarray(screening.regions.index)
    count = dict(zip(*(values.tolist() for values in np.unique(plan.region, return_counts=True)), strict=True))
    lines = [f"{region},{int(chosen)},{count.get(region, 0)}" for region, chosen in zip(index.tolist(), plan.selected.tolist(), strict=True)]
    write_text(path, "\n".join(["index,selected,tiles", *lines]) + "\n")


def _mean(values: np.ndarray, which: np.ndarray) -> float | None:
    return float(np.mean(values[which], dtype=np.float64)) if which.any() else None


def _counts(slide: "Slide", screening: "Screening", plan: tiles.TilePlan) -> dict[str, Any]:
    """The numbers of the manifest."""
    regions, tissue = screening.regions, screening.tissue
    ranked, energy = np.asarray(regions.eligible, bool), np.asarray(regions.energy)
    side = np.asarray(regions.size, np.float64).ravel()
    return dict(
        regions=len(ranked), regions_tissue=int(ranked.sum()), regions_selected=int(plan.selected.sum()),
        region_um=round(float(side[0]) * slide.mpp, 3) if side.size else None, tiles=len(plan), tile_mpp=float(plan.mpp),
        energy_tissue=_mean(energy, ranked), energy_selected=_mean(energy, plan.selected), pixels_screened=int(screening.pixels_read),
        pixels_tiles=len(plan) * plan.size**2,
        pixels_tissue=int(np.count_nonzero(tissue.tissue) * (tissue.cell * plan.size / plan.footprint) ** 2),
    )


def _why_empty(slide: "Slide", screening: "Screening", plan: tiles.TilePlan) -> str:
    if min(slide.dimensions) < plan.footprint:
        return f"smaller than one tile ({slide.dimensions[0]} x {slide.dimensions[1]} px; a tile is {plan.footprint:g} px wide)"
    if not screening.tissue.verdict:
        return screening.tissue.reason or "no tissue"
    reasons = sorted({str(reason) for reason in screening.regions.reason if str(reason)})
    return "no tile has enough tissue" + (f" (regions were left out for: {', '.join(reasons)})" if reasons else "")


def _store(
    job: _Job, ref: "SlideRef", slide: "Slide", plan: tiles.TilePlan, seconds: dict[str, float], report: Callable[[float, str], None],
) -> None:
    """Extracts the tiles and writes the slide's shard."""
    config, path = job.config.tiles, job.folder.slide(ref.id) / mf.SHARD
    seconds["write"] = 0.0
    with records.ShardWriter(path) as writer:
        encoded = tiles.map_tiles(slide, plan, lambda rgb, _: tiles.encode_tile(rgb, config.codec, config.quality), job.workers, seconds)
        with contextlib.closing(encoded):
            for index, tile in encoded:
                begin = time.perf_counter()
                x, y = int(plan.x[index]), int(plan.y[index])
                writer.write(records.encode_example(dict(
                    tile=tile, id=records.example_id(ref.id, x, y, plan.mpp), slide=ref.id, x=x, y=y, mpp=plan.mpp, energy=plan.energy[index],
                    region=int(plan.region[index]),
                )))
                seconds["write"] += time.perf_counter() - begin
                if writer.records % 64 == 0:
                    report(_SCREENING_SHARE + (1 - _SCREENING_SHARE) * writer.records / len(plan), f"{writer.records}/{len(plan)} tiles")
    job.folder.shards[ref.id] = path
