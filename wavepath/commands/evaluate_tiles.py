"""The tile modes of `wavepath evaluate`: probes on frozen features, and fine-tuned runs, in one table; the help is in `commands.evaluate`."""

import argparse
from pathlib import Path
from typing import Any

PROBES = ("knn", "simpleshot", "logistic", "sgd")
# Options of the probes, by their names in `evaluate`; those of no other mode.
OPTIONS = ("probe", "k", "logistic_c", "sgd_runs", "max_per_class", "min_cases", "skip_missing")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the probes."""
    probes = parser.add_argument_group("of --features")
    probes.add_argument("--probe", action="append", choices=PROBES, help="may be given again (default: knn, simpleshot, logistic; sgd takes longer)")
    probes.add_argument("--pool", choices=["cls", "mean"], help="class token or mean of patches (default: cls); of --bags too")
    probes.add_argument("--folds", type=int, help="cross-validation folds, split by case or slide (default: 5); of --bags too")
    probes.add_argument("--k", type=int, help="neighbours of the k-NN probe (default: 20, or as many as there are)")
    probes.add_argument("--logistic-c", type=float, metavar="C", help="of the logistic probe: the sum of cross-entropies + |W|^2 / 2C is minimised"
                        " (default: width * classes / 100)")
    probes.add_argument("--sgd-runs", type=int, metavar="N", help="runs of the sgd probe, for mean and deviation (default: 5)")
    probes.add_argument("--max-per-class", type=int, help="draw at most so many tiles of each class (default: all)")
    probes.add_argument("--min-cases", type=int, metavar="N", help="leave out classes of fewer cases (default: a class of one case is an error)")
    probes.add_argument("--skip-missing", action="store_true", help="leave out what the labels name and has no features (default: an error)")


def run(args: argparse.Namespace) -> int:
    """Scores features, or features and runs, and prints the table."""
    from wavepath.errors import ConfigError
    from wavepath.evaluation.crossvalidate import score_runs
    from wavepath.evaluation.encoded import named_folders
    from wavepath.evaluation.linear_probe import LinearProbe
    from wavepath.evaluation.probes import ProbeSettings
    from wavepath.evaluation.tiles import evaluate

    if not args.labels and not args.label_pattern:
        raise ConfigError("--features needs labels: give --labels (a labels.csv or a folder of GeoJSON regions) or --label-pattern")
    if args.sgd_runs is not None and args.sgd_runs < 1:
        raise ConfigError(f"--sgd-runs is at least 1, not {args.sgd_runs}")
    folders = named_folders(args.features)
    asked = {name: getattr(args, name) for name in ("pool", "folds", "max_per_class", "min_cases") if getattr(args, name) is not None}
    runs = score_runs(args.runs, args.data, None, args.partial, args.keep_pretraining_slides) if args.runs else None
    results = evaluate(
        folders if len(folders) > 1 else next(iter(folders.values())), args.labels, args.out, label_pattern=args.label_pattern,
        case_pattern=args.case_pattern, probes=tuple(dict.fromkeys(args.probe or PROBES[:3])), seed=args.seed, positive=args.positive,
        settings=ProbeSettings(args.k, args.logistic_c or 0.0, LinearProbe(runs=args.sgd_runs or LinearProbe.runs)), skip_missing=args.skip_missing,
        keep_pretraining=args.keep_pretraining_slides, runs=runs, map_method=args.map or "pca", **asked,
    )
    tiles = f"{results['tiles']} labelled, {results['tiles_without_label']} without a label"
    if results["tiles_training_only"]:
        tiles += f", {results['tiles_training_only']} trained on alone"
    return _told(results, args.out, [("tiles", tiles)])


def run_folds(args: argparse.Namespace) -> int:
    """Scores runs alone, and prints the table."""
    from wavepath.evaluation.crossvalidate import cross_validated

    results = cross_validated(
        args.runs, args.out, data=args.data, labels=args.labels, positive=args.positive, partial=args.partial,
        keep_pretraining=args.keep_pretraining_slides, seed=args.seed,
    )
    return _told(results, args.out, [("runs", f"{len(results['runs'])}, last checkpoints, held-out cases alone"), ("tiles", results["tiles"])])


def _told(results: dict, out: Path, facts: list[tuple[str, Any]]) -> int:
    from wavepath.console import summary
    from wavepath.evaluation.evaluate import text_table

    print(text_table(results))
    notes = [("note", note) for note in results["notes"]]
    counts = ", ".join(f"{name} {count}" for name, count in results["classes"].items())
    summary("evaluated", [*facts, ("classes", counts), ("cases", results["groups"]), *notes, ("results", out / "results.json")])
    return 0
