"""Where training examples come from, behind one interface: a prepared dataset, a folder of images, or the slides themselves.

An example's id is its index in the source, `0..len-1`: tiles in the order of their slides, and of their grid within a slide. So the ids of
a stream are those of the dataset prepared from the same slides with the same settings. (A prepared record also carries a 64-bit
`id` that names the tile whatever else is in the dataset; `meta` returns it.)
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from wavepath import console
from wavepath.data import order
from wavepath.data.decode import BatchArrays, decode_into, in_threads, thread_count
from wavepath.data.manifest import MANIFEST, SETTINGS, TIMINGS, one_line, read_manifest
from wavepath.errors import ConfigError, DatasetError

# Slides within this ratio of each other count as one resolution: a reader takes a pyramid level within 1 % of the wanted mpp as it is.
_ONE_RESOLUTION = 1.025
STAIN_TASKS = ("stain", "stain_encoders")  # that learn from pairs
_BLOCK = 64  # tiles of a block where nothing is shared between tiles (prepared tiles, images): neighbours on the disk


@dataclass(frozen=True)
class Span:
    """The examples of one slide (or of one image folder): ids `start..stop-1`, all at one mpp (None: unknown).

    `slide_mpp` is the slide's own, at level 0: what positions are counted in.
    """

    slide: str
    start: int
    stop: int
    mpp: float | None
    slide_mpp: float | None = None


class Source:
    """A fixed sequence of equally sized RGB tiles.

    Attributes:
        kind: `prepared`, `images` or `stream`.
        name: what it was opened from.
        image_shape: (height, width, 3) of every example.
        spans: the examples of each slide, in order; they cover `0..len-1`.
        blocks: int64[n] sizes of runs of consecutive ids that are read together (`data.order=blocks`).
        left_out: slides that could not be read when the source was opened, with the reason of each.
        labels: int32[n], where the examples have any: batches then have a column `label`.
        column_names: what `columns` gives; of tiles `image` alone.
        best_order: the `data.order` that `auto` means here.
    """

    kind: str = ""
    column_names: tuple[str, ...] = ("image",)
    best_order: str = "global"
    name: str = ""
    image_shape: tuple[int, int, int] = (0, 0, 3)
    spans: list[Span]
    blocks: np.ndarray
    left_out: Mapping[str, str] = MappingProxyType({})
    threads: int = 2
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return self.spans[-1].stop if self.spans else 0

    @property
    def mpps(self) -> tuple[float, ...]:
        """The distinct resolutions of the tiles in micrometres per pixel, finest first; empty where none is known."""
        return tuple(sorted({span.mpp for span in self.spans if span.mpp is not None and span.stop > span.start}))

    @property
    def slides(self) -> list[str]:
        """Ids of the slides, in the order of their examples."""
        return [span.slide for span in self.spans]

    def span_of(self, example_id: int) -> Span:
        """The span that holds an example.

        Raises:
            IndexError: outside of the source.
        """
        if not 0 <= example_id < len(self):
            raise IndexError(f"example {example_id} of a source of {len(self)}")
        return self.spans[int(np.searchsorted(self._stops, example_id, side="right"))]

    @functools.cached_property
    def _stops(self) -> np.ndarray:
        """Ends of the spans: int64[number of slides]."""
        return np.array([span.stop for span in self.spans], np.int64)

    def _checked(self, example_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The ids as int64, all within the source; IndexError otherwise."""
        ids = np.asarray(example_ids, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(f"example {int(ids.min() if ids.min() < 0 else ids.max())} of a source of {len(self)}")
        return ids

    def read(self, example_ids: Iterable[int]) -> list[bytes]:
        """The encoded images (JPEG or PNG; of an image folder its files' bytes) of the examples, in their order.

        Raises:
            DatasetError: naming the file and the example that cannot be read.
        """
        raise NotImplementedError

    def images(self, example_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The decoded tiles, uint8[b, h, w, 3].

        Raises:
            DatasetError: naming the file and the example that cannot be read or decoded.
        """
        raise NotImplementedError

    def columns(self, example_ids: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """The pixels of the examples by column, uint8[b, h, w, 3] each (sizes may differ from column to column); raises as `images`."""
        return {"image": self.images(example_ids)}

    def prefetch(self, example_ids: Sequence[int] | np.ndarray) -> None:
        """Starts reading examples that will be wanted soon, where that saves work (streams); returns at once."""

    def forget(self) -> None:
        """Drops what `prefetch` brought and nobody fetched."""

    def meta(self, example_id: int) -> dict[str, Any]:
        """Facts about one example: `slide`, `x`, `y` (level-0 px), `mpp`, `slide_mpp`, `energy`, `region`, `id`; of images `path`, `name`."""
        raise NotImplementedError

    def describe(self) -> str:
        """One line for the user: what this is, how many tiles, from where, at which resolution."""
        height, width, _ = self.image_shape
        mpp = ", ".join(f"{mpp:.4g}" for mpp in self.mpps[:4]) + (", ..." if len(self.mpps) > 4 else "")
        where = "folders" if self.kind == "images" else "slides"
        return f"{len(self)} tiles of {width}x{height} px from {len(self.spans)} {where}" + (f" at {mpp} mpp" if mpp else "")

    def close(self) -> None:
        """Releases files and threads."""


def even_blocks(spans: Sequence[Span]) -> np.ndarray:
    """Cuts every span into blocks of 64 consecutive examples (the last of a span is shorter)."""
    sizes = []
    for span in spans:
        whole, rest = divmod(span.stop - span.start, _BLOCK)
        sizes += [_BLOCK] * whole + [rest] * (rest > 0)
    return np.array(sizes, np.int64)


class PreparedSource(Source):
    """The tiles that `wavepath prepare` wrote: one shard for each slide."""

    kind = "prepared"

    def __init__(self, folder: Path, threads: int = 0):
        from wavepath.data.records import TileShards

        self.name, self.threads = str(folder), thread_count(threads)
        self._shards = TileShards(Path(folder))
        self.image_shape = self._shards.image_shape
        self.spans = self._slide_spans(Path(folder))
        self.blocks = even_blocks(self.spans)
        self._pool, self._arrays = ThreadPoolExecutor(self.threads, thread_name_prefix="decode"), BatchArrays()

    def _slide_spans(self, folder: Path) -> list[Span]:
        """Slide and mpp of every shard, from the manifest; where only the TFDS files were copied, from each shard's first tile."""
        rows = {row.shard: row for row in read_manifest(folder)} if (folder / MANIFEST).is_file() else {}
        spans, start = [], 0
        for shard, length in zip(self._shards.shards, self._shards.lengths, strict=True):
            row = rows.get(shard.name)
            if row is not None and row.tiles == length:
                spans.append(Span(row.slide_id, start, start + length, row.tile_mpp, row.mpp))
            elif row is not None:
                raise DatasetError(f"{folder}: {MANIFEST} says {row.tiles} tiles in {shard.name}, which holds {length}; run `wavepath prepare` again")
            elif length:
                first = self._shards.meta(start)
                spans.append(Span(first["slide"], start, start + length, float(first["mpp"])))
            start += length
        return [span for span in spans if span.stop > span.start]

    def read(self, example_ids: Iterable[int]) -> list[bytes]:
        return self._shards.tiles(example_ids)

    def images(self, example_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = [int(index) for index in example_ids]
        out = self._arrays.get(len(ids), self.image_shape)

        def work(place: int) -> None:
            decode_into(self._shards.tile(ids[place]), out[place], lambda: f"{self.name}: example {ids[place]}")

        in_threads(work, len(ids), self._pool, self.threads)
        return out

    def meta(self, example_id: int) -> dict[str, Any]:
        return {**self._shards.meta(int(example_id)), "slide_mpp": self.span_of(int(example_id)).slide_mpp}

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class View(Source):
    """Some examples of another source under ids of their own; subclasses set `spans` and `blocks` and say which example an id means."""

    def __init__(self, source: Source):
        self._source, self.kind, self.name, self.image_shape = source, source.kind, source.name, source.image_shape
        self.threads, self.left_out = source.threads, source.left_out
        self.column_names, self.best_order = source.column_names, source.best_order

    def base_ids(self, example_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The ids in the underlying source, int64."""
        raise NotImplementedError

    def read(self, example_ids: Iterable[int]) -> list[bytes]:
        return self._source.read(self.base_ids(np.fromiter(example_ids, np.int64)))

    def images(self, example_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        return self._source.images(self.base_ids(example_ids))

    def columns(self, example_ids: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        return self._source.columns(self.base_ids(example_ids))

    def prefetch(self, example_ids: Sequence[int] | np.ndarray) -> None:
        self._source.prefetch(self.base_ids(example_ids))

    def forget(self) -> None:
        self._source.forget()

    def meta(self, example_id: int) -> dict[str, Any]:
        return self._source.meta(int(self.base_ids([example_id])[0]))


class Subset(View):
    """Part of another source: some of its spans, and of these all tiles or a fixed draw; ids count from 0 without gaps."""

    def __init__(self, source: Source, keep: Sequence[Span], count: int = 0):
        super().__init__(source)
        lengths = np.array([span.stop - span.start for span in keep], np.int64)
        self._starts = np.array([span.start for span in keep], np.int64)
        self._ends = np.cumsum(lengths)
        total = int(self._ends[-1]) if len(keep) else 0
        # Only a draw needs a list of its own, of the length that the user asked for.
        self._picks = order.subset(total, count) if 0 < count < total else None
        self.spans = self._cut(keep, np.concatenate([[0], self._ends]))
        self.blocks = self._blocks()

    def _count_below(self, bounds: np.ndarray) -> np.ndarray:
        """How many kept examples lie below each bound, bounds counted in the kept spans before the draw."""
        return bounds if self._picks is None else np.searchsorted(self._picks, bounds)

    def _cut(self, keep: Sequence[Span], bounds: np.ndarray) -> list[Span]:
        ends = self._count_below(bounds).tolist()
        cut = [Span(span.slide, ends[k], ends[k + 1], span.mpp, span.slide_mpp) for k, span in enumerate(keep)]
        return [span for span in cut if span.stop > span.start]

    def _blocks(self) -> np.ndarray:
        """The source's blocks, less what was left out."""
        ends = np.cumsum(self._source.blocks)
        # Blocks end with their spans, so each lies wholly inside or outside of the kept spans.
        span = np.clip(np.searchsorted(self._starts, ends - 1, side="right") - 1, 0, None)
        before = np.concatenate([[0], self._ends[:-1]])[span]
        lengths = self._ends[span] - before
        offset = ends - self._starts[span]
        inside = (offset > 0) & (offset <= lengths)
        bounds = self._count_below((before + offset)[inside])
        sizes = np.diff(np.concatenate([[0], bounds]))
        return sizes[sizes > 0]

    def base_ids(self, example_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The ids in the underlying source, int64."""
        ids = self._checked(example_ids)
        if self._picks is not None:
            ids = self._picks[ids]
        span = np.searchsorted(self._ends, ids, side="right")
        return self._starts[span] + ids - np.concatenate([[0], self._ends])[span]

    def close(self) -> None:
        self._source.close()


def read_slide_list(path: Path) -> list[str]:
    """Slide ids from a text file, one a line; blank lines and lines that begin with # do not count.

    Raises:
        DatasetError: the file cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"data.exclude_slides: cannot read {path} ({one_line(error)}); give a text file with one slide id a line") from None
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def restrict(source: Source, exclude: Sequence[str] = (), max_tiles: int = 0) -> Source:
    """Leaves slides out, and then keeps the first `max_tiles` of a fixed shuffle (0: all).

    The draw depends on the number of tiles alone, not on the run's seed: arms of a comparison with an equal budget see the same tiles.

    Raises:
        DatasetError: a slide to leave out is not in the data (all of them: most likely a wrong list), or nothing is left.
    """
    excluded = set(exclude)
    missing = sorted(excluded - set(source.slides))
    if missing and len(missing) == len(excluded):
        raise DatasetError(
            f"data.exclude_slides names {len(missing)} slides, none of which is in {source.name} (first: {missing[0]!r}; "
            f"a slide there: {source.slides[0]!r})" if source.slides else f"{source.name} holds no tiles"
        )
    if missing:
        console.warn(f"data.exclude_slides: {len(missing)} of {len(excluded)} slides hold no tiles in {source.name} (first: {missing[0]!r})")
    keep = [span for span in source.spans if span.slide not in excluded]
    if not keep:
        raise DatasetError(f"{source.name}: no tiles are left; look into its manifest.csv for the reasons, or shorten data.exclude_slides")
    if len(keep) == len(source.spans) and not 0 < max_tiles < len(source):
        return source
    return Subset(source, keep, max_tiles)


def check_mpp(source: Source, mixed: bool) -> None:
    """Refuses tiles of different physical scale in one training set.

    Raises:
        DatasetError: naming the resolutions, a slide of each, and the field that allows the mix.
    """
    mpps = source.mpps
    if mixed or len(mpps) < 2 or mpps[-1] <= mpps[0] * _ONE_RESOLUTION:
        return
    example = {span.mpp: span.slide for span in reversed(source.spans)}
    count = {mpp: sum(span.mpp == mpp for span in source.spans) for mpp in mpps}
    shown = "; ".join(f"{mpp:.4g} mpp: {count[mpp]} slides, such as {example[mpp]}" for mpp in (mpps[0], mpps[-1]))
    raise DatasetError(
        f"{source.name} mixes tiles of {len(mpps)} resolutions ({shown}); prepare again with --config.tiles.mpp={mpps[-1]:.4g}, leave slides out "
        "with --config.data.exclude_slides, or accept the mix with --config.data.mixed_mpp=True"
    )


def open_source(config: ConfigDict) -> Source:
    """Opens what `config.data` names and says what was found.

    `data.dir` is a dataset made by `wavepath prepare` or a folder of images; `data.slides` streams tiles from slides, screened with the
    settings of `config.prepare`. Then `data.exclude_slides` and `data.max_tiles` apply. Task `superres` learns from pyramids alone,
    tasks `stain` and `stain_encoders` from stained pairs.

    Raises:
        ConfigError: neither or both of `data.dir` and `data.slides` are set.
        DatasetError: nothing usable there, or tiles of different mpp without `data.mixed_mpp=True`.
    """
    data = config.data
    if config.task == "superres":
        from wavepath.data.pyramid_source import open_training

        return open_training(config)
    if config.task in STAIN_TASKS:
        from wavepath.data import pair_source

        return pair_source.open_training(config)
    if bool(data.dir) == bool(data.slides):
        raise ConfigError("set one of --config.data.dir (prepared tiles or images) and --config.data.slides (stream from slides)")
    exclude = read_slide_list(Path(data.exclude_slides)) if data.exclude_slides else []
    if data.slides:
        from wavepath.data.stream import open_stream

        # Slides that are left out are not even screened.
        source, title = open_stream(config, exclude), "streaming from slides"
        source = restrict(source, (), data.max_tiles)
    else:
        folder = Path(data.dir)
        if not folder.is_dir():
            raise DatasetError(f"data.dir: there is no folder {folder}; make one with `wavepath prepare --slides SLIDES --out {folder}`")
        from wavepath.data.pair_source import refuse_pairs
        from wavepath.data.pyramid_source import refuse_pyramids

        refuse_pyramids(folder, config.task)
        refuse_pairs(folder, config.task)
        if _is_prepared(folder):
            source, title = PreparedSource(folder, data.threads), "prepared dataset"
        else:
            from wavepath.data.images import ImageFolder

            source, title = ImageFolder(folder, config.model.image_size, data.threads), "folder of images"
        source = restrict(source, exclude, data.max_tiles)
    check_mpp(source, data.mixed_mpp)
    console.say(f"data: {title} {source.name}: {source.describe()}")
    return source


def _is_prepared(folder: Path) -> bool:
    """Whether `wavepath prepare` has worked here (wholly or not: an unfinished dataset must not pass for a folder of images).

    The timings are there from its first moment on, whatever ended it.
    """
    return any((folder / name).exists() for name in ("dataset_info.json", SETTINGS, MANIFEST, TIMINGS, "prepare.lock"))
