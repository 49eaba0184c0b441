"""Structures of the phantom slides that are placed one by one: glands with epithelium, vessels with red cells."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from wavepath.data.phantom_cells import Cells
from wavepath.data.phantom_noise import CELL, PAD

REACH_UM = 150.0  # outside distances are known up to here; stroma fibres bend round a structure within it


@dataclass(frozen=True)
class Ring:
    """A closed outline about a centre: an ellipse made uneven by low harmonics. Lengths in um."""

    y: float
    x: float
    a: float
    b: float
    angle: float
    amplitude: np.ndarray  # [3] of the orders 2, 3, 4, as shares of the radius
    phase: np.ndarray

    def level(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """0 at the centre, 1 on the outline, growing linearly outwards."""
        dy, dx = y - self.y, x - self.x
        along = (dx * np.cos(self.angle) + dy * np.sin(self.angle)) / self.a
        across = (dy * np.cos(self.angle) - dx * np.sin(self.angle)) / self.b
        turn = np.arctan2(across, along)
        return np.hypot(along, across) / self._outline(turn)

    def _outline(self, turn: np.ndarray) -> np.ndarray:
        orders = np.array([2.0, 3.0, 4.0]).reshape(-1, *([1] * np.ndim(turn)))
        shape = self.amplitude.reshape(orders.shape) * np.cos(orders * turn + self.phase.reshape(orders.shape))
        return 1 + shape.sum(axis=0)

    def walk(self, spacing: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Points along the outline at even distances: y, x in um and the angle of the outward normal."""
        turn = np.linspace(0, 2 * np.pi, 721)
        radius = self._outline(turn)
        along, across = self.a * radius * np.cos(turn), self.b * radius * np.sin(turn)
        x = self.x + along * np.cos(self.angle) - across * np.sin(self.angle)
        y = self.y + along * np.sin(self.angle) + across * np.cos(self.angle)
        length = np.concatenate([[0], np.cumsum(np.hypot(np.diff(y), np.diff(x)))])
        count = max(3, int(round(length[-1] / spacing)))
        at = np.arange(count) * (length[-1] / count)
        tangent = np.arctan2(np.gradient(y), np.gradient(x))
        tangent = np.interp(at, length, np.unwrap(tangent))
        return np.interp(at, length, y), np.interp(at, length, x), tangent - np.pi / 2


def make_ring(
    rng: np.random.Generator, y: float, x: float, radius: float, aspect: float, angle: float, uneven: float
) -> Ring:
    """A ring of about the area of a circle of `radius` um."""
    stretch = np.sqrt(aspect)
    amplitude = rng.uniform(-uneven, uneven, 3) * np.array([0.8, 1.0, 0.7])
    return Ring(y, x, radius * stretch, radius / stretch, angle, amplitude, rng.uniform(0, 2 * np.pi, 3))


def draw_distance(
    field: Float32[np.ndarray, "gh gw"], cell_um: float, ring: Ring
) -> tuple[tuple[slice, slice], np.ndarray] | None:
    """Adds a ring to a field of distances (um, positive inside; the union is the larger value).

    Returns:
        The window of the grid that was looked at and where in it this ring is now the nearest, or None if it lies
        outside.
    """
    reach = max(ring.a, ring.b) * 1.3 + REACH_UM
    low = [int(np.floor((centre - reach) / cell_um)) + PAD for centre in (ring.y, ring.x)]
    high = [int(np.ceil((centre + reach) / cell_um)) + PAD for centre in (ring.y, ring.x)]
    window = tuple(slice(max(a, 0), min(b, extent)) for a, b, extent in zip(low, high, field.shape, strict=True))
    if any(part.stop - part.start < 2 for part in window):
        return None
    y = ((np.arange(window[0].start, window[0].stop) - PAD + 0.5) * cell_um)[:, None]
    x = ((np.arange(window[1].start, window[1].stop) - PAD + 0.5) * cell_um)[None]
    level = ring.level(y, x)
    slope = np.hypot(*np.gradient(level, cell_um))
    distance = (1 - level) / np.maximum(slope, 0.3 / max(ring.a, ring.b))
    distance = np.clip(distance, -REACH_UM, min(ring.a, ring.b)).astype(np.float32)
    nearest = distance > field[window]
    field[window][nearest] = distance[nearest]
    return window, nearest


def scatter(
    rng: np.random.Generator,
    cell_um: float,
    radii: tuple[float, float],
    gap: float,
    room: Float32[np.ndarray, "gh gw"],
    spacing: float,
) -> list[tuple[float, float, float]]:
    """Circles (y, x, radius in um) that keep `gap` from each other and lie where `room`, a distance in um, allows
    most of their radius.

    Dart throwing, one dart for each `spacing` x `spacing` um of room, with a coarse grid so that the cost is linear
    in the darts.
    """
    free = np.argwhere(room > radii[0] * 0.6)
    if not len(free):
        return []
    tries = int(np.ceil(len(free) * (cell_um / spacing) ** 2))
    chosen = free[rng.integers(0, len(free), tries)]
    places = (chosen - PAD + rng.uniform(0, 1, (tries, 2))) * cell_um
    # Small ones are more common than large ones, and fill what large ones leave.
    wanted = radii[0] + (radii[1] - radii[0]) * rng.uniform(0, 1, tries) ** 1.6
    fits = room[chosen[:, 0], chosen[:, 1]] > wanted * 0.6
    bin_um = 2 * radii[1] + gap
    taken: dict[tuple[int, int], list[tuple[float, float, float]]] = {}
    result = []
    for (y, x), radius in zip(places[fits].tolist(), wanted[fits].tolist(), strict=True):
        iy, ix = int(y // bin_um), int(x // bin_um)
        around = [item for dy in (-1, 0, 1) for dx in (-1, 0, 1) for item in taken.get((iy + dy, ix + dx), ())]
        radius = min([radius, *(math.hypot(y - cy, x - cx) - r - gap for cy, cx, r in around)])
        if radius < radii[0]:
            continue
        taken.setdefault((iy, ix), []).append((y, x, radius))
        result.append((y, x, radius))
    return result


def _cells(
    kind: str,
    mpp: float,
    rng: np.random.Generator,
    y: np.ndarray,
    x: np.ndarray,
    angle: np.ndarray,
    spread: float = 0.12,
) -> Cells:
    """Cells at places in um, with random pictures and strengths."""
    gain = 1 + spread * rng.standard_normal(len(y))
    columns = (y / mpp, x / mpp, angle, rng.uniform(0, 1, len(y)), np.clip(gain, 0.6, 1.4))
    return Cells(kind, *(np.asarray(column, np.float32) for column in columns))


def gland_cells(rng: np.random.Generator, ring: Ring, thickness: float, mucin: float, mpp: float) -> list[Cells]:
    """The epithelium of one gland: basal nuclei across the wall, some in a second row, and pale goblets above them."""
    parts = []
    y, x, normal = ring.walk(5.4)
    count = len(y)
    for depth, share in ((5.0, 1.0), (9.8, 0.35)):
        keep = rng.uniform(0, 1, count) < share * 0.94
        inward = depth + rng.normal(0, 0.9, count)
        # A step along the wall puts the second row between the first.
        shift = rng.normal(0, 0.6, count) + (2.7 if depth > 6 else 0)
        py = y - inward * np.sin(normal) + shift * np.cos(normal)
        px = x - inward * np.cos(normal) - shift * np.sin(normal)
        parts.append(_cells("epithelial", mpp, rng, py[keep], px[keep], (normal + rng.normal(0, 0.16, count))[keep]))
    goblet = rng.uniform(0, 1, count) < mucin
    inward = thickness * 0.68 + rng.normal(0, 0.8, count)
    parts.append(
        _cells(
            "vacuole",
            mpp,
            rng,
            (y - inward * np.sin(normal))[goblet],
            (x - inward * np.cos(normal))[goblet],
            normal[goblet],
        )
    )
    return parts


@dataclass
class Structures:
    """Fields on the coarse grid (distances in um, positive inside) and the cells of glands or vessels."""

    distance: np.ndarray
    inner: np.ndarray  # distance into the lumen
    cells: list[Cells]


def make_glands(rng: np.random.Generator, mpp: float, room: Float32[np.ndarray, "gh gw"]) -> Structures:
    """Fills the places where `room` (um inside the glandular zone) is positive with glands of 22 to 62 um radius."""
    cell_um = CELL * mpp
    distance = np.full(room.shape, -REACH_UM, np.float32)
    inner = np.full(room.shape, -REACH_UM, np.float32)
    cells: list[Cells] = []
    mucinous = rng.uniform(0, 1) < 0.5
    for y, x, radius in scatter(rng, cell_um, (20.0, 62.0), 8.0, room, spacing=9.0):
        aspect = rng.uniform(1.0, 1.9)
        ring = make_ring(rng, y, x, radius * 0.94 / np.sqrt(np.sqrt(aspect)), aspect, rng.uniform(0, np.pi), 0.11)
        thickness = float(np.clip(rng.normal(15.5, 1.5), 11, radius * 0.75))
        mucin = rng.uniform(0.35, 0.85) if mucinous else rng.uniform(0, 0.15)
        found = draw_distance(distance, cell_um, ring)
        if found is None:
            continue
        window, nearest = found
        inner[window][nearest] = distance[window][nearest] - thickness
        cells += gland_cells(rng, ring, thickness, mucin, mpp)
    return Structures(distance, inner, cells)


def make_vessels(
    rng: np.random.Generator, mpp: float, room: Float32[np.ndarray, "gh gw"], angle: Float32[np.ndarray, "gh gw"]
) -> Structures:
    """Small vessels and capillaries in the stroma, drawn out along the fibres, some with red cells.

    Args:
        room: um of free stroma at a place.
        angle: the direction of the fibres, radians.
    """
    cell_um = CELL * mpp
    distance = np.full(room.shape, -REACH_UM, np.float32)
    inner = np.full(room.shape, -REACH_UM, np.float32)
    cells: list[Cells] = []
    for y, x, radius in scatter(rng, cell_um, (6.0, 20.0), 45.0, room, spacing=60.0):
        aspect = rng.uniform(1.0, 3.2)
        along = float(angle[int(y / cell_um) + PAD, int(x / cell_um) + PAD])
        ring = make_ring(rng, y, x, radius * 0.75, aspect, along, 0.08)
        wall = 1.8 + 0.12 * radius
        found = draw_distance(distance, cell_um, ring)
        if found is None:
            continue
        window, nearest = found
        inner[window][nearest] = distance[window][nearest] - wall
        ey, ex, normal = ring.walk(13.0)
        cells.append(
            _cells(
                "endothelial",
                mpp,
                rng,
                ey - wall / 2 * np.sin(normal),
                ex - wall / 2 * np.cos(normal),
                normal + np.pi / 2,
            )
        )
        if rng.uniform() < 0.75:
            span = np.arange(-1.0, 1.001, 4.6 / max(ring.a, ring.b)) * max(ring.a, ring.b)
            gy, gx = (
                part.ravel() + rng.normal(0, 0.9, part.size) for part in np.meshgrid(span + y, span + x, indexing="ij")
            )
            inside = (ring.level(gy, gx) < 1 - (wall + 2.0) / max(ring.b, 1.0)) & (rng.uniform(0, 1, gy.size) < 0.85)
            cells.append(
                _cells("erythrocyte", mpp, rng, gy[inside], gx[inside], rng.uniform(0, np.pi, int(inside.sum())))
            )
    return Structures(distance, inner, cells)
