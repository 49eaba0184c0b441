"""Scores super-resolution runs on whole test crops, beside bicubic enlargement: PSNR, SSIM, LPIPS, one table, one picture.

Runs enlarge each low-resolution crop tile by tile, as whole slides are enlarged, and are compared with the crop itself as an 8-bit image. The
headline is the mode `wr`, in which a network is given the low resolution and nothing else. Networks with a wavelet branch also have a row `ref`, for
which they read the image one level above the input: at 2x that is the answer itself, so it bounds and does not measure.

Runs that differ in their seed alone are one row. Source: METHODS 4.7 and 4.8.
"""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from wavepath import config as configs
from wavepath.console import progress, say, warn
from wavepath.data.order import subset
from wavepath.defaults import train_defaults
from wavepath.errors import ConfigError, DatasetError, WavepathError
from wavepath.evaluation.compare import group_runs
from wavepath.evaluation.image_metrics import CONVENTIONS, restoration
from wavepath.evaluation.lpips import read_lpips
from wavepath.evaluation.superres_report import GAINS, Window, busiest, detail, draw_comparison, write_results
from wavepath.files import writable_folder, write_text
from wavepath.inference.grid import Grid, tiling
from wavepath.inference.superres import bicubic
from wavepath.inference.whole_slide import enlarge
from wavepath.tasks.base import build
from wavepath.training import parallel
from wavepath.training.checkpoint import restore_run
from wavepath.training.run_folder import RunFolder, identity_of
from wavepath.training.runs import DONE, Run, find_runs, read_run

TASK, BASELINE = "superres", "bicubic"
MOST_DB = 100.0  # an exact copy counts as this much in a mean, where its PSNR would be infinite
SUSPICIOUS_DB = 40.0  # at 2x in `wr` mode on tissue: more than any published network reaches
LEAST_GAIN_DB = 0.05  # of `ref` over `wr`: what the wavelet branch should gain by the level above
_BOOTSTRAPS = 1000
_NAMED = 5  # slides in a warning


@dataclass
class Row:
    """One line of the table: bicubic, or the runs of one setting in one mode. `scores[run][image]` maps metrics to values."""

    name: str
    mode: str
    runs: tuple[Run, ...] = ()
    patch: int = 0  # px of low resolution that it was trained on
    scores: list[list[dict[str, float]]] = field(default_factory=list)
    windows: dict[int, np.ndarray] = field(default_factory=dict)  # of the first run, by image
    facts: dict[str, Any] = field(default_factory=dict)


def evaluate_superres(
    runs: Iterable[Path], out: Path, *, data: Path | None = None, lpips: Sequence[Path] = (), max_images: int = 0, tile: int | None = None,
    overlap: int | None = None, batch_size: int = 16, seed: int = 0,
) -> dict[str, Any]:
    """Scores runs of the task `superres` on the test split of a pyramids dataset.

    Args:
        runs: run folders, or folders of them (of `wavepath sweep`); one scale and one kind of low resolution.
        out: folder for `results.json`, `results.md`, `images.csv` and `comparison.png`.
        data: the dataset; None: the one that the runs were trained from.
        lpips: files of weights, see `evaluation.lpips`; none: the table says that none were given.
        max_images: at most so many crops, drawn evenly by a fixed shuffle; 0: all.
        tile, overlap, batch_size: one tiling for all methods, see `grid.tiling`, of the largest patch that any was trained on.
        seed: of the intervals over slides.

    Returns:
        The content of results.json.

    Raises:
        ConfigError: runs of another task, or of different scales, or (without `data`) trained from different data.
        CheckpointError: no whole checkpoint. DatasetError: no test split, unfit weights.
    """
    if max_images < 0:
        raise ConfigError(f"--max-images {max_images} is not a number of images; 0 scores all")
    out = writable_folder(out)
    distances = read_lpips(lpips)
    rows, config = read_rows(runs, data)
    scale = int(config.superres.scale)
    tile, overlap = tiling(max(row.patch for row in rows), tile, overlap)
    source = open_test(config)
    chosen = np.arange(len(source.samples)) if not max_images else subset(len(source.samples), max_images)
    known = known_slides(rows, config, source)
    for text in known:
        warn(text)

    with progress("test crops", sum(max(1, len(row.runs)) for row in rows) * len(chosen), "crops") as bar:

        def score(row: Row, enlarged: Callable[[dict[str, np.ndarray]], np.ndarray]) -> None:
            found = []
            for number in chosen:
                images = source.whole(int(number))
                output = enlarged(images)
                found.append({**restoration(output, images["hr"], scale), **{one.name: one(output, images["hr"]) for one in distances}})
                if not row.scores and number in picked:
                    row.windows[int(number)] = picked[number].cut(output, scale)
                bar.advance(1, row.name)
            row.scores.append(found)

        picked = _windows(source, chosen, scale)
        score(rows[0], lambda images: bicubic(images["lr"], scale))
        for row in rows[1:]:
            for run in row.runs:
                score(row, Enlarger(run.folder, row.mode, row.facts, tile, overlap, batch_size))
    results = {
        "kind": "method", "task": TASK, "scale": scale, "lr_source": config.superres.lr_source, "data": str(config.data.dir), "split": "test",
        "images": len(chosen), "groups": len({source.samples[number]["slide"] for number in chosen}), "shave": scale, "tile": tile,
        "overlap": overlap, "seed": seed, "headline": "wr", "lpips": [one.name for one in distances] or "not given", "conventions": CONVENTIONS,
        "probes": summarise(rows, [str(source.samples[number]["slide"]) for number in chosen], seed),
        "windows": [vars(one) for one in picked.values()],
    }
    flags = red_flags(results)
    for text in flags:
        warn(text)
    results["warnings"] = [*known, *flags]
    _write_images(out / "images.csv", rows, source, chosen)
    write_results(out, results)
    draw_comparison(out / "comparison.png", [window.of(source.whole(window.image), scale) for window in picked.values()], rows, scale)
    return results


# What is scored --------------------------------------------------------------------------------------------------------------------------


def read_rows(paths: Iterable[Path], data: Path | None = None) -> tuple[list[Row], ConfigDict]:
    """Bicubic, then one row for each setting (and mode), and the config whose data is read.

    Raises:
        ConfigError: as `evaluate_superres` says.
    """
    runs = [read_run(folder) for folder in find_runs(paths)]
    known = {}
    for run in runs:
        path = run.folder / "config.json"
        if not path.is_file():
            raise ConfigError(f"{run.folder} has not begun to train; run its `wavepath train` (or the sweep) again, or leave it out")
        config = configs.complete(configs.load_json(path), train_defaults())
        if config.task != TASK:
            raise ConfigError(f"{run.folder} is a run of task {config.task!r}; --superres takes runs of configs/cwt_net.py")
        if run.status != DONE:
            warn(f"{run.folder} is not finished ({run.status}, step {run.step} of {config.train.steps}): its last checkpoint is scored")
        known[run.folder] = config
    for name in ("scale", "lr_source"):
        values = {str(config.superres[name]): folder for folder, config in known.items()}
        if len(values) > 1:
            listed = ", ".join(f"{value} ({folder})" for value, folder in values.items())
            raise ConfigError(f"the runs have different config.superres.{name}: {listed}; score them apart")
    config = next(iter(known.values())).copy_and_resolve_references()
    places = {str(one.data.dir) for one in known.values()}
    if data is None and len(places) > 1:
        raise ConfigError(f"the runs were trained from different data ({', '.join(sorted(places))}); name the test data with --data")
    with config.unlocked():
        config.data.dir = str(data or config.data.dir)
        if data is not None:
            config.data.exclude_slides = ""  # names slides of the training's data
    groups = group_runs(runs)
    networks = [known[group.runs[0].folder].superres.network for group in groups]
    rows = [Row(BASELINE, "")]
    for group, network in zip(groups, networks, strict=True):
        name = network if networks.count(network) == 1 else group.name if network in group.name else f"{network} {group.name}"
        settings = known[group.runs[0].folder].superres
        rows.append(Row(name, "wr", group.runs, int(settings.patch)))
        # A network whose every step was in `wr` mode has never read a reference: what it makes of one is chance.
        if network == "cwt-net" and settings.wavelet_branch and settings.wr_share < 1:
            rows.append(Row(f"{name} (ref)", "ref", group.runs, int(settings.patch)))
    return rows, config


def open_test(config: ConfigDict) -> Any:
    """The test split of the dataset that the config names.

    Raises:
        DatasetError: it is not there, or empty.
    """
    from wavepath.data.pyramid_source import open_pyramids

    if not config.data.dir or not Path(config.data.dir).exists():
        raise DatasetError(f"the pyramids of the runs are not at {config.data.dir or 'any place'}; give the place where they are with --data")
    source = open_pyramids(config, "test")
    if not len(source.samples):
        raise DatasetError(f"{config.data.dir} has no test samples; make it again with `wavepath pyramids` and a config.pyramids.test_share above 0")
    return source


def known_slides(rows: Sequence[Row], config: ConfigDict, source: Any) -> list[str]:
    """Warnings of test slides that a run was trained on: `--data` may have another split, and `wavepath pyramids` may have divided the run's own
    folder anew since."""
    tested, told = {str(sample["slide"]) for sample in source.samples}, []
    for run in dict.fromkeys(run.folder for row in rows for run in row.runs):
        trained = _trained_slides(run)
        if trained is None:
            told.append(f"{run} does not record its training slides, and its data is not what it was: test slides may be among them")
        elif common := sorted(tested & trained):
            named = ", ".join(common[:_NAMED]) + (f" and {len(common) - _NAMED} more" if len(common) > _NAMED else "")
            told.append(
                f"{run} was trained on {len(common)} of the {len(tested)} test slides ({named}): its scores are not of new slides; name other"
                " pyramids with --data, or divide the samples as they were"
            )
    return told


def _trained_slides(run: Path) -> set[str] | None:
    """The slides that a run was trained on: as it recorded them, or, of an older run, as its data has them if it is still the same. None: unknown."""
    from wavepath.data.pyramid_source import open_pyramids
    from wavepath.data.sources import restrict

    folder = RunFolder(run)
    recorded = (folder.constants() or {}).get("train_slides")
    if recorded is not None:
        return set(recorded)
    own = configs.complete(configs.load_json(run / "config.json"), train_defaults())
    try:
        trained = restrict(open_pyramids(own, "train"), (), own.data.max_tiles)
        folder.check_source(identity_of(trained))
    except WavepathError:  # moved, made anew, or divided otherwise
        return None
    return set(trained.slides)


class Enlarger:
    """A run in one mode: the images of a sample in, the enlarged 8-bit image out."""

    def __init__(self, run: Path, mode: str, facts: dict[str, Any], tile: int, overlap: int, batch: int):
        devices = parallel.Parallel("jit", jax.local_devices()[:1])

        def in_mode(config: ConfigDict) -> Any:
            with config.unlocked():
                config.superres.mode = mode
            return build(config)

        config, task, state = restore_run(run, parallel=devices, task_factory=in_mode)
        say(f"{run} at step {int(state.step)}, mode {mode}")
        self._state, self._put, self._scale = state, devices.put, int(config.superres.scale)
        self._predict = devices.predict(task, ("output",))
        self._mode, self._tile, self._overlap, self._batch = mode, tile, overlap, batch
        facts.setdefault("parameters", sum(leaf.size for leaf in jax.tree.leaves(state.params)))
        facts.setdefault("steps", []).append(int(state.step))

    def _run(self, **batch: np.ndarray) -> jax.Array:
        return self._predict(self._state, self._put(batch))["output"]

    def __call__(self, images: dict[str, np.ndarray]) -> np.ndarray:
        height, width = images["lr"].shape[:2]
        tiles = Grid(height, width, self._tile, self._overlap, self._overlap // 4).count
        sizes = dict(tile=self._tile, overlap=self._overlap, batch=min(self._batch, tiles))  # batches are filled up: not beyond the image
        # In the mode wr the low resolution is all there is, not only all that is used.
        above = {} if self._mode == "wr" else {"next": (images["hr"] if self._scale == 2 else images["next"], 2)}
        return enlarge(lambda lr, **more: self._run(lr=lr, **more), images["lr"], self._scale, extra=above, **sizes)


# What is told ----------------------------------------------------------------------------------------------------------------------------


def _windows(source: Any, chosen: np.ndarray, scale: int) -> dict[int, Window]:
    """Where the picture looks, by image: in the crops with the highest, upper-quartile and median detail of all, at their most detailed place."""
    energies = np.array([detail(source.whole(int(number))["hr"]) for number in chosen])
    order = np.argsort(-energies, kind="stable")
    ranks = {"highest": 0, "upper quartile": len(order) // 4, "median": len(order) // 2}
    found: dict[int, str] = {}
    for kind, rank in ranks.items():
        found.setdefault(int(chosen[order[rank]]), kind)
    return {number: busiest(source.whole(number)["hr"], number, kind, scale) for number, kind in found.items()}


def summarise(rows: Sequence[Row], slides: Sequence[str], seed: int) -> dict[str, dict[str, Any]]:
    """For each row its facts, and each metric as `value` (mean over images and runs), `images_sd`, over several runs `sd`, and the 95 % interval
    `low` to `high` of the mean over slides; `psnr_gain` and `ssim_gain` are those over bicubic, image by image."""
    entries = {}
    for row in rows:
        entry: dict[str, Any] = {"mode": row.mode, "seeds": len(row.runs)} | row.facts
        if row.runs:
            entry["runs"] = [str(run.folder) for run in row.runs]
            entry["seconds"] = [run.seconds for run in row.runs if np.isfinite(run.seconds)]
        for name in row.scores[0][0]:
            entry[name] = _entry(_column(row, name), slides, seed)
        if row.runs:
            for name in GAINS:
                entry[f"{name}_gain"] = _entry(_column(row, name) - _column(rows[0], name), slides, seed)
        entries[row.name] = entry
    return entries


def _column(row: Row, name: str) -> np.ndarray:
    """[runs, images]"""
    return np.minimum([[image[name] for image in run] for run in row.scores], MOST_DB if name.startswith("psnr") else np.inf)


def _entry(values: np.ndarray, slides: Sequence[str], seed: int) -> dict[str, float | None]:
    images = values.mean(axis=0)
    entry: dict[str, float | None] = {"value": float(images.mean()), "images_sd": float(images.std(ddof=1)) if len(images) > 1 else None}
    if len(values) > 1:
        entry["sd"] = float(values.mean(axis=1).std(ddof=1))
    names, member = np.unique(slides, return_inverse=True)
    entry["low"] = entry["high"] = None
    if len(names) > 1:
        sums, counts = np.bincount(member, images), np.bincount(member)
        drawn = np.random.default_rng(seed).integers(0, len(names), (_BOOTSTRAPS, len(names)))
        entry["low"], entry["high"] = (float(v) for v in np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5]))
    return {name: None if value is None else round(value, 6) for name, value in entry.items()}


def red_flags(results: dict[str, Any]) -> list[str]:
    """What looks as if the answer had leaked, or the modes had been mixed up."""
    flags = []
    entries = results["probes"]
    for name, entry in entries.items():
        value = entry["psnr"]["value"]
        if results["scale"] == 2 and entry["mode"] == "wr" and value > max(SUSPICIOUS_DB, entries[BASELINE]["psnr"]["value"] + 5):
            flags.append(
                f"{name}: {value:.2f} dB at 2x from the low resolution alone is more than published networks reach on tissue; check that the test"
                " images are not those of the training and that the low resolution was not made with more than bicubic reduction"
            )
        if entry["mode"] == "ref" and value < (alone := entries[name.removesuffix(" (ref)")]["psnr"]["value"]) + LEAST_GAIN_DB:
            flags.append(
                f"{name}: reading the level above gains nothing (ref {value:.2f} dB, wr {alone:.2f} dB): the wavelet branch makes no use of what it"
                " reads yet (too few steps?)"
            )
    return flags


def _write_images(path: Path, rows: Sequence[Row], source: Any, chosen: np.ndarray) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    names = list(rows[0].scores[0][0])
    table.writerow(["method", "mode", "run", "image", "slide", "file", "x", "y", *names])
    for row in rows:
        for run, scores in zip(row.runs or (None,), row.scores, strict=True):
            for number, values in zip(chosen, scores, strict=True):
                place = source.samples[number]
                facts = [place.get(name, "") for name in ("slide", "image", "x", "y")]
                table.writerow([row.name, row.mode, run.folder if run else "", int(number), *facts, *(f"{values[name]:.6f}" for name in names)])
    write_text(path, text.getvalue())
