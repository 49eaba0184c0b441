"""`wavepath prepare` from start to end: in one process, and on several worker processes by Apache Beam's DirectRunner (extra [beam]).

Every contender is the command itself, in a process of its own, from an empty folder, and takes turns with the others; imports and the workers' start
count. Compiled programs are kept between them. Datasets are compared: they must be equal to the byte. CPU seconds are of all processes together.
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wavepath.errors import ConfigError, WavepathError

_MADE = (8, 4096)  # phantoms and their side, where no slides are given
_FIRST = "one process"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--slides", type=Path, help=f"folder of slides, or one (default: {_MADE[0]} phantoms of {_MADE[1]} px, made for it)")
    parser.add_argument("--workers", type=int, default=2, help="threads of the one process, and worker processes of one thread (default: 2)")
    parser.add_argument("--runs", type=int, default=3, help="rounds, in each of which every contender has its turn (default: 3)")
    parser.add_argument("--flags", default="", metavar="FLAGS", help="more flags for `wavepath prepare`, as one argument: --flags='--select all'")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write everything measured, every round, as JSON")
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="also write the table as Markdown")


def contenders(workers: int, beam: bool) -> dict[str, list[str]]:
    """Flags of `wavepath prepare` by name; the first is what the others are held against."""
    found = {f"{_FIRST}, {workers} threads": [f"--workers={workers}"]}
    if beam:
        options = f"--direct_num_workers={workers} --direct_running_mode=multi_processing"
        found[f"DirectRunner, {workers} processes of 1 thread"] = ["--workers=1", "--runner=DirectRunner", f"--beam-options={options}"]
    return found


def once(slides: Path, out: Path, flags: Sequence[str]) -> dict[str, float]:
    """One `wavepath prepare` in processes of its own: `seconds`, `cpu_seconds` of all of them.

    Raises:
        WavepathError: it failed, with its last line. (Slides that fail alone are no failure here.)
    """
    command = [sys.executable, "-m", "wavepath", "prepare", f"--slides={slides}", f"--out={out}", *flags]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        # Beam's workers are children of that process, which has waited for them.
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode not in (0, 3):
            said.seek(0)
            last = (said.read().strip().splitlines() or ["it said nothing"])[-1]
            raise WavepathError(f"{shlex.join(command[2:])} ended with code {child.returncode}: {last.removeprefix('wavepath: error: ')}")
    return {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime}


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a dataset but the seconds."""
    from wavepath.data.manifest import TIMINGS

    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != TIMINGS}


def measure(slides: Path, chosen: Mapping[str, Sequence[str]], runs: int) -> dict[str, Any]:
    """Rows, and what was prepared.

    Raises:
        WavepathError: a contender failed, or gave another dataset than the first.
    """
    from wavepath.benchmarks.timing import rounds
    from wavepath.console import progress
    from wavepath.data.manifest import read_manifest

    found: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    names, rows = list(chosen), []
    with progress("bench prepare", (runs + 1) * len(names), "runs") as bar, tempfile.TemporaryDirectory(prefix="wavepath-bench-") as folder:
        first = Path(folder) / "first"
        once(slides, first, chosen[names[0]])  # compiles what is not in the cache yet
        bar.advance(1)
        wanted = contents(first)
        for _, name in rounds(names, runs):
            with tempfile.TemporaryDirectory(dir=folder) as out:
                found[name].append(once(slides, Path(out), chosen[name]))
                if contents(Path(out)) != wanted:
                    raise WavepathError(f"{name} gave another dataset than {names[0]}: a defect, please report it")
            bar.advance(1, f"{name}: {found[name][-1]['seconds']:.1f} s")
        manifest = read_manifest(first)
    for name, some in found.items():
        rows.append({"name": name, **{part: [one[part] for one in some] for part in ("seconds", "cpu_seconds")}})
    facts = {"slides": len(manifest), "tiles": sum(row.tiles for row in manifest), "bytes": sum(map(len, wanted.values()))}
    return {"facts": facts, "rows": rows}


def table_of(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows)."""
    header = ["", "s", "CPU s", "slides/min", "tiles/s", "speed, the first = 1", "CPU, the first = 1"]
    facts, rows = report["facts"], report["rows"]
    body = []
    for row in rows:
        seconds, cpu = statistics.median(row["seconds"]), statistics.median(row["cpu_seconds"])
        # Round by round: the load of a shared machine meets both.
        speed = statistics.median(a / b for a, b in zip(rows[0]["seconds"], row["seconds"], strict=True))
        work = statistics.median(b / a for a, b in zip(rows[0]["cpu_seconds"], row["cpu_seconds"], strict=True))
        cells = [row["name"], f"{seconds:.1f} ({min(row['seconds']):.1f} to {max(row['seconds']):.1f})", f"{cpu:.1f}"]
        body.append([*cells, f"{60 * facts['slides'] / seconds:.1f}", f"{facts['tiles'] / seconds:.0f}", f"{speed:.2f}", f"{work:.2f}"])
    return header, body


def run(args: argparse.Namespace) -> int:
    """Measures and prints; the exit code."""
    import importlib.util

    from wavepath.benchmarks.data import machine
    from wavepath.benchmarks.timing import publish, versions

    if args.runs < 1 or args.workers < 1:
        raise ConfigError("--runs and --workers are at least 1")
    beam = importlib.util.find_spec("apache_beam") is not None
    flags = shlex.split(args.flags)
    chosen = {name: [*given, *flags] for name, given in contenders(args.workers, beam).items()}
    command = shlex.join(["wavepath", "bench", "prepare", *([f"--slides={args.slides}"] if args.slides else []), f"--workers={args.workers}",
                          f"--runs={args.runs}", *([f"--flags={args.flags}"] if flags else [])])  # fmt: skip
    report: dict[str, Any] = {
        "command": command, "machine": machine(), "runs": args.runs, "versions": versions(["apache-beam", "jax", "pillow"]),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="wavepath-slides-") as folder:
        slides = args.slides
        if slides is None:
            from wavepath.data.phantom import make_phantoms

            slides = Path(folder)
            make_phantoms(slides, _MADE[0], 0, size=_MADE[1])
        report |= measure(slides, chosen, args.runs)
    where, facts = report["machine"], report["facts"]
    named = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    heading = [
        f"{where['cpu'] or 'unknown processor'}, {where['cpus']} cores, load {where['load_at_start']} at the start, {args.runs} rounds", named,
        f"`{command}`: {facts['slides']} slides, {facts['tiles']} tiles, {facts['bytes'] / 1e6:.0f} MB, equal to the byte from all",
    ]
    remarks = [] if beam else ['Apache Beam is not installed; pip install "wavepath[beam]" adds it to the table']
    publish(report, heading, [table_of(report)], remarks, args.json, args.markdown)
    return 0
