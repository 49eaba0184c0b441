"""Slides to pyramids of aligned crops at several magnifications, to train super-resolution on; or single images to the same.

Each sample is one place at --levels magnifications with a common centre (1024, 512 and 256 px by default), read from the slide's own pyramid
where it has the level. OUT becomes a TFDS dataset with the splits train and test, which share no slide; OUT/samples.csv lists the samples,
OUT/manifest.csv the slides with counts and reasons, OUT/overview.jpg shows a few. Run the same command again after a stop, or with
more slides: what is whole is kept.
"""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wavepath.data.pyramids import PyramidResult

uses_config = True
EPILOG = """examples:
  wavepath pyramids --slides SLIDES --out PYRAMIDS                       # a grid over the tissue of every slide
  wavepath pyramids --slides SLIDES --coords places.csv --out PYRAMIDS   # slide,x,y[,label]: centres in level-0 pixels, header or none
  wavepath pyramids --slides SLIDES --out PYRAMIDS --levels 4 --per-slide 20 --labels labels.csv
  wavepath pyramids --images FOLDER --out PYRAMIDS                       # single images; lower levels by bicubic halving
  wavepath pyramids --images FOLDER --out PYRAMIDS --group-pattern '^([^_]+)_'   # images of one patient are on one side of the split

Places over the edge, or with less than --config.pyramids.min_tissue tissue, are left out and counted. 2x and 4x need three levels, 8x too, or four
to take its low resolution from the pyramid instead of by bicubic reduction. A slide that cannot be read is listed in OUT/manifest.csv with the
reason and the others go on: exit code 3; --strict stops instead. The fields behind --config.… are in wavepath/defaults.py (prepare_defaults)."""
# Flag -> field of the config; the flag wins over the config file, and --config.… over the flag.
_FIELDS = ("mpp", "size", "levels", "per_slide", "count", "split", "test_share", "codec")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--slides", type=Path, help="folder of slides (searched through its subfolders), or one slide")
    parser.add_argument("--images", type=Path, help="folder of single images (.jpg, .png, .tif), instead of --slides")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pyramids, made where it is missing")
    parser.add_argument("--config", default="configs/pyramids.py", help="config file, with its arguments behind a colon (default: %(default)s)")
    parser.add_argument("--coords", type=Path, help="table slide,x,y[,label] of centres in level-0 pixels (default: a grid over the tissue)")
    parser.add_argument("--size", type=int, help="side of the finest level in px, halved from level to level (default: 1024)")
    parser.add_argument("--levels", type=int, help="magnifications of each sample (default: 3)")
    parser.add_argument("--mpp", type=float, help="um per pixel of the finest level; coarser slides keep their own, 0: all do (default: 0.25, 40x)")
    parser.add_argument("--per-slide", type=int, help="at most so many samples of a slide, drawn evenly (default: 0, all)")
    parser.add_argument("--count", type=int, help="with --slides: at most so many of all, an even share of each slide (default: 0, all)")
    parser.add_argument("--split", choices=["slide", "sample"], help="what is never in both training and test (default: slide)")
    parser.add_argument("--test-share", type=float, help="share of the slides (or samples) for testing, at least one (default: 1/6)")
    parser.add_argument("--codec", choices=["png", "jpeg"], help="how crops are stored; a network learns JPEG's traces too (default: png)")
    parser.add_argument("--labels", type=Path, help="table case_id,slide_id,label: labels of the samples, and cases that the split keeps together")
    parser.add_argument("--group-pattern", default="", help="with --images: regular expression with one group that names an image's patient or slide")
    parser.add_argument("--slide-mpp", type=float, help="um per pixel of the slides or images themselves; overrules the files")
    parser.add_argument("--mpp-csv", type=Path, help="table slide,mpp with the um per pixel of single slides; overrules the files")
    parser.add_argument("--strict", action="store_true", help="stop at the first slide that gives no sample")
    parser.add_argument("--workers", type=int, default=2, help="threads that read and encode (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    from wavepath.config import load_config
    from wavepath.errors import ConfigError

    if bool(args.slides) == bool(args.images):
        raise ConfigError("give one of --slides SLIDES and --images FOLDER")
    if args.images and (args.coords or args.mpp_csv):
        raise ConfigError("--coords and --mpp-csv are for --slides; --images takes every image whole, and --slide-mpp for all of them")
    if args.images and args.count:
        raise ConfigError("--count is for --slides; --per-slide limits the crops of each image")
    if args.slides and args.group_pattern:
        raise ConfigError("--group-pattern is for --images; slides of one patient are named by case_id in --labels")
    if args.workers < 1:
        raise ConfigError(f"--workers is at least 1, not {args.workers}")
    flags = [f"pyramids.{flag}={getattr(args, flag)}" for flag in _FIELDS if getattr(args, flag) is not None]
    config = load_config(args.config, [*flags, *args.config_overrides])
    common = dict(slide_mpp=args.slide_mpp, labels=args.labels, strict=args.strict, workers=args.workers)
    if args.images:
        from wavepath.data.pyramid_images import make_image_pyramids

        result = make_image_pyramids(args.images, args.out, config, group_pattern=args.group_pattern, **common)
    else:
        from wavepath.data.pyramids import make_pyramids

        result = make_pyramids(args.slides, args.out, config, coords=args.coords, mpp_csv=args.mpp_csv, **common)
    _report(args.out, config.pyramids, result, "slides" if args.slides else "groups of images" if args.group_pattern else "images")
    return result.exit_code


def _report(out: Path, settings, result: "PyramidResult", what: str) -> None:
    from wavepath.console import duration, say, summary

    samples = result.count("tiles")
    by_mpp: dict[str, int] = {}
    for row in result.rows:
        if row.tiles:
            kind = "no mpp known" if row.finest_mpp is None else f"{row.finest_mpp:.4g} um/px" + (
                " (coarser than asked)" if settings.mpp and row.finest_mpp > settings.mpp * 1.01 else ""
            )
            by_mpp[kind] = by_mpp.get(kind, 0) + row.tiles
    whole = sum(row.status == "ok" for row in result.rows)
    dropped = {
        "blank": f"less than {settings.min_tissue:.0%} tissue", "edge": "over the edge", "small": f"below {settings.min_size} px",
        "unreadable": "cannot be read", "repeated": "named twice", "limit": "above --per-slide or --count",
    }
    left_out = [f"{result.count(name)} {text}" for name, text in dropped.items() if result.count(name)]
    rows: list[tuple[str, object]] = [
        (what, f"{whole} of {len(result.rows)} gave samples" + (f" ({result.reused} kept from before)" if result.reused else "")),
    ]
    rows += [(status, count) for status in ("failed", "empty") if (count := sum(row.status == status for row in result.rows))]
    rows += [("samples", f"{samples} of {result.count('places')} places"), ("left out", ", ".join(left_out) or "none")]
    if samples:
        train, test = (f"{result.count(name)} samples of {sum(getattr(row, name) > 0 for row in result.rows)} {what}" for name in ("train", "test"))
        levels = ", ".join(str(settings.size >> level) for level in range(settings.levels))
        rows += [
            ("train", train), ("test", test), ("levels", f"{settings.levels} ({levels} px)" if what == "slides" else settings.levels),
            ("finest level", ", ".join(f"{kind}: {count}" for kind, count in sorted(by_mpp.items()))),
        ]
        if what == "slides":
            own = [sum(str(level) in row.own_levels.split() for row in result.rows if row.tiles) for level in range(settings.levels)]
            rows.append(("own pixels", ", ".join(f"level {level} of {count} slides" for level, count in enumerate(own))))
        rows.append(("mean RGB", ", ".join(f"{value:.4f}" for value in result.mean) + " (training split)"))
    if result.seconds.get("total"):
        stages = ", ".join(f"{stage} {duration(result.seconds[stage])}" for stage in ("screen", "encode", "write"))
        rows.append(("time", f"{duration(result.seconds['total'])} ({stages}; encode is summed over threads)"))
    rows += [("manifest", out / "manifest.csv")] + ([("picture", out / "overview.jpg")] if samples else [])
    summary("pyramids" if samples else "nothing made", rows)
    bad = [row for row in result.rows if row.status != "ok"]
    for row in bad[:10]:
        say(f"  {row.status}: {row.slide_id}: {row.reason}")
    if len(bad) > 10:
        say(f"  and {len(bad) - 10} more in the manifest")
    if what == "slides" and samples < settings.count:
        say(f"{samples} samples are fewer than --count {settings.count}: not every slide has the places (or the tissue) for its share")
    if samples:
        say(f"next: wavepath train --config=configs/cwt_net.py:scale=2 --config.data.dir={shlex.quote(str(out))} --workdir=RUN")
