"""Tile features of one slide in HDF5, in the layout that TRIDENT writes and CLAM reads.

`features` float32 (N, D) and `coords` int64 (N, 2), the top-left corner of each tile as (x, y) in level-0 pixels, both with the same
attributes. Further per-tile columns (scores, a second pooling, names) are datasets of their own, which other tools ignore.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from wavepath.errors import DatasetError
from wavepath.files import atomic_path

SUFFIX = ".h5"


@dataclass(frozen=True)
class Features:
    """Features of one slide. `features` f32 [n, d], `coords` i64 [n, 2] level-0 (x, y), `extra` further columns [n, ...]."""

    slide_id: str
    features: np.ndarray
    coords: np.ndarray
    attributes: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.features)


def _storable(value: Any) -> Any:
    # HDF5 attributes know no None and no dict; TRIDENT stores the word and JSON text, so that its reader gets what it expects.
    if value is None:
        return "None"
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True)
    return value


def write_features(
    path: Path, features: np.ndarray, coords: np.ndarray, attributes: dict[str, Any], extra: dict[str, np.ndarray] | None = None
) -> None:
    """Writes one slide's features whole or not at all.

    Args:
        path: `<folder>/<slide_id>.h5`.
        features: float32 [n, d].
        coords: int64 [n, 2], (x, y) of the tile's top-left corner in level-0 pixels.
        attributes: written on both datasets (`patch_size`, `patch_size_level0`, `level0_magnification`, `target_magnification`, `mpp`, ...).
        extra: further per-tile columns [n, ...]; text columns are stored as fixed-length UTF-8.

    Raises:
        ValueError: the columns differ in length.
    """
    features = np.ascontiguousarray(features, np.float32)
    coords = np.ascontiguousarray(coords, np.int64).reshape(-1, 2)
    columns = dict(extra or {})
    for name, column in {"coords": coords, **columns}.items():
        if len(column) != len(features):
            raise ValueError(f"{name} has {len(column)} rows, features has {len(features)}")
    with atomic_path(path) as temporary, h5py.File(temporary, "w", track_order=False) as file:
        for name, column in {"features": features, "coords": coords, **columns}.items():
            column = np.asarray(column)
            if column.dtype.kind in "UO":
                encoded = [str(text).encode() for text in column]
                width = max((len(text) for text in encoded), default=1) or 1
                dataset = file.create_dataset(name, data=np.array(encoded, f"S{width}"))
            else:
                chunks = (max(1, min(len(column), 1024)), *column.shape[1:])
                dataset = file.create_dataset(name, data=column, maxshape=(None, *column.shape[1:]), chunks=chunks)
            if name in ("features", "coords"):
                for key, value in sorted(attributes.items()):
                    dataset.attrs[key] = _storable(value)


def read_features(path: Path, slide_id: str | None = None) -> Features:
    """Reads a feature file of wavepath, TRIDENT or CLAM.

    Raises:
        DatasetError: the file is missing, truncated, or holds no `features`.
    """
    path = Path(path)
    try:
        with h5py.File(path, "r") as file:
            if "features" not in file:
                raise DatasetError(f"{path} has no dataset `features`; write it with `wavepath embed`")
            features = np.asarray(file["features"][()], np.float32)
            if features.ndim == 3 and features.shape[0] == 1:  # some writers keep a batch axis
                features = features[0]
            coords = np.asarray(file["coords"][()], np.int64) if "coords" in file else np.zeros((len(features), 2), np.int64)
            # TRIDENT writes the tile size on `coords` alone.
            found = [file[name].attrs for name in ("coords", "features") if name in file]
            attributes = {key: _plain(value) for attrs in found for key, value in attrs.items()}
            extra = {}
            for name in file:
                dataset = file[name]
                if name in ("features", "coords") or not isinstance(dataset, h5py.Dataset) or dataset.dtype.hasobject:
                    continue
                values = dataset[()]
                extra[name] = np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values
    except OSError as error:
        raise DatasetError(f"cannot read {path} ({error}); delete it and run `wavepath embed` again") from None
    return Features(slide_id or path.name.removesuffix(SUFFIX), features, coords, attributes, extra)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return value.item() if isinstance(value, np.generic) else value


def list_features(folder: Path) -> list[tuple[str, Path]]:
    """(slide id, path) of each feature file under `folder`, sorted; a slide's id is its relative path without suffix.

    Raises:
        DatasetError: the folder holds none.
    """
    folder = Path(folder)
    found = sorted((str(path.relative_to(folder).as_posix()).removesuffix(SUFFIX), path) for path in folder.rglob("*" + SUFFIX))
    found = [(name, path) for name, path in found if not path.name.startswith(".")]
    if not found:
        raise DatasetError(
            f"no feature file (*{SUFFIX}) under {folder}; write them with `wavepath embed --checkpoint RUN --data TILES --out {folder}`"
        )
    return found
