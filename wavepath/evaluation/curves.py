"""ROC curves of out-of-fold predictions, one against the rest, with the mean over seeds and a bootstrap band over cases.

The areas are those of the table beside the picture: the same Mann-Whitney areas, and intervals from the same resamples of the cases
(`evaluation.probes.bootstrap`). The band holds, at each false positive rate by itself, 95 % of the resampled mean curves.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from wavepath.console import progress
from wavepath.evaluation.probes import Predictions
from wavepath.files import atomic_path, write_text

GRID = np.linspace(0, 1, 201)  # false positive rates at which curves are averaged
# Okabe and Ito's, which colour-blind eyes tell apart, but for yellow, which is not seen on white, and black, which is for means.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
DASHES = ("-", "--", ":", "-.")  # once the colours are used up
MACRO = "macro mean"
_DPI = 200


@dataclass(frozen=True)
class Curve:
    """A mean ROC curve on `GRID`: true positive rates `tpr` and the band `low`, `high`, f64 [201]; its area with its interval."""

    tpr: np.ndarray
    low: np.ndarray
    high: np.ndarray
    auc: float
    auc_low: float
    auc_high: float


def roc_points(
    positive: Bool[np.ndarray, " n"], scores: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"] | None = None
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]]:
    """False and true positive rates at every threshold, from (0, 0) to (1, 1); equal scores are one threshold.

    Args:
        positive: the truth. scores: higher means positive. weights: how often each example counts.

    Raises:
        ValueError: no positive or no negative example (of a weight above 0).
    """
    return _Sorted(positive, scores).points(weights)


class _Sorted:
    """Examples in the order of their scores: a resample of the cases is then two sums over weights, and sorts nothing again."""

    def __init__(self, positive: np.ndarray, scores: np.ndarray):
        self.order = np.argsort(-scores, kind="stable")
        self.positive = np.asarray(positive, bool)[self.order]
        ordered = scores[self.order]
        self.last = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)  # of each run of equal scores

    def points(self, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        weights = np.ones(len(self.order)) if weights is None else np.asarray(weights, np.float64)[self.order]
        true = np.cumsum(weights * self.positive)[self.last]
        false = np.cumsum(weights * ~self.positive)[self.last]
        if true[-1] <= 0 or false[-1] <= 0:
            raise ValueError("a ROC curve needs positive and negative examples")
        return np.append(0.0, false / false[-1]), np.append(0.0, true / true[-1])


def _on_grid(points: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    # Where the curve goes straight up, np.interp takes the upper end: at 0 that is what is reached without a false alarm.
    return np.interp(GRID, *points)


def _area(points: tuple[np.ndarray, np.ndarray]) -> float:
    return float(np.trapezoid(points[1], points[0]))


def roc_curves(
    many: Sequence[Predictions], wanted: Sequence[str] | None = None, *, bootstraps: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, Curve]:
    """Mean curves over seeds of each class against the rest, and of more than two classes their mean (`MACRO`).

    Args:
        many: out-of-fold predictions, of one run or of several seeds over the same groups.
        wanted: classes; default: the second of two, all of more. A class that is absent, or that is everything, is left out.
        bootstraps: resamples of the groups; 0: no band, and no interval.

    Returns:
        By class; empty where no class has both positive and negative examples.
    """
    names = many[0].classes
    indices = [names.index(name) for name in wanted] if wanted else ([1] if len(names) == 2 else range(len(names)))
    known = [index for index in indices if all(0 < (one.truth == index).sum() < len(one.truth) for one in many)]
    if not known:
        return {}
    ready = [[_Sorted(one.truth == index, one.scores[:, index]) for index in known] for one in many]
    curves, areas = _means(ready, [None] * len(many))
    # As in probes.bootstrap: the same draws of the same groups in the same order.
    rng, groups = np.random.default_rng(seed), np.unique(np.concatenate([one.groups for one in many]))
    member = [np.searchsorted(groups, one.groups) for one in many]
    drawn_curves, drawn_areas = [], []
    with progress("ROC resamples", bootstraps, "resamples") as bar:
        for _ in range(bootstraps):
            count = np.bincount(rng.integers(0, len(groups), len(groups)), minlength=len(groups)).astype(np.float64)
            curve, area = _means(ready, [count[each] for each in member])
            drawn_curves.append(curve.astype(np.float32))
            drawn_areas.append(area)
            bar.advance(1)
    tails = [50 * (1 - level), 50 * (1 + level)]
    titles = [names[index] for index in known] + ([MACRO] if len(known) > 1 else [])
    result = {}
    for place, title in enumerate(titles):
        bands, interval = [[np.full(len(GRID), np.nan)] * 2, [np.nan] * 2]
        if kept := [index for index, area in enumerate(drawn_areas) if np.isfinite(area[place])]:
            bands = np.percentile(np.stack([drawn_curves[index][place] for index in kept]), tails, axis=0)
            interval = np.percentile([drawn_areas[index][place] for index in kept], tails)
        result[title] = Curve(curves[place], *bands, float(areas[place]), *map(float, interval))
    return result


def _means(ready: Sequence[Sequence[_Sorted]], weights: Sequence[np.ndarray | None]) -> tuple[np.ndarray, np.ndarray]:
    """Curves [classes (+ 1), grid] and areas [classes (+ 1)], means over the seeds; nan for a class that a resample lacks, which the macro mean
    then leaves out, as the table's does."""
    curves, areas = [], []
    for seeds, weight in zip(ready, weights, strict=True):
        rows, values = [], []
        for one in seeds:
            try:
                points = one.points(weight)
            except ValueError:
                rows.append(np.full(len(GRID), np.nan))
                values.append(np.nan)
            else:
                rows.append(_on_grid(points))
                values.append(_area(points))
        if len(rows) > 1:
            found = np.isfinite(values)
            rows.append(np.stack(rows)[found].mean(0) if found.any() else rows[0])
            values.append(np.mean(np.array(values)[found]) if found.any() else np.nan)
        curves.append(rows)
        areas.append(values)
    return np.mean(curves, axis=0), np.mean(areas, axis=0)


def draw_roc(
    path: Path, predictions: Sequence[Predictions] | Mapping[str, Sequence[Predictions]], classes: Sequence[str] | None = None, *,
    positive: str = "", bootstraps: int = 1000, seed: int = 0, title: str = "",
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Draws ROC curves into a PNG and writes their points beside it as CSV (arm, class, fpr, tpr, low, high).

    Args:
        predictions: seeds of one arm, or of several arms by name.
        classes: those to draw, default all. positive: or this class alone, against the rest.
        bootstraps, seed: as for `probes.bootstrap`.

    Of one arm each class against the rest and the mean of all is drawn, of several arms their means (of two classes the second, or `positive`), so
    that arms are told apart.

    Returns:
        arm -> class -> `auc`, `low`, `high`; empty, and nothing is written, where no class has both positive and negative examples.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = predictions if isinstance(predictions, Mapping) else {"": predictions}
    wanted = [positive] if positive else classes
    found = {arm: roc_curves(many, wanted, bootstraps=bootstraps, seed=seed) for arm, many in arms.items()}
    found = {arm: curves for arm, curves in found.items() if curves}
    if not found:
        return {}
    lines = _lines(found)
    below = len(lines) > 6 or max(len(label) for label, *_ in lines) > 46  # a legend that would hide curves, or run out of the picture
    columns = 2 if max(len(label) for label, *_ in lines) <= 34 else 1
    figure = Figure(figsize=(4.8, 4.6 + (0.2 * -(-len(lines) // columns) if below else 0)), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle=(0, (4, 4)))
    for place, (label, curve, band, strong) in enumerate(lines):
        colour, dash = PALETTE[place % len(PALETTE)], DASHES[place // len(PALETTE) % len(DASHES)]
        if strong:
            colour, dash = "black", "-"
        if band:
            axis.fill_between(GRID, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
        axis.plot(np.append(0, GRID), np.append(0, curve.tpr), color=colour, linestyle=dash, linewidth=2.2 if strong else 1.5, label=label)
    axis.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axis.set_xlabel("false positive rate (1 - specificity)", fontsize=10)
    axis.set_ylabel("true positive rate (sensitivity)", fontsize=10)
    axis.grid(alpha=0.25)
    if title:
        axis.set_title(title, fontsize=11)
    told = {"title": "AUC [95 % interval]" if bootstraps else "AUC", "fontsize": 8, "title_fontsize": 8}
    if below:
        figure.legend(loc="outside lower center", frameon=False, ncols=columns, **told)
    else:
        axis.legend(loc="lower right", framealpha=0.9, **told)
    with atomic_path(path) as temporary:
        figure.set_dpi(_DPI)
        FigureCanvasAgg(figure).print_png(str(temporary))
    _write_points(Path(path).with_suffix(".csv"), found)
    return {arm: {name: _areas(curve) for name, curve in curves.items()} for arm, curves in found.items()}


def _lines(found: Mapping[str, Mapping[str, Curve]]) -> list[tuple[str, Curve, bool, bool]]:
    """(label, curve, whether its band is drawn, whether it is the mean of others that are drawn) of each line."""
    lines = []
    for arm, curves in found.items():
        shown = list(curves) if len(found) == 1 else [MACRO if MACRO in curves else next(iter(curves))]
        for name in shown:
            label = ", ".join(part for part in (arm, name) if part) if len(found) == 1 or name != MACRO else arm
            label += f": {curves[name].auc:.3f}"
            if np.isfinite(curves[name].auc_low):
                label += f" [{curves[name].auc_low:.2f}, {curves[name].auc_high:.2f}]"
            # The bands of many classes would lie over one another: of more than three curves the mean's alone.
            strong = name == MACRO and len(shown) > 1
            lines.append((label, curves[name], strong or max(len(shown), len(found)) <= 3, strong))
    return lines


def _areas(curve: Curve) -> dict[str, float | None]:
    values = {"auc": curve.auc, "low": curve.auc_low, "high": curve.auc_high}
    return {name: round(value, 6) if np.isfinite(value) else None for name, value in values.items()}


def _write_points(path: Path, found: Mapping[str, Mapping[str, Curve]]) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["arm", "class", "fpr", "tpr", "low", "high"])
    for arm, curves in found.items():
        for name, curve in curves.items():
            for row in zip(GRID, curve.tpr, curve.low, curve.high, strict=True):
                table.writerow([arm, name, *(f"{value:.5g}" if np.isfinite(value) else "" for value in row)])
    write_text(path, text.getvalue())
