"""Compares runs: the final values of each setting as mean and spread over its seeds, and the curves.

RUN is a run folder, or a folder of runs such as a sweep's. Runs of a sweep are grouped by arm, other runs by their config without the
seed. The table goes to standard output; with --out also comparison.csv, comparison.md, curves.png (mean, band of one
standard deviation) and panels.png (the last reconstructions of each setting's first seed, side by side).
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `wavepath compare`."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a --workdir of train or sweep")
    parser.add_argument("--metric", action="append", default=[], metavar="NAME", help="a metric or a pattern such as 'knn.*'; may be given again")
    parser.add_argument("--out", type=Path, help="folder for the table and the curves")


def run(args: argparse.Namespace) -> int:
    """Prints the table, and writes it with the curves where asked."""
    from wavepath.console import summary
    from wavepath.evaluation.compare import compare, text_table
    from wavepath.files import writable_folder

    if args.out:
        writable_folder(args.out)
    comparison = compare(args.runs, metrics=args.metric, out=args.out)
    print(text_table(comparison))
    rows = [("runs", sum(len(group.runs) for group in comparison.groups)), ("settings", len(comparison.groups))]
    if args.out:
        curves = args.out / "curves.png"
        rows += [("table", args.out / "comparison.csv"), ("curves", curves if curves.is_file() else "none: no metric was logged over steps")]
        panels = args.out / "panels.png"
        rows.append(("pictures", panels if panels.is_file() else "none: fewer than two settings have panels, or not of the same examples and masks"))
    summary("compared", rows)
    return 0
