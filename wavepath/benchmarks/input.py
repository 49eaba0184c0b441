"""How fast batches come out of a source: the input pipeline's own rate, with no model behind it.

Beside it, in rotation and of the same JPEG tiles, the bound: a decoder with nothing around it, out of memory into memory, with as many threads. With
`--peer torch` also torch's DataLoader over the tiles as files, PIL decoding, one worker for each thread: with ToTensor (float32), and with
the pixels left uint8. Each turn counts images, wall time and the processor time of all that worked for it; ratios are taken round by round. A machine
shared with others distorts the rates; the processor time per image it distorts less.
"""

import argparse
import contextlib
import io
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wavepath.benchmarks.input_peers import MODES, Turn
from wavepath.benchmarks.timing import rounds, spread

if TYPE_CHECKING:
    from wavepath.data.sources import Source

_TILES = 1024  # of the bound, and files of torch's folder: more than any cache of the processor holds
_LABELS = {
    "wavepath": "wavepath, uint8", "bound": "decode bound", "tensor": "torch DataLoader, PIL, ToTensor", "uint8": "torch DataLoader, PIL, uint8",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--data", type=Path, help="a folder of `wavepath prepare`, or a folder of images")
    given.add_argument("--slides", type=Path, help="slides to stream tiles from, all tissue, with the default settings of `prepare`")
    parser.add_argument("--batch-size", type=int, default=128, help="rows of a batch (default: 128)")
    parser.add_argument("--order", choices=["global", "blocks"], default="global", help="as config.data.order (default: global)")
    parser.add_argument("--threads", type=int, default=0, help="of wavepath and of the bound, workers of torch (default: 0, one for each core)")
    parser.add_argument("--peer", choices=["torch"], help="also measure torch's DataLoader; needs wavepath[bench]")
    parser.add_argument("--runs", type=int, default=7, help="rounds, in each of which every contender has its turn (default: 7)")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds of each turn (default: 3)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write every turn as JSON")
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="also write the tables as Markdown")


def turn(source: "Source", batch_size: int, seconds: float, *, order: str = "global", window: int = 8, prefetch: int = 2) -> Turn:
    """One turn of the training pipeline (read, decode, batch), measured after its first batches.

    Args:
        source: what `wavepath.data.sources.open_source` opened.
        batch_size: rows of a batch.
        seconds: how long to measure; at least two batches are timed.
        order: `global` or `blocks`, as `data.order`; window: as `data.window`.
        prefetch: batches held ready.
    """
    from wavepath.data.pipeline import batches

    with batches(source, batch_size=batch_size, seed=0, order=order, window=window, prefetch=prefetch) as stream:
        # What is ready when the clock starts was not paid for: take out as much as can be held.
        for _ in range(prefetch + 2):
            next(stream)
        count, start, cpu = 0, time.perf_counter(), time.process_time()
        while True:
            # Batches are read two at once: counted singly, one that is half done would tip a short turn.
            for _ in range(2):
                next(stream)
            count += 2
            elapsed = time.perf_counter() - start
            if elapsed >= seconds:
                return Turn(count * batch_size, elapsed, time.process_time() - cpu)


def measure(source: "Source", batch_size: int, seconds: float, *, order: str = "global", window: int = 8, prefetch: int = 2) -> float:
    """Images per second of the training pipeline; arguments as of `turn`."""
    return turn(source, batch_size, seconds, order=order, window=window, prefetch=prefetch).rate


def _settle() -> None:
    """Batches that were under way when a stream closed are finished and dropped meanwhile."""
    before = -1.0
    while time.process_time() - before > 0.02:
        before = time.process_time()
        time.sleep(0.1)


def rotate(contenders: Mapping[str, Callable[[], Turn]], runs: int, advance: Callable[[str], None] = lambda text: None) -> dict[str, list[Turn]]:
    """The turns of every contender, one a round, in an order that rotates; each has one more before, which does not count."""
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}

    def take(name: str) -> Turn:
        _settle()
        return contenders[name]()

    for name in contenders:
        take(name)
    advance("warmed up")
    for _, name in rounds(contenders, runs):
        turns[name].append(take(name))
        if len({len(some) for some in turns.values()}) == 1:
            advance(f"wavepath {turns['wavepath'][-1].rate:.0f} images/s")
    return turns


def results(turns: Mapping[str, Sequence[Turn]]) -> dict[str, Any]:
    """Medians, ranges and ratios as JSON values. `of` and `cost_of`: the rate and the processor time per image as shares of wavepath's."""
    ours, out = turns["wavepath"], {}
    for name, some in turns.items():
        rates, costs = [one.rate for one in some], [one.cost for one in some]
        out[name] = {
            "images_per_second": rates, "median": statistics.median(rates), "cpu_us_per_image": statistics.median(costs), "cpu_us": costs,
            "wavepath_rate_over": spread([one.rate for one in ours], rates),
            "cost_over_wavepath": spread(costs, [one.cost for one in ours]) if min(one.cost for one in ours) > 0 else None,
        }
    return out


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """The lines of the table, one for each contender."""
    table = []
    for name, one in found.items():
        rates, (middle, low, high) = one["images_per_second"], one["wavepath_rate_over"]
        line = [_LABELS[name], f"{one['median']:.0f}", f"{min(rates):.0f}..{max(rates):.0f}", f"{one['cpu_us_per_image']:.0f}"]
        line += ["", ""] if name == "wavepath" else [f"{middle:.2f} ({low:.2f}..{high:.2f})", _cost(one["cost_over_wavepath"])]
        table.append(line)
    return table


def _cost(shares: Sequence[float] | None) -> str:
    return f"{shares[0]:.2f} ({shares[1]:.2f}..{shares[2]:.2f})" if shares else "-"


HEADER = ["contender", "images/s", "range", "CPU us/image", "wavepath's rate over it", "its CPU over wavepath's"]


def jpeg_tiles(source: "Source", count: int = _TILES) -> list[bytes] | None:
    """Encoded tiles drawn evenly from the source; None where they are not RGB JPEG of the source's own size, so that a decode bound means nothing."""
    from PIL import Image

    from wavepath.data import order

    if source.kind == "stream":  # would be encoded for the purpose
        return None
    tiles = source.read(order.subset(len(source), count) if count < len(source) else range(len(source)))
    for tile in tiles:
        if tile[:3] != b"\xff\xd8\xff":
            return None
        with Image.open(io.BytesIO(tile)) as image:
            if (image.height, image.width, 3) != source.image_shape or image.mode != "RGB":
                return None
    return tiles


def run(args: argparse.Namespace) -> int:
    """Measures and prints; the exit code."""
    from wavepath.benchmarks.data import machine
    from wavepath.benchmarks.timing import publish, versions
    from wavepath.console import progress
    from wavepath.data.decode import thread_count
    from wavepath.data.sources import open_source
    from wavepath.defaults import train_defaults
    from wavepath.errors import ConfigError

    if args.runs < 1 or args.batch_size < 1 or args.threads < 0 or args.seconds <= 0:
        raise ConfigError("--runs and --batch-size are at least 1, --threads at least 0, --seconds above 0")
    config, threads = train_defaults(), thread_count(args.threads)
    config.data.dir, config.data.slides = str(args.data or ""), str(args.slides or "")
    config.data.threads, config.data.mixed_mpp, config.prepare.select.mode = threads, True, "all"
    where, lines = machine(), []
    with contextlib.closing(open_source(config)) as source, contextlib.ExitStack() as stack:
        contenders: dict[str, Callable[[], Turn]] = {"wavepath": lambda: turn(source, args.batch_size, args.seconds, order=args.order)}
        tiles, costs = jpeg_tiles(source), {}
        if tiles:
            costs = add_peers(contenders, tiles, source.image_shape, threads, args, stack)
            size = statistics.mean(len(tile) for tile in tiles) / 1000
            listed = ", ".join(f"{name} {cost:.0f}" for name, cost in sorted(costs.items(), key=lambda item: item[1]))
            lines.append(f"one thread, CPU us of one tile ({size:.1f} kB of JPEG): {listed}; the bound is {min(costs, key=costs.get)}")
        else:
            lines.append("no decode bound and no peers: these are measured on JPEG tiles of one size, prepared or in a folder")
        with progress("input pipeline", args.runs + 1, "rounds") as bar:
            found = results(rotate(contenders, args.runs, lambda text: bar.advance(1, text)))
        facts = {"source": source.name, "source_kind": source.kind, "examples": len(source), "image_shape": list(source.image_shape)}
    flags = [f"--data={args.data}" if args.data else f"--slides={args.slides}", f"--batch-size={args.batch_size}", f"--order={args.order}"]
    flags += [f"--threads={args.threads}"] * bool(args.threads) + [f"--peer={args.peer}"] * bool(args.peer)
    command = shlex.join(["wavepath", "bench", "input", *flags, f"--runs={args.runs}", f"--seconds={args.seconds:g}"])
    report = {
        "command": command, "machine": where, **facts, "batch_size": args.batch_size, "order": args.order, "threads": threads, "rounds": args.runs,
        "decoders_us": costs,
        "images_per_second": found["wavepath"]["images_per_second"], "median": found["wavepath"]["median"], "contenders": found,
    }
    side = "x".join(str(number) for number in report["image_shape"][:2])
    heading = [
        f"{where['cpu'] or 'unknown processor'}, {where['cpus']} cores, load {where['load_at_start']} at the start",
        f"{len(source)} tiles of {side} px ({source.kind}), order {args.order}, batches of {args.batch_size}, {threads} threads; "
        f"{args.runs} rounds of {args.seconds:g} s a turn",
        ", ".join(f"{name} {version}" for name, version in versions(["imagecodecs", "pillow", "tensorflow-cpu", "array-record", "torch"]).items()),
        f"`{command}`",
    ]
    lines += [f"{text}: {found[name]['wavepath_rate_over'][0]:.2f} ({bound})" for name, text, bound in (
        ("bound", "share of the decode bound", "at least 0.90 is wanted"),
        ("tensor", "times torch's DataLoader with ToTensor", "at least 2 is wanted"),
        ("uint8", "times torch's DataLoader, uint8", "reported"),
    ) if name in found]
    publish(report, heading, [(HEADER, rows(found))], lines, args.json, args.markdown)
    return 0


def add_peers(
    contenders: dict[str, Callable[[], Turn]], tiles: Sequence[bytes], shape: tuple[int, int, int], threads: int, args: argparse.Namespace,
    stack: contextlib.ExitStack,
) -> dict[str, float]:
    """Adds the bound and what `--peer` asks for; returns the decoders' processor microseconds per tile, of which the bound is the least.

    Raises:
        ConfigError: torch is not installed.
    """
    from wavepath.benchmarks import torch_mae
    from wavepath.benchmarks.input_peers import Bound, TorchLoader, decoder_costs

    costs = decoder_costs(tiles[:128], shape)
    bound = stack.enter_context(contextlib.closing(Bound(tiles, shape, threads, min(costs, key=costs.get))))
    contenders["bound"] = lambda: bound.turn(args.seconds)
    if args.peer:
        torch_mae.require(["torch"])
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wavepath-bench-")))
        for number, tile in enumerate(tiles):
            (folder / f"{number:05d}.jpg").write_bytes(tile)
        loader = stack.enter_context(TorchLoader(folder, args.batch_size, threads))
        for mode in MODES:
            contenders[mode] = lambda mode=mode: loader.turn(mode, args.seconds)
    return costs
