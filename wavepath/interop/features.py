"""Tile features of one slide in HDF5, in the layout that TRIDENT writes and CLAM reads.

`features` float32 (N, D) and `coords` int64 (N, 2), the top-left corner of each tile as (x, y) in level-0 pixels, both with the same
attributes. Further per-tile columns (scores, a second pooling, names) are datasets of their own, which other tools ignore. Read are TRIDENT's
`features_<encoder>/*.h5` and CLAM's `h5_files/*.h5` and `pt_files/*.pt` too.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from wavepath.errors import DatasetError
from wavepath.files import atomic_path
from wavepath.interop.coords import plain_attributes

SUFFIX, PT_SUFFIX = ".h5", ".pt"


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
    """Reads a feature file of wavepath, TRIDENT or CLAM; a `.pt` of CLAM's is a tensor without coordinates, which are zeros then.

    Raises:
        DatasetError: the file is missing, truncated, or holds no tile features.
    """
    path = Path(path)
    if path.suffix == PT_SUFFIX:
        return _read_pt(path, slide_id)
    try:
        with h5py.File(path, "r") as file:
            if "features" not in file:
                raise DatasetError(f"{path} has no dataset `features`; write it with `wavepath embed`")
            features = _tile_features(path, file["features"][()])
            coords = np.asarray(file["coords"][()], np.int64) if "coords" in file else np.zeros((len(features), 2), np.int64)
            coords = coords.reshape(0, 2) if coords.size == 0 else coords
            # TRIDENT writes the tile size on `coords` alone.
            found = [plain_attributes(file[name]) for name in ("coords", "features") if name in file]
            attributes = {key: value for attrs in found for key, value in attrs.items()}
            extra = {}
            for name in file:
                dataset = file[name]
                if name in ("features", "coords") or not isinstance(dataset, h5py.Dataset) or dataset.dtype.hasobject:
                    continue
                values = dataset[()]
                extra[name] = np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values
    except (OSError, RuntimeError, KeyError, ValueError) as error:  # h5py's own errors for what is cut short or garbled inside
        raise DatasetError(f"cannot read {path} ({error}); delete it and run `wavepath embed` again") from None
    if len(coords) != len(features):
        raise DatasetError(f"{path} has {len(features)} rows of features and {len(coords)} of coords; delete it and make it again")
    if coords.shape[1:] != (2,):
        raise DatasetError(f"{path}: `coords` is {list(coords.shape)}, not [tiles, 2] (x, y) in level-0 pixels; delete it and make it again")
    return Features(slide_id or path.name.removesuffix(SUFFIX), features, coords, attributes, extra)


def _tile_features(path: Path, values: np.ndarray) -> np.ndarray:
    """float32 [n, d] from what a file holds."""
    values = np.asarray(values)
    if values.dtype.kind not in "iuf" and values.dtype.name != "bfloat16":
        raise DatasetError(f"{path}: its features are {values.dtype}, not numbers; make it again")
    if values.ndim == 3 and values.shape[0] == 1:  # some writers keep a batch axis
        values = values[0]
    if values.ndim != 2:
        raise DatasetError(f"{path} holds features {list(values.shape)}, not [tiles, width]; give features of tiles, not of whole slides")
    return values.astype(np.float32)


def _read_pt(path: Path, slide_id: str | None) -> Features:
    from wavepath.interop.torch_file import read_torch

    values = read_torch(path)
    if isinstance(values, dict) and "features" in values:
        values = values["features"]
    if not isinstance(values, np.ndarray):
        raise DatasetError(f"{path} holds a {type(values).__name__}, not one tensor [tiles, width]; save the features alone with torch.save")
    features = _tile_features(path, values)
    return Features(slide_id or path.name.removesuffix(PT_SUFFIX), features, np.zeros((len(features), 2), np.int64))


def features_folder(folder: Path) -> Path:
    """Where the feature files are below a folder of TRIDENT's or CLAM's, which has others beside them; the folder itself elsewhere.

    CLAM's `h5_files` come before its `pt_files`, since they have the coordinates. Raises DatasetError for features of several encoders.
    """
    folder = Path(folder)
    for name in ("h5_files", "pt_files"):
        if (folder / name).is_dir():
            return folder / name
    found = sorted(path for path in [*folder.glob("features_*"), *folder.glob("*x_*px_*px_overlap/features_*")] if path.is_dir())
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found)
        raise DatasetError(f"{folder} holds features of several kinds ({names}); give one of them")
    return found[0] if found else folder


def list_features(folder: Path) -> list[tuple[str, Path]]:
    """(slide id, path) of each feature file under `folder`, sorted; a slide's id is its relative path without suffix.

    Where there are HDF5 files and `.pt` files, the former count: the others are the same features without coordinates.

    Raises:
        DatasetError: the folder holds none.
    """
    folder = features_folder(folder)
    for suffix in (SUFFIX, PT_SUFFIX):
        found = sorted((str(path.relative_to(folder).as_posix()).removesuffix(suffix), path) for path in folder.rglob("*" + suffix))
        found = [(name, path) for name, path in found if not path.name.startswith(".")]
        if found:
            return found
    raise DatasetError(
        f"no feature file (*{SUFFIX}, *{PT_SUFFIX}) under {folder}; write them with `wavepath embed --checkpoint RUN --data TILES --out {folder}`"
    )
