"""`wavepath evaluate` for tiles: frozen features and labels in, beside fine-tuned runs, one results file, one table and the pictures out."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from wavepath.console import progress, warn
from wavepath.errors import DatasetError
from wavepath.evaluation.crossvalidate import Scored, arm_entries, write_arms
from wavepath.evaluation.encoded import aligned, file_name, read_encoder
from wavepath.evaluation.evaluate import check_positive, few_cases, scored_by, summarise, write_results
from wavepath.evaluation.labels import Labelled
from wavepath.evaluation.overlap import overlap_results, pretraining_slides, testable
from wavepath.evaluation.probes import Predictions, ProbeSettings, cross_validate
from wavepath.evaluation.tile_pictures import draw_maps, draw_rows
from wavepath.files import writable_folder, write_text


def evaluate(
    features: Path | Mapping[str, Path],
    labels: Path | None,
    out: Path,
    *,
    label_pattern: str = "",
    case_pattern: str = "",
    probes: Sequence[str] = ("knn", "simpleshot", "logistic"),
    pool: str = "cls",
    folds: int = 5,
    settings: ProbeSettings | None = None,
    seed: int = 0,
    bootstraps: int = 1000,
    max_per_class: int = 0,
    min_cases: int = 1,
    positive: str = "",
    skip_missing: bool = False,
    keep_pretraining: bool = False,
    runs: Scored | None = None,
    map_method: str = "pca",
) -> dict:
    """Scores frozen features by probes with case-wise cross-validation; several encoders, and fine-tuning runs, on the same tiles in one table.

    Args:
        features: folder of feature files (`wavepath embed`, TRIDENT or CLAM), or several by the encoders' names, of the same tiles.
        labels: labels.csv per slide or per tile, or a folder of GeoJSON regions (`evaluation.labels`); None with `label_pattern`.
        label_pattern, case_pattern: regular expressions that read label and case from the tiles' names.
        out: folder for `results.json`, `results.md`, `predictions_<row>.csv` and pictures.
        pool: `cls` (class token) or `mean` (mean of patches).
        settings: of the probes.
        max_per_class: > 0 draws at most so many tiles of each class, seeded.
        min_cases: classes of fewer cases are left out, with a warning. A class of one case cannot be both learnt and tested.
        positive: a class that is scored against the rest too.
        skip_missing: see `label_tiles`.
        keep_pretraining: test on slides too that an encoder was pretrained on. They are left out of the test of all encoders otherwise, so that all
            are scored on the same tiles; probes are trained on them all the same.
        runs: of `crossvalidate.score_runs`, on the same tiles and labels.
        map_method: of the picture of the features, see `feature_map`.

    Returns:
        The content of results.json: per row of the table the metrics with their 95 % intervals.

    Raises:
        DatasetError: no labelled tile, one class only, a class of one case, an unknown positive class, features that differ in width or in the
            checkpoint they come from or that are not finite, encoders or runs on other tiles, or no slide left to test on.
    """
    out = writable_folder(out)
    folders = dict(features) if isinstance(features, Mapping) else {Path(features).resolve().name: Path(features)}
    given = dict(label_pattern=label_pattern, case_pattern=case_pattern, skip_missing=skip_missing)
    encoders = aligned({name: read_encoder(folder, labels, pool, **given) for name, folder in folders.items()})
    data = next(iter(encoders.values()))
    keep = _kept(data, max_per_class, min_cases, seed)
    encoders = {name: one.rows(keep) for name, one in encoders.items()}
    data = next(iter(encoders.values()))
    classes = np.unique(data.labels)
    check_positive(positive, classes)
    _check_cases(data)
    overlaps, tested = {}, np.ones(len(data.labels), bool)
    for name, folder in folders.items():
        mask, overlaps[name] = testable(data.slides, pretraining_slides(folder), keep_pretraining)
        tested &= mask
    if runs is not None:
        _check_runs(runs, data)
        overlaps |= runs.overlaps
        tested &= np.isin(data.tiles, np.concatenate([one.tiles for many in runs.arms.values() for one in many]))
    if not tested.any():
        raise DatasetError("each slide was pretrained on by one of the encoders; score them apart, or with --keep-pretraining-slides")
    rows: dict[str, list[Predictions]] = {}
    entries: dict[str, dict] = {}
    # An unknown number of folds is counted as it was asked for: the bar is there for the slow ones.
    with progress("probes", len(probes) * len(encoders) * folds, "folds") as bar:
        for name, one in encoders.items():
            for probe in probes:
                title = f"{name}, {probe}" if len(encoders) > 1 else probe
                many = cross_validate(
                    probe, one.features, one.labels, one.groups, folds=folds, seed=seed, testable=tested, settings=settings,
                    advance=lambda title=title: bar.advance(1, title),
                )
                rows[title] = [replace(each, tiles=one.tiles[tested], slides=one.slides[tested]) for each in many]
                entries[title] = {
                    "encoder": name, "probe": probe, "width": one.features.shape[1],
                    "folds": len(np.unique(many[0].fold)), **({"runs": len(many)} if len(many) > 1 else {}),
                    **summarise(many, positive, bootstraps=bootstraps, seed=seed),
                }
                _write_predictions(out / f"predictions_{file_name(title)}.csv", rows[title])
    counts = np.bincount(np.searchsorted(classes, data.labels[tested]), minlength=len(classes))
    results: dict = {
        **({"kind": "encoder, probe"} if len(encoders) > 1 else {}),
        "features": {name: str(folder) for name, folder in folders.items()} if isinstance(features, Mapping) else str(features),
        "labels": str(labels or label_pattern), "label_kind": data.kind, "pool": pool, "folds": folds, "seed": seed,
        "tiles": int(tested.sum()), "tiles_training_only": int((~tested).sum()), "tiles_without_label": data.unlabelled,
        "groups": len(np.unique(data.groups[tested])), "classes": {str(name): int(count) for name, count in zip(classes, counts, strict=True)},
        "positive": positive, **overlap_results(overlaps), "probes": entries,
    }
    results["notes"] += few_cases(data.labels[tested], data.groups[tested])
    if any("runs" in entry for entry in entries.values()):
        results["notes"].append("± of sgd: standard deviation over its runs")
    if runs is not None:
        same = _on_tiles(runs, set(data.tiles[tested].tolist()))
        results["probes"] |= arm_entries(same, positive, bootstraps, seed)
        rows |= same.arms
        results |= {
            "kind": "method", "scored": f"{scored_by(results)} and fine-tuned networks", "runs": [str(run.folder) for run in runs.runs],
            "checkpoint": "last",
        }
        write_arms(out / "predictions.csv", same)
    # Curves of all probes of several encoders could not be told apart: of those one probe is drawn.
    drawn = "logistic" if "logistic" in probes else probes[-1]
    curves = {title: many for title, many in rows.items() if len(encoders) == 1 or entries.get(title, {}).get("probe", drawn) == drawn}
    results["pictures"] = [
        *draw_rows(out, curves, positive=positive, bootstraps=bootstraps, seed=seed),
        *draw_maps(out, {name: one.rows(tested) for name, one in encoders.items()}, seed, map_method),
    ]
    write_results(out, results)
    return results


def _check_cases(data: Labelled) -> None:
    cases = {str(name): np.unique(data.groups[data.labels == name]) for name in np.unique(data.labels)}
    if len(np.unique(data.groups)) < 2:
        return  # the split says what is wrong there
    alone = {name: str(those[0]) for name, those in cases.items() if len(those) == 1}
    if alone:
        name, case = next(iter(alone.items()))
        more = f" (and {len(alone) - 1} more classes likewise)" if len(alone) > 1 else ""
        raise DatasetError(
            f"all tiles of class {name!r} are of one case, {case!r}{more}, so it cannot be both learnt and tested; label a second case of it, or"
            " leave such classes out with --min-cases 2"
        )


def _kept(data: Labelled, most: int, fewest: int, seed: int) -> np.ndarray:
    """Places of the tiles that are used."""
    rng = np.random.default_rng(seed)
    chosen, rare = [], []
    for name in np.unique(data.labels):
        places = np.flatnonzero(data.labels == name)
        if len(np.unique(data.groups[places])) < fewest:
            rare.append(str(name))
            continue
        chosen.append(rng.permutation(places)[:most] if most else places)
    if rare:
        warn(f"classes of fewer than {fewest} cases are left out: {', '.join(rare)}")
    if not chosen:
        raise DatasetError(f"no class has {fewest} cases; give a smaller --min-cases, or label more")
    return np.sort(np.concatenate(chosen))


def _check_runs(runs: Scored, data: Labelled) -> None:
    """Refuses to put runs beside probes that are of other tiles."""
    classes = [str(name) for name in np.unique(data.labels)]
    if list(runs.classes) != classes:
        raise DatasetError(f"the runs know the classes {', '.join(runs.classes)}, the features have {', '.join(classes)}; label both alike")
    known = {tile: (case, label) for tile, case, label in zip(data.tiles.tolist(), data.groups.tolist(), data.labels.tolist(), strict=True)}
    for arm, many in runs.arms.items():
        for one in many:
            for tile, case, label in zip(one.tiles.tolist(), one.groups.tolist(), one.truth.tolist(), strict=True):
                if known.get(tile) != (case, runs.classes[label]):
                    found = f"has case {known[tile][0]!r} and label {known[tile][1]!r}" if tile in known else "is not"
                    raise DatasetError(
                        f"tile {tile!r} is of case {case!r} and label {runs.classes[label]!r} in the runs of {arm!r}, and {found} among the"
                        " labelled features; one table needs the same tiles, labels and cases (or score them apart)"
                    )


def _on_tiles(runs: Scored, tiles: set[str]) -> Scored:
    """The runs' predictions of some of the tiles, the same ones for all of them.

    Raises:
        DatasetError: an arm lacks some.
    """
    arms, folders = {}, {}
    for arm, many in runs.arms.items():
        masks = [np.isin(one.tiles, list(tiles)) for one in many]
        lacking = [len(tiles) - int(mask.sum()) for mask in masks]
        if any(lacking):
            raise DatasetError(
                f"{arm!r} has no prediction of {max(lacking)} of the {len(tiles)} tiles of the test; train all its folds, or score it apart"
            )
        arms[arm] = [one.rows(mask) for one, mask in zip(many, masks, strict=True)]
        folders[arm] = [names[mask] for names, mask in zip(runs.folders[arm], masks, strict=True)]
    return replace(runs, arms=arms, folders=folders)


def _write_predictions(path: Path, many: Sequence[Predictions]) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["tile", "group", "label", "predicted", "fold", *(f"p_{name}" for name in many[0].classes), *["run"] * (len(many) > 1)])
    for run, one in enumerate(many):
        best = one.scores.argmax(1)
        for row in range(len(one.truth)):
            names = one.classes[one.truth[row]], one.classes[best[row]]
            values = [*(f"{p:.6f}" for p in one.scores[row]), *[run] * (len(many) > 1)]
            table.writerow([one.tiles[row], one.groups[row], *names, one.fold[row], *values])
    write_text(path, text.getvalue())
