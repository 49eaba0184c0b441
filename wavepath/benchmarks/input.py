"""How fast batches come out of a source: the input pipeline's own rate, with no model behind it."""

import time

from wavepath.data.pipeline import batches
from wavepath.data.sources import Source


def measure(source: Source, batch_size: int, seconds: float, *, order: str = "global", window: int = 8, prefetch: int = 2) -> float:
    """Images per second of the training pipeline (read, decode, batch), measured after the first two batches.

    Args:
        source: what `wavepath.data.sources.open_source` opened.
        batch_size: rows of a batch.
        seconds: how long to measure; at least one batch is timed.
        order: `global` or `blocks`, as `data.order`; window: as `data.window`.
        prefetch: batches held ready.
    """
    with batches(source, batch_size=batch_size, seed=0, order=order, window=window, prefetch=prefetch) as stream:
        # What is ready when the clock starts was not paid for: take out as much as can be held.
        for _ in range(prefetch + 2):
            next(stream)
        count, start = 0, time.perf_counter()
        while True:
            next(stream)
            count += 1
            elapsed = time.perf_counter() - start
            if elapsed >= seconds:
                return count * batch_size / elapsed
