"""Attention of slides as pictures, QuPath objects and strips of tiles, from the files that `wavepath evaluate` wrote.

Attention files outlive the evaluation: they are drawn again here with another colour map or mode, for another class, or over the slides, without
any network.
"""

import argparse
from pathlib import Path

EPILOG = """writes for each file
  OUT/<slide>.png         the thumbnail beside the attention over it, a colour bar, a scale bar where the um per pixel are known
  OUT/<slide>.geojson     the tiles for QuPath (File > Import objects), with attention and its rank as measurements
  OUT/<slide>_tiles.png   the tiles with the most and the least attention, where there are pixels to show
Without --tiles or --slides the attention is drawn on white. Ranks are drawn by default: attention sums to one over a slide, and a few tiles may
hold nearly all of it.

examples:
  wavepath heatmap OUT/attention --tiles TILES --out heatmaps
  wavepath heatmap OUT/attention/case_1.h5 --slides SLIDES --out heatmaps
  wavepath heatmap OUT/attention/case_1.h5 --slides case_1.svs --slide-mpp 0.25 --mode minmax --colormap viridis --out heatmaps
  wavepath heatmap OUT/attention --class tumour --out heatmaps        # of a network with attention for each class (CLAM-MB)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from wavepath.commands.slide_flags import positive

    parser.add_argument("attention", type=Path, nargs="+", metavar="ATTENTION", help="attention files (*.h5) of `wavepath evaluate`, or folders")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--tiles", type=Path, help="the prepared folder of the slides: thumbnails and tiles")
    given.add_argument("--slides", type=Path, metavar="SLIDES", help="or the slides themselves: a folder, or one slide")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--mode", choices=["rank", "minmax", "none"], default="rank",
                        help="colours by the tile's rank in its slide, from lowest to highest, or by the value itself (default: rank)")
    parser.add_argument("--colormap", default="magma", metavar="NAME", help="of matplotlib (default: magma)")
    parser.add_argument("--class", dest="of_class", default="", metavar="LABEL", help="attention of this class (default: of the predicted one)")
    parser.add_argument("--count", type=int, default=8, metavar="N", help="tiles shown with most and with least attention; 0: none (default: 8)")
    parser.add_argument("--mpp-csv", type=Path, metavar="FILE", help="with --slides: table slide,mpp, for the scale bars; overrules the files")
    parser.add_argument("--slide-mpp", type=positive, metavar="UM", help="with --slides: um per pixel of those not in --mpp-csv; overrules the files")


def run(args: argparse.Namespace) -> int:
    from wavepath.console import progress, summary, warn
    from wavepath.errors import EXIT_NOTHING, EXIT_OK, EXIT_PARTIAL, ConfigError, WavepathError
    from wavepath.evaluation.attention_pictures import draw_attention
    from wavepath.evaluation.slide_pictures import open_pixels
    from wavepath.files import writable_folder
    from wavepath.interop.attention import read_attention

    if args.count < 0:
        raise ConfigError(f"--count {args.count} is not a number of tiles")
    if (args.mpp_csv or args.slide_mpp) and not args.slides:
        raise ConfigError("--mpp-csv and --slide-mpp belong to --slides; a prepared folder knows the um per pixel itself")
    files = _files(args.attention)
    out = writable_folder(args.out)
    drawn: list[dict[str, str]] = []
    failed = bare = 0
    with open_pixels(args.tiles, args.slides, args.mpp_csv, args.slide_mpp) as pixels, progress("heatmaps", len(files), "slides") as bar:
        for slide_id, path in files.items():
            try:
                found = read_attention(path, slide_id)
                shown = draw_attention(
                    out, slide_id, found, pixels=pixels, mode=args.mode, colormap=args.colormap, of_class=args.of_class, count=args.count
                )
            except ConfigError:
                raise  # it would be the same for every slide
            except WavepathError as error:
                failed += 1
                warn(f"{slide_id}: {error}")
            else:
                drawn += shown
                bare += pixels is not None and not any(picture["kind"] == "tiles" for picture in shown) and args.count > 0
            bar.advance(1, slide_id)
    rows = [("slides", f"{len(files) - failed} of {len(files)}"), ("folder", out)]
    if bare:
        rows.insert(1, ("without tiles", f"{bare}: their slides are not in {args.tiles or args.slides}, or cannot be read"))
    summary("drawn", rows)
    return EXIT_OK if not failed else EXIT_NOTHING if failed == len(files) else EXIT_PARTIAL


def _files(given: list[Path]) -> dict[str, Path]:
    """Slide id -> attention file; an id is the path below the folder that was given."""
    from wavepath.errors import DatasetError
    from wavepath.interop.features import list_features

    files: dict[str, Path] = {}
    for path in given:
        if not path.exists():
            raise DatasetError(f"{path} is not there; give attention files (*.h5) as `wavepath evaluate --mil` or --bags wrote them, or their folder")
        if path.is_dir() and not any(path.rglob("*.h5")):
            raise DatasetError(f"{path} holds no attention file (*.h5); give OUT/attention of `wavepath evaluate --mil` or --bags")
        for name, file in list_features(path) if path.is_dir() else [(path.name.removesuffix(".h5"), path)]:
            if files.setdefault(name, file) != file:
                raise DatasetError(f"{files[name]} and {file} would both be drawn as {name}; draw them into folders of their own")
    return files
