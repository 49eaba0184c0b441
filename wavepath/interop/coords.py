"""Where the tiles of a slide lie: TRIDENT's and CLAM's coordinate files read, TRIDENT's written (CLAM's in `interop.clam`).

Both hold `coords` int64 [n, 2], the (x, y) of each tile's top left corner in level-0 pixels, and say the tiles' size in the attributes of that
dataset. TRIDENT: `patch_size` pixels at `target_magnification`; its reader takes a tile's side on the slide for
round(patch_size * level0_magnification / target_magnification). CLAM: `patch_size` pixels of pyramid level `patch_level`.

TRIDENT rounds magnifications to 40, 20, 10, ..., so that a slide of 0.265 um per pixel passes for one of 0.25. Here they are written as 10 / mpp
as it is (37.7): its reader then arrives at the true footprint, whatever the scanner.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from wavepath import __version__
from wavepath.errors import DatasetError
from wavepath.files import atomic_path

SUFFIX = ".h5"
TRIDENT_SUFFIX = "_patches.h5"
PATCHES = "patches"  # the folder of coordinate files, in both layouts
_CHUNKS = (1, 2)  # TRIDENT's
_LADDER = (80, 60, 40, 20, 10, 5, 2.5, 1.25)


@dataclass(frozen=True)
class Geometry:
    """The size of a slide's tiles. `patch_size`: side in pixels of the tile's own resolution; then one of `footprint`, the side in level-0
    pixels, and `level`, the pyramid level whose pixels these are (its downsampling is the slide's to say). `overlap`: in tile pixels.
    """

    patch_size: int
    footprint: float | None
    level: int | None = None
    overlap: int = 0


@dataclass(frozen=True)
class TileCoords:
    """One slide's coordinate file: `coords` int64 [n, 2] level-0 (x, y), the tiles' size, and all attributes as they are stored."""

    path: Path
    coords: np.ndarray
    geometry: Geometry
    attributes: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.coords)


def number(value: Any) -> float | None:
    """An attribute as a finite positive number; None from anything else (TRIDENT stores what it does not know as the word None)."""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) and found > 0 else None


def geometry(attributes: Mapping[str, Any]) -> Geometry | None:
    """What attributes of TRIDENT or CLAM say of a tile's size; None where they say nothing that suffices.

    Raises:
        ValueError: they contradict each other.
    """
    size = number(attributes.get("patch_size"))
    if size is None or size != round(size):
        return None
    own, target, level0 = (number(attributes.get(key)) for key in ("level0_magnification", "target_magnification", "patch_size_level0"))
    overlap = round(number(attributes.get("overlap")) or 0)
    if own and target:
        footprint = size * own / target
        # `patch_size_level0` is a whole number, cut off or rounded by its writer; what differs by more is another size.
        if level0 and abs(level0 - footprint) > 1 + 1e-6:
            raise ValueError(f"patch_size_level0 is {level0:g}, but its magnifications make that {footprint:.6g}")
        return Geometry(round(size), footprint, None, overlap)
    if level0:
        return Geometry(round(size), level0, None, overlap)
    if "patch_level" in attributes:
        try:
            level = int(attributes["patch_level"])
        except (TypeError, ValueError):
            return None
        return Geometry(round(size), None, level, overlap) if level >= 0 else None
    return None


def plain_attributes(dataset: h5py.Dataset) -> dict[str, Any]:
    """The attributes of a dataset as plain Python values."""
    found = {}
    for key, value in dataset.attrs.items():
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        found[key] = value.item() if isinstance(value, np.generic) else value
    return found


def read_coords(path: Path) -> TileCoords:
    """Reads a coordinate file of TRIDENT (`<stem>_patches.h5`) or CLAM, or the coordinates in a feature file that says the tiles' size.

    No tiles at all are legal, and coordinates may lie outside of the slide as far as this function knows.

    Raises:
        DatasetError: missing, damaged, without whole-numbered `coords` [n, 2], or without attributes that say the tiles' size.
    """
    path = Path(path)
    try:
        with h5py.File(path, "r") as file:
            if not isinstance(file.get("coords"), h5py.Dataset):
                raise DatasetError(f"{path} has no dataset `coords`; give TRIDENT's *_patches.h5 or CLAM's patches/*.h5")
            dataset = file["coords"]
            attributes = plain_attributes(dataset)
            if dataset.dtype.kind not in "iuf":
                raise DatasetError(f"{path}: `coords` holds no numbers but {dataset.dtype}; make the file again")
            values = dataset[()]
    except (OSError, RuntimeError, KeyError, ValueError) as error:  # h5py's own errors for what is cut short or garbled inside
        raise DatasetError(f"cannot read {path} ({' '.join(str(error).split())[:200]}); make it again with the tool that wrote it") from None
    values = values.reshape(0, 2) if values.size == 0 else values
    if values.ndim != 2 or values.shape[1] != 2:
        raise DatasetError(f"{path}: `coords` is {list(values.shape)}, not [tiles, 2] (x, y) in level-0 pixels; make the file again")
    with np.errstate(invalid="ignore"):
        coords = values.astype(np.int64)
    if values.dtype.kind == "f" and not np.array_equal(coords, values):
        raise DatasetError(f"{path}: `coords` are not whole level-0 pixels (in micrometres?); convert them to pixels")
    try:
        found = geometry(attributes)
    except ValueError as error:
        raise DatasetError(f"{path}: {error}; make the file again") from None
    if found is None:
        raise DatasetError(
            f"{path}: the attributes of `coords` do not say how large a tile is; patch_size with level0_magnification and target_magnification "
            "(TRIDENT), or with patch_level (CLAM), are needed"
        )
    return TileCoords(path, coords, found, attributes)


def trident_attributes(
    *, name: str, patch_size: int, level0_magnification: float, target_magnification: float, overlap: int = 0,
    dimensions: tuple[int, int] | None = None, savetodir: str = "", more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The attributes that TRIDENT keeps on `coords`, magnifications as they are, and `more` (`mpp`, ...), which it passes over.

    Args:
        patch_size: side of a tile in its own pixels.
        level0_magnification, target_magnification: 10 / mpp of the slide and of the tile.
        overlap: of neighbouring tiles, in tile pixels.
        dimensions: (width, height) of the slide at level 0, where known.
    """
    footprint = round(patch_size * level0_magnification / target_magnification)
    attributes: dict[str, Any] = {
        "name": name, "patch_size": int(patch_size), "patch_size_level0": int(footprint), "level0_magnification": float(level0_magnification),
        "target_magnification": float(target_magnification), "overlap": int(overlap), "savetodir": savetodir, "wavepath_version": __version__,
    }
    if dimensions is not None:
        attributes |= {"level0_width": int(dimensions[0]), "level0_height": int(dimensions[1])}
    return attributes | dict(more or {})


def write_trident_coords(
    path: Path, coords: np.ndarray, attributes: Mapping[str, Any], columns: Mapping[str, np.ndarray] | None = None
) -> None:
    """Writes `<stem>_patches.h5` as TRIDENT does: `coords` int64 [n, 2] in chunks of (1, 2) that may grow, with its attributes.

    Args:
        coords: [n, 2] (x, y) of each tile's top left corner in level-0 pixels; n may be 0.
        attributes: from `trident_attributes`.
        columns: numbers of each tile [n], by name (scores): datasets of their own, which TRIDENT passes over.

    Raises:
        ValueError: a column of another length.
    """
    coords = np.ascontiguousarray(coords, np.int64).reshape(-1, 2)
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        dataset = file.create_dataset("coords", data=coords, maxshape=(None, 2), chunks=_CHUNKS)
        for key, value in sorted(attributes.items()):
            dataset.attrs[key] = "None" if value is None else value
        for name, column in sorted((columns or {}).items()):
            column = np.asarray(column)
            if len(column) != len(coords):
                raise ValueError(f"{name} has {len(column)} rows, coords has {len(coords)}")
            if name != "coords" and column.dtype.kind in "iufb":
                file.create_dataset(name, data=column)


def trident_folder(target_magnification: float, patch_size: int, overlap: int = 0) -> str:
    """`20x_512px_0px_overlap`: within 1 % of a usual magnification it is that one, so that tiles of 0.499 and 0.5 um share a folder."""
    shown = next((usual for usual in _LADDER if abs(target_magnification / usual - 1) <= 0.01), float(f"{target_magnification:.4g}"))
    return f"{shown:g}x_{patch_size}px_{overlap}px_overlap"


def find_coords(path: Path) -> dict[str, Path]:
    """The coordinate files of a folder (or the one file), by slide name: the file's place below the folder without `_patches.h5` or `.h5`.

    The folder is one of patches, one that holds such a folder (TRIDENT's `20x_512px_0px_overlap`, a TRIDENT job, a CLAM result), or one of feature
    files with coordinates.

    Raises:
        DatasetError: no file, or several folders of patches (one of them is to be given).
    """
    path = Path(path)
    if path.is_file():
        return {_name(path.name): path}
    if not path.is_dir():
        raise DatasetError(f"no coordinates at {path}: there is no such file or folder")
    files = sorted(file for file in path.rglob(f"*{SUFFIX}") if not any(part.startswith(".") for part in file.relative_to(path).parts))
    roots: dict[Path, list[Path]] = {}
    for file in files:
        parts = file.relative_to(path).parts[:-1]
        # The folder of patches that holds the file; below it, folders are part of a slide's id.
        place = next((index for index, part in enumerate(parts) if part == PATCHES), None)
        roots.setdefault(path if place is None else path.joinpath(*parts[: place + 1]), []).append(file)
    patches = {root: found for root, found in roots.items() if root != path}
    if len(patches) > 1:
        names = ", ".join(str(root.relative_to(path)) for root in patches)
        raise DatasetError(f"{path} holds several folders of coordinates ({names}); give one of them")
    root, found = next(iter((patches or roots).items()), (path, []))
    if not found:
        raise DatasetError(f"no coordinate file (*{SUFFIX}) under {path}; give TRIDENT's folder of *{TRIDENT_SUFFIX}, CLAM's patches, or one file")
    return {_name(file.relative_to(root).as_posix()): file for file in found}


def _name(text: str) -> str:
    return text.removesuffix(TRIDENT_SUFFIX if text.endswith(TRIDENT_SUFFIX) else SUFFIX)


def flat_names(ids: list[str]) -> dict[str, str]:
    """Names without folders for slide ids, as TRIDENT and CLAM want them: the last part where that is unique, else the parts joined by `__`."""
    last = {slide_id: slide_id.rsplit("/", 1)[-1] for slide_id in ids}
    count: dict[str, int] = {}
    for name in last.values():
        count[name] = count.get(name, 0) + 1
    names = {slide_id: name if count[name] == 1 else slide_id.replace("/", "__") for slide_id, name in last.items()}
    # A slide may bear another one's joined name (`a/b`, `c/b` and `a__b`): then all are joined, and what still is the same is no name.
    if len(set(names.values())) < len(names):
        names = {slide_id: slide_id.replace("/", "__") for slide_id in ids}
        if len(set(names.values())) < len(names):
            same = [slide_id for slide_id in ids if list(names.values()).count(names[slide_id]) > 1]
            raise DatasetError(f"slides {same[0]!r} and {same[1]!r} would both be called {names[same[0]]!r} without folders; rename one")
    return names
