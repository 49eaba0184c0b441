"""The operators against their peers: one run, one process, one allocator, contenders in rotation, results compared before anything is timed.

wavelets: one level of the 2-D transform (mode symmetric, float32) forward, inverse, and forward+gradient (the bands and the gradient for
given cotangents), by wavepath, jaxwt, ptwt, pytorch_wavelets, PyWavelets and a plain copy (x * c), each in its native layout. The table has
wavepath's milliseconds and, for each other, the median of the rounds' own ratios: its time over wavepath's, so more than 1 is slower.
A contender whose numbers differ from the exact transform by more than 1e-4 is marked WRONG.

glcm: forward+gradient of `glcm_loss` on the 196 patches of each of 8 images (two offsets, sharpness 30), against the dense form in torch: time,
and temporary memory (ours as compiled, torch's as resident memory rises). Where the dense form needs more than 4 GB it works image by image
and one image counts eight times. Also counting whole images against scikit-image and, with --step, the loss as a share of a ViT-B MAE step.

The peers come with `pip install wavepath[bench]`; those that are not installed are named, and the others are measured.
"""

import argparse
import sys
from pathlib import Path

from wavepath.benchmarks.glcm import LEVELS
from wavepath.benchmarks.wavelet_peers import DIRECTIONS, PEERS
from wavepath.benchmarks.wavelets import SHAPES, WAVELETS

PARTS = ("wavelets", "glcm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="measure these parts alone")
    parser.add_argument("--wavelets", nargs="+", default=list(WAVELETS), metavar="NAME", help=f"(default: {' '.join(WAVELETS)})")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="NxHxWxC", help=f"(default: {' '.join(SHAPES)})")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS), help="(default: all)")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS), help="contenders (default: all)")
    parser.add_argument("--levels", type=int, nargs="+", default=list(LEVELS), help=f"of the GLCM loss (default: {' '.join(map(str, LEVELS))})")
    parser.add_argument("--batch", type=int, default=8, help="images of the GLCM loss (default: 8)")
    parser.add_argument("--step", action="store_true", help="also time a ViT-B MAE step (batch 4, some 10 GB; two minutes on two cores)")
    parser.add_argument("--runs", type=int, default=9, help="rounds, in each of which every contender has its turn (default: 9)")
    parser.add_argument("--threads", type=int, help="cores for XLA and threads for torch (default: every core this process may use)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write everything measured, every round, as JSON")
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="also write the tables as Markdown")


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """The same table for a document."""
    align = ["---" if index < 3 else "--:" for index in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, align, *rows])


def measure(args: argparse.Namespace, threads: int) -> dict[str, object]:
    """Everything asked for, as JSON values."""
    from wavepath.benchmarks import glcm, wavelets
    from wavepath.benchmarks.data import machine
    from wavepath.benchmarks.timing import allocator, versions

    try:
        import torch

        torch.set_num_threads(threads)
    except ImportError:
        pass  # each part names what it lacks
    names = ["jax", "jaxlib", "numpy", "jaxwt", "PyWavelets", "torch", "ptwt", "pytorch_wavelets", "scikit-image"]
    report = {"machine": machine(), "threads": threads, "allocator": allocator(), "versions": versions(names), "runs": args.runs}
    missing: dict[str, str] = {}
    if "wavelets" in args.only:
        report["wavelets"] = wavelets.measure(args.wavelets, args.shapes, args.directions, args.runs, args.peers, missing)
    if "glcm" in args.only:
        report["glcm"] = glcm.measure(args.levels, args.batch, args.runs, args.step, missing)
    return {**report, "missing": missing}


def heading(report: dict) -> list[str]:
    """What the numbers were taken on, and what is missing."""
    where = report["machine"]
    lines = [
        f"{where['cpu'] or 'unknown processor'}, {report['threads']} threads, load {where['load_at_start']} at the start, {report['runs']} rounds",
        f"allocator of every contender: {report['allocator']}",
        ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    ]
    return lines + [f"{name} is not installed and was left out: {command}" for name, command in report["missing"].items()]


def run(args: argparse.Namespace) -> int:
    """Measures and prints; the exit code. Speeds that miss their bound are reported and are no failure of the command."""
    from wavepath.benchmarks import glcm, wavelets
    from wavepath.benchmarks.timing import limit_cores, restart_with_huge_pages
    from wavepath.console import table
    from wavepath.errors import ConfigError
    from wavepath.files import atomic_path, write_json

    if min(args.runs, args.batch) < 1 or min(args.levels) < 2:
        raise ConfigError("--runs and --batch are at least 1, --levels at least 2")
    for shape in args.shapes:
        wavelets.parse_shape(shape)
    restart_with_huge_pages()
    threads = limit_cores(args.threads)
    from wavepath.ops.wavelets import filter_bank  # JAX, which takes its number of threads from the cores that are left

    for name in args.wavelets:
        filter_bank(name)
    report = measure(args, threads)
    text, document = ["\n".join(heading(report))], ["\n".join(f"* {line}" for line in heading(report))]
    tables = []
    if "wavelets" in report:
        tables.append((*wavelets.rows(report["wavelets"], args.peers), wavelets.bound_lines(report["wavelets"])))
    if "glcm" in report:
        tables.append((*glcm.rows(report["glcm"]), glcm.bound_lines(report["glcm"])))
    for header, rows, bounds in tables:
        text += [table(header, rows), "\n".join(bounds)]
        document += [markdown_table(header, rows), "\n".join(f"* {line}" for line in bounds)]
    if args.json:
        write_json(args.json, report)
    if args.markdown:
        with atomic_path(args.markdown) as path:
            path.write_text("\n\n".join(document) + "\n", encoding="utf-8")
    print("\n\n".join(text))
    sys.stdout.flush()
    return 0
