"""Runs of the task `mil` as they are scored: which belong together, whether their folds are whole, and what they make of slides.

Runs that differ in `data.fold` and `seed` alone are one arm. What is scored is the checkpoint that the run names: with early stopping that of the
best validation loss (nothing is chosen by the test part), else the last.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from wavepath import config as configs
from wavepath.console import warn
from wavepath.data import bag_batches
from wavepath.data.bag_splits import CAMELYON, bag_split
from wavepath.data.bags import BagSource, open_bags
from wavepath.defaults import train_defaults
from wavepath.errors import CheckpointError, ConfigError, DatasetError
from wavepath.evaluation.crossvalidate import group
from wavepath.files import read_json
from wavepath.training import parallel
from wavepath.training.checkpoint import restore_run, saved_steps
from wavepath.training.run_folder import HARMLESS, RunFolder, identity_of
from wavepath.training.runs import DONE, find_runs, read_run

TASK = "mil"
_FOLD_FIELDS = ("seed", "data.fold")
_LENGTH = ("train.steps", "train.epochs", "train.examples", "train.patience", "train.patience_after")  # harmless to a resume, not to a result
# Where a run's constants may differ from what is found now, and what to say of each.
_FEATURES, _LABELS = ("width", "encoder", "column"), ("classes", "labels", "split")

Each = Callable[[int, np.ndarray, np.ndarray], None]


@dataclass(frozen=True)
class BagRun:
    """One run: its folder, resolved config, the config as it was asked for, and constants."""

    folder: Path
    config: ConfigDict
    given: ConfigDict
    constants: dict[str, Any]

    @property
    def seed(self) -> int:
        return int(self.config.seed)

    @property
    def fold(self) -> int:
        return int(self.config.data.fold)

    @property
    def features(self) -> str:
        """The folder of its features, with its own seed and fold where the config leaves them open."""
        return configs.filled(self.config.data.bags, self.config)

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.constants["classes"])

    @property
    def checkpoint(self) -> str:
        """Which one is scored."""
        return "best" if self.config.train.patience else "last"

    def fields(self) -> dict[str, str]:
        """What tells its arm from others: the config as it was asked for (steps depend on the fold's size, epochs do not) without fold, seed and what
        changes nothing; paths inside of the run by their end.
        """
        named, own = {}, self.folder.resolve()
        for name, value in configs.flatten(self.given).items():
            if name in _FOLD_FIELDS or (name.startswith(HARMLESS) and name not in _LENGTH):
                continue
            if isinstance(value, str) and value and name.startswith("data."):
                path = Path(value).resolve()
                value = path.relative_to(own).as_posix() if path.is_relative_to(own) else value
            named[name] = str(value)
        return named


def read_runs(paths: Iterable[Path], data: Path | None = None, labels: Path | None = None) -> list[BagRun]:
    """The runs in and below the paths; with `data` and `labels` as if they had been trained from there.

    Raises:
        ConfigError: a run of another task, or one that has not begun.
    """
    found = []
    for folder in find_runs(paths):
        places = [folder / name for name in ("config.json", "given.json", "constants.json")]
        if not all(place.is_file() for place in places):
            raise ConfigError(f"{folder} has not begun to train; run its `wavepath train` again, or leave it out")
        read, given = (configs.complete(configs.load_json(place), train_defaults()) for place in places[:2])
        if read.task != TASK:
            raise ConfigError(f"{folder} is a run of task {read.task!r}; wanted is one of configs/mil.py")
        for name, place in (("bags", data), ("labels", labels)):
            if place is not None:
                read.data[name] = given.data[name] = str(place)
        found.append(BagRun(folder, read, given, read_json(places[2])))
    return found


def arms_of(runs: Sequence[BagRun], names: Mapping[str, str] | None = None) -> dict[str, list[BagRun]]:
    """The runs by arm, called by network and features where that tells them apart, else by every field in which they differ.

    Args:
        runs: of `read_runs`.
        names: what to call folders of features, by their path as the runs have it.
    """
    names = names or {}
    place = {run.folder: index for index, run in enumerate(runs)}
    arms = dict(sorted(group(runs).items(), key=lambda arm: place[arm[1][0].folder]))  # in the order of the runs
    first = [members[0].config for members in arms.values()]
    folders = [str(config.data.bags) for config in first]
    several = len(set(folders)) > 1, len({config.mil.network for config in first}) > 1
    titles = []
    for config, folder in zip(first, folders, strict=True):
        parts = [names.get(folder) or "/".join(Path(folder).parts[-2:])] * (several[0] or folder in names)
        titles.append(", ".join(parts + [config.mil.network] * (several[1] or not parts)))
    return dict(zip(titles, arms.values(), strict=True)) if len(set(titles)) == len(titles) else arms


def fold_count(config: ConfigDict, source: BagSource) -> int:
    """How many folds the split of a config has."""
    data = config.data
    if data.splits.lower() == CAMELYON or (data.splits and Path(data.splits).is_file()):
        return 1
    if data.splits:
        count = len(list(Path(data.splits).glob("splits_*.csv")))
        if not count:
            raise ConfigError(f"{data.splits} holds no splits_<fold>.csv; give {CAMELYON}, such a table, or a folder of them")
        return count
    return int(data.folds) or len(np.unique(source.cases))


def check_folds(arm: str, runs: Sequence[BagRun], source: BagSource, partial: bool) -> None:
    """Refuses an arm whose folds are not there exactly once for each seed, or are not finished.

    Raises:
        ConfigError: naming the runs. CheckpointError: nothing to score of a run.
    """
    owners: dict[str, int] = dict(zip(source.slides, source.cases.tolist(), strict=True))
    folds = fold_count(runs[0].config, source)
    for seed in sorted({run.seed for run in runs}):
        seen: dict[int, BagRun] = {}
        owner: dict[str, BagRun] = {}
        for run in (run for run in runs if run.seed == seed):
            if run.fold in seen:
                raise ConfigError(f"fold {run.fold} of {arm!r}, seed {seed}, is there twice: {seen[run.fold].folder} and {run.folder}; leave one out")
            seen[run.fold] = run
            # Tables of splits may draw their test sets anew for each fold; folds may not.
            for case in {owners.get(slide, slide) for slide in run.constants["split"]["test"]} if not run.config.data.splits else ():
                if case in owner:
                    raise ConfigError(f"case {case!r} is tested by both {owner[case].folder} and {run.folder}; train them on one split")
                owner[case] = run
            _check_finished(run, partial)
        missing = sorted(set(range(folds)) - set(seen))
        if missing:
            listed = f"{arm!r}, seed {seed}, lacks fold{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} of {folds}"
            if not partial:
                raise ConfigError(f"{listed}; train with --config.data.fold={missing[0]}, or score what is there with --partial")
            warn(f"{listed}: slides of the others alone are scored")


def _check_finished(run: BagRun, partial: bool) -> None:
    state = read_run(run.folder)
    if state.status == DONE:
        return
    problem = f"{run.folder} is not finished ({state.status}, step {state.step} of {run.config.train.steps})"
    if not partial:
        raise ConfigError(f"{problem}; go on training it, or score what it has saved with --partial")
    if not saved_steps(run.folder):
        raise CheckpointError(f"{problem} and has no checkpoint yet; leave it out")
    warn(f"{problem}: what it has saved is scored")


class BagPredictor:
    """Opens bags once for all runs that share them, restores runs, and compiles a network once for each size of bags."""

    def __init__(self) -> None:
        self._devices = parallel.Parallel("jit", jax.local_devices()[:1])
        self._sources: dict[str, BagSource] = {}
        self._compiled: dict[str, Any] = {}
        self._tests: dict[str, np.ndarray] = {}

    def source(self, run: BagRun) -> BagSource:
        """All bags that a run was trained, validated and tested on.

        Raises:
            DatasetError: they are not where they were.
        """
        data = run.config.data
        for flag, place, what in (("--data", run.features, "features"), ("--labels", data.labels, "labels")):
            if not place or not Path(place).exists():
                raise DatasetError(f"the {what} of {run.folder} are not at {place or 'any place'}; give the place where they are with {flag}")
        key = repr((run.features, data.labels, data.missing, data.exclude_slides, run.config.mil.pool))
        if key not in self._sources:
            self._sources[key] = open_bags(run.config)
        return self._sources[key]

    def test(self, run: BagRun) -> np.ndarray:
        """Places in `source` of the slides that a run keeps for its test, int64.

        Raises:
            DatasetError: other features, labels or slides than it was trained on; or no slide is left for a test.
        """
        source = self.source(run)
        key = repr((id(source), run.config.data.to_dict(), run.config.mil.validation))
        if key not in self._tests:
            try:
                split = bag_split(source, run.config)
            except (ConfigError, DatasetError) as error:  # it could be made once
                raise DatasetError(f"{run.folder} was trained on other slides or labels than those of {source.name}: {error}") from None
            train = source.part(split.train)
            train.held_out, train.test, train.split = source.part(split.validation), source.part(split.test), split.name
            self._check_same(run, train)
            self._tests[key] = split.test
        if not len(self._tests[key]):
            raise DatasetError(f"the split of {run.folder} has no slide to test ({run.constants['split']['name']}); put slides there")
        return self._tests[key]

    def _check_same(self, run: BagRun, train: BagSource) -> None:
        from wavepath.tasks.base import build

        found = build(run.config).measure(train)
        changed = [name for name in (*_FEATURES, *_LABELS) if found[name] != run.constants.get(name)]
        if own := [name for name in changed if name in _FEATURES]:
            told = ", ".join(f"{name} {_told(run.constants.get(name))}, now {_told(found[name])}" for name in own)
            raise DatasetError(f"{run.folder} was trained on other features than those of {train.name} ({told}); give its own with --data")
        if not changed:
            try:
                RunFolder(run.folder).check_source(identity_of(train))
                return
            except ConfigError:
                pass
        what = f" ({', '.join(changed)} differ)" if changed else ", or slides with other tiles"
        raise DatasetError(
            f"{run.folder} was trained on other slides or labels than those of {train.name}{what}; give its own with --data and --labels, or train"
            " anew in another --out"
        )

    def predict(self, run: BagRun, source: BagSource, places: np.ndarray, each: Each | None = None, bar: Any = None) -> np.ndarray:
        """Class probabilities f64 [k, c] of the bags at `places` in `source`.

        Args:
            each: is given the place, the probabilities f32 [c] and the attention f32 [n] (of `clam_mb` [c, n]) of every slide.
            bar: progress, advanced by one for each slide.

        Raises:
            CheckpointError: nothing to restore. DatasetError: features of another width or encoder, or that cannot be read.
        """
        for name, found in (("width", source.width), ("encoder", list(source.encoder)), ("column", source.column)):
            before = run.constants.get(name)
            # An encoder that is not told (CLAM's features) may be the same one.
            if found != before and (name != "encoder" or (found and before)):
                raise DatasetError(
                    f"{run.folder} was trained on other features than those of {source.name} ({name} {_told(before)}, there {_told(found)}); embed"
                    " the slides with the encoder of its own"
                )
        config, task, state = restore_run(run.folder, parallel=self._devices)
        key = repr((config.mil.to_dict(), config.model.dtype, config.ema > 0, run.classes, source.width))
        names = ("probability", "attention", "class_attention") if each else ("probability",)
        predict = self._compiled.setdefault((key, names), self._devices.predict(task, names))
        wanted = source.part(places)
        wanted.buckets = tuple(config.mil.buckets)
        scores = np.zeros((len(places), len(run.classes)))
        with bag_batches.eval_batches(wanted, 1) as batches:
            for row, batch in enumerate(batches):
                out = predict(state, self._devices.put({name: batch[name] for name in ("features", "tiles")}))
                probability = np.asarray(out["probability"], np.float32)[0]
                scores[row] = probability
                if each is not None:
                    attention = np.asarray(out.get("class_attention", out["attention"]))[0]
                    each(int(places[row]), probability, attention[..., : int(wanted.lengths[row])])
                if bar is not None:
                    bar.advance(1, wanted.slides[row])
        return scores


def _told(value: Any) -> str:
    return " ".join(map(str, value)) or "not told" if isinstance(value, list | tuple) else str(value)
