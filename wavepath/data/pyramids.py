"""Pyramids of aligned crops for super-resolution: the MLCamSR construction for any slides, and FTMS's for single images (METHODS 4.7).

From slides, each sample is one place at `pyramids.levels` magnifications (1024, 512 and 256 px by default), with a common centre and each read
from the slide's own pyramid where it has that level. Places come from a table of coordinates, or from a grid over the tissue. From single
images (`wavepath.data.pyramid_images`) the lower levels are made by repeated bicubic halving. Samples with little tissue are left out and counted; a
slide is for training or for testing, never for both.

As with tiles, one slide is one shard, what is whole is kept, and a run that is killed is finished by the same command to the same bytes.
"""

import contextlib
import dataclasses
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from ml_collections import ConfigDict

from wavepath import console
from wavepath.data import manifest as mf
from wavepath.data import pyramid_places as places
from wavepath.data import pyramid_records as pr
from wavepath.data import records, tiles
from wavepath.data.examples import encode_example
from wavepath.data.mpp import given_mpp, resolve
from wavepath.data.pyramid_folder import publish
from wavepath.data.slide_grid import average
from wavepath.data.slide_runs import CACHE_MB, SCREENING_SHARE, Report, SlideJob, match_labels, slides_in, storage_errors
from wavepath.errors import EXIT_NOTHING, EXIT_OK, EXIT_PARTIAL, ConfigError, SlideError
from wavepath.files import folder_lock, writable_folder

if TYPE_CHECKING:
    from wavepath.data.slides import SlideRef

_JUDGED_MPP = 2.0  # the tissue of a single crop is judged near the screening magnification,
_JUDGED_SIDE = 64  # but on no fewer pixels than this
_MOST_LEVELS = 6
Corner = tuple[int, int]
T, R = TypeVar("T"), TypeVar("R")


@dataclasses.dataclass(frozen=True)
class PyramidResult:
    """What `make_pyramids` did. `rows` is the manifest; `reused` counts the slides that were whole already; `mean` is that of the training split."""

    rows: list[pr.PyramidRow]
    reused: int
    mean: tuple[float, ...]
    exit_code: int
    seconds: dict[str, float]

    def count(self, name: str) -> int:
        """A count of the manifest, summed over slides."""
        return sum(getattr(row, name) for row in self.rows)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample on its way to disk: its levels encoded (none where it is blank), its centre in level-0 pixels, the mean RGB of the finest;
    `image`: of single images, the file's path below their folder."""

    encoded: list[bytes]
    x: int
    y: int
    width: int
    height: int
    label: str
    split: str
    tissue: float
    mean: list[float]
    seconds: float = 0.0  # of encoding
    image: str = ""


class PyramidJob(SlideJob):
    """Pyramids of whatever a subclass reads.

    `label_of`: case and label by slide id.
    """

    title, product = "pyramids", "samples"
    label_of: Mapping[str, dict[str, str]] = {}

    def settings(self, groups: Sequence[str]) -> dict[str, Any]:
        config = self.config.to_dict()
        if groups:
            return {name: config[name] for name in groups}
        # Which slides are for testing is decided when all are done, and moves no pixel.
        # Nor does the number of all samples: what a slide gives of them is part of its fingerprint.
        left_out = {"count"} | ({"test_share"} if config["pyramids"]["split"] != "sample" else set())
        chosen = {name: value for name, value in config["pyramids"].items() if name not in left_out}
        return dict(pyramids=chosen, tissue=config["tissue"], screen_mpp=config["screen"]["mpp"], seed=config["seed"])

    def samples(self, ref: "SlideRef", facts: dict[str, Any], counts: Counter, seconds: dict[str, float], report: Report) -> Iterator[Sample]:
        """Every sample of a slide, blank ones without their images; fills `facts` and `counts` of the row."""
        raise NotImplementedError

    def process(self, ref: "SlideRef", facts: dict[str, Any], seconds: dict[str, float], report: Report) -> pr.PyramidRow:
        if mf.printable(ref.id) != ref.id:
            raise SlideError("its name is not valid UTF-8 text and could not be written to any table; rename it")
        # Before anything is read: a slide that changes meanwhile does not match it, and is done again.
        whole = self.fingerprint(ref)
        self.folder.forget(ref.id, self.folder.layout.files)
        counts: Counter = Counter()
        stored: dict[str, list[list[Any]]] = {}
        shards = {split: self.folder.slide(ref.id) / name for split, name in self.folder.layout.shards.items()}
        with contextlib.ExitStack() as stack:
            writers: dict[str, records.ShardWriter] = {}
            for sample in stack.enter_context(contextlib.closing(self.samples(ref, facts, counts, seconds, report))):
                seconds["encode"] = seconds.get("encode", 0.0) + sample.seconds
                if not sample.encoded:
                    counts["blank"] += 1
                    continue
                begin = time.perf_counter()
                if sample.split not in writers:
                    writers[sample.split] = stack.enter_context(records.ShardWriter(shards[sample.split]))
                writers[sample.split].write(self._record(ref, sample, facts.get("finest_mpp")))
                stored.setdefault(sample.split, []).append([
                    sample.x, sample.y, sample.width, sample.height, sample.label, round(sample.tissue, 4), sample.mean,
                    *([sample.image] if sample.image else ()),
                ])
                seconds["write"] = seconds.get("write", 0.0) + time.perf_counter() - begin
        count = sum(len(each) for each in stored.values())
        if stored:
            self.folder.shards[ref.id] = {split: shards[split] for split in stored}
        known = {**facts, **counts, "tiles": count}
        reason = "" if count else _why_empty(counts, self.config.pyramids)
        row = pr.PyramidRow(**known, status=mf.OK if count else mf.EMPTY, reason=reason)
        self.folder.close_slide(row, ref.id, whole, samples=stored)
        return row

    def _record(self, ref: "SlideRef", sample: Sample, mpp: float | None) -> bytes:
        images = {pr.level_name(level): data for level, data in enumerate(sample.encoded)}
        scale = float("nan") if mpp is None else mpp
        # Images of one group have one id and equal positions: the file tells their samples apart.
        name = records.example_id(f"{ref.id}\n{sample.image}" if sample.image else ref.id, sample.x, sample.y, scale)
        fields = dict(slide=ref.id, x=sample.x, y=sample.y, label=sample.label, mpp=scale, id=name, file=sample.image)
        return encode_example({**images, **fields}, pr.kinds(len(images), bool(sample.image)))

    def encode(self, crops: Sequence[np.ndarray], x: int, y: int, label: str, split: str, mpp: float | None, tissue: float | None = None) -> Sample:
        """Judges and encodes the crops of one place, the finest first; runs in the threads of `ordered_map`."""
        begin, settings = time.perf_counter(), self.config.pyramids
        tissue = tissue_share(crops[0], mpp, self.config) if tissue is None else tissue
        stored = crops if tissue >= settings.min_tissue else ()
        encoded = [tiles.encode_tile(np.ascontiguousarray(crop), settings.codec, settings.quality) for crop in stored]
        mean = [round(float(value) / 255, 6) for value in crops[0].mean((0, 1), dtype=np.float64)]
        height, width = crops[0].shape[:2]
        return Sample(encoded, x, y, width, height, label, split, float(tissue), mean, time.perf_counter() - begin)


class SlidePyramids(PyramidJob):
    """The pyramids of slides. `places_of`: the table's places by slide id, or None for a grid over the tissue; `shares`: at most so many of each."""

    places_of: Mapping[str, list[places.Place]] | None = None
    shares: Mapping[str, int] = {}

    def limit(self, slide: str) -> int:
        """At most so many samples of a slide; 0: all."""
        limits = [limit for limit in (int(self.config.pyramids.per_slide), self.shares.get(slide, 0)) if limit > 0]
        return min(limits, default=0)

    def fingerprint(self, ref: "SlideRef", *groups: str) -> str:
        settings = self.settings(groups)
        if not groups:
            settings["pyramids"]["per_slide"] = self.limit(ref.id)
            settings["places"] = None if self.places_of is None else self.places_of.get(ref.id, [])
            settings["label"] = self.label_of.get(ref.id, {})
        return mf.fingerprint(ref.path, settings, self.mpp[ref.id])

    def samples(self, ref: "SlideRef", facts: dict[str, Any], counts: Counter, seconds: dict[str, float], report: Report) -> Iterator[Sample]:
        from wavepath.data.slides import open_slide, require_mpp

        settings, size, begin = self.config.pyramids, int(self.config.pyramids.size), time.perf_counter()
        with open_slide(ref.path, mpp=self.mpp[ref.id], cache_mb=CACHE_MB) as slide:
            facts.update(width=slide.dimensions[0], height=slide.dimensions[1], backend=slide.backend)
            facts.update(mpp=require_mpp(slide), mpp_source=slide.mpp_source)
            ladder = places.make_ladder(slide, settings)
            facts.update(finest_mpp=float(ladder.mpp), own_levels=" ".join(str(k) for k, own in enumerate(ladder.own) if own is not None))
            seconds["open"] = time.perf_counter() - begin
            if min(ladder.width, ladder.height) < size:
                has = f"{ladder.width} x {ladder.height} px at {ladder.mpp:.4g} mpp"
                raise SlideError(f"it has {has}, less than one crop of {size} px; give a smaller --size")
            if self.places_of is not None:
                labels = self._from_table(ref, ladder, counts)
                tissue: dict[Corner, float] = {}
            else:
                begin = time.perf_counter()
                screening = self.screened(ref, slide, lambda share: report(SCREENING_SHARE * share, "screening"))
                seconds["screen"] = time.perf_counter() - begin
                corners = places.tissue_grid(ladder, size)
                x, y = np.array(corners, np.float64).reshape(-1, 2).T * ladder.step
                covered = screening.tissue.fractions(x, y, size * ladder.step, size * ladder.step)
                tissue = {corner: float(value) for corner, value in zip(corners, covered, strict=True) if value >= settings.min_tissue}
                labels = dict.fromkeys(tissue, "")
                counts.update(places=len(corners), blank=len(corners) - len(tissue))
            kept = places.draw(ref.id, list(labels), self.limit(ref.id), self.config.seed)
            counts["limit"] = len(labels) - len(kept)
            if settings.split == "sample":
                splits = dict(zip(kept, places.split_samples(ref.id, kept, settings.test_share, self.config.seed), strict=True))
                if common := places.overlaps(splits, size):
                    console.warn(f"{ref.id}: {common} test samples overlap training samples; --split=slide keeps them apart")
            else:
                splits = dict.fromkeys(kept, "train")  # a slide moves as a whole, when all are done
            usual = self.label_of.get(ref.id, {}).get("label", "")

            def make(corner: Corner) -> Sample:
                crops = places.read_levels(slide, ladder, corner, size)
                label = labels[corner] or usual
                return self.encode(crops, *ladder.centre(corner, size), label, splits[corner], ladder.mpp, tissue.get(corner))

            for number, sample in enumerate(ordered_map(make, kept, self.workers), start=1):
                report(SCREENING_SHARE + (1 - SCREENING_SHARE) * number / len(kept), f"{number}/{len(kept)} places")
                yield sample

    def _from_table(self, ref: "SlideRef", ladder: places.Ladder, counts: Counter) -> dict[Corner, str]:
        """The corners of the table's places that lie on the slide, in reading order, with their labels."""
        found: dict[Corner, str] = {}
        size, given = int(self.config.pyramids.size), self.places_of.get(ref.id, [])
        counts["places"] = len(given)
        for place in given:
            corner = ladder.corner(place, size)
            if not ladder.inside(corner, size):
                counts["edge"] += 1
            elif corner in found:
                counts["repeated"] += 1
            else:
                found[corner] = place.label
        return {corner: found[corner] for corner in sorted(found, key=lambda corner: corner[::-1])}


def ordered_map(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """`function` of every item, in their order, computed by a pool of threads with a few results waiting at most."""
    todo = iter(items)
    pending: deque[Future] = deque()
    pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="pyramids")
    try:
        while True:
            while len(pending) < 2 * max(1, workers) and (item := next(todo, None)) is not None:
                pending.append(pool.submit(function, item))
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def tissue_share(rgb: np.ndarray, mpp: float | None, config: ConfigDict) -> float:
    """Share of an image uint8[h, w, 3] that tissue covers, judged at about 2 um per pixel; without an mpp, `pyramids.mpp` is assumed."""
    from wavepath.data.tissue import assess_image

    factor, scale = 1, mpp or config.pyramids.mpp or 0.25
    while scale * factor * 2 <= _JUDGED_MPP * 1.5 and min(rgb.shape[:2]) // (factor * 2) >= _JUDGED_SIDE:
        factor *= 2
    settings = config.tissue.copy_and_resolve_references()
    settings.blur = False  # told from the rest of a slide, of which a crop knows nothing
    return assess_image(average(np.ascontiguousarray(rgb), factor) if factor > 1 else rgb, settings, scale * factor).tissue


def _why_empty(counts: Mapping[str, int], settings: ConfigDict) -> str:
    reasons = {
        "blank": f"have less than {settings.min_tissue:.0%} tissue", "edge": "reach over the edge", "small": f"are below {settings.min_size} px",
        "unreadable": "cannot be read",
    }
    told = [f"{counts[name]} {text}" for name, text in reasons.items() if counts.get(name)]
    return f"no sample: of {counts.get('places', 0)} places " + ", ".join(told) if told else "the table of coordinates names no place on it"


def check_settings(config: ConfigDict) -> None:
    """Settings that no slide could be done with: one error now instead of one for each slide.

    Raises:
        ConfigError: naming the field.
    """
    settings = config.pyramids
    if not 1 <= settings.levels <= _MOST_LEVELS:
        raise ConfigError(f"pyramids.levels is 1 to {_MOST_LEVELS}, not {settings.levels}")
    unit = 2 ** (settings.levels - 1)
    if settings.size < 8 * unit or settings.size % unit:
        raise ConfigError(f"pyramids.size is {settings.size}; with {settings.levels} levels it is a multiple of {unit} from {8 * unit}")
    if settings.mpp and not 0.05 <= settings.mpp <= 20:
        raise ConfigError(f"pyramids.mpp is 0.05 to 20 um per px, or 0 for the slides' own, not {settings.mpp:g}")
    if settings.split not in ("slide", "sample"):
        raise ConfigError(f"pyramids.split is {settings.split!r}; it is 'slide' or 'sample'")
    if settings.codec not in tiles.CODECS or not 1 <= settings.quality <= 100:
        raise ConfigError(f"pyramids.codec is one of {', '.join(tiles.CODECS)}, pyramids.quality 1 to 100")
    if settings.per_slide < 0 or settings.count < 0:
        raise ConfigError("pyramids.per_slide and pyramids.count are not negative; 0 is no limit")
    if not 0 <= settings.test_share <= 1 or not 0 <= settings.min_tissue <= 1:
        raise ConfigError("pyramids.test_share and pyramids.min_tissue are shares, 0 to 1")


def make_pyramids(
    slides: Path, out: Path, config: ConfigDict, *, coords: Path | None = None, mpp_csv: Path | None = None, slide_mpp: float | None = None,
    labels: Path | None = None, strict: bool = False, workers: int = 2,
) -> PyramidResult:
    """Samples of slides, stored as a TFDS dataset in `out` (see `wavepath.data.pyramid_records`).

    A slide that cannot be read, has no mpp or fails in any other way is listed in `out/manifest.csv` with the reason, and the rest goes on.

    Args:
        slides: a folder of slides, searched through its subfolders, or one slide.
        config: the `prepare` config (`wavepath.defaults.prepare_defaults`), of which `pyramids`, `tissue`, `screen` and `seed` matter.
        coords: table `slide,x,y[,label]` of centres in level-0 pixels; None: a grid over the tissue.
        mpp_csv, slide_mpp: as of `wavepath.data.prepare.prepare`.
        labels: table `case_id,slide_id,label`: labels where the coordinates have none, and cases, which are not divided by the split.
        strict: stop at the first slide that gives no sample.
        workers: threads that read and encode.

    Raises:
        WavepathError: no slides, an unusable config or table, an unwritable or full `out`, samples of other slides in `out`, another process in
            it (LockedError), one slide where two are needed for the split, or, under `strict`, a slide that gave nothing.
    """
    from wavepath.data.slides import read_labels, read_mpp_csv

    check_settings(config)
    slides, out = Path(slides), Path(out)
    if slide_mpp is not None:
        resolve((), slide_mpp, slides)
    root, refs = slides_in(slides, out)
    given = given_mpp(refs, read_mpp_csv(mpp_csv) if mpp_csv else {}, slide_mpp)
    label_of = match_labels(refs, read_labels(labels) if labels else [])
    table = places.match_places(refs, places.read_places(coords)) if coords else None
    if table is not None:
        refs = [ref for ref in refs if ref.id in table]  # a list of places says which slides are meant
    if config.pyramids.split == "slide":
        places.split_slides({ref.id: label_of.get(ref.id, {}).get("case_id") or ref.id for ref in refs}, config.pyramids.test_share, config.seed)
    job = SlidePyramids(root, config, workers, None, given)
    job.places_of, job.label_of = table, label_of
    if config.pyramids.count:
        job.shares = places.shares([ref.id for ref in refs], int(config.pyramids.count), config.seed)
    return run_job(job, refs, out, whole_folder=slides.is_dir(), strict=strict)


def run_job(job: PyramidJob, refs: "Sequence[SlideRef]", out: Path, *, whole_folder: bool, strict: bool) -> PyramidResult:
    """Does what is not whole yet, and puts the dataset together."""
    with storage_errors(out), folder_lock(writable_folder(out), pr.LOCK):
        job.folder = mf.PreparedFolder(out, pr.LAYOUT)
        timings = mf.Timings(out)
        job.drop_other_slides(refs, whole_folder)
        rows = job.kept_rows(refs)
        todo = [ref for ref in refs if ref.id not in rows]
        rows |= job.run(todo, timings, strict)
        ordered = [dataclasses.replace(rows[ref.id], **job.label_of.get(ref.id, {})) for ref in refs]
        ordered, mean = publish(job.folder, ordered, job.config, str(job.root.resolve()))
        timings.save()
    samples, failed = sum(row.tiles for row in ordered), sum(row.status == mf.FAILED for row in ordered)
    return PyramidResult(
        rows=ordered, reused=len(refs) - len(todo), mean=mean, exit_code=EXIT_NOTHING if not samples else EXIT_PARTIAL if failed else EXIT_OK,
        seconds={stage: timings.total(stage, [ref.id for ref in todo]) for stage in mf.TIMING_COLUMNS[1:-1]},
    )
