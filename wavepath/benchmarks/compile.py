"""How long the training step of a config takes to compile: tracing, lowering, compiling cold, and loading from the persistent cache.

Every measurement has a process of its own, as a run has: one with an empty cache folder, and one that finds what the first has left there. Nothing
but the step is compiled, from shapes alone; no state is made. Seconds are of the wall, with the CPU seconds of all threads beside them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wavepath.benchmarks import step as steps
from wavepath.errors import ConfigError, WavepathError

_LOWERING = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_HIT = "/jax/compilation_cache/cache_hits"
_TIMES = ("trace", "lower", "compile", "compile_cpu", "hit")  # of what a child reports, the part that differs from child to child
_MARK = "WAVEPATH_COMPILED "  # ahead of what a child reports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    steps.add_config_arguments(parser, several=True)
    parser.add_argument("--backend", choices=steps.BACKENDS, help="as config.parallel.backend (default: the config's)")
    parser.add_argument("--runs", type=int, default=3, help="pairs of processes, cold and warm, for each variant (default: 3)")
    steps.add_output_arguments(parser)


def child(spec: str, overrides: Sequence[str], batch: int | None) -> dict[str, Any]:
    """Compiles the step in this process, through whatever cache JAX was told of.

    Returns:
        `trace`, `lower` and `compile` seconds, `compile_cpu`, whether the cache `hit`, lines of StableHLO, bytes that the compiler plans.
    """
    import resource
    import time

    import jax

    from wavepath.planning.standins import build_task
    from wavepath.training import parallel

    lowering: list[float] = []
    hits: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, seconds, **_: lowering.append(seconds) if name == _LOWERING else None)
    jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name == _HIT else None)

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    config = steps.load(spec, overrides, batch)
    devices = parallel.make(config.parallel)
    devices.check(config.batch_size, config.optim.accumulate)
    task = build_task(config)
    # Small programs that building a task runs (tables of positions) are not the step's.
    lowering.clear()
    start = time.perf_counter()
    lowered = devices.lower_step(task)
    seconds = time.perf_counter() - start
    step_lowering = max(lowering, default=0.0)
    hits.clear()
    start, cpu = time.perf_counter(), used()
    compiled = lowered.compile()
    found = {
        "trace": seconds - step_lowering, "lower": step_lowering, "compile": time.perf_counter() - start, "compile_cpu": used() - cpu,
        "hit": bool(hits), "stablehlo_lines": lowered.as_text().count("\n"), **steps.planned(compiled),
        "devices": len(devices.devices), "device_kind": devices.devices[0].device_kind, "batch": int(config.batch_size),
    }  # fmt: skip
    return found


def _run_child(spec: str, overrides: Sequence[str], batch: int | None, cache: Path) -> dict[str, Any]:
    environment = {
        **os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }  # fmt: skip
    given = json.dumps({"spec": spec, "overrides": list(overrides), "batch": batch})
    done = subprocess.run([sys.executable, "-m", __spec__.name, given], env=environment, capture_output=True, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith(_MARK)), None)
    if done.returncode or line is None:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise WavepathError(f"compiling {spec} {' '.join(overrides)} ended with code {done.returncode}: {last.removeprefix('wavepath: error: ')}")
    return json.loads(line.removeprefix(_MARK))


def cases(configs: Sequence[str], variants: Sequence[tuple[str, list[str]]], given: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    """(name, config, overrides) of every row of the table; `variants` as `step.variants` made them, `given` the overrides of all."""
    return [(f"{spec} {name}".strip(), spec, [*given, *overrides]) for spec in dict.fromkeys(configs) for name, overrides in variants]


def measure(chosen: Sequence[tuple[str, str, list[str]]], batch: int | None, runs: int) -> list[dict[str, Any]]:
    """Rows of the table, as JSON values: every case in turn, round by round.

    Args:
        chosen: as `cases` made them. batch: examples of a step; None: each config's. runs: rounds.

    Raises:
        WavepathError: a child failed, with what it said.
    """
    from wavepath.benchmarks.timing import rounds
    from wavepath.console import progress

    given = {name: (spec, overrides) for name, spec, overrides in chosen}
    found: dict[str, dict[str, list[dict[str, Any]]]] = {name: {"cold": [], "warm": []} for name in given}
    entry: dict[str, int] = {}
    with progress("compile", 2 * runs * len(chosen), "processes") as bar:
        for _, name in rounds(found, runs):
            with tempfile.TemporaryDirectory(prefix="wavepath-cache-") as folder:
                for kind in ("cold", "warm"):
                    found[name][kind].append(_run_child(*given[name], batch, Path(folder)))
                    bar.advance(1, f"{name} {kind}: {found[name][kind][-1]['compile']:.1f} s")
                entry[name] = max((path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()), default=0)
    rows = []
    for name, kinds in found.items():
        cold, warm = kinds["cold"], kinds["warm"]
        both = [*cold, *warm]
        row = {"name": name, "entry_bytes": entry[name], "hit": all(one["hit"] for one in warm)}
        row |= {f"{part}_seconds": [one[part] for one in both] for part in ("trace", "lower")}
        row |= {"cold_seconds": [one["compile"] for one in cold], "cold_cpu_seconds": [one["compile_cpu"] for one in cold]}
        row |= {"cached_seconds": [one["compile"] for one in warm]}
        row |= {key: value for key, value in cold[0].items() if key not in _TIMES}
        rows.append(row)
    return rows


def table_of(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows)."""
    header = ["config", "trace s", "lower s", "compile cold s", "its CPU s", "from the cache s", "cold over cached", "StableHLO lines"]
    header += ["cache entry MB", "planned MB"]
    body = []
    for row in report["rows"]:
        middle = {part: statistics.median(row[f"{part}_seconds"]) for part in ("trace", "lower", "cold", "cold_cpu", "cached")}
        cold = row["cold_seconds"]
        cells = [row["name"], f"{middle['trace']:.2f}", f"{middle['lower']:.2f}", f"{middle['cold']:.1f} ({min(cold):.1f} to {max(cold):.1f})"]
        cells += [f"{middle['cold_cpu']:.1f}", f"{middle['cached']:.2f}", f"{middle['cold'] / middle['cached']:.1f}"]
        cells += [str(row["stablehlo_lines"]), f"{row['entry_bytes'] / 1e6:.1f}", f"{row['planned'] / 1e6:.0f}" if "planned" in row else ""]
        body.append(cells)
    return header, body


def lines(report: Mapping[str, Any]) -> list[str]:
    """What the table does not say."""
    rows = report["rows"]
    batches = sorted({row["batch"] for row in rows})
    places = sorted({f"{row['devices']} {row['device_kind']} device{'s' if row['devices'] > 1 else ''}" for row in rows})
    found = [f"batch {', '.join(map(str, batches))} on {', '.join(places)}"]
    return found + [f"{row['name']}: the second process did NOT find the program in the cache" for row in rows if not row["hit"]]


def run(args: argparse.Namespace) -> int:
    """Measures and prints; the exit code."""
    from wavepath.benchmarks.data import machine
    from wavepath.benchmarks.step_table import command_of, heading
    from wavepath.benchmarks.timing import cores, publish, versions

    if args.runs < 1:
        raise ConfigError("--runs is at least 1")
    given = [*args.config_overrides, *([f"parallel.backend={args.backend}"] if args.backend else [])]
    chosen = cases(args.config, steps.variants(args.vary), given)
    for _, spec, overrides in chosen:
        steps.load(spec, overrides, args.batch)  # said here, and not by a child after minutes
    where = machine()
    flags = [*([f"--backend {args.backend}"] if args.backend else []), f"--runs {args.runs}"]
    report = {
        "command": command_of("compile", args, flags),
        "machine": where, "threads": len(cores()), "versions": versions(["jax", "jaxlib", "libtpu", "flax"]), "runs": args.runs,
        "rows": measure(chosen, args.batch, args.runs),
    }  # fmt: skip
    publish(report, heading(report), [table_of(report)], lines(report), args.json, args.markdown)
    return 0


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    try:
        print(_MARK + json.dumps(child(arguments["spec"], arguments["overrides"], arguments["batch"])), flush=True)
    except WavepathError as failure:
        print(failure, file=sys.stderr)
        sys.exit(failure.exit_code)
