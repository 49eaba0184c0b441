"""Fixed sine-cosine position embeddings in two dimensions."""

import functools

import numpy as np
from jaxtyping import Float32


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
