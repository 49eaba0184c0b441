"""Enlarges a slide, or an image, by a trained super-resolution network into a pyramidal TIFF.

The network sees overlapping tiles of the low resolution alone; what they give is blended, so no seam is left. Memory does not grow with the
height of the slide. A call that was stopped goes on where it was when the same command is run again.
"""

import argparse

from wavepath.commands.slide_flags import add_shared, positive, shared

EPILOG = """writes OUT: a flat pyramidal BigTIFF (JPEG tiles), its mpp the input's divided by the scale; OpenSlide and QuPath read every level.
An input without a trustworthy mpp (none in the file, or a print resolution) is taken at its own pixels; the output then carries none. Tiles of
bare glass are enlarged by bicubic interpolation. While OUT is made, OUT.parts/ holds the finished rows; they are made anew where settings have
changed, and deleted at the end. Tiles are as large as the patches of the training, as in `wavepath evaluate --superres`. The attention of CWT-Net
takes time with the square of the tile for each pixel: --tile 32 is quicker.

examples:
  wavepath superres slide.svs --checkpoint RUN --out slide_2x.tiff
  wavepath superres slide.svs --checkpoint RUN --mpp 1.0 --out slide_2x.tiff                     # from 10x to 20x
  wavepath superres slide.svs --checkpoint RUN --region 4096,8192,2048,2048 --out region_2x.tiff # level-0 px
  wavepath superres photo.png --checkpoint RUN --scale 4 --out photo_4x.tiff"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser, 16)
    parser.add_argument("--scale", type=int, choices=[2, 4, 8], help="the factor that is expected (default: the run's; another is an error)")
    parser.add_argument("--tile", type=int, help="side of the tiles in px of the input (default: the training patch, at least 32)")
    parser.add_argument("--overlap", type=int, help="of tiles in px; a quarter of it at each end is not used (default: a quarter of the tile)")
    parser.add_argument("--mpp", type=positive, metavar="UM", help="read the slide at so many um per pixel (default: its own, level 0)")
    parser.add_argument("--no-skip", action="store_true", help="bare glass goes through the network as well")


def run(args: argparse.Namespace) -> int:
    from wavepath.console import duration, say, summary
    from wavepath.errors import EXIT_OK
    from wavepath.inference.superres import superres

    result = superres(args.slide, args.checkpoint, args.out, scale=args.scale, skip_blank=not args.no_skip, **shared(args))
    if result.whole:
        say(f"{args.out} is whole and was made from the same slide with the same settings: nothing to do")
    else:
        summary(
            "enlarged",
            [
                ("size", f"{result.width} x {result.height} px"),
                ("mpp", f"{result.mpp:g}" if result.mpp else "none (the input has none)"),
                ("tiles now", f"{result.tiles}, {result.filled} more of bare glass"),
                *([("from before", f"{result.reused} of {result.bands} bands")] if result.reused else []),
                ("time", f"{duration(result.seconds)}, {result.megapixels_per_second:.3g} Mpx/s"),
                ("file", f"{args.out}, {args.out.stat().st_size / 1e6:.1f} MB"),
            ],
        )
    return EXIT_OK
