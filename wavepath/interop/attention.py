"""What a bag network made of one slide, tile by tile, in HDF5: `attention` beside the `coords` of the features it was computed from.

    coords       int64 [n, 2], level-0 pixels and with the attributes of the feature file, so that TRIDENT can read them
    attention    float32 [n], or [c, n] of a network with a row for each class; 1 in sum over the tiles
    probability  float32 [c] of the slide

Attributes of `attention`: `classes` (JSON list), `predicted`, `label` ('' where it is not known), and what else the writer knows of the model.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from wavepath.errors import DatasetError
from wavepath.files import atomic_path
from wavepath.interop.coords import SUFFIX, geometry, plain_attributes

_ROWS = 1024  # of a chunk


@dataclass(frozen=True)
class Attention:
    """One slide: `coords` i64 [n, 2], `attention` f32 [n] or [c, n], `probability` f32 [c] of `classes`, names of the predicted and the true class.

    `attributes` are those of `coords`, `model` those of `attention` that are no field here.
    """

    slide_id: str
    coords: np.ndarray
    attention: np.ndarray
    probability: np.ndarray
    classes: tuple[str, ...]
    predicted: str
    label: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.coords)

    def of_class(self, name: str = "") -> np.ndarray:
        """Attention f32 [n]; of a network with a row for each class that of `name`, by default of the predicted one."""
        return self.attention if self.attention.ndim == 1 else self.attention[self.classes.index(name or self.predicted)]

    @property
    def size_level0(self) -> float:
        """Side of a tile in level-0 pixels: what the attributes tell, else (CLAM's features have none) the usual step from tile to tile."""
        try:
            told = geometry(self.attributes)
        except ValueError:
            told = None
        if told and told.footprint:
            return told.footprint
        # Along rows and columns, where neighbours are one step apart: CLAM has a grid for each piece of tissue, and these lie anyhow to each other.
        steps = [_steps(self.coords[:, axis], self.coords[:, 1 - axis]) for axis in (0, 1)]
        sizes, counts = np.unique(np.concatenate(steps), return_counts=True)
        return float(sizes[counts.argmax()]) if sizes.size else 1.0


def _steps(along: np.ndarray, across: np.ndarray) -> np.ndarray:
    """From each tile to the next of the same `across`."""
    order = np.lexsort((along, across))
    step = np.diff(along[order])
    return step[(np.diff(across[order]) == 0) & (step > 0)]


def attention_path(folder: Path, slide_id: str) -> Path:
    """Where a slide's attention lies: a slide id with `/` means folders."""
    return Path(folder) / f"{slide_id}{SUFFIX}"


def write_attention(path: Path, found: Attention) -> None:
    """Writes the file whole or not at all.

    Raises:
        ValueError: attention, coordinates and classes do not fit one another.
    """
    coords, attention = np.ascontiguousarray(found.coords, np.int64).reshape(-1, 2), np.asarray(found.attention, np.float32)
    rows = (len(coords),) if attention.ndim == 1 else (len(found.classes), len(coords))
    if attention.shape != rows or len(found.probability) != len(found.classes):
        raise ValueError(f"attention {attention.shape}, probability {len(found.probability)}: {len(coords)} tiles, {len(found.classes)} classes")
    told = {"classes": json.dumps(list(found.classes), ensure_ascii=False), "predicted": found.predicted, "label": found.label}
    with atomic_path(path) as temporary, h5py.File(temporary, "w", track_order=False) as file:
        dataset = file.create_dataset("coords", data=coords, maxshape=(None, 2), chunks=(_ROWS, 2))
        for key, value in sorted(found.attributes.items()):
            dataset.attrs[key] = "None" if value is None else value
        dataset = file.create_dataset("attention", data=attention)
        for key, value in sorted({**found.model, **told}.items()):
            dataset.attrs[key] = value
        file.create_dataset("probability", data=np.asarray(found.probability, np.float32))


def read_attention(path: Path, slide_id: str | None = None) -> Attention:
    """Reads what `write_attention` wrote.

    Raises:
        DatasetError: no such file, or not one of attention.
    """
    path = Path(path)
    try:
        with h5py.File(path, "r") as file:
            lacking = [name for name in ("coords", "attention", "probability") if name not in file]
            if lacking:
                raise DatasetError(f"{path} has no dataset `{lacking[0]}`; give a file of attention/ as `wavepath evaluate --mil` or --bags wrote it")
            told = plain_attributes(file["attention"])
            classes = tuple(map(str, json.loads(told.pop("classes", "[]"))))
            predicted, label = told.pop("predicted", ""), told.pop("label", "")
            kinds = {"coords": np.int64, "attention": np.float32, "probability": np.float32}
            coords, attention, probability = (np.asarray(file[name][()]).astype(kind, casting="same_kind") for name, kind in kinds.items())
            rows = [(len(coords),), (len(classes), len(coords))]
            if coords.shape != (len(coords), 2) or attention.shape not in rows or probability.shape != (len(classes),) or predicted not in classes:
                raise ValueError(f"coords {coords.shape}, attention {attention.shape}, probability {probability.shape}, {predicted!r} of {classes}")
            attributes = plain_attributes(file["coords"])
            return Attention(slide_id or path.name.removesuffix(SUFFIX), coords, attention, probability, classes, predicted, label, attributes, told)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise DatasetError(f"cannot read {path} ({error}); run `wavepath evaluate` again") from None
