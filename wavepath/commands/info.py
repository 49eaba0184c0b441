"""Shows what a slide is: size, levels, pixel size and where it comes from, vendor, objective, compression, tiles, backend.

Of a folder every slide in it is shown. A slide without a usable pixel size is shown with the reason.
"""

import argparse
from pathlib import Path

EPILOG = """examples:
  wavepath info slides/phantom_000.tiff
  wavepath info SLIDES --json | jq '.[] | [.id, .mpp]'"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("slide", type=Path, metavar="SLIDE", help="a slide, any file of a DICOM series, or a folder of slides")
    parser.add_argument("--json", action="store_true", help="print JSON on standard output: one object, or a list for a folder")


def describe(path: Path, name: str) -> dict[str, object]:
    """Everything that `wavepath info` shows of one slide, as JSON values.

    Raises:
        SlideError: the slide cannot be opened.
    """
    from wavepath.data.slides import open_slide

    with open_slide(path) as slide:
        return {
            "id": name,
            "path": str(path),
            "width": slide.dimensions[0],
            "height": slide.dimensions[1],
            "levels": [
                {"width": level.width, "height": level.height, "downsample": level.downsample, "tile": list(tile)}
                for level, tile in zip(slide.levels, slide.tile_sizes, strict=True)
            ],
            "mpp": slide.mpp,
            "mpp_source": slide.mpp_source,
            "mpp_refused": list(slide.mpp_refused),
            "vendor": slide.vendor,
            "objective": slide.objective,
            "compression": slide.compression,
            "backend": slide.backend,
            "bytes": path.stat().st_size,
        }


def as_text(info: dict) -> str:
    """The same for people: one line a field, one a level."""
    if info["mpp"] is not None:
        mpp = f"{info['mpp']:.5g} um per pixel (from {info['mpp_source']})"
    else:
        mpp = f"none ({'; '.join(info['mpp_refused']) or 'the metadata name none'}); give it with --mpp-csv or --slide-mpp"
    rows = [
        ("path", info["path"]),
        ("size", f"{info['width']} x {info['height']} px, {info['bytes'] / 1e6:.1f} MB in this file"),
        ("mpp", mpp),
        ("objective", f"{info['objective']:g}x" if info["objective"] else "not stated"),
        ("vendor", info["vendor"] or "not stated"),
        ("compression", info["compression"] or "not stated"),
        ("read by", info["backend"]),
    ]
    for number, level in enumerate(info["levels"]):
        scale = f", {info['mpp'] * level['downsample']:.4g} um per pixel" if info["mpp"] else ""
        text = f"{level['width']} x {level['height']}, 1/{level['downsample']:.6g}{scale}, read in tiles of {level['tile'][0]} x {level['tile'][1]}"
        rows.append((f"level {number}", text))
    return "\n".join([str(info["id"]), *(f"  {name:<12} {text}" for name, text in rows)])


def run(args: argparse.Namespace) -> int:
    import json

    from wavepath.console import progress, warn
    from wavepath.data.slides import find_slides
    from wavepath.errors import EXIT_NOTHING, EXIT_OK, EXIT_PARTIAL, SlideError

    refs = find_slides(args.slide)
    if args.slide.is_file():
        found, failed = [describe(refs[0].path, refs[0].id)], 0
    else:
        found, failed = [], 0
        with progress("slides", len(refs), "slides") as bar:
            for ref in refs:
                try:
                    found.append(describe(ref.path, ref.id))
                except SlideError as error:
                    warn(str(error))
                    failed += 1
                bar.advance(1, ref.id)
    if args.json:
        print(json.dumps(found[0] if args.slide.is_file() else found, indent=2, ensure_ascii=False))
    elif found:
        print("\n".join(as_text(info) for info in found))
    return EXIT_OK if not failed else EXIT_PARTIAL if found else EXIT_NOTHING
