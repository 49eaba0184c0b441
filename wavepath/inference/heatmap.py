"""Scores of a slide's tiles as pictures: a grid in the slide's geometry, a PNG beside the thumbnail, and QuPath's tiles.

Attention of multiple-instance networks is what they are made for; any number per tile (a probability, an energy) is drawn alike. Attention
sums to one over a slide, so that its values say little by themselves and a few tiles may hold nearly all: by default the ranks are drawn.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8
from scipy.sparse import csr_array, diags_array
from scipy.stats import rankdata

from wavepath.errors import ConfigError, DatasetError
from wavepath.files import atomic_path
from wavepath.interop.geojson import polygon_feature, write_features

MODES = ("rank", "minmax", "none")
COLORMAP = "magma"  # even steps look even, also in print and to colour-blind eyes
CLASSES = {"low": 0.0, "middle": 0.5, "high": 0.9}  # of a rank, for QuPath: the lower half, the upper half, its top tenth of all
_SHARE = 0.05  # of a cell (or of a tile, where that is smaller) that must be covered for the cell to have a value
_RELIEF = 0.55  # how much of the slide's own light and dark is added to the colours
_LONGEST, _DPI, _CELLS = 4.6, 200, 1200  # of a panel: inches, pixels an inch; cells of the finest grid along the longer side
_MEANS = {"rank": "{name}, rank within the slide", "minmax": "{name}, lowest to highest", "none": "{name}"}

# Numbers --------------------------------------------------------------------------------------------------------------------------------


def attention_grid(
    coords: Int[np.ndarray, "n 2"], size_level0: float, values: Float[np.ndarray, " n"], width: int, height: int, downsample: float
) -> Float32[np.ndarray, "h w"]:
    """The tiles' values on a grid over the whole slide: in each cell the mean of the tiles over it, weighted by how much they cover.

    Args:
        coords: top left corners (x, y) in level-0 pixels. size_level0: side of a tile, level-0 pixels; need not be whole.
        values: one for each tile; tiles without a finite value are left out.
        width, height: of the slide in level-0 pixels; what lies outside is cut off.
        downsample: side of a cell in level-0 pixels.

    Returns:
        float32 [ceil(height / downsample), ceil(width / downsample)], nan where there is no tile.
    """
    if not (size_level0 > 0 and downsample > 0 and width > 0 and height > 0):
        raise ValueError(f"tiles of {size_level0} px, cells of {downsample} px and a slide of {width} x {height} px cannot be drawn")
    columns, rows = int(np.ceil(width / downsample)), int(np.ceil(height / downsample))
    finite = np.isfinite(values)
    corner = np.asarray(coords, np.float64).reshape(-1, 2)[finite] / downsample
    value, side = np.asarray(values, np.float64)[finite], size_level0 / downsample
    # A tile covers the product of what it covers of a row and of a column: sums over tiles are products of two sparse matrices.
    wide, tall = _overlaps(corner[:, 0], side, columns), _overlaps(corner[:, 1], side, rows).T
    covered, total = (tall @ wide).toarray(), (tall @ (diags_array(value) @ wide)).toarray()
    # Without a threshold a tile that ends a rounding error beyond a cell's edge would colour one more row of cells.
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(covered >= _SHARE * min(1.0, side) ** 2, total / covered, np.nan).astype(np.float32)


def _overlaps(start: np.ndarray, side: float, cells: int) -> csr_array:
    """[n, cells]: the length of [start, start + side] inside of each [cell, cell + 1]."""
    cell = np.floor(start).astype(np.int64)[:, None] + np.arange(int(np.ceil(side)) + 1)
    length = np.minimum(cell + 1, start[:, None] + side) - np.maximum(cell, start[:, None])
    inside = (length > 0) & (cell >= 0) & (cell < cells)
    return csr_array((length[inside], (np.nonzero(inside)[0], cell[inside])), shape=(len(start), cells))


def normalised(values: Float[np.ndarray, " n"], mode: str = "rank") -> Float32[np.ndarray, " n"]:
    """Values in [0, 1]; what is not finite is nan and does not count.

    Args:
        mode: `rank` (0 the lowest, 1 the highest, equal values share the mean of their ranks), `minmax` (linear from lowest to highest) or
            `none` (as they are, for probabilities). Where all values are equal the first two give 0.5.

    Raises:
        ConfigError: an unknown mode, or `none` with values outside of [0, 1].
    """
    if mode not in MODES:
        raise ConfigError(f"heatmap mode {mode!r} is not one of {', '.join(MODES)}")
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    out, kept = np.full(values.shape, np.nan, np.float32), values[finite]
    if mode == "none":
        if kept.size and (kept.min() < 0 or kept.max() > 1):
            raise ConfigError(f"values from {kept.min():.3g} to {kept.max():.3g} are no share of 1; draw them with the mode rank or minmax")
        out[finite] = kept
    elif kept.size and kept.min() == kept.max():
        out[finite] = 0.5
    elif kept.size:
        out[finite] = (rankdata(kept) - 1) / (len(kept) - 1) if mode == "rank" else (kept - kept.min()) / (kept.max() - kept.min())
    return out


# QuPath ---------------------------------------------------------------------------------------------------------------------------------


def heatmap_geojson(
    path: Path,
    *,
    coords: Int[np.ndarray, "n 2"],
    size_level0: float,
    columns: Mapping[str, np.ndarray],
    classification_by: str | None = None,
    thresholds: Mapping[str, float] | None = None,
    object_type: str = "tile",
    colormap: str = COLORMAP,
) -> None:
    """Writes the tiles with their numbers as QuPath objects (ANCHORS, QuPath GeoJSON); `Measure > Show measurement maps` colours them.

    Args:
        coords, size_level0: as for `attention_grid`.
        columns: measurements by name, each [n]; nan is kept (QuPath's "NaN").
        classification_by: the column that gives each tile a QuPath class, coloured by `colormap`; None: tiles have no class.
        thresholds: class -> its lowest value. A tile is of the class with the highest threshold that it reaches, of none below all of them.
            Default: `CLASSES`, for ranks.
        object_type: `tile` or `detection`: both stay fast with thousands of them, annotations do not.

    Raises:
        ValueError: a column of another length, or `classification_by` is none of them.
    """
    for name, column in columns.items():
        if len(column) != len(coords):
            raise ValueError(f"{name} has {len(column)} values, there are {len(coords)} tiles")
    if classification_by is not None and classification_by not in columns:
        raise ValueError(f"classification_by {classification_by!r} is not one of {', '.join(columns)}")
    write_features(path, _tiles(coords, float(size_level0), columns, classification_by, thresholds or CLASSES, object_type, colormap))


def _tiles(
    coords: np.ndarray, side: float, columns: Mapping[str, np.ndarray], by: str | None, thresholds: Mapping[str, float], kind: str, colormap: str
) -> Iterator[dict[str, Any]]:
    from matplotlib import colormaps

    ranked = sorted(thresholds.items(), key=lambda item: item[1])
    colours = [[int(255 * part) for part in colormaps[colormap](place)[:3]] for place in np.linspace(0.15, 0.85, len(ranked))]
    # Which threshold is the last that is reached, -1 for none; nan reaches none.
    levels = np.array([low for _, low in ranked])
    reached = np.searchsorted(levels, np.nan_to_num(columns[by], nan=-np.inf), side="right") - 1 if by else np.full(len(coords), -1)
    for index, (x, y) in enumerate(np.asarray(coords).tolist()):
        box = [(x, y), (x + side, y), (x + side, y + side), (x, y + side)]
        name, colour = (ranked[reached[index]][0], colours[reached[index]]) if reached[index] >= 0 else ("", None)
        numbers = {title: float(f"{column[index]:.7g}") for title, column in columns.items()}  # the digits that a float32 has
        yield polygon_feature(box, classification=name, color=colour, object_type=kind, measurements=numbers)


# Pictures -------------------------------------------------------------------------------------------------------------------------------


def draw_heatmap(
    path: Path,
    *,
    coords: Int[np.ndarray, "n 2"],
    size_level0: float,
    values: Float[np.ndarray, " n"],
    thumbnail: UInt8[np.ndarray, "h w 3"] | None = None,
    dimensions: tuple[int, int] | None = None,
    title: str = "",
    mode: str = "rank",
    mpp: float | None = None,
    colormap: str = COLORMAP,
    name: str = "attention",
) -> None:
    """Writes a PNG: the thumbnail, beside it (below it, where the slide is broad) the values over the slide in grey, a colour bar.

    Args:
        coords, size_level0, values: as for `attention_grid`.
        thumbnail: the whole slide; without one the grid is drawn alone.
        dimensions: (width, height) of the slide in level-0 pixels; a thumbnail needs them, else the tiles' own extent is drawn.
        title: above the picture, such as slide, prediction and truth.
        mode: see `normalised`. mpp: micrometres per level-0 pixel, for the scale bar; without it there is none.
        name: of the values, at the colour bar.

    Raises:
        DatasetError: no tile, or none with a finite value. ConfigError: see `normalised`, or an unknown colour map.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    if colormap not in colormaps:
        raise ConfigError(f"there is no colour map {colormap!r}; take magma, viridis, cividis or another of matplotlib's")
    if not np.isfinite(values).any():
        raise DatasetError(f"{path}: no tile has a finite value, so there is nothing to draw")
    if thumbnail is not None and dimensions is None:
        raise ValueError("a thumbnail needs the slide's dimensions")
    coords = np.asarray(coords)
    corner = np.zeros(2, np.int64)
    if dimensions is None:  # nothing else is known of the slide: the tiles' own extent
        corner = coords.min(0)
        dimensions = tuple(int(side) for side in np.ceil(coords.max(0) - corner + size_level0))
    # A cell for each pixel of the thumbnail; without one cells far smaller than a tile, since tiles need not lie on one lattice.
    downsample = dimensions[0] / thumbnail.shape[1] if thumbnail is not None else max(max(dimensions) / _CELLS, size_level0 / 64)
    grid = attention_grid(coords - corner, size_level0, normalised(values, mode), *dimensions, downsample)
    shown = [_overlay(grid, colormap, thumbnail)] if thumbnail is None else [thumbnail, _overlay(grid, colormap, thumbnail)]
    below = len(shown) > 1 and dimensions[0] > 1.8 * dimensions[1]
    width, height = (_LONGEST * (1.6 if below else 1.0) * side / max(dimensions) for side in dimensions)
    shape = (len(shown), 1) if below else (1, len(shown))
    figure = Figure(figsize=(max(width * shape[1], 2.2) + 1.3, height * shape[0] + 0.9), layout="constrained")
    axes = np.atleast_1d(figure.subplots(*shape, squeeze=False)).ravel()
    for axis, image in zip(axes, shown, strict=True):
        axis.imshow(image, extent=(0, dimensions[0], dimensions[1], 0), interpolation="antialiased")
        axis.set_axis_off()
    if mpp:
        _scale_bar(axes[0], dimensions, float(mpp))
    bar = figure.colorbar(ScalarMappable(cmap=colormaps[colormap]), ax=axes.tolist(), fraction=0.06, aspect=25, pad=0.02)
    bar.set_label(_MEANS[mode].format(name=name), fontsize=9)
    bar.ax.tick_params(labelsize=8)
    if mode == "minmax":
        finite = np.asarray(values)[np.isfinite(values)]
        bar.set_ticks([0, 1], labels=[f"{finite.min():.2g}", f"{finite.max():.2g}"])
    if title:
        figure.suptitle(title, fontsize=10)
    with atomic_path(path) as temporary:
        figure.set_dpi(_DPI)
        FigureCanvasAgg(figure).print_png(str(temporary))


def _overlay(grid: np.ndarray, colormap: str, thumbnail: np.ndarray | None) -> np.ndarray:
    """The colours of the grid over the slide in light grey, or over white. Beneath them the slide is a relief around its own mean, so that the
    colours stay those of the bar on average, which they would not where they are mixed with it."""
    from matplotlib import colormaps

    colours = colormaps[colormap](np.nan_to_num(grid))[..., :3]
    if thumbnail is None:
        return (255 * np.where(np.isnan(grid)[..., None], 1.0, colours)).astype(np.uint8)
    grey = np.repeat(thumbnail.astype(np.float32).mean(-1, keepdims=True) / 255, 3, -1)
    rows, columns = (np.minimum((np.arange(wanted) * have) // wanted, have - 1) for wanted, have in zip(grey.shape, grid.shape, strict=False))
    colours, bare = colours[rows][:, columns], np.isnan(grid)[rows][:, columns, None]
    relief = grey - grey[~bare[..., 0]].mean() if not bare.all() else grey
    mixed = np.where(bare, 0.45 * grey + 0.55, colours + _RELIEF * relief)
    return np.round(255 * np.clip(mixed, 0, 1)).astype(np.uint8)


def scale_bar_um(width_um: float) -> float:
    """The length of 1, 2 or 5 times a power of ten, micrometres, that comes nearest below a third of the picture's width."""
    power = 10.0 ** np.floor(np.log10(width_um / 3))
    return float(power * max(step for step in (1, 2, 5) if step * power <= width_um / 3 * (1 + 1e-9)))


def _scale_bar(axis, dimensions: tuple[int, int], mpp: float) -> None:
    """A bar below the lower left corner, where it hides nothing."""
    length = scale_bar_um(dimensions[0] * mpp)
    text = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"
    across = axis.get_xaxis_transform()  # x in level-0 pixels, y in parts of the axis
    axis.plot([0, length / mpp], [-0.03, -0.03], transform=across, color="black", linewidth=2.5, solid_capstyle="butt", clip_on=False)
    axis.text(0, -0.05, text, transform=across, ha="left", va="top", fontsize=9)
