"""Encoded tiles to pixels: one array for the batch, filled in place by a few threads.

JPEG tiles are decoded by libjpeg's accurate integer transform through imagecodecs. It gives the same bits as
`tf.io.decode_jpeg(dct_method="INTEGER_ACCURATE")` (TensorFlow's default transform does not) in less time, and an undecodable image is an
error that knows its index. What surrounds the decoder was measured (docs/benchmarks_input.md): every thread fetches, unpacks and decodes its
own tiles, first to memory that stays in its cache.
"""

import functools
import math
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from wavepath.data.manifest import one_line
from wavepath.errors import DatasetError

_KEPT = 4  # pieces of memory that wait for their next batch
_ALIGNMENT = 64  # bytes: TensorFlow and XLA take an array over as it is from there on, and copy any other


def thread_count(threads: int) -> int:
    """Decoding threads: `threads`, or for 0 one for each core that this process may use."""
    if threads > 0:
        return threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Lease:
    """Memory that an array is made of; it goes back when neither that array nor any view of it is left, in whatever library."""

    def __init__(self, memory: np.ndarray, shape: tuple[int, ...], free: "deque[np.ndarray]"):
        self._memory, self._free = memory, free
        address = memory.ctypes.data
        address += -address % _ALIGNMENT
        self.__array_interface__ = {"shape": shape, "typestr": "|u1", "data": (address, False), "version": 3}

    def __del__(self) -> None:
        self._free.append(self._memory)


class BatchArrays:
    """Arrays for one batch after another out of the same memory: the pages of a fresh array cost a twentieth of its tiles' decoding.

    Memory is used again only once nobody holds a view of it, as an allocator would; a few pieces of it are kept.
    """

    def __init__(self) -> None:
        # Its operations are atomic: a lock could be taken twice, since a lease may end wherever Python collects garbage.
        self._free: deque[np.ndarray] = deque(maxlen=_KEPT)

    def get(self, count: int, shape: tuple[int, ...]) -> np.ndarray:
        """An uninitialised uint8[count, *shape] that begins at a multiple of 64 bytes, so that whoever takes it over need not copy it."""
        size = count * math.prod(shape) + _ALIGNMENT
        return np.asarray(_Lease(self._memory(size), (count, *shape), self._free))

    def _memory(self, size: int) -> np.ndarray:
        for _ in range(_KEPT):
            try:
                memory = self._free.pop()  # the last one to come back: a cache may still hold it
            except IndexError:
                break
            if memory.size == size:
                return memory
            self._free.appendleft(memory)
        return np.empty(size, np.uint8)


def in_threads(work: Callable[[int], None], count: int, pool: ThreadPoolExecutor, threads: int) -> None:
    """Calls `work(place)` for every place below `count`, in `threads` threads of the pool.

    Raises:
        Exception: what `work` raised; of several errors that of the first thread which met one.
    """

    def part(first: int) -> None:
        for place in range(first, count, threads):
            work(place)

    for done in [pool.submit(part, first) for first in range(min(threads, count))]:
        done.result()


@functools.cache
def _jpeg_decoder() -> Callable[..., np.ndarray]:
    import imagecodecs

    return imagecodecs.jpeg8_decode


_own = threading.local()


def _own_tile(shape: tuple[int, ...]) -> np.ndarray:
    """Memory of this thread for one tile, for a tile to be decoded in before it is copied to its place.

    libjpeg-turbo writes rows that begin at multiples of 32 bytes past the caches, as those of a batch do; that costs more than the copy. So these
    begin 16 bytes further.
    """
    if getattr(_own, "shape", None) != shape:
        memory = np.empty(math.prod(shape) + 32, np.uint8)
        start = -memory.ctypes.data % 32 + 16
        _own.shape, _own.tile = shape, memory[start : start + math.prod(shape)].reshape(shape)
    return _own.tile


def decode_jpeg(encoded: bytes, out: np.ndarray) -> None:
    """Decodes a JPEG of RGB of the size of `out` uint8[h, w, 3] into it.

    Raises:
        ValueError, RuntimeError: it is of another size or kind, or cannot be decoded (`imagecodecs.Jpeg8Error`); `out` is left as it was.
    """
    out[...] = _jpeg_decoder()(encoded, out=_own_tile(out.shape))


def decode_into(encoded: bytes, out: np.ndarray, name: Callable[[], str]) -> None:
    """Decodes a JPEG or PNG tile into `out` uint8[h, w, 3].

    Args:
        name: what to call the tile in an error.

    Raises:
        DatasetError: it cannot be decoded or has another shape.
    """
    try:
        if encoded[:3] == b"\xff\xd8\xff":
            check_whole(encoded)
            decode_jpeg(encoded, out)
            return
        from wavepath.data.tiles import decode_tile

        image = decode_tile(encoded)
    except Exception as error:  # the codecs have error classes of their own, one each
        raise DatasetError(f"{name()} cannot be decoded ({one_line(error)}); remake it, or train with --config.data.on_corrupt=replace") from None
    if image.shape != out.shape:
        raise DatasetError(f"{name()} has shape {image.shape}, the data has {out.shape}; remake it, or set --config.data.on_corrupt=replace")
    out[...] = image


def check_whole(encoded: bytes) -> None:
    """Refuses a JPEG that was cut short: libjpeg would fill the rest with grey and say nothing.

    The end marker must come after the start of the last scan (a thumbnail in the header has an end marker of its own).

    Raises:
        ValueError: no end marker.
    """
    # Nearly every file ends with the marker; searching a whole file backwards takes as long as 4 % of its decoding.
    if not encoded.endswith(b"\xff\xd9") and encoded.rfind(b"\xff\xd9") < encoded.rfind(b"\xff\xda"):
        raise ValueError("the file is cut short")
