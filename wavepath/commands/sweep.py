"""Trains every combination of config values, each with several seeds, and keeps a table that is whole after every run.

Each --grid names a field of the config and its values; their combinations are the arms, each run in D/<arm>/seed<k> by a process of its
own. `arg.<name>` stands for an argument of the config file (--grid 'arg.variant=Ti,S'). Values with commas go in brackets or quotes:
--grid 'config.augment.crop_scale=(0.2,1.0),(0.6,1.0)'. Any --config.a.b=v holds for all arms.

Run again, it skips what is done, goes on with what was stopped and repeats what failed; more values and seeds may be added. Ctrl-C and
SIGTERM let the running arm save first. Exit codes: 0 all done, 3 some failed, 1 none done, 85 ended by SIGTERM.
"""

import argparse
from pathlib import Path

uses_config = True

EPILOG = """examples:
  wavepath sweep --config=configs/wise_mae.py:smoke --grid 'config.lr=1e-4,3e-4' --seeds 3 --workdir sweep

  two ways of choosing tiles, judged by a probe after each training:
  wavepath sweep --config=configs/wise_mae.py:variant=S --grid 'config.data.dir=tiles_wavelet,tiles_random' --seeds 3 --workdir sweep \\
    --then 'wavepath embed --checkpoint {run} --data labelled --out {run}/features &&
            wavepath evaluate --features {run}/features --labels labels.csv --out {run}/evaluation'"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `wavepath sweep`."""
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="the config of `wavepath train`; --config.a.b=v for all arms")
    parser.add_argument("--grid", action="append", default=[], metavar="FIELD=V1,V2", help="a field and its values; may be given again")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each arm, with config.seed = 0, 1, ... (default: 1)")
    parser.add_argument("--workdir", type=Path, required=True, help="folder for runs, logs, table.csv and table.md")
    parser.add_argument("--then", default="", metavar="COMMAND",
                        help="shell command after each training; {run}, {seed}, {arm} and {workdir} are filled in; "
                             "results in {run}/evaluation enter the table")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")


def run(args: argparse.Namespace) -> int:
    """Runs the sweep; prints the mean and spread of its arms."""
    import shlex

    from wavepath.config import load_config
    from wavepath.console import say, summary
    from wavepath.errors import EXIT_PREEMPTED
    from wavepath.training.sweep import DONE, FAILED, Sweep, parse_axis, plan, run_sweep

    sweep = Sweep(args.config, args.workdir, tuple(map(parse_axis, args.grid)), args.seeds, tuple(args.config_overrides), args.then)
    if args.dry_run:
        for job in plan(sweep):
            print(shlex.join(job.command) + (f" &&\n  {job.then}" if job.then else ""))
        return 0
    jobs, code = run_sweep(sweep)
    done = [job.folder for job in jobs if job.status == DONE]
    if done:
        from wavepath.evaluation.compare import compare, text_table

        print(text_table(compare(done)))
    if code == EXIT_PREEMPTED:
        say("stopped by a signal, the running arm has saved; run the same command again to go on")
    failed = [f"{job.arm.slug} seed {job.seed}: {job.reason}" for job in jobs if job.status == FAILED]
    following = []
    if done and load_config(args.config, args.config_overrides).task in ("finetune", "classify"):
        folder = shlex.quote(str(args.workdir))
        following = [("score folds", f"wavepath evaluate --runs {folder} --positive LABEL --out {shlex.quote(str(args.workdir / 'evaluation'))}")]
    summary("sweep", [
        ("done", f"{len(done)} of {len(jobs)}"), *(("failed", line) for line in failed), ("table", args.workdir / "table.csv"),
        ("compare with", f"wavepath compare {shlex.quote(str(args.workdir))} --out {shlex.quote(str(args.workdir / 'comparison'))}"),
        *following,
    ])
    return code
