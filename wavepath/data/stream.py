"""Tiles read from the slides while training runs: coordinates only in memory, no tile dump.

Every slide is screened once at the start with the settings of `config.prepare`, exactly as `wavepath prepare` does, and its plan
of tiles is kept. So example `i` of a stream is example `i` of the dataset prepared from the same slides. Pixels are equal to the bit: with
`tiles.codec=png` as read, with `jpeg` passed through the encoder and the decoder of the prepared dataset.

With `data.order=blocks` the pipeline says ahead of time which examples come next (a window of regions). They are read region by region
in a thread pool, each of the slide's own tiles decoded about once, and handed out one by one; what is waiting is bounded by
`data.cache_mb`. An example that nobody announced is read on its own, with whatever else of its region is in the same batch.
"""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from wavepath import console
from wavepath.data.decode import thread_count
from wavepath.data.manifest import one_line
from wavepath.data.sources import Source, Span
from wavepath.errors import ConfigError, DatasetError, WavepathError

if TYPE_CHECKING:
    from wavepath.data.slides import Slide
    from wavepath.data.tiles import TilePlan

_OPEN_SLIDES = 32  # files held open at a time; their decoded native tiles share one cache


@dataclass(frozen=True)
class PlannedSlide:
    """One slide of a stream: where it is, the mpp given for it (None: its own), and its tiles."""

    slide_id: str
    path: Path
    mpp: float | None
    plan: "TilePlan"


class SlidePool:
    """Open slides, the least recently used closed beyond a limit; one that is in use is never closed."""

    def __init__(self, opener: Callable[[PlannedSlide], "Slide"], limit: int = _OPEN_SLIDES):
        self._open, self._limit = opener, limit
        self._lock = threading.Lock()
        self._slides: OrderedDict[str, Any] = OrderedDict()
        self._users: dict[str, int] = {}

    @contextlib.contextmanager
    def slide(self, planned: PlannedSlide) -> Iterator["Slide"]:
        """The open slide for the length of a block; opened where it is not."""
        key = planned.slide_id
        with self._lock:
            # Opening takes milliseconds and happens once for each visit; two threads must not both do it.
            if key not in self._slides:
                self._slides[key] = self._open(planned)
            self._slides.move_to_end(key)
            self._users[key] = self._users.get(key, 0) + 1
            slide = self._slides[key]
        try:
            yield slide
        finally:
            with self._lock:
                self._users[key] -= 1
                idle = [name for name in self._slides if not self._users.get(name)]
                for name in idle[: max(0, len(self._slides) - self._limit)]:
                    self._slides.pop(name).close()

    def close(self) -> None:
        """Closes what is not in use."""
        with self._lock:
            for name in [name for name in self._slides if not self._users.get(name)]:
                self._slides.pop(name).close()


class StreamSource(Source):
    """Tiles read from slides on demand. Made by `open_stream`.

    Args:
        name: the slides folder.
        slides: the slides with at least one tile, in the order of their ids.
        settings: the `prepare` config (size, codec and quality of the tiles).
        threads: reading threads.
        cache_mb: bound on the tiles read ahead, in MiB.
        opener: opens a planned slide.
        left_out: slides that could not be read, with the reasons.
    """

    kind = "stream"
    best_order = "blocks"

    def __init__(
        self, name: str, slides: Sequence[PlannedSlide], settings: ConfigDict, *, threads: int, cache_mb: int,
        opener: Callable[[PlannedSlide], "Slide"], left_out: Mapping[str, str] | None = None,
    ):
        size = int(settings.tiles.size)
        self.name, self.threads, self.image_shape = name, thread_count(threads), (size, size, 3)
        self.left_out = dict(left_out or {})
        self._codec, self._quality = settings.tiles.codec, int(settings.tiles.quality)
        self._planned = list(slides)
        self.spans, sizes, start = [], [], 0
        for planned in self._planned:
            plan = planned.plan
            self.spans.append(Span(planned.slide_id, start, start + len(plan), float(plan.mpp), float(plan.mpp * plan.size / plan.footprint)))
            sizes.append(_run_lengths(planned.plan.region))
            start += len(planned.plan)
        self.blocks = np.concatenate(sizes) if sizes else np.zeros(0, np.int64)
        self._block_stops = np.cumsum(self.blocks)
        self._slides = SlidePool(opener)
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="stream")
        self._limit = max(1, (cache_mb << 20) // (size * size * 3))
        self._lock = threading.Lock()
        self._ahead: dict[int, tuple[Future, int]] = {}  # example -> the read that brings it, and its place there
        self._said_full = False

    def _groups(self, example_ids: np.ndarray) -> list[np.ndarray]:
        """Places in `example_ids` that belong to one block each, in the order of first appearance."""
        block = np.searchsorted(self._block_stops, example_ids, side="right")
        groups: dict[int, list[int]] = {}
        for place, number in enumerate(block.tolist()):
            groups.setdefault(number, []).append(place)
        return [np.array(places) for places in groups.values()]

    def _load(self, example_ids: np.ndarray, finish: Callable[[np.ndarray], Any]) -> list[Any]:
        """`finish(rgb)` of examples of one slide; runs in the pool.

        Raises:
            DatasetError: naming the slide and the first example.
        """
        from wavepath.data.tiles import read_tiles

        number = int(np.searchsorted(self._stops, example_ids[0], side="right"))
        planned, start = self._planned[number], self.spans[number].start
        try:
            with self._slides.slide(planned) as slide:
                pixels = read_tiles(slide, planned.plan, (example_ids - start).tolist())
        except (WavepathError, OSError) as error:
            raise DatasetError(
                f"{planned.path}: a tile of examples {int(example_ids.min())} to {int(example_ids.max())} cannot be read ({one_line(error)}); "
                "leave the slide out with --config.data.exclude_slides, or set --config.data.on_corrupt=replace"
            ) from None
        return [finish(rgb) for rgb in pixels]

    def _stored(self, rgb: np.ndarray) -> np.ndarray:
        """The pixels as a prepared dataset would give them back."""
        from wavepath.data.tiles import decode_tile, encode_tile

        return decode_tile(encode_tile(rgb, self._codec, self._quality)) if self._codec == "jpeg" else rgb

    def _encoded(self, rgb: np.ndarray) -> bytes:
        from wavepath.data.tiles import encode_tile

        return encode_tile(rgb, self._codec, self._quality)

    def read(self, example_ids: Iterable[int]) -> list[bytes]:
        ids = self._checked(np.fromiter(example_ids, np.int64))
        out: list[bytes] = [b""] * len(ids)
        jobs = [(places, self._pool.submit(self._load, ids[places], self._encoded)) for places in self._groups(ids)]
        for places, job in jobs:
            for place, encoded in zip(places.tolist(), job.result(), strict=True):
                out[place] = encoded
        return out

    def images(self, example_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = self._checked(example_ids)
        out = np.empty((len(ids), *self.image_shape), np.uint8)
        with self._lock:
            announced = [self._ahead.pop(index, None) for index in ids.tolist()]
        missing = np.array([place for place, found in enumerate(announced) if found is None], np.int64)
        jobs = [(missing[places], self._pool.submit(self._load, ids[missing[places]], self._stored)) for places in self._groups(ids[missing])]
        for place, found in enumerate(announced):
            if found is not None:
                tiles, number = found[0].result(), found[1]
                # Let go of at once: the read keeps the rest of its region, and what is held is to be what is still waiting.
                out[place], tiles[number] = tiles[number], None
        for places, job in jobs:
            for place, rgb in zip(places.tolist(), job.result(), strict=True):
                out[place] = rgb
        return out

    def prefetch(self, example_ids: Sequence[int] | np.ndarray) -> None:
        ids = self._checked(example_ids)
        for places in self._groups(ids):
            wanted = ids[places]
            with self._lock:
                wanted = np.array([index for index in wanted.tolist() if index not in self._ahead], np.int64)
                if not wanted.size:
                    continue
                if len(self._ahead) + len(wanted) > self._limit:
                    self._full(len(ids))
                    return
                job = self._pool.submit(self._load, wanted, self._stored)
                self._ahead.update({index: (job, place) for place, index in enumerate(wanted.tolist())})

    def _full(self, wanted: int) -> None:
        if not self._said_full:
            size = self.image_shape[0]
            need = 2 * wanted * size * size * 3 >> 20
            console.warn(
                f"data.cache_mb is too small to read a window of regions ahead, so that some are read twice; raise it to about {need + 1} "
                "or lower --config.data.window"
            )
            self._said_full = True

    def forget(self) -> None:
        with self._lock:
            for job, _ in self._ahead.values():
                job.cancel()
            self._ahead.clear()

    def meta(self, example_id: int) -> dict[str, Any]:
        from wavepath.data.records import example_id as name_of

        (index,) = self._checked([example_id]).tolist()
        number = int(np.searchsorted(self._stops, index, side="right"))
        planned, place = self._planned[number], index - self.spans[number].start
        plan = planned.plan
        x, y = int(plan.x[place]), int(plan.y[place])
        return {
            "slide": planned.slide_id, "x": x, "y": y, "mpp": float(np.float32(plan.mpp)), "slide_mpp": self.spans[number].slide_mpp,
            "energy": float(plan.energy[place]), "region": int(plan.region[place]), "id": name_of(planned.slide_id, x, y, plan.mpp),
        }

    def close(self) -> None:
        self.forget()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._slides.close()


def _run_lengths(values: np.ndarray) -> np.ndarray:
    """Lengths of the runs of equal neighbours: [4, 4, 7, 4] -> [2, 1, 1]."""
    values = np.asarray(values)
    if not values.size:
        return np.zeros(0, np.int64)
    ends = np.concatenate([np.flatnonzero(values[1:] != values[:-1]) + 1, [len(values)]])
    return np.diff(np.concatenate([[0], ends])).astype(np.int64)


def plan_slide(slide: "Slide", slide_id: str, settings: ConfigDict) -> "TilePlan":
    """Screens an open slide and lays its tile grid, as `wavepath prepare` does: the same regions, the same tiles, the same order.

    Raises:
        MissingMppError: no mpp in the file and none given.
        SlideError: the slide cannot be read, or is coarser than `tiles.require_mpp` allows.
    """
    from wavepath.data.screening import screen, select
    from wavepath.data.slides import require_mpp
    from wavepath.data.tiles import tile_grid, tile_resolution

    require_mpp(slide)
    tile_resolution(slide, settings)  # refused before the work of screening
    screening = screen(slide, settings)
    selected = select(
        screening.regions, mode=settings.select.mode, top=settings.select.top, threshold=settings.select.threshold,
        count=settings.select.count or None, seed=settings.seed, slide_id=slide_id,
    )
    return tile_grid(slide, screening, selected, settings, slide_id)


def open_stream(config: ConfigDict, exclude: Sequence[str] = ()) -> StreamSource:
    """Screens the slides below `config.data.slides` (less those in `exclude`) and opens them as a source.

    Slides that cannot be read, or give no tiles, are named with the reason, and the others are used.

    Raises:
        DatasetError: no slide gives a tile, or all of them are excluded.
    """
    from wavepath.data.mpp import given_mpp
    from wavepath.data.slides import TileCache, find_slides, open_slide, read_mpp_csv

    data, settings = config.data, config.prepare
    folder = Path(data.slides)
    refs = find_slides(folder)
    given = given_mpp(refs, read_mpp_csv(Path(data.mpp_csv)) if data.mpp_csv else {}, data.slide_mpp or None)
    missing = sorted(set(exclude) - {ref.id for ref in refs})
    if missing and len(missing) == len(set(exclude)):
        raise DatasetError(
            f"data.exclude_slides names {len(missing)} slides, none of which is in {folder} (first: {missing[0]!r}; a slide there: {refs[0].id!r})"
        )
    if missing:
        console.warn(f"data.exclude_slides: {len(missing)} of {len(set(exclude))} slides are not in {folder} (first: {missing[0]!r})")
    refs = [ref for ref in refs if ref.id not in set(exclude)]

    # Half of the memory for decoded native tiles, half for tiles read ahead.
    half = max(1, data.cache_mb // 2)
    native = TileCache(half << 20)

    def opener(planned: PlannedSlide) -> "Slide":
        return open_slide(planned.path, mpp=planned.mpp, cache=native)

    planned: list[PlannedSlide] = []
    left_out: dict[str, str] = {}
    with console.progress("screening", len(refs), "slides") as bar:
        for ref in refs:
            try:
                with open_slide(ref.path, mpp=given[ref.id]) as slide:
                    plan = plan_slide(slide, ref.id, settings)
            except ConfigError:
                raise
            except Exception as error:  # as `wavepath prepare` does: whatever is wrong with one slide concerns that slide
                left_out[ref.id] = one_line(error if isinstance(error, WavepathError) else f"{type(error).__name__}: {error}")
                console.warn(f"{ref.id}: left out, {left_out[ref.id]}")
                continue
            finally:
                bar.advance(1, ref.id)
            if not len(plan):
                console.warn(f"{ref.id}: gives no tiles (no region with enough tissue)")
            else:
                planned.append(PlannedSlide(ref.id, ref.path, given[ref.id], plan))
    if not planned:
        raise DatasetError(f"{folder}: none of {len(refs)} slides gives a tile ({len(left_out)} cannot be read); see the reasons above")
    return StreamSource(str(folder), planned, settings, threads=data.threads, cache_mb=half, opener=opener, left_out=left_out)
