"""The flags that the commands which write slides share, and their values."""

import argparse
from pathlib import Path
from typing import Any


def add_shared(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """The slide, the run, the output, and how the slide is read and written."""
    parser.add_argument("slide", type=Path, metavar="SLIDE", help="one slide or image of any kind that `wavepath info` reads")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help="run folder of `wavepath train` (its newest whole checkpoint)")
    parser.add_argument("--step", type=int, help="a particular checkpoint of the run")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT.tiff", help="the file to write (OUT.ome.tiff: an OME-TIFF)")
    parser.add_argument("--batch-size", type=int, default=batch_size, help=f"tiles at once, over all devices (default: {batch_size})")
    parser.add_argument("--devices", type=int, default=0, help="use the first so many local devices (default: as the run, at most those here)")
    parser.add_argument("--slide-mpp", type=positive, metavar="UM", help="um per pixel of the slide; overrules the file")
    parser.add_argument("--region", type=region, metavar="X,Y,W,H", help="only this part, in level-0 px (default: all)")
    parser.add_argument("--quality", type=quality, default=90, help="of the JPEG tiles, 1 to 100 (default: 90)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it was made with other settings")


def shared(args: argparse.Namespace) -> dict[str, Any]:
    """What these flags, and the tiles' own, say, by the names of `inference.superres.superres` and `inference.stain.stain`."""
    names = ("step", "tile", "overlap", "batch_size", "mpp", "slide_mpp", "region", "devices", "quality", "overwrite")
    return {name: getattr(args, name) for name in names}


def region(text: str) -> tuple[int, int, int, int]:
    """x,y,width,height in level-0 pixels."""
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not x,y,width,height in whole level-0 pixels")
    return tuple(int(part) for part in parts)


def quality(text: str) -> int:
    """Of JPEG, 1 to 100."""
    if not text.isdigit() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 100")
    return int(text)


def positive(text: str) -> float:
    """Micrometres per pixel."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of micrometres per pixel")
    return value
