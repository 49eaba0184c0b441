"""The input rate is that of the source behind the pipeline."""

import threading
import time

import numpy as np

from wavepath.benchmarks.input import measure
from wavepath.data.sources import Source, Span


class Slow(Source):
    """Two batches never at once, each 20 ms: five images a batch are 250 images a second."""

    lock = threading.Lock()

    def __init__(self):
        self.name, self.image_shape = "slow", (4, 4, 3)
        self.spans, self.blocks = [Span("s", 0, 23, 0.25)], np.array([23])

    def images(self, example_ids):
        with self.lock:
            time.sleep(0.02)
        return np.zeros((len(example_ids), 4, 4, 3), np.uint8)


def test_the_rate_is_that_of_the_source():
    assert 40 < measure(Slow(), batch_size=5, seconds=0.5) < 290
