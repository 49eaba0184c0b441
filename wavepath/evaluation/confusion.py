"""Confusion matrices as a picture, one for each row of a table of results."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from wavepath.files import atomic_path

_ACROSS = 4  # matrices in a line
_CELL, _LEAST, _DPI = 0.5, 1.5, 200  # inches of a class, of a matrix of few classes; pixels an inch


def draw_confusion(path: Path, classes: Sequence[str], counts: Mapping[str, Sequence[Sequence[int]]]) -> None:
    """Draws the matrices into a PNG: in each cell the count, coloured by its share of the true class.

    Args:
        classes: names of the rows (truth) and columns (prediction). counts: by title, [c, c] each; of several seeds their sum.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    down = -(-len(counts) // _ACROSS)
    across = -(-len(counts) // down)  # six are two lines of three
    side = max(_LEAST, _CELL * len(classes))
    names = 0.075 * max(len(name) for name in classes)  # inches that they take
    figure = Figure(figsize=((side + 0.35) * across + names + 0.9, (side + 0.4) * down + 0.7 * names + 0.55), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
    for place, (axis, (title, matrix)) in enumerate(zip(axes, counts.items(), strict=False)):
        matrix = np.asarray(matrix, float)
        share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axis.set_title("\n".join(textwrap.wrap(title, int(13 * side))), fontsize=9)
        axis.set_xticks(range(len(classes)), classes, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
        axis.set_yticks(range(len(classes)), classes, fontsize=8)
        # With shared axes the names stand at the last line alone, which need not be below every column.
        axis.tick_params(labelbottom=place + across >= len(counts))
        for (row, column), value in np.ndenumerate(matrix):
            dark = share[row, column] > 0.55
            axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color="white" if dark else "black")
    for axis in axes[len(counts) :]:
        axis.set_visible(False)
    figure.supxlabel("predicted", fontsize=9)
    figure.supylabel("truth", fontsize=9)
    bar = figure.colorbar(image, ax=axes.tolist(), fraction=0.05 / across, pad=0.02, aspect=20 * down)
    bar.set_label("share of the true class", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    with atomic_path(path) as temporary:
        figure.set_dpi(_DPI)
        FigureCanvasAgg(figure).print_png(str(temporary))
