"""Scores what was trained, one table a call: features, fine-tuned runs, super-resolution, virtual staining, or its encoders.

Features (k-NN and logistic probes) and fine-tuned runs (their held-out folds), always by case: prints accuracy, balanced accuracy, macro F1, AUC, and
with --positive the statistics of that class against the rest (sensitivity, specificity, binary accuracy and AUC), with 95 % bootstrap intervals over
cases. A case (or slide) is never on both sides of a split. Of a fine-tuned run the last checkpoint is scored, and no epoch is chosen.

Super-resolution: PSNR and SSIM in RGB (no border crop) and in luma (as many px cut at each border as the scale), LPIPS where weights are given;
beside bicubic enlargement. The headline is what a network makes of the low resolution alone (mode wr); CWT-Net's row (ref) reads the level above.

Virtual staining: PSNR and SSIM, also under the best small shift, and what a pathologist reads: the DAB-positive area and where it is; the Frechet
distance where features are given; beside the H&E itself and one mean colour. Its encoders: how well a threshold tells pairs from non-pairs.

Runs that differ in their seed alone are one row.
"""

import argparse
from pathlib import Path

_PROBES = ("probe", "pool", "folds", "k", "max_per_class")  # what runs have settled when they were trained
_PICTURES = ("superres", "stain", "stain_encoders")
# Which of the flags that name what is scored an option goes with; the others refuse it.
TAKEN_BY = {
    "labels": ("features", "runs"), "label_pattern": ("features",), "case_pattern": ("features",), **dict.fromkeys(_PROBES, ("features",)),
    "data": ("runs", *_PICTURES), "partial": ("runs",), "positive": ("features", "runs", "superres"), "lpips": ("superres",),
    "classifier": ("superres",), "max_images": _PICTURES, "tile": ("superres", "stain"), "overlap": ("superres", "stain"), "protocol": ("stain",),
    "inception": ("stain",), "features_of": ("stain",),
}  # fmt: skip

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
  wavepath evaluate --stain CEFF PIX2PIX --out OUT                            # on the test split of the pairs they were trained from
  wavepath evaluate --stain SWEEP --data PAIRS --inception inception.safetensors --features-of ENCODERS --out OUT
  wavepath evaluate --stain-encoders ENCODERS --out OUT

--lpips takes weights of AlexNet or VGG-16 (or both, a file each) as .safetensors or .npz, with torchvision's names for the convolutions
(features.N.weight, features.N.bias) and lpips' for the linear layers (lin0.model.1.weight to lin4.model.1.weight) in one file; nothing is downloaded.
--classifier takes a run of configs/resnet.py (or configs/finetune.py): its held-out images are reduced, enlarged by each method and classified.

--inception takes weights of InceptionV3 as .safetensors or .npz, named as pytorch_fid's (or torchvision's) are; --features-of a run of
configs/ceff_encoders.py or one that `wavepath embed` takes.

writes results.json, results.md, and
  of features   confusion.png, predictions_<probe>.csv (of runs: predictions.csv)
  of superres   comparison.png, images.csv; diagnosis/ with a classifier
  of stain      comparison.png (the DAB-positive area beneath each image), scatter.png (painted over true positive area), images.csv
  of encoders   encoders.png (cosines of pairs and non-pairs, accuracy over the threshold), curve.csv"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    scored = parser.add_mutually_exclusive_group(required=True)
    scored.add_argument("--features", type=Path, help="folder of feature files (*.h5) from `wavepath embed`, TRIDENT or CLAM")
    scored.add_argument("--runs", type=Path, nargs="+", metavar="RUN", help="fine-tuning runs, one for each fold, or folders (sweeps) that hold them")
    scored.add_argument("--superres", type=Path, nargs="+", metavar="RUN", help="super-resolution runs of one scale, or folders (sweeps) of them")
    scored.add_argument("--stain", type=Path, nargs="+", metavar="RUN", help="virtual staining runs, or folders (sweeps) of them")
    scored.add_argument("--stain-encoders", type=Path, nargs="+", metavar="RUN", help="runs of its encoders, or folders (sweeps) of them")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results; RUN/evaluation is where `wavepath report` looks")
    parser.add_argument("--data", type=Path, help="of --runs: where the tiles (or slides) of the training are now, if they have moved; of --superres,"
                        " --stain and --stain-encoders: other pyramids or pairs whose test split is scored")
    parser.add_argument("--seed", type=int, default=0, help="of folds, bootstrap and random crops (default: 0)")
    classes = parser.add_argument_group("of --features and --runs")
    given = classes.add_mutually_exclusive_group()
    given.add_argument("--labels", type=Path, help="labels.csv, or a folder of GeoJSON regions; of --runs: where those of the training are now")
    given.add_argument("--label-pattern", default="", metavar="REGEX", help="reads the label from the tile's name; one group")
    classes.add_argument(
        "--case-pattern", default="", metavar="REGEX", help="reads the case likewise, or from the slide's id (default: tile or slide is the case)"
    )
    classes.add_argument("--positive", default="", metavar="LABEL", help="also score this class against the rest")
    classes.add_argument("--partial", action="store_true", help="of --runs: score what is there where folds are missing or unfinished")
    probes = parser.add_argument_group("of --features")
    probes.add_argument("--probe", action="append", choices=["knn", "logistic"], help="may be given twice (default: both)")
    probes.add_argument("--pool", choices=["cls", "mean"], help="class token or mean of patches (default: cls)")
    probes.add_argument("--folds", type=int, help="cross-validation folds, split by case or slide (default: 5)")
    probes.add_argument("--k", type=int, help="neighbours of the k-NN probe (default: 20)")
    probes.add_argument("--max-per-class", type=int, help="draw at most so many tiles of each class (default: all)")
    made = parser.add_argument_group("of --superres, --stain and --stain-encoders")
    made.add_argument("--max-images", type=int, metavar="N", help="at most N test crops, pairs, or windows of the encoders (and N held-out images of"
                      " --classifier), drawn evenly (default: all)")
    made.add_argument("--tile", type=int, help="px that a network sees at once, of the low resolution (default: what it was trained on, at least 32;"
                      " of --stain 64); not of --stain-encoders, nor is --overlap")
    made.add_argument("--overlap", type=int, help="px of them shared with the neighbour (default: a quarter; of --stain as"
                      " `wavepath stain` does)")
    restored = parser.add_argument_group("of --superres")
    restored.add_argument("--lpips", type=Path, nargs="+", metavar="WEIGHTS", help="weights of the perceptual distance, see below")
    restored.add_argument("--classifier", type=Path, metavar="RUN", help="also classify restored images by this run (or its folds)")
    stained = parser.add_argument_group("of --stain")
    stained.add_argument("--protocol", choices=["whole", "crop"], help="score whole images, or one random crop of each, of the side that was trained"
                         " on, as the paper probably did (default: whole)")
    stained.add_argument("--inception", type=Path, metavar="WEIGHTS", help="Frechet distance over features of InceptionV3, see below")
    stained.add_argument("--features-of", type=Path, metavar="RUN", help="Frechet distance over features of a run of this library")


def run(args: argparse.Namespace) -> int:
    from wavepath.console import summary
    from wavepath.errors import ConfigError
    from wavepath.evaluation.evaluate import evaluate, text_table

    _refuse(args)
    if args.superres:
        return _run_superres(args)
    if args.stain:
        return _run_stain(args)
    if args.stain_encoders:
        return _run_stain_encoders(args)
    if args.runs:
        return _run_folds(args)
    if not args.labels and not args.label_pattern:
        raise ConfigError("--features needs labels: give --labels (a labels.csv or a folder of GeoJSON regions) or --label-pattern")
    asked = {name: getattr(args, name) for name in _PROBES if name != "probe" and getattr(args, name) is not None}
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


def _refuse(args: argparse.Namespace) -> None:
    """Options that the call does not take would be ignored: an error names where they belong."""
    from wavepath.errors import ConfigError

    scored = next(name for name in ("features", "runs", "superres", "stain", "stain_encoders") if getattr(args, name) is not None)
    why = {("runs", name): ", which takes labels and cases as the runs were trained with" for name in ("label_pattern", "case_pattern")}
    why |= {("runs", name): ", which scores networks and folds as they were trained" for name in _PROBES}
    for option, modes in TAKEN_BY.items():
        value = getattr(args, option)
        if scored in modes or value is None or value is False or value == "":  # a 0 is given
            continue
        where = ("the probes of " if option in _PROBES else "") + ", ".join(f"--{_flag(mode)}" for mode in modes)
        raise ConfigError(f"--{_flag(option)} belongs to {where}; leave it out with --{_flag(scored)}{why.get((scored, option), '')}")


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _options(args: argparse.Namespace, *names: str) -> dict:
    """Those that were given; the others have their defaults where they are used."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _run_folds(args: argparse.Namespace) -> int:
    from wavepath.console import summary
    from wavepath.evaluation.crossvalidate import cross_validated
    from wavepath.evaluation.evaluate import text_table

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
    from wavepath.errors import ConfigError
    from wavepath.evaluation.superres import evaluate_superres
    from wavepath.evaluation.superres_report import text_table

    if args.positive and not args.classifier:
        raise ConfigError("--positive names a class of --classifier; give one, or leave it out")
    if args.classifier:
        from wavepath.evaluation.diagnosis import diagnose, read_classifier

        read_classifier(args.classifier, args.positive)  # refused now rather than after the crops
    options = _options(args, "max_images", "tile", "overlap")
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


def _run_stain(args: argparse.Namespace) -> int:
    from wavepath.console import summary
    from wavepath.evaluation.stain import evaluate_stain
    from wavepath.evaluation.stain_report import protocol, registered, text_table

    options = _options(args, "max_images", "tile", "overlap", "protocol", "inception", "features_of")
    results = evaluate_stain(args.stain, args.out, data=args.data, seed=args.seed, **options)
    print(text_table(results))
    rows = [
        ("test pairs", f"{results['images']} of {results['groups']} slides"),
        ("protocol", protocol(results)),
        ("registration", registered(results)),
        ("pictures", f"{args.out / 'comparison.png'}, {args.out / 'scatter.png'}"),
        ("results", args.out / "results.md"),
    ]
    summary("evaluated", rows)
    return 0


def _run_stain_encoders(args: argparse.Namespace) -> int:
    from wavepath.console import summary
    from wavepath.evaluation.stain_encoders import evaluate_encoders
    from wavepath.evaluation.stain_encoders_report import text_table

    results = evaluate_encoders(args.stain_encoders, args.out, data=args.data, seed=args.seed, **_options(args, "max_images"))
    print(text_table(results))
    windows = f"{results['windows']} of {results['side']} px in {results['images']} pairs of {results['groups']} slides"
    summary("evaluated", [("test windows", windows), ("picture", args.out / "encoders.png"), ("results", args.out / "results.md")])
    return 0
