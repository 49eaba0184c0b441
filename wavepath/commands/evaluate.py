"""Scores frozen features by k-NN and logistic probes, fine-tuned runs by their held-out folds, super-resolution runs by whole test crops.

Of features and fine-tuned runs, always by case: prints accuracy, balanced accuracy, macro F1, AUC, and with --positive the statistics of that class
against the rest (sensitivity, specificity, binary accuracy and AUC), with 95 % bootstrap intervals over cases. A case (or slide) is never on both
sides of a split. Of a fine-tuned run the last checkpoint is scored, and no epoch is chosen.

Of super-resolution runs: PSNR and SSIM in RGB (no border crop) and in luma (as many px cut at each border as the scale), LPIPS where weights are
given, beside bicubic enlargement. The headline is what a network makes of the low resolution alone (mode wr). CWT-Net has a second row, (ref), for
which it reads the level above. Runs that differ in their seed alone are one row.
"""

import argparse
from pathlib import Path

OF_PROBES = ("probe", "pool", "folds", "k", "max_per_class")  # what runs have settled when they were trained
OF_RUNS = ("data", "partial")
OF_SUPERRES = ("lpips", "classifier", "max_images", "tile", "overlap")

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
  wavepath evaluate --superres RUN EDSR --out OUT                             # on the test split of the pyramids they were trained from
  wavepath evaluate --superres RUN EDSR --data PYRAMIDS --lpips alex.safetensors --classifier CLASSIFIER --out OUT

--lpips takes weights of AlexNet or VGG-16 (or both, a file each) as .safetensors or .npz, with torchvision's names for the convolutions
(features.N.weight, features.N.bias) and lpips' for the linear layers (lin0.model.1.weight to lin4.model.1.weight) in one file; nothing is downloaded.
--classifier takes a run of configs/resnet.py (or configs/finetune.py): its held-out images are reduced, enlarged by each method and classified.

writes results.json, results.md, confusion.png and predictions_<probe>.csv (of runs: predictions.csv; of superres: images.csv and comparison.png,
and diagnosis/ with a classifier)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    scored = parser.add_mutually_exclusive_group(required=True)
    scored.add_argument("--features", type=Path, help="folder of feature files (*.h5) from `wavepath embed`, TRIDENT or CLAM")
    scored.add_argument("--runs", type=Path, nargs="+", metavar="RUN", help="fine-tuning runs, one for each fold, or folders (sweeps) that hold them")
    scored.add_argument("--superres", type=Path, nargs="+", metavar="RUN", help="super-resolution runs of one scale, or folders (sweeps) of them")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--labels", type=Path, help="labels.csv, or a folder of GeoJSON regions; of --runs: where those of the training are now")
    given.add_argument("--label-pattern", default="", metavar="REGEX", help="reads the label from the tile's name; one group")
    parser.add_argument(
        "--case-pattern", default="", metavar="REGEX", help="reads the case likewise, or from the slide's id (default: tile or slide is the case)"
    )
    parser.add_argument("--data", type=Path, help="of --runs: where the tiles (or slides) of the training are now, if they have moved;"
                        " of --superres: other pyramids whose test split is scored")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results; RUN/evaluation is where `wavepath report` looks")
    parser.add_argument("--positive", default="", metavar="LABEL", help="also score this class against the rest")
    parser.add_argument("--partial", action="store_true", help="of --runs: score what is there where folds are missing or unfinished")
    parser.add_argument("--probe", action="append", choices=["knn", "logistic"], help="may be given twice (default: both)")
    parser.add_argument("--pool", choices=["cls", "mean"], help="class token or mean of patches (default: cls)")
    parser.add_argument("--folds", type=int, help="cross-validation folds, split by case or slide (default: 5)")
    parser.add_argument("--k", type=int, help="neighbours of the k-NN probe (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of folds and bootstrap (default: 0)")
    parser.add_argument("--max-per-class", type=int, help="draw at most so many tiles of each class (default: all)")
    restored = parser.add_argument_group("of --superres")
    restored.add_argument("--lpips", type=Path, nargs="+", metavar="WEIGHTS", help="weights of the perceptual distance, see below")
    restored.add_argument("--classifier", type=Path, metavar="RUN", help="also classify restored images by this run (or its folds)")
    restored.add_argument("--max-images", type=int, metavar="N", help="at most N test crops (and N held-out images), drawn evenly (default: all)")
    restored.add_argument("--tile", type=int, help="low-resolution px that a network sees at once (default: the largest training patch, at least 32)")
    restored.add_argument("--overlap", type=int, help="px of them shared with the neighbour (default: a quarter)")


def run(args: argparse.Namespace) -> int:
    from wavepath.console import summary
    from wavepath.errors import ConfigError
    from wavepath.evaluation.evaluate import evaluate, text_table

    if args.superres:
        return _run_superres(args)
    _refuse(args, OF_SUPERRES, "belongs to --superres")
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


def _run_superres(args: argparse.Namespace) -> int:
    from wavepath.console import summary
    from wavepath.evaluation.superres import evaluate_superres
    from wavepath.evaluation.superres_report import text_table

    _refuse(args, (*OF_PROBES, "labels", "label_pattern", "case_pattern", "partial"), "does not belong to --superres; leave it out")
    if not args.classifier:
        _refuse(args, ("positive",), "names a class of --classifier")
    if args.classifier:
        from wavepath.evaluation.diagnosis import diagnose, read_classifier

        read_classifier(args.classifier, args.positive)  # refused now rather than after the crops
    options = {name: getattr(args, name) for name in ("max_images", "tile", "overlap") if getattr(args, name) is not None}
    results = evaluate_superres(args.superres, args.out, data=args.data, lpips=tuple(args.lpips or ()), seed=args.seed, **options)
    print(text_table(results))
    rows = [
        ("test crops", f"{results['images']} of {results['groups']} slides, {results['scale']}x"),
        ("metrics", f"RGB without border crop; Y with {results['shave']} px cut at each border; 8-bit images"),
        ("LPIPS", "weights not given (--lpips)" if results["lpips"] == "not given" else ", ".join(results["lpips"])),
    ]
    if args.classifier:
        from wavepath.evaluation.evaluate import text_table as probes_table

        found = diagnose(
            args.classifier, args.superres, args.out / "diagnosis", data=args.data, positive=args.positive, seed=args.seed, **options
        )
        print(probes_table(found))
        rows.append(("diagnosis", f"{found['tiles']} held-out images of {found['groups']} cases, {args.out / 'diagnosis' / 'results.md'}"))
    summary("evaluated", [*rows, ("picture", args.out / "comparison.png"), ("results", args.out / "results.md")])
    return 0
