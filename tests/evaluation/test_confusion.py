"""Confusion matrices as a picture."""

import numpy as np
from PIL import Image

from wavepath.evaluation.confusion import draw_confusion


def _pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_cells_are_coloured_by_the_share_of_their_row(tmp_path):
    draw_confusion(tmp_path / "a.png", ["a", "b"], {"knn": [[90, 0], [0, 3]]})
    draw_confusion(tmp_path / "b.png", ["a", "b"], {"knn": [[0, 90], [3, 0]]})
    dark = {name: (abs(_pixels(tmp_path / f"{name}.png") - (8, 48, 107)).max(-1) < 6) for name in "ab"}
    cells = {}
    for name, each in dark.items():
        each[:, each.shape[1] * 4 // 5 :] = False  # the colour bar
        rows, columns = np.nonzero(each)
        assert each.sum() > 5000
        cells[name] = np.corrcoef(rows, columns)[0, 1]
        # Rows of 90 and of 3 examples count alike.
        upper = (rows < (rows.min() + rows.max()) / 2).mean()
        assert 0.45 < upper < 0.55
    assert cells["a"] > 0.4 and cells["b"] < -0.4, "on the diagonal, and off it"


def test_many_rows_are_put_in_lines(tmp_path):
    sizes = {}
    for count in (1, 4, 6):
        draw_confusion(tmp_path / f"{count}.png", ["normal", "tumour"], {f"arm {index} of a long name": [[2, 1], [0, 0]] for index in range(count)})
        sizes[count] = Image.open(tmp_path / f"{count}.png").size
    assert sizes[4][0] > 2 * sizes[1][0] and sizes[4][1] == sizes[1][1]
    assert sizes[6][0] < sizes[4][0] and sizes[6][1] > 1.5 * sizes[4][1], "two lines of three"
