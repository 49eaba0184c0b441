"""Where the numbers of a run go: JSONL always, TensorBoard and Weights & Biases where the config says so.

`metrics.jsonl` has one JSON object on a line, with `step`, `time` (seconds since 1970) and the metrics. It is the record that `wavepath
compare` and `wavepath report` read; the other writers are for looking at a run while it trains.
"""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wavepath.errors import ConfigError
from wavepath.files import write_text
from wavepath.training.distributed import is_first

METRICS = "metrics.jsonl"


class JsonlWriter:
    """Appends to `metrics.jsonl`; each line is whole before the next step is written."""

    def __init__(self, run: Path, start_step: int):
        self.path = Path(run) / METRICS
        trim(self.path, start_step)
        self._file = open(self.path, "a", encoding="utf-8")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line."""
        record = {"step": step, "time": round(time.time(), 3), **{name: _plain(value) for name, value in values.items()}}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Pictures are files of their own."""

    def close(self) -> None:
        """Ends the file."""
        self._file.close()


def _plain(value: float) -> float | None:
    # Six significant digits lose what a bit-exact comparison of two runs shows, so floats are written in full; JSON has no NaN.
    return float(value) if math.isfinite(value) else None


def trim(path: Path, step: int) -> None:
    """Drops the lines after `step` and a line cut short by a kill: the steps will be taken, and written, again."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = []
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if line.endswith("\n") and record["step"] <= step:
            kept.append(line)
    if kept != lines:
        write_text(path, "".join(kept))


class TensorBoardWriter:
    """Scalars and panels as TensorBoard events in `<run>/tensorboard`, through clu."""

    def __init__(self, run: Path):
        # Imported here: clu brings TensorFlow, seconds that a run without TensorBoard does not pay.
        from clu import metric_writers

        self._writer = metric_writers.SummaryWriter(str(Path(run) / "tensorboard"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point of each curve."""
        self._writer.write_scalars(step, dict(values))
        self._writer.flush()

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """A picture, uint8[h, w, 3]."""
        self._writer.write_images(step, {name: pixels[None]})
        self._writer.flush()

    def close(self) -> None:
        """Flushes and ends the event file."""
        self._writer.close()


class WandbWriter:
    """Scalars and panels to a Weights & Biases project; a resumed run goes on in the same W&B run.

    Raises:
        ConfigError: wandb is not installed.
    """

    def __init__(self, run: Path, project: str, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                f"config.writers.wandb={project!r} needs Weights & Biases; pip install 'wavepath[wandb]', or set config.writers.wandb= to nothing"
            ) from None
        self._wandb = wandb
        identity = Path(run) / "wandb_id.txt"
        if not identity.is_file():
            write_text(identity, wandb.util.generate_id())
        name = Path(run).resolve().name
        self._run = wandb.init(
            project=project, id=identity.read_text(encoding="utf-8").strip(), name=name, resume="allow", config=dict(config), dir=str(run)
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One row of the history."""
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """A picture, uint8[h, w, 3]."""
        self._run.log({name: self._wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        """Ends the W&B run."""
        self._run.finish()


class Writers:
    """All writers of a run behind one `scalars` and one `image`; none in any but the first process."""

    def __init__(self, run: Path, settings: Any, config: Mapping[str, Any], start_step: int):
        self._writers: list[Any] = []
        if not is_first():  # of several processes, which have the same metrics
            return
        self._writers.append(JsonlWriter(run, start_step))
        if settings.tensorboard:
            self._writers.append(TensorBoardWriter(run))
        if settings.wandb:
            self._writers.append(WandbWriter(run, settings.wandb, config))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of one step everywhere."""
        for writer in self._writers:
            writer.scalars(step, values)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Writes a picture, uint8[h, w, 3], where pictures can be seen."""
        for writer in self._writers:
            writer.image(step, name, pixels)

    def close(self) -> None:
        """Ends them all."""
        for writer in self._writers:
            writer.close()
