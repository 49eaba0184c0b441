"""What super-resolution is worth for a diagnosis: a classifier trained on images as they are sees its held-out images restored.

    held-out image -> as it is (`original`)
                   -> bicubic reduction -> bicubic enlargement, or a network in mode `wr` -> classifier -> accuracy, by case

The table's first line is what the classifier can do at all; the others say how much of it each method keeps. Any run that learns labels serves; one
of `configs/resnet.py` sees pixels as they are, whereas fine-tuned transformers resize tiles to their input, which hides what was restored where they
make them smaller.

Source: METHODS 4.8 (section IV-F of the paper).
"""

import contextlib
import csv
import io
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from wavepath.console import progress
from wavepath.errors import ConfigError
from wavepath.evaluation.crossvalidate import FoldRun, Predictor, check, group, pool, read_fold_runs
from wavepath.evaluation.evaluate import check_positive, summarise, write_results
from wavepath.evaluation.superres import BASELINE, Enlarger, read_rows
from wavepath.files import writable_folder, write_text
from wavepath.inference.grid import tiling
from wavepath.inference.superres import bicubic

ORIGINAL = "original"


def diagnose(
    classifier: Path, runs: Iterable[Path], out: Path, *, data: Path | None = None, positive: str = "", max_images: int = 0, tile: int | None = None,
    overlap: int | None = None, batch_size: int = 16, seed: int = 0, bootstraps: int = 1000,
) -> dict:
    """Classifies held-out images, and what each method restores from their low resolution.

    Args:
        classifier: a run of the task `classify` or `finetune`, or a folder of its folds (and seeds), which are pooled.
        runs, data: as of `superres.evaluate_superres`; runs of one setting are one row.
        out: folder for `results.json`, `results.md`, `predictions.csv` and `confusion.png`.
        positive: a class that is scored against the rest too.
        max_images: at most so many held-out images of each fold; 0: all.
        tile, overlap, batch_size: as of `superres.evaluate_superres`.
        seed, bootstraps: of the intervals over cases.

    Returns:
        The content of results.json, as of `evaluation.evaluate`: an entry for each method.

    Raises:
        ConfigError: classifiers of several settings, a run of another task. DatasetError, CheckpointError: as of `crossvalidate`.
    """
    out = writable_folder(out)
    members = read_classifier(classifier, positive)
    names = members[0].constants["classes"]
    rows, config = read_rows(runs, data)
    scale = int(config.superres.scale)
    tile, overlap = tiling(max(row.patch for row in rows), tile, overlap)
    methods: list[tuple[str, Path | None]] = [(ORIGINAL, None), (BASELINE, None)]
    methods += [(row.name, run.folder) for row in rows if row.mode == "wr" for run in row.runs]
    pooled: dict[str, list] = {}
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["method", "run", "classifier", "tile", "case", "label", "predicted", *(f"p_{name}" for name in names)])
    seen: dict[str, tuple[str, int]] = {}
    total = len(methods) * sum(min(max_images or np.inf, sum(run.constants["held_out_tiles"].values())) for run in members)
    with contextlib.closing(Predictor(max_images)) as predictor, progress("restored images", int(total), "images") as bar:
        for method, folder in methods:
            change = _changer(method, folder, scale, tile, overlap, batch_size)
            for number in sorted({run.seed for run in members}):
                parts = []
                for run in (run for run in members if run.seed == number):
                    tiles, part = predictor(run, bar, change)
                    parts.append(part)
                    for row, name in enumerate(tiles):
                        truth, best = names[part.truth[row]], names[part.scores[row].argmax()]
                        values = (f"{value:.6f}" for value in part.scores[row])
                        table.writerow([method, folder or "", run.folder, name, part.groups[row], truth, best, *values])
                        seen[name] = str(part.groups[row]), int(part.truth[row])
                pooled.setdefault(method, []).append(pool(parts))
    counts = np.bincount([label for _, label in seen.values()], minlength=len(names))
    results = {
        "kind": "method", "scored": f"restored from bicubic reduction by {scale}", "scale": scale, "classifier": [str(run.folder) for run in members],
        "seed": seed, "positive": positive, "tiles": len(seen), "groups": len({case for case, _ in seen.values()}),
        "classes": dict(zip(names, counts.tolist(), strict=True)), "seeds": max(map(len, pooled.values())),
        "probes": {
            method: {"seeds": len(many), **summarise(many, positive, bootstraps=bootstraps, seed=seed)} for method, many in pooled.items()
        },
    }
    write_text(out / "predictions.csv", text.getvalue())
    write_results(out, results)
    return results


def read_classifier(folder: Path, positive: str = "") -> list[FoldRun]:
    """The classifiers in a folder: one fold, or several of one setting; raises as `diagnose`."""
    arms = group(read_fold_runs([folder]))
    if len(arms) > 1:
        raise ConfigError(f"{folder} holds classifiers of {len(arms)} settings ({', '.join(arms)}); give the folder of one")
    ((arm, members),) = arms.items()
    if len(members) > 1:  # one fold is enough here: the question is what restoring costs, on the same images for every method
        check(arm, members, partial=True)
    check_positive(positive, members[0].constants["classes"])
    return members


def _changer(method: str, run: Path | None, scale: int, tile: int, overlap: int, batch: int) -> Callable[[np.ndarray], np.ndarray]:
    """uint8[b, h, w, 3] -> uint8[b, h', w', 3], the size cut to a multiple of the scale for every method, the original too."""
    enlarge: Callable[[np.ndarray], np.ndarray] | None = None
    if method == BASELINE:

        def enlarge(lr: np.ndarray) -> np.ndarray:
            return bicubic(lr, scale)

    def change(images: np.ndarray) -> np.ndarray:
        nonlocal enlarge
        height, width = (side // scale for side in images.shape[1:3])
        whole = np.ascontiguousarray(images[:, : height * scale, : width * scale])
        if method == ORIGINAL:
            return whole
        if enlarge is None:
            network = Enlarger(run, "wr", {}, tile, overlap, batch)

            def enlarge(lr: np.ndarray) -> np.ndarray:
                return network({"lr": lr})

        reduced = (np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)) for image in whole)
        return np.stack([enlarge(lr) for lr in reduced])

    return change
