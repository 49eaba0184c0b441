"""Scores what was trained, one table a call. Which flag names what is scored:

  --features FEATURES --labels labels.csv     frozen features of tiles, by probes: the usual first question to an encoder
  --runs FOLDS                                fine-tuned networks, on the tiles that each has not seen; beside --features in one table
  --bags FEATURES --labels labels.csv         an answer for each slide: bag networks are trained on features, and cross-validated
  --mil RUNS                                  bag networks that are trained already; with --bags on new slides
  --superres, --stain, --stain-encoders RUNS  super-resolution, virtual staining, its encoders

Features (k-NN, SimpleShot, logistic and sgd probes) and fine-tuned runs (their held-out folds), always by case: prints accuracy, balanced accuracy,
macro F1, AUC, and with --positive the statistics of that class against the rest (sensitivity, specificity, binary accuracy and AUC), with 95 %
bootstrap intervals over cases. A case (or slide) is never on both sides of a split. Of a fine-tuned run the last checkpoint is scored, and no epoch
is chosen. Slides that the encoder was pretrained on are not tested on.

Slides (multiple-instance learning on the features of their tiles): --bags trains what is missing, one run for each network, seed and fold, and scores
each slide by the run that has not seen its case; --mil scores runs that are there, or, with --bags, slides that are new to them. The same metrics, of
the folds together and their mean and spread over folds; attention of every tile as HDF5, heatmaps, GeoJSON, ROC.

Super-resolution: PSNR and SSIM in RGB (no border crop) and in luma (as many px cut at each border as the scale), LPIPS where weights are given;
beside bicubic enlargement. The headline is what a network makes of the low resolution alone (mode wr); CWT-Net's row (ref) reads the level above.

Virtual staining: PSNR and SSIM, also under the best small shift, and what a pathologist reads: the DAB-positive area and where it is; the Frechet
distance where features are given; beside the H&E itself and one mean colour. Its encoders: how well a threshold tells pairs from non-pairs.

Runs that differ in their seed alone are one row.
"""

import argparse
from pathlib import Path

from wavepath.commands import evaluate_slides as slides
from wavepath.commands import evaluate_tiles as tiles

uses_config = True  # of --bags, which trains
_SCORED = ("features", "runs", "mil", "bags", "superres", "stain", "stain_encoders")
_PROBES = (*tiles.OPTIONS, "pool", "folds")  # what runs have settled when they were trained
_PICTURES = ("superres", "stain", "stain_encoders")
# Which of the flags that name what is scored an option goes with; the others refuse it.
TAKEN_BY = {
    "labels": ("features", "runs", *slides.MODES), "label_pattern": ("features",), "case_pattern": ("features",),
    **dict.fromkeys(_PROBES, ("features",)), "pool": ("features", "bags"), "folds": ("features", "bags"), **slides.TAKEN_BY,
    "data": ("runs", "mil", *_PICTURES), "partial": ("runs", "mil"), "positive": ("features", "runs", *slides.MODES, "superres"),
    "keep_pretraining_slides": ("features", "runs", *slides.MODES), "map": ("features", *slides.MODES), "lpips": ("superres",),
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
  wavepath evaluate --features ours=FEATURES untrained=UNTRAINED colours=COLOURS --labels labels.csv --out OUT      # encoders in one table
  wavepath evaluate --features FEATURES --runs FOLDS --labels labels.csv --out OUT                                  # and fine-tuned networks
  wavepath evaluate --runs FOLDS --positive tumour --out FOLDS/evaluation     # FOLDS: a sweep over config.data.fold of configs/finetune.py
  wavepath evaluate --runs FOLDS --data TILES --out FOLDS/evaluation          # the tiles of the training have moved to TILES
  wavepath evaluate --bags FEATURES --labels labels.csv --network abmil clam_sb mean --seeds 3 --tiles TILES --out OUT     # slides
  wavepath evaluate --bags ours=FEATURES colours=FLOOR --labels labels.csv --splits camelyon16 --out OUT                   # encoders compared
  wavepath evaluate --mil FOLDS --out OUT                                     # runs of configs/mil.py, one for each fold
  wavepath evaluate --mil RUN --bags NEW --slides SLIDES --out OUT            # slides without labels: predictions, attention, heatmaps
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
  of features   confusion.png, roc.png, features_map.png, predictions_<row>.csv (of runs: predictions.csv)
  of slides     the same, attention/<slide>.h5 (coords, attention, probability), heatmaps/, predictions.csv; of --bags runs/
  of superres   comparison.png, images.csv; diagnosis/ with a classifier
  of stain      comparison.png (the DAB-positive area beneath each image), scatter.png (painted over true positive area), images.csv
  of encoders   encoders.png (cosines of pairs and non-pairs, accuracy over the threshold), curve.csv"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "wavepath evaluate FLAG_OF_WHAT_IS_SCORED ... --out OUT [options]"  # of all flags it would be twenty lines
    scored = parser.add_argument_group("what is scored, one of them (--features and --runs go together, and --mil and --bags)")
    scored.add_argument("--features", nargs="+", metavar="[NAME=]FEATURES", help="folder of feature files (*.h5) from `wavepath embed`, TRIDENT or"
                        " CLAM; several: encoders on the same tiles")
    scored.add_argument("--runs", type=Path, nargs="+", metavar="RUN", help="fine-tuning runs, one for each fold, or folders (sweeps) that hold them;"
                        " beside --features in the same table")
    slides.add_scored(scored)
    scored.add_argument("--superres", type=Path, nargs="+", metavar="RUN", help="super-resolution runs of one scale, or folders (sweeps) of them")
    scored.add_argument("--stain", type=Path, nargs="+", metavar="RUN", help="virtual staining runs, or folders (sweeps) of them")
    scored.add_argument("--stain-encoders", type=Path, nargs="+", metavar="RUN", help="runs of its encoders, or folders (sweeps) of them")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results; RUN/evaluation is where `wavepath report` looks")
    parser.add_argument("--data", type=Path, help="of --runs: where the tiles (or slides) of the training are now, if they have moved; of --mil:"
                        " where the features are now; of --superres,"
                        " --stain and --stain-encoders: other pyramids or pairs whose test split is scored")
    parser.add_argument("--seed", type=int, default=0, help="of folds, bootstrap and random crops (default: 0)")
    classes = parser.add_argument_group("of --features and --runs; but for the patterns also of --mil and --bags")
    given = classes.add_mutually_exclusive_group()
    given.add_argument("--labels", type=Path, help="labels.csv, or a folder of GeoJSON regions; of --runs: where those of the training are now")
    given.add_argument("--label-pattern", default="", metavar="REGEX", help="reads the label from the tile's name; one group")
    classes.add_argument(
        "--case-pattern", default="", metavar="REGEX", help="reads the case likewise, or from the slide's id (default: tile or slide is the case)"
    )
    classes.add_argument("--positive", default="", metavar="LABEL", help="also score this class against the rest")
    classes.add_argument("--partial", action="store_true", help="of --runs: score what is there where folds are missing or unfinished")
    slides.add_arguments(parser)
    classes.add_argument("--keep-pretraining-slides", action="store_true",
                         help="also test on slides that the encoder was pretrained on (default: they are left out, and counted)")
    classes.add_argument("--map", choices=["pca", "umap"], help="picture of the features in the plane: principal components, or UMAP where it is"
                         " installed (default: pca); not of --runs alone")
    tiles.add_arguments(parser)
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
    _refuse(args)
    if args.map:
        from wavepath.evaluation.feature_map import check_method

        check_method(args.map)  # before anything that takes long
    if args.superres or args.stain or args.stain_encoders:
        from wavepath.commands import evaluate_images as images

        return (images.run_superres if args.superres else images.run_stain if args.stain else images.run_stain_encoders)(args)
    if args.mil or args.bags:
        return slides.run(args)
    if not args.features:
        return tiles.run_folds(args)
    return tiles.run(args)


def _refuse(args: argparse.Namespace) -> None:
    """Options that the call does not take would be ignored: an error names where they belong."""
    from wavepath.errors import ConfigError

    scored = _scored(args)
    taken = {scored, "runs"} if args.runs else {scored}  # --features goes with --runs
    if args.config_overrides and scored != "bags":
        field = args.config_overrides[0].partition("=")[0]
        raise ConfigError(f"--config.{field} belongs to --bags, which trains; leave it out with --{_flag(scored)}")
    why = {("runs", name): ", which takes labels and cases as the runs were trained with" for name in ("label_pattern", "case_pattern")}
    why |= {("runs", name): ", which scores networks and folds as they were trained" for name in _PROBES}
    for option, modes in TAKEN_BY.items():
        value = getattr(args, option)
        if taken & set(modes) or value is None or value is False or value == "":  # a 0 is given
            continue
        where = ("the probes of " if option in _PROBES and modes == ("features",) else "") + ", ".join(f"--{_flag(mode)}" for mode in modes)
        raise ConfigError(f"--{_flag(option)} belongs to {where}; leave it out with --{_flag(scored)}{why.get((scored, option), '')}")


def _scored(args: argparse.Namespace) -> str:
    """The flag that names what is scored."""
    from wavepath.errors import ConfigError

    given = [name for name in _SCORED if getattr(args, name) is not None]
    if given in (["mil", "bags"], ["features", "runs"]):  # runs on slides that are new to them; beside probes
        return given[0]
    if len(given) != 1:
        every = ", ".join(f"--{_flag(name)}" for name in _SCORED)
        raise ConfigError(f"{'two things are' if given else 'nothing is'} named that shall be scored; give one of {every}")
    return given[0]


def _flag(name: str) -> str:
    return name.replace("_", "-")
