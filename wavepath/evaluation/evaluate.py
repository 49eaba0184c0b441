"""`wavepath evaluate`: frozen features and labels in, one results file, one table and one picture out."""

import csv
import io
from pathlib import Path

import numpy as np

from wavepath.console import progress, table
from wavepath.errors import DatasetError
from wavepath.evaluation.labels import label_tiles
from wavepath.evaluation.probes import METRICS, PROBES, bootstrap, confusion, cross_validate, score
from wavepath.files import atomic_path, writable_folder, write_json, write_text
from wavepath.interop.features import Features, list_features, read_features

POOLS = {"cls": "features", "mean": "features_mean"}


def evaluate(
    features: Path,
    labels: Path | None,
    out: Path,
    *,
    label_pattern: str = "",
    case_pattern: str = "",
    probes: tuple[str, ...] = ("knn", "logistic"),
    pool: str = "cls",
    folds: int = 5,
    k: int = 20,
    seed: int = 0,
    bootstraps: int = 1000,
    max_per_class: int = 0,
) -> dict:
    """Scores frozen features by probes with case-wise cross-validation.

    Args:
        features: folder of feature files (`wavepath embed`, TRIDENT or CLAM).
        labels: labels.csv per slide or per tile, or a folder of GeoJSON regions (`evaluation.labels`); None with `label_pattern`.
        label_pattern, case_pattern: regular expressions that read label and case from the tiles' names.
        out: folder for `results.json`, `results.md`, `predictions_<probe>.csv`, `confusion.png`.
        pool: `cls` (class token) or `mean` (mean of patches).
        max_per_class: > 0 draws at most so many tiles of each class, seeded.

    Returns:
        The content of results.json: per probe the metrics with their 95 % intervals.

    Raises:
        DatasetError: no labelled tile, one class only, or features that differ in width or in the checkpoint they come from.
    """
    out = writable_folder(out)
    if pool not in POOLS:
        raise DatasetError(f"--pool {pool} is not one of {', '.join(POOLS)}")
    slides: list[Features] = [read_features(path, name) for name, path in list_features(features)]
    widths = {slide.features.shape[1] for slide in slides if len(slide)}
    if len(widths) > 1:
        raise DatasetError(f"features under {features} have the widths {sorted(widths)}; embed all slides with one checkpoint")
    trained = {str(slide.attributes["parameters"]) for slide in slides if "parameters" in slide.attributes}
    if len(trained) > 1:
        raise DatasetError(f"features under {features} come from {len(trained)} checkpoints; embed all slides with one, into a folder of their own")
    data = label_tiles([slide for slide in slides if len(slide)], labels, POOLS[pool], label_pattern=label_pattern, case_pattern=case_pattern)
    if max_per_class:
        data = _thin(data, max_per_class, seed)
    classes, counts = np.unique(data.labels, return_counts=True)
    results: dict = {
        "features": str(features),
        "labels": str(labels or label_pattern),
        "label_kind": data.kind,
        "pool": pool,
        "folds": folds,
        "seed": seed,
        "tiles": len(data.labels),
        "tiles_without_label": data.unlabelled,
        "groups": len(np.unique(data.groups)),
        "classes": {str(name): int(count) for name, count in zip(classes, counts, strict=True)},
        "probes": {},
    }
    with progress("probes", len(probes), "probes") as bar:
        for probe in probes:
            if probe not in PROBES:
                raise DatasetError(f"--probe {probe} is not one of {', '.join(PROBES)}")
            predictions = cross_validate(probe, data.features, data.labels, data.groups, folds=folds, seed=seed, k=k)
            intervals = bootstrap(predictions, samples=bootstraps, seed=seed)
            values = score(predictions.truth, predictions.scores)
            results["probes"][probe] = {
                "folds": int(predictions.fold.max()) + 1,
                "confusion": confusion(predictions).tolist(),
                **{
                    name: {"value": _number(values[name]), "low": _number(intervals[name][0]), "high": _number(intervals[name][1])}
                    for name in METRICS
                },
            }
            _write_predictions(out / f"predictions_{probe}.csv", predictions)
            bar.advance(1, probe)
    write_json(out / "results.json", results)
    write_text(out / "results.md", markdown(results))
    _draw_confusion(out / "confusion.png", results)
    return results


def _number(value: float) -> float | None:
    # JSON knows no nan: an undefined metric is null.
    return round(float(value), 6) if np.isfinite(value) else None


def _thin(data, most: int, seed: int):
    rng = np.random.default_rng(seed)
    keep = np.sort(np.concatenate([rng.permutation(np.flatnonzero(data.labels == name))[:most] for name in np.unique(data.labels)]))
    return type(data)(data.features[keep], data.labels[keep], data.groups[keep], data.unlabelled, data.kind)


def cell(entry: dict) -> str:
    """`0.812 [0.77, 0.85]`, or `undefined` for a metric that the labels do not define."""
    if entry["value"] is None:
        return "undefined"
    if entry["low"] is None:
        return f"{entry['value']:.3f}"
    return f"{entry['value']:.3f} [{entry['low']:.2f}, {entry['high']:.2f}]"


def text_table(results: dict) -> str:
    """The probes and their metrics with 95 % intervals, as plain text."""
    return table(["probe", *METRICS], [[probe, *(cell(entry[name]) for name in METRICS)] for probe, entry in results["probes"].items()])


def markdown(results: dict) -> str:
    """The same as a Markdown table, headed by what was scored."""
    head = (
        f"{results['tiles']} tiles, {len(results['classes'])} classes, {results['groups']} groups, pool {results['pool']}; "
        "95 % bootstrap intervals over groups\n\n"
    )
    lines = ["| probe | " + " | ".join(METRICS) + " |", "|" + " --- |" * (1 + len(METRICS))]
    lines += ["| " + " | ".join([probe, *(cell(entry[name]) for name in METRICS)]) + " |" for probe, entry in results["probes"].items()]
    return head + "\n".join(lines) + "\n"


def _write_predictions(path: Path, predictions) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["group", "label", "predicted", "fold", *(f"p_{name}" for name in predictions.classes)])
    best = predictions.scores.argmax(1)
    for row in range(len(predictions.truth)):
        names = predictions.classes[predictions.truth[row]], predictions.classes[best[row]]
        table.writerow([predictions.groups[row], *names, predictions.fold[row], *(f"{p:.6f}" for p in predictions.scores[row])])
    write_text(path, text.getvalue())


def _draw_confusion(path: Path, results: dict) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(results["classes"])
    side = max(2.6, 0.55 * len(names) + 1.6)
    figure = Figure(figsize=(side * len(results["probes"]), side), layout="constrained")
    for axis, (probe, entry) in zip(np.atleast_1d(figure.subplots(1, len(results["probes"]))), results["probes"].items(), strict=True):
        counts = np.array(entry["confusion"], float)
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axis.set(title=probe, xlabel="predicted", ylabel="truth", xticks=range(len(names)), yticks=range(len(names)))
        axis.set_xticklabels(names, rotation=45, ha="right")
        axis.set_yticklabels(names)
        for row in range(len(names)):
            for column in range(len(names)):
                axis.text(
                    column,
                    row,
                    f"{counts[row, column]:.0f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if share[row, column] > 0.55 else "black",
                )
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))
