"""Trains the task of a config: pretraining, fine-tuning, slides, super-resolution, staining; on tiles, images, features, or streamed from slides.

Run the same command again to go on after a kill, a signal or a crash: the run continues from its last whole checkpoint and ends with the
same parameters. Without --config.data.dir and --config.data.slides it trains on small phantom slides that it makes in RUN.
"""

import argparse
import shlex
from pathlib import Path
from typing import Any

uses_config = True
EPILOG = """examples:
  wavepath train --config=configs/wise_mae.py:smoke --workdir=RUN                                   # seconds, nothing else needed
  wavepath train --config=configs/wise_mae.py:variant=S --config.data.dir=TILES --workdir=RUN
  wavepath train --config=configs/wise_mae.py --config.data.slides=SLIDES --workdir=RUN
  wavepath train --config=configs/glcm_mae.py:tissue,variant=S --config.data.dir=TILES --workdir=RUN
  wavepath train --config=configs/finetune.py:init=RUN --config.data.dir=TILES --config.data.labels=labels.csv --workdir=TUNED
  wavepath train --config=configs/mil.py:network=clam_sb --config.data.bags=FEATURES --config.data.labels=labels.csv --workdir=SLIDES
  wavepath train --config=configs/cwt_net.py:scale=2 --config.data.dir=PYRAMIDS --workdir=RUN
  wavepath train --config=configs/ceff_encoders.py:cpu --config.data.dir=PAIRS --config.stain.crop=32 --config.stain.margin=32 \
      --config.train.steps=300 --workdir=ENCODERS                    # virtual staining, first stage, and second:
  wavepath train --config=configs/ceff.py:cpu --config.encoders=ENCODERS --config.data.dir=PAIRS --workdir=RUN
  wavepath train ... --config.train.epochs=100 --config.optim.warmup=5% --config.batch_size=512 --config.lr=1e-4
  wavepath train ... --config.parallel.backend=pmap --config.parallel.devices=4
  wavepath train ... --config.parallel.fsdp=0                        # parameters and moments divided over all devices
  srun wavepath train ... --distributed                              # one process for each SLURM task
  wavepath train ... --config.profile=20:30                          # traces steps 20 to 29 into RUN/profile

RUN receives config.json, metrics.jsonl, checkpoints/, panels/, tensorboard/ and status.json. On a resume the length of the run, how often it
writes, writers and devices may differ, and data may have moved; any other difference is an error that names the field. SIGTERM and Ctrl-C save
and end with exit code 85. The fields behind --config.… are in wavepath/defaults.py (train_defaults)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="config file, with its arguments behind a colon: configs/wise_mae.py:variant=B,smoke")
    parser.add_argument("--workdir", type=Path, required=True, metavar="RUN", help="folder of the run, made where it is missing")
    several = parser.add_argument_group("several processes that train one run, started by the same command each")
    several.add_argument("--distributed", action="store_true", help="they find each other through SLURM, Cloud TPU, GKE or MPI")
    several.add_argument("--coordinator", default="", metavar="HOST:PORT", help="or through the first of them")
    several.add_argument("--processes", type=int, default=0, metavar="N", help="how many there are")
    several.add_argument("--process", type=int, default=-1, metavar="I", help="which of them this is, from 0")


def second_stage(run: Path, config: Any) -> str:
    """The command that trains the second stage of staining behind a run of the first: the variant, and all that these encoders ask for otherwise.

    Args:
        run: of task `stain_encoders`. config: what it was asked for, where the run does not know better.
    """
    from wavepath.config import load_config, load_json

    config = load_json(run / "config.json") if (run / "config.json").is_file() else config
    given = config.stain
    # The published encoders, and those of its size class; the rest is said field by field.
    variant = ":cpu" if given.encoder_channels <= 16 else ""
    second = load_config(f"configs/ceff.py{variant}").stain
    want = {name: given[name] for name in ("encoder_channels", "encoder_blocks", "encoder_norm")}
    # Its parts must have the side of these crops, and its windows fit the pairs.
    side, unit = _pair_side(config.data.dir), 4 * second.grid
    want["crop"] = second.grid * given.crop if not side else min(second.grid * given.crop, side // unit * unit)
    want["margin"] = second.margin if not side else min(second.margin, (side - want["crop"]) // unit * unit)
    flags = [f"--config.stain.{name}={value}" for name, value in want.items() if value != second[name]]
    data = shlex.quote(config.data.dir) if config.data.dir else "PAIRS"
    return " ".join([
        f"wavepath train --config=configs/ceff.py{variant} --config.encoders={shlex.quote(str(run))} --config.data.dir={data}", *flags,
        f"--workdir={shlex.quote(f'{run}_ceff')}",
    ])  # fmt: skip


def _pair_side(folder: str) -> int:
    """The shorter side in px of the pairs there, their median; 0 where that is not known."""
    from wavepath.data.pair_records import PairShards
    from wavepath.errors import WavepathError

    try:
        sides = sorted(min(row.width, row.height) for row in PairShards(Path(folder)).rows) if folder else []
    except WavepathError:
        sides = []
    return sides[len(sides) // 2] if sides else 0


def run(args: argparse.Namespace) -> int:
    from wavepath.config import load_config

    # Read first: a mistyped field is answered before seconds of imports.
    config = load_config(args.config, args.config_overrides)

    from wavepath.console import duration, summary
    from wavepath.errors import EXIT_OK, EXIT_PREEMPTED
    from wavepath.training import distributed
    from wavepath.training.loop import train

    if args.distributed or args.coordinator or args.processes or args.process >= 0:
        distributed.start(args.coordinator, args.processes, args.process)
    result = train(config, args.workdir)
    if result.status == "preempted":
        return EXIT_PREEMPTED
    loss = result.metrics.get("loss")
    evaluated = [(name, f"{value:.4g}") for name, value in result.metrics.items() if name.startswith("eval_")]
    following = f"wavepath embed --checkpoint {args.workdir} --data TILES --out FEATURES; wavepath report {args.workdir} --out report.html"
    if config.task == "mil":
        following = f"the other folds (config.data.fold), then wavepath evaluate --mil {args.workdir} OTHERS --out OUT; wavepath report OUT"
    if config.task in ("finetune", "classify"):
        following = f"the other folds (config.data.fold), then wavepath evaluate --runs {args.workdir} OTHERS --positive LABEL --out OUT"
    if config.task == "superres":
        enlarge = f"wavepath superres SLIDE --checkpoint {args.workdir} --scale {config.superres.scale} --out OUT.tiff"
        following = f"wavepath evaluate --superres {args.workdir} --out OUT; {enlarge}"
    if config.task == "stain_encoders":
        following = f"wavepath evaluate --stain-encoders {args.workdir} --out OUT; {second_stage(args.workdir, config)}"
    if config.task == "stain":
        following = f"wavepath evaluate --stain {args.workdir} --out OUT; wavepath stain SLIDE --checkpoint {args.workdir} --out OUT.tiff"
    summary("trained" if result.fresh else "whole already", [
        ("steps", result.step), ("loss", "unknown" if loss is None else f"{loss:.4g}"), *evaluated, ("time", duration(result.seconds)),
        ("images/s", f"{result.images_per_second:.4g}"), ("run", args.workdir), ("next", following),
    ])
    return EXIT_OK
