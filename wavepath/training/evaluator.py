"""What the loop looks at between steps: metrics and pictures of a fixed part of the data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from wavepath.tasks.base import State, Task
from wavepath.training import distributed, panels, parallel
from wavepath.training.writers import Writers

_PANEL_ROWS = 6


class Evaluator:
    """Metrics and pictures of a fixed part of the task's held-out source (else of the training source), without augmentation.

    Compiled when they are first asked for.
    """

    def __init__(self, config: ConfigDict, devices: parallel.Parallel, task: Task, source: Any, pipeline: Any):
        self._config, self._devices, self._task, self._source, self._pipeline = config, devices, task, source, pipeline
        self._step: Callable | None = None
        self._predict: Callable | None = None
        self._sample: Any = None

    def metrics(self, state: State) -> dict[str, float]:
        """Means of `Task.eval_step` over `train.eval_examples` examples, the same each time, named `eval_...`."""
        self._step = self._step or self._devices.eval_step(self._task)
        totals: dict[str, tuple[float, float]] = {}
        for batch in self._batches(self._config.batch_size, self._config.train.eval_examples):
            for name, (total, count) in jax.device_get(self._step(state, self._devices.put(batch))).items():
                old = totals.get(name, (0.0, 0.0))
                totals[name] = (old[0] + float(total), old[1] + float(count))
        return {f"eval_{name}": total / count for name, (total, count) in totals.items() if count}

    def _batches(self, batch_size: int, limit: int) -> Any:
        return self._pipeline.eval_batches(
            self._source, batch_size, limit=limit, host=distributed.rows(), on_corrupt=self._config.data.on_corrupt
        )

    def panel(self, state: State, step: int, folder: Path, writers: Writers) -> None:
        """Draws the same few examples each time, so that the panels of a run can be compared."""
        if self._sample is None:
            count = len(self._devices.devices)
            self._sample = next(iter(self._batches(-(-_PANEL_ROWS // count) * count, _PANEL_ROWS)))
            offered = jax.eval_shape(self._task.predict, state, self._sample)
            self._predict = self._devices.predict(self._task, [name for name in panels.COLUMNS if name in offered])
        outputs = distributed.gathered(self._predict(state, self._devices.put(self._sample)))
        shown = min(_PANEL_ROWS, len(self._source))
        outputs = {name: value[:shown] for name, value in outputs.items()}
        pixels = panels.panel(outputs)
        if pixels is not None and distributed.is_first():
            panels.write_panel(folder, step, pixels, panels.columns_of(outputs))
            writers.image(step, "panel", pixels)
