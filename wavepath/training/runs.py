"""What a run folder says about itself, read without JAX: state, curves, final values, evaluation results.

A run folder may be of a run that is still going on, was killed in the middle of a line, or has not begun; all of that can be read.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wavepath.errors import WavepathError
from wavepath.files import read_json

DONE, STOPPED, PENDING = "done", "stopped", "pending"
# Columns that tell how a run went, not what it reached.
HOUSEKEEPING = frozenset({"step", "time", "epoch", "lr", "grad_norm", "images_per_second", "data_wait", "seconds", "eta_seconds", "replaced"})


@dataclass(frozen=True)
class Run:
    """One run folder. `curves` maps a metric to its (steps, values); `results` maps `probe.metric` to its value."""

    folder: Path
    status: str = PENDING  # done, stopped, running (or killed while it was), diverged, pending (nothing there)
    step: int = 0
    steps: int = 0
    seconds: float = math.nan
    images_per_second: float = math.nan
    curves: Mapping[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    results: Mapping[str, float] = field(default_factory=dict)
    damaged: int = 0  # lines of metrics.jsonl that cannot be read

    def finals(self) -> dict[str, float]:
        """The last value of each metric in metrics.jsonl, then the evaluation results."""
        last = {name: values[-1] for name, (_, values) in self.curves.items() if values}
        return {**last, **self.results}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_curves(path: Path) -> tuple[dict[str, tuple[list[int], list[float]]], int]:
    """metrics.jsonl -> `{metric: (steps, values)}`, by rising step, and the number of lines that could not be read.

    After a kill the steps since the last checkpoint are logged a second time: the later line counts. A line that a kill cut short,
    alone or joined with the first one of the resumed run, is left out and counted.
    """
    points: dict[str, dict[int, float]] = {}
    damaged = 0
    if not Path(path).is_file():
        return {}, 0
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (ValueError, KeyError, TypeError):
            damaged += 1
            continue
        for name, value in entry.items():
            if name not in ("step", "time") and (_number(value) or value is None):
                # JSON has no NaN: it is written as null. It is a value, a diverged run must show.
                points.setdefault(name, {})[step] = math.nan if value is None else float(value)
    return {name: (sorted(values), [values[step] for step in sorted(values)]) for name, values in points.items()}, damaged


def flatten_results(node: Any, prefix: str = "") -> dict[str, float]:
    """The numbers of an evaluation's results.json, as `probe.metric`.

    `{"value": 0.8, "low": .., "high": ..}` counts as one number; where the file has a part `probes`, only what is below it is a
    result, the rest says what was evaluated. An undefined metric (null) is left out.
    """
    if not prefix and isinstance(node, Mapping) and isinstance(node.get("probes"), Mapping):
        node = {name: {metric: entry for metric, entry in probe.items() if isinstance(entry, Mapping)} for name, probe in node["probes"].items()}
    if _number(node):
        return {prefix: float(node)}
    if not isinstance(node, Mapping):
        return {}
    if "value" in node:
        return {prefix: float(node["value"])} if _number(node["value"]) else {}
    flat: dict[str, float] = {}
    for key, value in node.items():
        flat.update(flatten_results(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def read_results(folder: Path) -> dict[str, float]:
    """Every `results.json` under `<run>/evaluation`; those in folders below it get the folder's name in front (`colon/knn.accuracy`)."""
    root = Path(folder) / "evaluation"
    found: dict[str, float] = {}
    for path in sorted(root.rglob("results.json")):
        name = path.parent.relative_to(root).as_posix()
        found.update({(metric if name == "." else f"{name}/{metric}"): value for metric, value in flatten_results(read_json(path)).items()})
    return found


def is_run(folder: Path) -> bool:
    """Whether a training run has left anything in the folder."""
    return any((Path(folder) / name).is_file() for name in ("config.json", "metrics.jsonl", "status.json"))


def read_status(folder: Path) -> dict[str, Any]:
    """The content of status.json, or `{}` where no run has ended in the folder."""
    path = Path(folder) / "status.json"
    return read_json(path) if path.is_file() else {}


def read_run(folder: Path) -> Run:
    """Reads a run folder in whatever state it is.

    Raises:
        WavepathError: a file in it is damaged.
    """
    folder = Path(folder)
    state = read_status(folder)
    curves, damaged = read_curves(folder / "metrics.jsonl")
    status = state.get("status")
    if status != DONE:
        # A run that was killed wrote no status; one that saved after a signal says "preempted". Both go on when they are run again.
        status = STOPPED if status in (None, "preempted") and is_run(folder) else status or PENDING
    last = max((steps[-1] for steps, _ in curves.values() if steps), default=0)
    return Run(
        folder, status, int(state.get("step") or last), int(state.get("steps") or 0), float(state.get("seconds") or math.nan),
        float(state.get("images_per_second") or math.nan), curves, read_results(folder), damaged,
    )


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The run folders that are given, or lie below what is given (a sweep's folder), in natural order, each once.

    Raises:
        WavepathError: a path without any run.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if is_run(path):
            below = [path]
        else:
            marks = {mark.parent for name in ("config.json", "metrics.jsonl", "status.json") for mark in path.rglob(name)}
            # A run may hold other folders with a config.json of their own (prepared tiles, a run it starts from).
            below = sorted((folder for folder in marks if not marks & set(folder.parents)), key=natural_key)
        if not below:
            raise WavepathError(f"no run in {path}; give the --workdir of a `wavepath train` or `wavepath sweep`")
        found.extend(folder for folder in below if folder not in found)
    return found


def natural_key(value: object) -> list[tuple[int, float, str]]:
    """A sort key under which `lr=2` comes before `lr=10`."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", str(value))
    return [(0, float(part), "") if index % 2 else (1, 0.0, part) for index, part in enumerate(parts)]


def main_metrics(names: Iterable[str]) -> list[str]:
    """The metrics worth a place in a table: without rates, durations and schedules; `loss` first, in the order given otherwise."""
    kept = [name for name in dict.fromkeys(names) if name.rpartition("/")[2] not in HOUSEKEEPING]
    return sorted(kept, key=lambda name: name != "loss")
