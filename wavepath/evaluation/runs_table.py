"""What the tables of scored runs share: which runs are read, which are one row, what they may have seen, and a number with its spread.

Runs that differ in their seed alone are one row. A metric is the mean over images and runs, `sd` the deviation between runs, and the interval is over
slides: images of one slide are no independent witnesses.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from wavepath import config as configs
from wavepath.console import duration, warn
from wavepath.defaults import train_defaults
from wavepath.errors import ConfigError
from wavepath.files import write_text
from wavepath.training.runs import DONE, Run, find_runs, read_run

BOOTSTRAPS = 1000
MOST_DB = 100.0  # an exact copy counts as this much in a mean, where its PSNR would be infinite
_NAMED = 5  # slides in a warning


@dataclass
class Row:
    """One line of a table: the runs of one setting, or a method without runs. `scores[run][image]` maps metrics to values."""

    name: str
    runs: tuple[Run, ...] = ()
    scores: list[list[dict[str, float]]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


# Runs ------------------------------------------------------------------------------------------------------------------------------------


def read_task_runs(paths: Iterable[Path], task: str, flag: str, config_file: str) -> tuple[list[Run], dict[Path, ConfigDict]]:
    """The runs in folders, and the config of each.

    Args:
        task: the only one that is taken. flag, config_file: of the command that takes them and of runs that fit, for the message.

    Raises:
        WavepathError: no run there. ConfigError: a run of another task, or one that has not begun.
    """
    runs, known = [read_run(folder) for folder in find_runs(paths)], {}
    for run in runs:
        path = run.folder / "config.json"
        if not path.is_file():
            raise ConfigError(f"{run.folder} has not begun to train; run its `wavepath train` (or the sweep) again, or leave it out")
        config = configs.complete(configs.load_json(path), train_defaults())
        if config.task != task:
            raise ConfigError(f"{run.folder} is a run of task {config.task!r}; {flag} takes runs of {config_file}")
        if run.status != DONE:
            warn(f"{run.folder} is not finished ({run.status}, step {run.step} of {config.train.steps}): its last checkpoint is scored")
        known[run.folder] = config
    return runs, known


def refuse_different(known: Mapping[Path, ConfigDict], group: str, names: Iterable[str], advice: str = "score them apart") -> None:
    """Raises ConfigError where runs differ in a field of `config.<group>`."""
    for name in names:
        values = {str(config[group][name]): folder for folder, config in known.items()}
        if len(values) > 1:
            listed = ", ".join(f"{value} ({folder})" for value, folder in values.items())
            raise ConfigError(f"the runs have different config.{group}.{name}: {listed}; {advice}")


def config_for(known: Mapping[Path, ConfigDict], data: Path | None) -> ConfigDict:
    """The first run's config, with the data that are to be scored: `data`, or those that all of the runs were trained from.

    Raises:
        ConfigError: no `data`, and the runs were trained from different ones.
    """
    config = next(iter(known.values())).copy_and_resolve_references()
    places = {str(one.data.dir) for one in known.values()}
    if data is None and len(places) > 1:
        raise ConfigError(f"the runs were trained from different data ({', '.join(sorted(places))}); name the test data with --data")
    with config.unlocked():
        config.data.dir = str(data or config.data.dir)
        if data is not None:
            config.data.exclude_slides = ""  # names slides of the training's data
    return config


def known_slides(tested: Iterable[str], trained: Mapping[str, set[str] | None], remedy: str) -> list[str]:
    """Warnings of test slides that a run was trained on.

    Args:
        trained: the training slides of each run (or of what it took over), by its name in the warning; None: not known.
        remedy: what to do about it.
    """
    tested, told = set(tested), []
    for run, slides in trained.items():
        if slides is None:
            told.append(f"{run} does not record its training slides: test slides may be among them")
        elif common := sorted(tested & slides):
            named = ", ".join(common[:_NAMED]) + (f" and {len(common) - _NAMED} more" if len(common) > _NAMED else "")
            told.append(f"{run} was trained on {len(common)} of the {len(tested)} test slides ({named}): its scores are not of new slides; {remedy}")
    return told


# Numbers ---------------------------------------------------------------------------------------------------------------------------------


def column(row: Row, name: str) -> np.ndarray:
    """One metric, [runs, images]; PSNRs at most `MOST_DB`."""
    return np.minimum([[image[name] for image in run] for run in row.scores], MOST_DB if name.startswith("psnr") else np.inf)


def run_facts(row: Row) -> dict[str, Any]:
    """How many runs a row has, which they are, how long they were trained (seconds), and its own facts."""
    entry: dict[str, Any] = {"seeds": len(row.runs)} | row.facts
    if row.runs:
        entry["runs"] = [str(run.folder) for run in row.runs]
        entry["seconds"] = [run.seconds for run in row.runs if np.isfinite(run.seconds)]
    return entry


def slide_draws(slides: Sequence[str], seed: int) -> np.ndarray | None:
    """How often each image is in each of `BOOTSTRAPS` draws of whole slides, [draws, images]; None: one slide, no draws."""
    names, member = np.unique(slides, return_inverse=True)
    if len(names) < 2:
        return None
    drawn = np.random.default_rng(seed).integers(0, len(names), (BOOTSTRAPS, len(names)))
    counts = np.zeros((BOOTSTRAPS, len(names)), np.int64)
    np.add.at(counts, (np.arange(BOOTSTRAPS)[:, None], drawn), 1)
    return counts[:, member]


def entry(values: np.ndarray, slides: Sequence[str], seed: int) -> dict[str, float | None]:
    """`value` (mean over images and runs), `images_sd`, over several runs `sd`, and the 95 % interval `low` to `high` of the mean over slides.

    Args:
        values: [runs, images]. slides: of each image.
    """
    images = values.mean(axis=0)
    found: dict[str, float | None] = {"value": float(images.mean()), "images_sd": float(images.std(ddof=1)) if len(images) > 1 else None}
    if len(values) > 1:
        found["sd"] = float(values.mean(axis=1).std(ddof=1))
    draws = slide_draws(slides, seed)
    found |= interval(None if draws is None else draws @ images / draws.sum(1))
    return rounded(found)


def interval(values: np.ndarray | None) -> dict[str, float | None]:
    """`low` and `high`: where the middle 95 % of the values lie; None: there are none."""
    if values is None or not len(values):
        return {"low": None, "high": None}
    return dict(zip(("low", "high"), map(float, np.percentile(values, [2.5, 97.5])), strict=True))


def of_runs(values: Sequence[float]) -> dict[str, float | None]:
    """The entry of a number that a run has as a whole: mean, and over several runs `sd`; an undefined one makes it undefined."""
    values = np.asarray(values, float)
    whole = bool(len(values)) and bool(np.isfinite(values).all())
    found: dict[str, float | None] = {"value": float(values.mean()) if whole else None, "low": None, "high": None}
    if len(values) > 1:
        found["sd"] = float(values.std(ddof=1)) if whole else None
    return rounded(found)


def correlation(values: np.ndarray, target: np.ndarray, slides: Sequence[str], seed: int) -> dict[str, float | None]:
    """Pearson's correlation over images with `target` [images]: as `entry`; `value` is None where either is the same in all images, or there are
    fewer than three."""

    def by_draw(weights: np.ndarray) -> np.ndarray:
        """[draws, runs], nan where it is not defined."""
        weights = weights / weights.sum(1, keepdims=True)
        mean_a, mean_b = weights @ values.T, (weights @ target)[:, None]
        spread_a, spread_b = weights @ (values**2).T - mean_a**2, (weights @ target**2)[:, None] - mean_b**2
        product = weights @ (values * target).T - mean_a * mean_b
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(np.minimum(spread_a, spread_b) > 1e-10, product / np.sqrt(spread_a * spread_b), np.nan)

    if len(target) < 3:
        return of_runs([np.nan] * len(values))
    found = of_runs(by_draw(np.ones((1, len(target))))[0])
    draws = slide_draws(slides, seed)
    if found["value"] is not None and draws is not None:
        means = by_draw(draws.astype(float)).mean(1)
        found |= rounded(interval(means[np.isfinite(means)]))
    return found


def rounded(found: Mapping[str, float | None]) -> dict[str, float | None]:
    """To six places."""
    return {name: None if value is None else round(value, 6) for name, value in found.items()}


# Text ------------------------------------------------------------------------------------------------------------------------------------


def cell(found: Mapping[str, Any] | None, decimals: int, sign: str = "") -> str:
    """`21.38 ± 0.04`, or `-` for what is not there or not defined."""
    if found is None or found.get("value") is None:
        return "-"
    text = f"{found['value']:{sign}.{decimals}f}"
    return text + (f" ± {found['sd']:.{decimals}f}" if found.get("sd") is not None else "")


def spread_cell(found: Mapping[str, Any] | None, decimals: int, sign: str = "+") -> str:
    """The same with its interval behind it."""
    spread = f" [{found['low']:{sign}.{decimals}f}, {found['high']:{sign}.{decimals}f}]" if found and found.get("low") is not None else ""
    return cell(found, decimals, sign) + spread


COST_HEAD = ("parameters", "steps", "training")


def cost_cells(found: Mapping[str, Any]) -> list[str]:
    """What a row cost, under `COST_HEAD`."""
    steps = sorted(set(found.get("steps", ())))
    seconds = found.get("seconds") or [0.0]
    return [
        f"{found['parameters'] / 1e6:.2f} M" if "parameters" in found else "-", ", ".join(map(str, steps)) or "-",
        duration(sum(seconds) / len(seconds)) if sum(seconds) else "-",
    ]  # fmt: skip


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, a line each."""
    lines = ["| " + " | ".join(line) + " |" for line in (head, *rows)]
    return "\n".join([lines[0], "|" + " --- |" * len(head), *lines[1:]]) + "\n"


def warnings_text(warnings: Iterable[str]) -> str:
    """Warnings as paragraphs of Markdown."""
    return "".join(f"\nWarning: {text}\n" for text in warnings)


def write_csv(path: Path, head: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    """A table for other programs, whole or not at all."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(head)
    table.writerows(lines)
    write_text(path, text.getvalue())
