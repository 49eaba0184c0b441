"""How fast batches come out of a source: the input pipeline's own rate, with no model behind it."""

import argparse
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wavepath.data.sources import Source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--data", type=Path, help="a folder of `wavepath prepare`, or a folder of images")
    given.add_argument("--slides", type=Path, help="slides to stream tiles from, all tissue, with the default settings of `prepare`")
    parser.add_argument("--batch-size", type=int, default=128, help="rows of a batch (default: 128)")
    parser.add_argument("--order", choices=["global", "blocks"], default="global", help="as config.data.order (default: global)")
    parser.add_argument("--threads", type=int, default=2, help="as config.data.threads (default: 2)")
    parser.add_argument("--runs", type=int, default=7, help="timed runs (default: 7)")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds of each run (default: 3)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write every run as JSON")


def measure(source: "Source", batch_size: int, seconds: float, *, order: str = "global", window: int = 8, prefetch: int = 2) -> float:
    """Images per second of the training pipeline (read, decode, batch), measured after the first two batches.

    Args:
        source: what `wavepath.data.sources.open_source` opened.
        batch_size: rows of a batch.
        seconds: how long to measure; at least one batch is timed.
        order: `global` or `blocks`, as `data.order`; window: as `data.window`.
        prefetch: batches held ready.
    """
    from wavepath.data.pipeline import batches

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


def run(args: argparse.Namespace) -> int:
    """Measures and prints; the exit code."""
    from wavepath.benchmarks.data import machine
    from wavepath.console import progress, table
    from wavepath.data.sources import open_source
    from wavepath.defaults import train_defaults
    from wavepath.errors import ConfigError
    from wavepath.files import write_json

    if args.runs < 1 or args.batch_size < 1 or args.threads < 1 or args.seconds <= 0:
        raise ConfigError("--runs, --batch-size and --threads are at least 1, --seconds above 0")
    config = train_defaults()
    config.data.dir, config.data.slides = str(args.data or ""), str(args.slides or "")
    config.data.threads, config.data.mixed_mpp, config.prepare.select.mode = args.threads, True, "all"
    source, where = open_source(config), machine()
    rates = []
    with progress("input pipeline", args.runs, "runs") as bar:
        for _ in range(args.runs):
            rates.append(measure(source, args.batch_size, args.seconds, order=args.order))
            bar.advance(1, f"{rates[-1]:.0f} images/s")
    report = {
        "machine": where, "source": source.name, "kind": source.kind, "examples": len(source), "image_shape": list(source.image_shape),
        "batch_size": args.batch_size, "order": args.order, "threads": args.threads, "images_per_second": rates, "median": statistics.median(rates),
    }
    source.close()
    if args.json:
        write_json(args.json, report)
    side = "x".join(str(number) for number in report["image_shape"][:2])
    row = [report["kind"], side, args.order, args.batch_size, args.threads, f"{report['median']:.0f}", f"{min(rates):.0f}..{max(rates):.0f}"]
    print(table(["source", "px", "order", "batch", "threads", "images/s", "range"], [row]))
    return 0
