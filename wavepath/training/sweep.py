"""Sweeps: every combination of config values, times seeds, each as a `wavepath train` in a process of its own.

    <workdir>/sweep.json                   the base config, against mixing two sweeps in one folder
    <workdir>/<arm>/seed<k>/               a run folder; <arm>/seed<k>.log is what its commands printed
    <workdir>/table.csv, table.md          one row for each run, whole after every run

Run again, a sweep skips what is finished and goes on with what was stopped. An arm that fails is listed with its reason, the rest goes on.
"""

import csv
import hashlib
import io
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wavepath.config import flatten, load_config, split_list, split_spec
from wavepath.console import Progress, progress, say
from wavepath.errors import EXIT_NOTHING, EXIT_OK, EXIT_PARTIAL, EXIT_PREEMPTED, ConfigError
from wavepath.files import folder_lock, read_json, writable_folder, write_json, write_text
from wavepath.training.run_folder import HARMLESS
from wavepath.training.runs import DONE, PENDING, STOPPED, main_metrics, read_curves, read_run, read_status

FAILED = "failed"
DURATIONS = ("train.steps", "train.epochs", "train.examples")
_POLL_SECONDS = 5.0


@dataclass(frozen=True)
class Axis:
    """One `--grid`: a config field (or `arg.<name>`, an argument of the config file) and its values as texts."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Arm:
    """One combination of values. `slug` is its folder's name."""

    slug: str
    settings: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Sweep:
    """What is to be run. `then` is a shell command after each training, with {run}, {seed}, {arm} and {workdir} filled in."""

    spec: str
    workdir: Path
    axes: tuple[Axis, ...] = ()
    seeds: int = 1
    overrides: tuple[str, ...] = ()
    then: str = ""
    launcher: tuple[str, ...] = field(default=(sys.executable, "-m", "wavepath", "train"))


@dataclass
class Job:
    """One run of a sweep and how far it is."""

    arm: Arm
    seed: int
    folder: Path
    command: list[str]
    then: str
    status: str = PENDING
    reason: str = ""


def parse_axis(text: str) -> Axis:
    """`"config.lr=1e-4,3e-4"` -> `Axis("lr", ("1e-4", "3e-4"))`; values with commas stand in brackets or quotes.

    Raises:
        ConfigError: no name, no value, or a value twice.
    """
    name, equals, values = text.partition("=")
    name = name.strip().removeprefix("--").removeprefix("config.")
    parts = [part[1:-1] if part[:1] == part[-1:] and part[:1] in ("'", '"') and len(part) > 1 else part for part in split_list(values)]
    if not name or not equals or "" in split_list(values):
        raise ConfigError(f"--grid takes a field and its values, as in --grid 'config.lr=1e-4,3e-4', not {text!r}")
    if len(set(parts)) < len(parts):
        raise ConfigError(f"--grid {name} has a value twice: {values}")
    return Axis(name, tuple(parts))


def _short_names(names: Sequence[str]) -> dict[str, str]:
    """The shortest ending of each dotted name that no other name shares."""
    short = {}
    for name in names:
        parts = name.split(".")
        for size in range(1, len(parts) + 1):
            short[name] = ".".join(parts[-size:])
            if sum(other == name or other.endswith("." + short[name]) or other == short[name] for other in names) == 1:
                break
    return short


def _slug_value(value: str) -> str:
    """A value as a part of a folder's name. What cannot stand there is shortened, with a hash so that two values never share a name."""
    clean = re.sub(r"[^\w.+-]+", "-", value.rstrip("/").rpartition("/")[2]).strip("-")[:40]
    return clean if clean == value and clean not in ("", ".", "..") else f"{clean}-{hashlib.sha256(value.encode()).hexdigest()[:6]}"


def make_arms(axes: Sequence[Axis]) -> list[Arm]:
    """The cartesian product of the axes, the last one fastest; without axes one arm `base`.

    Raises:
        ConfigError: a field in two axes.
    """
    names = [axis.name for axis in axes]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--grid {name} is given twice; put all its values into one")
    short = _short_names(names)
    arms = []
    for values in itertools.product(*(axis.values for axis in axes)):
        slug = "_".join(f"{short[name]}={_slug_value(value)}" for name, value in zip(names, values, strict=True))
        arms.append(Arm(slug or "base", tuple(zip(names, values, strict=True))))
    return arms


def _arm_spec(sweep: Sweep, arm: Arm) -> tuple[str, list[str]]:
    """The config of one arm: its spec with the `arg.` axes joined on, and its overrides."""
    path, arg = split_spec(sweep.spec)
    extra = [f"{name.removeprefix('arg.')}={value}" for name, value in arm.settings if name.startswith("arg.")]
    arg = ",".join([*([arg] if arg else []), *extra])
    overrides = [f"{name}={value}" for name, value in arm.settings if not name.startswith("arg.")]
    return (f"{path}:{arg}" if arg else path), [*sweep.overrides, *overrides]


def plan(sweep: Sweep) -> list[Job]:
    """Every run of the sweep, seed by seed, so that a sweep that is cut short has compared all arms on the seeds it did.

    Raises:
        ConfigError: a field, value or argument that the config does not take: said before anything is run.
    """
    if sweep.seeds < 1:
        raise ConfigError(f"--seeds {sweep.seeds}: at least one is needed")
    if any(axis.name == "seed" for axis in sweep.axes):
        raise ConfigError("seed is not an axis of --grid; use --seeds")
    arms = make_arms(sweep.axes)
    for arm in arms:
        load_config(*_arm_spec(sweep, arm))
    jobs = []
    for seed, arm in itertools.product(range(sweep.seeds), arms):
        folder = sweep.workdir / arm.slug / f"seed{seed}"
        spec, overrides = _arm_spec(sweep, arm)
        flags = [f"--config.{override.removeprefix('config.')}" for override in [*overrides, f"seed={seed}"]]
        then = sweep.then
        for key, value in {"run": folder, "seed": seed, "arm": arm.slug, "workdir": sweep.workdir}.items():
            # Not str.format: braces belong to the shell too.
            then = then.replace("{" + key + "}", shlex.quote(str(value)))
        jobs.append(Job(arm, seed, folder, [*sweep.launcher, f"--config={spec}", f"--workdir={folder}", *flags], then))
    return jobs


def claim_folder(sweep: Sweep) -> None:
    """Writes sweep.json, or checks that the folder's sweep had the same base config; more values and seeds may come later.

    Raises:
        ConfigError: another sweep lives in the folder; the differing fields are named.
    """
    path = sweep.workdir / "sweep.json"
    base = json.loads(json.dumps(flatten(load_config(sweep.spec, sweep.overrides))))  # as it reads back: tuples are lists
    if path.is_file():
        before = read_json(path).get("base", {})
        # As for a single run: another machine or another way of logging makes no other sweep, but all runs are of one length.
        given = {axis.name for axis in sweep.axes}
        names = [name for name in {**before, **base} if name not in given and (name in DURATIONS or not name.startswith(HARMLESS))]
        changed = [f"{name} {before.get(name)} -> {base.get(name)}" for name in names if before.get(name) != base.get(name)]
        if changed:
            raise ConfigError(f"{sweep.workdir} holds a sweep of another config ({', '.join(changed[:3])}); choose another --workdir")
    write_json(path, {
        "spec": sweep.spec, "overrides": list(sweep.overrides), "seeds": sweep.seeds, "then": sweep.then, "base": base,
        "axes": [{"name": axis.name, "values": list(axis.values)} for axis in sweep.axes],
    })


@contextmanager
def _signals(children: list[subprocess.Popen]) -> Iterator[dict[str, bool]]:
    """Passes SIGTERM, SIGHUP and SIGINT on to the running child as SIGTERM, on which a training saves and ends."""
    asked = {"stop": False, "interrupt": False}

    def handle(number: int, frame: Any) -> None:
        asked["stop"] = True
        asked["interrupt"] |= number == signal.SIGINT
        for child in children:
            _terminate(child)

    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _terminate(child: subprocess.Popen) -> None:
    if child.poll() is None:
        # A shell does not pass signals on: its whole group gets it. A training is alone in its group.
        os.killpg(child.pid, signal.SIGTERM)


def _environment() -> dict[str, str]:
    # `wavepath` in a --then is the one that runs the sweep, also where its environment is not activated.
    return {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}


def _execute(command: list[str] | str, log: Path, children: list[subprocess.Popen], asked: dict[str, bool], tick) -> int:
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"$ {command if isinstance(command, str) else shlex.join(command)}\n")
        file.flush()
        child = subprocess.Popen(
            command, shell=isinstance(command, str), stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=_environment(), start_new_session=True,
        )
    children.append(child)
    if asked["stop"]:  # a signal that came between the last check and the start
        _terminate(child)
    try:
        while True:
            try:
                return child.wait(_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                tick()
    finally:
        children.remove(child)


def _reason(log: Path, code: int) -> str:
    """Why a command failed: its error line, else the last thing it printed."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    start = max((index for index, line in enumerate(lines) if line.startswith("$ ")), default=-1)
    printed = lines[start + 1 :]
    errors = [line.partition("error: ")[2] for line in printed if line.startswith("wavepath: error: ")]
    return (errors or printed or [f"exit code {code}"])[-1][:300] + (f" (exit code {code}, {log})" if not errors else "")


def _finished(job: Job) -> tuple[bool, bool]:
    """Whether the training, and the command after it, have been done; another `--then` than before is done anew."""
    trained = read_status(job.folder).get("status") == DONE
    marker = job.folder / "then.json"
    after = not job.then or (marker.is_file() and read_json(marker).get("command") == job.then)
    return trained, trained and after


def _run_job(job: Job, children: list[subprocess.Popen], asked: dict[str, bool], tick) -> None:
    """Trains and runs the command after it, as far as they are not done; sets the job's status and reason."""
    log = job.folder.parent / f"{job.folder.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    job.reason = ""
    trained, whole = _finished(job)
    if not trained:
        code = _execute(job.command, log, children, asked, tick)
        if code == EXIT_PREEMPTED or (code and asked["stop"]):
            job.status = STOPPED
            return
        if code or not _finished(job)[0]:
            job.status, job.reason = FAILED, _reason(log, code)
            return
    if not whole and job.then:
        if asked["stop"]:
            job.status = STOPPED
            return
        code = _execute(job.then, log, children, asked, tick)
        if code:
            job.status = STOPPED if asked["stop"] else FAILED
            job.reason = "" if asked["stop"] else f"after training: {_reason(log, code)}"
            return
        write_json(job.folder / "then.json", {"command": job.then})
    job.status = DONE


def table_rows(jobs: Sequence[Job], root: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: arm, its values, seed, status, step, seconds, metrics, reason, folder."""
    axes = list(dict.fromkeys(name for job in jobs for name, _ in job.arm.settings))
    runs = [read_run(job.folder) for job in jobs]
    finals = [run.finals() for run in runs]
    metrics = main_metrics(name for final in finals for name in final)
    header = ["arm", *axes, "seed", "status", "step", "seconds", *metrics, "reason", "run"]
    rows = []
    for job, run, final in zip(jobs, runs, finals, strict=True):
        values = dict(job.arm.settings)
        rows.append([
            job.arm.slug, *(values[name] for name in axes), str(job.seed), job.status, str(run.step or ""),
            f"{run.seconds:.1f}" if run.seconds == run.seconds else "", *(f"{final[name]:.6g}" if name in final else "" for name in metrics),
            job.reason, job.folder.relative_to(root).as_posix(),
        ])
    return header, rows


def write_table(jobs: Sequence[Job], root: Path) -> None:
    """Writes table.csv and table.md, whole or not at all."""
    header, rows = table_rows(jobs, root)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_text(root / "table.csv", text.getvalue())
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [header, *rows]]
    write_text(root / "table.md", "\n".join([lines[0], "|" + " --- |" * len(header), *lines[1:]]) + "\n")


def _initial_status(job: Job) -> None:
    whole = _finished(job)[1]
    job.status = DONE if whole else STOPPED if read_run(job.folder).step else PENDING


def _ticker(job: Job, bar: Progress):
    """Moves the bar by the share of the run that its metrics show, so that the ETA lives during a long arm."""
    shown: dict[str, Any] = {"share": 0.0, "note": ""}

    def tick() -> None:
        curves, _ = read_curves(job.folder / "metrics.jsonl")
        at, values = curves.get("loss", ([], []))
        note = f"{job.arm.slug} seed {job.seed}" + (f", step {at[-1]}, loss {values[-1]:.4g}" if at else "")
        steps = read_status(job.folder).get("steps")
        share = round(min(at[-1] / steps, 1.0), 2) if at and steps else 0.0
        if note != shown["note"]:  # a log needs no line that says nothing new
            bar.advance(max(share - shown["share"], 0.0), note)
            shown.update(share=max(share, shown["share"]), note=note)

    return tick, shown


def run_sweep(sweep: Sweep) -> tuple[list[Job], int]:
    """Runs what is not finished.

    Returns:
        The jobs with their status, and the exit code: 0 all done, 3 some failed or stopped, 1 none done, 85 ended by a signal after
        the running arm had saved.

    Raises:
        ConfigError: before anything is run. KeyboardInterrupt: after the running arm has saved.
        LockedError: another sweep works in the folder.
    """
    jobs = plan(sweep)
    writable_folder(sweep.workdir)
    with folder_lock(sweep.workdir, "sweep.lock"):
        claim_folder(sweep)
        for job in jobs:
            _initial_status(job)
        write_table(jobs, sweep.workdir)
        children: list[subprocess.Popen] = []
        with _signals(children) as asked, progress("sweep", len(jobs), "runs") as bar:
            for job in jobs:
                if job.status == DONE:
                    bar.advance(1, f"{job.arm.slug} seed {job.seed} was done")
                    continue
                tick, shown = _ticker(job, bar)
                _run_job(job, children, asked, tick)
                write_table(jobs, sweep.workdir)
                bar.advance(1 - shown["share"])
                if job.status == FAILED:
                    say(f"{job.arm.slug} seed {job.seed} failed: {job.reason}")
                if asked["stop"]:
                    break
    if asked["interrupt"]:
        raise KeyboardInterrupt
    done = sum(job.status == DONE for job in jobs)
    if done == len(jobs):
        return jobs, EXIT_OK
    if asked["stop"]:
        return jobs, EXIT_PREEMPTED
    return jobs, EXIT_PARTIAL if done else EXIT_NOTHING
