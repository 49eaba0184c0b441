"""Pools the out-of-fold predictions of fine-tuning runs: one model for each fold, each scored on the cases it has not seen.

The runs that differ in `data.fold` and `seed` alone are one arm; other differences make other arms, each a row of the result. A seed of
an arm is whole when every fold is there once. What is scored is the last checkpoint of each run: no epoch is chosen by the fold that is tested.
All metrics are of the pooled predictions of a seed, so the AUC ranks the scores of different folds' models against one another.
"""

import contextlib
import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from wavepath import config as configs
from wavepath.console import progress, warn
from wavepath.data.labelled import LabelledSource, open_labelled, split
from wavepath.data.order import subset
from wavepath.data.pipeline import eval_batches
from wavepath.defaults import train_defaults
from wavepath.errors import CheckpointError, ConfigError, DatasetError
from wavepath.evaluation.evaluate import check_positive, few_cases, summarise, write_results
from wavepath.evaluation.overlap import Overlap, nothing_left, overlap_results, split_overlap, start_slides
from wavepath.evaluation.probes import COLUMNS, Predictions
from wavepath.evaluation.tile_pictures import draw_rows
from wavepath.files import read_json, writable_folder, write_text
from wavepath.tasks import lineage
from wavepath.training import parallel
from wavepath.training.checkpoint import restore_run, saved_steps
from wavepath.training.run_folder import HARMLESS, RunFolder, identity_of
from wavepath.training.runs import DONE, find_runs, natural_key, read_run

TASKS = ("finetune", "classify")
_FOLD_FIELDS = ("seed", "data.fold")
_LENGTH = "train.steps"


@dataclass(frozen=True)
class FoldRun:
    """One fine-tuning run: its folder, resolved config and constants."""

    folder: Path
    config: ConfigDict
    constants: dict[str, Any]

    @property
    def seed(self) -> int:
        return int(self.config.seed)

    @property
    def fold(self) -> int:
        return int(self.config.data.fold)

    def fields(self) -> dict[str, str]:
        """What tells its arm from others: the config without fold, seed and what changes nothing; paths inside of the run by their end."""
        named = {}
        for name, value in configs.flatten(self.config).items():
            if name in _FOLD_FIELDS or (name.startswith(HARMLESS) and name != _LENGTH):
                continue
            if isinstance(value, str) and value and name.startswith("data."):
                path, own = Path(value).resolve(), self.folder.resolve()
                value = path.relative_to(own).as_posix() if path.is_relative_to(own) else value
            named[name] = str(value)
        return {**named, "labels": str(self.constants.get("labels"))}


@dataclass(frozen=True)
class Scored:
    """Runs on their held-out folds: the predictions of each seed by arm, one class list for all, the runs, and the folder that predicted each row.

    Attributes:
        overlaps: by arm, of the slides that the encoder which its runs started from was pretrained on. Those are not among the predictions of any
            arm, unless they were to be kept.
    """

    classes: tuple[str, ...]
    arms: dict[str, list[Predictions]]
    folders: dict[str, list[np.ndarray]]
    seeds: dict[str, list[int]]
    overlaps: dict[str, Overlap]
    runs: tuple[FoldRun, ...]


def cross_validated(
    runs: Iterable[Path], out: Path, *, data: Path | None = None, labels: Path | None = None, positive: str = "", partial: bool = False,
    keep_pretraining: bool = False, bootstraps: int = 1000, seed: int = 0,
) -> dict:
    """Scores fine-tuning runs on their held-out folds.

    Args:
        runs, data, labels, partial, keep_pretraining: see `score_runs`.
        out: folder for `results.json`, `results.md`, `predictions.csv`, and pictures.
        positive: a class that is scored against the rest too.
        bootstraps, seed: of the intervals over cases.

    Returns:
        The content of results.json, as of `evaluation.evaluate`: an entry for each arm. Of several seeds the mean, their deviation, and the
        interval of the mean.

    Raises:
        As `score_runs`. DatasetError: an unknown positive class.
    """
    out = writable_folder(out)
    scored = score_runs(runs, data, labels, partial, keep_pretraining)
    check_positive(positive, scored.classes)
    (*_, first) = (many[0] for many in scored.arms.values())
    results: dict = {
        "kind": "arm", "runs": [str(run.folder) for run in scored.runs], "seed": seed, "positive": positive,
        "seeds": max(map(len, scored.arms.values())), "checkpoint": "last", **overlap_results(scored.overlaps),
        "probes": arm_entries(scored, positive, bootstraps, seed),
    }
    tiles = {str(tile): (str(case), int(label)) for many in scored.arms.values() for one in many
             for tile, case, label in zip(one.tiles, one.groups, one.truth, strict=True)}
    counts = np.bincount([label for _, label in tiles.values()], minlength=len(first.classes))
    results |= {
        "tiles": len(tiles), "groups": len({case for case, _ in tiles.values()}),
        "classes": dict(zip(first.classes, counts.tolist(), strict=True)),
    }
    cases, numbers = map(np.array, zip(*tiles.values(), strict=True))
    results["notes"] += few_cases(np.array(first.classes)[numbers], cases)
    write_arms(out / "predictions.csv", scored)
    results["pictures"] = draw_rows(out, scored.arms, positive=positive, bootstraps=bootstraps, seed=seed)
    write_results(out, results)
    return results


def arm_entries(scored: Scored, positive: str, bootstraps: int, seed: int) -> dict[str, dict]:
    """The arms' rows of a table of results."""
    return {
        arm: {
            "folds": len({int(fold) for one in many for fold in np.unique(one.fold)}), "seeds": len(many),
            **summarise(many, positive, bootstraps=bootstraps, seed=seed),
        }
        for arm, many in scored.arms.items()
    }


def write_arms(path: Path, scored: Scored) -> None:
    """One line for each arm, seed and tile."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["arm", "seed", "fold", "tile", "case", "label", "predicted", *(f"p_{name}" for name in scored.classes), "run"])
    for arm, many in scored.arms.items():
        for number, one, folders in zip(scored.seeds[arm], many, scored.folders[arm], strict=True):
            best = one.scores.argmax(1)
            for row, tile in enumerate(one.tiles):
                names = one.classes[one.truth[row]], one.classes[best[row]]
                values = (f"{value:.6f}" for value in one.scores[row])
                table.writerow([arm, number, one.fold[row], tile, one.groups[row], *names, *values, folders[row]])
    write_text(path, text.getvalue())


def score_runs(
    runs: Iterable[Path], data: Path | None = None, labels: Path | None = None, partial: bool = False, keep_pretraining: bool = False
) -> Scored:
    """Predicts the held-out folds of fine-tuning runs.

    Args:
        runs: run folders, or folders of them (of `wavepath sweep`).
        data: where the tiles (or slides) of all runs are now, if not where they were trained from. Other data is refused.
        labels: likewise the table or the regions.
        partial: score what is there where folds are missing or still training.
        keep_pretraining: score held-out slides that an encoder was pretrained on (before fine-tuning) too. A run's own encoder counts: those that
            were pretrained fold by fold have not seen their fold.

    Raises:
        ConfigError: runs of another task, a fold twice, folds that share cases, folds that are missing or not finished (without `partial`).
        CheckpointError: no whole checkpoint. DatasetError: data that has moved or changed, arms of different classes, nothing left to test on.
    """
    arms = group(read_fold_runs(runs, data, labels))
    for name, members in arms.items():
        check(name, members, partial)
    classes = {tuple(run.constants["classes"]) for members in arms.values() for run in members}
    if len(classes) > 1:
        raise DatasetError(f"the runs know different classes ({' and '.join(', '.join(names) for names in sorted(classes))}); score them apart")
    everyone = [run for members in arms.values() for run in members]
    total = sum(sum(run.constants["held_out_tiles"].values()) for run in everyone)
    pooled: dict[str, list[Predictions]] = {}
    folders: dict[str, list[np.ndarray]] = {}
    seen: dict[str, dict[str, bool]] = {}  # by arm: slide -> whether the encoder that was tested on it had seen it
    known: dict[str, bool] = {}
    with contextlib.closing(Predictor()) as predictor, progress("held-out tiles", total, "tiles") as bar:
        for arm, members in arms.items():
            pooled[arm], folders[arm], seen[arm], known[arm] = [], [], {}, True
            for number in sorted({run.seed for run in members}):
                mine = sorted((run for run in members if run.seed == number), key=lambda run: run.fold)
                parts = [predictor(run, bar)[1] for run in mine]
                for run, part in zip(mine, parts, strict=True):
                    before = start_slides(run.config, run.constants, predictor.folders(run))
                    known[arm] &= before is not None
                    free, _ = split_overlap(part.slides, before)
                    clean = set(part.slides[free].tolist())
                    for slide in np.unique(part.slides).tolist():
                        seen[arm][slide] = seen[arm].get(slide, False) or slide not in clean
                pooled[arm].append(pool(parts))
                folders[arm].append(np.repeat([str(run.folder) for run in mine], [len(part.truth) for part in parts]))
    overlaps = {}
    for arm, slides in seen.items():
        names = tuple(sorted(slide for slide, pretrained in slides.items() if pretrained))
        overlaps[arm] = Overlap(len(names), len(slides), names, known[arm], keep_pretraining)
    dropped = set() if keep_pretraining else {name for overlap in overlaps.values() for name in overlap.names}
    for arm, many in pooled.items():
        masks = [~np.isin(one.slides, list(dropped)) for one in many]
        if not all(mask.any() for mask in masks):
            raise DatasetError(nothing_left(overlaps[arm]))
        pooled[arm] = [one.rows(mask) for one, mask in zip(many, masks, strict=True)]
        folders[arm] = [names[mask] for names, mask in zip(folders[arm], masks, strict=True)]
    seeds = {arm: sorted({run.seed for run in members}) for arm, members in arms.items()}
    return Scored(classes.pop(), pooled, folders, seeds, overlaps, tuple(everyone))


def read_fold_runs(paths: Iterable[Path], data: Path | None = None, labels: Path | None = None) -> list[FoldRun]:
    """The fine-tuning runs in and below the paths; with `data` and `labels` as if they had been trained from there.

    Raises:
        ConfigError: a run of another task, or one that has not begun; `labels` for labels that are read from names.
    """
    found = []
    for folder in find_runs(paths):
        config, constants = folder / "config.json", folder / "constants.json"
        if not config.is_file() or not constants.is_file():
            raise ConfigError(f"{folder} has not begun to train; run its `wavepath train` (or the sweep) again, or leave it out")
        read = configs.complete(configs.load_json(config), train_defaults())
        if read.task not in TASKS:
            raise ConfigError(f"{folder} is a run of task {read.task!r}; wanted is one of configs/finetune.py or configs/resnet.py")
        if data is not None:
            read.data["slides" if read.data.slides else "dir"] = str(data)
        if labels is not None:
            if read.data.label_pattern:
                raise ConfigError(f"{folder} reads labels from the tiles' names (config.data.label_pattern); leave --labels out")
            read.data.labels = str(labels)
        found.append(FoldRun(folder, read, read_json(constants)))
    return found


def group(runs: Sequence[FoldRun]) -> dict[str, list[FoldRun]]:
    """The runs by arm; an arm's name says in what it differs from the others."""
    keyed: dict[tuple, list[FoldRun]] = {}
    for run in runs:
        keyed.setdefault(tuple(sorted(run.fields().items())), []).append(run)
    arms = [dict(key) for key in keyed]
    apart = [name for name in dict.fromkeys(name for arm in arms for name in arm) if len({arm.get(name) for arm in arms}) > 1]
    short = {name: name.rpartition(".")[2] for name in apart}
    titles = []
    for arm in arms:
        titles.append(", ".join(f"{short[name]}={_shown(arm.get(name, ''))}" for name in apart) or "fine-tuned")
    if len(set(titles)) < len(titles):
        titles = [", ".join(f"{name}={arm.get(name)}" for name in apart) for arm in arms]
    named = dict(zip(titles, keyed.values(), strict=True))
    return {title: named[title] for title in sorted(named, key=natural_key)}


def _shown(value: str) -> str:
    """A value in an arm's name: of a path its last two parts."""
    return "/".join(Path(value).parts[-2:]) if "/" in value else value or "none"


def check(arm: str, runs: Sequence[FoldRun], partial: bool) -> None:
    """Refuses an arm whose folds do not cover the cases exactly once for each seed.

    Raises:
        ConfigError: naming the runs.
    """
    folds = int(runs[0].config.data.folds)
    for seed in sorted({run.seed for run in runs}):
        seen: dict[int, FoldRun] = {}
        owner: dict[str, FoldRun] = {}
        for run in (run for run in runs if run.seed == seed):
            if run.fold in seen:
                raise ConfigError(f"fold {run.fold} of {arm!r}, seed {seed}, is there twice: {seen[run.fold].folder} and {run.folder}; leave one out")
            seen[run.fold] = run
            for case in run.constants["held_out_cases"]:
                if case in owner:
                    raise ConfigError(f"case {case!r} is held out by both {owner[case].folder} and {run.folder}; train them on one split")
                owner[case] = run
            state = read_run(run.folder)
            if state.status != DONE:
                problem = f"{run.folder} is not finished ({state.status}, step {state.step} of {run.config.train.steps})"
                if not partial:
                    raise ConfigError(f"{problem}; go on training it, or score its last checkpoint with --partial")
                if not saved_steps(run.folder):
                    raise CheckpointError(f"{problem} and has no checkpoint yet; leave it out")
                warn(f"{problem}: its last checkpoint is scored")
        missing = sorted(set(range(folds)) - set(seen))
        if missing:
            listed = f"{arm!r}, seed {seed}, lacks fold{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} of {folds}"
            if not partial:
                raise ConfigError(f"{listed}; train with --config.data.fold={missing[0]}, or score what is there with --partial")
            warn(f"{listed}: cases of the others alone are scored")


class Predictor:
    """Predicts held-out folds; data is opened, and a network compiled, once for all runs that share it.

    Args:
        limit: at most so many tiles of each fold, drawn evenly by a fixed shuffle; 0: all.
    """

    def __init__(self, limit: int = 0) -> None:
        self._limit = limit
        self._devices = parallel.Parallel("jit", jax.local_devices()[:1])
        self._sources: dict[str, LabelledSource] = {}
        self._compiled: dict[str, Any] = {}
        self._folds: dict[Path, LabelledSource] = {}

    def __call__(self, run: FoldRun, bar: Any, change: Callable[[np.ndarray], np.ndarray] | None = None) -> tuple[list[str], Predictions]:
        """Names of the tiles, and their predictions, in the order of the source.

        Args:
            change: uint8[b, h, w, 3] -> the images that are shown to the network in their place.

        Raises:
            ConfigError: the labels are not those of the training. DatasetError: other data, or none there; a tile that cannot be read.
        """
        _, task, state = restore_run(run.folder, parallel=self._devices)
        if run.folder not in self._folds:
            self._folds[run.folder] = self._held_out(run, task)
        config, held = run.config, self._folds[run.folder]
        key = repr((config.task, config.model.to_dict(), config.finetune.to_dict(), config.classify.to_dict(), run.constants["classes"]))
        predict = self._compiled.setdefault(key, self._devices.predict(task, ["probability"]))
        wanted = subset(len(held), self._limit or len(held))
        ids, scores = [], []
        with eval_batches(held, min(config.batch_size, len(wanted)), ids=wanted, on_corrupt=config.data.on_corrupt) as batches:
            for batch in batches:
                # A tile that cannot be read is replaced by another one, which has a row of its own.
                kept = (batch["mask"] > 0) & (batch["example_id"] == wanted[np.minimum(batch["position"], len(wanted) - 1)])
                ids.append(batch["example_id"][kept])
                if change is not None:
                    batch["image"] = change(batch["image"])
                scores.append(np.asarray(predict(state, self._devices.put(batch))["probability"], float)[kept])
                bar.advance(int(batch["mask"].sum()), run.folder.name)
        rows, probability = np.concatenate(ids), np.concatenate(scores)
        if not len(rows):
            raise DatasetError(f"none of the {len(held)} held-out tiles of {run.folder} can be read; restore the data")
        if len(rows) < len(wanted):
            warn(f"{run.folder}: {len(wanted) - len(rows)} of {len(wanted)} held-out tiles cannot be read and are not scored")
        fold = np.full(len(rows), run.fold)
        metas = [held.meta(int(index)) for index in rows]
        tiles = np.array([held.tile_name(int(index)) for index in rows], str)
        slides = np.array([lineage.slide_name(held, str(meta["slide"])) for meta in metas], str)
        classes = tuple(run.constants["classes"])
        return tiles.tolist(), Predictions(classes, held.labels[rows].astype(np.int64), probability, held.cases[rows], fold, tiles, slides)

    def folders(self, run: FoldRun) -> bool:
        """Whether the tiles of a run that was predicted are those of a folder of images."""
        return self._folds[run.folder].kind == "images"

    def _held_out(self, run: FoldRun, task: Any) -> LabelledSource:
        config = run.config
        for flag, name, what in (("--data", "slides" if config.data.slides else "dir", "data"), ("--labels", "labels", "labels")):
            place = config.data[name]
            if place and not Path(place).exists():
                raise DatasetError(f"the {what} of {run.folder} are not at {place}; give the place where they are with {flag}")
        key = repr((config.data.to_dict() | {"fold": 0}, config.prepare.to_dict(), config.model.image_size))
        if key not in self._sources:
            self._sources[key] = open_labelled(config)
        train = split(self._sources[key], config.data.folds, config.data.fold, config.data.fold_seed)
        held = task.held_out(train)
        try:
            RunFolder(run.folder).check_source(identity_of(train))
        except ConfigError:
            # The same labels in the same order, of other pictures: a folder of another resolution.
            raise DatasetError(f"{run.folder} was trained on other tiles than those of {train.name}; give its own with --data") from None
        return held

    def close(self) -> None:
        """Releases the data."""
        for source in self._sources.values():
            source.close()


def pool(parts: Sequence[Predictions]) -> Predictions:
    """The folds of one seed as one set."""
    columns = [[getattr(part, name) for part in parts] for name in COLUMNS]
    return Predictions(parts[0].classes, *(None if any(each is None for each in column) else np.concatenate(column) for column in columns))
