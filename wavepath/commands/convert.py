"""Tiles and features in the formats of other tools: TRIDENT and CLAM (coordinates, features), QuPath (tissue, regions, tile scores).

SOURCE is a folder of `wavepath prepare` (tiles) or of `wavepath embed` (features), or one of TRIDENT's or CLAM's features. Positions and sizes are
the true ones whatever the scanner's resolution; what a format cannot say exactly is told.
"""

import argparse
from pathlib import Path

EPILOG = """writes
  trident   OUT/20x_224px_0px_overlap/patches/<slide>_patches.h5, and of features OUT/20x_224px_0px_overlap/features_<encoder>/<slide>.h5
  clam      OUT/patches/<slide>.h5, of features OUT/h5_files/<slide>.h5 and OUT/pt_files/<slide>.pt, OUT/process_list_autogen.csv,
            and with labels OUT/dataset.csv (case_id,slide_id,label)
  geojson   OUT/<slide>.geojson for QuPath: tissue as annotations, screened regions and tiles as tile objects with measurements
Back in: `wavepath prepare --coords` and `wavepath embed --coords` take TRIDENT's and CLAM's coordinates, `wavepath evaluate` their features.
Exit code 3: done, with slides that could not be converted.

examples:
  wavepath convert TILES --to trident --out TRIDENT
  wavepath convert FEATURES --to clam --out CLAM --labels labels.csv
  wavepath convert FEATURES --to trident --out TRIDENT --column features_mean      # the mean of the patches in place of the class token
  wavepath convert TILES --to geojson --out QUPATH --layers tissue,regions"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder of `wavepath prepare` or `wavepath embed`, or of other tools' features")
    parser.add_argument("--to", required=True, choices=["trident", "clam", "geojson"], help="the format")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files, made where it is missing")
    parser.add_argument(
        "--slides", type=Path, help="the slides, where they are no longer where SOURCE was made from them (CLAM's levels, the slides' sizes)"
    )
    parser.add_argument("--labels", type=Path, help="of clam: table case_id,slide_id,label for dataset.csv (default: the labels given to prepare)")
    parser.add_argument("--layers", default="tissue,regions,tiles", help="of geojson: what to draw (default: %(default)s)")
    parser.add_argument("--column", default="features", help="which features of SOURCE to write, such as features_mean (default: %(default)s)")
    parser.add_argument("--encoder", default="", help="the name that features go by (default: the one in SOURCE)")
    parser.add_argument("--strict", action="store_true", help="stop at the first slide that cannot be converted")


def run(args: argparse.Namespace) -> int:
    from wavepath.console import say, summary
    from wavepath.data.exchange import convert
    from wavepath.data.slides import read_labels
    from wavepath.data.tile_sets import open_tile_set
    from wavepath.errors import EXIT_OK, EXIT_PARTIAL, ConfigError

    if args.labels is not None and args.to != "clam":
        raise ConfigError("--labels goes with --to clam, whose dataset table it makes; leave it out")
    source = open_tile_set(args.source, slides=args.slides, column=args.column, encoder=args.encoder)
    try:
        result = convert(
            source, args.out, args.to, labels=read_labels(args.labels) if args.labels else (),
            layers=[layer.strip() for layer in args.layers.split(",") if layer.strip()], strict=args.strict,
        )
    finally:
        source.close()
    for note in result.notes[:10]:
        say(note)
    if len(result.notes) > 10:
        say(f"and {len(result.notes) - 10} more like these")
    summary(f"converted to {args.to}", [
        ("slides", f"{result.done} of {result.total}" + (f", {len(result.failed)} failed" if result.failed else "")), ("tiles", result.tiles),
        *(("folder", folder) for folder in result.folders),
    ])
    return EXIT_PARTIAL if result.failed else EXIT_OK
