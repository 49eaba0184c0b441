"""`wavepath evaluate`: frozen features and labels in, one results file, one table and one picture out."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from wavepath.console import progress, table
from wavepath.errors import DatasetError
from wavepath.evaluation.labels import label_tiles
from wavepath.evaluation.probes import BINARY, METRICS, PROBES, Predictions, bootstrap, confusion, cross_validate, score
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
    positive: str = "",
) -> dict:
    """Scores frozen features by probes with case-wise cross-validation.

    Args:
        features: folder of feature files (`wavepath embed`, TRIDENT or CLAM).
        labels: labels.csv per slide or per tile, or a folder of GeoJSON regions (`evaluation.labels`); None with `label_pattern`.
        label_pattern, case_pattern: regular expressions that read label and case from the tiles' names.
        out: folder for `results.json`, `results.md`, `predictions_<probe>.csv`, `confusion.png`.
        pool: `cls` (class token) or `mean` (mean of patches).
        max_per_class: > 0 draws at most so many tiles of each class, seeded.
        positive: a class that is scored against the rest too.

    Returns:
        The content of results.json: per probe the metrics with their 95 % intervals.

    Raises:
        DatasetError: no labelled tile, one class only, an unknown positive class, or features that differ in width or in the checkpoint they
            come from.
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
    check_positive(positive, classes)
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
        "positive": positive,
        "probes": {},
    }
    with progress("probes", len(probes), "probes") as bar:
        for probe in probes:
            if probe not in PROBES:
                raise DatasetError(f"--probe {probe} is not one of {', '.join(PROBES)}")
            predictions = cross_validate(probe, data.features, data.labels, data.groups, folds=folds, seed=seed, k=k)
            results["probes"][probe] = {
                "folds": int(predictions.fold.max()) + 1, **summarise([predictions], positive, bootstraps=bootstraps, seed=seed)
            }
            _write_predictions(out / f"predictions_{probe}.csv", predictions)
            bar.advance(1, probe)
    write_results(out, results)
    return results


def check_positive(positive: str, classes: Iterable[str]) -> None:
    """Refuses a positive class that there is not."""
    names = [str(name) for name in classes]
    if positive and positive not in names:
        raise DatasetError(f"--positive {positive} is not one of the classes {', '.join(names)}")


def summarise(many: Sequence[Predictions], positive: str = "", *, bootstraps: int = 1000, seed: int = 0) -> dict:
    """Confusion counts, and each metric as `value` with the 95 % interval `low` to `high` over groups.

    Args:
        many: out-of-fold predictions, of one run or of several seeds. Of several, counts are summed, `value` is the mean over the seeds, `sd`
            their standard deviation, and the interval is that of the mean: it speaks of other cases, `sd` of other seeds.
        positive: see `evaluate`.
    """
    index = many[0].classes.index(positive) if positive else None
    intervals = bootstrap(many, samples=bootstraps, seed=seed, positive=index)
    values = [score(one.truth, one.scores, index) for one in many]
    entry: dict = {"confusion": sum(confusion(one) for one in many).tolist()}
    for name in values[0]:
        each = np.array([value[name] for value in values])
        low, high = intervals[name]
        entry[name] = {"value": _number(each.mean()), "low": _number(low), "high": _number(high)}
        if len(many) > 1:
            entry[name]["sd"] = _number(each.std(ddof=1))
    return entry


def metric_names(results: dict) -> tuple[str, ...]:
    """The metrics that the results hold."""
    return tuple(name for name in (*METRICS, *BINARY) if all(name in entry for entry in results["probes"].values()))


def scored_by(results: dict) -> str:
    """What the scores are of: `pool cls` of frozen features, fine-tuned networks, or what the results say themselves."""
    if "scored" in results:
        return results["scored"]
    return "fine-tuned networks" if results.get("kind") == "arm" else f"pool {results['pool']}"


def write_results(out: Path, results: dict) -> None:
    """Writes `results.json`, `results.md` and `confusion.png`."""
    write_json(out / "results.json", results)
    write_text(out / "results.md", markdown(results))
    _draw_confusion(out / "confusion.png", results)


def _number(value: float) -> float | None:
    # JSON knows no nan: an undefined metric is null.
    return round(float(value), 6) if np.isfinite(value) else None


def _thin(data, most: int, seed: int):
    rng = np.random.default_rng(seed)
    keep = np.sort(np.concatenate([rng.permutation(np.flatnonzero(data.labels == name))[:most] for name in np.unique(data.labels)]))
    return type(data)(data.features[keep], data.labels[keep], data.groups[keep], data.unlabelled, data.kind)


def cell(entry: dict) -> str:
    """`0.812 [0.77, 0.85]`, over seeds `0.812 ± 0.010 [0.77, 0.85]`, or `undefined` for a metric that the labels do not define."""
    if entry["value"] is None:
        return "undefined"
    value = f"{entry['value']:.3f}" + (f" ± {entry['sd']:.3f}" if entry.get("sd") is not None else "")
    return value if entry["low"] is None else f"{value} [{entry['low']:.2f}, {entry['high']:.2f}]"


def _rows(results: dict) -> tuple[list[str], list[list[str]]]:
    names = metric_names(results)
    head = [results.get("kind", "probe"), *names]
    return head, [[name, *(cell(entry[metric]) for metric in names)] for name, entry in results["probes"].items()]


def text_table(results: dict) -> str:
    """The probes (or arms) and their metrics with 95 % intervals, as plain text."""
    return table(*_rows(results))


def markdown(results: dict) -> str:
    """The same as a Markdown table, headed by what was scored."""
    head, rows = _rows(results)
    facts = [f"{results['tiles']} tiles", f"{len(results['classes'])} classes", f"{results['groups']} groups", scored_by(results)]
    if results.get("positive"):
        facts.append(f"positive class {results['positive']}")
    about = ", ".join(facts) + "; 95 % bootstrap intervals over groups"
    if "seeds" in results:
        about += f"; mean ± standard deviation over {results['seeds']} seeds" if results["seeds"] > 1 else "; one seed"
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    return about + "\n\n" + "\n".join([lines[0], "|" + " --- |" * len(head), *lines[1:]]) + "\n"


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
