"""Scores super-resolution runs on whole test crops, beside bicubic enlargement: PSNR, SSIM, LPIPS, one table, one picture.

Runs enlarge each low-resolution crop tile by tile, as whole slides are enlarged, and are compared with the crop itself as an 8-bit image. The
headline is the mode `wr`, in which a network is given the low resolution and nothing else. Networks with a wavelet branch also have a row `ref`, for
which they read the image one level above the input: at 2x that is the answer itself, so it bounds and does not measure.

Runs that differ in their seed alone are one row. Source: METHODS 4.7 and 4.8.
"""

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
from wavepath.evaluation import runs_table
from wavepath.evaluation.compare import group_runs
from wavepath.evaluation.image_metrics import CONVENTIONS, restoration
from wavepath.evaluation.lpips import read_lpips
from wavepath.evaluation.runs_table import column, entry
from wavepath.evaluation.superres_report import GAINS, Window, busiest, detail, draw_comparison, write_results
from wavepath.files import writable_folder
from wavepath.inference.grid import Grid, tiling
from wavepath.inference.superres import bicubic
from wavepath.inference.whole_slide import enlarge
from wavepath.tasks.base import build
from wavepath.training import parallel
from wavepath.training.checkpoint import restore_run
from wavepath.training.run_folder import RunFolder, identity_of

TASK, BASELINE = "superres", "bicubic"
SUSPICIOUS_DB = 40.0  # at 2x in `wr` mode on tissue: more than any published network reaches
LEAST_GAIN_DB = 0.05  # of `ref` over `wr`: what the wavelet branch should gain by the level above


@dataclass
class Row(runs_table.Row):
    """One line of the table: bicubic, or the runs of one setting in one mode."""

    mode: str = ""
    patch: int = 0  # px of low resolution that it was trained on
    windows: dict[int, np.ndarray] = field(default_factory=dict)  # of the first run, by image


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
    runs, known = runs_table.read_task_runs(paths, TASK, "--superres", "configs/cwt_net.py")
    runs_table.refuse_different(known, TASK, ("scale", "lr_source"))
    config = runs_table.config_for(known, data)
    groups = group_runs(runs)
    networks = [known[group.runs[0].folder].superres.network for group in groups]
    rows = [Row(BASELINE)]
    for group, network in zip(groups, networks, strict=True):
        name = network if networks.count(network) == 1 else group.name if network in group.name else f"{network} {group.name}"
        settings = known[group.runs[0].folder].superres
        rows.append(Row(name, group.runs, mode="wr", patch=int(settings.patch)))
        # A network whose every step was in `wr` mode has never read a reference: what it makes of one is chance.
        if network == "cwt-net" and settings.wavelet_branch and settings.wr_share < 1:
            rows.append(Row(f"{name} (ref)", group.runs, mode="ref", patch=int(settings.patch)))
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
    folders = dict.fromkeys(run.folder for row in rows for run in row.runs)
    remedy = "name other pyramids with --data, or divide the samples as they were"
    return runs_table.known_slides((str(sample["slide"]) for sample in source.samples), {str(run): _trained_slides(run) for run in folders}, remedy)


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
        found = {"mode": row.mode} | runs_table.run_facts(row)
        for name in row.scores[0][0]:
            found[name] = entry(column(row, name), slides, seed)
        if row.runs:
            for name in GAINS:
                found[f"{name}_gain"] = entry(column(row, name) - column(rows[0], name), slides, seed)
        entries[row.name] = found
    return entries


def red_flags(results: dict[str, Any]) -> list[str]:
    """What looks as if the answer had leaked, or the modes had been mixed up."""
    flags = []
    entries = results["probes"]
    for name, found in entries.items():
        value = found["psnr"]["value"]
        if results["scale"] == 2 and found["mode"] == "wr" and value > max(SUSPICIOUS_DB, entries[BASELINE]["psnr"]["value"] + 5):
            flags.append(
                f"{name}: {value:.2f} dB at 2x from the low resolution alone is more than published networks reach on tissue; check that the test"
                " images are not those of the training and that the low resolution was not made with more than bicubic reduction"
            )
        if found["mode"] == "ref" and value < (alone := entries[name.removesuffix(" (ref)")]["psnr"]["value"]) + LEAST_GAIN_DB:
            flags.append(
                f"{name}: reading the level above gains nothing (ref {value:.2f} dB, wr {alone:.2f} dB): the wavelet branch makes no use of what it"
                " reads yet (too few steps?)"
            )
    return flags


def _write_images(path: Path, rows: Sequence[Row], source: Any, chosen: np.ndarray) -> None:
    names = list(rows[0].scores[0][0])
    lines = []
    for row in rows:
        for run, scores in zip(row.runs or (None,), row.scores, strict=True):
            for number, values in zip(chosen, scores, strict=True):
                place = source.samples[number]
                facts = [place.get(name, "") for name in ("slide", "image", "x", "y")]
                lines.append([row.name, row.mode, run.folder if run else "", int(number), *facts, *(f"{values[name]:.6f}" for name in names)])
    runs_table.write_csv(path, ["method", "mode", "run", "image", "slide", "file", "x", "y", *names], lines)
