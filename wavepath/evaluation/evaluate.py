"""What every evaluation of classes reports: metrics with intervals, one results file, one table, the confusion matrix."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from wavepath.console import table
from wavepath.errors import DatasetError
from wavepath.evaluation.confusion import draw_confusion
from wavepath.evaluation.probes import BINARY, METRICS, Predictions, bootstrap, confusion, score
from wavepath.files import write_json, write_text

FEW_CASES = 5  # of a class


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


def few_cases(labels: np.ndarray, groups: np.ndarray) -> list[str]:
    """A note for the table's head where the test holds fewer than `FEW_CASES` cases of a class: few resamples differ, and intervals look narrow.

    Args:
        labels: class of each tile of the test, str [n]. groups: its case, str [n].
    """
    cases = {str(name): len(np.unique(groups[labels == name])) for name in np.unique(labels)}
    name = min(cases, key=cases.__getitem__)
    if cases[name] >= FEW_CASES:
        return []
    return [f"only {cases[name]} case{'s' * (cases[name] > 1)} of {name!r} in the test: intervals over so few say little"]


def metric_names(results: dict) -> tuple[str, ...]:
    """The metrics that the results hold."""
    return tuple(name for name in (*METRICS, *BINARY) if all(name in entry for entry in results["probes"].values()))


def counted(results: dict) -> str:
    """`130 tiles`, or `40 slides` of an evaluation of slides."""
    return f"{results['slides']} slides" if "slides" in results else f"{results['tiles']} tiles"


def scored_by(results: dict) -> str:
    """What the scores are of: `pool cls` of frozen features, fine-tuned networks, or what the results say themselves."""
    if "scored" in results:
        return results["scored"]
    return "fine-tuned networks" if results.get("kind") == "arm" else f"pool {results['pool']}"


def write_results(out: Path, results: dict) -> None:
    """Writes `results.json`, `results.md` and `confusion.png`, which joins the `pictures` that the results list."""
    results.setdefault("rows", list(results["probes"]))  # their order, which JSON's sorted keys do not keep
    pictures = results.setdefault("pictures", [])
    draw_confusion(out / "confusion.png", list(results["classes"]), {name: entry["confusion"] for name, entry in results["probes"].items()})
    if not any(picture["file"] == "confusion.png" for picture in pictures):
        pictures.append({"file": "confusion.png", "title": "Confusion: rows the truth, columns the prediction", "kind": "confusion"})
    write_json(out / "results.json", results)
    write_text(out / "results.md", markdown(results))


def _number(value: float) -> float | None:
    # JSON knows no nan: an undefined metric is null.
    return round(float(value), 6) if np.isfinite(value) else None


def cell(entry: dict) -> str:
    """`0.812 [0.77, 0.85]`, over seeds `0.812 ± 0.010 [0.77, 0.85]`, or `undefined` for a metric that the labels do not define."""
    if entry["value"] is None:
        return "undefined"
    value = f"{entry['value']:.3f}" + (f" ± {entry['sd']:.3f}" if entry.get("sd") is not None else "")
    return value if entry["low"] is None else f"{value} [{entry['low']:.2f}, {entry['high']:.2f}]"


def table_rows(results: dict) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: a metric in a column, and of slides AUC and accuracy by fold where folds define them."""
    names = metric_names(results)
    by_fold = [name for name in ("auc", "accuracy") if any(name in entry.get("per_fold", ()) for entry in results["probes"].values())]
    rows = []
    for title in results.get("rows", results["probes"]):
        entry = results["probes"][title]
        folds = [entry.get("per_fold", {}).get(name) for name in by_fold]
        rows.append([title, *(cell(entry[name]) for name in names), *(f"{one['value']:.3f} ± {one['sd']:.3f}" if one else "" for one in folds)])
    return [results.get("kind", "probe"), *names, *(f"{name} by fold" for name in by_fold)], rows


def text_table(results: dict) -> str:
    """The probes (or arms) and their metrics with 95 % intervals, as plain text."""
    return table(*table_rows(results))


def markdown(results: dict) -> str:
    """The same as a Markdown table, headed by what was scored."""
    head, rows = table_rows(results)
    facts = [counted(results), f"{len(results['classes'])} classes", f"{results['groups']} groups", scored_by(results)]
    if results.get("positive"):
        facts.append(f"positive class {results['positive']}")
    about = ", ".join(facts) + "; 95 % bootstrap intervals over groups"
    if "seeds" in results:
        about += f"; mean ± standard deviation over {results['seeds']} seeds" if results["seeds"] > 1 else "; one seed"
    about += "; by fold: mean ± standard deviation over folds" * head[-1].endswith("by fold")
    about += "".join(f"; {note}" for note in results.get("notes", ()))
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    return about + "\n\n" + "\n".join([lines[0], "|" + " --- |" * len(head), *lines[1:]]) + "\n"
