"""The order in which a run sees its examples: a pure function of seed and position, with no N-long array and nothing to save.

Position `p` of a run over `N` examples belongs to epoch `p // N` and is the `p % N`-th element of a permutation of `0..N-1`
that is keyed by seed and epoch. So a checkpoint holds one integer for the data, a resume is exact, and it may come back on
another number of hosts or with another batch size.

The permutation is a Feistel network over the rectangle `a x b` with `a = ceil(sqrt(N))`, `b = ceil(N / a)`: a number is a pair
(left, right), and each round adds a keyed hash of one half to the other half, modulo that half's range. Adding modulo the range
is undone by subtracting, so every round, and the network, is a bijection of `0..a*b-1`. The few results in `N..a*b-1` (fewer
than `a`) are sent through the network again until they fall below `N` ("cycle walking", Black and Rogaway 2002), which keeps it a
bijection of `0..N-1`. The hash is the finaliser of SplitMix64 (Steele, Lea and Flood 2014): fixed arithmetic on 64-bit integers, so
the order is the same on every machine and in every version; the golden values in the tests hold it.
"""

from collections.abc import Sequence

import numpy as np

from wavepath.errors import DatasetError

_ROUNDS = 16  # with 8 the permutations of five elements are visibly uneven (few values a half); 16 cost 1.5 ms for 1024 positions
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, the increment of SplitMix64
_MASK = 0xFFFFFFFFFFFFFFFF
_MAX_EXAMPLES = 2**31 - 1  # example ids travel to the device as int32

# Streams of keys that must not meet: the order of examples, of blocks, and of the tiles inside a window of blocks.
_EXAMPLES, _BLOCKS, _WINDOW = 1, 2, 3


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: uint64 -> uint64, every input bit changes every output bit with probability near one half."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def order_key(*parts: int | np.ndarray) -> np.ndarray:
    """Chains integers (or int arrays, broadcast together) into one 64-bit key; the order of the parts matters.

    Returns:
        uint64 array of the broadcast shape, zero-dimensional where all parts are plain integers.
    """
    key = np.asarray(np.uint64(_GOLDEN))
    with np.errstate(over="ignore"):
        for part in parts:
            if isinstance(part, np.ndarray):
                word = part.astype(np.uint64)
            else:
                word = np.uint64(int(part) & _MASK)
            key = _mix(np.asarray((key ^ word) + np.uint64(_GOLDEN)))
    return key


def permute(index: np.ndarray, n: int | np.ndarray, key: np.ndarray) -> np.ndarray:
    """The keyed bijection of `0..n-1`.

    Args:
        index: int64[...], each in `0..n-1`.
        n: size of the set; an array (broadcast with `index`) where elements belong to sets of different sizes.
        key: uint64, from `order_key`; broadcast with `index`.

    Returns:
        int64[...], the images of `index`. All elements that share `n` and `key` have different images.
    """
    index, n, key = np.broadcast_arrays(np.asarray(index, np.int64), np.asarray(n, np.int64), np.asarray(key, np.uint64))
    if index.size and (index.min() < 0 or np.any(index >= n)):
        raise ValueError("permute: an index lies outside 0..n-1")
    result = np.empty(index.shape, np.int64)
    flat_result = result.reshape(-1)
    todo = np.arange(index.size)
    value, size, keys = index.ravel().astype(np.uint64), n.ravel().astype(np.uint64), key.ravel()
    while todo.size:
        value = _network(value, size, keys)
        inside = value < size
        flat_result[todo[inside]] = value[inside].astype(np.int64)
        outside = ~inside
        todo, value, size, keys = todo[outside], value[outside], size[outside], keys[outside]
    return result


def _network(value: np.ndarray, n: np.ndarray, key: np.ndarray) -> np.ndarray:
    """One pass of the Feistel network over the rectangle that covers `0..n-1`; all arrays uint64 of one shape."""
    # float64 square roots are exact enough up to 2**52 and correctly rounded everywhere, so `rows` is the same on every machine.
    rows = np.maximum(np.ceil(np.sqrt(n.astype(np.float64))), 1.0).astype(np.uint64)
    columns = (n + rows - np.uint64(1)) // rows
    left, right = value // columns, value % columns
    with np.errstate(over="ignore"):
        for number in range(_ROUNDS):
            round_key = _mix(key + np.uint64((number + 1) * _GOLDEN & _MASK))
            if number % 2 == 0:
                left = (left + _mix(round_key ^ right) % rows) % rows
            else:
                right = (right + _mix(round_key ^ left) % columns) % columns
    return left * columns + right


def subset(n: int, count: int, seed: int = 0) -> np.ndarray:
    """The first `count` of a fixed shuffle of `0..n-1`, in ascending order: int64[min(n, count)].

    Ascending, so that neighbours stay neighbours (tiles of a region, regions of a slide) and reads stay local. A larger
    `count` contains the smaller one.
    """
    picked = permute(np.arange(min(n, count), dtype=np.int64), n, order_key(seed, _EXAMPLES, 0))
    return np.sort(picked)


def _check(n: int) -> None:
    if n < 1:
        raise DatasetError("the data holds no examples; look into its manifest for the reasons, or give another data.dir")
    if n > _MAX_EXAMPLES:
        raise DatasetError(f"{n} examples are more than int32 ids can name ({_MAX_EXAMPLES}); set data.max_tiles or split the data")


class GlobalOrder:
    """Every epoch is a permutation of all `n` examples."""

    def __init__(self, n: int, seed: int):
        _check(n)
        self.n, self.seed = int(n), int(seed)

    def example(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Maps positions int64[b] of a run to `(example ids int64[b], epochs int64[b])`."""
        positions = np.asarray(positions, np.int64)
        epoch, offset = positions // self.n, positions % self.n
        return permute(offset, self.n, order_key(self.seed, _EXAMPLES, epoch)), epoch

    def horizon(self, position: int) -> int:
        """The position up to which reading ahead is useful: none beyond `position`, since neighbours share nothing."""
        return int(position)


class BlockOrder:
    """Every epoch permutes the blocks (regions of a slide) and mixes the tiles of `window` consecutive blocks.

    The permuted blocks are cut into windows of `window` blocks; inside one, all tiles are permuted together. So whatever
    is decoded for a block is used within one window, and a reader needs to hold no more than the blocks of a window.

    Example ids count through the blocks in their given order: block `k` holds ids `sum(sizes[:k])` and the `sizes[k] - 1` after it.
    One array of the number of blocks is held for each of the two epochs used last.
    """

    def __init__(self, block_sizes: Sequence[int] | np.ndarray, seed: int, window: int):
        sizes = np.asarray(block_sizes, np.int64)
        if window < 1:
            raise DatasetError(f"data.window is {window}; it must be 1 or more blocks")
        if sizes.ndim != 1 or np.any(sizes < 0):
            raise ValueError("block_sizes must be one list of counts")
        self.n, self.seed, self.window = int(sizes.sum()), int(seed), int(window)
        _check(self.n)
        first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        # Empty blocks would make windows of uneven width and carry nothing.
        self._sizes, self._first = sizes[sizes > 0], first[sizes > 0]
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of one epoch: the first id of each block in its order, the blocks' end positions, and the windows' end positions."""
        found = self._epochs.get(epoch)
        if found is None:
            count = len(self._sizes)
            order = permute(np.arange(count), count, order_key(self.seed, _BLOCKS, epoch))
            ends = np.cumsum(self._sizes[order])
            window_ends = ends[np.minimum(np.arange(self.window, count + self.window, self.window), count) - 1]
            found = (self._first[order], ends, window_ends)
            # Replaced, not changed: several threads read batches at once.
            self._epochs = dict([*list(self._epochs.items())[-1:], (epoch, found)])
        return found

    def example(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Maps positions int64[b] of a run to `(example ids int64[b], epochs int64[b])`."""
        positions = np.asarray(positions, np.int64)
        epochs, offsets = positions // self.n, positions % self.n
        ids = np.empty(positions.shape, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            first, ends, window_ends = self._epoch(int(epoch))
            offset = offsets[here]
            window = np.searchsorted(window_ends, offset, side="right")
            start = np.concatenate([[0], window_ends])[window]
            inside = permute(offset - start, window_ends[window] - start, order_key(self.seed, _WINDOW, int(epoch), window))
            place = start + inside
            block = np.searchsorted(ends, place, side="right")
            ids[here] = first[block] + place - np.concatenate([[0], ends])[block]
        return ids, epochs

    def horizon(self, position: int) -> int:
        """The end of the window after the one that holds `position`: what a reader should have under way by then."""
        return self._window_end(self._window_end(position))

    def _window_end(self, position: int) -> int:
        epoch, offset = divmod(int(position), self.n)
        window_ends = self._epoch(epoch)[2]
        return epoch * self.n + int(window_ends[np.searchsorted(window_ends, offset, side="right")])


def make_order(name: str, *, n: int, blocks: Sequence[int] | np.ndarray, seed: int, window: int) -> GlobalOrder | BlockOrder:
    """`data.order` by name: `global`, or `blocks` with a window of `window` blocks.

    Raises:
        DatasetError: for another name, for an empty source, or for more examples than int32 ids can name.
    """
    if name == "global":
        return GlobalOrder(n, seed)
    if name == "blocks":
        return BlockOrder(blocks, seed, window)
    raise DatasetError(f"data.order is {name!r}; it is 'global' or 'blocks'")
