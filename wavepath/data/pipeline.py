"""Sources to batches: index-pure, resumable from one integer, the same global order on any number of hosts.

    order (numpy)  ->  read and decode the whole batch in one function  ->  uint8 batches, a few ahead

The batch at position `p` holds the examples of positions `p .. p + batch_size - 1`; host `h` of `k` reads the rows `h * b / k` to
`(h + 1) * b / k` of it. Nothing else enters, so a run that starts at `p` continues one that was stopped there.

tf.data runs the reading ahead in its own threads. Both read and decode happen inside one `numpy_function` for the batch: measured on
2 cores with 224-px JPEG tiles, imagecodecs in two threads decodes 3,100 to 4,000 tiles a second there, `tf.io.decode_jpeg` in a `map_fn`
2,300 to 2,800 (bit-identical pixels), and only the former knows which tile it was that cannot be decoded.
"""

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import numpy as np

from wavepath import console
from wavepath.data import order as orders
from wavepath.data.sources import Source
from wavepath.errors import ConfigError, DatasetError, WavepathError

_CALLS = 2  # batches under way at once where the source does not care about their order
_GIVE_UP = 1000  # examples in a row that cannot be read: the data is not damaged but gone
_END = np.iinfo(np.int64).max // 2
_OPEN: weakref.WeakSet["Batches"] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Ends reading while Python still runs: later a thread that reads cannot get the interpreter, and TensorFlow waits for it forever."""
    for stream in list(_OPEN):
        stream.close()


def tensorflow() -> Any:
    """TensorFlow without any accelerator: it would take the memory that JAX needs."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # no arithmetic is done here, and it announces itself on standard error
    import tensorflow as tf

    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
    return tf


class Reader:
    """Reads examples of a source, and decides what happens to those that cannot be read.

    A row that was replaced is one whose id comes back as another.
    """

    def __init__(self, source: Source, on_corrupt: str):
        if on_corrupt not in ("error", "replace"):
            raise ConfigError(f"data.on_corrupt is {on_corrupt!r}; it is 'error' or 'replace'")
        self.source, self.replace = source, on_corrupt == "replace"
        self._bad: dict[int, int] = {}  # example -> the one used in its place
        self._lock = threading.Lock()

    def columns(self, example_ids: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Pixels uint8[b, h, w, 3] by column and the ids int64[b] that they have: others than asked for where examples were replaced.

        Raises:
            DatasetError: an example that cannot be read, with `on_corrupt="error"`; naming it.
        """
        if not self.replace:
            return self.source.columns(example_ids), example_ids
        known = np.array([self._bad.get(int(index), int(index)) for index in example_ids], np.int64)
        try:
            pixels = self.source.columns(known)
        except WavepathError:
            known = np.array([self._readable(int(index)) for index in known], np.int64)
            pixels = self.source.columns(known)
        return pixels, known

    def _readable(self, index: int) -> int:
        """The first example from `index` on, round the end, that can be read."""
        total, tried = len(self.source), index
        for _ in range(min(total, _GIVE_UP)):
            try:
                self.source.columns(np.array([tried], np.int64))
            except WavepathError as error:
                with self._lock:
                    if index not in self._bad:
                        console.warn(f"replaced by the next readable example (data.on_corrupt=replace): {error}")
                    self._bad[index] = tried = (tried + 1) % total
                continue
            return tried
        raise DatasetError(f"{self.source.name}: {min(total, _GIVE_UP)} examples in a row from {index} on cannot be read; restore the data")


class Batches(Iterator[dict[str, np.ndarray]]):
    """An iterator over batches that tf.data reads ahead. `corrupt_count` says how many of its rows were replaced; `close` stops reading.

    Args:
        reader: where rows come from.
        starts: the positions of the batches: first, end, step.
        rows: position of a batch -> its columns without the pixels: `example_id` and others.
        calls: batches that may be read at once; 1 where the source profits from being asked in order.
        prefetch: batches held ready.
    """

    def __init__(
        self, reader: Reader, starts: tuple[int, int, int], rows: Callable[[int], dict[str, np.ndarray]], *, calls: int, prefetch: int
    ):
        self._reader, self._rows = reader, rows
        self._errors: dict[int, BaseException] = {}
        self._replaced: dict[int, int] = {}  # position of a batch that is ready -> rows replaced in it
        self._following, self._step = starts[0], starts[2]
        self.corrupt_count = 0
        self._closed = False
        tf = tensorflow()
        sample = rows(starts[0])
        self._labels = reader.source.labels
        self._pixels = reader.source.column_names
        self._names = [*self._pixels, *sample]
        kinds = [tf.uint8] * len(self._pixels)
        kinds += [tf.int32 if name == "example_id" else tf.as_dtype(column.dtype) for name, column in sample.items()]
        if self._labels is not None:
            self._names.append("label")
            kinds.append(tf.int32)
        options = tf.data.Options()
        options.deterministic = True
        options.autotune.enabled = False
        options.threading.private_threadpool_size = calls + 1
        dataset = tf.data.Dataset.range(*starts)
        dataset = dataset.map(lambda start: tf.numpy_function(self._batch, [start], kinds), num_parallel_calls=calls, deterministic=True)
        self._iterator: Any = dataset.prefetch(max(1, prefetch)).with_options(options).as_numpy_iterator()
        _OPEN.add(self)

    def _batch(self, start: np.int64) -> list[np.ndarray]:
        """One batch; runs in tf.data's threads. An error is kept: TensorFlow would hand on no more than its text."""
        try:
            if self._closed:
                raise StopIteration
            columns = self._rows(int(start))
            pixels, found = self._reader.columns(columns["example_id"])
            if replaced := int(np.count_nonzero(found != columns["example_id"])):
                self._replaced[int(start)] = replaced
            columns["example_id"] = found.astype(np.int32)
            if self._labels is not None:
                columns["label"] = self._labels[found]  # of the example that was read: a replaced row has the other one's label too
            columns |= pixels
            return [columns[name] for name in self._names]
        except BaseException as error:
            self._errors[int(start)] = error
            raise

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            raise StopIteration
        try:
            batch = dict(zip(self._names, next(self._iterator), strict=True))
        except StopIteration:
            self.close()
            raise
        except Exception:
            self.close()
            if self._errors:
                raise self._errors[min(self._errors)] from None
            raise
        # Counted when a batch is handed out: what is read ahead and never used has harmed nobody.
        self.corrupt_count += self._replaced.pop(self._following, 0)
        self._following += self._step
        return batch

    def close(self) -> None:
        """Stops reading ahead; later calls of `next` end the iteration. Batches under way are finished and dropped."""
        self._closed = True
        self._iterator = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _host_rows(batch_size: int, host: tuple[int, int]) -> slice:
    index, count = host
    if count < 1 or not 0 <= index < count:
        raise ConfigError(f"host {index} of {count} does not exist")
    if batch_size < 1 or batch_size % count:
        raise ConfigError(f"config.batch_size={batch_size} does not divide over {count} hosts; choose a multiple of {count}")
    share = batch_size // count
    return slice(index * share, (index + 1) * share)


def batches(
    source: Source, *, batch_size: int, seed: int, start_position: int = 0, order: str = "global", window: int = 8,
    host: tuple[int, int] = (0, 1), prefetch: int = 2, on_corrupt: str = "error",
) -> Batches:
    """Training batches without end, from position `start_position` on.

    Each is a dict of `image` uint8[b, h, w, 3] (or whatever columns of pixels the source has), `example_id` int32[b], `epoch` int32[b] and
    `position` uint32[b] (modulo 2**32), where b is this host's share of `batch_size`; and `label` int32[b] where the source has labels.

    Args:
        source: where the tiles are.
        batch_size: rows of the global batch.
        seed: keys the order.
        start_position: examples already seen by the run, over all hosts.
        order: `global`, or `blocks`: `window` blocks of the source are mixed at a time, and streams read ahead by a window.
        host: (index, count) of this process among those that share each batch.
        prefetch: batches held ready.
        on_corrupt: `error`, or `replace`: the next readable example takes the place of one that is not, and is counted.

    Raises:
        ConfigError: a batch size that the hosts do not divide, an unknown `on_corrupt`.
        DatasetError: an empty source, an unknown order; and while iterating an example that cannot be read.
    """
    rows = _host_rows(batch_size, host)
    sequence = orders.make_order(order, n=len(source), blocks=source.blocks, seed=seed, window=window)
    ahead = start_position
    source.forget()  # what an earlier iteration announced and did not fetch

    def columns(start: int) -> dict[str, np.ndarray]:
        nonlocal ahead
        positions = np.arange(start, start + batch_size, dtype=np.int64)[rows]
        ids, epochs = sequence.example(positions)
        horizon = sequence.horizon(int(positions[-1]))
        if horizon > ahead and order == "blocks":
            # One window at a time, so that each block is asked for in one piece.
            wanted = np.arange(ahead, horizon, dtype=np.int64)
            row = (wanted - start_position) % batch_size
            wanted = wanted[(rows.start <= row) & (row < rows.stop)]
            ahead = horizon
            source.prefetch(sequence.example(wanted)[0])
        return {"example_id": ids, "epoch": epochs.astype(np.int32), "position": positions.astype(np.uint32)}

    calls = 1 if order == "blocks" else _CALLS
    return Batches(Reader(source, on_corrupt), (start_position, _END, batch_size), columns, calls=calls, prefetch=prefetch)


def eval_batches(
    source: Source, batch_size: int, *, ids: Sequence[int] | np.ndarray | None = None, limit: int = 0, host: tuple[int, int] = (0, 1),
    prefetch: int = 2, on_corrupt: str = "error",
) -> Batches:
    """One pass in the order of the source; the last batch is filled up with its last example, and `mask` is 0 there.

    Columns as of `batches` (`epoch` is 0, `position` the place in the pass), and `mask` float32[b]. Every host gets the same number of batches.

    Args:
        ids: the examples to read, in this order, instead of all.
        limit: at most so many of them, drawn evenly by a fixed shuffle (0: no limit).
    """
    rows = _host_rows(batch_size, host)
    chosen = None if ids is None else np.asarray(ids, np.int64)
    count = len(source) if chosen is None else len(chosen)
    if count == 0:
        raise DatasetError(f"{source.name} holds no examples to read; look into its manifest for the reasons")
    if 0 < limit < count:
        picked = orders.subset(count, limit)
        chosen, count = picked if chosen is None else chosen[picked], limit

    def columns(start: int) -> dict[str, np.ndarray]:
        positions = np.arange(start, start + batch_size, dtype=np.int64)[rows]
        places = np.minimum(positions, count - 1)
        return {
            "example_id": places if chosen is None else chosen[places],
            "epoch": np.zeros(len(positions), np.int32),
            "position": positions.astype(np.uint32),
            "mask": (positions < count).astype(np.float32),
        }

    return Batches(Reader(source, on_corrupt), (0, count, batch_size), columns, calls=_CALLS, prefetch=prefetch)
