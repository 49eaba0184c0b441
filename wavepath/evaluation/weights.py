"""Weights of networks that metrics need, from the user's own files: read without running anything, and held against what the network takes."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from wavepath.errors import DatasetError
from wavepath.interop.weight_files import read_arrays

_NAMED = 4  # arrays that an error lists


def read_weights(path: Path, wanted: str) -> dict[str, np.ndarray]:
    """All arrays of a .safetensors or .npz file.

    Args:
        wanted: which option takes such a file and how its arrays are named; ends the error of a file that is not there.

    Raises:
        DatasetError: no such file, another format, or a damaged one.
    """
    path = Path(path)
    if not path.is_file():
        raise DatasetError(f"{path} does not exist; {wanted}")
    return read_arrays(path)


def check_weights(path: Path, weights: Mapping[str, np.ndarray], want: Mapping[str, tuple[int, ...]], network: str, how: str) -> None:
    """Holds arrays against the names and shapes that a network takes; what else is in the file is left alone.

    Args:
        network: what the arrays should fit. how: how they are named.

    Raises:
        DatasetError: arrays that are missing, of another shape (named) or not finite.
    """
    wrong = [f"{name} is missing" for name in want if name not in weights]
    shapes = {name: tuple(weights[name].shape) for name in want if name in weights}
    wrong += [f"{name} is {shape} instead of {want[name]}" for name, shape in shapes.items() if shape != want[name]]
    wrong = wrong or [f"{name} is not finite" for name in want if not _finite(weights[name])]
    if wrong:
        listed = "; ".join(wrong[:_NAMED]) + (f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else "")
        raise DatasetError(f"{path} does not fit {network}: {listed}; weights are named {how}")


def _finite(values: np.ndarray) -> bool:
    try:
        return bool(np.isfinite(values.astype(np.float64)).all())
    except (TypeError, ValueError):  # no numbers at all
        return False
