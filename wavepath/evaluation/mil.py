"""Slides scored by multiple-instance runs: out-of-fold predictions, one table, attention of every tile; and predictions for slides that are new.

Each slide is scored by the run that has not seen its case. Metrics are of the folds of a seed together, with bootstrap intervals over cases and the
deviation over seeds, and, where every fold has every class, as mean and deviation over folds beside them (METHODS 5.6). The former rank the scores of
different folds' models against one another; the latter are what most papers print.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from wavepath.console import progress, say, warn
from wavepath.data.bags import BagSource, feature_bags
from wavepath.errors import ConfigError, DatasetError
from wavepath.evaluation.crossvalidate import pool
from wavepath.evaluation.evaluate import check_positive, summarise, write_results
from wavepath.evaluation.mil_attention import AttentionExport, Exported
from wavepath.evaluation.mil_pictures import Drawing
from wavepath.evaluation.mil_runs import BagPredictor, BagRun, arms_of, check_folds, read_runs
from wavepath.evaluation.overlap import Overlap, nothing_left, overlap_results, pretraining_slides, split_overlap, testable, union
from wavepath.evaluation.probes import Predictions, score
from wavepath.files import writable_folder, write_json, write_text

CHECKPOINTS = {"best": "the checkpoint with the best validation loss", "last": "the last checkpoint"}


@dataclass
class _Arm:
    """What is known of one arm: `seeds` holds the folds' predictions of each seed, `rows` the lines of the table of predictions."""

    seeds: dict[int, list[Predictions]] = field(default_factory=dict)
    rows: list[list] = field(default_factory=list)
    exported: list[Exported] = field(default_factory=list)


def score_slides(
    runs: Iterable[Path], out: Path, *, data: Path | None = None, labels: Path | None = None, positive: str = "", partial: bool = False,
    keep_pretraining_slides: bool = False, names: Mapping[str, str] | None = None, drawing: Drawing | None = None, bootstraps: int = 1000,
    seed: int = 0,
) -> dict:  # fmt: skip
    """Scores runs of the task `mil` on the test slides of their folds.

    Args:
        runs: run folders, or folders of them.
        out: folder for `results.json`, `results.md`, `predictions.csv`, `attention/` and pictures.
        data, labels: where the features and labels of all runs are now, if not where they were trained from. Others are refused.
        positive: a class that is scored against the rest too.
        partial: score what is there where folds are missing or still training.
        keep_pretraining_slides: also test on slides that the encoder of the features was pretrained on.
        names: what to call folders of features in the table, by path.
        drawing: what is drawn; None: nothing but the confusion matrix.
        bootstraps, seed: of the intervals over cases.

    Returns:
        The content of results.json, as of `evaluation.evaluate`, an entry for each arm; `per_fold` has mean and deviation over folds.

    Raises:
        ConfigError: runs of another task, a fold twice, folds that share cases, folds that are missing or not finished (without `partial`).
        CheckpointError: no whole checkpoint. DatasetError: features or labels that have moved or changed, arms of different classes, an unknown
            positive class, or no slide that the encoder was not pretrained on.
    """
    out = writable_folder(out)
    arms = arms_of(read_runs(runs, data, labels), names)
    everyone = [run for members in arms.values() for run in members]
    classes = _classes(everyone)
    check_positive(positive, classes)
    predictor = BagPredictor()
    for arm, members in arms.items():
        check_folds(arm, members, predictor.source(members[0]), partial)
    places = {run.folder: predictor.test(run) for run in everyone}
    tested, overlaps = _tested(arms, places, predictor, keep_pretraining_slides, partial)
    export = AttentionExport(out, len(arms) > 1)
    found: dict[str, _Arm] = {}
    with progress("test slides", sum(map(len, places.values())), "slides") as bar:
        for arm, members in arms.items():
            found[arm] = _predict_arm(arm, members, places, tested, predictor, export, bar)
    results: dict = {
        "kind": "arm", "scored": scored_by(everyone), "runs": [str(run.folder) for run in everyone], "seed": seed, "positive": positive,
        "seeds": max(len(one.seeds) for one in found.values()), "checkpoint": sorted({run.checkpoint for run in everyone}),
        "split": sorted({run.constants["split"]["name"] for run in everyone}),
        **overlap_results(overlaps), "probes": {},
    }  # fmt: skip
    for arm, one in found.items():
        pooled = [pool(parts) for parts in one.seeds.values()]
        results["probes"][arm] = {
            "folds": max(map(len, one.seeds.values())), "seeds": len(pooled), "per_fold": by_fold(arm, list(one.seeds.values()), positive),
            **summarise(pooled, positive, bootstraps=bootstraps, seed=seed),
        }  # fmt: skip
    return _finish(out, results, found, classes, drawing, {arm: predictor.source(members[0]) for arm, members in arms.items()})


def _tested(
    arms: Mapping[str, Sequence[BagRun]], places: Mapping[Path, np.ndarray], predictor: BagPredictor, keep: bool, partial: bool
) -> tuple[set[str], dict[str, Overlap]]:
    """The slides that are scored, the same ones for all arms: none that one of their encoders was pretrained on.

    Raises:
        DatasetError: arms with tests of other slides.
    """
    slides = {}
    for arm, members in arms.items():
        slides[arm] = {predictor.source(run).slides[place] for run in members for place in places[run.folder].tolist()}
    first = next(iter(arms))
    for arm, these in slides.items():
        if other := sorted(these ^ slides[first]):
            told = f"{arm!r} and {first!r} have tests of other slides ({len(other)} differ, such as {other[0]!r})"
            if not partial:
                raise DatasetError(f"{told}, so that their scores cannot be compared; embed and label the same slides, or score them apart")
            warn(f"{told}: their scores are not of the same slides")
    tested, overlaps = set.union(*slides.values()), {}
    for arm, members in arms.items():
        # Encoders may differ from seed to seed, or fold to fold. One counts for the slides that are tested with it (of another fold it has rightly
        # seen them); a slide that one of those was pretrained on is left out for all.
        with_it: dict[str, set[str]] = {}
        for run in members:
            with_it.setdefault(run.features, set()).update(predictor.source(run).slides[place] for place in places[run.folder].tolist())
        each = []
        for folder, these in sorted(with_it.items()):
            overlap = split_overlap(sorted(slides[arm]), pretraining_slides(Path(folder)))[1]
            seen = tuple(name for name in overlap.names if name in these)
            each.append(replace(overlap, count=len(seen), names=seen, kept=keep))
        overlaps[arm] = union(each)
        seen = {name for overlap in each for name in overlap.names}
        if not keep and seen >= slides[arm]:
            raise DatasetError(nothing_left(overlaps[arm]))
        tested -= set() if keep else seen
    if not all(these & tested for these in slides.values()):
        raise DatasetError("each test slide was pretrained on by an encoder of one of the arms; score them apart, or with --keep-pretraining-slides")
    return tested, overlaps


def _predict_arm(
    arm: str, members: Sequence[BagRun], places: Mapping[Path, np.ndarray], tested: set[str], predictor: BagPredictor, export: AttentionExport, bar
) -> _Arm:
    """Predicts the test slides of each fold that are among `tested`; attention is that of the first seed."""
    one = _Arm()
    first = min(run.seed for run in members)
    written: set[int] = set()
    for run in sorted(members, key=lambda run: (run.seed, run.fold)):
        source = predictor.source(run)
        wanted = np.array([place for place in places[run.folder].tolist() if source.slides[place] in tested], np.int64)
        bar.advance(len(places[run.folder]) - len(wanted))
        if not len(wanted):
            warn(f"the encoder was pretrained on all test slides of {run.folder}: this fold is not scored")
            continue
        # Tables of splits may test a slide in several folds; its attention is that of the first.
        fresh = set(wanted.tolist()) - written if run.seed == first else set()
        written |= fresh
        each = export.of(run, source, arm, fresh, one.exported) if fresh else None
        scores = predictor.predict(run, source, wanted, each, bar)
        part = Predictions(run.classes, source.labels[wanted].astype(np.int64), scores, source.cases[wanted], np.full(len(wanted), run.fold))
        one.seeds.setdefault(run.seed, []).append(part)
        for row, place in enumerate(wanted.tolist()):
            label, values = run.classes[part.truth[row]], (f"{value:.6f}" for value in scores[row])
            line = [arm, run.seed, run.fold, source.slides[place], part.groups[row], label, run.classes[scores[row].argmax()], *values, run.folder]
            one.rows.append(line)
    return one


def by_fold(arm: str, seeds: Sequence[Sequence[Predictions]], positive: str = "") -> dict:
    """Mean over folds (and seeds), and deviation over folds of the means over seeds, of every metric.

    Returns:
        metric -> `value`, `sd`, `folds` and the folds' `values`; or, where a fold has not every class and its AUC is none, `lacking`: its number and
        the classes. Empty for one fold.
    """
    folds = sorted({int(part.fold[0]) for parts in seeds for part in parts})
    if len(folds) < 2:
        return {}
    lacking: dict[str, list[str]] = {}
    for parts in seeds:
        for part in parts:
            if absent := [name for index, name in enumerate(part.classes) if index not in part.truth]:
                lacking[str(int(part.fold[0]))] = absent
    if lacking:
        fold, absent = next(iter(lacking.items()))
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        say(f"{arm}: no slide of {', '.join(absent)} is tested in fold {fold}{more}, so its AUC is undefined; metrics are of all folds together")
        return {"lacking": lacking}
    index = seeds[0][0].classes.index(positive) if positive else None
    values = [{int(part.fold[0]): score(part.truth, part.scores, index) for part in parts} for parts in seeds]
    found = {}
    for name in next(iter(values[0].values())):  # with --partial a seed may lack folds
        each = np.array([np.mean([of_fold[fold][name] for of_fold in values if fold in of_fold]) for fold in folds])
        found[name] = {
            "value": round(float(each.mean()), 6), "sd": round(float(each.std(ddof=1)), 6), "folds": len(folds),
            "values": [round(float(value), 6) for value in each],
        }  # fmt: skip
    return found


def _finish(
    out: Path, results: dict, found: Mapping[str, _Arm], classes: Sequence[str], drawing: Drawing | None, sources: Mapping[str, BagSource]
) -> dict:
    """Counts, tables and pictures."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["arm", "seed", "fold", "slide", "case", "label", "predicted", *(f"p_{name}" for name in classes), "run"])
    slides: dict[str, tuple[str, str]] = {}
    for one in found.values():
        table.writerows(one.rows)
        slides |= {row[3]: (str(row[4]), row[5]) for row in one.rows}
    counts = {name: sum(label == name for _, label in slides.values()) for name in classes}
    results |= {"slides": len(slides), "groups": len({case for case, _ in slides.values()}), "classes": counts}
    write_text(out / "predictions.csv", text.getvalue())
    if drawing:
        curves = {arm: [pool(parts) for parts in one.seeds.values()] for arm, one in found.items()}
        exported = {arm: one.exported for arm, one in found.items()}
        results["pictures"] = drawing.all(out, results, curves, exported, sources)
    write_results(out, results)
    return results


def scored_by(runs: Sequence[BagRun]) -> str:
    """What the scores are of, for the head of a table."""
    kept = ", ".join(CHECKPOINTS[name] for name in sorted({run.checkpoint for run in runs}))
    return f"bags of tile features, pool {'/'.join(sorted({run.config.mil.pool for run in runs}))}, {kept} of each run"


def _classes(runs: Sequence[BagRun]) -> tuple[str, ...]:
    classes = {run.classes for run in runs}
    if len(classes) > 1:
        raise DatasetError(f"the runs know different classes ({' and '.join(', '.join(names) for names in sorted(classes))}); score them apart")
    return classes.pop()


# Slides that are new ----------------------------------------------------------------------------------------------------------------------------


def predict_slides(
    runs: Iterable[Path], bags: Path, out: Path, *, labels: Path | None = None, positive: str = "", keep_pretraining_slides: bool = False,
    drawing: Drawing | None = None, bootstraps: int = 1000, seed: int = 0,
) -> dict:  # fmt: skip
    """What runs make of slides that they were not trained on: the mean of their probabilities and of their attention for each slide.

    Args:
        runs: of one arm; several folds or seeds are an ensemble.
        bags: folder of feature files, by the encoder that the runs were trained with.
        labels: table of their labels; then they are scored as well: each run alone (mean, deviation and interval of the mean, row `runs`) and the
            ensemble. Slides without a row are left out.
        keep_pretraining_slides, positive, drawing, bootstraps, seed, out: see `score_slides`.

    Returns:
        The content of results.json; without labels `table` and `about` in place of metrics.

    Raises:
        ConfigError: several arms. DatasetError: other features; a slide that a run was trained on; labels that the runs do not know.
    """
    out = writable_folder(out)
    arms = arms_of(read_runs(runs))
    if len(arms) > 1:
        raise ConfigError(f"--bags takes runs of one kind, not {len(arms)} ({'; '.join(arms)}); give those of one")
    ((arm, members),) = arms.items()
    classes = _classes(members)
    check_positive(positive, classes)
    source = feature_bags(bags, labels=labels, pool=members[0].config.mil.pool)
    if unknown := sorted(set(source.classes) - set(classes)):
        raise DatasetError(f"{labels} has the class {unknown[0]!r}, which the runs do not know ({', '.join(classes)}); leave its slides out")
    _refuse_trained(members, source, labels)
    places, overlap = np.arange(len(source)), None
    if labels:
        mask, overlap = testable(source.slides, pretraining_slides(bags), keep_pretraining_slides)
        places = np.flatnonzero(mask)
    attention: dict[int, np.ndarray] = {}
    scores = []

    def add(place: int, _: np.ndarray, values: np.ndarray) -> None:
        attention[place] = attention.get(place, 0) + values / len(members)

    predictor = BagPredictor()
    with progress("slides", len(places) * len(members), "slides") as bar:
        for run in members:
            scores.append(predictor.predict(run, source, places, add, bar))
        mean = np.mean(scores, axis=0)
        export, exported = AttentionExport(out, False), []
        each = export.of(members[0], source, arm, set(places.tolist()), exported, ensemble=len(members))
        for row, place in enumerate(places.tolist()):
            each(place, mean[row].astype(np.float32), attention.pop(place))
    one = _Arm(exported=exported)
    # Classes of the table may be fewer than the runs know: places among the latter.
    known = np.array([classes.index(name) for name in source.classes], np.int64)
    for row, place in enumerate(places.tolist()):
        label = source.classes[source.labels[place]] if labels else ""
        values = (f"{value:.6f}" for value in mean[row])
        run = members[0].folder if len(members) == 1 else f"mean of {len(members)}"
        one.rows.append([arm, "", "", source.slides[place], source.cases[place], label, classes[mean[row].argmax()], *values, run])
    results: dict = {"kind": "arm", "scored": scored_by(members), "runs": [str(run.folder) for run in members], "seed": seed, "positive": positive}
    if not labels:
        return _finish_unlabelled(out, results, one, classes, drawing, source)
    truth = known[source.labels[places]]
    parts = [Predictions(classes, truth, scored, source.cases[places], np.zeros(len(places), np.int64)) for scored in [mean, *scores]]
    results |= {"seeds": 1, **overlap_results({arm: overlap}), "probes": {}}
    title = f"{arm}, mean of {len(members)} runs" if len(members) > 1 else arm
    for name, these in ((title, parts[:1]), (f"{arm}, each run", parts[1:]))[: len(members)]:
        results["probes"][name] = {"folds": 0, "seeds": len(these), **summarise(these, positive, bootstraps=bootstraps, seed=seed)}
    one.seeds = {0: parts[:1]}
    return _finish(out, results, {arm: one}, classes, drawing, {arm: source})


def _refuse_trained(runs: Sequence[BagRun], source: BagSource, labels: Path | None) -> None:
    for run in runs:
        seen = {*run.constants["split"]["train"], *run.constants["split"]["validation"]}
        if again := sorted(seen & set(source.slides)):
            told = f"{run.folder} was trained on {len(again)} of the {len(source)} slides of {source.name} (such as {again[0]!r})"
            if labels:
                raise DatasetError(f"{told}, which are no test of it; leave their rows out of {labels}, or score its own test with --mil alone")
            warn(f"{told}: what it says of them is no prediction")
    if labels:
        # Names of cases may be those of other patients elsewhere, so this is for the user to judge.
        known = {case for run in runs for case in run.constants.get("cases", ())} & set(source.cases.tolist())
        if known:
            told = f"{len(known)} cases of {labels} (such as {min(known)!r}) are called as cases that the runs were trained on"
            warn(f"{told}; leave their rows out if they are the same patients")


def _finish_unlabelled(out: Path, results: dict, one: _Arm, classes: Sequence[str], drawing: Drawing | None, source: BagSource) -> dict:
    head = ["slide", "predicted", *(f"p {name}" for name in classes)]
    rows = [[row[3], row[6], *(f"{float(value):.3f}" for value in row[7:-1])] for row in one.rows]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["slide", "predicted", *(f"p_{name}" for name in classes), "run"])
    table.writerows([row[3], *row[6:]] for row in one.rows)
    write_text(out / "predictions.csv", text.getvalue())
    counts = {name: sum(row[6] == name for row in one.rows) for name in classes}
    listed = ", ".join(f"{name} {count}" for name, count in counts.items())
    results |= {
        "slides": len(rows), "predicted": counts, "table": [head, rows],
        "about": f"{len(rows)} slides without labels; {results['scored']}, mean of {len(results['runs'])} runs; predicted: {listed}",
    }  # fmt: skip
    if drawing:
        results["pictures"] = drawing.all(out, results, {}, {"": one.exported}, {"": source})
    write_json(out / "results.json", results)
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    write_text(out / "results.md", f"{results['about']}\n\n" + "\n".join([lines[0], "|" + " --- |" * len(head), *lines[1:]]) + "\n")
    return results
