"""Position embeddings in two dimensions: fixed ones of sines and cosines, and tables at another size."""

import functools
import math

import numpy as np
from jaxtyping import Array, Float, Float32

from wavepath.ops.resize import cubic_matrix, resample


@functools.lru_cache(maxsize=32)
def sincos_2d(width: int, rows: int, columns: int) -> Float32[np.ndarray, "n d"]:
    """Position embeddings `[rows * columns, width]` of a patch grid, rows of patches first.

    The first half of the channels encodes the column (w axis), the second half the row; each half is `[sin | cos]` with base 10000. The order
    of the halves is that of the released MAE weights, whose positions would otherwise be transposed.

    Args:
        width: channels, a multiple of 4.
        rows: patches from top to bottom.
        columns: patches from left to right.

    Raises:
        ValueError: a width that 4 does not divide.

    Source: METHODS 5.1.
    """
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width divisible by 4, not {width}")
    frequency = 1.0 / 10000.0 ** (np.arange(width // 4, dtype=np.float64) / (width / 4.0))
    row, column = np.meshgrid(np.arange(rows, dtype=np.float64), np.arange(columns, dtype=np.float64), indexing="ij")
    halves = []
    for place in (column, row):
        angle = place.reshape(-1, 1) * frequency
        halves += [np.sin(angle), np.cos(angle)]
    table = np.concatenate(halves, axis=1).astype(np.float32)
    table.flags.writeable = False  # the cache hands the same array to every caller
    return table


def resize_table(table: Float[Array, "n d"], rows: int, columns: int) -> Float[Array, "m d"]:
    """A learned table of a square grid at another grid's size: bicubic and antialiased, as timm's `resample_abs_pos_embed` (to 1e-5).

    Args:
        table: [side * side, d], rows of patches first.
        rows, columns: of the new grid.

    Returns:
        [rows * columns, d]; the table itself where the grid is its own.

    Raises:
        ValueError: the table is not that of a square grid.
    """
    side = math.isqrt(table.shape[0])
    if side * side != table.shape[0]:
        raise ValueError(f"a table of {table.shape[0]} positions is not that of a square grid")
    if (rows, columns) == (side, side):
        return table
    images = table.reshape(1, side, side, -1)
    return resample(images, cubic_matrix(side, rows), cubic_matrix(side, columns)).reshape(rows * columns, -1)
