"""Stains an H&E slide, or an image, virtually by a trained network, into a pyramidal TIFF.

The network sees overlapping tiles; what they give is blended. Tiles without tissue are left out. Memory does not grow with the height of the slide.
A call that was stopped goes on where it was when the same command is run again.
"""

import argparse

from wavepath.commands.slide_flags import add_shared, positive, shared

EPILOG = """writes OUT: a flat pyramidal BigTIFF (JPEG tiles); OpenSlide and QuPath read every level. Its ImageDescription says that the stain is
virtual, not of a laboratory and not for diagnosis, and names network, checkpoint and slide. The slide is read at the resolution of the training
(as fine as it has it), and so the output is; --mpp own reads level 0. An input without a trustworthy mpp is taken at its own pixels; the output
then carries none. Tiles without tissue (by an overview of the slide; of small images: of bare glass) take the colour of the slide's glass: ink and
dust would else stand beside the stain. While OUT is made, OUT.parts/ holds the finished rows; they are made anew where settings have changed, and
deleted at the end. Tiles are as large as the crops of the training: norms by the image (instance, group) and attention see one tile at a time, so
with either of them tiles overlap by half, else by a quarter.

examples:
  wavepath stain slide.svs --checkpoint RUN --out slide_ihc.tiff
  wavepath stain slide.svs --checkpoint RUN --region 4096,8192,2048,2048 --out region_ihc.tiff  # level-0 px
  wavepath stain slide.svs --checkpoint RUN --mpp own --all --out slide_ihc.tiff                # every pixel of level 0
  wavepath stain photo.png --checkpoint RUN --out photo_ihc.tiff"""


def _resolution(text: str) -> float | str:
    return text if text == "own" else positive(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, 4)
    parser.add_argument("--tile", type=int, help="side of the tiles in px as read (default: the training crop, at least 64)")
    parser.add_argument("--overlap", type=int, help="in px; a quarter of it at each end is not used (default: half a tile, or a quarter)")
    parser.add_argument(
        "--mpp", type=_resolution, metavar="UM|own", help="read the slide at so many um per pixel, or at its own (default: as trained)"
    )
    parser.add_argument("--all", action="store_true", help="glass goes through the network as well")


def run(args: argparse.Namespace) -> int:
    from wavepath.console import duration, say, summary
    from wavepath.errors import EXIT_OK
    from wavepath.inference.stain import stain

    result = stain(args.slide, args.checkpoint, args.out, everything=args.all, **shared(args))
    if result.whole:
        say(f"{args.out} is whole and was made from the same slide with the same settings: nothing to do")
        return EXIT_OK
    tiles = result.tiles + result.filled
    summary(
        "virtually stained",
        [
            ("size", f"{result.width} x {result.height} px"),
            ("mpp", f"{result.mpp:g}" if result.mpp else "none (the input has none)"),
            ("tiles now", f"{tiles}: {result.tiles} stained ({result.tiles / max(tiles, 1):.0%}), {result.filled} without tissue"),
            *([("from before", f"{result.reused} of {result.bands} bands")] if result.reused else []),
            ("time", f"{duration(result.seconds)}, {result.megapixels_per_second:.3g} Mpx/s"),
            ("file", f"{args.out}, {args.out.stat().st_size / 1e6:.1f} MB"),
        ],
    )
    return EXIT_OK
