"""Slides to a dataset of tiles: `prepare` goes through the slides one by one, and what is whole already is kept.

For each slide: open, screen, select, lay the tile grid, extract, store one shard; then all shards are put in order and TFDS's metadata
is written. The state between runs is in files alone (`wavepath.data.manifest`), each of which is whole or absent, so a run that is killed
at any point is finished by the same command, to the same bytes. While anything changes there is no `dataset_info.json`: an unfinished
dataset cannot be taken for a whole one.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from wavepath import __version__
from wavepath.data import manifest as mf
from wavepath.data import records, tiles
from wavepath.data.mpp import given_mpp, resolve
from wavepath.data.slide_runs import CACHE_MB, LOCK, SCREENING_SHARE, Report, SlideJob, match_labels, relative, slides_in, storage_errors
from wavepath.errors import EXIT_NOTHING, EXIT_OK, EXIT_PARTIAL, ConfigError, SlideError
from wavepath.files import folder_lock, writable_folder, write_text

if TYPE_CHECKING:
    from wavepath.data.screening import Screening
    from wavepath.data.slides import Slide, SlideRef

_CACHE_MB = CACHE_MB
RunSlides = Callable[["TilesJob", Sequence["SlideRef"], mf.Timings, bool], dict[str, mf.SlideRow]]  # job, slides, timings, strict -> rows by id


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
class TilesJob(SlideJob):
    """The tiles of the selected regions of a slide; or those at given coordinates, a file by slide id."""

    coords: Mapping[str, Path] | None = None

    def fingerprint(self, ref: "SlideRef", *groups: str) -> str:
        if self.coords is None or groups:
            return super().fingerprint(ref, *groups)
        from wavepath.data.coords_source import digest

        return mf.fingerprint(ref.path, {**self.settings(()), "coords": digest(self.coords[ref.id])}, self.mpp[ref.id])

    def settings(self, groups: Sequence[str]) -> dict[str, Any]:
        # Pyramids are made by another command: what it says of them leaves tiles whole.
        wanted = groups or [name for name in self.config.to_dict() if name != "pyramids"]
        return {name: value for name, value in self.config.to_dict().items() if name in wanted}

    def process(self, ref: "SlideRef", facts: dict[str, Any], seconds: dict[str, float], report: Report) -> mf.SlideRow:
        return _process(self, ref, facts, seconds, report)


def prepare(
    slides: Path, out: Path, config: ConfigDict, *, mpp_csv: Path | None = None, slide_mpp: float | None = None, labels: Path | None = None,
    strict: bool = False, workers: int = 2, run: RunSlides | None = None, coords: Path | None = None, tile_size: int = 0,
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
        workers: threads that read and encode tiles of one slide.
        run: does the slides that are not whole yet (`wavepath.data.beam.on_runner`); one by one in this process without it.
        coords: TRIDENT's or CLAM's coordinates (a folder or a file): their tiles, in their order, instead of those of the selected regions.
            Slides are screened all the same, for the thumbnail, the tissue and the energy at each tile; it decides nothing.
        tile_size: with `coords`, side of the stored tiles in pixels; 0: that of the files. `tiles.size` and `tiles.mpp` do not count then.

    Raises:
        WavepathError: no slides, an unusable config or table, an unwritable or full `out`, tiles of other slides in `out`, another process in
            it (LockedError), or, under `strict`, a slide that gave no tiles.
    """
    from wavepath.data import screening  # noqa: F401 - JAX comes with it; the first slide's seconds are not to hold that
    from wavepath.data.slides import read_labels, read_mpp_csv

    _check(config)
    slides, out = Path(slides), Path(out)
    if slide_mpp is not None:
        resolve((), slide_mpp, slides)  # a value that no slide can have is one error now, and costs no tiles of an earlier run
    root, refs = slides_in(slides, out)
    given = given_mpp(refs, read_mpp_csv(mpp_csv) if mpp_csv else {}, slide_mpp)
    label_of = match_labels(refs, read_labels(labels) if labels else [])
    matched = None
    if coords is not None:
        from wavepath.data.coords_source import match_coords

        matched = match_coords(Path(coords), refs, tile_size, strict)
        config = ConfigDict(config.to_dict())
        config.tiles.size = matched.size
        _check(config)
    with storage_errors(out), folder_lock(writable_folder(out), LOCK):
        job = TilesJob(root, config, workers, mf.PreparedFolder(out), given, matched.files if matched else None)
        timings = mf.Timings(out)
        job.drop_other_slides(refs, whole_folder=slides.is_dir())
        absent = {ref.id: _no_coords(job, ref) for ref in refs if matched and ref.id in matched.without}
        rows = job.kept_rows([ref for ref in refs if ref.id not in absent])
        reused = len(rows)
        rows |= absent
        todo = [ref for ref in refs if ref.id not in rows]
        rows |= run(job, todo, timings, strict) if run else job.run(todo, timings, strict)
        ordered = [dataclasses.replace(rows[ref.id], **label_of.get(ref.id, {})) for ref in refs]
        settings = dict(format=mf.FORMAT, version=__version__, slides=str(root.resolve()), config=config.to_dict())
        settings |= dict(coords=str(Path(coords).resolve()), overlap=matched.overlap) if matched else {}
        ordered = job.folder.publish(ordered, settings)
        timings.save()
    count = {status: sum(row.status == status for row in ordered) for status in (mf.OK, mf.FAILED, mf.EMPTY)}
    total_tiles = sum(row.tiles for row in ordered)
    return PrepareResult(
        total=len(ordered), ok=count[mf.OK], failed=count[mf.FAILED], empty=count[mf.EMPTY], reused=reused, tiles=total_tiles,
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


def _process(job: TilesJob, ref: "SlideRef", facts: dict[str, Any], seconds: dict[str, float], report: Report) -> mf.SlideRow:
    """Open, screen, select, extract, store. `facts` is filled as they become known, for the row of a slide that fails midway."""
    from wavepath.data.coords_source import coords_plan, read_coords
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
        found = None
        if job.coords is None:
            tiles.tile_resolution(slide, config)  # a refusal comes before the work of screening
        else:
            found = read_coords(job.coords[ref.id])
            coords_plan(slide, found, config.tiles.size)
        seconds["open"] = time.perf_counter() - begin
        report(0.01, "screening")
        begin = time.perf_counter()
        screening = job.screened(ref, slide, lambda share: report(0.01 + (SCREENING_SHARE - 0.01) * share, "screening"))
        seconds["screen"] = time.perf_counter() - begin
        if found is not None:
            plan = coords_plan(slide, found, config.tiles.size, screening.regions)
        else:
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
            reason = "its coordinates are none" if found is not None else _why_empty(slide, screening, plan)
            row = mf.SlideRow(**facts, status=mf.EMPTY, reason=mf.one_line(reason))
    job.folder.close_slide(row, ref.id, whole)
    return row


def _no_coords(job: TilesJob, ref: "SlideRef") -> mf.SlideRow:
    """The row of a slide that the coordinates pass over: no failure, since they may be of some slides of a folder on purpose."""
    job.folder.forget(ref.id, job.folder.layout.all_files)
    return mf.SlideRow(mf.printable(ref.id), mf.printable(relative(ref.path, job.root)), mf.EMPTY, "it has no coordinates")


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
    job: TilesJob, ref: "SlideRef", slide: "Slide", plan: tiles.TilePlan, seconds: dict[str, float], report: Report,
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
                    report(SCREENING_SHARE + (1 - SCREENING_SHARE) * writer.records / len(plan), f"{writer.records}/{len(plan)} tiles")
    job.folder.shards[ref.id] = {records.SPLIT: path}
