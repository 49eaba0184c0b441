"""Measures wavepath on this machine: `wavepath bench KIND`, each kind with its own `--help`.

`data` measures reading slides: 224-px tiles a second against OpenSlide on the same pixels, and encoding and writing apart.
`input` measures the training pipeline alone: images a second out of prepared tiles, a folder of images, or slides, with no model behind it.
`ops` measures the wavelet and co-occurrence operators against their peers.
`superres` measures a training step and inference of CWT-Net, with its attention in chunks and dense.
`stain` measures a training step and inference of CEFF against its parts and pix2pix, and the memory that it plans.
"""

import argparse
import importlib

# kind: (module under wavepath.benchmarks, one line). A module has `add_arguments(parser)` and `run(args) -> exit code`.
KINDS: dict[str, tuple[str, str]] = {
    "data": ("data", "reading slides against OpenSlide, encoding, writing"),
    "input": ("input", "the input pipeline alone: images a second"),
    "ops": ("ops", "wavelet and co-occurrence operators against their peers"),
    "superres": ("superres", "a step and inference of CWT-Net, attention in chunks and dense"),
    "stain": ("stain", "a step, inference and memory of CEFF, without its parts, and of pix2pix"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, (module_name, line) in KINDS.items():
        module = importlib.import_module(f"wavepath.benchmarks.{module_name}")
        sub = kinds.add_parser(
            kind, help=line, description=(module.__doc__ or line).strip(), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        module.add_arguments(sub)


def run(args: argparse.Namespace) -> int:
    module_name, _ = KINDS[args.kind]
    return importlib.import_module(f"wavepath.benchmarks.{module_name}").run(args)
