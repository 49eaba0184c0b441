"""Scores virtual staining on test pairs: how like the true immunostain it is, how much DAB it paints, and whether where it belongs.

Beside the runs stand two methods that have learnt nothing: the H&E itself (`copy-input`), and one colour everywhere, the mean of the training
immunostains (`mean-colour`): pairs are never aligned to the pixel, so that a flat picture can have a higher PSNR than a good stain.

A run is given the H&E alone. Images are scored whole, stained in tiles as whole slides are; with `protocol=crop` one random crop of each, of the
side that was trained on, as METHODS 3.6 has reason to believe that the published numbers were made.

Runs that differ in their seed alone are one row. Source: METHODS 3.6 to 3.8.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from wavepath.console import progress, say, warn
from wavepath.data.order import subset
from wavepath.errors import ConfigError, DatasetError, WavepathError
from wavepath.evaluation import runs_table, stain_report
from wavepath.evaluation.compare import group_runs
from wavepath.evaluation.frechet import CONVENTIONS as DISTANCES
from wavepath.evaluation.frechet import Features, another_mpp, caveat, frechet
from wavepath.evaluation.runs_table import column, correlation, entry
from wavepath.evaluation.stain_metrics import CONVENTIONS, NAMES, scores
from wavepath.files import writable_folder
from wavepath.inference.grid import Grid
from wavepath.inference.stain import layout_of, load_stainer, network_name
from wavepath.inference.whole_slide import enlarge
from wavepath.tasks.base import build
from wavepath.training.run_folder import RunFolder

TASK, COPY, FLAT = "stain", "copy-input", "mean-colour"
PROTOCOLS = ("whole", "crop")
FEW_SLIDES = 5
LEAST_AREA, PAINTED = 0.01, 0.002  # of the true positive area, from which there is something to paint; of the painted one, below which it is nothing
_MEASURED = 256  # training pairs that the mean colour is taken over, at most
_THREADS = 4  # that score

Paint = Callable[[np.ndarray], np.ndarray]  # H&E uint8[h, w, 3] -> uint8[h, w, 3]


@dataclass
class Row(runs_table.Row):
    """One line of the table: a baseline, or the runs of one setting."""

    config: ConfigDict | None = None
    pictures: dict[int, np.ndarray] = field(default_factory=dict)  # of the first run, by image


def evaluate_stain(
    runs: Iterable[Path], out: Path, *, data: Path | None = None, protocol: str = "whole", tile: int | None = None, overlap: int | None = None,
    max_images: int = 0, inception: Path | None = None, features_of: Path | None = None, batch_size: int = 4, seed: int = 0,
) -> dict[str, Any]:
    """Scores runs of the task `stain` on the test split of stained pairs.

    Args:
        runs: run folders, or folders of them (of `wavepath sweep`).
        out: folder for `results.json`, `results.md`, `images.csv`, `comparison.png` and `scatter.png`.
        data: the pairs; None: those that the runs were trained from.
        protocol: `whole` images, or one random `crop` of each.
        tile, overlap, batch_size: of whole images in px, as `Stainer.tiling` takes them; by default as `wavepath stain` does.
        max_images: at most so many pairs, drawn evenly by a fixed shuffle; 0: all.
        inception: weights of InceptionV3; features_of: a run whose features serve instead, or as well: for the Frechet distance.
        seed: of the crops and of the intervals over slides.

    Returns:
        The content of results.json.

    Raises:
        ConfigError: runs of another task, or (without `data`) trained from different data; tiles that do not fit; with `crop` runs of several crops.
        CheckpointError: no whole checkpoint. DatasetError: no test pairs, pairs too small, unfit weights.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(f"--protocol {protocol} is unknown; choose {' or '.join(PROTOCOLS)}")
    if max_images < 0:
        raise ConfigError(f"--max-images {max_images} is not a number of images; 0 scores all")
    if protocol == "crop" and (tile is not None or overlap is not None):
        raise ConfigError("--tile and --overlap belong to whole images; leave them out with --protocol crop")
    out = writable_folder(out)
    rows, config = read_rows(runs, data)
    crop = _one_crop(rows) if protocol == "crop" else 0
    tilings = {row.name: (crop, 0) if crop else layout_of(row.config, tile, overlap) for row in rows if row.runs}
    features = [*([Features.inception(inception)] if inception else []), *([Features.of_run(features_of)] if features_of else [])]
    source = open_test(config)
    chosen = np.arange(len(source.samples)) if not max_images else subset(len(source.samples), max_images)
    known = known_slides(rows, source)
    known += [text for one in features if (text := another_mpp(one, (source.samples[number]["mpp"] for number in chosen)))]
    for text in known:
        warn(text)
    colour, colour_of = mean_colour(rows, config)

    def pair(number: int) -> tuple[np.ndarray, np.ndarray]:
        images = source.whole(int(number))
        if not crop:
            return images["he"], images["ihc"]
        place = random_crop(images["he"].shape[:2], crop, seed, int(number), source.samples[number])
        return images["he"][place], images["ihc"][place]

    truth = _true_features(features, lambda number: pair(number)[1], chosen)
    pictured: dict[int, str] = {}
    with progress("test pairs", sum(max(1, len(row.runs)) for row in rows) * len(chosen), "pairs") as bar, ThreadPoolExecutor(_THREADS) as pool:

        def score(row: Row, paint: Paint) -> None:
            found, waiting, seen = [], deque(), {one.name: [] for one in features}
            for number in chosen:
                he, ihc = pair(number)
                output = paint(he)
                # Metrics take as long as the network, and run beside it; a few outputs are held at most.
                waiting.append(pool.submit(scores, output, ihc, mpp=source.samples[number]["mpp"]))
                if len(waiting) > _THREADS:
                    found.append(waiting.popleft().result())
                for one in features:
                    seen[one.name].append(one([output]))
                if not row.scores and number in pictured:
                    row.pictures[int(number)] = output
                bar.advance(1, row.name)
            row.scores.append([*found, *(one.result() for one in waiting)])
            for one in features:
                row.facts.setdefault(f"frechet_{one.name}", []).append(frechet(np.concatenate(seen[one.name]), truth[one.name]))

        score(rows[0], lambda he: he)
        pictured |= _pictured(rows[0], chosen)
        if colour is not None:
            score(rows[1], lambda he: np.broadcast_to(colour, he.shape))
        for row in rows[2:]:
            for run in row.runs:
                score(row, Painter(run.folder, row.facts, *tilings[row.name], batch_size))
    rows = [row for row in rows if row.scores]
    slides = [str(source.samples[number]["slide"]) for number in chosen]
    results = {
        "kind": "method", "task": TASK, "data": str(config.data.dir), "split": "test", "images": len(chosen), "groups": len(set(slides)),
        "protocol": protocol, "crop": crop, "tiles": {name: list(sizes) for name, sizes in tilings.items()}, "seed": seed,
        "registration": registration([source.samples[number] for number in chosen]), "conventions": CONVENTIONS | (DISTANCES if features else {}),
        "mean_colour": None if colour is None else {"rgb": colour.tolist(), "of": colour_of},
        "positive_area": entry(column(rows[0], "dab_target"), slides, seed), "probes": summarise(rows, slides, seed),
        "features": {one.name: {"about": one.about, "width": one.dim, "samples": len(truth[one.name])} for one in features}, "pictured": pictured,
    }
    flags = [text for one in features if (text := caveat(len(truth[one.name]), one.dim))] + red_flags(results)
    for text in flags:
        warn(text)
    results["warnings"] = [*known, *flags]
    _write_images(out / "images.csv", rows, source, chosen)
    stain_report.write_results(out, results)
    shown = [(number, kind, *pair(number), source.samples[number]) for number, kind in pictured.items()]
    stain_report.draw_comparison(out / "comparison.png", shown, [row for row in rows if row.runs])
    stain_report.draw_scatter(out / "scatter.png", rows, results)
    return results


# What is scored --------------------------------------------------------------------------------------------------------------------------


def read_rows(paths: Iterable[Path], data: Path | None = None) -> tuple[list[Row], ConfigDict]:
    """The two baselines, then one row for each setting; and the config whose data is read.

    Raises:
        ConfigError: as `evaluate_stain` says.
    """
    runs, known = runs_table.read_task_runs(paths, TASK, "--stain", "configs/ceff.py")
    config = runs_table.config_for(known, data)
    groups = group_runs(runs)
    configs = [known[group.runs[0].folder] for group in groups]
    names = [network_name(one) for one in configs]
    rows = [Row(COPY), Row(FLAT)]
    for group, one, network in zip(groups, configs, names, strict=True):
        name = network if names.count(network) == 1 else group.name if network in group.name else f"{network} {group.name}"
        rows.append(Row(name, group.runs, config=one))
    return rows, config


def _one_crop(rows: Sequence[Row]) -> int:
    crops = {int(row.config.stain.crop): row.name for row in rows if row.runs}
    if len(crops) > 1:
        listed = ", ".join(f"{crop} ({name})" for crop, name in crops.items())
        raise ConfigError(f"--protocol crop scores crops of the side that was trained on, and the runs have several: {listed}; score them apart")
    return next(iter(crops))


def open_test(config: ConfigDict, split: str = "test") -> Any:
    """Whole pairs of a split of the dataset that the config names, of any size.

    Raises:
        DatasetError: it is not there, or the split is empty.
    """
    from wavepath.data.pair_source import open_pairs

    if not config.data.dir or not Path(config.data.dir).exists():
        raise DatasetError(f"the pairs of the runs are not at {config.data.dir or 'any place'}; give the place where they are with --data")
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.stain.update(dict(crop=1, margin=0))  # windows are not read here, and no image is too small for them
    source = open_pairs(config, split)
    if not len(source.samples):
        raise DatasetError(f"{config.data.dir} has no {split} pairs; make them again with `wavepath pairs` and a --test-share above 0 and below 1")
    return source


def random_crop(shape: tuple[int, int], crop: int, seed: int, number: int, facts: Mapping[str, Any]) -> tuple[slice, slice]:
    """Where the crop of an image lies: drawn from `seed` and the image's number alone.

    Raises:
        DatasetError: the image is smaller.
    """
    if min(shape) < crop:
        raise DatasetError(f"{facts['name']} has {shape[1]} x {shape[0]} px, and the crops {crop}; score with --protocol whole")
    draw = np.random.default_rng((seed, number))
    top, left = (int(draw.integers(0, side - crop + 1)) for side in shape)
    return slice(top, top + crop), slice(left, left + crop)


def mean_colour(rows: Sequence[Row], config: ConfigDict) -> tuple[np.ndarray | None, str]:
    """The mean RGB of training immunostains, uint8[3], and of which pairs: those that the first run was trained from, or, where they are no longer
    there, the training split of the tested ones. None, with a warning: there are neither."""
    own = next(row.config for row in rows if row.runs)
    for one in (own, config):
        try:
            source = open_test(one, "train")
        except WavepathError:
            continue
        chosen = subset(len(source.samples), _MEASURED)
        total, count = np.zeros(3), 0
        for number in chosen:
            image = source.whole(int(number))["ihc"]
            total, count = total + image.sum(axis=(0, 1), dtype=np.float64), count + image.shape[0] * image.shape[1]
        return np.rint(total / count).astype(np.uint8), f"{len(chosen)} training pairs of {one.data.dir}"
    warn(f"neither {own.data.dir} nor {config.data.dir} has training pairs: there is no row {FLAT}")
    return None, ""


def known_slides(rows: Sequence[Row], source: Any) -> list[str]:
    """Warnings of test slides that a run, or the encoders that it took over, were trained on."""
    trained: dict[str, set[str] | None] = {}
    for run in (run.folder for row in rows for run in row.runs):
        constants = RunFolder(run).constants() or {}
        parts = {str(run): constants} | ({f"{run}'s encoder pair": constants["encoders"]} if "encoders" in constants else {})
        trained |= {name: set(found["train_slides"]) if "train_slides" in found else None for name, found in parts.items()}
    return runs_table.known_slides((str(sample["slide"]) for sample in source.samples), trained, "name other pairs with --data")


def _true_features(features: Sequence[Features], image: Callable[[int], np.ndarray], chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Of the true immunostains, [samples, width] by name.

    Raises:
        DatasetError: too few for a distance: said ahead of the work.
    """
    if not features:
        return {}
    found: dict[str, list[np.ndarray]] = {one.name: [] for one in features}
    with progress("features of true immunostains", len(chosen), "images") as bar:
        for number in chosen:
            for one in features:
                found[one.name].append(one([image(number)]))
            bar.advance(1)
    whole = {name: np.concatenate(parts) for name, parts in found.items()}
    if short := [name for name, values in whole.items() if len(values) < 2]:
        raise DatasetError(f"{len(chosen)} test image gives one sample of {short[0]}, and a Frechet distance needs two; leave the features out")
    return whole


class Painter:
    """A run: H&E uint8[h, w, 3] in, the stained 8-bit image of the same size out. `facts` is told its parameters and steps."""

    def __init__(self, run: Path, facts: dict[str, Any], tile: int, overlap: int, batch: int):
        self._stainer = load_stainer(run, batch=batch, devices=1)
        say(f"{run}: {self._stainer.name} at step {self._stainer.step}")
        self._tile, self._overlap, self._batch = tile, overlap, batch
        facts.setdefault("steps", []).append(self._stainer.step)

    def __call__(self, he: np.ndarray) -> np.ndarray:
        tiles = Grid(*he.shape[:2], self._tile, self._overlap, self._overlap // 4).count
        sizes = dict(tile=self._tile, overlap=self._overlap, batch=min(self._batch, tiles))  # batches are filled up: not beyond the image
        return enlarge(self._stainer.predict, np.ascontiguousarray(he), 1, **sizes)


# What is told ----------------------------------------------------------------------------------------------------------------------------


def _pictured(row: Row, chosen: np.ndarray) -> dict[int, str]:
    """The images of the picture, with why: those of the highest, the upper-quartile and the median positive area."""
    areas = column(row, "dab_target")[0]
    order = np.argsort(-areas, kind="stable")
    found: dict[int, str] = {}
    for kind, rank in {"highest": 0, "upper quartile": len(order) // 4, "median": len(order) // 2}.items():
        found.setdefault(int(chosen[order[rank]]), kind)
    return found


def registration(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How far the pairs are shifted, in px, as far as that can be told: mean and largest length, over how many, and of how many it is not known."""
    sizes = [float(np.hypot(one["dx"], one["dy"])) for one in samples if one["sure"]]
    return {
        "sure": len(sizes), "unsure": len(samples) - len(sizes), "mean_shift": round(float(np.mean(sizes)), 2) if sizes else None,
        "max_shift": round(max(sizes), 2) if sizes else None,
    }


def summarise(rows: Sequence[Row], slides: Sequence[str], seed: int) -> dict[str, dict[str, Any]]:
    """For each row its facts, and each metric as `runs_table.entry`; `psnr_gain` and `ssim_gain` are those over the H&E, image by image;
    `dab_bias` is positive area minus the true one; `area_correlation` is Pearson's of the two over images."""
    entries = {}
    for row in rows:
        found = runs_table.run_facts(row)
        if row.config is not None:
            found["parameters"] = parameters_of(row.config)
            found["encoders"] = str(row.config.encoders)
        for name in NAMES:
            found[name] = entry(column(row, name), slides, seed)
        found["dab_bias"] = entry(column(row, "dab_output") - column(row, "dab_target"), slides, seed)
        found["area_correlation"] = correlation(column(row, "dab_output"), column(row, "dab_target")[0], slides, seed)
        for name in [name for name in found if name.startswith("frechet_")]:
            found[name] = runs_table.of_runs(found[name])
        if row.name != COPY:
            for name in stain_report.GAINS:
                found[f"{name}_gain"] = entry(column(row, name) - column(rows[0], name), slides, seed)
        entries[row.name] = found
    return entries


def parameters_of(config: ConfigDict) -> int:
    """Parameters of the generator, which is all that staining needs but for the frozen encoder."""
    abstract = jax.eval_shape(build(config).init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(abstract.params["generator"]))


def red_flags(results: dict[str, Any]) -> list[str]:
    """Where the numbers say less than they seem to."""
    flags, entries, truth = [], results["probes"], results["positive_area"]["value"]
    runs = {name: found for name, found in entries.items() if found["seeds"]}
    if results["groups"] < FEW_SLIDES:
        slides = "one slide" if results["groups"] == 1 else f"{results['groups']} slides"
        flags.append(f"the test pairs are of {slides}: differences between methods may be differences between slides")
    best = max(runs, key=lambda name: runs[name]["psnr"]["value"])
    if FLAT in entries and runs[best]["psnr"]["value"] <= (flat := entries[FLAT]["psnr"]["value"]):
        flags.append(
            f"no run has a higher PSNR than one colour everywhere ({flat:.2f} dB; the best, {best}: {runs[best]['psnr']['value']:.2f} dB): pixel by"
            " pixel nothing was learnt, or the pairs are not aligned well enough to tell"
        )
    for name, found in runs.items():
        if found["psnr"]["value"] <= (copied := entries[COPY]["psnr"]["value"]):
            flags.append(f"{name}: PSNR {found['psnr']['value']:.2f} dB is not better than that of the H&E itself ({copied:.2f} dB)")
        if truth >= LEAST_AREA and found["dab_output"]["value"] < PAINTED:
            painted = f"positive area {found['dab_output']['value']:.4f}, true {truth:.4f}"
            flags.append(f"{name} paints no DAB ({painted}): its area error is the area itself")
    if truth < LEAST_AREA:
        flags.append(f"the true immunostains are next to negative (positive area {truth:.4f}): area and DAB correlation say little")
    return flags


def _write_images(path: Path, rows: Sequence[Row], source: Any, chosen: np.ndarray) -> None:
    lines = []
    for row in rows:
        for run, found in zip(row.runs or (None,), row.scores, strict=True):
            for number, values in zip(chosen, found, strict=True):
                facts = [source.samples[number].get(name, "") for name in ("name", "slide", "label", "dx", "dy", "sure")]
                lines.append([row.name, run.folder if run else "", int(number), *facts, *(f"{values[name]:.6f}" for name in NAMES)])
    runs_table.write_csv(path, ["method", "run", "image", "pair", "slide", "label", "dx", "dy", "sure", *NAMES], lines)
