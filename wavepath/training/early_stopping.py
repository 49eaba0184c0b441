"""Early stopping: ends a run whose validation loss falls no more, and keeps the State of its best evaluation beside the last ones.

    checkpoints_best/<step>/   the best State, as of the last save; checkpoints_best.json its file sizes
    best.json                  its step and value

What has been seen is part of every checkpoint, so a run that was killed stops where the uninterrupted one did, with the same best. The best State
is copied on the devices when it is found and written when the run saves anyway: ahead of the checkpoint that counts on it, and the one
before it stays until then.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from wavepath.console import say, warn
from wavepath.errors import ConfigError
from wavepath.files import write_json
from wavepath.tasks.base import State, Task
from wavepath.training import distributed, parallel
from wavepath.training.checkpoint import BEST, BEST_FILE, Checkpointer

METRIC = "eval_loss"
_KEEP = 2  # the best as of the last checkpoint, and the one that the next counts on


class EarlyStopping:
    """Counts evaluations in a row without a lower `eval_loss`; does nothing where `train.patience` is 0.

    Args:
        settings: `config.train`, resolved: `patience`, `patience_after`, `eval_every`.
        run: the run folder.
        task: must have a validation part.
        devices: where States live.
        saved: `saved()` of the checkpoint that the run goes on from; None: a new run.

    Attributes:
        exhausted: whether the run is to end.

    Raises:
        ConfigError: a task without a validation part, or a run without evaluations.
    """

    def __init__(self, settings: Any, run: Path, task: Task, devices: parallel.Parallel, saved: Mapping[str, Any] | None = None):
        self.patience, self.after = int(settings.patience), int(settings.patience_after)
        self._run, self._devices = Path(run), devices
        self._step, self._value, self._misses, self._looked_at = 0, math.inf, 0, 0
        self._state: State | None = None  # the best one, while it is not written
        self._checkpoints: Checkpointer | None = None
        if not self.patience:
            return
        if not task.validates:
            raise ConfigError(
                f"config.train.patience={self.patience}: task {task.config.task!r} has no validation part, and what its results come from must not"
                " choose when it stops; give config.train.patience=0"
            )
        if not settings.eval_every:
            raise ConfigError(f"config.train.patience={self.patience} counts evaluations, and there are none; give config.train.eval_epochs=1")
        self._checkpoints = Checkpointer(self._run, keep=_KEEP, folder=BEST)
        if saved:
            self._step, self._misses, self._looked_at = (int(saved[name]) for name in ("step", "misses", "looked_at"))
            self._value = math.inf if saved["value"] is None else float(saved["value"])
            if self._step and not (self._run / BEST / str(self._step)).is_dir():
                warn(f"{self._run / BEST} has no step {self._step}, the best so far; from here on the best is looked for anew")
                self._step, self._value, self._misses = 0, math.inf, 0
        # What was best behind the checkpoint that the run goes on from is found again, or not.
        self._checkpoints.keep_only([self._step] if self._step else [])
        self._point()

    @property
    def exhausted(self) -> bool:
        return 0 < self.patience <= self._misses and self._looked_at >= self.after

    def look(self, step: int, values: Mapping[str, float], state: State) -> None:
        """Takes note of an evaluation. A value that is no number is no improvement."""
        if not self.patience:
            return
        self._looked_at = step
        if METRIC not in values:
            raise ConfigError(f"config.train.patience={self.patience} goes by {METRIC}, which is not evaluated; give config.train.patience=0")
        if values[METRIC] < self._value:
            self._step, self._value, self._misses = step, values[METRIC], 0
            self._state = jax.tree.map(jnp.copy, state)  # the step donates its state
        else:
            self._misses += 1

    def write(self) -> None:
        """Writes the best State, if it is not; to be called ahead of each save of the run."""
        if self._state is None:
            return
        self._checkpoints.save(self._step, self._devices.exported(self._state), {METRIC: self._value})
        self._checkpoints.wait()
        self._state = None
        self._point()

    def _point(self) -> None:
        """Says which checkpoint is the best."""
        if distributed.is_first():
            if self._step:
                write_json(self._run / BEST_FILE, self._shown())
            else:
                (self._run / BEST_FILE).unlink(missing_ok=True)

    def _shown(self) -> dict[str, Any]:
        return {"step": self._step, METRIC: self._value}

    def saved(self) -> dict[str, Any]:
        """For the checkpoint of the run."""
        if not self.patience:
            return {}
        value = self._value if math.isfinite(self._value) else None
        return {"early_stopping": {"step": self._step, "value": value, "misses": self._misses, "looked_at": self._looked_at}}

    def status(self, early: bool) -> dict[str, Any]:
        """For status.json; `early`: whether the run ended before its last step."""
        return {"best": self._shown(), "stopped_early": early and self.exhausted} if self.patience and self._step else {}

    def tell(self, step: int, steps: int) -> None:
        """Says how a run ended."""
        if not (self.patience and self._step):
            return
        if self.exhausted and step < steps:
            say(f"stopped early at step {step} of {steps}: {self._misses} evaluations without a lower {METRIC} (config.train.patience)")
        say(f"best: step {self._step} with {METRIC} {self._value:.4g}, kept in {self._run / BEST}; tools use it")

    def close(self) -> None:
        """Releases the folder."""
        if self._checkpoints is not None:
            self._checkpoints.close()
