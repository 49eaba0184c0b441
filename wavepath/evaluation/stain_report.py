"""The tables and the pictures of scored virtual staining."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wavepath.console import table
from wavepath.evaluation import runs_table
from wavepath.evaluation.pictures import draw_sheet
from wavepath.evaluation.runs_table import cell, spread_cell
from wavepath.evaluation.stain_metrics import dab_positive, psnr, ssim
from wavepath.files import atomic_path, write_json, write_text

GAINS = ("psnr", "ssim")  # metrics whose gain over the H&E itself is told
TRUE = "true immunostain"
_CELL = 384  # px of a picture's longer side
_POSITIVE = (170, 20, 60)
_FADED = 0.4  # of what a picture has, where it is not positive
_PANEL, _COLUMNS = 2.6, 4  # inches, and panels beside one another
_TITLES = {"psnr": "PSNR", "ssim": "SSIM", "ssim_g": "SSIM Gauss", "psnr_shift": "PSNR aligned", "ssim_shift": "SSIM aligned"}


# Tables ----------------------------------------------------------------------------------------------------------------------------------


def _decimals(name: str) -> int:
    return 2 if name.startswith("psnr") else 4


def tables(results: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Head and rows of two tables: how like the true image, and how much DAB where."""
    entries = results["probes"]
    distances = [f"frechet_{name}" for name in results["features"]]
    gains = [f"{_TITLES[name]} over copy" for name in GAINS]
    alike = ["method", *_TITLES.values(), *(f"Frechet {name}" for name in results["features"]), *gains]
    dab = ["method", "positive area", "area error", "area bias", "area correlation", "DAB correlation", *runs_table.COST_HEAD]
    places = {name: _places(max(found[name]["value"] for found in entries.values())) for name in distances}
    first, second = [], []
    for name, found in entries.items():
        cells = [cell(found[metric], _decimals(metric)) for metric in _TITLES] + [cell(found[metric], places[metric]) for metric in distances]
        first.append([name, *cells, *(spread_cell(found.get(f"{metric}_gain"), _decimals(metric)) for metric in GAINS)])
        second.append([
            name, cell(found["dab_output"], 4), cell(found["dab_error"], 4), cell(found["dab_bias"], 4, "+"),
            spread_cell(found["area_correlation"], 2, ""), spread_cell(found["dab_correlation"], 2, ""), *runs_table.cost_cells(found),
        ])  # fmt: skip
    second.append([TRUE, cell(results["positive_area"], 4), *["-"] * (len(dab) - 2)])
    return [(alike, first), (dab, second)]


def _places(value: float) -> int:
    """Decimals that leave three digits of a value, two at least: Frechet distances have the scale of their features."""
    return 2 if value >= 1 or value <= 0 else min(2 - math.floor(math.log10(value)), 6)


def text_table(results: dict[str, Any]) -> str:
    """The methods and their metrics as plain text."""
    return "\n\n".join(table(*part) for part in tables(results))


def protocol(results: dict[str, Any]) -> str:
    """How images were scored, in a sentence."""
    if results["protocol"] == "crop":
        return f"One random crop of {results['crop']} px of each image is stained and scored (drawn from seed {results['seed']}; METHODS 3.6)."
    sizes = sorted({tuple(size) for size in results["tiles"].values()})
    told = " or ".join(f"{tile} px that overlap by {overlap}" for tile, overlap in sizes)
    return f"Whole images are stained in tiles of {told}, blended as whole slides are, and scored whole."


def registered(results: dict[str, Any]) -> str:
    """How well the pairs are aligned, as far as that is known."""
    shift = results["registration"]
    aligned = f"the immunostain is shifted by {shift['mean_shift']:g} px in the mean (at most {shift['max_shift']:g})" if shift["sure"] else ""
    unsure = f"of {shift['unsure']} of {results['images']} pairs the shift is not known" if shift["unsure"] else ""
    return "; ".join(filter(None, (aligned, unsure)))


def about(results: dict[str, Any]) -> str:
    """What was scored and how, in a few sentences."""
    seeds = max(found["seeds"] for found in results["probes"].values())
    colour = results["mean_colour"]
    slides = f"{results['groups']} slide{'s' * (results['groups'] > 1)}"
    return (
        f"{results['images']} test pair{'s' * (results['images'] > 1)} of {slides}. {protocol(results)} Registration: {registered(results)}."
        " A method is given the H&E alone; copy-input is the H&E itself"
        + (f", mean-colour the mean of the immunostains of {colour['of']} everywhere" if colour else "")
        + ". Aligned: the best over small shifts. Over copy: mean difference"
        + (" [95 % bootstrap interval over slides]." if results["groups"] > 1 else ".")
        + (f" Mean ± standard deviation over up to {seeds} seeds." if seeds > 1 else " One seed.")
        + "".join(f" Frechet distance over {found['about']} ({found['samples']} samples)." for found in results["features"].values())
        + ("" if results["features"] else " Frechet distance: no features given (--inception, --features-of).")
    )


def markdown(results: dict[str, Any]) -> str:
    """The same as Markdown, headed by what was scored; conventions and warnings below."""
    parts = "\n".join(runs_table.markdown_table(*part) for part in tables(results))
    conventions = "".join(f"\n* {name}: {text}." for name, text in results["conventions"].items())
    return f"{about(results)}\n\n{parts}\n{conventions.strip()}\n{runs_table.warnings_text(results['warnings'])}"


def write_results(out: Path, results: dict[str, Any]) -> None:
    """Writes `results.json` and `results.md`."""
    (head, rows), (more, others) = tables(results)
    both = [[*row, *other[1:]] for row, other in zip(rows, others, strict=False)]  # the report of a run has room for one
    write_json(out / "results.json", {**results, "about": about(results), "table": ([*head, *more[1:]], both)})
    write_text(out / "results.md", markdown(results))


# Pictures --------------------------------------------------------------------------------------------------------------------------------


def fitted(pixels: np.ndarray) -> Image.Image:
    """An image with a longer side of about `_CELL` px: enlarged by a whole factor, so that a pixel stays a square, or averaged."""
    longer = max(pixels.shape[:2])
    if longer <= _CELL:
        return Image.fromarray(pixels).resize([side * (_CELL // longer) for side in pixels.shape[1::-1]], Image.Resampling.NEAREST)
    return Image.fromarray(pixels).resize([max(1, round(side * _CELL / longer)) for side in pixels.shape[1::-1]], Image.Resampling.BOX)


def tinted(pixels: np.ndarray) -> np.ndarray:
    """uint8[h, w, 3]: the image in faded grey, what is positive in red."""
    grey = 255 - (255 - pixels.mean(axis=2, keepdims=True)) * _FADED
    return np.where(dab_positive(pixels)[..., None], np.array(_POSITIVE), grey).astype(np.uint8)


def draw_comparison(path: Path, shown: Sequence[tuple[int, str, np.ndarray, np.ndarray, Mapping[str, Any]]], rows: Sequence[Any]) -> None:
    """Draws two lines for each image: H&E, what the first run of each row made of it, the true immunostain; beneath them what is DAB-positive.

    Args:
        shown: number, kind, H&E, immunostain and facts of each image.
        rows: with `name` and `pictures`, uint8[h, w, 3] by number.
    """
    lines = []
    for number, kind, he, ihc, facts in shown:
        made = [row.pictures[number] for row in rows]
        notes = [f"{psnr(output, ihc):.2f} dB   {ssim(output, ihc):.4f}" for output in made]
        name = str(facts["name"])
        lines.append([
            (fitted(he), f"{he.shape[1]} x {he.shape[0]} px, {kind} area"),
            *((fitted(output), note) for output, note in zip(made, notes, strict=True)),
            (fitted(ihc), name if len(name) <= 40 else f"...{name[-37:]}"),
        ])  # fmt: skip
        blank = Image.new("RGB", fitted(he).size, "white")
        areas = [(fitted(tinted(image)), f"{100 * dab_positive(image).mean():.1f} % positive") for image in (*made, ihc)]
        lines.append([(blank, "DAB-positive in red"), *areas])
    draw_sheet(path, ["H&E", *(row.name for row in rows), TRUE], lines)


def draw_scatter(path: Path, rows: Sequence[Any], results: dict[str, Any]) -> None:
    """Draws painted over true positive area, a panel for each row, a point for each image and run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    columns = min(_COLUMNS, len(rows))
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(_PANEL * columns + 0.6, (_PANEL + 0.7) * lines + 0.3), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    areas = {name: [runs_table.column(row, name) for row in rows] for name in ("dab_output", "dab_target")}
    top = 1.05 * max(max(float(part.max()) for parts in areas.values() for part in parts), 0.01)
    for axis, row, painted, true in zip(axes.ravel(), rows, areas["dab_output"], areas["dab_target"], strict=False):
        axis.plot([0, top], [0, top], color="0.6", linewidth=0.8)
        for number, run in enumerate(painted):
            axis.plot(true[number], run, ".", alpha=0.7 if len(painted) == 1 else 0.45, markersize=5, color=f"C{number % 10}")
        title = [*textwrap.wrap(row.name, 34), f"r = {cell(results['probes'][row.name]['area_correlation'], 2)}"]
        axis.set_title("\n".join(title), fontsize=8)
        axis.set(xlim=(-0.03 * top, top), ylim=(-0.03 * top, top))  # nothing painted is a point on the line, not half a one
        axis.set_aspect("equal")
        for direction in (axis.xaxis, axis.yaxis):
            direction.set_major_locator(MaxNLocator(4))
            direction.set_major_formatter(PercentFormatter(1.0))
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
    for axis in axes.ravel()[len(rows) :]:
        axis.set_visible(False)
    figure.supxlabel("true positive area", fontsize=9)
    figure.supylabel("painted positive area", fontsize=9)
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))
