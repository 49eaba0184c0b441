"""`wavepath embed`: frozen features of tiles."""

import argparse
from pathlib import Path

EPILOG = """writes OUT/<slide_id>.h5: features [n, d] (class token), features_mean (mean of patches), coords [n, 2] in level-0 px, energy, names.
TRIDENT and CLAM read them. Running it again embeds only what is missing or outdated.

examples
  wavepath embed --checkpoint RUN --data TILES --out FEATURES
  wavepath embed --checkpoint RUN --slides SLIDES --mpp-csv mpp.csv --out FEATURES"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help="run folder of `wavepath train` (its newest whole checkpoint)")
    parser.add_argument("--step", type=int, help="a particular checkpoint of the run")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--data", type=Path, help="a folder of `wavepath prepare`, or a folder of images")
    given.add_argument("--slides", type=Path, help="slides to read tiles from, with the run's screening settings")
    parser.add_argument("--out", type=Path, required=True, help="folder for the feature files")
    parser.add_argument("--batch-size", type=int, default=64, help="tiles at once, over all devices (default: 64)")
    parser.add_argument("--devices", type=int, default=0, help="use the first so many local devices (default: as the run, at most those here)")
    parser.add_argument(
        "--select", choices=["all", "wavelet", "random", "threshold"], default="all", help="with --slides: which tiles (default: all)"
    )
    parser.add_argument("--mpp-csv", default="", help="with --slides: table slide,mpp for slides that carry none")
    parser.add_argument("--slide-mpp", type=float, default=0.0, help="with --slides: mpp for all slides that carry none")
    parser.add_argument(
        "--on-corrupt", choices=["error", "skip"], default="error", help="a tile that cannot be read: its slide fails, or the tile is left out"
    )


def run(args: argparse.Namespace) -> int:
    from wavepath.console import summary
    from wavepath.errors import EXIT_OK, EXIT_PARTIAL
    from wavepath.inference.embed import embed

    result = embed(
        args.checkpoint,
        args.out,
        data=args.data,
        slides=args.slides,
        step=args.step,
        batch_size=args.batch_size,
        select=args.select,
        mpp_csv=args.mpp_csv,
        slide_mpp=args.slide_mpp,
        devices=args.devices,
        on_corrupt=args.on_corrupt,
    )
    summary(
        "embedded",
        [
            ("slides", f"{result.slides}, {result.reused} whole already, {len(result.failed)} failed"),
            ("tiles now", f"{result.tiles}" + (f", {result.skipped} left out since they cannot be read" if result.skipped else "")),
            ("features", f"{result.width} wide"),
            ("folder", args.out),
        ],
    )
    return EXIT_PARTIAL if result.failed or result.skipped else EXIT_OK
