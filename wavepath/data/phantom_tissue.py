"""Renders a block of a phantom slide: stain concentrations from the plan, light by Beer-Lambert's law.

Every function here is a pure function of the block's position, so that blocks can be rendered in any order, on any
thread, and with any halo, and fit together to the bit.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float32, UInt8
from scipy.spatial import cKDTree

from wavepath.data.phantom_cells import Bank, Cells, draw_banks, join, stamp
from wavepath.data.phantom_noise import Textures, blur, hex_lattice, lattice_randoms, sample, upsample
from wavepath.data.phantom_plan import Plan, near

HALO = 64  # px around a block that a blur or a fold may draw on
_CELL_MARGIN_UM = 12.0  # half the length of the longest nucleus
_FAT_CELL_UM = 62.0
_FOLD_SHIFT = (40, -56)  # px between the two layers of a fold, within HALO


def ramp(distance: np.ndarray, width: float) -> np.ndarray:
    """0 well outside, 1 well inside, smooth over `width` about 0."""
    t = np.clip(distance * np.float32(1 / width) + np.float32(0.5), 0, 1)
    return t * t * (3 - 2 * t)


@dataclass(frozen=True)
class Tools:
    """What every block of a slide shares: textures and drawn cells."""

    textures: Textures
    banks: dict[str, Bank]


def make_tools(plan: Plan) -> Tools:
    """Draws textures and cells for a slide; about a second."""
    return Tools(Textures([*plan.seed, 2], plan.mpp), draw_banks(plan.mpp, [*plan.seed, 3]))


class _Block:
    """One block: fields of the plan and textures at its pixels, drawn when first asked for."""

    def __init__(self, plan: Plan, tools: Tools, y0: int, x0: int, height: int, width: int):
        self.plan, self.tools = plan, tools
        self.box = (y0, x0, height, width)
        self._drawn: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        """A field or a texture by name; treat it as read-only."""
        if name not in self._drawn:
            fields = self.plan.fields
            self._drawn[name] = (
                upsample(fields[name], *self.box) if name in fields else self.tools.textures.block(name, *self.box)
            )
        return self._drawn[name]

    def has(self, name: str, above: float = -18.0) -> bool:
        """Whether a distance field rises above a value in the block; the default is past any noisy edge."""
        return near(self.plan.fields[name], *self.box)[1] > above

    @cached_property
    def fibres(self) -> tuple[np.ndarray, np.ndarray]:
        # Small displacements fray the strands, which are ruler-straight in their own coordinates.
        return self.tools.textures.fibres(
            self["v"] + 0.55 * self["medium"] + 0.16 * self["fine"], self["u"] + 3 * self["medium"]
        )

    def zeros(self) -> np.ndarray:
        return np.zeros(self.box[2:], np.float32)


def _stroma(block: _Block) -> tuple[np.ndarray, np.ndarray]:
    """Collagen: strands in bundles, with clefts between them where it is loose. Returns haematoxylin and eosin."""
    strands, bundles = block.fibres
    loose = block["loose"]
    cleft = ramp(0.5 * strands + 0.6 * bundles + 0.35 * block["medium"] + 0.7 * loose - 1.4, 1.3)
    eosin = (
        0.60 - 0.085 * strands - 0.09 * bundles + 0.05 * block["fine"] + 0.035 * block["grain"] + 0.03 * block["coarse"]
    )
    eosin *= 1 - 0.16 * np.clip(loose, -1, 1.5)
    eosin *= 1 - 0.88 * cleft
    hematoxylin = np.clip(0.05 + 0.02 * loose - 0.012 * strands + 0.012 * block["coarse"], 0, None) * (1 - 0.8 * cleft)
    if block.has("nest") or block.has("gland"):
        # Tissue shrinks in processing: clefts open in places round nests and glands, and a thin membrane bounds them.
        outside = -np.maximum(block["nest"], block["gland"])
        gap = (
            ramp(block["coarse"] + 0.7 * loose - 1.0, 0.5)
            * ramp(6.5 + 2 * block["medium"] - outside, 1.5)
            * ramp(outside - 0.8, 0.8)
        )
        eosin *= 1 - 0.95 * gap
        hematoxylin *= 1 - 0.9 * gap
        eosin += 0.12 * np.exp(-(((outside - 0.7) / 0.8) ** 2))
    return hematoxylin, eosin


def _epithelium(block: _Block, free: list[Cells], hematoxylin: np.ndarray, eosin: np.ndarray) -> None:
    """Cytoplasm of nests and glands and what they enclose, in place."""
    nest = block["nest"]
    inside = np.maximum(nest, block["gland"])
    body = ramp(inside + 0.1 * block["fine"], 1.2)
    density = block["density"]
    fine, medium, grain = block["fine"], block["medium"], block["grain"]
    pink = (0.40 + 0.05 * medium + 0.05 * fine + 0.035 * grain) * density
    blue = (0.23 + 0.03 * medium + 0.025 * fine + 0.02 * grain) * density
    if block.has("nest"):
        # Bodies of single cells stand out a little; some hold clear vacuoles.
        cells = block.zeros()
        _draw_cells(block, "body", free, cells, block.zeros())
        pink += (0.17 * cells - 0.09) * (nest > 0)
        blue += (0.07 * cells - 0.03) * (nest > 0)
        vacuole = ramp(medium + 0.06 * fine - 2.3, 1.0) * (nest > 0)
        pink *= 1 - 0.75 * vacuole
        blue *= 1 - 0.8 * vacuole
    clear = block.zeros()
    _draw_cells(block, "vacuole", [], clear, block.zeros())
    pink *= 1 - 0.72 * clear
    blue *= 1 - 0.45 * clear
    if block.has("lumen"):
        lumen = block["lumen"] + 0.12 * fine + 0.7 * medium
        pink += 0.16 * np.exp(-(((lumen + 0.9) / 0.8) ** 2))  # the brush border
        secretion = 0.07 * ramp(block["coarse"] - 0.8, 3.0)
        empty = ramp(lumen, 1.2)
        pink += (secretion - pink) * empty
        blue += (0.3 * secretion - blue) * empty
    hematoxylin += (blue - hematoxylin) * body
    eosin += (pink - eosin) * body


def _fat(block: _Block, hematoxylin: np.ndarray, eosin: np.ndarray) -> list[Cells]:
    """Adipocytes: empty cells with thin walls, a weighted Voronoi mosaic. Returns the nuclei in the walls."""
    plan = block.plan
    y0, x0, height, width = block.box
    mpp, salt = plan.mpp, plan.seed[0] * 1009 + plan.seed[1] * 31 + 5
    pitch = _FAT_CELL_UM
    iy, ix, y, x = hex_lattice(
        (y0 * mpp) - 2 * pitch,
        (x0 * mpp) - 2 * pitch,
        (y0 + height) * mpp + 2 * pitch,
        (x0 + width) * mpp + 2 * pitch,
        pitch,
    )
    draws = lattice_randoms(iy, ix, salt, 6)
    y, x = y + (draws[0] - 0.5) * 0.7 * pitch, x + (draws[1] - 0.5) * 0.7 * pitch
    weight = draws[2] * np.float32(0.35 * pitch)
    py = ((np.arange(y0, y0 + height) + 0.5) * mpp).astype(np.float32)[:, None]
    px = ((np.arange(x0, x0 + width) + 0.5) * mpp).astype(np.float32)[None]
    first = np.full((height, width), 1e6, np.float32)
    second = first.copy()
    for sy, sx, sw in zip(y, x, weight, strict=True):
        distance = np.sqrt((py - sy) ** 2 + (px - sx) ** 2)
        distance -= sw
        np.minimum(second, np.maximum(first, distance), out=second)
        np.minimum(first, distance, out=first)
    wall = 0.5 * (second - first) + 0.16 * block["medium"] - 0.12 * block["coarse"]
    membrane = ramp(0.75 - wall, 1.0)
    spread = ramp(2.6 - wall, 3.0) * 0.10
    cover = ramp(block["fat"] + 2.5 * block["medium"], 5.0)
    eosin += ((0.52 + 0.08 * block["fine"]) * np.maximum(membrane, spread) - eosin) * cover
    hematoxylin += (0.09 * membrane - hematoxylin) * cover
    # A nucleus sits in the wall towards the right-hand neighbour of about every fourth cell.
    right = np.flatnonzero((draws[3] < 0.45)[:-1] & (iy[1:] == iy[:-1]))
    dy, dx = y[right + 1] - y[right], x[right + 1] - x[right]
    share = 0.5 + 0.5 * (weight[right] - weight[right + 1]) / np.maximum(np.hypot(dy, dx), 1)
    cy, cx = (y[right] + share * dy) / mpp, (x[right] + share * dx) / mpp
    keep = sample(plan.fields["fat"], cy, cx) > 6
    columns = (cy, cx, np.arctan2(dx, -dy), draws[4][right], 0.8 + 0.3 * draws[5][right])
    return [Cells("spindle", *(np.asarray(column, np.float32)[keep] for column in columns))]


def _scattered(block: _Block, pitch: float, salt: int, jitter: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Candidate places of one lattice of cells in and around the block: y, x in pixels and six random numbers."""
    y0, x0, height, width = block.box
    mpp = block.plan.mpp
    margin = _CELL_MARGIN_UM + pitch  # the pitch more, for neighbours that decide who stays
    iy, ix, y, x = hex_lattice(
        y0 * mpp - margin, x0 * mpp - margin, (y0 + height) * mpp + margin, (x0 + width) * mpp + margin, pitch
    )
    draws = lattice_randoms(iy, ix, block.plan.seed[0] * 7919 + block.plan.seed[1] * 104729 + salt, 6)
    y, x = y + (draws[0] - 0.5) * np.float32(jitter * pitch), x + (draws[1] - 0.5) * np.float32(jitter * pitch)
    # Of two that would overlap, the one with the lower number gives way: a rule that any two blocks decide alike.
    pairs = cKDTree(np.stack([y, x], axis=1)).query_pairs(0.68 * pitch, output_type="ndarray")
    loser = np.where(draws[5][pairs[:, 0]] < draws[5][pairs[:, 1]], pairs[:, 0], pairs[:, 1])
    keep = np.ones(len(y), bool)
    keep[loser] = False
    return (y[keep] / mpp).astype(np.float32), (x[keep] / mpp).astype(np.float32), draws[:, keep]


def _free_cells(block: _Block) -> list[Cells]:
    """Nuclei that follow the plan's fields: tumour, lymphocytes, fibroblasts."""
    fields = block.plan.fields
    parts: list[Cells] = []

    def add(kind: str, keep: np.ndarray, y: np.ndarray, x: np.ndarray, angle: np.ndarray, draws: np.ndarray) -> None:
        columns = (y, x, angle, draws[4], 0.8 + 0.4 * draws[5])
        parts.append(Cells(kind, *(np.asarray(column, np.float32)[keep] for column in columns)))

    if block.has("nest", 0.0):
        y, x, draws = _scattered(block, block.plan.look.tumour_pitch, 11, 0.55)
        inside = (sample(fields["nest"], y, x) > 3.2) & (sample(fields["lumen"], y, x) < -3.5) & (draws[2] < 0.94)
        dark = draws[3] < 0.05
        turn = draws[3] * np.float32(40 * np.pi)
        add("tumour", inside & ~dark, y, x, turn, draws)
        add("body", inside, y, x, turn, draws)
        add("dark", inside & dark, y, x, turn, draws)
    y, x, draws = _scattered(block, 6.1, 12, 0.6)
    tissue = sample(fields["tissue"], y, x)
    bound = np.maximum(sample(fields["nest"], y, x), sample(fields["gland"], y, x))
    follicle = ramp(sample(fields["lymph"], y, x), 16.0) * np.float32(0.93)
    chance = np.maximum(follicle, sample(fields["infiltrate"], y, x) * (sample(fields["fat"], y, x) < 0))
    lymphocyte = (tissue > 3) & (bound < -2.5) & (sample(fields["vessel"], y, x) < -3) & (draws[2] < chance)
    add("lymphocyte", lymphocyte, y, x, draws[3] * np.float32(np.pi), draws)
    # A few lymphocytes wander into nests.
    add(
        "lymphocyte",
        (bound > 3) & (sample(fields["nest"], y, x) > 3) & (draws[2] < 0.012),
        y,
        x,
        draws[3] * np.float32(np.pi),
        draws,
    )
    y, x, draws = _scattered(block, 15.5, 13, 0.8)
    tissue, bound = (
        sample(fields["tissue"], y, x),
        np.maximum(sample(fields["nest"], y, x), sample(fields["gland"], y, x)),
    )
    crowd = (
        np.float32(0.50)
        + np.float32(0.14) * sample(fields["loose"], y, x)
        + np.float32(0.25) * np.exp(np.minimum(bound, 0) / 12)
    )
    free = (tissue > 3) & (bound < -2.2) & (sample(fields["fat"], y, x) < -2) & (sample(fields["vessel"], y, x) < -2)
    free &= (sample(fields["lymph"], y, x) < -4) & (draws[2] < crowd)
    # An axis lies between grid points as its double angle does.
    angle = np.float32(0.5) * np.arctan2(sample(fields["sin2"], y, x), sample(fields["cos2"], y, x))
    angle = angle + (draws[3] - 0.5) * np.float32(0.5)
    plump = (draws[3] * 37) % 1 < 0.22
    add("spindle", free & ~plump, y, x, angle, draws)
    add("plump", free & plump, y, x, angle, draws)
    return parts


def _draw_cells(block: _Block, kind: str, free: list[Cells], alpha: np.ndarray, stain: np.ndarray) -> None:
    y0, x0, height, width = block.box
    parts = [part for part in free if part.kind == kind]
    if kind in block.plan.cells:
        parts.append(block.plan.cells[kind].near(y0, x0, height, width, _CELL_MARGIN_UM / block.plan.mpp))
    stamp(join(kind, parts), block.tools.banks[kind], y0, x0, alpha, stain)


def concentrations(
    plan: Plan, tools: Tools, y0: int, x0: int, height: int, width: int
) -> tuple[Float32[np.ndarray, "3 height width"], Float32[np.ndarray, "height width"]] | None:
    """Haematoxylin, eosin and blood in a block and the section's relative thickness, before artefacts; None where there is glass alone.

    The box is in whole cells.
    """
    block = _Block(plan, tools, y0, x0, height, width)
    if not block.has("tissue"):
        return None
    hematoxylin, eosin = _stroma(block)
    free = _free_cells(block)
    if block.has("lymph", -26.0):
        cover = ramp(block["lymph"] + 4 * block["medium"], 14.0)
        holes = ramp(block["medium"] + 0.15 * block["fine"] - 0.7, 1.2)
        hematoxylin += (0.11 * (1 - holes) - hematoxylin) * cover
        eosin += ((0.19 + 0.05 * block["fine"]) * (1 - 0.9 * holes) - eosin) * cover
    if block.has("fat"):
        free += _fat(block, hematoxylin, eosin)
    if block.has("nest") or block.has("gland"):
        _epithelium(block, free, hematoxylin, eosin)
    blood = block.zeros()
    if block.has("vessel"):
        wall, inner = ramp(block["vessel"], 1.0), ramp(block["blood"], 0.8)
        eosin += (0.55 * (1 - inner) + 0.07 * inner - eosin) * wall
        hematoxylin += (0.06 * (1 - inner) - hematoxylin) * wall
        _draw_cells(block, "erythrocyte", [], block.zeros(), blood)
    cover, nuclear = block.zeros(), block.zeros()
    for kind in ("plump", "spindle", "endothelial", "epithelial", "tumour", "dark", "lymphocyte"):
        _draw_cells(block, kind, free, cover, nuclear)
    eosin *= 1 - 0.35 * cover
    hematoxylin = hematoxylin * (1 - 0.7 * cover) + nuclear
    edge = ramp(block["tissue"] + 1.6 * block["medium"] + 0.15 * block["fine"] + 2 * (block.fibres[1]), 1.6)
    parts = np.stack([np.clip(part * edge, 0, None) for part in (hematoxylin, eosin, blood)])
    return parts, 1 + 0.05 * block["coarse"] + 0.1 * (block["density"] - 1)


def tumour_cells(plan: Plan, tools: Tools, y0: int, x0: int, height: int, width: int) -> Cells:
    """The tumour cells in and closely around a block, in slide pixels; `gain` (0.8 to 1.2) is how dark the nucleus is."""
    block = _Block(plan, tools, y0, x0, height, width)
    return join("body", [part for part in _free_cells(block) if part.kind == "body"])


def optical_density(
    plan: Plan, tools: Tools, y0: int, x0: int, height: int, width: int
) -> Float32[np.ndarray, "3 height width"]:
    """The tissue's optical density (natural logarithm) in a block, before artefacts; the box is in whole cells."""
    found = concentrations(plan, tools, y0, x0, height, width)
    if found is None:
        return np.zeros((3, height, width), np.float32)
    parts, thickness = found
    look = plan.look
    vectors = (look.hematoxylin, look.eosin, look.blood)
    density = np.empty((3, height, width), np.float32)
    for channel in range(3):
        density[channel] = sum(part * vector[channel] for part, vector in zip(parts, vectors, strict=True))
        density[channel] *= thickness
    return density


def _folded(plan: Plan, tools: Tools, y0: int, x0: int, height: int, width: int) -> np.ndarray:
    """Optical density with the fold: two layers of tissue on top of each other, a little apart."""
    box = (y0, x0, height, width)
    if near(plan.fields["fold"], *box)[1] < -4:
        return optical_density(plan, tools, *box)
    wide = optical_density(plan, tools, y0 - HALO, x0 - HALO, height + 2 * HALO, width + 2 * HALO)
    density = wide[:, HALO : HALO + height, HALO : HALO + width].copy()
    top, left = HALO + _FOLD_SHIFT[0], HALO + _FOLD_SHIFT[1]
    fold = upsample(plan.fields["fold"], *box)
    density += (wide[:, top : top + height, left : left + width] * 1.1 + 0.025) * ramp(fold, 3.0)
    return density


def _transmitted(plan: Plan, tools: Tools, y0: int, x0: int, height: int, width: int) -> np.ndarray:
    """Share of light that passes the tissue, float32[3, h, w]."""
    return np.exp(-_folded(plan, tools, y0, x0, height, width))


def render_block(
    plan: Plan, tools: Tools, y0: int, x0: int, height: int, width: int
) -> UInt8[np.ndarray, "height width 3"]:
    """The picture of a block.

    Args:
        plan, tools: the slide.
        y0, x0, height, width: the box in level-0 pixels, multiples of 16, sides of at most 640 px; it may reach over
            the slide's right and lower edge.
    """
    box = (y0, x0, height, width)
    # The limits are past each transition's end, so that where blocks meet nothing shows.
    if near(plan.fields["tissue"], y0 - HALO, x0 - HALO, height + 2 * HALO, width + 2 * HALO)[1] < -18:
        light = np.ones((3, height, width), np.float32)
    elif near(plan.fields["blur"], *box)[1] > -4:
        pad = HALO // 2
        wide = _transmitted(plan, tools, y0 - pad, x0 - pad, height + 2 * pad, width + 2 * pad)
        inside = (slice(pad, pad + height), slice(pad, pad + width))
        share = ramp(upsample(plan.fields["blur"], *box) - 4, 16.0)
        light = np.empty((3, height, width), np.float32)
        for channel in range(3):
            sharp, soft = wide[channel][inside], blur(wide[channel], 2.4 / plan.mpp)[inside]
            light[channel] = sharp + (soft - sharp) * share
    else:
        light = _transmitted(plan, tools, *box)
    textures = tools.textures
    if near(plan.fields["pen"], *box)[1] > -7:
        pen = upsample(plan.fields["pen"], *box)
        # Ink lies on the cover glass, out of focus: soft edges, a darker rim, uneven.
        ink = ramp(pen, 12.0) * (0.85 + 0.22 * np.exp(-(((pen - 8) / 8) ** 2)) + 0.06 * textures.block("coarse", *box))
        light *= np.exp(-ink[None] * plan.look.ink[:, None, None])
    return expose(light, plan.look.glass, textures, y0, x0)


def expose(
    light: Float32[np.ndarray, "3 h w"], glass: Float32[np.ndarray, "3"], textures: Textures, y0: int, x0: int
) -> UInt8[np.ndarray, "h w 3"]:
    """The picture that a scanner takes of the light that passes (0 to 1), its noise read at a place of the textures."""
    height, width = light.shape[1:]
    grain = textures.block("grain", y0, x0, height, width)
    field = 1 + 0.0022 * textures.block("coarse", y0, x0, height, width)  # uneven glass and mounting medium
    picture = np.empty((height, width, 3), np.uint8)
    for channel in range(3):
        value = light[channel] * (field * glass[channel])
        value += (0.8 + 0.2 * channel) * grain
        picture[..., channel] = np.clip(value + 0.5, 0, 255)
    return picture
