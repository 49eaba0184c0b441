"""Decoded native tiles: a byte-limited cache that many threads share, and decoding ahead of the reader.

Decoding is what reading a slide costs (a JPEG tile of 240 px takes about 0.4 ms, its copy 0.02 ms), so a tile is decoded
once and kept while there is room. Two threads that want the same tile at the same time do not decode it twice: the second
waits for the first.
"""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np

DEFAULT_CACHE_MB = 64


class _Flight:
    """A decode in progress; whoever else wants the tile waits for `done`."""

    __slots__ = ("done", "error", "tile")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.tile: np.ndarray | None = None
        self.error: BaseException | None = None


class TileCache:
    """Least-recently-used tiles up to `limit_bytes`; safe to share between threads and between slides.

    `decoded` counts the calls of a decoder, `hits` the tiles that were found or waited for.
    """

    def __init__(self, limit_bytes: int = DEFAULT_CACHE_MB << 20):
        self.limit_bytes = int(limit_bytes)
        self.bytes = 0
        self.decoded = 0
        self.hits = 0
        self._lock = threading.Lock()
        self._tiles: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._flights: dict[Hashable, _Flight] = {}

    def __len__(self) -> int:
        return len(self._tiles)

    def get(self, key: Hashable, decode: Callable[[], np.ndarray], keep: bool = True) -> np.ndarray:
        """The tile of `key`, decoded by `decode()` where it is not held. The array is read-only: it is shared.

        With `keep=False` a tile decoded now is not held: its caller knows that nobody comes back for it.

        Raises:
            Whatever `decode` raises, in every thread that waited for it; nothing is kept then.
        """
        with self._lock:
            tile = self._tiles.get(key)
            if tile is not None:
                self._tiles.move_to_end(key)
                self.hits += 1
                return tile
            flight = self._flights.get(key)
            mine = flight is None
            if mine:
                flight = self._flights[key] = _Flight()
                self.decoded += 1
            else:
                self.hits += 1
        if not mine:
            flight.done.wait()
            if flight.error is not None:
                raise flight.error
            return flight.tile
        try:
            tile = decode()
            tile.flags.writeable = False
            flight.tile = tile
        except BaseException as error:
            flight.error = error
            raise
        finally:
            with self._lock:
                del self._flights[key]
                if flight.error is None and keep:
                    self._keep(key, tile)
            flight.done.set()
        return tile

    def _keep(self, key: Hashable, tile: np.ndarray) -> None:
        if tile.nbytes > self.limit_bytes:
            return
        self._tiles[key] = tile
        self.bytes += tile.nbytes
        while self.bytes > self.limit_bytes:
            _, dropped = self._tiles.popitem(last=False)
            self.bytes -= dropped.nbytes

    def state(self, key: Hashable) -> str:
        """`held`, `decoding` or `absent`, at this moment."""
        with self._lock:
            return "held" if key in self._tiles else "decoding" if key in self._flights else "absent"

    def drop(self, owner: Any) -> None:
        """Forgets the tiles of one slide: those whose key is a tuple that starts with `owner`."""
        with self._lock:
            for key in [key for key in self._tiles if isinstance(key, tuple) and key and key[0] is owner]:
                self.bytes -= self._tiles.pop(key).nbytes


class DecodeAhead:
    """Lets `threads - 1` helpers decode the tiles of a known order ahead of one reader, who decodes too.

    `tiles` is the order in which the reader will first need them, `decode(tile)` puts one into the cache and `state(tile)`
    asks for its state there. Helpers stay at most `window` tiles ahead, so that what they decode is still held when the
    reader comes. An error in a helper is left for the reader to meet: it decodes that tile again and raises.
    """

    def __init__(self, tiles: Sequence[Any], decode: Callable[[Any], Any], state: Callable[[Any], str], threads: int, window: int):
        self._tiles, self._decode, self._state, self._window = tiles, decode, state, max(1, window)
        self._place = {tile: index for index, tile in enumerate(tiles)}
        self._next = self._needed = 0
        self._stop = False
        self._change = threading.Condition()
        self._helpers = [threading.Thread(target=self._help, daemon=True, name="wavepath-decode") for _ in range(threads - 1)]
        for helper in self._helpers:
            helper.start()

    def _take(self) -> Any:
        """The next tile nobody has started, within the window; None where there is none now."""
        while self._next < min(len(self._tiles), self._needed + self._window):
            tile = self._tiles[self._next]
            self._next += 1
            if self._state(tile) == "absent":
                return tile
        return None

    def _help(self) -> None:
        while True:
            with self._change:
                while not self._stop and (tile := self._take()) is None:
                    if self._next >= len(self._tiles):
                        return
                    self._change.wait()
                if self._stop:
                    return
            # The reader decodes a damaged tile again when it comes to it, and raises what is wrong with it.
            with contextlib.suppress(Exception):
                self._decode(tile)

    def need(self, tile: Any) -> None:
        """The reader wants `tile` now: returns when nothing better can be done than to get it from the cache.

        While a helper decodes it, the reader decodes later ones instead of waiting.
        """
        place = self._place.get(tile)
        if place is not None and place >= self._needed:
            with self._change:
                self._needed = place + 1
                self._change.notify_all()
        while self._state(tile) == "decoding":
            with self._change:
                other = self._take()
            if other is None:
                return
            with contextlib.suppress(Exception):
                self._decode(other)

    def close(self) -> None:
        """Ends the helpers; they finish the tile they are at."""
        with self._change:
            self._stop = True
            self._change.notify_all()
        for helper in self._helpers:
            helper.join()

    def __enter__(self) -> "DecodeAhead":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def tile_order(boxes: Sequence[tuple[int, int, int, int]], tile: tuple[int, int], size: tuple[int, int], limit_bytes: int) -> Iterator[int]:
    """The order in which to read `boxes` (x, y, w, h in level pixels) so that each native tile is decoded once.

    Row by row of the native grid, in vertical stripes narrow enough that the tiles of one sweep stay in half of
    `limit_bytes`; only the column of tiles between two stripes can be decoded twice.
    """
    (tw, th), (width, height) = tile, size
    tallest = max((box[3] for box in boxes), default=1)
    rows = -(-min(tallest, height) // th) + 2
    columns = max(1, limit_bytes // 2 // (rows * tw * th * 3))
    if columns * tw >= width:
        columns = -(-width // tw) + 1

    def place(index: int) -> tuple[int, int, int, int, int]:
        x, y = boxes[index][:2]
        return (x // tw // columns, y // th, x // tw, y, x)

    return iter(sorted(range(len(boxes)), key=place))
