"""What tests of tiled outputs share: are there seams?"""

import numpy as np
import pytest

from wavepath.inference.grid import Axis, Grid


def borders(axis: Axis) -> np.ndarray:
    """Output positions where a tile begins or ends to count, away from the image's own borders."""
    used = [axis.used(index) for index in range(len(axis.starts))]
    return np.array(sorted({low for low, _, _ in used[1:]} | {high for _, high, _ in used[:-1]}))


def _steps(image: np.ndarray, direction: int) -> np.ndarray:
    """[i]: mean |difference| between row (column) i and i + 1."""
    return np.abs(np.diff(image.astype(np.float32), axis=direction)).mean(axis=(1 - direction, 2))


def measure_seams(output: np.ndarray, grid: Grid, control: np.ndarray, other: Grid) -> tuple[float, float]:
    """Mean step across the borders of tiles over that elsewhere, and its z: how many standard errors it is from 1.

    Each step is taken relative to that at the same place in `control`, the output of the same network on the same image over another grid, whose
    borders lie elsewhere: tissue is not alike everywhere, and the blocks of a slide's own JPEG are steps of 8 px that would coincide with tiles.

    Args:
        output, control: uint8[h, w, 3], over `grid` and over `other`.
    """
    across, elsewhere = [], []
    for direction, axis, another in ((0, grid.rows, other.rows), (1, grid.columns, other.columns)):
        relative = _steps(output, direction) / _steps(control, direction)
        at, rest = borders(axis) - 1, np.ones(len(relative), bool)
        rest[at] = rest[borders(another) - 1] = False
        kept = np.setdiff1d(at, borders(another) - 1)
        across.append(relative[kept])
        elsewhere.append(relative[rest])
    across, elsewhere = np.concatenate(across), np.concatenate(elsewhere)
    ratio = float(across.mean() / elsewhere.mean())
    return ratio, float((across.mean() - elsewhere.mean()) / (elsewhere.std() / np.sqrt(len(across))))


@pytest.fixture
def seams():
    """`measure_seams`."""
    return measure_seams
