"""CLAM's files, written: coordinates of patches, features as HDF5 and as `.pt`, the process list and the dataset table.

    OUT/patches/<slide>.h5            coords int64 [n, 2], level-0 px, with patch_level and patch_size, from which CLAM's extractor reads
    OUT/h5_files/<slide>.h5           features float32 [n, d], coords int32 [n, 2]
    OUT/pt_files/<slide>.pt           features alone, what CLAM trains from
    OUT/process_list_autogen.csv      the slides
    OUT/dataset.csv                   case_id, slide_id, label

CLAM knows no magnification: a patch is so many pixels of a pyramid level. Tiles at 20x of a 40x slide without a 20x level are twice as many
pixels of level 0 there.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from wavepath.files import atomic_path, write_text

H5_FILES, PT_FILES = "h5_files", "pt_files"
PROCESS_LIST, DATASET = "process_list_autogen.csv", "dataset.csv"
_CHUNKS = (32, 2)  # CLAM's, of coords
# CLAM's own defaults: its columns want values, though these tiles were found in another way.
_PROCESS = {
    "process": 0, "status": "processed", "seg_level": -1, "sthresh": 8, "mthresh": 7, "close": 4, "use_otsu": False, "keep_ids": "none",
    "exclude_ids": "none", "a_t": 100, "a_h": 16, "max_n_holes": 8, "vis_level": -1, "line_thickness": 250, "use_padding": True,
    "contour_fn": "four_pt",
}  # fmt: skip


@dataclass(frozen=True)
class ClamPatch:
    """How CLAM is to read tiles: `size` pixels of pyramid level `level` of that `downsample` and `dimensions` (width, height); `footprint` is
    what that covers and `wanted` what the tiles do, both in level-0 pixels.
    """

    level: int
    size: int
    downsample: float
    dimensions: tuple[int, int]
    footprint: float
    wanted: float

    @property
    def exact(self) -> bool:
        """Whether the tiles are read at their true footprint, to a twentieth of a level-0 pixel over the whole tile."""
        return abs(self.footprint - self.wanted) < 0.05


def clam_patch(footprint: float, pixels: int, levels: Sequence[tuple[int, int, float]]) -> ClamPatch:
    """The level and size that give tiles their footprint.

    The coarsest level that is no coarser than the tile and gives its footprint in whole pixels; where none does, the one that comes nearest
    (level 0 is never off by more than half a pixel).

    Args:
        footprint: side of the tiles in level-0 pixels.
        pixels: side of the tiles in pixels of their own.
        levels: (width, height, downsample) of each level of the slide.
    """
    choices = []
    for number, (width, height, downsample) in enumerate(levels):
        # A coarser level would give CLAM less detail than the tile has.
        if number and downsample > footprint / pixels * 1.01:
            continue
        size = max(1, round(footprint / downsample))
        choices.append(ClamPatch(number, size, float(downsample), (int(width), int(height)), size * float(downsample), float(footprint)))
    exact = [choice for choice in choices if choice.exact]
    if exact:
        return max(exact, key=lambda choice: choice.downsample)
    return min(choices, key=lambda choice: (abs(choice.footprint - choice.wanted), choice.downsample))


def write_clam_coords(path: Path, coords: np.ndarray, patch: ClamPatch, name: str, save_path: str = "") -> None:
    """Writes `patches/<slide>.h5` as CLAM does, with the attributes on `coords`.

    Args:
        coords: [n, 2] (x, y) of the tiles' top left corners in level-0 pixels.
    """
    coords = np.ascontiguousarray(coords, np.int64).reshape(-1, 2)
    attributes = {
        "patch_size": patch.size, "patch_level": patch.level, "downsample": (patch.downsample, patch.downsample),
        "downsampled_level_dim": patch.dimensions, "level_dim": patch.dimensions, "name": name, "save_path": save_path,
    }
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        dataset = file.create_dataset("coords", data=coords, maxshape=(None, 2), chunks=_CHUNKS)
        for key, value in attributes.items():
            dataset.attrs[key] = value


def write_clam_features(out: Path, name: str, features: np.ndarray, coords: np.ndarray) -> None:
    """Writes a slide's features as `h5_files/<name>.h5` (with coords as int32, no attributes) and `pt_files/<name>.pt` (a float32 tensor).

    Args:
        features: [n, d]. coords: [n, 2] level-0 (x, y).
    """
    from wavepath.interop.torch_file import write_tensor

    features = np.ascontiguousarray(features, np.float32)
    coords = np.asarray(coords, np.int64).reshape(-1, 2)
    if len(coords) != len(features):
        raise ValueError(f"coords has {len(coords)} rows, features has {len(features)}")
    with atomic_path(Path(out) / H5_FILES / f"{name}.h5") as temporary, h5py.File(temporary, "w") as file:
        chunks = (max(1, min(len(features), 1024)), features.shape[1])
        file.create_dataset("features", data=features, maxshape=(None, features.shape[1]), chunks=chunks)
        file.create_dataset("coords", data=coords.astype(np.int32), maxshape=(None, 2), chunks=_CHUNKS)
    write_tensor(Path(out) / PT_FILES / f"{name}.pt", features)


def _table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, buffer.getvalue())


def write_process_list(path: Path, files: Iterable[str]) -> None:
    """Writes `process_list_autogen.csv`: CLAM's extractor goes through its `slide_id`, the slides' file names (its `--slide_ext` is cut off).

    The segmentation columns are CLAM's defaults.
    """
    _table(path, ["slide_id", *_PROCESS], ({"slide_id": name, **_PROCESS} for name in files))


def write_dataset_csv(path: Path, rows: Iterable[tuple[str, str, str]]) -> None:
    """Writes the table `case_id,slide_id,label` that CLAM's datasets are read from; `slide_id` is the name of the feature files."""
    _table(path, ["case_id", "slide_id", "label"], ({"case_id": case, "slide_id": slide, "label": label} for case, slide, label in rows))
