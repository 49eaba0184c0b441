"""Cells of the phantom slides: a bank of drawn nuclei, vacuoles and red cells, and how they are stamped into a block.

A nucleus is drawn once in many variants (outline, chromatin, nucleoli, orientation) and stamped by table look-up: a
slide of 2 x 2 mm holds some twenty thousand nuclei, one of 10 x 10 mm half a million. Sizes are those of paraffin
sections at 0.25 um per pixel: lymphocytes about 6 um across, glandular nuclei 5 x 9, tumour nuclei 8 to 13 and uneven,
fibroblasts 2 to 3 wide and 12 to 20 long.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32
from scipy import fft

ORIENTATIONS = 16  # bins of half a turn


@dataclass(frozen=True)
class Kind:
    """How one kind of cell part is drawn. Lengths in um, concentrations as optical density along the stain."""

    variants: int  # for each orientation
    length: tuple[float, float]  # semi-axis along the orientation, range
    width: tuple[float, float]  # semi-axis across
    stain: tuple[float, float]  # concentration inside, range
    rim: float = 0.0  # added at the membrane, as a share
    clump: float = 0.0  # strength of chromatin clumps, as a share
    grain: float = 1.0  # size of the clumps, about 0.8 to 2.5 um for 1
    nucleoli: float = 0.0  # expected number of nucleoli
    ragged: float = 0.0  # unevenness of the outline, as a share of the radius
    bend: float = 0.0  # curvature of the long axis, as a share of the length
    soft: float = 0.65  # width of the edge


KINDS = {
    "tumour": Kind(
        16, (4.1, 6.2), (3.3, 4.7), (0.62, 1.15), rim=0.42, clump=0.42, grain=1.5, nucleoli=1.5, ragged=0.08
    ),
    "dark": Kind(6, (3.2, 5.6), (2.0, 3.6), (1.5, 2.0), clump=0.15, ragged=0.14),  # pyknotic, or a mitosis
    "epithelial": Kind(
        12, (3.7, 5.0), (1.9, 2.5), (0.95, 1.35), rim=0.22, clump=0.28, grain=1.1, nucleoli=0.4, ragged=0.06
    ),
    "lymphocyte": Kind(8, (2.5, 3.3), (2.2, 2.9), (1.35, 1.95), rim=0.15, clump=0.32, ragged=0.07),
    "spindle": Kind(14, (4.2, 8.2), (0.9, 1.6), (1.0, 1.7), clump=0.18, ragged=0.07, bend=0.14),
    "endothelial": Kind(8, (2.4, 4.2), (0.8, 1.25), (1.0, 1.6), clump=0.15, ragged=0.07, bend=0.2),
    "plump": Kind(
        10, (4.2, 6.2), (1.8, 2.6), (0.62, 1.0), rim=0.35, clump=0.30, grain=1.2, nucleoli=0.5, ragged=0.06, bend=0.06
    ),
    "vacuole": Kind(8, (4.0, 6.5), (2.2, 3.2), (1.0, 1.0), ragged=0.08, soft=1.6),
    "body": Kind(8, (6.0, 8.0), (5.0, 7.0), (1.0, 1.0), ragged=0.10, soft=4.0),  # cytoplasm about a nucleus
    "erythrocyte": Kind(3, (2.7, 3.4), (2.4, 3.1), (0.9, 1.2), rim=0.2, ragged=0.05, soft=0.7),
}


@dataclass(frozen=True)
class Bank:
    """The drawn variants of one kind.

    Attributes:
        alpha: coverage, 0..1, float32[orientations * variants, side, side].
        stain: concentration times coverage, of the same shape.
        half: the centre's index along a side.
    """

    alpha: np.ndarray
    stain: np.ndarray
    half: int
    variants: int

    def index(self, angle: np.ndarray, pick: np.ndarray) -> np.ndarray:
        """Picture numbers for orientations (radians, of any turn) and uniform numbers that pick the variant."""
        bins = np.round(angle * (ORIENTATIONS / np.pi)).astype(np.int64) % ORIENTATIONS
        return bins * self.variants + (pick * self.variants).astype(np.int64)


def _chromatin(count: int, side: int, mpp: float, rng: np.random.Generator) -> np.ndarray:
    """Blotchy noise of about 0.8 to 2.5 um, unit variance, one picture for each nucleus."""
    white = rng.standard_normal((count, side, side)).astype(np.float32)
    fy = np.fft.fftfreq(side).astype(np.float32)[:, None]
    fx = np.fft.rfftfreq(side).astype(np.float32)[None]
    f2 = (fy * fy + fx * fx) / np.float32(mpp**2)
    gain = np.exp(-f2 * 1.6) - np.exp(-f2 * 14.0)
    field = fft.irfft2(fft.rfft2(white) * gain.astype(np.float32), s=(side, side))
    return (field / (field.std() + 1e-6)).astype(np.float32)


def draw_bank(kind: Kind, mpp: float, seed: list[int]) -> Bank:
    """Draws all variants of a kind in all orientations, `mpp` um per pixel."""
    rng = np.random.default_rng(seed)
    count = ORIENTATIONS * kind.variants
    half = int(np.ceil(kind.length[1] * (1 + 2 * kind.ragged + kind.bend) / mpp)) + 2
    side = 2 * half + 1

    def draw(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, (count, 1, 1)).astype(np.float32)

    angle = np.repeat(np.arange(ORIENTATIONS), kind.variants).reshape(-1, 1, 1) * (np.pi / ORIENTATIONS)
    angle = (angle + rng.uniform(-0.5, 0.5, angle.shape) * np.pi / ORIENTATIONS).astype(np.float32)
    offset = rng.uniform(-0.5, 0.5, (2, count, 1, 1)).astype(np.float32)  # centres fall between pixels
    axis = np.arange(-half, half + 1, dtype=np.float32)
    y, x = (axis[:, None] + offset[0]) * np.float32(mpp), (axis[None, :] + offset[1]) * np.float32(mpp)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    a, b = draw(*kind.length), draw(*kind.width)
    across = across + draw(-kind.bend, kind.bend) * (along * along / a - a * 0.3)
    turn = np.arctan2(across / b, along / a)
    outline = np.ones_like(turn)
    for order, share in ((2, 0.6), (3, 1.0), (4, 0.6), (5, 0.4)):
        outline += draw(-kind.ragged, kind.ragged) * share * np.cos(order * turn + draw(0, 2 * np.pi))
    radius = np.sqrt((along / a) ** 2 + (across / b) ** 2) / outline
    depth = (1 - radius) * np.minimum(a, b)  # um inside the membrane, nearly
    alpha = np.clip(depth / kind.soft + 0.5, 0, 1)
    alpha = alpha * alpha * (3 - 2 * alpha)
    stain = np.ones_like(depth)
    if kind.rim:
        stain += kind.rim * np.exp(-(((depth - 0.35) / 0.55) ** 2))
    if kind.clump:
        noise = _chromatin(count, side, mpp / kind.grain, rng)
        # Open chromatin is paler in the middle; clumps are dark on pale ground.
        stain += kind.clump * (noise + 0.35 * np.abs(noise)) - 0.25 * kind.rim * np.clip(depth / 3, 0, 1)
    for _ in range(2):
        present = draw(0, 1) < kind.nucleoli / 2
        place = (draw(-0.45, 0.45) * a, draw(-0.45, 0.45) * b)
        distance = (along - place[0]) ** 2 + (across - place[1]) ** 2
        stain += present * np.exp(-distance / draw(0.35, 0.9)) * 0.9
    level = draw(*kind.stain)
    return Bank(alpha, (np.maximum(stain, 0.15) * level * alpha).astype(np.float32), half, kind.variants)


def draw_banks(mpp: float, seed: list[int]) -> dict[str, Bank]:
    """Banks of every kind."""
    return {name: draw_bank(kind, mpp, [*seed, number]) for number, (name, kind) in enumerate(KINDS.items())}


@dataclass
class Cells:
    """Cells of one kind to be stamped: level-0 pixel positions, pictures of the kind's bank, strength."""

    kind: str
    y: np.ndarray  # float32[n]
    x: np.ndarray
    angle: np.ndarray
    pick: np.ndarray  # uniform [0, 1)
    gain: np.ndarray  # multiplies the concentration

    def __len__(self) -> int:
        return len(self.y)

    def near(self, y0: int, x0: int, height: int, width: int, margin: float) -> "Cells":
        """Those whose centre lies in the block or within `margin` pixels of it."""
        keep = (
            (self.y > y0 - margin)
            & (self.y < y0 + height + margin)
            & (self.x > x0 - margin)
            & (self.x < x0 + width + margin)
        )
        return Cells(self.kind, self.y[keep], self.x[keep], self.angle[keep], self.pick[keep], self.gain[keep])


def join(kind: str, parts: list[Cells]) -> Cells:
    """Cells of one kind from several sources."""
    columns = [
        np.concatenate([getattr(part, name) for part in parts] or [np.zeros(0)])
        for name in ("y", "x", "angle", "pick", "gain")
    ]
    return Cells(kind, *(column.astype(np.float32) for column in columns))


def stamp(
    cells: Cells,
    bank: Bank,
    y0: int,
    x0: int,
    alpha: Float32[np.ndarray, "h w"],
    stain: Float32[np.ndarray, "h w"],
    opacity: float = 1.0,
) -> None:
    """Draws cells over a block, in place.

    A later cell covers an earlier one; the order is that of the positions, so that two blocks that share a cell agree
    about it.

    Args:
        cells: cells near the block, others are skipped.
        bank: pictures of their kind.
        y0, x0: the block's place in level-0 pixels.
        alpha: coverage so far, 0..1; grows.
        stain: concentration so far.
        opacity: how far a later cell hides an earlier one.
    """
    height, width = alpha.shape
    pictures = bank.index(cells.angle, cells.pick)
    tops = np.round(cells.y - y0).astype(np.int64) - bank.half
    lefts = np.round(cells.x - x0).astype(np.int64) - bank.half
    side = bank.alpha.shape[-1]
    for number in np.lexsort((cells.x, cells.y)).tolist():
        top, left = int(tops[number]), int(lefts[number])
        a, b, c, d = max(top, 0), min(top + side, height), max(left, 0), min(left + side, width)
        if a >= b or c >= d:
            continue
        cut = np.s_[pictures[number], a - top : b - top, c - left : d - left]
        cover = bank.alpha[cut]
        target = stain[a:b, c:d]
        target -= (target * opacity) * cover
        target += bank.stain[cut] * cells.gain[number]
        np.maximum(alpha[a:b, c:d], cover, out=alpha[a:b, c:d])
