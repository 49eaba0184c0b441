"""The table, the curve and the picture of scored contrastive encoders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wavepath.console import table
from wavepath.evaluation import runs_table
from wavepath.evaluation.pair_sweep import BINS, THRESHOLDS, accuracy, rates
from wavepath.evaluation.runs_table import cell, spread_cell
from wavepath.files import atomic_path, write_json, write_text

_STEP = 0.01  # of the thresholds in curve.csv
_BARS = 80  # of the histograms


def _rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    near, published = f"top{results['near']}", results["published_threshold"]
    head = [
        "encoders", "accuracy", "at threshold", "same slide", "other slides", f"accuracy at {published}", "best on test", "at threshold", "AUC",
        "AUC same slide", "AUC other slides", "top 1", f"top {results['near']}", *runs_table.COST_HEAD,
    ]  # fmt: skip
    rows = []
    for name, found in results["probes"].items():
        shown = (
            spread_cell(found.get("accuracy"), 4, ""), cell(found.get("threshold"), 3), cell(found.get("accuracy_same_slide"), 4),
            cell(found.get("accuracy_other_slides"), 4), cell(found["accuracy_published"], 4), cell(found["accuracy_best"], 4),
            cell(found["threshold_best"], 3), cell(found["auc"], 4), cell(found["auc_same_slide"], 4), cell(found["auc_other_slides"], 4),
            cell(found["top1"], 4), cell(found[near], 4),
        )  # fmt: skip
        rows.append([name, *shown, *runs_table.cost_cells(found)])
    chance = results["chance"]
    rows.append(["chance", "0.5", *["-"] * 3, "0.5", *["-"] * 2, *["0.5"] * 3, f"{chance['top1']:.4f}", f"{chance[near]:.4f}", *["-"] * 3])
    return head, rows


def text_table(results: dict[str, Any]) -> str:
    """The encoders and their metrics as plain text."""
    return table(*_rows(results))


def about(results: dict[str, Any]) -> str:
    """What was scored and how, in a few sentences."""
    seeds = max(found["seeds"] for found in results["probes"].values())
    slides = f"{results['groups']} slide{'s' * (results['groups'] > 1)}"
    published, near = results["published_threshold"], results["near"]
    return (
        f"{results['windows']} windows of {results['side']} px, none over another, in {results['images']} test pairs of {slides}: each H&E window"
        " with each immunostain. Accuracy: mean of the shares of pairs at or above and of non-pairs below a threshold (balanced: guessing gives 0.5;"
        " as plain accuracy over equally many of both), the threshold being the best on training windows. Best on test: the highest that any"
        f" threshold reaches on the test windows themselves, which flatters. {published}: the threshold of the published encoders. Top 1 and {near}:"
        f" how often an H&E window's own immunostain is the nearest of {results['windows']}, or among the nearest {near}."
        + (" Accuracy has its [95 % bootstrap interval over slides] behind it." if results["groups"] > 1 else "")
        + (f" Mean ± standard deviation over up to {seeds} seeds." if seeds > 1 else " One seed.")
    )


def write_results(out: Path, results: dict[str, Any]) -> None:
    """Writes `results.json` and `results.md`."""
    head, rows = _rows(results)
    write_json(out / "results.json", {**results, "about": about(results), "table": (head, rows)})
    warnings = runs_table.warnings_text(results["warnings"])
    write_text(out / "results.md", f"{about(results)}\n\n{runs_table.markdown_table(head, rows)}{warnings}")


def write_curve(path: Path, rows: Sequence[Any]) -> None:
    """Accuracy over the threshold, for every run, on its training windows and on the test windows."""
    lines = []
    for row in rows:
        for run, *parts in zip(row.runs, row.trained, row.tested, strict=True):
            for name, found in zip(("train", "test"), parts, strict=True):
                if found is None:
                    continue
                recognised, refused = rates(found.pairs, found.others)
                for place in range(0, BINS + 1, round(_STEP * BINS / 2)):
                    values = (THRESHOLDS[place], recognised[place], refused[place], (recognised[place] + refused[place]) / 2)
                    lines.append([row.name, run.folder, name, *(f"{value:.6f}" for value in values)])
    head = ["encoders", "run", "split", "threshold", "pairs_recognised", "others_refused", "accuracy"]
    runs_table.write_csv(path, head, lines)


def draw(path: Path, rows: Sequence[Any], results: dict[str, Any]) -> None:
    """Draws two panels for each row: how the cosines of pairs and of non-pairs are distributed, all runs together; accuracy over the threshold."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.4 * len(rows)), layout="constrained")
    for (left, right), row in zip(figure.subplots(len(rows), 2, squeeze=False), rows, strict=True):
        _draw_cosines(left, row)
        _draw_accuracy(right, row, results)
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


def _draw_cosines(axis: Any, row: Any) -> None:
    kinds = (("pairs", "pairs", "C2"), ("other_slides", "other slides", "C0"), ("same_slide", "same slide, other place", "C1"))
    for name, label, colour in kinds:
        counts = sum(getattr(one, name) for one in row.tested)
        if not counts.sum():
            continue
        edges = np.linspace(-1, 1, _BARS + 1)
        values = np.add.reduceat(counts[:-1], np.arange(_BARS) * (BINS // _BARS)).astype(float)
        values[-1] += counts[-1]  # of exactly 1
        axis.stairs(values / values.sum(), edges, fill=True, alpha=0.45, color=colour, label=f"{label} ({counts.sum()})")
    axis.set(title=row.name, xlabel="cosine", ylabel="share", xlim=(-1, 1))
    axis.title.set_fontsize(9)
    axis.legend(fontsize=7)
    axis.grid(alpha=0.25)


def _draw_accuracy(axis: Any, row: Any, results: dict[str, Any]) -> None:
    found, published = results["probes"][row.name], results["published_threshold"]
    for parts, label, style in ((row.tested, "test", "-"), ([one for one in row.trained if one is not None], "training", "--")):
        if not parts:
            continue
        curves = np.stack([accuracy(one) for one in parts])
        axis.plot(THRESHOLDS, curves.mean(0), style, color="C2" if label == "test" else "0.5", linewidth=1.5, label=label)
        if len(curves) > 1 and label == "test":
            axis.fill_between(THRESHOLDS, curves.min(0), curves.max(0), color="C2", alpha=0.2, linewidth=0)
    top, at = found["accuracy_best"]["value"], found["threshold_best"]["value"]
    axis.plot([at], [top], "o", color="C3", markersize=5, label=f"best on test {top:.3f} at {at:.2f}")
    axis.axvline(published, color="k", linewidth=0.8, linestyle=":", label=f"{published} (published): {found['accuracy_published']['value']:.3f}")
    if "accuracy" in found:
        chosen = found["threshold"]["value"]
        axis.axvline(chosen, color="C4", linewidth=1, label=f"{chosen:.2f} (chosen on training): {found['accuracy']['value']:.3f}")
    axis.set(xlabel="threshold", ylabel="balanced accuracy", xlim=(-1, 1), ylim=(0.45, 1.01))
    axis.legend(fontsize=7)
    axis.grid(alpha=0.25)
