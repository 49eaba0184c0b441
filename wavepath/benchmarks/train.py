"""Training end to end on real tiles, beside its two halves: the step alone on one batch, and the input pipeline alone.

One process, one compiled step, windows of steps in rotation. End to end is what `wavepath train` does between two saves: read, decode, batch, send
ahead by a thread, augment and step on the device, metrics fetched one step late; nothing is saved or drawn. The step alone repeats a batch that lies
on the device; the input alone hands batches to nobody. What is ready ahead of a window is used up before its clock starts. The share of the time that
the loop waits for a batch says which half bounds; where both halves use the same cores, as on a CPU, end to end cannot reach either.

Without --data it trains on phantoms that it makes (task mae; other tasks: their pyramids or pairs), which takes a while and says little of slower
disks.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from wavepath.benchmarks import step as steps
from wavepath.errors import ConfigError, DatasetError

ARMS = ("end to end", "step alone", "input alone")
_AHEAD = 2  # batches that `Parallel.prefetch` keeps on the devices


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="config file, with its arguments behind a colon; fields as --config.FIELD=VALUE")
    parser.add_argument("--batch", type=int, help="examples of a step (default: config.batch_size)")
    parser.add_argument("--data", type=Path, help="as config.data.dir: prepared data, or a folder of images (default: phantoms made for it)")
    parser.add_argument("--steps", type=int, default=20, help="of a window (default: 20)")
    parser.add_argument("--runs", type=int, default=5, help="rounds, in each of which every arm has a window (default: 5)")
    parser.add_argument("--threads", type=int, help="cores (default: every core this process may use)")
    steps.add_output_arguments(parser)


@contextlib.contextmanager
def with_data(config: Any) -> Iterator[Any]:
    """The config with data: what it names, or phantoms in a folder that is removed behind."""
    if config.data.dir or config.data.slides:
        yield config
        return
    from wavepath.data.default import ensure_phantom_data

    with tempfile.TemporaryDirectory(prefix="wavepath-bench-") as folder:
        yield ensure_phantom_data(config, Path(folder))


class Bench:
    """One config's step and source, and the three arms that measure them. `close` ends the reading.

    Attributes:
        facts: what is known without running, as JSON values.
    """

    def __init__(self, config: Any):
        from wavepath.data import pipeline
        from wavepath.planning.standins import resolved
        from wavepath.tasks.base import build
        from wavepath.training import distributed, parallel

        source = build(resolved(config)).sources()
        if not len(source):
            raise DatasetError(f"{source.name} holds no example; give another --data")
        self._devices = parallel.make(config.parallel)
        self._devices.check(config.batch_size, config.optim.accumulate)
        self._config = config = resolved(config, examples=len(source))
        task = build(config)
        task.constants = dict(task.measure(source))
        self._order = config.data.order if config.data.order != "auto" else getattr(source, "best_order", "global")
        self._step = self._devices.train_step(task)
        self._state = self._devices.init(task, config.seed)

        def stream() -> Any:
            return pipeline.batches(
                source, batch_size=config.batch_size, seed=config.seed, order=self._order, window=config.data.window, host=distributed.rows(),
                prefetch=config.data.prefetch, on_corrupt=config.data.on_corrupt,
            )

        self._host = stream()
        self._fed = self._devices.prefetch(stream(), _AHEAD)
        self._batch = next(self._fed)
        # As many as can be ready on the host, on the way and on the devices.
        self._ready = int(config.data.prefetch) + _AHEAD + 4
        self._state, metrics = self._step(self._state, self._batch)
        self._settle(metrics)
        self.facts = {
            "source": source.name, "examples": len(source), "batch": int(config.batch_size), "devices": len(self._devices.devices),
            "device_kind": self._devices.devices[0].device_kind, "order": self._order, "prefetch": int(config.data.prefetch),
            "data_threads": int(config.data.threads), "flops": float(task.flops()), "task": config.task,
        }  # fmt: skip

    def close(self) -> None:
        self._fed.close()
        self._host.close()

    def _settle(self, metrics: Any) -> None:
        from wavepath.training.loop import mean_metrics

        self.loss = mean_metrics(metrics)["loss"]

    def _steps(self, batches: Callable[[], Any], count: int, chrono: Any) -> None:
        """As the training loop: metrics are fetched once the next step has been sent off."""
        import jax

        pending = None
        for _ in range(count):
            with chrono.waiting():
                batch = batches()
            self._state, metrics = self._step(self._state, batch)
            for leaf in jax.tree.leaves(metrics):
                leaf.copy_to_host_async()
            if pending is not None:
                self._settle(pending)
                chrono.stepped()
            pending = metrics
        self._settle(pending)
        chrono.stepped()

    def window(self, arm: str, count: int) -> dict[str, float]:
        """One window of an arm.

        Returns:
            `images_per_second`, `cpu_seconds` of all threads for an image, and where steps are taken `data_wait`, the share of the time (0 to 1).
        """
        from wavepath.training.chrono import Chrono

        size = int(self._config.batch_size)
        if arm == "input alone":
            for _ in range(self._ready):
                next(self._host)
            start, cpu = time.perf_counter(), time.process_time()
            for _ in range(count):
                next(self._host)
            return {"images_per_second": count * size / (time.perf_counter() - start), "cpu_seconds": (time.process_time() - cpu) / (count * size)}
        fed = arm == "end to end"
        batches = (lambda: next(self._fed)) if fed else (lambda: self._batch)
        self._steps(batches, self._ready if fed else 1, Chrono(count, size))
        chrono, cpu = Chrono(count, size), time.process_time()
        self._steps(batches, count, chrono)
        found = chrono.report(count)
        used = (time.process_time() - cpu) / (count * size)
        return {"images_per_second": found["images_per_second"], "cpu_seconds": used, "data_wait": found["data_wait"]}


def measure(bench: Bench, count: int, runs: int) -> list[dict[str, Any]]:
    """Rows of the table, as JSON values.

    Args:
        count: steps of a window. runs: rounds.
    """
    from wavepath.benchmarks.timing import rounds
    from wavepath.console import progress

    windows: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    with progress("train", runs * len(ARMS), "windows") as bar:
        for _, arm in rounds(ARMS, runs):
            # Reading ahead goes on for a moment after a window; it must not be paid for by the next arm.
            time.sleep(0.2)
            windows[arm].append(bench.window(arm, count))
            bar.advance(1, f"{arm} {windows[arm][-1]['images_per_second']:.4g} images/s")
    rows = []
    for arm, found in windows.items():
        row: dict[str, Any] = {"name": arm, "rates": [one["images_per_second"] for one in found]}
        row |= {"images_per_second": statistics.median(row["rates"]), "cpu_ms": 1e3 * statistics.median(one["cpu_seconds"] for one in found)}
        if "data_wait" in found[0] and arm == ARMS[0]:
            row |= {"waits": [one["data_wait"] for one in found], "data_wait": statistics.median(one["data_wait"] for one in found)}
        rows.append(row)
    return rows


def table_of(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows)."""
    body = []
    devices, flops = report["facts"]["devices"], report["facts"]["flops"]
    for row in report["rows"]:
        rates = row["rates"]
        waits = row.get("waits")
        cells = [row["name"], f"{row['images_per_second']:.4g}", f"{min(rates):.4g} to {max(rates):.4g}", f"{row['images_per_second'] / devices:.4g}"]
        cells += [f"{row['cpu_ms']:.3g}", "" if row["name"] == ARMS[2] else f"{row['images_per_second'] * flops / 1e9:.4g}"]
        body.append([*cells, "" if waits is None else f"{100 * row['data_wait']:.1f} % ({100 * min(waits):.1f} to {100 * max(waits):.1f})"])
    return ["arm", "images/s", "least to most", "per device", "CPU ms an image", "GFLOP/s", "waiting for data"], body


def lines(report: Mapping[str, Any]) -> list[str]:
    """What the table does not say."""
    facts = report["facts"]
    whole, step, alone = (next(row for row in report["rows"] if row["name"] == arm) for arm in ARMS)
    rate, bound = min((step["images_per_second"], "the step"), (alone["images_per_second"], "the input"))
    found = [
        f"task {facts['task']} on {facts['source']}, {facts['examples']} examples, {facts['order']} order, batch {facts['batch']} on"
        f" {facts['devices']} {facts['device_kind']} device{'s' if facts['devices'] > 1 else ''}, {facts['flops'] / 1e9:.4g} GFLOP an image",
        f"{bound} bounds: end to end reaches {100 * whole['images_per_second'] / rate:.0f} % of it; the input alone is"
        f" {alone['images_per_second'] / step['images_per_second']:.3g} times as fast as the step",
    ]
    if facts["device_kind"] == "cpu":
        shared = 1 / (1 / step["images_per_second"] + 1 / alone["images_per_second"])
        found.append(f"both halves use the same cores, one after the other they would reach {shared:.4g} images/s")
    return found


def run(args: argparse.Namespace) -> int:
    """Measures and prints; the exit code."""
    from wavepath.benchmarks.data import machine
    from wavepath.benchmarks.step_table import command_of, heading
    from wavepath.benchmarks.timing import allocator, limit_cores, publish, restart_with_huge_pages, versions
    from wavepath.config import load_config

    if min(args.runs, args.steps) < 1:
        raise ConfigError("--runs and --steps are at least 1")
    steps.check_batch(args.config_overrides, args.batch)
    args.vary = []
    overrides = [*args.config_overrides, *([f"data.dir={args.data}"] if args.data else []), *([f"batch_size={args.batch}"] if args.batch else [])]
    config = load_config(args.config, overrides)
    restart_with_huge_pages()
    threads = limit_cores(args.threads)
    where = machine()
    with with_data(config) as config:
        bench = Bench(config)
        try:
            rows = measure(bench, args.steps, args.runs)
        finally:
            bench.close()
    if not (config.data.dir or config.data.slides):
        bench.facts["source"] = "phantoms"  # the folder had a name that no other run will have
    flags = [*(["--data DATA"] if args.data else []), f"--steps {args.steps} --runs {args.runs}"]
    flags += [f"--threads {args.threads}"] if args.threads else []
    report = {
        "command": command_of("train", args, flags),
        "machine": where, "threads": threads, "allocator": allocator(), "runs": args.runs, "steps": args.steps,
        "versions": versions(["jax", "jaxlib", "flax", "tensorflow-cpu", "imagecodecs"]), "rows": rows, "facts": bench.facts,
    }  # fmt: skip
    publish(report, heading(report), [table_of(report)], lines(report), args.json, args.markdown)
    return 0
