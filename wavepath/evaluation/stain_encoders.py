"""Scores the contrastive encoders of virtual staining: can they tell which immunostain belongs to an H&E image?

Windows of the test pairs are embedded, and the cosine of each H&E window with each immunostain is taken: pairs on the diagonal, non-pairs
elsewhere. A pair is recognised where its cosine reaches a threshold, a non-pair where it does not.

    accuracy    the mean of both shares (balanced: there are n - 1 times as many non-pairs; it is what plain accuracy would be if as many
                non-pairs as pairs were drawn), so that guessing gives 0.5

The threshold is the best one on training windows; the best on the test windows themselves flatters, and the published 0.44 belongs to other encoders;
all three are told. Non-pairs of one slide share its colours and are the harder ones.

Source: METHODS 3.2.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int64
from ml_collections import ConfigDict

from wavepath.console import progress, say, warn
from wavepath.data.order import subset
from wavepath.errors import ConfigError, DatasetError, WavepathError
from wavepath.evaluation import runs_table, stain_encoders_report
from wavepath.evaluation.compare import group_runs
from wavepath.evaluation.pair_sweep import BINS, THRESHOLDS, Sweep, auc, best, rates, sweep
from wavepath.evaluation.runs_table import entry, of_runs
from wavepath.evaluation.stain import FEW_SLIDES, open_test
from wavepath.files import writable_folder
from wavepath.training import parallel
from wavepath.training.checkpoint import restore_run
from wavepath.training.run_folder import RunFolder

TASK = "stain_encoders"
PUBLISHED = 0.44  # threshold of the paper's encoders
NEAR = 5  # of the retrieval among the first so many
NO_BETTER = 0.55  # area under the curve below which encoders are as good as untrained
_TRAINING = 1024  # training windows that the threshold is chosen on, at most


@dataclass(frozen=True)
class Windows:
    """Places in pairs, `side` px a side, none over another: (sample, top, left) of each, and its slide."""

    side: int
    places: Int64[np.ndarray, "n 3"]
    slides: np.ndarray


@dataclass
class Row(runs_table.Row):
    """One line of the table: the runs of one setting."""

    config: ConfigDict | None = None
    tested: list[Sweep] = field(default_factory=list)
    trained: list[Sweep | None] = field(default_factory=list)


def evaluate_encoders(
    runs: Iterable[Path], out: Path, *, data: Path | None = None, max_images: int = 0, batch_size: int = 16, seed: int = 0
) -> dict[str, Any]:
    """Scores runs of the task `stain_encoders` on windows of the test split of stained pairs.

    Args:
        runs: run folders, or folders of them (of `wavepath sweep`), all of one `config.stain.crop`.
        out: folder for `results.json`, `results.md`, `curve.csv` and `encoders.png`.
        data: the pairs; None: those that the runs were trained from.
        max_images: at most so many windows, drawn evenly by a fixed shuffle; 0: all.
        batch_size: windows at once.
        seed: of the intervals over slides.

    Returns:
        The content of results.json.

    Raises:
        ConfigError: runs of another task or of several crops, or (without `data`) trained from different data.
        CheckpointError: no whole checkpoint. DatasetError: no test pairs, or fewer than two windows in them.
    """
    if max_images < 0:
        raise ConfigError(f"--max-images {max_images} is not a number of windows; 0 scores all")
    out = writable_folder(out)
    rows, config = read_rows(runs, data)
    side = int(config.stain.crop)
    source = open_test(config)
    windows = lay_windows(source, side, max_images)
    known = _known_slides(rows, source)
    for text in known:
        warn(text)
    with progress("encoders", sum(len(row.runs) for row in rows), "runs") as bar:
        for row in rows:
            learnt = _training_windows(row.config)
            for run in row.runs:
                embed = Embedder(run.folder, row.facts, batch_size)
                trained = sweep(*embed(*learnt), learnt[1].slides) if learnt else None
                thresholds = (PUBLISHED, *([best(trained)[0]] if trained else []))
                row.trained.append(trained)
                row.tested.append(sweep(*embed(source, windows), windows.slides, thresholds))
                bar.advance(1, row.name)
    results = {
        "kind": "encoders", "task": TASK, "data": str(config.data.dir), "split": "test", "windows": len(windows.places), "side": side,
        "images": len(np.unique(windows.places[:, 0])), "groups": len(np.unique(windows.slides)), "seed": seed, "near": NEAR,
        "chance": {"accuracy": 0.5, "auc": 0.5, "top1": 1 / len(windows.places), f"top{NEAR}": min(1.0, NEAR / len(windows.places))},
        "published_threshold": PUBLISHED, "probes": {row.name: summarise(row, windows.slides, seed) for row in rows},
    }
    flags = red_flags(results)
    for text in flags:
        warn(text)
    results["warnings"] = [*known, *flags]
    stain_encoders_report.write_results(out, results)
    stain_encoders_report.write_curve(out / "curve.csv", rows)
    stain_encoders_report.draw(out / "encoders.png", rows, results)
    return results


# What is scored --------------------------------------------------------------------------------------------------------------------------


def read_rows(paths: Iterable[Path], data: Path | None = None) -> tuple[list[Row], ConfigDict]:
    """One row for each setting, and the config whose data is read.

    Raises:
        ConfigError: as `evaluate_encoders` says.
    """
    runs, known = runs_table.read_task_runs(paths, TASK, "--stain-encoders", "configs/ceff_encoders.py")
    runs_table.refuse_different(known, "stain", ("crop",))
    config = runs_table.config_for(known, data)
    return [Row(group.name, group.runs, config=known[group.runs[0].folder]) for group in group_runs(runs)], config


def lay_windows(source: Any, side: int, most: int) -> Windows:
    """All windows of whole pairs, side by side from the upper left corner, or `most` of them drawn evenly.

    None overlaps another: two halves of one cell would be a non-pair that looks like a pair.

    Raises:
        DatasetError: fewer than two.
    """
    places = [
        (number, top, left) for number, sample in enumerate(source.samples)
        for top in range(0, sample["height"] - side + 1, side) for left in range(0, sample["width"] - side + 1, side)
    ]  # fmt: skip
    if len(places) < 2:
        raise DatasetError(f"{source.name} has {len(places)} windows of {side} px in its {source.split} pairs; two at least are needed to tell apart")
    chosen = range(len(places)) if not most else subset(len(places), max(2, most))
    kept = np.array([places[number] for number in chosen], np.int64)
    return Windows(side, kept, np.array([str(source.samples[number]["slide"]) for number in kept[:, 0]]))


def _training_windows(config: ConfigDict) -> tuple[Any, Windows] | None:
    """Windows that a run was trained on, or others of the same slides; None, with a warning, where they are no longer there."""
    try:
        source = open_test(config, "train")
        return source, lay_windows(source, int(config.stain.crop), _TRAINING)
    except WavepathError as error:
        warn(f"no threshold is chosen on training windows: {error}")
        return None


def _known_slides(rows: Sequence[Row], source: Any) -> list[str]:
    trained = {}
    for run in (run.folder for row in rows for run in row.runs):
        slides = (RunFolder(run).constants() or {}).get("train_slides")
        trained[str(run)] = None if slides is None else set(slides)
    return runs_table.known_slides((str(sample["slide"]) for sample in source.samples), trained, "name other pairs with --data")


class Embedder:
    """Both encoders of a run: windows in, unit embeddings float32[n, d] of H&E and of immunostains out. `facts` is told parameters and steps."""

    def __init__(self, run: Path, facts: dict[str, Any], batch: int):
        devices = parallel.Parallel("jit", jax.local_devices()[:1])
        _, task, state = restore_run(run, parallel=devices)
        say(f"{run} at step {int(state.step)}")
        self._state, self._put, self._batch = state, devices.put, batch
        self._predict = devices.predict(task, ("he", "ihc"))
        facts.setdefault("parameters", sum(leaf.size for leaf in jax.tree.leaves(state.params)))
        facts.setdefault("steps", []).append(int(state.step))

    def __call__(self, source: Any, windows: Windows) -> tuple[np.ndarray, np.ndarray]:
        side, found = windows.side, {"he": [], "ihc": []}
        count, batch = len(windows.places), min(self._batch, len(windows.places))
        for start in range(0, count, batch):
            # The last batch is filled up with its own beginning: one shape is compiled.
            places = windows.places[np.arange(start, start + batch) % count]
            images = [source.whole(int(number)) for number, _, _ in places]
            cut = {
                name: np.stack([image[name][top : top + side, left : left + side] for image, (_, top, left) in zip(images, places, strict=True)])
                for name in found
            }
            embedded = self._predict(self._state, self._put(cut))
            for name, parts in found.items():
                parts.append(np.asarray(embedded[name])[: count - start])
        return np.concatenate(found["he"]), np.concatenate(found["ihc"])


# What is told ----------------------------------------------------------------------------------------------------------------------------


def summarise(row: Row, slides: np.ndarray, seed: int) -> dict[str, Any]:
    """The facts of a row and its metrics, as `runs_table.entry`."""
    found, tested = runs_table.run_facts(row), row.tested
    chosen = [best(one)[0] for one in row.trained if one is not None]
    if chosen:
        at = [np.searchsorted(THRESHOLDS, threshold - 1e-9) for threshold in chosen]
        found["accuracy"] = entry(np.stack([one.right[threshold] for one, threshold in zip(tested, chosen, strict=True)]), slides, seed)
        found["threshold"] = of_runs(chosen)
        for name in ("same_slide", "other_slides"):
            halves = (rates(one.pairs, getattr(one, name)) for one in tested)
            found[f"accuracy_{name}"] = of_runs([(hit[k] + refused[k]) / 2 for (hit, refused), k in zip(halves, at, strict=True)])
        found["accuracy_training"] = of_runs([best(one)[1] for one in row.trained])
    found["accuracy_published"] = entry(np.stack([one.right[PUBLISHED] for one in tested]), slides, seed)
    for name, place in (("threshold_best", 0), ("accuracy_best", 1)):
        found[name] = of_runs([best(one)[place] for one in tested])
    for name, part in (("auc", "others"), ("auc_same_slide", "same_slide"), ("auc_other_slides", "other_slides")):
        found[name] = of_runs([auc(one.pairs, getattr(one, part)) for one in tested])
    for name, near in (("top1", 1), (f"top{NEAR}", NEAR)):
        found[name] = entry(np.stack([one.rank < near for one in tested]).astype(float), slides, seed)
    found["cosine_pairs"] = entry(np.stack([one.cosine for one in tested]), slides, seed)
    centres = THRESHOLDS + 1 / BINS
    found["cosine_others"] = of_runs([float((one.others * centres).sum() / one.others.sum()) for one in tested])
    return found


def red_flags(results: dict[str, Any]) -> list[str]:
    """Where the numbers say less than they seem to."""
    flags = []
    if results["groups"] < FEW_SLIDES:
        slides = "one slide" if results["groups"] == 1 else f"{results['groups']} slides"
        alone = ", so that all non-pairs are of one slide" if results["groups"] == 1 else ""
        flags.append(f"the test windows are of {slides}{alone}: another slide may give other numbers")
    for name, found in results["probes"].items():
        if (area := found["auc"]["value"]) < NO_BETTER:
            flags.append(f"{name}: pairs and non-pairs have much the same cosines (area under the curve {area:.3f}; guessing gives 0.5)")
    return flags
