"""What the user sees while a command runs: progress with ETA, short messages, and a plain summary at the end.

Everything goes to standard error, so that standard output holds results only. On a terminal the progress is a live bar;
in a log file it is one plain line every few seconds.
"""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

_LOG_EVERY_SECONDS = 10.0
_muted = False


def mute() -> None:
    """From now on this process prints no messages and no progress, warnings apart: another one speaks for it."""
    global _muted
    _muted = True


def say(message: str) -> None:
    """Prints one line to standard error."""
    if not _muted:
        _print(message)


def warn(message: str) -> None:
    """Prints one line, marked as a warning, to standard error."""
    _print(f"warning: {message}")


def _print(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """`3725.0` -> `1h02m`; `65` -> `1m05s`; `4.2` -> `4.2s`."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = int(round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Progress:
    """Counts units of work; `advance(n, note)` after each piece. Use through `progress(...)`."""

    def __init__(self, description: str, total: int | None, unit: str):
        self.description, self.total, self.unit = description, total, unit
        self.done = 0.0
        self._start = self._last = time.monotonic()
        self._bar = self._task = None
        if sys.stderr.isatty() and not _muted:
            # Imported here: rich costs a tenth of a second, which `--help` must not pay.
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(unit),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(description, total=total, note="")

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Adds `amount` units; `note` is shown behind the ETA."""
        self.done += amount
        if self._bar is not None:
            self._bar.update(self._task, advance=amount, note=note)
        elif time.monotonic() - self._last >= _LOG_EVERY_SECONDS:
            self._last = time.monotonic()
            say(self._line(note))

    def _line(self, note: str) -> str:
        elapsed = time.monotonic() - self._start
        text = f"{self.description}: {self.done:g}" + (f"/{self.total:g}" if self.total else "") + f" {self.unit}"
        if self.total and self.done:
            text += f", {duration(elapsed)} gone, ETA {duration(elapsed / self.done * (self.total - self.done))}"
        return text + (f", {note}" if note else "")

    def close(self) -> None:
        """Ends the live bar."""
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def progress(description: str, total: int | None, unit: str = "items") -> Iterator[Progress]:
    """Shows progress with ETA while its block runs: `with progress("slides", 8) as bar: bar.advance(1)`."""
    bar = Progress(description, total, unit)
    try:
        yield bar
    finally:
        bar.close()


def summary(title: str, rows: Iterable[tuple[str, object]]) -> None:
    """A plain two-column summary, as every command prints at its end."""
    rows = [(str(name), str(value)) for name, value in rows]
    width = max((len(name) for name, _ in rows), default=0)
    say("\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)]))


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A plain text table with aligned columns, for standard output and logs."""
    cells = [[str(cell) for cell in header], *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
