"""Compares runs: seeds of one setting are collapsed to mean and spread, in a table and in curves; last pictures stand side by side.

Runs of a sweep are grouped by arm (the folder above `seed<k>`); other runs by their config without the seed, and named by the
fields in which they differ.
"""

import csv
import fnmatch
import io
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from wavepath.config import flatten, load_json, propose
from wavepath.console import table, warn
from wavepath.errors import ConfigError
from wavepath.files import atomic_path, write_text
from wavepath.training.panels import panel_steps, side_by_side
from wavepath.training.runs import DONE, Run, find_runs, main_metrics, read_run

_LABEL_LENGTH = 60


@dataclass(frozen=True)
class Group:
    """The runs of one setting, which differ in their seed alone."""

    name: str
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Line:
    """One metric of one group over its runs. `std` is the sample standard deviation, nan for a single run."""

    metric: str
    group: str
    mean: float
    std: float
    n: int
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` found."""

    groups: tuple[Group, ...]
    lines: tuple[Line, ...]
    metrics: tuple[str, ...]


def _config_key(folder: Path) -> dict[str, Any]:
    """The fields of a run's config without the seed and without paths into the run folder itself."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    flat = flatten(load_json(path))
    own = {str(folder), str(folder.resolve())}
    return {name: value for name, value in flat.items() if name != "seed" and not any(str(value).startswith(prefix) for prefix in own)}


def _common(paths: Sequence[Path]) -> dict[Path, str]:
    """A short name for each folder: its own name, with parents in front as far as needed to tell them apart."""
    names = {}
    for path in paths:
        for size in range(1, len(path.parts) + 1):
            names[path] = "/".join(path.parts[-size:])
            if sum("/".join(other.parts[-size:]) == names[path] for other in paths) == 1:
                break
    return names


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups runs that differ in their seed alone, in the order of their first run."""
    arms: dict[Path, list[Run]] = {}
    loose: list[tuple[dict[str, Any], list[Run]]] = []
    order: list[Any] = []
    for run in runs:
        arm = run.folder.parent
        if re.fullmatch(r"seed\d+", run.folder.name):
            if arm not in arms:
                order.append(arm)
            arms.setdefault(arm, []).append(run)
            continue
        key = _config_key(run.folder)
        # Runs whose config is not known are nobody's repetition.
        same = next((members for other, members in loose if key and other == key), None)
        if same is None:
            loose.append((key, same := []))
            order.append(len(loose) - 1)
        same.append(run)
    names: dict[Any, str] = dict(_common(list(arms)))
    names.update(enumerate(_loose_names(loose)))
    members = {**arms, **{index: found for index, (_, found) in enumerate(loose)}}
    return [Group(names[key], tuple(members[key])) for key in order]


def _loose_names(loose: Sequence[tuple[Mapping[str, Any], Sequence[Run]]]) -> list[str]:
    """`lr=0.1,top=0.2` from the fields in which the configs differ; the folder's name where that is empty, long or not unique."""
    folders = _common([runs[0].folder for _, runs in loose])
    keys = [key for key, _ in loose]
    fields = list(dict.fromkeys(name for key in keys for name in key))
    differing = [name for name in fields if len({repr(key.get(name)) for key in keys}) > 1]
    names = [",".join(f"{name.rpartition('.')[2]}={key.get(name)}" for name in differing) for key in keys]
    return [
        name if name and len(name) <= _LABEL_LENGTH and names.count(name) == 1 else folders[runs[0].folder]
        for name, (_, runs) in zip(names, loose, strict=True)
    ]


def _choose(available: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The metrics that match the names or patterns asked for; without any, all that are results.

    Raises:
        ConfigError: a name that no run has.
    """
    if not wanted:
        return main_metrics(available)
    chosen = []
    for pattern in wanted:
        found = [name for name in available if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            raise ConfigError(f"no run has the metric {pattern!r}; {propose(pattern, available, 'there are')}")
        chosen.extend(name for name in found if name not in chosen)
    return chosen


def summarise(groups: Iterable[Group], metrics: Sequence[str]) -> list[Line]:
    """Mean, sample standard deviation, count and range of each metric's final values, metric by metric.

    A value that is not finite counts, and makes the mean so: a diverged run must not vanish from its arm.
    """
    groups = list(groups)
    lines = []
    for metric in metrics:
        for group in groups:
            values = [final[metric] for final in (run.finals() for run in group.runs) if metric in final]
            if values:
                finite = all(map(math.isfinite, values))
                std = statistics.stdev(values) if len(values) > 1 and finite else math.nan
                mean = statistics.fmean(values) if finite else math.nan
                lines.append(Line(metric, group.name, mean, std, len(values), min(values), max(values)))
    return lines


def _cell(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def _write_tables(out: Path, lines: Sequence[Line]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["metric", "arm", "mean", "std", "n", "min", "max"])
    writer.writerows([line.metric, line.group, *map(repr, (line.mean, line.std, line.n, line.low, line.high))] for line in lines)
    write_text(out / "comparison.csv", text.getvalue())
    rows = ["| metric | arm | mean | std | n |", "| --- | --- | --- | --- | --- |"]
    rows += [f"| {line.metric} | {line.group} | {_cell(line.mean)} | {_cell(line.std)} | {line.n} |" for line in lines]
    write_text(out / "comparison.md", "\n".join(rows) + "\n")


def text_table(comparison: Comparison) -> str:
    """The comparison as plain text."""
    rows = [[line.metric, line.group, _cell(line.mean), _cell(line.std), line.n, _cell(line.low), _cell(line.high)] for line in comparison.lines]
    return table(("metric", "arm", "mean", "std", "n", "min", "max"), rows)


def mean_curve(runs: Sequence[Run], metric: str) -> tuple[list[int], list[float], list[float]]:
    """Steps, mean and spread of a metric over runs, at the steps which every run that has the metric has logged.

    Where runs ended at different steps the curve ends with the shortest, so that the mean is over the same runs everywhere.
    """
    curves = [dict(zip(*run.curves[metric], strict=True)) for run in runs if run.curves.get(metric, ([], []))[0]]
    if not curves:
        return [], [], []
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    columns = [[curve[step] for curve in curves] for step in steps]
    spread = [statistics.stdev(column) if len(column) > 1 and all(map(math.isfinite, column)) else 0.0 for column in columns]
    return steps, [sum(column) / len(column) for column in columns], spread


def draw_curves(path: Path, groups: Sequence[Group], metrics: Sequence[str]) -> list[str]:
    """Draws the metrics that have curves, a panel each: the mean of each group with a band of one standard deviation.

    Returns:
        The metrics drawn; none (and no file) where no metric has a curve.
    """
    drawn = [metric for metric in metrics if any(run.curves.get(metric, ([], []))[0] for group in groups for run in group.runs)]
    if not drawn:
        return []
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = min(3, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * rows + 0.25 * len(groups)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    palette = colormaps["tab10" if len(groups) <= 10 else "turbo"]
    colours = [palette(index if len(groups) <= 10 else index / (len(groups) - 1)) for index in range(len(groups))]
    for axis, metric in zip(axes, drawn, strict=False):
        for group, colour in zip(groups, colours, strict=True):
            steps, mean, spread = mean_curve(group.runs, metric)
            if not steps:
                continue
            # A curve of one point is invisible as a line.
            axis.plot(steps, mean, color=colour, linewidth=1.6, marker="o" if len(steps) < 3 else None, markersize=4)
            axis.fill_between(
                steps,
                [m - s for m, s in zip(mean, spread, strict=True)],
                [m + s for m, s in zip(mean, spread, strict=True)],
                color=colour,
                alpha=0.18,
                linewidth=0,
            )
        axis.set(title=metric, xlabel="step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(drawn) :]:
        axis.set_visible(False)
    # One legend for all panels, so that no curve lies under it.
    handles = [axes[0].plot([], [], color=colour, linewidth=2)[0] for colour in colours]
    labels = [f"{group.name} (n={len(group.runs)})" for group in groups]
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=1 if len(groups) > 3 or columns == 1 else len(groups),
        fontsize=9,
        frameon=False,
        title="mean over runs, band: one standard deviation",
        title_fontsize=8,
    )
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))
    return drawn


def draw_panels(path: Path, groups: Sequence[Group]) -> bool:
    """Draws the last panel of the first run of each group side by side.

    Returns:
        Whether there was something to draw: no picture where fewer than two groups have panels, or panels of different examples.
    """
    last = {group.name: steps[-1][1] for group in groups if (steps := panel_steps(group.runs[0].folder))}
    pixels = side_by_side(last) if len(last) > 1 else None
    if pixels is None:
        path.unlink(missing_ok=True)  # of an earlier comparison
        return False
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")
    return True


def compare(paths: Iterable[Path], *, metrics: Sequence[str] = (), out: Path | None = None) -> Comparison:
    """Reads runs, or all runs below the folders given, and compares them.

    Args:
        metrics: names or patterns (`knn.*`); without any, all but rates and durations.
        out: folder for comparison.csv, comparison.md, curves.png and panels.png.

    Raises:
        WavepathError: no run there. ConfigError: a metric that no run has.
    """
    runs = [read_run(folder) for folder in find_runs(paths)]
    for run in runs:
        if run.status != DONE:
            warn(f"{run.folder} is {run.status} at step {run.step}; its last values count")
        if run.damaged:
            warn(f"{run.damaged} lines of {run.folder / 'metrics.jsonl'} cannot be read and are left out")
    groups = group_runs(runs)
    available = list(dict.fromkeys(name for run in runs for name in run.finals()))
    chosen = _choose(available, metrics)
    comparison = Comparison(tuple(groups), tuple(summarise(groups, chosen)), tuple(chosen))
    if out is not None:
        _write_tables(Path(out), comparison.lines)
        draw_curves(Path(out) / "curves.png", groups, chosen)
        draw_panels(Path(out) / "panels.png", groups)
    return comparison
