"""What the input pipeline is held against: the JPEG decoder with nothing around it, and torch's DataLoader with PIL.

The bound decodes JPEG bytes that are in memory already into one array that is there already, with as many threads as the pipeline has; of the
decoders installed it takes the one that is fastest on these tiles.

The DataLoader runs in a process of its own (this module as a program), since it forks and threads of JAX and TensorFlow do not survive that. That
process imports torch, Pillow and NumPy alone and is told on its standard input when to work. Its dataset is a folder of JPEG files: the tiles'
own bytes. Workers stay alive between turns, and what they hold ready when a turn begins is taken out before the clock starts.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wavepath.errors import WavepathError

MODES = ("tensor", "uint8")  # with ToTensor: float32 in [0, 1], channels first; or the pixels as they are
_AHEAD = 2  # batches that torch holds ready for each worker: its own default
_PAGE = 64  # tiles that a thread of the bound decodes between two looks at the clock
_PATIENCE = 50  # tenths of a second


@dataclass(frozen=True)
class Turn:
    """What one turn gave: images, wall seconds, and processor seconds of every thread and process that worked for it."""

    images: int
    seconds: float
    cpu: float

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / self.seconds

    @property
    def cost(self) -> float:
        """Processor microseconds per image."""
        return self.cpu / self.images * 1e6


def decoders() -> dict[str, Callable[[bytes, np.ndarray], Any]]:
    """The installed JPEG decoders: name -> function that decodes bytes into uint8[h, w, 3]."""
    import imagecodecs
    from PIL import Image

    from wavepath.data.pipeline import tensorflow

    tf = tensorflow()

    def pillow(encoded: bytes, out: np.ndarray) -> None:
        with Image.open(io.BytesIO(encoded)) as image:
            out[...] = np.asarray(image)

    def tensorflow_io(encoded: bytes, out: np.ndarray) -> None:
        out[...] = tf.io.decode_jpeg(encoded, channels=3).numpy()  # its default transform, which is the faster one and not exact

    return {"imagecodecs": lambda encoded, out: imagecodecs.jpeg8_decode(encoded, out=out), "Pillow": pillow, "tf.io": tensorflow_io}


def decoder_costs(tiles: Sequence[bytes], shape: tuple[int, int, int], runs: int = 5) -> dict[str, float]:
    """Processor microseconds per tile of each installed decoder in one thread: the least of some rounds in rotation."""
    out, costs = np.empty(shape, np.uint8), {}
    for _ in range(runs):
        for name, decode in decoders().items():
            start = time.process_time()
            for encoded in tiles:
                decode(encoded, out)
            spent = (time.process_time() - start) / len(tiles) * 1e6
            costs[name] = min(costs.get(name, spent), spent)
    return costs


class Bound:
    """The decode bound: `threads` threads that only decode, out of memory into memory.

    Args:
        tiles: JPEG bytes, all of one shape.
        shape: (height, width, 3).
        name: of `decoders()`.
    """

    def __init__(self, tiles: Sequence[bytes], shape: tuple[int, int, int], threads: int, name: str = "imagecodecs"):
        self._tiles, self._threads, self._decode = tiles, threads, decoders()[name]
        self._out = np.zeros((threads, _PAGE, *shape), np.uint8)  # touched: no page is new when the clock runs
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="bound")

    def turn(self, seconds: float) -> Turn:
        """Decodes for about so long; every thread at least a page of tiles."""
        count = [0] * self._threads
        start, cpu = time.perf_counter(), time.process_time()

        def work(thread: int) -> None:
            place = thread * len(self._tiles) // self._threads
            while not count[thread] or time.perf_counter() - start < seconds:
                for row in range(_PAGE):
                    self._decode(self._tiles[(place + row) % len(self._tiles)], self._out[thread, row])
                place += _PAGE
                count[thread] += _PAGE

        for done in [self._pool.submit(work, thread) for thread in range(self._threads)]:
            done.result()
        return Turn(sum(count), time.perf_counter() - start, time.process_time() - cpu)

    def close(self) -> None:
        self._pool.shutdown(wait=True)


class TorchLoader:
    """torch's DataLoader over a folder of JPEG files, in a child process. A context manager.

    Args:
        folder: of files `*.jpg` of one size.
        batch_size: rows of a batch.
        workers: worker processes.

    Raises:
        WavepathError: the child ended, with its last line.
    """

    def __init__(self, folder: Path, batch_size: int, workers: int):
        command = [sys.executable, "-m", __spec__.name, str(folder), str(batch_size), str(workers)]
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True)
        try:
            self.version = self._answer()["torch"]
        except BaseException:
            self.__exit__()
            raise

    def _answer(self) -> dict[str, Any]:
        line = self._child.stdout.readline()
        if not line:
            code = self._child.wait()
            self._said.seek(0)
            raise WavepathError(f"torch's DataLoader ended with code {code}: {_reason(self._said.read())}")
        return json.loads(line)

    def turn(self, mode: str, seconds: float) -> Turn:
        """Loads batches for about so long; `mode` is one of `MODES`."""
        with contextlib.suppress(BrokenPipeError):  # it has ended, and the answer says why
            self._child.stdin.write(f"{mode} {seconds}\n")
            self._child.stdin.flush()
        return Turn(**self._answer())

    def __enter__(self) -> "TorchLoader":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()  # the child ends at the end of its input
        self._child.wait()
        self._child.stdout.close()
        self._said.close()


def _reason(said: str) -> str:
    """The last line of what the child said, and what helps.

    Batches pass from worker to worker through shared memory, of which a container has little.
    """
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = lines[-1] if lines else "it said nothing"
    if any(word in said for word in ("shm", "shared memory", "Bus error", "No space left")):
        last += "; its workers need more shared memory (/dev/shm): give the container more by --shm-size, or measure with fewer --threads"
    return last


class _Files:
    """A map-style dataset of torch: PIL opens and decodes, `mode` says what becomes of the pixels."""

    def __init__(self, paths: list[str], mode: str):
        self.paths, self.mode = paths, mode

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        import torch
        from PIL import Image

        with open(self.paths[index], "rb") as file:
            pixels = np.array(Image.open(file).convert("RGB"))  # writable, as torch wants it
        if self.mode == "uint8":
            return torch.from_numpy(pixels)
        # What torchvision's ToTensor does.
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().to(torch.float32).div(255)


def _ids(count: int, batch_size: int) -> Iterator[list[int]]:
    """Batches of indices without end, each pass in another order."""
    generator = np.random.default_rng(0)
    while True:
        order = np.concatenate([generator.permutation(count) for _ in range(-(-batch_size // count))]).tolist()
        for first in range(0, len(order) - batch_size + 1, batch_size):
            yield order[first : first + batch_size]


def _processor_seconds(processes: Sequence[int]) -> float:
    """User and system time of some processes, from /proc (0 where there is none)."""
    total = 0
    for process in processes:
        status = Path(f"/proc/{process}/stat")
        if status.is_file():
            total += sum(int(number) for number in status.read_text().rpartition(")")[2].split()[11:13])
    return total / os.sysconf("SC_CLK_TCK")


def serve(folder: Path, batch_size: int, workers: int) -> None:
    """The child: reads `mode seconds` a line, answers with one line of JSON, until its input ends."""
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    paths = sorted(str(path) for path in folder.glob("*.jpg"))
    streams: dict[str, Any] = {}
    print(json.dumps({"torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        mode, seconds = line.split()
        if mode not in streams:
            loader = DataLoader(_Files(paths, mode), batch_sampler=_ids(len(paths), batch_size), num_workers=workers, prefetch_factor=_AHEAD)
            streams[mode] = iter(loader)
        stream = streams[mode]
        processes = [os.getpid(), *(worker.pid for worker in stream._workers)]
        for _ in range(_AHEAD * workers + 1):
            next(stream)
        images, start, cpu = 0, time.perf_counter(), _processor_seconds(processes)
        while (elapsed := time.perf_counter() - start) < float(seconds) or not images:
            images += len(next(stream))
        answer = {"images": images, "seconds": elapsed, "cpu": _processor_seconds(processes) - cpu}
        _settle(processes)
        print(json.dumps(answer), flush=True)


def _settle(processes: Sequence[int]) -> None:
    """Waits until the workers have filled up what was taken: the next contender is to have the cores for itself."""
    for _ in range(_PATIENCE):
        before = _processor_seconds(processes)
        time.sleep(0.1)
        if _processor_seconds(processes) - before < 0.02:
            return


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("batch_size", type=int)
    parser.add_argument("workers", type=int)
    arguments = parser.parse_args()
    serve(arguments.folder, arguments.batch_size, arguments.workers)
