"""Measures wavepath on this machine: `wavepath bench KIND`, each kind with its own `--help`.

`step` measures a training step of any config on a synthetic batch: images a second, FLOPs, memory; backends, variants and PyTorch beside it.
`compile` measures how long a config's step takes to compile, cold and from the persistent cache.
`train` measures training end to end on real tiles, with the step alone and the input alone beside it, and the share of time spent waiting for data.
`data` measures reading slides: 224-px tiles a second against OpenSlide on the same pixels, and encoding and writing apart. It is not the input
pipeline of training, which is `input`.
`prepare` measures slides to tiles from start to end: in one process, and on several by Apache Beam.
`input` measures the training pipeline alone: images a second out of prepared tiles, a folder of images, or slides, with no model behind it.
`ops` measures the wavelet and co-occurrence operators against their peers.
`superres` measures a training step and inference of CWT-Net, with its attention in chunks and dense.
`stain` measures a training step and inference of CEFF against its parts and pix2pix, and the memory that it plans.

Each writes what it measured with `--json`, and `--compare OLD.json` sets such a file of an earlier time beside it.
"""

import argparse
import importlib
import os
import tempfile
from pathlib import Path

uses_config = True
EPILOG = """examples:
  wavepath bench step --config=configs/wise_mae.py:variant=S --config.model.dtype=float32 --batch 16 --peer torch --json step.json
  wavepath bench step --config=configs/cwt_net.py:cpu --backend jit pmap shard_map
  wavepath bench step --config=configs/wise_mae.py:variant=L --batch 64 --vary model.remat=none,dots,full
  wavepath bench compile --config=configs/wise_mae.py:variant=B --vary model.scan=false,true
  wavepath bench train --config=configs/wise_mae.py:quickstart --data TILES
  wavepath bench data --compare data_last_month.json"""

# kind: (module under wavepath.benchmarks, one line). A module has `add_arguments(parser)` and `run(args) -> exit code`.
KINDS: dict[str, tuple[str, str]] = {
    "step": ("step", "a training step of any config: images a second, FLOPs, memory, PyTorch beside it"),
    "compile": ("compile", "compiling a config's step, cold and from the persistent cache"),
    "train": ("train", "training end to end, the step alone, the input alone"),
    "data": ("data", "reading slides against OpenSlide, encoding, writing (the input pipeline is `input`)"),
    "prepare": ("prepare", "slides to tiles from start to end, in one process and by Apache Beam"),
    "input": ("input", "the input pipeline alone, tiles to batches: images a second"),
    "ops": ("ops", "wavelet and co-occurrence operators against their peers"),
    "superres": ("superres", "a step and inference of CWT-Net, attention in chunks and dense"),
    "stain": ("stain", "a step, inference and memory of CEFF, without its parts, and of pix2pix"),
}
WITH_CONFIG = ("step", "compile", "train")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, (module_name, line) in KINDS.items():
        module = importlib.import_module(f"wavepath.benchmarks.{module_name}")
        sub = kinds.add_parser(
            kind, help=line, description=(module.__doc__ or line).strip(), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        module.add_arguments(sub)
        sub.add_argument("--compare", type=Path, metavar="OLD.json", help="also a table of what differs from an earlier --json file of this kind")


def run(args: argparse.Namespace) -> int:
    from wavepath.errors import ConfigError

    if args.config_overrides and args.kind not in WITH_CONFIG:
        raise ConfigError(f"wavepath bench {args.kind} has no config, so it takes no --config.{args.config_overrides[0].partition('=')[0]}")
    module = importlib.import_module(f"wavepath.benchmarks.{KINDS[args.kind][0]}")
    from wavepath.benchmarks import compare
    from wavepath.files import read_json, write_json

    # Read first: a file that is not there, or of another kind, is said before minutes of measuring.
    old = None if args.compare is None else compare.read(args.compare, args.kind)
    if old is None and args.json is None:
        return module.run(args)
    kept = args.json
    # Of this process: a kind may start it anew, with the same number.
    args.json = kept or Path(tempfile.gettempdir()) / f"wavepath-bench-{os.getpid()}.json"
    try:
        code = module.run(args)
        report = {"kind": args.kind, **read_json(args.json)}
        if old is not None:
            print("\n" + compare.text(old, report, args.compare.name))
        if kept is not None:
            write_json(kept, report)
    finally:
        if kept is None:
            args.json.unlink(missing_ok=True)
    return code
