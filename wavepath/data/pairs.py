"""H&E beside its immunostain, for virtual staining: pairs are checked, registered, divided by slide and stored (METHODS 3.5).

Of each pair the sizes are compared and the shift is estimated (`wavepath.data.registration`), with the tissue and the sharpness of both sides; all of
it is listed in `OUT/pairs.csv`. A pair that is surely shifted by more than `pairs.max_shift` is kept, left out, or corrected: both sides are cut to
what they share. A pair that cannot be read is listed with the reason, and the rest goes on.

As with tiles, one slide is one shard, what is whole is kept, and a run that is killed is finished by the same command to the same bytes.
"""

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from wavepath import console
from wavepath.data import manifest as mf
from wavepath.data import pair_records as pr
from wavepath.data import records, tiles
from wavepath.data.examples import encode_example
from wavepath.data.mpp import resolve
from wavepath.data.pair_files import PairFiles, read_pair
from wavepath.data.pair_folder import publish
from wavepath.data.pyramids import ordered_map, tissue_share
from wavepath.data.registration import MIN_SHARPNESS, estimate_shift, overlap, sharpness
from wavepath.data.slide_lists import SlideRef
from wavepath.data.slide_runs import Report, SlideJob, relative, storage_errors
from wavepath.errors import EXIT_NOTHING, EXIT_OK, EXIT_PARTIAL, ConfigError
from wavepath.files import folder_lock, writable_folder

ON_SHIFT, ON_UNSURE = ("keep", "drop", "correct"), ("keep", "drop")
_UNIT = 8  # sides of corrected pairs are a multiple of it
_LEAST = 32  # px of a side that a shift can be told from
_TISSUE_MPP = 0.5  # where no mpp is given


@dataclasses.dataclass(frozen=True)
class PairsResult:
    """What `make_pairs` did. `rows` is the manifest, `pairs` the table of pairs; `reused` counts the slides that were whole already."""

    rows: list[pr.PairSlideRow]
    pairs: list[pr.PairRow]
    reused: int
    exit_code: int
    seconds: dict[str, float]

    def count(self, name: str) -> int:
        """A count of the manifest, summed over slides."""
        return sum(getattr(row, name) for row in self.rows)


@dataclasses.dataclass(frozen=True)
class Judged:
    """One pair on its way to disk: its row, its sides encoded (none where it is not stored), the shift that remains, the seconds of each stage."""

    row: pr.PairRow
    encoded: list[bytes]
    dx: int
    dy: int
    seconds: dict[str, float]


class PairJob(SlideJob):
    """`members`: the pairs of each slide."""

    title, product = "pairs", "pairs"
    members: Mapping[str, Sequence[PairFiles]] = {}

    def settings(self, groups: Sequence[str]) -> dict[str, Any]:
        config = self.config.to_dict()
        # Which slides are for testing is decided when all are done, and moves no pixel.
        chosen = {name: value for name, value in config["pairs"].items() if name != "test_share"}
        return dict(pairs=chosen, tissue=config["tissue"])

    def fingerprint(self, ref: SlideRef, *groups: str) -> str:
        settings = self.settings(groups)
        settings["pairs_of"] = [
            [pair.name, pair.label, pair.split, *(_file_fingerprint(path) for path in pair.paths)] for pair in self.members[ref.id]
        ]
        return mf.fingerprint(ref.path, settings, self.mpp[ref.id]) if ref.path.exists() else repr(settings)

    def process(self, ref: SlideRef, facts: dict[str, Any], seconds: dict[str, float], report: Report) -> pr.PairSlideRow:
        # Before anything is read: a file that changes meanwhile does not match it, and is done again.
        whole = self.fingerprint(ref)
        self.folder.forget(ref.id, self.folder.layout.files)
        mpp, given = self.mpp[ref.id], self.members[ref.id]
        facts["mpp"] = mpp
        counts: Counter = Counter(places=len(given))
        shards = {split: self.folder.slide(ref.id) / name for split, name in self.folder.layout.shards.items()}
        stored: Counter = Counter()
        rows: list[pr.PairRow] = []
        with contextlib.ExitStack() as stack:
            writers: dict[str, records.ShardWriter] = {}
            judged = stack.enter_context(contextlib.closing(ordered_map(lambda pair: self.judge(pair, mpp), given, self.workers)))
            for number, each in enumerate(judged, start=1):
                for stage, took in each.seconds.items():
                    seconds[stage] = seconds.get(stage, 0.0) + took
                row, split = each.row, each.row.split or "train"  # a slide without splits moves as a whole, when all are done
                if each.encoded:
                    begin = time.perf_counter()
                    if split not in writers:
                        writers[split] = stack.enter_context(records.ShardWriter(shards[split]))
                    writers[split].write(self._record(each))
                    row = dataclasses.replace(row, record=stored[split])
                    stored[split] += 1
                    seconds["write"] = seconds.get("write", 0.0) + time.perf_counter() - begin
                elif row.status == pr.BAD and len(given) > 1:
                    console.warn(f"{row.name}: {row.reason}")
                rows.append(row)
                self._count(row, counts)
                report(number / len(given), f"{number}/{len(given)} pairs")
        if stored:
            self.folder.shards[ref.id] = {split: shards[split] for split in stored}
        total = sum(stored.values())
        status = mf.OK if total else mf.FAILED if counts["bad"] == len(given) else mf.EMPTY
        reason = "" if total else rows[0].reason if len(rows) == 1 else f"none of {len(given)} pairs is stored; the first: {rows[0].reason}"
        known = dict(slide_id=facts["slide_id"], path=facts["path"], mpp=mpp)
        slide_row = pr.PairSlideRow(**known, **counts, tiles=total, status=status, reason=reason)
        self.folder.close_slide(slide_row, ref.id, whole, pairs=[dataclasses.asdict(row) for row in rows])
        return slide_row

    def _count(self, row: pr.PairRow, counts: Counter) -> None:
        counts["bad"] += row.status == pr.BAD
        counts["small"] += row.reason.startswith("small")
        if row.sure is not None:
            counts["unsure"] += not row.sure
            counts["shifted"] += bool(row.sure) and float(np.hypot(row.dx, row.dy)) > self.config.pairs.max_shift
        counts["corrected"] += row.corrected if row.status == pr.STORED else 0
        counts["blurred"] += bool(row.blur)

    def judge(self, pair: PairFiles, mpp: float | None) -> Judged:
        """Reads, checks and encodes one pair; runs in the threads of `ordered_map`."""
        settings, begin = self.config.pairs, time.perf_counter()
        names = {side: mf.printable(relative(path, self.root)) for side, path in zip(pr.SIDES, pair.paths, strict=False)}
        row = pr.PairRow(pair.slide, pair.name, pair.split, label=pair.label, mpp=mpp, **names)
        try:
            he, ihc = read_pair(pair)
        except ValueError as error:
            return Judged(dataclasses.replace(row, reason=str(error)), [], 0, 0, {})
        seconds, begin = {"read": time.perf_counter() - begin}, time.perf_counter()
        row = dataclasses.replace(row, status=pr.LEFT_OUT, width=he.shape[1], height=he.shape[0], x=0, y=0)

        def finished(**known: Any) -> Judged:
            seconds["screen"] = time.perf_counter() - begin
            return Judged(dataclasses.replace(row, **known), [], 0, 0, seconds)

        if min(he.shape[:2]) < max(settings.min_size, _LEAST):
            return finished(reason=f"small: {he.shape[1]} x {he.shape[0]} px")
        shift, sharp = estimate_shift(he, ihc), [sharpness(image) for image in (he, ihc)]
        covered = [round(tissue_share(image, mpp or _TISSUE_MPP, self.config), 4) for image in (he, ihc)]
        dull = [side for side, value in zip(pr.SIDES, sharp, strict=True) if value < MIN_SHARPNESS]
        row = dataclasses.replace(
            row, dx=shift.dx, dy=shift.dy, correlation=shift.correlation, peak=shift.peak, fine=shift.fine, sure=int(shift.sure), blur=" ".join(dull),
            he_tissue=covered[0], ihc_tissue=covered[1], he_sharpness=sharp[0], ihc_sharpness=sharp[1],
        )
        if not shift.sure and settings.on_unsure == "drop":
            return finished(reason=f"unsure: no shift stands out (peak {shift.peak:g})")
        dx, dy = shift.dx, shift.dy
        if shift.sure and shift.size > settings.max_shift and settings.on_shift != "keep":
            if settings.on_shift == "drop":
                return finished(reason=f"shifted by {dx}, {dy} px")
            first, second = overlap(*he.shape[:2], dx, dy, _UNIT)
            he, ihc = he[first], ihc[second]
            row = dataclasses.replace(row, corrected=1, width=he.shape[1], height=he.shape[0], x=first[1].start, y=first[0].start)
            if min(he.shape[:2]) < settings.min_size:
                return finished(reason=f"small: {he.shape[1]} x {he.shape[0]} px are shared at a shift of {dx}, {dy} px")
            dx = dy = 0
        seconds["screen"], begin = time.perf_counter() - begin, time.perf_counter()
        encoded = [tiles.encode_tile(np.ascontiguousarray(image), settings.codec, settings.quality) for image in (he, ihc)]
        seconds["encode"] = time.perf_counter() - begin
        return Judged(dataclasses.replace(row, status=pr.STORED), encoded, dx, dy, seconds)

    def _record(self, judged: Judged) -> bytes:
        row = judged.row
        scale = float("nan") if row.mpp is None else row.mpp
        name = records.example_id(f"{row.slide_id}\n{row.name}", row.x, row.y, scale)
        fields = dict(slide=row.slide_id, label=row.label, x=row.x, y=row.y, dx=judged.dx, dy=judged.dy, mpp=scale, id=name)
        return encode_example({**dict(zip(pr.SIDES, judged.encoded, strict=True)), **fields}, pr.KINDS)


def _file_fingerprint(path: Path) -> str:
    return mf.fingerprint(path, {}, None) if path.exists() else "missing"


def check_settings(config: ConfigDict) -> None:
    """Settings that no pair could be done with: one error now.

    Raises:
        ConfigError: naming the field.
    """
    settings = config.pairs
    if settings.on_shift not in ON_SHIFT or settings.on_unsure not in ON_UNSURE:
        raise ConfigError(f"pairs.on_shift is one of {', '.join(ON_SHIFT)}, pairs.on_unsure one of {', '.join(ON_UNSURE)}")
    if settings.max_shift < 0:
        raise ConfigError(f"pairs.max_shift is 0 px or more, not {settings.max_shift:g}")
    if settings.codec not in tiles.CODECS or not 1 <= settings.quality <= 100:
        raise ConfigError(f"pairs.codec is one of {', '.join(tiles.CODECS)}, pairs.quality 1 to 100")
    if not 0 <= settings.test_share <= 1:
        raise ConfigError("pairs.test_share is a share, 0 to 1")
    if settings.min_size < _UNIT:
        raise ConfigError(f"pairs.min_size is {_UNIT} px or more, not {settings.min_size}")


def make_pairs(
    pairs: Sequence[PairFiles], root: Path, out: Path, config: ConfigDict, *, mpp: float | None = None, strict: bool = False, workers: int = 2
) -> PairsResult:
    """Stores pairs as a TFDS dataset in `out` (see `wavepath.data.pair_records`).

    Args:
        pairs: from `wavepath.data.pair_files`; all of them say on which side of the split they are, or none.
        root: the folder that they come from.
        config: the `prepare` config, of which `pairs`, `tissue` and `seed` matter.
        mpp: micrometres per pixel of all of them; None: not known.
        strict: stop at the first slide of which no pair is stored.
        workers: threads that read, register and encode.

    Raises:
        WavepathError: unusable settings, an unwritable or full `out`, pairs of other slides in `out`, another process in it (LockedError), one slide
            where two are needed for the split, or, under `strict`, a slide that gave nothing.
    """
    check_settings(config)
    root, out = Path(root), Path(out)
    if mpp is not None:
        resolve((), mpp, root)
    if out.resolve() in (root.resolve(), *root.resolve().parents):
        raise ConfigError(f"--out {out} is the folder of the pairs, or holds it; choose another one")
    # The picture of an earlier run is an image too, should `out` lie among the pairs.
    pairs = [pair for pair in pairs if out.resolve() not in pair.he.resolve().parents]
    members: dict[str, list[PairFiles]] = {}
    for pair in sorted(pairs, key=lambda pair: (pair.slide, pair.name)):
        members.setdefault(pair.slide, []).append(pair)
    if odd := [name for name in members if name.startswith("/") or {"", ".", ".."} & set(name.split("/"))]:
        raise ConfigError(f"the slide {odd[0]!r} has no name that a folder can have; name slides by letters, digits and the like")
    told = sum(bool(pair.split) for pair in pairs)
    if 0 < told < len(pairs):
        lost = next(pair.name for pair in pairs if not pair.split)
        raise ConfigError(f"{told} of {len(pairs)} pairs say whether they are for training or for testing, and {lost!r} does not; name all or none")
    if not told:
        if len(members) == 1 and 0 < config.pairs.test_share < 1:
            raise ConfigError("one slide cannot be on both sides of training and test; name a split for every pair, or give --test-share=0")
    elif both := [name for name, group in members.items() if len({pair.split for pair in group}) > 1]:
        console.warn(f"{len(both)} slides have pairs for training and for testing (first: {both[0]!r}); numbers on them are too good")
    refs = [SlideRef(group[0].he, name) for name, group in members.items()]
    job = PairJob(root, config, workers, None, dict.fromkeys(members, mpp))
    job.members = members
    with storage_errors(out), folder_lock(writable_folder(out), pr.LOCK):
        job.folder = mf.PreparedFolder(out, pr.LAYOUT)
        timings = mf.Timings(out)
        job.drop_other_slides(refs, True)
        rows = job.kept_rows(refs)
        todo = [ref for ref in refs if ref.id not in rows]
        rows |= job.run(todo, timings, strict)
        ordered, listed = publish(job.folder, [rows[ref.id] for ref in refs], members, config, str(root.resolve()), bool(told))
        timings.save()
    stored, bad = sum(row.tiles for row in ordered), sum(row.status == pr.BAD for row in listed)
    return PairsResult(
        rows=ordered, pairs=listed, reused=len(refs) - len(todo), exit_code=EXIT_NOTHING if not stored else EXIT_PARTIAL if bad else EXIT_OK,
        seconds={stage: timings.total(stage, [ref.id for ref in todo]) for stage in mf.TIMING_COLUMNS[1:-1]},
    )
