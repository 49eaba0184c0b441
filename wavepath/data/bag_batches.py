"""Bags to batches: padded to few sizes, index-pure, the same on any number of hosts.

The functions are those of `data.pipeline`, for a `BagSource`. A batch has `features` f32[b, n, d], `tiles` bool[b, n] (true for real tiles), `label`,
`weight` f32[b] (of the label in the loss), `example_id`, `epoch`, `position`, and in evaluation `mask` f32[b], 0 for rows that fill up the last
batch. n is the smallest bucket that holds the
longest bag of the whole batch, over all hosts: a function of the batch's position alone, so all hosts agree, and a run compiles at most one step for
each bucket.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import numpy as np

from wavepath.data import order as orders
from wavepath.data.bags import BagSource
from wavepath.errors import ConfigError, DatasetError

_LEAST = 16
_DRAW = 0x626167  # keeps the draw of tiles apart from other uses of the seed
_END = np.iinfo(np.int64).max // 2


def bucket(tiles: int, buckets: Sequence[int] = ()) -> int:
    """The size that a bag of so many tiles is padded to: the smallest bucket that holds it.

    Args:
        tiles: of the bag.
        buckets: sizes; beyond the largest its multiples. Empty: 16, 24, 32, 48, 64, 96, ...: powers of two and once and a half of them, so that a
            bag grows by less than half (by a fifth on average), and 29 sizes reach 200,000 tiles.

    Raises:
        ConfigError: sizes below 1.
    """
    sizes = sorted(int(size) for size in buckets)
    if sizes:
        if sizes[0] < 1:
            raise ConfigError(f"config.mil.buckets={tuple(buckets)}: sizes must be at least 1")
        return next((size for size in sizes if size >= tiles), -(-tiles // sizes[-1]) * sizes[-1])
    size = _LEAST
    while size < tiles:
        if size * 3 // 2 >= tiles:
            return size * 3 // 2
        size *= 2
    return size


def drawn_tiles(count: int, most: int, seed: int, example: int, epoch: int) -> np.ndarray:
    """Which tiles of a bag a training step sees, int64, ascending: all of at most `most` (0: no limit), else so many, anew each epoch."""
    if not 0 < most < count:
        return np.arange(count)
    key = orders.order_key(seed, _DRAW, example, epoch)
    return np.sort(orders.permute(np.arange(most), count, key))


class BagBatches(Iterator[dict[str, np.ndarray]]):
    """An iterator over batches. `corrupt_count` is 0: a slide that cannot be read is an error."""

    corrupt_count = 0

    def __init__(self, make: Callable[[int], dict[str, np.ndarray]], starts: tuple[int, int, int]):
        self._make, (self._at, self._end, self._step) = make, starts

    def __next__(self) -> dict[str, np.ndarray]:
        if self._at >= self._end:
            raise StopIteration
        batch = self._make(self._at)
        self._at += self._step
        return batch

    def close(self) -> None:
        """Ends the iteration."""
        self._at = self._end

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _host_rows(batch_size: int, host: tuple[int, int]) -> slice:
    index, count = host
    if batch_size < 1 or batch_size % count:
        raise ConfigError(f"config.batch_size={batch_size} does not divide over {count} hosts; choose a multiple of {count}")
    share = batch_size // count
    return slice(index * share, (index + 1) * share)


def _refuse_replacing(on_corrupt: str) -> None:
    if on_corrupt != "error":
        raise ConfigError(f"config.data.on_corrupt={on_corrupt!r}: a slide is not replaced by another; leave it out with config.data.exclude_slides")


def _padded(source: BagSource, ids: np.ndarray, rows: slice, sizes: np.ndarray, which: Callable[[int], np.ndarray | None], buckets: Any) -> dict:
    """Features, mask and labels of this host's rows; `sizes` are the tiles of all rows of the batch, `which` picks tiles of a row."""
    n = bucket(int(sizes.max()), buckets)
    own = range(rows.start, rows.stop)
    features = np.zeros((len(own), n, source.width), np.float32)
    tiles = np.zeros((len(own), n), bool)
    for place, row in enumerate(own):
        bag, picked = source.bag(int(ids[row])), which(row)
        features[place, : sizes[row]] = bag if picked is None else bag[picked]
        tiles[place, : sizes[row]] = True
    labels = source.labels[ids[rows]]
    weight = np.asarray(source.weights, np.float32)[labels] if source.weights else np.ones(len(labels), np.float32)
    return {"features": features, "tiles": tiles, "label": labels, "weight": weight, "example_id": ids[rows].astype(np.int32)}


def batches(
    source: BagSource, *, batch_size: int, seed: int, start_position: int = 0, order: str = "global", window: int = 8,
    host: tuple[int, int] = (0, 1), prefetch: int = 2, on_corrupt: str = "error",
) -> BagBatches:  # fmt: skip
    """Training batches without end, from position `start_position` on; see the module and `data.pipeline.batches`.

    At most `source.max_tiles` tiles of a bag are taken, drawn by seed, example and epoch. `prefetch` is not used: whoever sends batches to a device
    reads ahead.

    Raises:
        ConfigError: a batch size that the hosts do not divide, or `on_corrupt` other than `error`.
        DatasetError: an empty source; and while iterating a bag that cannot be read.
    """
    _refuse_replacing(on_corrupt)
    rows = _host_rows(batch_size, host)
    sequence = orders.make_order(order, n=len(source), blocks=source.blocks, seed=seed, window=window)
    most = source.max_tiles

    def make(start: int) -> dict[str, np.ndarray]:
        positions = np.arange(start, start + batch_size, dtype=np.int64)
        ids, epochs = sequence.example(positions)
        sizes = source.lengths[ids]
        sizes = np.minimum(sizes, most) if most else sizes

        def which(row: int) -> np.ndarray | None:
            count = int(source.lengths[ids[row]])
            return drawn_tiles(count, most, seed, int(ids[row]), int(epochs[row])) if 0 < most < count else None

        batch = _padded(source, ids, rows, sizes, which, source.buckets)
        return batch | {"epoch": epochs[rows].astype(np.int32), "position": positions[rows].astype(np.uint32)}

    return BagBatches(make, (start_position, _END, batch_size))


def eval_batches(
    source: BagSource, batch_size: int, *, ids: Sequence[int] | np.ndarray | None = None, limit: int = 0, host: tuple[int, int] = (0, 1),
    prefetch: int = 2, on_corrupt: str = "error",
) -> BagBatches:  # fmt: skip
    """One pass in the order of the source, all tiles of each bag; the last batch is filled up with its last bag, and `mask` is 0 there.

    Args:
        ids: the bags to read, in this order, instead of all.
        limit: at most so many of them, drawn evenly by a fixed shuffle (0: no limit).
    """
    _refuse_replacing(on_corrupt)
    rows = _host_rows(batch_size, host)
    chosen = np.arange(len(source)) if ids is None else np.asarray(ids, np.int64)
    if 0 < limit < len(chosen):
        chosen = chosen[orders.subset(len(chosen), limit)]
    count = len(chosen)
    if not count:
        raise DatasetError(f"{source.name}: no slide to read in this part of it; look into the split (config.data.fold, config.data.splits)")

    def make(start: int) -> dict[str, np.ndarray]:
        positions = np.arange(start, start + batch_size, dtype=np.int64)
        these = chosen[np.minimum(positions, count - 1)]
        batch = _padded(source, these, rows, source.lengths[these], lambda row: None, source.buckets)
        own = positions[rows]
        return batch | {
            "epoch": np.zeros(len(own), np.int32), "position": own.astype(np.uint32), "mask": (own < count).astype(np.float32)
        }  # fmt: skip

    return BagBatches(make, (0, count, batch_size))
