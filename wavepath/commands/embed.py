"""Features of every tile by a trained encoder: one HDF5 file for each slide.

Tiles come from a prepared folder or a folder of images (--data), or are read from slides with the screening settings of the run (--slides).
Running it again embeds only what is missing, or was made from another checkpoint or other tiles.
"""

import argparse
from pathlib import Path

EPILOG = """writes OUT/<slide_id>.h5: features [n, d] (class token), features_mean (mean of patches), coords [n, 2] in level-0 px, energy, names;
TRIDENT and CLAM read them. OUT/embed.json says which checkpoint was used, and what failed. A checkpoint that is damaged is passed over for the
one before it, which is said. Exit code 3: done, with slides that failed or tiles that were left out.

examples:
  wavepath embed --checkpoint RUN --data TILES --out FEATURES
  wavepath embed --checkpoint RUN --slides SLIDES --mpp-csv mpp.csv --out FEATURES
  wavepath embed --checkpoint RUN --slides SLIDES --select wavelet --out FEATURES     # only the regions that screening selects
  wavepath embed --checkpoint RUN --slides SLIDES --coords TRIDENT_JOB/20x_512px_0px_overlap --out FEATURES    # rows in the coordinates' order
  wavepath embed --checkpoint RUN --untrained --data TILES --out UNTRAINED            # floors for `wavepath evaluate`: the same encoder, not trained,
  wavepath embed --colour-statistics --data TILES --out COLOURS                       # and the tiles' colours alone"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, metavar="RUN", help="run folder of `wavepath train` (its newest whole checkpoint)")
    parser.add_argument("--step", type=int, help="a particular checkpoint of the run")
    parser.add_argument("--untrained", action="store_true", help="the encoder of the run as it was before the first step: the floor of its learning")
    parser.add_argument("--colour-statistics", action="store_true", help="no encoder: mean and deviation of red, green, blue, haematoxylin and eosin"
                        " in each tile, the floor of any (with --slides, --checkpoint still says how slides are screened)")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--data", type=Path, help="a folder of `wavepath prepare`, or a folder of images")
    given.add_argument("--slides", type=Path, help="slides to read tiles from, with the run's screening settings")
    parser.add_argument("--out", type=Path, required=True, help="folder for the feature files")
    parser.add_argument("--batch-size", type=int, default=64, help="tiles at once, over all devices (default: 64)")
    parser.add_argument("--devices", type=int, default=0, help="use the first so many local devices (default: as the run, at most those here)")
    parser.add_argument(
        "--coords", type=Path, metavar="DIR_OR_H5", help="with --slides: TRIDENT's or CLAM's coordinates; their tiles in their order, no screening"
    )
    parser.add_argument("--tile-size", type=int, metavar="PX", help="with --coords: read tiles at this side (default: that of the coordinates)")
    parser.add_argument("--strict", action="store_true", help="with --coords: a slide without coordinates, or the reverse, is an error")
    parser.add_argument(
        "--select", choices=["all", "wavelet", "random", "threshold"], default=None,
        help="with --slides: tiles of which regions, as in `wavepath prepare` (default: all with tissue)",
    )
    parser.add_argument("--mpp-csv", default="", metavar="FILE", help="with --slides: table slide,mpp; overrules the files")
    parser.add_argument(
        "--slide-mpp", type=float, default=0.0, metavar="UM", help="with --slides: um per pixel of those not in --mpp-csv; overrules the files"
    )
    parser.add_argument(
        "--on-corrupt", choices=["error", "skip"], default="error", help="a tile that cannot be read: its slide fails, or the tile is left out"
    )


def run(args: argparse.Namespace) -> int:
    from wavepath.console import summary
    from wavepath.errors import EXIT_OK, EXIT_PARTIAL, ConfigError
    from wavepath.inference.embed import embed

    if args.coords is None and (args.tile_size is not None or args.strict):
        raise ConfigError("--tile-size and --strict go with --coords; give it, or leave them out")
    if args.coords is not None and args.select is not None:
        raise ConfigError("--coords takes tiles as they are given, so --select has no meaning beside it; leave it out")
    result = embed(
        args.checkpoint,
        args.out,
        data=args.data,
        slides=args.slides,
        step=args.step,
        batch_size=args.batch_size,
        select=args.select or "all",
        mpp_csv=args.mpp_csv,
        slide_mpp=args.slide_mpp,
        devices=args.devices,
        on_corrupt=args.on_corrupt,
        untrained=args.untrained,
        colours=args.colour_statistics,
        coords=args.coords,
        tile_size=args.tile_size or 0,
        strict=args.strict,
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
