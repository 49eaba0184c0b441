"""The slide modes of `wavepath evaluate`: multiple-instance runs, trained first where they are missing; the help is in `commands.evaluate`."""

import argparse
from pathlib import Path

MODES = ("mil", "bags")
NETWORKS = ("abmil", "abmil_plain", "clam_sb", "clam_mb", "transmil", "mean", "max")
# Which of the two an option goes with.
TAKEN_BY = {
    **dict.fromkeys(("network", "seeds", "splits", "config"), ("bags",)),
    **dict.fromkeys(("tiles", "slides", "heatmaps", "heatmap_mode"), MODES),
}


def add_scored(scored: argparse._ArgumentGroup) -> None:
    """The flags that name what is scored."""
    scored.add_argument("--mil", type=Path, nargs="+", metavar="RUN", help="runs of configs/mil.py, one for each fold, or folders that hold them")
    scored.add_argument("--bags", nargs="+", metavar="[NAME=]FEATURES", help="folders of feature files, a slide each (`wavepath embed`, TRIDENT,"
                        " CLAM): cross-validated with --labels ({seed} stands for the run's own, as in wavelet=F/{seed});"
                        " with --mil, slides that are new to the runs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The other flags."""
    trained = parser.add_argument_group("of --bags (--labels is a table case_id,slide_id,label; --folds 0 leaves one case out at a time)")
    trained.add_argument("--network", nargs="+", choices=NETWORKS, metavar="NAME", help=f"of {', '.join(NETWORKS)} (default: abmil)")
    trained.add_argument("--seeds", type=int, metavar="N", help="runs of each network and fold, with config.seed = 0, 1, ... (default: 1)")
    trained.add_argument("--splits", help="camelyon16 (its official test set), or a folder of CLAM's splits_<fold>.csv, in place of --folds")
    trained.add_argument("--config", metavar="FILE[:ARG]", help="what is trained (default: configs/mil.py); --config.a.b=v for all runs")
    shown = parser.add_argument_group("of --mil and --bags")
    shown.add_argument("--tiles", type=Path, help="the prepared folder of the slides: thumbnails, and tiles, for the heatmaps")
    shown.add_argument("--slides", type=Path, help="or the slides themselves; without either, heatmaps are drawn on white")
    shown.add_argument("--heatmaps", type=int, metavar="N", help="draw attention of N slides, of every class alike (default: 6; 0: none); it is"
                       " written for all")
    shown.add_argument("--heatmap-mode", choices=["rank", "minmax"], help="colours by the rank of a tile in its slide, or from lowest to highest"
                       " attention (default: rank)")


def run(args: argparse.Namespace) -> int:
    """Scores slides, and trains first what is missing."""
    from wavepath.console import summary
    from wavepath.errors import EXIT_PREEMPTED, ConfigError
    from wavepath.evaluation.evaluate import text_table
    from wavepath.evaluation.mil import predict_slides, score_slides
    from wavepath.evaluation.mil_pictures import Drawing
    from wavepath.evaluation.mil_train import RUNS, bag_folders, plan, train_missing

    if args.tiles and args.slides:
        raise ConfigError("--tiles and --slides are two places for thumbnails; give one")
    heatmaps = Drawing.heatmaps if args.heatmaps is None else args.heatmaps
    if heatmaps < 0:
        raise ConfigError(f"--heatmaps {heatmaps} is not a number of slides")
    drawing = Drawing(args.tiles, args.slides, heatmaps, args.heatmap_mode or Drawing.mode, args.seed, map_method=args.map or Drawing.map_method)
    common = dict(positive=args.positive, keep_pretraining_slides=args.keep_pretraining_slides, drawing=drawing, seed=args.seed)
    bags = bag_folders(args.bags or ())
    if args.mil and args.bags:
        if len(bags) > 1:
            raise ConfigError(f"--mil with --bags takes one folder of new slides, not {len(bags)}")
        if args.data or args.partial:
            raise ConfigError(f"{'--data' if args.data else '--partial'} is of --mil alone: --bags names slides that are new to the runs")
        results = predict_slides(args.mil, *bags.values(), args.out, labels=args.labels, **common)
    elif args.mil:
        results = score_slides(args.mil, args.out, data=args.data, labels=args.labels, partial=args.partial, **common)
    else:
        if not args.labels:
            raise ConfigError("--bags needs --labels, a table case_id,slide_id,label (or --mil RUN, for slides without labels)")
        given = {name: getattr(args, name) for name in ("seeds", "folds") if getattr(args, name) is not None}
        jobs = plan(
            bags, args.labels, args.out, networks=args.network or ("abmil",), splits=args.splits or "", pool=args.pool or "",
            config=args.config or "", overrides=args.config_overrides, **given,
        )  # fmt: skip
        if not train_missing(jobs):
            return EXIT_PREEMPTED
        names = {str(folder.resolve()): name for name, folder in bags.items() if name}
        results = score_slides([job.folder for job in jobs], args.out, names=names, **common)
    if "probes" in results:
        print(text_table(results))
    rows = [("runs", len(results["runs"])), ("slides", f"{results['slides']}" + (f" of {results['groups']} cases" if "groups" in results else ""))]
    counts = results.get("classes") or results["predicted"]
    rows.append(("classes" if "classes" in results else "predicted", ", ".join(f"{name} {count}" for name, count in counts.items())))
    rows += [("note", note) for note in results.get("notes", ())]
    rows += [("attention", args.out / "attention"), ("predictions", args.out / "predictions.csv"), ("results", args.out / "results.md")]
    summary("evaluated", rows if args.mil else [*rows, ("trained runs", args.out / RUNS)])
    return 0
