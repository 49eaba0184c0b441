"""Phantom pairs: the same procedural tissue in H&E and in an immunostain, its positive cells and its misalignment known (METHODS 3.5).

The H&E side is that of the phantom slides. On the other side there is no eosin: nuclei and, faintly, everything else take haematoxylin, and a known
share of the tumour cells has a ring of DAB on its membrane, with a little in the cytoplasm; light follows Beer-Lambert's law with the stain
vectors of `wavepath.ops.stain`. Which cells are positive can be seen in H&E, as it must be for anything to be learnt: their cytoplasm is bluer.

The immunostain is displaced as a neighbouring section is: by whole pixels everywhere, and by a smooth field of zero mean. A place p of the H&E is at
p + shift + local in the immunostain.
"""

import csv
import dataclasses
import io
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from scipy import ndimage

from wavepath import console
from wavepath.data.phantom_cells import Cells
from wavepath.data.phantom_noise import CELL, PAD
from wavepath.data.phantom_plan import Plan, make_plan
from wavepath.data.phantom_tissue import Tools, concentrations, expose, make_tools, tumour_cells
from wavepath.errors import WavepathError
from wavepath.files import atomic_path, writable_folder, write_text

MIN_SIZE, MAX_SIZE = 64, 2048
PER_SLIDE = 4
MPP = 0.5  # a side of 128 px then holds some twenty tumour cells
GROUP_PATTERN = "^([^_]+)_"  # finds the slide in a pair's name
_SLIDE_SIZE = 1024  # px, or three pairs a side
_BLOCK = 512
_POSITIVE = (0.2, 0.8)  # share of the tumour cells, drawn for each slide
_LABELS = ((0.4, "1+"), (0.6, "2+"), (1.0, "3+"))
_HINT = 0.25  # haematoxylin that a positive cell's cytoplasm has more in H&E
_COUNTERSTAIN, _BACKGROUND = 0.5, 0.09  # haematoxylin of the immunostain, of what haematoxylin and eosin show in H&E
_MEMBRANE, _CYTOPLASM = 1.15, 0.22  # DAB at full strength
DAB_AREA = 0.4  # amount of DAB from which a pixel counts as positive
_KNOTS = 5  # of the displacement field, a side


@dataclasses.dataclass(frozen=True)
class Pair:
    """One pair and its truth; `local` float32[2, h, w] is the smooth part (dy, dx) of the displacement at each pixel of the immunostain."""

    name: str
    slide: str
    label: str
    he: UInt8[np.ndarray, "h w 3"]
    ihc: UInt8[np.ndarray, "h w 3"]
    dab: Bool[np.ndarray, "h w"]  # in the immunostain's own frame
    nuclei: int  # tumour nuclei in the frame of the H&E
    positive: float  # share of these with DAB
    dx: int
    dy: int
    local: Float32[np.ndarray, "2 h w"]
    mpp: float


def slide_name(number: int) -> str:
    """`s000`, ...; a pair is named `s000_0`."""
    return f"s{number:03d}"


def _whole(extent: float) -> int:
    """At least so many px, in whole cells of the plan."""
    return -(-int(np.ceil(extent)) // CELL) * CELL


def _places(plan: Plan, size: int, count: int) -> list[tuple[int, int]]:
    """Corners (y, x) of at most `count` windows that do not overlap, the most even mixtures of tumour and other tissue first."""
    step = max(CELL, size // 4 // CELL * CELL)
    cells = -(-size // CELL)
    found = []
    for y in range(0, plan.size - size + 1, step):
        for x in range(0, plan.size - size + 1, step):
            part = np.s_[y // CELL + PAD : y // CELL + PAD + cells, x // CELL + PAD : x // CELL + PAD + cells]
            tumour, tissue = (float((plan.fields[name][part] > 0).mean()) for name in ("nest", "tissue"))
            found.append((round(abs(tumour - 0.55) + 2 * (1 - tissue), 6), y, x))
    kept: list[tuple[int, int]] = []
    for _, y, x in sorted(found):
        if len(kept) < count and all(abs(y - b) >= size or abs(x - a) >= size for b, a in kept):
            kept.append((y, x))
    return kept


def _membranes(cells: Cells, tools: Tools, y0: int, x0: int, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Ring and body of cells, 0 to 1, float32[h, w] each; where cells touch, the stronger one shows."""
    ring, body = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    bank = tools.banks["body"]
    pictures = bank.index(cells.angle, cells.pick)
    tops, lefts = (np.round(place - start).astype(np.int64) - bank.half for place, start in ((cells.y, y0), (cells.x, x0)))
    side = bank.alpha.shape[-1]
    for number, (top, left) in enumerate(zip(tops.tolist(), lefts.tolist(), strict=True)):
        a, b, c, d = max(top, 0), min(top + side, shape[0]), max(left, 0), min(left + side, shape[1])
        if a < b and c < d:
            cover = bank.alpha[pictures[number], a - top : b - top, c - left : d - left]
            np.maximum(body[a:b, c:d], cover, out=body[a:b, c:d])
            np.maximum(ring[a:b, c:d], 4 * cover * (1 - cover), out=ring[a:b, c:d])  # highest half-way across the soft edge
    return ring, body


def _drawn(plan: Plan, tools: Tools, y0: int, x0: int, side: int) -> tuple[np.ndarray, np.ndarray, Cells]:
    """Concentrations float32[3, side, side] times thickness, the thickness, and the tumour cells of a square of any size in whole cells."""
    parts, thickness = np.zeros((3, side, side), np.float32), np.ones((side, side), np.float32)
    for y in range(0, side, _BLOCK):
        for x in range(0, side, _BLOCK):
            height, width = min(_BLOCK, side - y), min(_BLOCK, side - x)
            found = concentrations(plan, tools, y0 + y, x0 + x, height, width)
            if found is not None:
                inside = np.s_[y : y + height, x : x + width]
                thickness[inside] = found[1]
                parts[(slice(None), *inside)] = found[0] * found[1]
    return parts, thickness, tumour_cells(plan, tools, y0, x0, side, side)


def _displacement(size: int, rms: float, rng: np.random.Generator) -> Float32[np.ndarray, "2 size size"]:
    """A smooth field of zero mean; `rms` px is the root mean square of its length."""
    knots = rng.standard_normal((2, _KNOTS, _KNOTS))
    place = np.linspace(0.5, _KNOTS - 1.5, size)
    grid = np.meshgrid(place, place, indexing="ij")
    field = np.stack([ndimage.map_coordinates(part, grid, order=3, mode="nearest") for part in knots])
    field -= field.mean((1, 2), keepdims=True)
    return (field * (rms / np.sqrt(np.square(field).sum(0).mean()))).astype(np.float32)


def draw_pairs(
    seed: int, number: int, size: int, mpp: float = MPP, count: int = PER_SLIDE, shift: int = 8, local: float = 1.5
) -> list[Pair]:
    """The pairs of one slide; see `make_phantom_pairs`. Fewer than `count` where the slide has no more room."""
    from wavepath.ops.stain import STAINS

    plan = make_plan(seed, number, max(_SLIDE_SIZE, 3 * _whole(size)), mpp, tumour=True)
    tools, look = make_tools(plan), plan.look
    rng = np.random.default_rng([seed, number, 11])
    share = float(rng.uniform(*_POSITIVE))
    label = next(label for limit, label in _LABELS if share <= limit)
    margin, side = _whole(shift + 4 * local + 2), _whole(size)
    hematoxylin, dab = (vector.astype(np.float32) for vector in (STAINS[0], STAINS[2]))
    pairs = []
    for index, (y0, x0) in enumerate(_places(plan, side, count)):
        top, left, wide = y0 - margin, x0 - margin, side + 2 * margin
        parts, thickness, cells = _drawn(plan, tools, top, left, wide)
        inside = (cells.y >= y0) & (cells.y < y0 + size) & (cells.x >= x0) & (cells.x < x0 + size)
        # The darkest nuclei: whatever the share, a cell that is positive at a lower one is positive at a higher one.
        chosen = cells.gain >= np.quantile(cells.gain[inside], 1 - share) if inside.any() else np.zeros(len(cells), bool)
        marked = Cells(cells.kind, *(getattr(cells, name)[chosen] for name in ("y", "x", "angle", "pick", "gain")))
        ring, body = _membranes(marked, tools, top, left, (wide, wide))
        brown = np.maximum(_MEMBRANE * ring, _CYTOPLASM * body) * thickness
        blue = _COUNTERSTAIN * parts[0] + _BACKGROUND * parts[1]
        parts[0] += _HINT * body * thickness

        frame = np.s_[margin : margin + size, margin : margin + size]
        vectors = (look.hematoxylin, look.eosin, look.blood)
        density = np.stack([sum(part[frame] * vector[channel] for part, vector in zip(parts, vectors, strict=True)) for channel in range(3)])
        he = expose(np.exp(-density), look.glass, tools.textures, y0, x0)

        dy, dx = (int(value) for value in rng.integers(-shift, shift + 1, 2))
        field = _displacement(size, local, rng)
        rows, columns = np.mgrid[0:size, 0:size].astype(np.float32)
        places = (rows + margin - dy - field[0], columns + margin - dx - field[1])
        blue, brown = (np.maximum(ndimage.map_coordinates(part, places, order=3, mode="nearest"), 0) for part in (blue, brown))
        light = np.exp(-np.stack([blue * hematoxylin[channel] + brown * dab[channel] for channel in range(3)]))
        ihc = expose(light.astype(np.float32), look.glass, tools.textures, y0 + 577, x0 + 311)  # the noise of another scan
        known = dict(nuclei=int(inside.sum()), positive=float((chosen & inside).sum() / max(inside.sum(), 1)), dx=dx, dy=dy, local=field, mpp=mpp)
        pairs.append(Pair(f"{slide_name(number)}_{index}", slide_name(number), label, he, ihc, brown >= DAB_AREA, **known))
    return pairs


def make_phantom_pairs(
    out: Path, pairs: int, seed: int = 0, size: int = 512, mpp: float = MPP, shift: int = 8, local: float = 1.5, progress: bool = True
) -> list[Path]:
    """Writes pairs with their truth: `out/HE/<name>.png`, `out/IHC/<name>.png`, `out/DAB/<name>.png` (where DAB is, white) and `out/truth.csv`.

    `truth.csv` has name, slide, label, nuclei, positive (share of the tumour nuclei), dab_area (share of the pixels), dx, dy (the shift in px),
    local_rms, local_max (length of the smooth displacement in px) and mpp. Up to four pairs are of one slide. A pair is a function of seed, name,
    size, mpp, shift and local, whatever the number of pairs.

    Args:
        pairs: how many.
        seed: any integer from 0.
        size: side in px, 64 to 2048.
        mpp: micrometres per pixel, 0.1 to 0.5.
        shift: greatest shift to each side in px, up to 64.
        local: root mean square of the smooth displacement in px, up to 8.

    Returns:
        The H&E images.

    Raises:
        WavepathError: a number out of range, or a folder that cannot be written.
    """
    for name, value, low, high in (
        ("pairs", pairs, 1, 100000), ("seed", seed, 0, np.inf), ("size", size, MIN_SIZE, MAX_SIZE), ("mpp", mpp, 0.1, 0.5), ("shift", shift, 0, 64),
        ("local displacement", local, 0, 8),
    ):
        if not low <= value <= high:
            raise WavepathError(f"phantom pairs: {name} is {value:g}; give {low:g} to {high:g}")
    from PIL import Image

    out = writable_folder(Path(out))
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["name", "slide", "label", "nuclei", "positive", "dab_area", "dx", "dy", "local_rms", "local_max", "mpp"])
    paths: list[Path] = []
    number = 0
    with console.progress("phantom pairs", pairs, "pairs") if progress else nullcontext() as bar:
        while len(paths) < pairs:
            for pair in draw_pairs(seed, number, size, mpp, shift=shift, local=local)[: pairs - len(paths)]:
                for side, picture in (("HE", pair.he), ("IHC", pair.ihc), ("DAB", (pair.dab * 255).astype(np.uint8))):
                    with atomic_path(out / side / f"{pair.name}.png") as path:
                        Image.fromarray(picture).save(path, format="PNG")
                length = np.sqrt(np.square(pair.local).sum(0))
                facts = [f"{value:.4f}" for value in (pair.positive, pair.dab.mean())]
                moved = [f"{value:.3f}" for value in (np.sqrt(np.square(length).mean()), length.max())]
                rows.writerow([pair.name, pair.slide, pair.label, pair.nuclei, *facts, pair.dx, pair.dy, *moved, f"{mpp:g}"])
                paths.append(out / "HE" / f"{pair.name}.png")
                if bar is not None:
                    bar.advance(1, pair.name)
            number += 1
    write_text(out / "truth.csv", table.getvalue())
    return paths
