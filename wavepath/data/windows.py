"""Windows of larger images as a source of examples: one grid of them over each sample, and decoded samples kept up to a limit.

A sample is a set of aligned images, the columns; some may be finer than others by a whole factor, so that one window is cut at the same place from
all. Windows lie every `stride` px, the last one of a row or column flush with the edge. Pyramids and stained pairs are read in this way.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from wavepath import console
from wavepath.data.sources import Source, Span, check_mpp, restrict
from wavepath.errors import DatasetError


class WindowSource(Source):
    """Windows of samples; safe to use from several threads. A subclass calls `_open` and says how a sample is decoded.

    Attributes:
        samples: facts about each sample: `slide`, `x`, `y`, `mpp`, `width`, `height` (of its finest image in px), `label`, `split` and more.
        window: side of a window in px of the coarsest column.
    """

    samples: list[dict[str, Any]]
    window: int
    split: str

    def _open(self, factors: Mapping[str, int], unit: int, stride: int, cache_mb: float, too_small: tuple[str, str]) -> None:
        """Numbers the windows of `self.samples`: spans and blocks.

        Args:
            factors: of each column, how much finer it is than the window counts; the order is that of `column_names`.
            unit: px of `width` and `height` for each px of the window.
            stride: px between windows.
            cache_mb: MiB of decoded samples that are kept.
            too_small: what a sample needs and some have not, and what to do about it: for the message.

        Raises:
            DatasetError: all samples are smaller than a window.
        """
        self.factors, self._unit, self._stride, self._limit = dict(factors), unit, stride, int(cache_mb * (1 << 20))
        self.column_names = tuple(factors)
        self.image_shape = (self.window, self.window, 3)
        self._lay_windows(too_small)
        self._cache: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()
        self._held, self._lock = 0, threading.Lock()
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix=self.kind)
        # Each window of a sample costs the decoding of all of it, unless all of them stay decoded.
        self.best_order = "global" if sum(map(self._bytes, range(len(self.samples)))) <= self._limit else "blocks"

    def _lay_windows(self, too_small: tuple[str, str]) -> None:
        def along(extent: int) -> int:
            free = extent // self._unit - self.window
            return 0 if free < 0 else -(-free // self._stride) + 1

        grid = [(along(sample["height"]), along(sample["width"])) for sample in self.samples]
        counts = np.array([rows * columns for rows, columns in grid], np.int64)
        self._columns = np.array([columns for _, columns in grid], np.int64)
        self._ends = np.cumsum(counts)
        if (small := int((counts == 0).sum())) and self.split != "test":
            needed, advice = too_small
            if small == len(counts):
                raise DatasetError(f"every sample of {self.name} has less than {needed}; {advice}")
            console.warn(f"{small} of {len(counts)} samples of {self.name} have less than {needed}, and are left out")
        self.spans = []
        for sample, stop, count in zip(self.samples, self._ends.tolist(), counts.tolist(), strict=True):
            if self.spans and self.spans[-1].slide == sample["slide"]:
                self.spans[-1] = Span(sample["slide"], self.spans[-1].start, stop, sample["mpp"])
            elif count:
                self.spans.append(Span(sample["slide"], stop - count, stop, sample["mpp"]))
        self.blocks = counts[counts > 0]

    def _chosen(self, rows: Sequence[Any], exclude: Sequence[str]) -> list[tuple[int, Any]]:
        """Number and row of the samples of the split, without the excluded slides; a row has `slide_id` and `split`."""
        excluded = set(exclude)
        missing = sorted(excluded - {row.slide_id for row in rows})
        if missing and len(missing) == len(excluded):
            names = f"first: {missing[0]!r}; a slide there: {rows[0].slide_id!r}"
            raise DatasetError(f"data.exclude_slides names none of the slides of {self.name} ({names})")
        if missing and self.split != "test":  # said once, by the training part
            console.warn(f"data.exclude_slides: {len(missing)} of {len(excluded)} slides hold no samples in {self.name} (first: {missing[0]!r})")
        return [
            (number, row) for number, row in enumerate(rows) if self.split in ("all", row.split) and row.slide_id not in excluded
        ]

    def _bytes(self, sample: int) -> int:
        """Decoded, all columns together."""
        pixels = 3 * self.samples[sample]["width"] * self.samples[sample]["height"]
        return sum(pixels * factor**2 // self._unit**2 for factor in self.factors.values())

    def _decoded(self, sample_index: int) -> dict[str, np.ndarray]:
        """All columns of a sample, uint8[h, w, 3] each; DatasetError where it cannot be read."""
        raise NotImplementedError

    def whole(self, sample_index: int) -> dict[str, np.ndarray]:
        """All of a sample, uint8[h, w, 3] by column; not to be written to.

        Raises:
            DatasetError: it cannot be read or decoded; names it.
        """
        with self._lock:
            if sample_index in self._cache:
                self._cache.move_to_end(sample_index)
                return self._cache[sample_index]
        images = self._decoded(sample_index)
        size = sum(image.nbytes for image in images.values())
        with self._lock:
            if sample_index not in self._cache and size <= self._limit:
                self._cache[sample_index] = images
                self._held += size
                while self._held > self._limit:
                    _, old = self._cache.popitem(last=False)
                    self._held -= sum(image.nbytes for image in old.values())
        return images

    def _place(self, example_id: int) -> tuple[int, int, int]:
        """Sample, row and column (px of the window) of a window."""
        sample = int(np.searchsorted(self._ends, example_id, side="right"))
        before = int(self._ends[sample - 1]) if sample else 0
        line, column = divmod(example_id - before, int(self._columns[sample]))
        facts = self.samples[sample]
        # The last window of a row or column is moved back to the edge.
        top, left = (
            min(number * self._stride, extent // self._unit - self.window)
            for number, extent in ((line, facts["height"]), (column, facts["width"]))
        )
        return sample, top, left

    def columns(self, example_ids: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """The windows by column, uint8[b, f w, f w, 3] with the column's factor f; raises as `whole`."""
        places = [self._place(index) for index in self._checked(example_ids).tolist()]
        wanted = list(dict.fromkeys(sample for sample, _, _ in places))
        images = dict(zip(wanted, self._pool.map(self.whole, wanted), strict=True))
        out = {}
        for name, factor in self.factors.items():
            side = factor * self.window
            out[name] = np.empty((len(places), side, side, 3), np.uint8)
            for row, (sample, top, left) in enumerate(places):
                out[name][row] = images[sample][name][factor * top : factor * top + side, factor * left : factor * left + side]
        return out

    def images(self, example_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The windows of the first column."""
        return self.columns(example_ids)[self.column_names[0]]

    def read(self, example_ids: Iterable[int]) -> list[bytes]:
        raise DatasetError(f"{self.name} holds {self.kind}, whose windows have no encoded form; read its columns")

    def meta(self, example_id: int) -> dict[str, Any]:
        sample, top, left = self._place(int(self._checked([example_id])[0]))
        facts = self.samples[sample]
        return {
            "slide": facts["slide"], "x": facts["x"], "y": facts["y"], "mpp": float("nan") if facts["mpp"] is None else facts["mpp"],
            "slide_mpp": None, "energy": float("nan"), "region": sample, "id": int(example_id), "label": facts["label"], "split": facts["split"],
            "name": f"{self._name(facts)}_{top}_{left}",
        }

    def _name(self, facts: Mapping[str, Any]) -> str:
        return f"{facts['slide']}_{facts['x']}_{facts['y']}"

    def _extent(self) -> str:
        """Sizes and resolutions of the samples, for `describe`."""
        sizes = sorted({(sample["width"], sample["height"]) for sample in self.samples})
        size = f"{sizes[0][0]}x{sizes[0][1]} px" if len(sizes) == 1 else f"{len(sizes)} sizes"
        mpp = ", ".join(f"{mpp:.4g}" for mpp in self.mpps[:4]) + (", ..." if len(self.mpps) > 4 else "")
        return size + (f" at {mpp} mpp" if mpp else "")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def for_training(source: WindowSource, data: Any, kind: str, nothing: str) -> Source:
    """A training split as a source for the loop: `data.max_tiles` counts windows.

    Args:
        source: the split.
        data: the group `data` of the config.
        kind: what the source is called in the line that says what was found.
        nothing: the error where there is nothing to train on.

    Raises:
        DatasetError: nothing to train on; samples of several resolutions without `data.mixed_mpp`.
    """
    if not len(source):
        raise DatasetError(nothing)
    check_mpp(source, data.mixed_mpp)
    console.say(f"data: {kind} {source.name}: {source.describe()}")
    return restrict(source, (), data.max_tiles)
