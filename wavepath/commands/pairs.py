"""Pairs of H&E and immunostain to a dataset for virtual staining, each pair checked: sizes, shift, tissue, focus.

Give folders HE/ and IHC/ of equal names, images with both sides beside each other, or a table. OUT becomes a TFDS dataset with the splits train and
test, which share no slide; OUT/pairs.csv lists every pair with its estimated shift and how sure it is, OUT/manifest.csv the slides,
OUT/overview.jpg shows a few with a checkerboard of both sides. Run the same command again after a stop, or with more pairs: what is whole is kept.
"""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wavepath.data.pairs import PairsResult

uses_config = True
EPILOG = """examples:
  wavepath pairs --folders ROOT --out PAIRS                                    # ROOT/HE/a.png with ROOT/IHC/a.png
  wavepath pairs --folders MIST --out PAIRS --group-pattern '^([^_]+)_'        # pairs of one slide are on one side of the split
  wavepath pairs --folders BCI --out PAIRS --label-pattern '_([0-3][+]?)$' --split-pattern '_(train|test)_'
  wavepath pairs --ab FOLDER --out PAIRS                                       # both sides in one image, H&E to the left
  wavepath pairs --csv pairs.csv --out PAIRS                                   # he,ihc[,slide,label,split]
  wavepath pairs --folders ROOT --out PAIRS --max-shift 8 --on-shift correct   # cut both sides to what they share

The shift is estimated from the densities of both stains. Serial sections may be too different for it: each shift comes with how far it stands out
(peak), and only what is `sure` is dropped or corrected. Pairs of unequal size, and files that cannot be read, are listed and left out: exit
code 3. Without --group-pattern each pair counts as a slide of its own. The fields behind --config.… are in wavepath/defaults.py."""
# Flag -> field of the config; the flag wins over the config file, and --config.… over the flag.
_FIELDS = ("max_shift", "on_shift", "on_unsure", "test_share", "codec")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folders", type=Path, metavar="ROOT", help="folder with HE/ and IHC/, whose images have equal names")
    parser.add_argument("--ab", type=Path, metavar="FOLDER", help="folder of images with both sides beside each other, H&E to the left")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="table he,ihc[,slide,label,split]; paths absolute or relative to it")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pairs, made where it is missing")
    parser.add_argument("--config", default="configs/pairs.py", help="config file, with its arguments behind a colon (default: %(default)s)")
    parser.add_argument("--max-shift", type=float, metavar="PX", help="shift above which a pair counts as shifted (default: 16)")
    parser.add_argument("--on-shift", choices=["keep", "drop", "correct"], help="what becomes of such a pair (default: keep, and list it)")
    parser.add_argument("--on-unsure", choices=["keep", "drop"], help="what becomes of a pair whose shift cannot be told (default: keep)")
    parser.add_argument("--group-pattern", default="", help="regular expression with one group that reads the slide from a pair's name")
    parser.add_argument("--label-pattern", default="", help="likewise its label, such as the HER2 score")
    parser.add_argument("--split-pattern", default="", help="likewise train or test; otherwise slides are drawn")
    parser.add_argument("--test-share", type=float, help="share of the slides for testing where they are drawn, at least one (default: 1/6)")
    parser.add_argument("--codec", choices=["png", "jpeg"], help="how images are stored; a network learns JPEG's traces too (default: png)")
    parser.add_argument("--mpp", type=float, help="um per pixel of the images, where known")
    parser.add_argument("--strict", action="store_true", help="stop at the first slide of which no pair is stored")
    parser.add_argument("--workers", type=int, default=2, help="threads that read, compare and encode (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    from wavepath.config import load_config
    from wavepath.errors import ConfigError

    ways = {"folders": args.folders, "ab": args.ab, "csv": args.csv}
    if sum(way is not None for way in ways.values()) != 1:
        raise ConfigError("give one of --folders ROOT, --ab FOLDER and --csv FILE")
    if args.workers < 1:
        raise ConfigError(f"--workers is at least 1, not {args.workers}")
    flags = [f"pairs.{flag}={getattr(args, flag)}" for flag in _FIELDS if getattr(args, flag) is not None]
    config = load_config(args.config, [*flags, *args.config_overrides])
    from wavepath.data import pair_files
    from wavepath.data.pairs import make_pairs

    (way, given), = ((name, path) for name, path in ways.items() if path is not None)
    pairs = {"folders": pair_files.from_folders, "ab": pair_files.from_ab, "csv": pair_files.from_csv}[way](given)
    pairs = pair_files.with_patterns(pairs, args.group_pattern, args.label_pattern, args.split_pattern)
    root = given.parent if way == "csv" else given
    result = make_pairs(pairs, root, args.out, config, mpp=args.mpp, strict=args.strict, workers=args.workers)
    _report(args.out, config.pairs, result, bool(args.group_pattern) or any(pair.slide != pair.name for pair in pairs))
    return result.exit_code


def _report(out: Path, settings, result: "PairsResult", grouped: bool) -> None:
    from wavepath.console import duration, say, summary
    from wavepath.data.pair_records import STORED

    stored = result.count("tiles")
    what = "slides" if grouped else "pairs taken as slides"
    kept = f" ({result.reused} {what} kept from before)" if result.reused else ""
    rows: list[tuple[str, object]] = [("pairs", f"{stored} of {len(result.pairs)} stored{kept}")]
    if stored:
        rows += [(split, f"{result.count(split)} of {sum(getattr(row, split) > 0 for row in result.rows)} {what}") for split in ("train", "test")]
    done = {"keep": "kept", "drop": "left out", "correct": f"{result.count('corrected')} corrected"}
    told = [row for row in result.pairs if row.sure]
    if told:
        lengths = sorted((row.dx**2 + row.dy**2) ** 0.5 for row in told)
        rows.append(("shift", f"median {lengths[len(lengths) // 2]:.1f} px, largest {lengths[-1]:.1f} px, where it is sure ({len(told)} pairs)"))
    rows += [
        ("shifted", f"{result.count('shifted')} by more than {settings.max_shift:g} px: {done[settings.on_shift]}"),
        ("not sure", f"{result.count('unsure')} pairs whose shift cannot be told: {done[settings.on_unsure]}; look at them in the picture"),
        ("out of focus", f"{result.count('blurred')} pairs with a side that seems to be"),
        ("left out", f"{result.count('bad')} unreadable or of two sizes, {result.count('small')} too small"),
    ]
    if result.seconds.get("total"):
        rows.append(("time", duration(result.seconds["total"])))
    rows += [("table", out / "pairs.csv")] + ([("picture", out / "overview.jpg")] if stored else [])
    summary("pairs" if stored else "nothing stored", rows)
    rest = [row for row in result.pairs if row.status != STORED]
    for row in rest[:10]:
        say(f"  {row.status}: {row.name}: {row.reason}")
    if len(rest) > 10:
        say(f"  and {len(rest) - 10} more in the table")
    if stored:
        say(f"next: wavepath train --config=configs/ceff_encoders.py --config.data.dir={shlex.quote(str(out))} --workdir=ENCODERS")
