"""Phantom slides: procedural H&E with known truth, the data that comes with wavepath.

Each slide is a flat pyramidal TIFF like a scanner's, drawn by Beer-Lambert's law from stain concentrations: glands,
tumour nests, collagen with fibroblasts, fat, lymphoid follicles, vessels, glass; a pen stroke, a fold and an
out-of-focus patch. Beside the slides lie the outlines of all classes (QuPath GeoJSON) and a table of slide labels. The
files are a function of the seed: the same bytes again, in any process and for any number of threads (on one kind of
processor and with the same library versions, since floating-point functions differ in the last bit between them).

A slide of 40,000 px a side is drawn with the memory of one row of blocks; the plan behind it costs one value for each
16 x 16 px.
"""

import csv
import io
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from wavepath import console
from wavepath.data.phantom_noise import CELL
from wavepath.data.phantom_plan import Plan, make_plan
from wavepath.data.phantom_regions import region_features
from wavepath.data.phantom_tissue import make_tools, render_block
from wavepath.errors import WavepathError
from wavepath.files import writable_folder, write_text
from wavepath.interop.geojson import write_features
from wavepath.interop.tiff import PyramidWriter

BLOCK = 512  # px; blocks are drawn whole, so that no result depends on how rows are handed on
MIN_SIZE = 512


def slide_name(number: int, name: str = "phantom") -> str:
    """The id of slide `number`: `phantom_000`, ..."""
    return f"{name}_{number:03d}"


def slide_label(number: int) -> tuple[str, str]:
    """Case and label of a slide. Every fourth slide is of the case before it; cases alternate tumour and normal."""
    case = (3 * number + 3) // 4
    return f"case_{case:03d}", "normal" if case % 2 else "tumour"


def strips(plan: Plan, threads: int = 2, rows: int = BLOCK) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """The picture of a slide, top to bottom.

    Args:
        plan: the slide's layout.
        threads: blocks drawn at a time.
        rows: rows of a strip (the last may have fewer); the pixels do not depend on it.
    """
    size = plan.size
    tools = make_tools(plan)
    columns = range(0, size, BLOCK)

    def extent(start: int) -> int:
        return min(BLOCK, -(-(size - start) // CELL) * CELL)

    kept = np.empty((0, size, 3), np.uint8)
    with ThreadPoolExecutor(threads) as pool:
        for y in range(0, size, BLOCK):
            band = np.empty((min(BLOCK, size - y), size, 3), np.uint8)

            def draw(x: int, y: int = y, band: np.ndarray = band) -> None:
                block = render_block(plan, tools, y, x, extent(y), extent(x))
                band[:, x : x + BLOCK] = block[: len(band), : size - x]

            list(pool.map(draw, columns))  # also raises what a thread raised
            kept = np.concatenate([kept, band]) if len(kept) else band
            while len(kept) >= rows or (y + BLOCK >= size and len(kept)):
                yield kept[:rows]
                kept = kept[rows:]


def write_phantom(
    path: Path, regions: Path, plan: Plan, *, threads: int = 2, rows: int = BLOCK, bar: console.Progress | None = None
) -> None:
    """Draws one slide and writes its pyramid and its regions.

    Args:
        path: the TIFF to write.
        regions: the GeoJSON to write.
        plan: the slide's layout.
        threads: blocks drawn and tiles compressed at a time.
        rows: rows of a strip; the bytes do not depend on it.
        bar: progress, in megapixels.
    """
    write_features(regions, region_features(plan))
    description = f"wavepath phantom, seed {plan.seed[0]}, slide {plan.seed[1]}"
    with PyramidWriter(
        path, plan.size, plan.size, plan.mpp, quality=85, description=description, workers=threads
    ) as writer:
        for strip in strips(plan, threads, rows):
            writer.write_rows(strip)
            if bar is not None:
                bar.advance(strip.shape[0] * strip.shape[1] / 1e6, path.name)


def make_phantoms(
    out: Path, slides: int, seed: int, size: int = 8192, mpp: float = 0.25, progress: bool = True, name: str = "phantom"
) -> list[Path]:
    """Writes a set of phantom slides with their truth.

    `out/phantom_000.tiff`, ... are the slides, `out/regions/<id>.geojson` the outlines of the classes tumour, gland,
    stroma, lymphocytes, fat and of the artefacts pen, fold, blur (none on slides under 0.5 mm a side),
    `out/labels.csv` the columns case_id, slide_id, label. Slide `n` of a seed is the same whatever the number of
    slides.

    Args:
        out: folder, made where it is missing; slides of the same names are replaced.
        slides: how many.
        seed: any integer from 0.
        size: side in pixels, from 512.
        mpp: micrometres per pixel, 0.1 to 0.5.
        progress: show progress and ETA.
        name: what the slides are called before their number. Sets of different seeds are different slides, and want different names where they
            are used together: a slide is known by its id.

    Returns:
        The slides' paths.

    Raises:
        WavepathError: a number out of range, or a folder that cannot be written.
    """
    if slides < 1:
        raise WavepathError(f"cannot make {slides} slides; give --slides 1 or more")
    if size < MIN_SIZE:
        raise WavepathError(f"a phantom of {size} px holds no tissue to speak of; give --size {MIN_SIZE} or more")
    if not 0.1 <= mpp <= 0.5:
        raise WavepathError(f"phantoms are drawn at 0.1 to 0.5 um per pixel, not at {mpp:g}; give --mpp 0.25 for 40x")
    if seed < 0:
        raise WavepathError(f"a seed is not negative, got {seed}; give --seed 0")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise WavepathError(f"slides cannot be called {name!r}; give --name letters, digits, - and _ alone")
    out = writable_folder(Path(out))
    for left in out.glob(f".{name}_*.tiff.*.tmp"):  # by a run that was killed: large, and hidden from the user
        left.unlink()
    paths = []
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["case_id", "slide_id", "label"])
    total = slides * size * size / 1e6
    with console.progress("phantom slides", round(total, 1), "Mpx") if progress else nullcontext() as bar:
        for number in range(slides):
            slide = slide_name(number, name)
            case, label = slide_label(number)
            plan = make_plan(seed, number, size, mpp, tumour=label == "tumour")
            write_phantom(out / f"{slide}.tiff", out / "regions" / f"{slide}.geojson", plan, bar=bar)
            rows.writerow([case, slide, label])
            paths.append(out / f"{slide}.tiff")
    write_text(out / "labels.csv", table.getvalue())
    return paths
