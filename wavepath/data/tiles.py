"""From selected regions to tiles: which boxes of a slide are tiles, and their pixels, each of the slide's own tiles decoded once.

The tiles of a slide lie on one lattice that starts at its origin; a tile belongs to the region that holds its centre. So tiles never
overlap or repeat, whatever a region's side in level-0 pixels (a region of 448 um at 0.2527 um per pixel is 7.9 tiles of 224 px wide), and
at exactly 0.25 a region of 1792 px is its own 8 x 8 grid (METHODS 1.4).
"""

import dataclasses
import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from ml_collections import ConfigDict

from wavepath.data.mpp import SAME_MPP
from wavepath.errors import ConfigError, DatasetError, SlideError

if TYPE_CHECKING:
    from wavepath.data.screening import RegionTable, Screening
    from wavepath.data.slides import Slide

RUN = 8  # neighbouring tiles read in one go by a worker; bounds its memory
CODECS = ("jpeg", "png")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Tile:
    """One tile: `rgb` uint8[size, size, 3]; `x`, `y` its upper left corner in level-0 pixels; `mpp` of its pixels; `region` its index."""

    rgb: np.ndarray
    x: int
    y: int
    mpp: float
    energy: float
    region: int


@dataclasses.dataclass(frozen=True)
class TilePlan:
    """The tiles of a slide, region by region (in reading order), row by row within a region.

    `x`, `y`: int64[n] upper left corners in level-0 pixels. `column`, `row`: int64[n] place on the lattice. `region`: int64[n] index into the
    region table, `energy`: float32[n] of the region. `size`: side in pixels at `mpp`; `footprint`: side in level-0 pixels. `level`: the
    pyramid level whose pixels are taken as they are, or None where they are resampled to `mpp`. `selected`: bool[regions] that gave the
    tiles. `candidates`: tiles before the limit per slide.
    """

    x: np.ndarray
    y: np.ndarray
    column: np.ndarray
    row: np.ndarray
    region: np.ndarray
    energy: np.ndarray
    size: int
    mpp: float
    footprint: float
    level: int | None
    coarser: bool
    selected: np.ndarray
    candidates: int

    def __len__(self) -> int:
        return len(self.x)


def tile_resolution(slide: "Slide", settings: ConfigDict) -> tuple[float, int | None, bool]:
    """The mpp at which a slide gives tiles, the level read as it is (None: resampled), and whether that is coarser than asked.

    `tiles.mpp` is an upper resolution: a coarser slide keeps its own mpp; a finer one is read at its true footprint and resized, unless a
    level of it is within 1 % of what is asked, whose own mpp then counts.

    Raises:
        SlideError: the slide is coarser and `tiles.require_mpp` is set.
    """
    asked, own = float(settings.tiles.mpp), float(slide.mpp)
    if own > asked * (1 + SAME_MPP):
        if settings.tiles.require_mpp:
            raise SlideError(
                f"its {own:g} um/px are coarser than the {asked:g} asked for; leave out --require-mpp to take tiles at {own:g}, or give --mpp {own:g}"
            )
        return own, 0, True
    for number, level in enumerate(slide.levels):
        if abs(own * level.downsample / asked - 1) <= SAME_MPP:
            return own * level.downsample, number, False
    return asked, None, False


def tile_grid(slide: "Slide", screening: "Screening", selected: np.ndarray, settings: ConfigDict, slide_id: str = "") -> TilePlan:
    """The tiles of the selected regions: whole, with at least `tiles.min_tissue` tissue, at most `tiles.max_per_slide`.

    If no tile of the selected regions passes, the next best regions are tried one after the other, so that a slide with any tissue tile
    yields at least one; regions flagged for pen or blur are not among them.

    Args:
        selected: bool[n] over `screening.regions`, from `screening.select`.
        settings: the `prepare` config.
        slide_id: keys the draws of `max_per_slide` and of the next best regions of a random selection.

    Raises:
        SlideError: see `tile_resolution`.
    """
    mpp, level, coarser = tile_resolution(slide, settings)
    size, regions = int(settings.tiles.size), screening.regions
    footprint = size * (slide.levels[level].downsample if level is not None else mpp / slide.mpp)
    if level is not None:
        columns, rows = slide.levels[level].width // size, slide.levels[level].height // size
    else:
        columns, rows = (int((extent + 0.5) // footprint) for extent in slide.dimensions)
    selected = np.array(selected, dtype=bool)
    column, row, owner = _lattice(regions, footprint, columns, rows)
    keep = selected[owner]
    keep[keep] = _enough_tissue(screening, column[keep], row[keep], footprint, settings.tiles.min_tissue)
    for region in [] if keep.any() else _next_best(regions, selected, settings, slide_id):
        mine = np.flatnonzero(owner == region)
        keep[mine] = _enough_tissue(screening, column[mine], row[mine], footprint, settings.tiles.min_tissue)
        if keep[mine].any():
            selected[region] = True
            break
    column, row, owner = column[keep], row[keep], owner[keep]
    candidates = len(column)
    limit = int(settings.tiles.max_per_slide)
    if 0 < limit < candidates:
        drawn = _even_draw(owner, limit, _generator(settings.seed, slide_id, "tiles"))
        column, row, owner = column[drawn], row[drawn], owner[drawn]
    return TilePlan(
        x=np.rint(column * footprint).astype(np.int64), y=np.rint(row * footprint).astype(np.int64), column=column, row=row,
        region=np.asarray(regions.index, np.int64)[owner], energy=np.asarray(regions.energy, np.float32)[owner], size=size, mpp=mpp,
        footprint=footprint, level=level, coarser=coarser, selected=selected, candidates=candidates,
    )


def _lattice(regions: "RegionTable", footprint: float, columns: int, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Column, row and owning region (position in the table) of every tile whose centre lies in a region, regions in reading order."""
    x, y = np.asarray(regions.x, np.float64), np.asarray(regions.y, np.float64)
    side = np.broadcast_to(np.asarray(regions.size, np.float64), x.shape)
    parts = []
    for region in np.lexsort((x, y)):
        # Centres (i + 1/2) * footprint in the half-open interval [x, x + side).
        first = [int(np.ceil(start[region] / footprint - 0.5)) for start in (x, y)]
        stop = [int(np.ceil((start[region] + side[region]) / footprint - 0.5)) for start in (x, y)]
        i = np.arange(max(first[0], 0), min(stop[0], columns))
        j = np.arange(max(first[1], 0), min(stop[1], rows))
        if i.size and j.size:
            parts.append(np.stack([np.tile(i, j.size), np.repeat(j, i.size), np.full(i.size * j.size, region)]))
    if not parts:
        return (np.zeros(0, np.int64),) * 3
    column, row, owner = np.concatenate(parts, axis=1).astype(np.int64)
    # Region borders are rounded to pixels and may overlap by one: the first region in reading order keeps the tile.
    _, first_place = np.unique(row * max(columns, 1) + column, return_index=True)
    order = np.sort(first_place)
    return column[order], row[order], owner[order]


def _enough_tissue(screening: "Screening", column: np.ndarray, row: np.ndarray, footprint: float, minimum: float) -> np.ndarray:
    return np.asarray(screening.tissue.fractions(column * footprint, row * footprint, footprint, footprint)) >= minimum


def _next_best(regions: "RegionTable", selected: np.ndarray, settings: ConfigDict, slide_id: str) -> list[int]:
    """Regions not selected, in the order in which they stand in: ranked ones, those with too little tissue for a rank, taken for artefacts."""
    eligible = np.asarray(regions.eligible, bool)
    scant = ~eligible & (np.asarray(regions.pen) <= settings.screen.max_pen) & (np.asarray(regions.blur) <= settings.screen.max_blur)
    scant &= np.asarray(regions.tissue) > 0
    ranked = np.flatnonzero(eligible & ~selected)
    if settings.select.mode == "random":
        ranked = _generator(settings.seed, slide_id, "next").permutation(ranked)
    else:
        ranked = ranked[np.argsort(-np.asarray(regions.energy)[ranked], kind="stable")]
    rest = np.flatnonzero(scant & ~selected)
    tissue = np.asarray(regions.tissue)[rest]
    rest = rest[np.lexsort((-tissue, tissue >= settings.screen.min_tissue))]
    return [*ranked.tolist(), *rest.tolist()]


def _generator(seed: int, slide_id: str, purpose: str) -> np.random.Generator:
    digest = hashlib.blake2b(f"{slide_id}\n{purpose}".encode("utf-8", "backslashreplace"), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([int(seed) % 2**64, *np.frombuffer(digest, "<u4").tolist()])))


def _even_draw(owner: np.ndarray, limit: int, generator: np.random.Generator) -> np.ndarray:
    """Positions (sorted) of `limit` tiles drawn in rounds: one of each region that has any left, the last round at random."""
    shuffled = generator.permutation(len(owner))
    turn = np.zeros(len(owner), np.int64)
    seen: dict[int, int] = {}
    for place in shuffled.tolist():
        region = int(owner[place])
        turn[place] = seen.get(region, 0)
        seen[region] = seen.get(region, 0) + 1
    order = shuffled[np.argsort(turn[shuffled], kind="stable")]
    return np.sort(order[:limit])


def read_tiles(slide: "Slide", plan: TilePlan, indices: Sequence[int]) -> list[np.ndarray]:
    """The pixels of some tiles, uint8[size, size, 3] each, in the order asked for; what they are does not depend on their company.

    Neighbours in a row are read in one go. Raises SlideError where the slide is damaged there.
    """
    size = plan.size
    if plan.level is None:
        return [slide.read(int(plan.x[i]), int(plan.y[i]), size, size, plan.mpp) for i in indices]
    out: list[np.ndarray] = [None] * len(indices)  # type: ignore[list-item]
    order = sorted(range(len(indices)), key=lambda place: (plan.row[indices[place]], plan.column[indices[place]]))
    for run in _runs(order, [int(plan.row[i]) for i in indices], [int(plan.column[i]) for i in indices]):
        first = indices[run[0]]
        left = int(plan.column[first])
        span = int(plan.column[indices[run[-1]]]) - left + 1
        strip = slide.read_level(plan.level, left * size, int(plan.row[first]) * size, span * size, size)
        for place in run:
            start = (int(plan.column[indices[place]]) - left) * size
            out[place] = np.ascontiguousarray(strip[:, start : start + size])
    return out


def _runs(order: Sequence[int], rows: Sequence[int], columns: Sequence[int]) -> Iterator[list[int]]:
    """Cuts an ordered list into runs of tiles that are neighbours in one row, at most RUN columns wide."""
    run: list[int] = []
    for place in order:
        if run and not (rows[place] == rows[run[-1]] and columns[place] - columns[run[-1]] <= 1 and columns[place] - columns[run[0]] < RUN):
            yield run
            run = []
        run.append(place)
    if run:
        yield run


def map_tiles(
    slide: "Slide", plan: TilePlan, function: Callable[[np.ndarray, int], T], workers: int = 2, seconds: MutableMapping[str, float] | None = None,
) -> Iterator[tuple[int, T]]:
    """`(index, function(rgb, index))` of every tile, in the plan's order, read and computed by a pool of threads (decoding frees the GIL).

    Tiles are read row by row over the slide's whole width, so that each native tile is decoded once (the slide keeps the last row of them),
    and handed on region by region: what waits is at most one row of regions of results, so `function` should return something small.

    Args:
        seconds: if given, thread seconds are added to its `read` and `encode`.
    """
    order = np.lexsort((plan.column, plan.row)).tolist()
    runs = _runs(order, plan.row.tolist(), plan.column.tolist())

    def work(run: list[int]) -> tuple[list[tuple[int, T]], float, float]:
        start = time.perf_counter()
        pixels = read_tiles(slide, plan, run)
        middle = time.perf_counter()
        results = [(index, function(rgb, index)) for index, rgb in zip(run, pixels, strict=True)]
        return results, middle - start, time.perf_counter() - middle

    waiting: dict[int, T] = {}
    following = 0
    pending: deque[Future] = deque()
    pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="tiles")
    try:
        while True:
            while len(pending) < 4 * max(1, workers) and (run := next(runs, None)):
                pending.append(pool.submit(work, run))
            if not pending:
                break
            results, read, encode = pending.popleft().result()
            if seconds is not None:
                seconds["read"] = seconds.get("read", 0.0) + read
                seconds["encode"] = seconds.get("encode", 0.0) + encode
            waiting.update(results)
            while following in waiting:
                yield following, waiting.pop(following)
                following += 1
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def extract(slide: "Slide", plan: TilePlan, settings: ConfigDict | None = None, workers: int = 2) -> Iterator[Tile]:
    """Every tile of a plan with its pixels, in the plan's order; with `settings` of codec jpeg, the pixels as they are after storage."""
    lossy = settings is not None and settings.tiles.codec == "jpeg"

    def pixels(rgb: np.ndarray, _: int) -> np.ndarray:
        return decode_tile(encode_tile(rgb, settings.tiles.codec, settings.tiles.quality)) if lossy else rgb

    for index, rgb in map_tiles(slide, plan, pixels, workers):
        yield Tile(rgb, int(plan.x[index]), int(plan.y[index]), plan.mpp, float(plan.energy[index]), int(plan.region[index]))


def encode_tile(rgb: np.ndarray, codec: str = "jpeg", quality: int = 90) -> bytes:
    """uint8[h, w, 3] -> JPEG or PNG bytes; equal pixels give equal bytes.

    JPEG keeps full colour resolution (4:4:4): at quality 90 halving it costs 10 dB on H&E, where stains are told apart by colour.
    """
    import imagecodecs

    if codec == "jpeg":
        return imagecodecs.jpeg8_encode(rgb, level=int(quality), subsampling="444")
    if codec == "png":
        return imagecodecs.png_encode(rgb, level=1)
    raise ConfigError(f"tiles.codec is {codec!r}; choose from {', '.join(CODECS)}")


def decode_tile(data: bytes) -> np.ndarray:
    """JPEG or PNG bytes -> uint8[h, w, 3]; the same pixels as Pillow and `tf.io.decode_jpeg(dct_method="INTEGER_ACCURATE")`.

    Raises:
        DatasetError: not a whole image.
    """
    import imagecodecs

    decoders: dict[bytes, Any] = {b"\xff\xd8": imagecodecs.jpeg8_decode, b"\x89P": imagecodecs.png_decode}
    try:
        # libjpeg fills up an image that is cut short and only warns.
        if data[:2] == b"\xff\xd8" and data[-2:] != b"\xff\xd9":
            raise ValueError("no end marker")
        return decoders[bytes(data[:2])](data)
    except (KeyError, ValueError, RuntimeError) as error:
        raise DatasetError(f"a tile's {len(data)} bytes are not a whole JPEG or PNG image ({type(error).__name__})") from None
