"""`wavepath phantom`: makes procedural H&E slides with known truth, stained pairs, or texture classes of equal histograms."""

import argparse
import time

DESCRIPTION = """\
Makes procedural H&E slides, for a first try without data, for tests and for benchmarks.

Writes to --out:
  phantom_000.tiff, ...         slides: pyramidal TIFF, read by OpenSlide, QuPath, TRIDENT and every command here
  regions/phantom_000.geojson   outlines of tumour, gland, stroma, lymphocytes, fat, and of the artefacts pen, fold and blur
  labels.csv                    case_id,slide_id,label with the labels tumour and normal

or, with --pairs N, the same tissue in H&E and in an immunostain with known positive cells, a little misaligned as serial sections are:
  HE/s000_0.png, IHC/s000_0.png, DAB/s000_0.png (where the brown is), ...   up to four pairs of one slide, s000
  truth.csv                     share of positive cells, area of DAB, shift, for each pair

or, with --textures N, images of six texture classes that have the same histogram and differ in co-occurrence alone:
  horizontal/horizontal_0000.png, ...   the folder names the class

The same seed gives the same files. A slide of 8192 px takes about 20 seconds of one core and 15 MB."""

EPILOG = """\
examples:
  wavepath phantom --out slides
  wavepath phantom --out tiny --slides 2 --size 2048
  wavepath phantom --out large --slides 1 --size 40000
  wavepath phantom --out others --slides 12 --seed 1 --name other     # slides to pretrain on, beside those of seed 0
  wavepath phantom --out stained --pairs 40 --size 256
  wavepath phantom --out textures --textures 60 --size 112
next:
  wavepath prepare --slides slides --out tiles --labels slides/labels.csv"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's flags."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder to write to; slides of the same names are replaced"
    )
    parser.add_argument(
        "--slides",
        type=int,
        metavar="N",
        help="number of slides, alternately tumour and normal (default: 8)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the set (default: 0)")
    parser.add_argument("--name", help="stands before the slides' numbers (default: phantom); sets used together want different ones")
    parser.add_argument(
        "--size",
        type=int,
        default=None,
        metavar="PX",
        help="side in pixels: of a slide, from 512 (default: 8192), of a pair, 64 to 2048 (default: 512), of a texture, from 16 (default: 224)",
    )
    parser.add_argument(
        "--textures", type=int, default=None, metavar="N", help="make N images of each texture class instead of slides"
    )
    parser.add_argument("--pairs", type=int, metavar="N", help="make N pairs of H&E and immunostain instead of slides")
    parser.add_argument(
        "--mpp",
        type=float,
        metavar="UM",
        help="micrometres per pixel, 0.1 to 0.5 (default: 0.25, a 40x scan; of pairs 0.5)",
    )


def run(args: argparse.Namespace) -> int:
    """Makes the slides; 0 when all are whole."""
    from pathlib import Path

    from wavepath import console
    from wavepath.data.phantom import make_phantoms
    from wavepath.errors import EXIT_OK

    start = time.monotonic()
    out = Path(args.out)
    if args.textures is not None:
        return _textures(out, args)
    if args.pairs is not None:
        return _pairs(out, args)
    slides, size, mpp = (default if given is None else given for given, default in ((args.slides, 8), (args.size, 8192), (args.mpp, 0.25)))
    paths = make_phantoms(out, slides, args.seed, size, mpp, **({} if args.name is None else {"name": args.name}))
    volume = sum(path.stat().st_size for path in paths) / 1e6
    console.summary(
        "phantom slides made",
        [
            ("slides", f"{len(paths)} of {size} x {size} px at {mpp:g} um per pixel, {volume:.0f} MB"),
            ("folder", out),
            ("labels", out / "labels.csv"),
            ("regions", out / "regions"),
            ("took", console.duration(time.monotonic() - start)),
        ],
    )
    return EXIT_OK


def _textures(out, args: argparse.Namespace) -> int:
    from wavepath import console
    from wavepath.data.phantom_textures import CLASSES, make_textures
    from wavepath.errors import EXIT_OK, ConfigError

    for name in ("slides", "pairs", "mpp", "name"):
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name} belongs to slides or pairs; leave it out with --textures, which makes plain images")
    size = 224 if args.size is None else args.size
    make_textures(out, args.textures, args.seed, size)
    rows = [("images", f"{args.textures} of {size} x {size} px in each of {len(CLASSES)} classes"), ("folder", out), ("classes", ", ".join(CLASSES))]
    console.summary("phantom textures made", rows)
    return EXIT_OK


def _pairs(out, args: argparse.Namespace) -> int:
    import shlex

    from wavepath import console
    from wavepath.data.phantom_pairs import GROUP_PATTERN, MPP, make_phantom_pairs
    from wavepath.errors import EXIT_OK, ConfigError

    if args.slides is not None:
        raise ConfigError("--slides and --pairs are two kinds of phantoms; give one of them")
    if args.name is not None:
        raise ConfigError("--name belongs to slides; leave it out with --pairs")
    start = time.monotonic()
    size, mpp = (default if given is None else given for given, default in ((args.size, 512), (args.mpp, MPP)))
    paths = make_phantom_pairs(out, args.pairs, args.seed, size, mpp)
    slides = len({path.stem.rsplit("_", 1)[0] for path in paths})
    console.summary(
        "phantom pairs made",
        [
            ("pairs", f"{len(paths)} of {size} x {size} px at {mpp:g} um per pixel, of {slides} slides"),
            ("folder", out),
            ("truth", out / "truth.csv"),
            ("took", console.duration(time.monotonic() - start)),
        ],
    )
    console.say(f"next: wavepath pairs --folders {shlex.quote(str(out))} --group-pattern '{GROUP_PATTERN}' --mpp {mpp:g} --out PAIRS")
    return EXIT_OK
