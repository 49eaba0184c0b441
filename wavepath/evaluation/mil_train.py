"""Cross-validation of bag networks in one process: trains the runs that are missing, each in a folder of its own, and leaves whole ones alone.

    OUT/runs/[<features>/]<network>/seed_<s>/fold_<k>

Run again it goes on where it was stopped: a run that was cut off resumes from its checkpoint.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from wavepath.config import load_config
from wavepath.console import duration, say
from wavepath.data.bag_splits import bag_split
from wavepath.data.bags import BagSource, open_bags
from wavepath.errors import ConfigError, DatasetError
from wavepath.evaluation.encoded import named_folders
from wavepath.evaluation.mil_attention import slug
from wavepath.evaluation.mil_runs import TASK, fold_count
from wavepath.files import writable_folder
from wavepath.training.runs import DONE, read_status

CONFIG = "configs/mil.py"
RUNS = "runs"
# What this decides itself.
_OWN = ("data.bags", "data.labels", "data.fold", "data.folds", "data.splits", "seed", "mil.network", "mil.pool")


@dataclass(frozen=True)
class Job:
    """One run: its folder and config, and what it is called."""

    folder: Path
    config: ConfigDict
    name: str


def bag_folders(given: Sequence[str]) -> dict[str, Path]:
    """As `encoded.named_folders`, but that a folder alone and without a name goes by ''.

    Raises:
        ConfigError: two of one name, or a name without a folder.
    """
    found = named_folders(given, "--bags")
    alone = len(found) == 1 and ("=" not in given[0] or Path(given[0]).exists())
    return {"": next(iter(found.values()))} if alone else found


def plan(
    bags: Mapping[str, Path], labels: Path, out: Path, *, networks: Sequence[str] = ("abmil",), seeds: int = 1, folds: int | None = None,
    splits: str = "", pool: str = "", config: str = "", overrides: Sequence[str] = (),
) -> list[Job]:  # fmt: skip
    """The runs of all features, networks, seeds and folds; opens the bags to see how many folds there are.

    Args:
        bags: of `bag_folders`. labels: table case_id,slide_id,label. out: gets `runs/`.
        networks: of the task `mil`. seeds: of each, 0, 1, ...
        folds: 0 leaves one case out at a time; default: those of the config. splits: in place of folds, see `config.data.splits`.
        pool: `cls` or `mean`; default: that of the config.
        config: of the task; default `configs/mil.py`. overrides: `field=value` for all runs.

    Raises:
        ConfigError: folds and splits, no seed, an override of what the arguments say, a config of another task.
        DatasetError: features or labels that cannot be used.
    """
    if folds is not None and splits:
        raise ConfigError(f"--folds {folds} and --splits {splits} are two ways to divide the slides; give one")
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds} must be at least 1")
    for override in overrides:
        if (name := override.partition("=")[0].strip()) in _OWN:
            raise ConfigError(f"--config.{name} is set for each run here; use the flags of `wavepath evaluate --bags`")
    common = [f"data.labels={Path(labels).resolve()}", *([f"data.folds={folds}"] if folds is not None else [])]
    common += [f"data.splits={splits}"] * bool(splits) + [f"mil.pool={pool}"] * bool(pool) + list(overrides)
    jobs, counts = [], {}
    config = config or CONFIG
    for name, folder in bags.items():
        for network in dict.fromkeys(networks):
            spec = f"{config}{',' if '.py:' in config else ':'}network={network}"
            fields = [f"data.bags={Path(folder).resolve()}", *common]
            for seed in range(seeds):
                if name not in counts:
                    first = load_config(spec, fields)
                    if first.task != TASK:
                        raise ConfigError(f"--config {config} is of task {first.task!r}; give one of task {TASK!r}, such as {CONFIG}")
                    source = open_bags(first)
                    counts[name] = fold_count(first, source)
                    _check_split(first, source)
                for fold in range(counts[name]):
                    wanted = Path(str(folder).replace("{fold}", str(fold)).replace("{seed}", str(seed)))
                    if not wanted.is_dir():  # now, and not after hours of training
                        raise DatasetError(f"--bags {folder}: there is no folder {wanted} for seed {seed}, fold {fold}; embed those slides first")
                    place = Path(out) / RUNS / (slug(name) if name else "") / network / f"seed_{seed}" / f"fold_{fold}"
                    title = f"{name + ' ' if name else ''}{network}, seed {seed}, fold {fold}"
                    jobs.append(Job(place, load_config(spec, [*fields, f"seed={seed}", f"data.fold={fold}"]), title))
    return jobs


def _check_split(config: ConfigDict, source: BagSource) -> None:
    """Refuses folds that cannot be made of these cases, now and in the command's own words; tables of splits are looked at by each run."""
    if config.data.splits:
        return
    cases, folds = len(np.unique(source.cases)), int(config.data.folds)
    if folds > cases:
        raise ConfigError(f"{folds} folds cannot be made of the {cases} cases with labels; give --folds {cases} at most, or --folds 0: one case each")
    bag_split(source, config)


def train_missing(jobs: Sequence[Job]) -> bool:
    """Trains what is not whole; says how far it is and how long the rest will take.

    Returns:
        False where a signal stopped it: what was trained is saved.
    """
    from wavepath.training.loop import train

    whole = sum(read_status(job.folder).get("status") == DONE for job in jobs)
    say(f"{len(jobs)} runs" + (f", {whole} of them whole already" if whole else ""))
    begun, trained = time.monotonic(), 0
    for number, job in enumerate(jobs, start=1):
        left = ""
        if trained:
            # Whole runs cost nothing: the pace is that of those that were trained here.
            seconds = (time.monotonic() - begun) / trained * sum(read_status(rest.folder).get("status") != DONE for rest in jobs[number - 1 :])
            left = f", about {duration(seconds)} left"
        if read_status(job.folder).get("status") != DONE:
            say(f"run {number} of {len(jobs)}: {job.name}{left}")
        result = train(job.config, writable_folder(job.folder))
        if result.status == "preempted":
            say(f"stopped in {job.name}; run the same command again to go on")
            return False
        trained += result.fresh
    return True
