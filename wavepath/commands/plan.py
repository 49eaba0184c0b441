"""Plans a run before the hardware is rented: compiles its training step for a topology that need not be here, and says what it will take.

Printed are: whether the step fits the devices' memory, with argument, temporary and peak bytes; the collectives with their bytes, from the
compiled program; FLOPs; an estimate of step time, images/s and MFU by a roofline, with its assumptions; time and chip-hours of the configured
run. Where it does not fit, a few more compiles look for what does: recomputation, a divided state, a smaller batch, micro-batches.

TPU slices (v4, v5e, v5p, v6e) need the TPU compiler, pip install "wavepath[tpu]", and no TPU. cpu:N needs nothing. `local` takes what is here,
GPUs for instance. Large models compile for minutes; what was compiled is kept, and the same plan answers at once. No data are read but to count
the examples of an epoch, where --config.data.dir or slides names them.

Exit codes: 0 it fits (or the devices have no limit), 1 nothing done, 3 rows of a table failed (whether or not the others fit),
4 it, or a row of the table, does not fit.
"""

import argparse
from pathlib import Path

uses_config = True
EXIT_NO_FIT = 4
EPILOG = """examples:
  wavepath plan --config=configs/wise_mae.py:variant=L --topology v5e:16x16 --batch 4096
  wavepath plan --config=configs/wise_mae.py:smoke --topology cpu:8                                  # no libtpu needed
  wavepath plan --config=configs/wise_mae.py:variant=H --topology v5p:4x4x4 --config.model.remat=full --config.parallel.fsdp=0 --json plan.json
  wavepath plan --config=configs/wise_mae.py --sweep topology=v5e:4x4,v5e:8x8,v5e:16x16 --markdown table.md
  wavepath plan --config=configs/wise_mae.py --topology v5e:8x8 --sweep batch=1024,2048,4096 --sweep config.model.remat=none,full --no-advice
  wavepath plan --config=configs/wise_mae.py --weak-scaling v5e:64 --config.model.scan=True --markdown scaling.md
  wavepath plan --config=configs/cwt_net.py --config=configs/ceff.py --topology v5e:4x4              # a table over configs"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, action="append", metavar="FILE[:ARG]", help="as of `wavepath train`; several make a table")
    parser.add_argument("--topology", default="", help="v5e:4x4, v5e:16x16, v5p:4x4x4, v6e:4x4, v4:2x2x4, cpu:8, local")
    parser.add_argument("--backend", default="", choices=("", "jit", "pmap", "shard_map"), help="in place of config.parallel.backend")
    parser.add_argument("--batch", type=int, default=0, metavar="N", help="examples of a step on all devices, in place of config.batch_size")
    parser.add_argument("--examples", type=int, default=0, metavar="N", help="of an epoch; default: of the config's data, else 1 000 000")
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="NAME=V1,V2",
        help="a table over topology, batch, backend, arg.NAME of the config file or config.FIELD; may be given again",
    )
    parser.add_argument(
        "--weak-scaling", default="", metavar="CHIP[:N]", help="a table over 4, 16, 64 and 256 chips with N examples on each, as in v5e:64"
    )
    parser.add_argument("--efficiency", type=float, default=0.0, metavar="SHARE", help="of the peak that matrix products reach (default: 0.6)")
    parser.add_argument("--no-advice", action="store_true", help="where it does not fit, do not look for what does")
    parser.add_argument("--no-cache", action="store_true", help="neither read nor keep what was compiled")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all numbers")
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="write the table")


def run(args: argparse.Namespace) -> int:
    from wavepath.config import load_config
    from wavepath.console import say, table, warn
    from wavepath.errors import EXIT_NOTHING, EXIT_OK, EXIT_PARTIAL, ConfigError, WavepathError
    from wavepath.planning.topology import parse, prepare_environment
    from wavepath.planning.wishes import wishes

    if min(args.batch, args.examples) < 0 or not 0 <= args.efficiency <= 1:
        raise ConfigError("--batch and --examples are numbers above 0, --efficiency is a share of 0 to 1")
    if args.weak_scaling:
        return _weak_scaling(args)
    wanted = wishes(args.config, args.config_overrides, args.topology, args.backend, args.batch, args.sweep)
    # All mistakes in what was asked for are answered before the first import that takes seconds.
    configs = [load_config(wish.spec, wish.overrides) for wish in wanted]
    for wish in wanted:
        parse(wish.topology)
    prepare_environment([wish.topology for wish in wanted])

    from wavepath.files import cache_folder
    from wavepath.planning.plan import plan
    from wavepath.planning.roofline import DEFAULTS, Assumptions
    from wavepath.planning.table import HEADER, advice_lines, markdown, rows, table_rows
    from wavepath.planning.ticker import Ticker

    assumptions = Assumptions(compute=args.efficiency) if args.efficiency else DEFAULTS
    plans, failed = [], []
    for number, (wish, config) in enumerate(zip(wanted, configs, strict=True), 1):
        with Ticker(f"plan {number} of {len(wanted)}" if len(wanted) > 1 else "plan") as ticker:
            try:
                made = plan(
                    config, wish.topology, name=wish.name, backend=wish.backend or None, batch=wish.batch or None, examples=args.examples or None,
                    advice=not args.no_advice, assumptions=assumptions, cache=None if args.no_cache else cache_folder() / "plans", say=ticker,
                )
            except WavepathError as error:
                if len(wanted) == 1:
                    raise
                failed.append(f"{wish.name} on {wish.topology}: {error}")
                warn(failed[-1])
                continue
        plans.append(made)
        if len(wanted) == 1:
            for one in [made, *([made.advised] if made.advised else [])]:
                width = max(len(name) for name, _ in rows(one))
                print("\n".join(f"{name:<{width}}  {text}" for name, text in rows(one)))
                if one is made and (lines := advice_lines(one)):
                    print("\n".join(["", *lines, ""]))
    if len(wanted) > 1 and plans:
        print(table(HEADER, table_rows(plans)))
        for made in plans:
            for line in advice_lines(made)[-1:]:
                print(f"{made.config} on {made.topology}: {line}")
    _write(args, plans, markdown)
    if not plans:
        return EXIT_NOTHING
    if failed:
        say(f"{len(failed)} of {len(wanted)} failed")
        return EXIT_PARTIAL
    return EXIT_NO_FIT if any(made.fits is False for made in plans) else EXIT_OK


def _weak_scaling(args: argparse.Namespace) -> int:
    """The table of `planning.scaling`: of the backend that was asked for, else of jit with a whole and with a divided state."""
    from wavepath.config import load_config
    from wavepath.console import say, table
    from wavepath.errors import EXIT_OK, ConfigError
    from wavepath.files import cache_folder, write_json, write_text
    from wavepath.planning import scaling
    from wavepath.planning.topology import prepare_environment

    if args.topology or args.batch or args.sweep or len(args.config) > 1:
        raise ConfigError("--weak-scaling chooses topologies and batches by itself, for one config; leave out --topology, --batch and --sweep")
    if args.examples or args.no_advice:
        raise ConfigError("--weak-scaling speaks of single steps and gives no advice; leave out --examples and --no-advice")
    chip, per_device = scaling.parse(args.weak_scaling)
    config = load_config(args.config[0], args.config_overrides)
    prepare_environment([f"{chip}:{'x'.join(map(str, scaling.shape(chip, count)))}" for count in scaling.DEVICES])

    from wavepath.planning.roofline import DEFAULTS, Assumptions, listed
    from wavepath.planning.ticker import Ticker

    assumptions = Assumptions(compute=args.efficiency) if args.efficiency else DEFAULTS
    rows = []
    with Ticker("weak scaling") as ticker:
        for backend in [args.backend] if args.backend else ["jit", "fsdp"]:
            rows += scaling.table(
                config, chip, backend=backend, per_device=per_device, assumptions=assumptions,
                cache=None if args.no_cache else cache_folder() / "plans", say=ticker,
            )
    print(table(scaling.HEADER, scaling.cells(rows)))
    print("\n".join(listed(assumptions, None)))
    if args.json:
        write_json(args.json, [row.to_json() for row in rows])
        say(f"wrote {args.json}")
    if args.markdown:
        write_text(args.markdown, scaling.markdown(rows))
        scaling.picture(rows, args.markdown.with_suffix(".png"))
        say(f"wrote {args.markdown} and {args.markdown.with_suffix('.png')}")
    return EXIT_OK


def _write(args, plans, markdown) -> None:
    from wavepath.console import say
    from wavepath.files import write_json, write_text

    if args.json and plans:
        write_json(args.json, plans[0].to_json() if len(plans) == 1 else [made.to_json() for made in plans])
        say(f"wrote {args.json}")
    if args.markdown and plans:
        write_text(args.markdown, markdown(plans))
        say(f"wrote {args.markdown}")
