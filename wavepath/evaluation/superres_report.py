"""The table and the picture of scored super-resolution runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wavepath.console import table
from wavepath.evaluation import runs_table
from wavepath.evaluation.image_metrics import restoration
from wavepath.evaluation.pictures import draw_sheet
from wavepath.files import write_json, write_text

SIDE = 96  # px of low resolution that a window of the picture shows, or as many as its cell holds once enlarged
GAINS = ("psnr", "ssim")  # metrics whose gain over bicubic is told
_CELL = 384  # px
_TITLES = {
    "psnr": "PSNR", "ssim": "SSIM", "psnr_y": "PSNR Y", "ssim_y": "SSIM Y", "lpips_alex": "LPIPS alex", "lpips_vgg": "LPIPS vgg",
    "psnr_gain": "PSNR over bicubic", "ssim_gain": "SSIM over bicubic",
}  # fmt: skip


# Table -----------------------------------------------------------------------------------------------------------------------------------


def _rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    entries = results["probes"]
    metrics = [name for name in _TITLES if not name.endswith("_gain") and name in next(iter(entries.values()))]
    head = ["method", *(_TITLES[name] for name in metrics), *(_TITLES[f"{name}_gain"] for name in GAINS), *runs_table.COST_HEAD]
    rows = []
    for name, entry in entries.items():
        cells = [runs_table.cell(entry[metric], 2 if metric.startswith("psnr") else 4) for metric in metrics]
        gains = [runs_table.spread_cell(entry.get(f"{metric}_gain"), 2 if metric == "psnr" else 4) for metric in GAINS]
        rows.append([name, *cells, *gains, *runs_table.cost_cells(entry)])
    return head, rows


def text_table(results: dict[str, Any]) -> str:
    """The methods and their metrics as plain text."""
    return table(*_rows(results))


def about(results: dict[str, Any]) -> str:
    """What was scored and how, in a sentence or two."""
    seeds = max(entry["seeds"] for entry in results["probes"].values())
    made = "bicubic reduction of the crop" if results["lr_source"] == "bicubic" else "the pyramid's own level"
    slides = f"{results['groups']} slide{'s' * (results['groups'] > 1)}"
    return (
        f"{results['images']} test crops of {slides}, {results['scale']}x, low resolution by {made}. A method is given the low resolution"
        " alone (mode wr); rows marked (ref) also read the level above it, which at 2x is the answer. PSNR in dB and SSIM in RGB without"
        f" border crop; Y: luma with {results['shave']} px cut at each border; 8-bit images."
        + (f" Mean ± standard deviation over up to {seeds} seeds." if seeds > 1 else " One seed.")
        + " Over bicubic: mean difference" + (" [95 % bootstrap interval over slides]." if results["groups"] > 1 else ".")
        + (" LPIPS: weights not given (--lpips)." if results["lpips"] == "not given" else "")
    )


def markdown(results: dict[str, Any]) -> str:
    """The same as a Markdown table, headed by what was scored; warnings below."""
    return about(results) + "\n\n" + runs_table.markdown_table(*_rows(results)) + runs_table.warnings_text(results["warnings"])


def write_results(out: Path, results: dict[str, Any]) -> None:
    """Writes `results.json` and `results.md`."""
    write_json(out / "results.json", {**results, "about": about(results), "table": _rows(results)})
    write_text(out / "results.md", markdown(results))


# Picture ---------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """A square of a test crop, in low-resolution px; `kind` says by which rule the crop was chosen."""

    image: int
    x: int
    y: int
    side: int
    kind: str

    def cut(self, pixels: np.ndarray, factor: int) -> np.ndarray:
        """The square of an image `factor` times as large as the low resolution."""
        x, y, side = (factor * value for value in (self.x, self.y, self.side))
        return pixels[y : y + side, x : x + side].copy()

    def of(self, images: dict[str, np.ndarray], scale: int) -> dict[str, Any]:
        """The squares of low and high resolution, with the window."""
        return {"window": self, "lr": self.cut(images["lr"], 1), "hr": self.cut(images["hr"], scale)}


def _energy(pixels: np.ndarray) -> np.ndarray:
    """Squared differences to the right and downward neighbours, float32[h - 1, w - 1]."""
    grey = pixels.mean(axis=2, dtype=np.float32)
    return np.square(np.diff(grey, axis=1)[:-1]) + np.square(np.diff(grey, axis=0)[:, :-1])


def detail(pixels: np.ndarray) -> float:
    """The mean squared gradient of an image."""
    return float(_energy(pixels).mean())


def busiest(hr: np.ndarray, image: int, kind: str, scale: int) -> Window:
    """The window with the largest mean squared gradient among those at every half side."""
    height, width = hr.shape[0] // scale, hr.shape[1] // scale
    side = min(SIDE, _CELL // scale, height, width)
    energy = _energy(hr)
    best, place = -1.0, (0, 0)
    for y in sorted({*range(0, height - side + 1, max(1, side // 2)), height - side}):
        for x in sorted({*range(0, width - side + 1, max(1, side // 2)), width - side}):
            value = float(energy[y * scale : (y + side) * scale, x * scale : (x + side) * scale].mean())
            if value > best:
                best, place = value, (x, y)
    return Window(image, *place, side, kind)


def draw_comparison(path: Path, places: Sequence[dict[str, Any]], rows: Sequence[Any], scale: int) -> None:
    """Draws a line for each window: low resolution (nearest), each method, high resolution; under each method the PSNR and SSIM of the window.

    Args:
        places: as `Window.of` gives them.
        rows: with `name` and `windows`, uint8[side * scale, side * scale, 3] by image.
    """
    # Enlarged by whole factors, so that a pixel stays a square and nothing is smoothed that a method left rough.
    sides = [place["window"].side * scale * (_CELL // (place["window"].side * scale)) for place in places]
    lines = []
    for side, place in zip(sides, places, strict=True):
        window = place["window"]
        cells = [(place["lr"], f"{window.side} px, {window.kind} detail")]
        for row in rows:
            found = restoration(row.windows[window.image], place["hr"], 0)
            cells.append((row.windows[window.image], f"{found['psnr']:.2f} dB   {found['ssim']:.4f}"))
        cells.append((place["hr"], f"crop {window.image}"))
        lines.append([(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), note) for pixels, note in cells])
    draw_sheet(path, ["low resolution", *(row.name for row in rows), "high resolution"], lines)
