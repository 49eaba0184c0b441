"""Timing several contenders fairly in one process: turns in rotation, ratios round by round, one allocator for all, named.

On a CPU the allocator decides more than the algorithm once arrays are large: every fresh result is new pages, and with pages of 4 KiB
the faults alone cost more than a Haar transform. So the benchmark starts itself once more with glibc's huge pages
(`glibc.malloc.hugetlb=1`): it needs no library beside the system's, every contender allocates through it, and the faults are a 512th as many.
"""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TUNABLE = "glibc.malloc.hugetlb=1"
# Thread pools spin for a while after their last task; the next contender must not share its cores with them.
SETTLE_SECONDS = 0.01
_LEAST_SECONDS = 0.02
_MOST_CALLS = 15


@dataclass(frozen=True)
class Timed:
    """What one contender took: seconds of a call, one number a round."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def ratios(slower: Timed, faster: Timed) -> tuple[float, float, float]:
    """(median, least, greatest) of the rounds' own ratios slower / faster; the load of a shared machine meets both halves of each."""
    return spread(slower.seconds, faster.seconds)


def spread(ours: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """(median, least, greatest) of the rounds' own ratios ours / others."""
    values = [a / b for a, b in zip(ours, others, strict=True)]
    return statistics.median(values), min(values), max(values)


def rounds(names: Iterable[str], runs: int) -> Iterator[tuple[int, str]]:
    """(round, name) of every turn: each name once a round, in an order that rotates, so that no contender always follows the same one."""
    names = list(names)
    for turn in range(runs):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            yield turn, name


def _calls(call: Callable[[], Any], count: int) -> float:
    """Median seconds of `count` calls one after another. Results are freed after the clock stops."""
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
        del result
    return statistics.median(seconds)


def take_turns(
    calls: Mapping[str, Callable[[], Any]], runs: int, advance: Callable[[], None] = lambda: None, settle: float = SETTLE_SECONDS
) -> list[Timed]:
    """Times every contender once a round, in an order that rotates from round to round.

    Args:
        calls: name to a function that returns when its work is done (and its results are in memory). Each is called twice before timing.
        runs: rounds. A call shorter than 20 ms is repeated within its turn, and the turn counts as the median of its calls.
        advance: called after each round.
        settle: seconds of rest before each turn.
    """
    counts = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        counts[name] = max(1, min(_MOST_CALLS, round(_LEAST_SECONDS / max(time.perf_counter() - start, 1e-6))))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _, name in rounds(calls, runs):
        time.sleep(settle)
        seconds[name].append(_calls(calls[name], counts[name]))
        if len({len(some) for some in seconds.values()}) == 1:
            advance()
    return [Timed(name, tuple(values)) for name, values in seconds.items()]


def allocator(environment: Mapping[str, str] = os.environ) -> str:
    """The name of the memory allocator that every contender of this process uses."""
    preloaded = [Path(part).name for part in environment.get("LD_PRELOAD", "").replace(":", " ").split() if "malloc" in Path(part).name]
    if preloaded:
        return f"{', '.join(preloaded)} (LD_PRELOAD)"
    name = " ".join(part for part in platform.libc_ver() if part) or "the system's malloc"
    tunables = environment.get("GLIBC_TUNABLES", "")
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    # With "never" the tunable is set and does nothing.
    kernel = f" (kernel: transparent huge pages {pages.read_text().partition('[')[2].partition(']')[0]})" if tunables and pages.is_file() else ""
    return f"{name} malloc" + (f" with {tunables}{kernel}" if tunables else ", stock settings")


def with_huge_pages(environment: Mapping[str, str] = os.environ) -> dict[str, str] | None:
    """The environment to start again with, or None where that is not needed (already so, another allocator preloaded) or not possible."""
    preloaded = "malloc" in environment.get("LD_PRELOAD", "")
    tunables = environment.get("GLIBC_TUNABLES", "")
    if platform.libc_ver()[0] != "glibc" or preloaded or "glibc.malloc." in tunables:
        return None
    return {**environment, "GLIBC_TUNABLES": f"{tunables}:{TUNABLE}" if tunables else TUNABLE}


def restart_with_huge_pages() -> None:
    """Replaces this process by the same command under glibc's huge pages; returns where there is nothing to change."""
    environment = with_huge_pages()
    if environment is None:
        return
    from wavepath.console import say

    say(f"starting again with GLIBC_TUNABLES={environment['GLIBC_TUNABLES']}, so that page faults do not decide")
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "wavepath", *sys.argv[1:]], environment)


def cores() -> list[int]:
    """The numbers of the cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def limit_cores(threads: int | None) -> int:
    """Keeps this process on `threads` cores (None: all it may use) and returns their number; to be called before JAX is imported.

    XLA takes one thread for each core of the affinity mask, so this is what makes it equal to `torch.set_num_threads`.

    Raises:
        ConfigError: there are not so many cores.
    """
    from wavepath.errors import ConfigError

    allowed = cores()
    if threads is None or threads == len(allowed):
        return len(allowed)
    if not 1 <= threads < len(allowed):
        raise ConfigError(f"--threads {threads}: this process may use {len(allowed)} cores")
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError("--threads needs Linux here; leave it out to use every core")
    os.sched_setaffinity(0, allowed[:threads])
    return threads


def peak_memory(call: Callable[[], Any]) -> int | None:
    """Bytes by which resident memory rose above its start while `call` ran, from the kernel's own peak; None where it keeps none."""
    import ctypes

    try:
        # Freed memory that the allocator still holds would be used again unseen.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        result = call()
        peak = _status("VmHWM")
        del result
    except (OSError, KeyError, AttributeError):  # not Linux, not glibc
        return None
    return max(0, peak - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}[field]


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions by distribution name; absent ones are left out."""
    from importlib import metadata

    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def counted(call: Callable[[], Any], seconds: list[float]) -> Callable[[], None]:
    """`call`, waited for; each time the CPU seconds of all threads are added to `seconds`: what a machine shared with others distorts least."""
    import jax

    def go() -> None:
        start = time.process_time()
        jax.block_until_ready(call())
        seconds.append(time.process_time() - start)

    return go


def scratch_bytes(compiled: Any) -> int:
    """What a compiled program of JAX plans beside its arguments and results; it need not be run."""
    return int(compiled.memory_analysis().temp_size_in_bytes)


def planned_bytes(lowered: Any) -> int:
    """Scratch of a lowered program by XLA's plan, in which everything that it computes has a place.

    XLA's CPU compiler can hand a softmax between two products to a library as one operation, whose memory its plan does not count (0 bytes for an
    attention whose scores take gigabytes). Here that is switched off.
    """
    import jax

    options = {"xla_cpu_experimental_ynn_fusion_type": ""} if jax.default_backend() == "cpu" else {}
    try:
        return scratch_bytes(lowered.compile(compiler_options=options))
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return scratch_bytes(lowered.compile())  # by a version without that library


def publish(
    report: Mapping[str, Any], heading: list[str], tables: list[tuple[list[str], list[list[str]]]], lines: list[str], json: Path | None,
    markdown: Path | None, title: str = "",
) -> None:
    """Prints a benchmark's heading, tables (header, rows) and remarks; writes them as Markdown, under `title`, and the report as JSON where asked."""
    from wavepath.benchmarks.ops import markdown_table
    from wavepath.console import table
    from wavepath.files import atomic_path, write_json

    if json:
        write_json(json, report)
    if markdown:
        listed = ["\n".join(f"* {line}" for line in some) for some in (heading, lines)]
        parts = [*([f"# {title}"] if title else []), listed[0], *(markdown_table(*one) for one in tables), listed[1]]
        with atomic_path(markdown) as path:
            path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print("\n\n".join(["\n".join(heading), *(table(*one) for one in tables), "\n".join(lines)]))
    sys.stdout.flush()
