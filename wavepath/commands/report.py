"""One self-contained HTML page: what screening chose, how training went, what the probes say.

Shows for each slide the thumbnail, tissue contour, energy map, chosen and rejected regions with examples; then training curves,
reconstructions and probe numbers. The page needs no other file and no network.
"""

import argparse
from pathlib import Path

EPILOG = """examples:
  wavepath report RUN --out report.html
  wavepath report TILES --out screening.html      a prepared folder alone: what screening chose, before any training
  wavepath report OUT --out evaluation.html       a folder of `wavepath evaluate` alone: tables, ROC, maps of features, heatmaps, tiles"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of `wavepath train`, or a folder of `wavepath prepare` or `evaluate`")
    parser.add_argument("--out", type=Path, required=True, help="HTML file to write")
    parser.add_argument("--data", type=Path, help="prepared folder (default: the run's data.dir)")
    parser.add_argument("--evaluation", type=Path, help="folder of `wavepath evaluate` (default: RUN/evaluation)")
    parser.add_argument("--max-slides", type=int, default=12, help="slides shown with pictures (default: 12)")


def run(args: argparse.Namespace) -> int:
    from wavepath.console import summary
    from wavepath.evaluation.report import write_report

    path = write_report(args.run, args.out, tiles=args.data, evaluation=args.evaluation, max_slides=args.max_slides)
    summary("report", [("page", path), ("size", f"{path.stat().st_size / 1e6:.1f} MB")])
    print(path)
    return 0
