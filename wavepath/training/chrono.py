"""Where the wall time of a run goes: images per second, the share spent waiting for data, ETA; and trace windows.

The totals travel in the checkpoint, so a resumed run reports the time of the whole run. Time that a killed process spent after its last
checkpoint is not counted: its steps are taken again.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from wavepath.console import duration, say

SAVED = ("seconds", "data_seconds", "paused_seconds", "compile_seconds", "timed_examples")


class Chrono:
    """Splits the loop's time into compiling (the first step), waiting for data, pauses (evaluation, saving, pictures) and steps.

    Attributes:
        seconds: wall time of training so far, all restarts included, everything counted.
        data_seconds: of these, waiting for the input pipeline.
        paused_seconds: of these, evaluation, saving and pictures.
        compile_seconds: of these, first steps of a process, which compile.
        timed_examples: training examples seen, those of compiling steps left out.
    """

    def __init__(self, steps: int, batch_size: int, saved: dict[str, Any] | None = None, clock=time.perf_counter):
        self.steps, self.batch_size, self._clock = steps, batch_size, clock
        saved = saved or {}
        before = (float(saved.get(key, 0.0)) for key in SAVED)
        self.seconds, self.data_seconds, self.paused_seconds, self.compile_seconds, self.timed_examples = before
        self._last = self._clock()
        self._start = self._window = self._totals()

    def _totals(self) -> tuple[float, float, float, float, float]:
        return self.seconds, self.data_seconds, self.paused_seconds, self.compile_seconds, self.timed_examples

    def _advance(self) -> float:
        now = self._clock()
        passed, self._last = now - self._last, now
        self.seconds += passed
        return passed

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Its block waits for the next batch."""
        self._advance()
        yield
        self.data_seconds += self._advance()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Its block evaluates, saves or draws: no part of images per second."""
        self._advance()
        yield
        self.paused_seconds += self._advance()

    def stepped(self, first: bool = False) -> None:
        """A training step has finished on the device; `first`: it had to be compiled, so its time is kept out of the rate."""
        self._advance()
        if first:
            passed, data, paused, *_ = (new - old for new, old in zip(self._totals(), self._start, strict=True))
            self.compile_seconds += passed - data - paused
        else:
            self.timed_examples += self.batch_size

    def saved(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        self._advance()
        return dict(zip(SAVED, self._totals(), strict=True))

    def rate(self) -> float:
        """Images per second over the whole run, compiling and pauses left out; 0 before the second step."""
        busy = self.seconds - self.paused_seconds - self.compile_seconds
        return self.timed_examples / busy if busy > 0 and self.timed_examples else 0.0

    def report(self, step: int) -> dict[str, float]:
        """Rates since the last report, and the outlook after `step` steps.

        Returns:
            `images_per_second`, `data_wait` (share of the time, 0..1), `eta_seconds`, `seconds` (of the whole run); before the second
            step, which is the first that can be timed, `seconds` alone.
        """
        self._advance()
        passed, data, paused, compiling, examples = (new - old for new, old in zip(self._totals(), self._window, strict=True))
        self._window = self._totals()
        busy = passed - paused - compiling
        if busy <= 0 or not examples:
            return {"seconds": self.seconds}
        speed = examples / busy
        return {
            "images_per_second": speed,
            "data_wait": min(1.0, data / busy),
            "eta_seconds": (self.steps - step) * self.batch_size / speed,
            "seconds": self.seconds,
        }


class TraceWindow:
    """Opens a profiler trace for a half-open window of steps (`config.profile`), to be viewed in TensorBoard or Perfetto."""

    def __init__(self, window: tuple[int, int] | None, folder: Path):
        self.window, self.folder, self.active = window, Path(folder), False

    def before(self, step: int, state: Any) -> None:
        """Called before step number `step` (from 1) is dispatched. `state` is awaited at both edges, so that only whole steps are traced."""
        if self.window is None:
            return
        first, last = self.window
        if self.active and step >= last:
            self.close(state)
        elif not self.active and first <= step < last:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self.folder))
            self.active = True

    def close(self, state: Any = None) -> None:
        """Ends a trace that is open and says where it lies."""
        if self.active:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self.active, self.window = False, None
            say(f"trace written to {self.folder}; open it with: tensorboard --logdir {self.folder}")


def speed_note(loss: float | None, report: dict[str, float]) -> str:
    """`loss 0.4312, 128 images/s, data wait 3%, ETA 2m10s` for the progress line."""
    parts = [] if loss is None else [f"loss {loss:.4g}"]
    if "images_per_second" in report:
        parts += [f"{report['images_per_second']:.4g} images/s", f"data wait {report['data_wait']:.0%}", f"ETA {duration(report['eta_seconds'])}"]
    return ", ".join(parts)
