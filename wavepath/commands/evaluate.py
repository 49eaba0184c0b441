"""Scores frozen features by k-NN and logistic probes, or fine-tuned runs by their held-out folds; always by case.

Prints accuracy, balanced accuracy, macro F1, AUC, and with --positive the statistics of that class against the rest (sensitivity,
specificity, binary accuracy and AUC), with 95 % bootstrap intervals over cases.
A case (or slide) is never on both sides of a split. Of a fine-tuned run the last checkpoint is scored, and no epoch is chosen.
"""

import argparse
from pathlib import Path

OF_PROBES = ("probe", "pool", "folds", "k", "max_per_class")  # what runs have settled when they were trained
OF_RUNS = ("data", "partial")

EPILOG = """labels may be:
  labels.csv with case_id,slide_id,label          a tile has its slide's label; folds are by case
  labels.csv with tile_id,label[,case_id]         one label for each tile of an embedded image folder
  a folder of <slide_id>.geojson                  a tile has the class of the region under its centre (QuPath, or `wavepath phantom`)
or none, with --label-pattern: the label is in the tile's name (its path in the embedded folder, without suffix)

examples:
  wavepath evaluate --features FEATURES --labels labels.csv --out RUN/evaluation
  wavepath evaluate --features FEATURES --label-pattern '^([^/]+)/' --case-pattern '^([^/]+/[0-9]+)_' --out RUN/evaluation
  wavepath evaluate --runs FOLDS --positive tumour --out FOLDS/evaluation     # FOLDS: a sweep over config.data.fold of configs/finetune.py
  wavepath evaluate --runs FOLDS --data TILES --out FOLDS/evaluation          # the tiles of the training have moved to TILES

writes results.json, results.md, confusion.png and predictions_<probe>.csv (of runs: predictions.csv)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    scored = parser.add_mutually_exclusive_group(required=True)
    scored.add_argument("--features", type=Path, help="folder of feature files (*.h5) from `wavepath embed`, TRIDENT or CLAM")
    scored.add_argument("--runs", type=Path, nargs="+", metavar="RUN", help="fine-tuning runs, one for each fold, or folders (sweeps) that hold them")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--labels", type=Path, help="labels.csv, or a folder of GeoJSON regions; of --runs: where those of the training are now")
    given.add_argument("--label-pattern", default="", metavar="REGEX", help="reads the label from the tile's name; one group")
    parser.add_argument(
        "--case-pattern", default="", metavar="REGEX", help="reads the case likewise, or from the slide's id (default: tile or slide is the case)"
    )
    parser.add_argument("--data", type=Path, help="of --runs: where the tiles (or slides) of the training are now, if they have moved")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results; RUN/evaluation is where `wavepath report` looks")
    parser.add_argument("--positive", default="", metavar="LABEL", help="also score this class against the rest")
    parser.add_argument("--partial", action="store_true", help="of --runs: score what is there where folds are missing or unfinished")
    parser.add_argument("--probe", action="append", choices=["knn", "logistic"], help="may be given twice (default: both)")
    parser.add_argument("--pool", choices=["cls", "mean"], help="class token or mean of patches (default: cls)")
    parser.add_argument("--folds", type=int, help="cross-validation folds, split by case or slide (default: 5)")
    parser.add_argument("--k", type=int, help="neighbours of the k-NN probe (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of folds and bootstrap (default: 0)")
    parser.add_argument("--max-per-class", type=int, help="draw at most so many tiles of each class (default: all)")


def run(args: argparse.Namespace) -> int:
    from wavepath.console import summary
    from wavepath.errors import ConfigError
    from wavepath.evaluation.evaluate import evaluate, text_table

    if args.runs:
        return _run_folds(args)
    if not args.labels and not args.label_pattern:
        raise ConfigError("--features needs labels: give --labels (a labels.csv or a folder of GeoJSON regions) or --label-pattern")
    _refuse(args, OF_RUNS, "belongs to --runs; leave it out with --features")
    asked = {name: getattr(args, name) for name in OF_PROBES if name != "probe" and getattr(args, name) is not None}
    results = evaluate(
        args.features,
        args.labels,
        args.out,
        label_pattern=args.label_pattern,
        case_pattern=args.case_pattern,
        probes=tuple(args.probe or ("knn", "logistic")),
        seed=args.seed,
        positive=args.positive,
        **asked,
    )
    print(text_table(results))
    summary(
        "evaluated",
        [
            ("tiles", f"{results['tiles']} labelled, {results['tiles_without_label']} without a label"),
            ("classes", ", ".join(f"{name} {count}" for name, count in results["classes"].items())),
            ("groups", results["groups"]),
            ("results", args.out / "results.json"),
        ],
    )
    return 0


def _refuse(args: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    from wavepath.errors import ConfigError

    for name in names:
        given = getattr(args, name)
        if given is not None and given is not False and given != "":  # a 0 is given
            raise ConfigError(f"--{name.replace('_', '-')} {why}")


def _run_folds(args: argparse.Namespace) -> int:
    from wavepath.console import summary
    from wavepath.evaluation.crossvalidate import cross_validated
    from wavepath.evaluation.evaluate import text_table

    _refuse(args, ("label_pattern", "case_pattern"), "belongs to --features; --runs takes labels and cases as the runs were trained with")
    _refuse(args, OF_PROBES, "belongs to the probes of --features; leave it out with --runs, which scores networks and folds as they were trained")
    results = cross_validated(
        args.runs, args.out, data=args.data, labels=args.labels, positive=args.positive, partial=args.partial, seed=args.seed
    )
    print(text_table(results))
    summary(
        "evaluated",
        [
            ("runs", f"{len(results['runs'])}, last checkpoints, held-out cases alone"),
            ("tiles", results["tiles"]),
            ("classes", ", ".join(f"{name} {count}" for name, count in results["classes"].items())),
            ("cases", results["groups"]),
            ("results", args.out / "results.json"),
        ],
    )
    return 0
