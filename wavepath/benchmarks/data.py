"""The read stage: 224-px tiles a second over level 0 of a slide, wavepath against OpenSlide one tile at a time.

Both give uint8 RGB arrays; before anything is timed, every tile is compared, and a single differing pixel is reported. Runs
alternate (wavepath first in one, OpenSlide first in the next), each with a slide newly opened and the file in the page cache,
so that a change of the machine's load meets both; the ratio is the median over the runs' own ratios. Encoding (JPEG, quality
90) and writing (array_record) of the same tiles are measured apart, since they cost the same whoever reads.
"""

import argparse
import contextlib
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

TILE = 224
_PHANTOM_SIZE = 4096
Box = tuple[int, int, int, int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--slides", type=Path, nargs="+", default=[], metavar="SLIDE", help="slides or folders of them (default: a phantom made now)")
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each reader, at least 1 (default: 7)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads to measure, the same for both (default: 1 2)")
    parser.add_argument("--max-tiles", type=int, default=2000, help="of a larger slide, the middle rows with at most so many tiles (default: 2000)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write everything measured, every run, as JSON")


def boxes_of(width: int, height: int, most: int, tile: int = TILE) -> list[Box]:
    """Tiles that cover a level, row by row (the last column and row moved inwards); of a larger level the middle rows with at most `most`."""
    if width < tile or height < tile:
        return []
    columns = [min(x, width - tile) for x in range(0, width, tile)]
    rows = [min(y, height - tile) for y in range(0, height, tile)]
    wanted = max(1, min(len(rows), most // len(columns)))
    first = (len(rows) - wanted) // 2
    return [(x, y, tile, tile) for y in rows[first : first + wanted] for x in columns][:most]


class WavepathReader:
    """This package's reader: native tiles decoded once each, `threads` decoding."""

    def __init__(self, path: Path):
        from wavepath.data.slides import open_slide

        self._slide = open_slide(path)

    def read(self, boxes: list[Box], threads: int) -> Iterator[tuple[int, np.ndarray]]:
        """(index, uint8[h, w, 3]) of every box, in the order of the native tiles."""
        return self._slide.read_many(0, boxes, threads=threads)

    def close(self) -> None:
        self._slide.close()


class OpenSlideReader:
    """OpenSlide as most programs use it: one `read_region` for each tile, from a pool where there is more than one thread."""

    def __init__(self, path: Path):
        import openslide

        self._slide = openslide.OpenSlide(str(path))

    def _one(self, box: Box) -> np.ndarray:
        return np.asarray(self._slide.read_region(box[:2], 0, box[2:]).convert("RGB"))

    def read(self, boxes: list[Box], threads: int) -> Iterator[tuple[int, np.ndarray]]:
        """(index, uint8[h, w, 3]) of every box, in their order."""
        if threads == 1:
            yield from enumerate(map(self._one, boxes))
            return
        with ThreadPoolExecutor(threads) as pool:
            yield from enumerate(pool.map(self._one, boxes))

    def close(self) -> None:
        self._slide.close()


READERS = {"wavepath": WavepathReader, "openslide": OpenSlideReader}


def differing_pixels(path: Path, boxes: list[Box]) -> int:
    """Pixels in which the two readers differ, over all boxes."""
    with contextlib.closing(WavepathReader(path)) as ours, contextlib.closing(OpenSlideReader(path)) as theirs:
        different = 0
        rows = itertools.groupby(boxes, key=lambda box: box[1])
        for _, row in rows:
            row = list(row)
            own = dict(ours.read(row, 1))
            different += sum(int((own[index] != tile).any(axis=-1).sum()) for index, tile in theirs.read(row, 1))
        return different


def rate(name: str, path: Path, boxes: list[Box], threads: int) -> float:
    """Tiles a second of one pass with a slide newly opened; opening it is not counted."""
    with contextlib.closing(READERS[name](path)) as reader:
        start = time.perf_counter()
        count = sum(1 for _ in reader.read(boxes, threads))
        return count / (time.perf_counter() - start)


def measure_reading(path: Path, boxes: list[Box], threads: int, runs: int, advance: Callable[[], None] = lambda: None) -> dict[str, object]:
    """Rates (tiles/s) of both readers run by run, their medians, and the median of the runs' ratios."""
    rates: dict[str, list[float]] = {name: [] for name in READERS}
    for run_number in range(runs):
        for name in sorted(READERS, reverse=run_number % 2 == 0):
            rates[name].append(rate(name, path, boxes, threads))
            advance()
    ratios = [ours / theirs for ours, theirs in zip(rates["wavepath"], rates["openslide"], strict=True)]
    return {
        "threads": threads,
        "wavepath": statistics.median(rates["wavepath"]),
        "openslide": statistics.median(rates["openslide"]),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "runs": rates,
    }


def measure_storing(path: Path, boxes: list[Box], runs: int, folder: Path) -> dict[str, float]:
    """Tiles a second, one thread: JPEG encoding at quality 90, and writing the encoded tiles as examples to one shard."""
    from wavepath.data.records import ShardWriter, encode_example
    from wavepath.data.tiles import encode_tile

    with contextlib.closing(WavepathReader(path)) as reader:
        tiles = [tile for _, tile in reader.read(boxes[:256], 1)]
    fields = {"energy": 0.0, "mpp": 0.25, "region": 0, "slide": "bench", "x": 0, "y": 0}
    encode, write = [], []
    for run_number in range(runs):
        start = time.perf_counter()
        encoded = [encode_tile(tile, "jpeg", 90) for tile in tiles]
        encode.append(len(tiles) / (time.perf_counter() - start))
        start = time.perf_counter()
        with ShardWriter(folder / f"{run_number}.array_record") as writer:
            for index, data in enumerate(encoded):
                writer.write(encode_example({**fields, "id": index, "tile": data}))
        write.append(len(tiles) / (time.perf_counter() - start))
    return {"encode": statistics.median(encode), "write": statistics.median(write)}


def machine() -> dict[str, object]:
    """What the numbers were taken on."""
    model = ""
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return {"cpu": model or platform.processor(), "cpus": os.cpu_count(), "load_at_start": round(load, 2), "python": platform.python_version()}


def measure(slides: list[tuple[str, Path]], runs: int, threads: list[int], most: int) -> dict[str, object]:
    """Everything that `wavepath bench data` reports, as JSON values.

    Raises:
        SlideError: a slide cannot be opened, or is smaller than a tile.
    """
    import tempfile

    from wavepath.console import progress
    from wavepath.data.slide_openslide import detect_format
    from wavepath.data.slides import open_slide
    from wavepath.errors import SlideError

    results = []
    report = {"machine": machine(), "slides": results}
    with progress("bench data", len(slides) * len(threads) * runs * 2, "passes") as bar, tempfile.TemporaryDirectory() as folder:
        for name, path in slides:
            with open_slide(path) as slide:
                boxes = boxes_of(*slide.dimensions, most)
                facts = {"id": name, "compression": slide.compression, "backend": slide.backend, "tile": list(slide.tile_sizes[0])}
            if not boxes:
                raise SlideError(f"{path} is smaller than one {TILE}-px tile; bench a larger slide")
            if detect_format(path) is None:
                raise SlideError(f"{path} is in no format of OpenSlide, so there is nothing to compare with; bench another slide")
            different = differing_pixels(path, boxes)
            reading = [measure_reading(path, boxes, count, runs, lambda name=name: bar.advance(1, name)) for count in threads]
            storing = measure_storing(path, boxes, runs, Path(folder))
            results.append({**facts, "tiles": len(boxes), "differing_pixels": different, "reading": reading, **storing})
    return report


def as_table(report: dict) -> str:
    """The report for people: one line for each slide and number of threads."""
    from wavepath.console import table

    rows = []
    for slide in report["slides"]:
        for reading in slide["reading"]:
            low, high = reading["ratio_range"]
            same = "identical" if not slide["differing_pixels"] else f"{slide['differing_pixels']} DIFFER"
            rows.append([
                slide["id"], slide["compression"], slide["tiles"], reading["threads"], f"{reading['wavepath']:.0f}", f"{reading['openslide']:.0f}",
                f"{reading['ratio']:.2f}", f"{low:.2f}..{high:.2f}", same, f"{slide['encode']:.0f}", f"{slide['write']:.0f}",
            ])
    header = ["slide", "compression", "tiles", "threads", "wavepath/s", "openslide/s", "ratio", "range", "pixels", "encode/s", "write/s"]
    return table(header, rows)


def run(args: argparse.Namespace) -> int:
    import tempfile

    from wavepath.console import say
    from wavepath.data.slides import find_slides
    from wavepath.errors import EXIT_NOTHING, EXIT_OK, ConfigError
    from wavepath.files import write_json

    if args.runs < 1 or args.max_tiles < 2 or min(args.threads) < 1:
        raise ConfigError("--runs and --threads are at least 1, --max-tiles at least 2")
    with tempfile.TemporaryDirectory() as folder:
        if args.slides:
            slides = [(ref.id, ref.path) for given in args.slides for ref in find_slides(given)]
        else:
            from wavepath.data.phantom import make_phantoms

            made = make_phantoms(Path(folder), slides=1, seed=0, size=_PHANTOM_SIZE)
            slides = [(path.stem, path) for path in made]
        report = measure(slides, args.runs, args.threads, args.max_tiles)
    print(as_table(report))
    say("tiles of 224 px a second; ratio: median over the runs of wavepath's rate by OpenSlide's; encode and write: one thread, JPEG quality 90")
    if args.json:
        write_json(args.json, report)
    return EXIT_OK if not any(slide["differing_pixels"] for slide in report["slides"]) else EXIT_NOTHING
