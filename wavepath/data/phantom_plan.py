"""The anatomy of a phantom slide on a coarse grid: where tissue is, of which class, how its fibres run, and where the
artefacts lie.

Everything is a distance field in micrometres, positive inside, on cells of 16 x 16 level-0 pixels; the renderer reads
the fields through a cubic B-spline. The same fields give the ground-truth regions, so picture and annotation cannot
disagree.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from wavepath.data.phantom_cells import Cells, join
from wavepath.data.phantom_glands import REACH_UM, make_glands, make_vessels
from wavepath.data.phantom_noise import CELL, PAD, smooth_noise

ARTEFACTS_FROM_UM = 500.0  # a smaller slide is a single field of view and stays clean


@dataclass(frozen=True)
class Look:
    """How laboratory and scanner render tissue: optical density of each stain at unit concentration, and glass."""

    hematoxylin: np.ndarray  # float32[3], RGB
    eosin: np.ndarray
    blood: np.ndarray
    ink: np.ndarray  # the pen
    glass: np.ndarray  # float32[3], 0..255
    tumour_pitch: float  # um between tumour nuclei


@dataclass(frozen=True)
class Plan:
    """One slide before rendering.

    Attributes:
        size: side in level-0 pixels.
        mpp: um per level-0 pixel.
        seed: seeds of the slide, for textures and hashes.
        tumour: whether the slide holds tumour.
        fields: float32[gh, gw] each, with `PAD` cells of margin: distances in um (tissue, nest, gland, lumen, fat,
            lymph, vessel, blood, pen, fold, blur), fibre coordinates v and u in um, the fibres' axis as cos2 and sin2
            of twice its angle, and looseness, infiltrate and density without a unit.
        cells: cells of placed structures, by kind.
        look: stains and glass.
    """

    size: int
    mpp: float
    seed: list[int]
    tumour: bool
    fields: dict[str, np.ndarray]
    cells: dict[str, Cells]
    look: Look


class _Grid:
    """Coordinates and noise on the coarse grid of one slide; every call of `noise` is a new field."""

    def __init__(self, size: int, mpp: float, seed: list[int]):
        self.cell_um, self.size_um, self.seed = CELL * mpp, size * mpp, seed
        count = -(-size // CELL) + 2 * PAD
        self.shape = (count, count)
        axis = ((np.arange(count) - PAD + 0.5) * self.cell_um).astype(np.float32)
        self.y, self.x = axis[:, None], axis[None]
        self._fields = 0

    def noise(self, *waves: tuple[float, float]) -> np.ndarray:
        """A new field: the sum of Gaussian noises of the given (standard deviation, wavelength in um)."""
        total = self.constant(0.0)
        for deviation, wavelength_um in waves:
            self._fields += 1
            term = smooth_noise(self.shape, self.cell_um, wavelength_um, [*self.seed, 7, self._fields])
            term *= np.float32(deviation)
            total += term
        return total

    def constant(self, value: float) -> np.ndarray:
        return np.full(self.shape, value, np.float32)


def _tissue(grid: _Grid, rng: np.random.Generator) -> np.ndarray:
    """One or two pieces of tissue: superellipses whose edge is uneven at every scale."""
    side = grid.size_um
    pieces = [(0.5, 0.5, rng.uniform(0.39, 0.43), rng.uniform(0.36, 0.42))]
    if side > 1500 and rng.uniform() < 0.4:
        split = rng.uniform(0.60, 0.66)
        pieces = [(0.5, split * 0.52, 0.43, split * 0.44), (0.5, split + (1 - split) * 0.48, 0.36, (1 - split) * 0.42)]
        if rng.uniform() < 0.5:
            pieces = [(x, y, b, a) for y, x, a, b in pieces]
    edge = grid.noise((0.05 * side, 0.45 * side), (0.018 * side, 0.15 * side), (9, 90), (4, 34), (1.6, 15))
    field = grid.constant(-1e4)
    for cy, cx, ay, ax in pieces:
        turn, power = rng.uniform(-0.2, 0.2), rng.uniform(2.2, 3.0)
        dy, dx = grid.y - cy * side, grid.x - cx * side
        along, across = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
        radius = (np.abs(along / (ax * side)) ** power + np.abs(across / (ay * side)) ** power) ** (1 / power)
        field = np.maximum(field, (1 - radius) * min(ax, ay) * side)
    # A rim of glass all round, as a section is mounted.
    border = np.minimum(np.minimum(grid.y, side - grid.y), np.minimum(grid.x, side - grid.x)) - 0.04 * side
    return np.minimum(field + edge, border + grid.noise((0.012 * side, 0.12 * side))).astype(np.float32)


def _zones(grid: _Grid, rng: np.random.Generator, tissue: np.ndarray, tumour: bool) -> dict[str, np.ndarray]:
    """Distance fields of the zones of each class, set apart from one another; between them lies stroma."""
    side = grid.size_um
    small = side < 1000
    if tumour:
        wanted = [("tumour", 0.30 if small else 0.27)] + (
            [] if small else [("tumour", 0.16), ("gland", 0.15), ("fat", 0.15)]
        )
    else:
        wanted = [("gland", 0.38 if small else 0.25)] + (
            [] if small else [("gland", 0.18), ("fat", 0.18), ("fat", 0.10)]
        )
    if not small:
        count = int(np.clip(side / 420, 3, 24))
        wanted += [("lymph", min(rng.uniform(70, 150), 0.09 * side) / side) for _ in range(count)]
    elif side >= 400:
        wanted += [("lymph", 0.11)]
    inside = np.argwhere(tissue > 0.05 * side)
    warp = grid.noise((0.0275 * side, 0.22 * side), (0.008 * side, 0.08 * side), (7, 120))
    placed: list[tuple[float, float, float]] = []
    zones = {name: grid.constant(-1e4) for name in ("tumour", "gland", "fat", "lymph")}
    for name, share in wanted:
        radius = share * side
        candidates = inside[rng.integers(0, len(inside), 96)]
        best, place = -np.inf, (side / 2, side / 2)
        for iy, ix in candidates.tolist():
            y, x = (iy - PAD + 0.5) * grid.cell_um, (ix - PAD + 0.5) * grid.cell_um
            clear = min((np.hypot(y - py, x - px) - pr - radius for py, px, pr in placed), default=0.0)
            depth = float(tissue[iy, ix])
            # Tumour and glands lie deep, fat at the margin; all want to be clear of the others.
            want = -abs(depth - 0.3 * radius) if name == "fat" else min(depth - 0.8 * radius, 0.0)
            score = min(clear, 0.0) + 0.7 * want
            if score > best:
                best, place = score, (y, x)
        placed.append((*place, radius))
        distance = radius - np.hypot(grid.y - place[0], grid.x - place[1]) + warp * (1.0 if name != "lymph" else 0.6)
        zones[name] = np.maximum(zones[name], distance.astype(np.float32))
    result = {}
    uneven = grid.noise((14, 150), (7, 60))
    for name, field in zones.items():
        others = np.maximum.reduce([other for key, other in zones.items() if key != name])
        apart = 0.5 * (field - others) - 6
        # Follicles may lie anywhere but in tumour and glands, which cut their own outline out of them later.
        field = np.minimum(field, apart) if name != "lymph" else field + uneven
        result[name] = np.minimum(field, tissue - 14)
    return {name: np.clip(field, -REACH_UM, None).astype(np.float32) for name, field in result.items()}


def _nests(grid: _Grid, rng: np.random.Generator, zone: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tumour nests (distance in um) between septa of stroma, and the gaps within them."""
    if zone.max() <= 0:
        return grid.constant(-REACH_UM), grid.constant(-REACH_UM)
    septa = np.abs(grid.noise((52, 230), (21, 95))) - np.abs(grid.noise((3.5, 400))) - 7
    nest = np.minimum(septa, zone + grid.noise((16, 110), (5, 45))) + grid.noise((1.5, 22))
    gaps = grid.noise((15, 60)) - 15 * rng.uniform(1.5, 2.3)
    gaps = np.minimum(gaps, nest - 9)
    return np.clip(nest, -REACH_UM, None).astype(np.float32), gaps.astype(np.float32)


def _fibres(grid: _Grid, rng: np.random.Generator, outside: np.ndarray) -> dict[str, np.ndarray]:
    """Fibre coordinates: v across, u along. They wave, and wrap round structures whose distance field is `outside`."""
    turn = rng.uniform(0, np.pi)
    y, x = grid.y + 5000.0, grid.x + 5000.0
    v = y * np.cos(turn) - x * np.sin(turn) + grid.noise((110, 700), (24, 210), (4.5, 75), (0.9, 30))
    u = x * np.cos(turn) + y * np.sin(turn) + grid.noise((40, 400))
    near = np.clip(-outside, 0, REACH_UM)
    v = (v - 85 * np.exp(-near / 45)).astype(np.float32)
    gy, gx = np.gradient(v)
    # A direction along the fibres as its double angle, since fibres have no front.
    length = np.maximum(gx * gx + gy * gy, 1e-9)
    return {"v": v, "u": u.astype(np.float32), "cos2": (gy * gy - gx * gx) / length, "sin2": -2 * gx * gy / length}


def _infiltrate(grid: _Grid, zones: dict[str, np.ndarray]) -> np.ndarray:
    """The chance of a lymphocyte at a place in stroma: in clouds, round follicles and along the tumour's margin."""
    chance = np.clip(grid.noise((0.30, 160)) - 0.27, 0, 0.3)
    chance += 0.35 * np.exp(-np.abs(zones["lymph"]) / 30)
    if zones["tumour"].max() > 0:
        chance += np.exp(-np.abs(zones["tumour"]) / 40) * np.clip(grid.noise((0.16, 140)), 0, 0.24)
    return np.clip(chance, 0, 0.6)


def _artefacts(grid: _Grid, rng: np.random.Generator, tissue: np.ndarray) -> dict[str, np.ndarray]:
    """A pen stroke over the tissue's edge, a fold across it, an out-of-focus patch within it."""
    names = ("pen", "fold", "blur")
    if grid.size_um < ARTEFACTS_FROM_UM:
        return {name: grid.constant(-REACH_UM) for name in names}
    side = grid.size_um
    inside = np.argwhere((tissue > 0.08 * side) & (tissue < 0.3 * side))
    inside = inside if len(inside) else np.argwhere(tissue > 0)

    def place() -> tuple[float, float]:
        iy, ix = inside[rng.integers(0, len(inside))].tolist()
        return (iy - PAD + 0.5) * grid.cell_um, (ix - PAD + 0.5) * grid.cell_um

    spots = [place()]
    for _ in range(2):  # far from one another: of 24 places the farthest
        options = [place() for _ in range(24)]
        spots.append(max(options, key=lambda spot: min(math.dist(spot, other) for other in spots)))
    fields = {
        name: draw(grid, rng, spot, tissue) for name, draw, spot in zip(names, (_pen, _fold, _blur), spots, strict=True)
    }
    return {name: np.clip(field, -REACH_UM, None) for name, field in fields.items()}


def _pen(grid: _Grid, rng: np.random.Generator, spot: tuple[float, float], tissue: np.ndarray) -> np.ndarray:
    """An arc about the slide's middle, a little outside of a spot."""
    side = grid.size_um
    dy, dx = spot[0] - side / 2, spot[1] - side / 2
    radius, start = math.hypot(dy, dx) + 0.12 * side, math.atan2(dy, dx)
    turn = np.arctan2(grid.y - side / 2, grid.x - side / 2)
    turn = np.abs((turn - start + math.pi) % (2 * math.pi) - math.pi)
    length, width = rng.uniform(0.35, 0.6), min(0.018 * side, 220.0)
    off = grid.noise((0.012 * side, 0.2 * side))
    off += np.hypot(grid.y - side / 2, grid.x - side / 2) - radius
    return np.minimum(width - np.abs(off), (length - turn) * radius) + grid.noise((1.5, 25))


def _fold(grid: _Grid, rng: np.random.Generator, spot: tuple[float, float], tissue: np.ndarray) -> np.ndarray:
    """A band whose middle line waves, drawn out to a point at both ends."""
    side, heading = grid.size_um, rng.uniform(0, math.pi)
    dy, dx = grid.y - spot[0], grid.x - spot[1]
    along = dx * math.cos(heading) + dy * math.sin(heading)
    across = dy * math.cos(heading) - dx * math.sin(heading) + grid.noise((0.02 * side, 0.25 * side))
    width = (1 - (along / (0.17 * side)) ** 2) * min(max(0.011 * side, 9.0), 45.0)
    return np.minimum(width - np.abs(across), tissue + 2) + grid.noise((1.0, 30))


def _blur(grid: _Grid, rng: np.random.Generator, spot: tuple[float, float], tissue: np.ndarray) -> np.ndarray:
    """A patch out of focus."""
    side = grid.size_um
    patch = grid.noise((0.02 * side, 0.12 * side))
    patch += 0.085 * side - np.hypot(grid.y - spot[0], grid.x - spot[1])
    return np.minimum(patch, 60.0)


def _look(rng: np.random.Generator) -> Look:
    """Stain vectors about those of paraffin H&E, as they differ between laboratories."""

    def vector(base: tuple[float, float, float], spread: float, strength: float) -> np.ndarray:
        direction = np.array(base) + rng.normal(0, spread, 3)
        return (strength * direction / np.linalg.norm(direction)).astype(np.float32)

    inks = ((1.9, 1.2, 0.25), (1.6, 0.45, 1.2), (1.7, 1.7, 1.6), (0.15, 1.7, 1.3))  # blue, green, black, red
    return Look(
        hematoxylin=vector((0.585, 0.71, 0.40), 0.015, rng.uniform(0.92, 1.12)),
        eosin=vector((0.14, 0.82, 0.50), 0.02, rng.uniform(0.85, 1.12)),
        blood=vector((0.14, 0.78, 0.66), 0.01, 1.0),
        ink=np.array(inks[int(rng.integers(0, 4))], np.float32),
        glass=(np.array([243.0, 242.0, 243.5]) + rng.normal(0, 0.7, 3)).astype(np.float32),
        tumour_pitch=float(rng.uniform(8.6, 10.0)),
    )


def make_plan(seed: int, number: int, size: int, mpp: float, tumour: bool) -> Plan:
    """Lays out slide `number` of a set.

    Args:
        seed: the set's seed.
        number: the slide's place in the set.
        size: side in level-0 pixels.
        mpp: um per pixel.
        tumour: with tumour zones, or of normal tissue only.
    """
    seeds = [seed, number]
    rng = np.random.default_rng([*seeds, 1])
    grid = _Grid(size, mpp, seeds)
    look = _look(rng)
    tissue = _tissue(grid, rng)
    zones = _zones(grid, rng, tissue, tumour)
    nest, gaps = _nests(grid, rng, zones["tumour"])
    nest = np.minimum(nest, tissue - 3)
    glands = make_glands(rng, mpp, zones["gland"])
    gland = np.where(tissue > -20, glands.distance, -REACH_UM).astype(np.float32)
    fat = np.minimum(zones["fat"], -np.maximum(nest, gland) - 4)
    lymph = np.minimum(zones["lymph"], -np.maximum(nest, gland) - 2)
    fibres = _fibres(grid, rng, np.maximum(np.maximum(nest, gland), np.maximum(fat, lymph)))
    room = np.minimum(tissue, -np.maximum(np.maximum(nest, gland), np.maximum(fat, lymph))) - 4
    vessels = make_vessels(rng, mpp, room, 0.5 * np.arctan2(fibres["sin2"], fibres["cos2"]))
    infiltrate = _infiltrate(grid, zones)
    del zones, room
    fields = fibres | {
        "tissue": tissue,
        "nest": nest,
        "gland": gland,
        "lumen": np.maximum(glands.inner, gaps).astype(np.float32),
        "fat": fat,
        "lymph": lymph,
        "vessel": vessels.distance,
        "blood": vessels.inner,
        "loose": grid.noise((0.65, 330), (0.45, 120)),
        "density": 1 + grid.noise((0.16, 260), (0.07, 60)),
        "infiltrate": infiltrate,
    }
    fields |= _artefacts(grid, rng, tissue)
    fields = {name: np.ascontiguousarray(field, np.float32) for name, field in fields.items()}
    parts = glands.cells + vessels.cells
    cells = {
        kind: join(kind, [part for part in parts if part.kind == kind])
        for kind in ("epithelial", "vacuole", "endothelial", "erythrocyte")
    }
    return Plan(size, mpp, seeds, tumour, fields, cells, look)


def near(field: Float32[np.ndarray, "gh gw"], y0: int, x0: int, height: int, width: int) -> tuple[float, float]:
    """The smallest and the greatest value of a field in and closely around a block."""
    gy, gx = y0 // CELL + PAD, x0 // CELL + PAD
    part = field[gy - 2 : gy + height // CELL + 2, gx - 2 : gx + width // CELL + 2]
    return float(part.min()), float(part.max())
